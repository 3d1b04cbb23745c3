"""The viewport as pixels, asked of Chromium until it answers."""

from __future__ import annotations

import base64
import io
import time

import numpy as np
from PIL import Image
from playwright.sync_api import CDPSession, Error, Page, TimeoutError

_SECONDS = 5.0  # for all tries; Chromium may never answer a question that meets the end of a document
_TRIES = 10
_PAUSE = 100  # milliseconds between them
_BETWEEN = ("Unable to capture", "Not attached")  # what it says where one document has gone and the next is not there
_FORMAT = {"format": "png", "optimizeForSpeed": True}


def capture(page: Page, session: CDPSession) -> np.ndarray | None:
    """The viewport as uint8 [height * scale, width * scale, 3]; None if one document followed the other all the time.

    Raises Playwright's `Error` for a page that is gone.
    """
    end = time.monotonic() + _SECONDS
    for _ in range(_TRIES):
        left = max(end - time.monotonic(), 0.1) * 1000
        try:
            answer = session.send("Page.captureScreenshot", _FORMAT, timeout=left)
            return np.array(Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB"))
        except TimeoutError:
            return None
        except Error as error:
            if not any(text in error.message for text in _BETWEEN) or page.is_closed():
                raise
            page.wait_for_timeout(_PAUSE)
    return None
