"""Training, evaluation, data sets and measurements of pdo_jax: programs of their own."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m experiments.…` is being imported: until `boundary.install`, Ctrl-C ends it without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # which `main.program` blocks while Python starts again
