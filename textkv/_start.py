"""Before anything of ours is imported: a command that lacks an extra, or is stopped meanwhile, says so in one line.

`run` of `textkv.command` hears what a command raises; what its imports raise comes before, and only the interpreter's
own hook for uncaught errors hears that. It is set in processes that were started as `python -m` one of our commands,
and nowhere else.
"""

from __future__ import annotations

import sys
from types import TracebackType

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
    name = command(sys.orig_argv)
    if issubclass(kind, KeyboardInterrupt):
        print(f"{name}: stopped", file=sys.stderr)
        raise SystemExit(130)
    told = missing_extra(error)
    if told is None:
        return sys.__excepthook__(kind, error, trace)
    print(f"{name}: {told}", file=sys.stderr)
    raise SystemExit(2)


if command(sys.orig_argv) and sys.excepthook is sys.__excepthook__:
    sys.excepthook = tell
