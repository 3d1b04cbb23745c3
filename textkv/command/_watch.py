"""`python _watch.py COMMAND ...`: run a command, and end it with all that it starts when standard input ends.

The other end of that pipe is held by the process that needs the command, so it ends however that process does: a kill
that nothing can catch closes a pipe too. A file to run, not to import: it must start in a blink.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress

GRACE = 1.0  # seconds that the command has to end by itself: Ctrl-C is answered within three


def main() -> int:
    """The command's exit code; 127 with the reason on stderr if it cannot be started."""
    # Heard and passed over, as the one who holds the pipe decides; what is ignored would be ignored by the command too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # What is ended in the middle leaves its temporary files: they are made in a folder that goes with it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)
        try:
            process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, env=env)
        except OSError as error:
            print(f"{sys.argv[1]} cannot be started ({error.strerror})", file=sys.stderr)
            return 127
        threading.Thread(target=_watch, args=(process,), daemon=True).start()
        code = process.wait()
        _send(process, "SIGKILL")  # what it left behind would have nobody
    return code if code >= 0 else 128 - code


def _watch(process: subprocess.Popen) -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    _send(process, "SIGTERM")
    threading.Event().wait(GRACE)
    _send(process, "SIGKILL")


def _send(process: subprocess.Popen, name: str) -> None:
    """To the whole group, where a system has groups."""
    with suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile, which macOS may tell by the latter
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, name))
        else:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
