"""Before anything of ours is imported: a command that lacks an extra, or is stopped meanwhile, says so in one line.

`run` of `textkv.command` hears what a command raises and what signals it gets; its imports come before, seconds of
them. What they raise is heard by the interpreter's own hook for uncaught errors alone. Both are set in processes that
were started as `python -m` one of our commands, and nowhere else; each of our packages imports this first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

OURS = {"agentkv", "dlm", "envs", "eval", "textkv", "training"}
EXTRAS = {
    "PIL": "agents", "gymnasium": "agents", "greenlet": "agents", "playwright": "agents",
    "miniwob": "miniwob", "triton": "kernels", "matplotlib": "eval", "optimum": "quantized", "hqq": "quantized",
    "gguf": "models", "accelerate": "models", "faiss": "retrieval", "bm25s": "rag", "lm_eval": "harness",
    "sklearn": "conversations", "fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve",
    "diffusers": "pipeline", "xgrammar": "structured", "trl": "porag", "peft": "porag", "datasets": "porag",
    "ray": "ray",
}  # fmt: skip
"""The extra that brings a package, by the name that it is imported by."""


def missing_extra(error: BaseException) -> str | None:
    """A line that says what to install, if a package of an extra is missing, else None."""
    if not isinstance(error, ImportError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package} is not installed; pip install 'agentkv[{EXTRAS[package]}]'"


def command(argv: list[str]) -> str | None:
    """The command of ours that a process with these arguments (`sys.orig_argv`) runs, else None."""
    name = argv[argv.index("-m") + 1] if "-m" in argv[1:-1] else ""
    return name if name.partition(".")[0] in OURS else None


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a command."""
    told = missing_extra(error)
    if told is None:
        return sys.__excepthook__(kind, error, trace)
    print(f"{command(sys.orig_argv)}: {told}", file=sys.stderr)
    raise SystemExit(2)


def leave(number: int, frame: FrameType | None) -> None:
    """The handler of a signal that comes while a command is imported: nothing has been begun that would have to end.

    Not by an exception: packages catch those of their own imports, whatever they are, and go on, or say another thing.
    """
    if number == signal.SIGINT:
        os.write(2, f"{command(sys.orig_argv)}: stopped\n".encode())
    os._exit(128 + number)


def hear() -> None:
    """Set both."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = tell
    if threading.current_thread() is threading.main_thread():
        # A shell starts what is in the background with Ctrl-C ignored, and so it stays.
        for number, own in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == own:
                signal.signal(number, leave)


if command(sys.orig_argv):
    hear()
