"""An app on the network, by uvicorn, that ends in a way which clients understand."""

from __future__ import annotations

import socket

import uvicorn

LAST = 4  # seconds until connections are cut, well behind the moment that answers get


class Listener(uvicorn.Server):
    """Serves an app of `textkv.serve.build_app`. When it is told to stop, answers that are not over in a moment end
    with an error of the app's own: uvicorn would cut them, and write of each where it was in the program.

    Args:
        options: of `uvicorn.Config`.
    """

    def __init__(self, app: object, **options: object) -> None:
        # No access log: addresses of clients and paths are nobody's business, and prompts never were in it.
        own = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": LAST}
        super().__init__(uvicorn.Config(app, **own, **options))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        self.config.app.state.close_soon()
        await super().shutdown(sockets)
