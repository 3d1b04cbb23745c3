"""Tasks on pages that look like the web: an office with a shop (gentelella), a dashboard of another look (sb-admin-2).

The pages are two packages of npm under licences of their own (`packages.py`); nothing is fetched unless asked:
`python -m envs.sites install`. `SITES` names the tasks; those called memory-... need on one page what another showed.
"""

from . import across, admin, messages, planning, shop, workspace
from .packages import SitesMissing
from .task import Site, SiteTask

SITES: dict[str, Site] = messages.TASKS | planning.TASKS | workspace.TASKS | shop.TASKS | across.TASKS | admin.TASKS

__all__ = ["SITES", "Site", "SiteTask", "SitesMissing"]
