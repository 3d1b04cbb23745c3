"""How the pages of the two packages are served: what of them is changed, and what is added."""

from __future__ import annotations

from dataclasses import dataclass

from .packages import GENTELELLA, SB_ADMIN, Package


@dataclass(frozen=True)
class Template:
    """How the pages of a package are served.

    folder: where its pages are. glue: our script for them. patches: (file, text in it, text instead). added: pages of
    ours, (name, the template's page whose frame they have); what is in the frame lies in `pages/`. picture: of the
    template's own, where a page shows one of another host.
    """

    package: Package
    folder: str
    glue: str
    patches: tuple[tuple[str, str, str], ...]
    added: tuple[tuple[str, str], ...]
    picture: str


OFFICE = Template(
    GENTELELLA,
    "production/",
    "gentelella.js",
    (
        # each line: the place where a script of theirs has its data ready, and has not drawn them yet
        ("js/inbox-D12uPxEe.js", "export{I as initInbox}", 'site.bind("mail",s.messages);export{I as initInbox}'),
        ("js/kanban-BnuDD_rj.js", "export{v as initKanban}", 'site.bind("cards",l);export{v as initKanban}'),
        ("js/calendar-Bp3TgRiS.js", "export{w as initCalendar}", 'site.bind("events",r);export{w as initCalendar}'),
        ("js/file-manager-CWvXo8UM.js", "export{y as init", 'site.bind("files",o);export{y as init'),
        ("js/user_management-C9OoHCfA.js", "}]})}),m();", '}]})}),site.bind("users",i),m();'),
        ("js/contacts-De0hi9Ja.js", "t.innerHTML=e.map(", 'site.bind("contacts",e),t.innerHTML=e.map('),
        ("js/projects-Bg2eomVD.js", "s.innerHTML=r.map(", 'site.bind("projects",r),s.innerHTML=r.map('),
        ("js/orders-mZmMx6xu.js", ':t([{id:"#7841"', ':t(site.bind("orders",[{id:"#7841"'),
        ("js/orders-mZmMx6xu.js", 'createdAt:"Apr 20, 2026"}])', 'createdAt:"Apr 20, 2026"}]))'),
        ("js/e_commerce-VLdHK6g5.js", 'innerHTML=[["Aurora', 'innerHTML=site.bind("products",[["Aurora'),
        ("js/e_commerce-VLdHK6g5.js", '"baselayer"]].map(', '"baselayer"]]).map('),
        ("js/e_commerce-VLdHK6g5.js", 'href="product_detail.html"', 'href="product_detail.html?id=${c}"'),
        ("js/product_detail-Dv3v6cuq.js", "${a.value} × AdminLTE Pro", "${a.value} × ${site.product()}"),
        ("js/product_detail-Dv3v6cuq.js", "Redirecting to checkout…", "Added to cart"),
        ("js/chat-B3GLNMHd.js", "i(),o(),document.getElementById", "site.chat(n,e),i(),o(),document.getElementById"),
        # two slips of theirs: the dialog of a new event closes at once, a file's menu lies outside of its file
        ("js/calendar-Bp3TgRiS.js", "action:()=>(f(l,c),!0)", "action:()=>(f(l,c),!1)"),
        (
            "js/file-manager-CWvXo8UM.js",
            '<button type="button" class="fm-item-menu"',
            '<span role="button" class="fm-item-menu"',
        ),
        (
            "js/file-manager-CWvXo8UM.js",
            "</svg>\\n        </button>\\n      </button>",
            "</svg>\\n        </span>\\n      </button>",
        ),
        # an answer that comes by itself, later
        ("js/chat-B3GLNMHd.js", 'n[a].push({from:"them",text:"Thanks — got it 👍",time:s}),o()', "0"),
        # a message stays until the next action, however slow the agent is
        ("js/toast-CBtjS_PZ.js", "duration:o=2600", "duration:o=864e5"),
        ("js/vendor-echarts--adq3UMa.js", 'animation:"auto",animationDuration:1e3', "animation:!1,animationDuration:0"),
    ),
    (("cart.html", "plain_page.html"),),
    "/images/user.png",
)
DASHBOARD = Template(
    SB_ADMIN,
    "",
    "sb-admin.js",
    (
        (
            "vendor/chart.js/Chart.min.js",
            'animation:{duration:1e3,easing:"easeOutQuart"',
            'animation:{duration:0,easing:"linear"',
        ),
    ),
    (("ticket.html", "blank.html"),),
    "/img/undraw_profile_1.svg",
)
