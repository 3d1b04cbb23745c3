"""Back and forward as the buttons of a browser make them, within what the episode has seen."""

from __future__ import annotations

from playwright.sync_api import Page


def travel(page: Page, by: int) -> str:
    """Go `by` pages forward (negative: back); returns "" or why nothing was done.

    Back on the first page of a tab that another page opened closes it, as on a phone.
    """
    session = page.context.new_cdp_session(page)
    try:
        history = session.send("Page.getNavigationHistory")
        at, entries = history["currentIndex"], history["entries"]
        # an address that was typed is where the episode began; what lies before it is not the agent's to see
        start = at == 0 or entries[at]["transitionType"] == "typed" or entries[at - 1]["url"] == "about:blank"
        if by < 0 and start:
            return _close_opened(page)
        if not 0 <= at + by < len(entries):
            return "there is no page to go forward to; nothing was done"
        session.send("Page.navigateToHistoryEntry", {"entryId": entries[at + by]["id"]})
    finally:
        if not page.is_closed():
            session.detach()
    return ""


def _close_opened(page: Page) -> str:
    if page.opener() is None:
        return "there is no page to go back to; nothing was done"
    page.close()
    return ""
