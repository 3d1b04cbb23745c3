"""How commands end: 0, one line and 2 for a request that cannot be carried out, 130 after Ctrl-C, 143 after SIGTERM."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from textkv._start import command, missing_extra

REFUSED, STOPPED, TERMINATED = 2, 130, 143  # the latter two: 128 + number of the signal
PATIENCE = 2.0  # seconds in which what is open may be closed after a signal
TIDYING = 0.5  # further seconds for temporary folders of what did not let itself be closed: three in all
_NO_MEMORY = re.compile("out of memory|can't allocate memory|MemoryError")
LINE = 400  # characters of a line that tells an error


def run(
    name: str,
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, list[str]], int | None],
    argv: Sequence[str] | None,
    *,
    explained: tuple[type[Exception], ...] = (),
    kept: str = "",
) -> int:
    """Parse `argv` (None = the process's own), do `work(arguments, argv)`, and say in one line why it could not.

    Args:
        name: the command's, as "eval.needle": what its lines begin with.
        explained: errors beside ValueError and OSError whose message tells the user what to change.
        kept: what is added to the line after a Ctrl-C, e.g. "the same command goes on".
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _short(parser)
    stopped = f"{name}: stopped{'; ' if kept else ''}{kept}"
    with terminable(stopped):
        try:
            args = parser.parse_args(argv)
            _apart(parser, args)
            _quiet()
            return work(args, argv) or 0
        except BrokenPipeError:
            # The reader has seen enough; what is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ValueError, OSError, argparse.ArgumentTypeError, *explained) as error:
            print(f"{name}: {one_line(error)}", file=sys.stderr)
            return REFUSED
        except (ImportError, MemoryError, RuntimeError) as error:
            told = missing_extra(error) or _no_memory(error)
            if told is None:
                raise
            print(f"{name}: {told}", file=sys.stderr)
            return REFUSED
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
            _go(STOPPED)
            return STOPPED
        except SystemExit as end:
            if end.code == TERMINATED:
                _go(TERMINATED)
            raise


def one_line(error: BaseException) -> str:
    """What an error says, in one line that any terminal shows; a long value is cut in its middle."""
    told = "".join(x if x.isprintable() else " " for x in str(error) or type(error).__name__)
    told = " ".join(told.split())
    return told if len(told) <= LINE else f"{told[: LINE // 2]} ... {told[-LINE // 2 :]}"


def _no_memory(error: BaseException) -> str | None:
    """A line for what asks for more memory than there is, else None."""
    # torch has a class for a GPU's memory and none for the host's.
    # A worker's error comes as a traceback in words: its last line is the error's.
    told = [line for line in str(error).splitlines() if _NO_MEMORY.search(line)]
    if not isinstance(error, MemoryError) and not told:
        return None
    said = one_line(MemoryError(told[-1]) if told else error)
    return f"there is not enough memory ({said}); ask for shorter texts, fewer at once, or a smaller model"


def _quiet() -> None:
    """transformers draws a bar for every file that it loads; what a command says is its answer."""
    from transformers.utils import logging  # seconds that --help and a wrong request need not wait

    logging.disable_progress_bar()


def _short(parser: argparse.ArgumentParser) -> None:
    """Errors of a parser and of those below it become one line without the usage, as any other of the request."""
    parser.error = _refuse
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _short(below)


def _apart(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises ValueError if two arguments name one place, and what one of them writes would take the other's."""
    named: dict[str, tuple[str, bool]] = {}
    for action in _actions(parser):
        value = getattr(args, action.dest, None)
        if isinstance(value, Path):
            name, place = "/".join(action.option_strings) or action.dest, os.path.realpath(value)
            writes = getattr(action.type, "writes", False)
            other, wrote = named.setdefault(place, (name, writes))
            if other != name and (writes or wrote):
                raise ValueError(f"arguments {other} and {name} both name {value}; give another for one of them")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of a parser and of the ones below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@contextmanager
def terminable(stopped: str = "stopped") -> Iterator[None]:
    """A context in which SIGTERM and Ctrl-C end the process as an exception does: what is open is closed, workers are
    ended. What has not let itself be closed after `PATIENCE` is left, with the line `stopped` after a Ctrl-C: workers
    and browsers end by themselves when this process has gone, and temporary folders are removed still.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[threading.Timer] = []
    ends: list[BaseException] = []

    def hear(number: int, frame: FrameType | None) -> None:
        code, line = (TERMINATED, "") if number == signal.SIGTERM else (STOPPED, f"{stopped}\n")
        late.append(threading.Timer(PATIENCE, _leave, (code, line)))
        late[-1].daemon = True
        late[-1].start()
        ends.append(SystemExit(TERMINATED) if number == signal.SIGTERM else KeyboardInterrupt())
        raise ends[-1]

    def swallowed(told: sys.UnraisableHookArgs) -> None:
        # In a callback of a weak reference nothing can be raised: the timer ends the process, and nobody is told more.
        if all(told.exc_value is not end for end in ends):
            hook(told)

    # A shell starts what is in the background with Ctrl-C ignored, and so it stays.
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in late:
            timer.cancel()


def _go(code: int) -> None:
    """End a process that was started for the command alone: to take torch apart costs the interpreter a second."""
    if command(sys.orig_argv) and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it is ending already
        _leave(code, "")


def _leave(code: int, line: str) -> None:
    sys.stderr.write(line)
    tidying = threading.Thread(target=_tidy, daemon=True)
    tidying.start()
    tidying.join(TIDYING)
    os._exit(code)


def _tidy() -> None:
    """What is otherwise left to the end of the interpreter, which does not come."""
    with suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.terminate()
    weakref.finalize._exitfunc()  # the folders of `tempfile`, beside others
    multiprocessing.util._run_finalizers(0)  # semaphores, of which its tracker would complain
