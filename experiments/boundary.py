"""Where a program meets the world: every error, signal and closed stream becomes one line and an exit code.

Exit codes: 0 done; 2 refused or failed, with a line that says why and what to do; 128 + n ended by signal n.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable

FAILED = 2
LONGEST = 1000  # characters of a line: what was given, and is told again, may be long


class Refused(Exception):
    """What the program expects to go wrong; its message says what was given, what was expected, and the remedy."""


def guarded(function: Callable[[], None]) -> int:
    """Runs a program; its exit code."""
    try:
        function()
        if sys.stdout:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last checkpoint")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        say(f"error: {_line(error)}")
        return FAILED


def say(text: str):
    """Writes lines to standard error, if that can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def _line(error: Exception) -> str:
    if isinstance(error, Refused):
        return "\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST // 2]} … {line[-LONGEST // 4:]}"
                         for line in str(error).splitlines())
    words = (str(error).strip() or "no more is known").splitlines()[0][:400]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {os.fsdecode(error.filename)[:200]}" if error.filename else "")
    if "nable to initialize backend" in words or "_default_backend" in traceback.format_exc():
        asked = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX has no such devices here ({words}); JAX_PLATFORMS is {asked!r}: unset it, or mend the devices"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words:
        return f"the memory does not suffice ({words}); try a smaller batch_size or eval_batch_size"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="pdo_jax-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        return f"{type(error).__name__}: {words} (where: {file.name})"
    except OSError:
        return f"{type(error).__name__}: {words}"


def install(words: str):
    """For a program of its own: streams that can always be written, and signals that end it at once, with a line.

    Killing is safe at any moment, so nothing is tidied up: a thread that the signal wakes, also while the main one is in a
    compiler or on a device, says `words` and ends the process.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # of errors that are raised as well, Orbax logs the stacks
    threading.excepthook = sys.unraisablehook = lambda _: None
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, this one; else a file of ours would take its place
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_wait, args=(read, words), daemon=True).start()


def _wait(read, words):
    number = os.read(read, 1)[0]
    os.write(2, f"\nended by {signal.Signals(number).name}; {words}\n".encode())
    os._exit(128 + number)
