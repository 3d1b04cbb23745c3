"""A browser context of its own for an episode: nothing shared with another, permissions denied, one look everywhere."""

from __future__ import annotations

from playwright.sync_api import Browser, BrowserContext, CDPSession

from .allow import AllowList
from .boundary import proxy

# a blinking caret would make two pictures of the same screen differ
_NO_CARET = """
new MutationObserver((_, watch) => {
  if (!document.documentElement) return;
  watch.disconnect();
  const style = document.createElement('style');
  style.textContent = '* { caret-color: transparent !important; }';
  document.documentElement.append(style);
}).observe(document, {childList: true});
"""

# the clipboard belongs to the browser process: what an earlier episode copied must not be there
_EMPTY_CLIPBOARD = """
document.addEventListener('copy', (event) => {
  event.clipboardData.setData('text/plain', '');
  event.preventDefault();
}, {once: true});
document.execCommand('copy');
"""


def isolated(
    browser: Browser, allow: AllowList, viewport: tuple[int, int], device_scale: float, downloads: bool, script: str
) -> BrowserContext:
    """A fresh context that reaches the origins of `allow` and may write the clipboard on them; `viewport` = (width,
    height) in CSS pixels, `script` runs first in every document unless it is "".
    """
    width, height = viewport
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=device_scale,
        accept_downloads=downloads,
        service_workers="block",
        locale="en-US",
        timezone_id="UTC",
        reduced_motion="reduce",
        proxy=proxy(allow),
    )
    context.grant_permissions([])
    for place in allow.origins:
        context.grant_permissions(["clipboard-write"], origin=place)
    context.add_init_script(_NO_CARET)
    if script:
        context.add_init_script(script)
    return context


def empty_clipboard(session: CDPSession) -> None:
    """Forget what an earlier episode copied; `session` is that of a page that belongs to nobody yet."""
    session.send("Runtime.evaluate", {"expression": _EMPTY_CLIPBOARD, "userGesture": True})
