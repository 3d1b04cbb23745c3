"""A server that really listens, for clients that bring their own HTTP."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

from textkv.mini import load_mini
from textkv.serve import ChatEngine
from textkv.serve.listener import Listener
from textkv.serve.template import PLAIN


def mini_engine(method: str = "snapkv", budget: str | None = "0.5", **options) -> ChatEngine:
    """The embedded text model as a chat model."""
    return ChatEngine(*load_mini(), method, budget, chat_template=PLAIN, **options)


@contextmanager
def listening(app):
    """A real server on a port of its own: what a client that leaves looks like, only a socket shows."""
    server = Listener(app, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
