"""The allow-list as a pure decision."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkv.envs.allow import AllowList, file_path, origin


def test_origin_fills_in_the_port_and_maps_sockets() -> None:
    assert origin("https://Example.com/a?b#c") == "https://example.com:443"
    assert origin("ws://127.0.0.1:8000/x") == "http://127.0.0.1:8000"
    assert origin("wss://example.com.") == "https://example.com:443"
    assert origin("https://b\u00fccher.example/") == "https://xn--bcher-kva.example:443"


@pytest.mark.parametrize(
    "url", ["", "about:blank", "file:///a", "http://", "http://a:99999/", "javascript:1", "http://[::1"]
)
def test_no_origin(url: str) -> None:
    assert origin(url) == ""


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/",
        "https://good.example/",  # another scheme
        "http://good.example:81/",
        "http://good.example.evil.example/",
        "http://good.example@evil.example/",
        "javascript:alert(1)",
        "JavaScript:alert(1)",
        "chrome://settings",
        "view-source:http://good.example/",
        "ftp://good.example/",
        "file:///etc/passwd",
        "about:config",
        "data:text/html,x",
        "blob:http://good.example/1",
        "",
    ],
)
def test_refused(url: str) -> None:
    assert AllowList(("http://good.example",)).refusal(url)


@pytest.mark.parametrize(
    "url", ["http://good.example", "http://good.example:80/a", "http://u:p@good.example/", "about:blank"]
)
def test_admitted(url: str) -> None:
    assert AllowList(("http://good.example",)).refusal(url) == ""


def test_inline_pictures_pass_but_are_no_pages() -> None:
    for url in ("data:image/png;base64,AA", "blob:null/1"):
        assert AllowList().refusal(url, navigation=False) == ""
        assert "may not be navigated to" in AllowList().refusal(url)


def test_files_stay_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in side"
    folder.mkdir()
    (folder / "a.html").touch()
    (tmp_path / "secret.html").touch()
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    rule = AllowList(folders=(folder,))
    root = folder.as_uri()
    assert rule.refusal(f"{root}/a.html?x=1#y") == ""
    for away in (f"{root}/../secret.html", f"{root}/%2e%2e/secret.html", f"{root}/link.html", root + "-other/a.html"):
        assert rule.refusal(away) == "the file is outside the task's folder"
    assert file_path(f"file://host{folder}/a.html") is None
    assert file_path("file:///%00") is None


def test_a_bad_entry_is_named() -> None:
    with pytest.raises(ValueError, match="allow='example.com' is not an http"):
        AllowList(("example.com",))


def test_union_adds_up(tmp_path: Path) -> None:
    both = AllowList(("http://a.example",)) | AllowList(("http://b.example",), (tmp_path,))
    assert both.origins == ("http://a.example:80", "http://b.example:80")
    assert both.folders == (tmp_path.resolve(),)


@given(st.text(max_size=60))
def test_an_empty_list_admits_only_empty_pages(url: str) -> None:
    assert bool(AllowList().refusal(url)) == (url not in ("about:blank", "about:srcdoc"))


@given(st.from_regex(r"(http|https|ws|file|data)://?/?[a-z0-9@:./%\[\]?#]{0,30}", fullmatch=True))
def test_never_raises(url: str) -> None:
    assert isinstance(AllowList(("http://a.example",), (Path("/tmp"),)).refusal(url), str)
