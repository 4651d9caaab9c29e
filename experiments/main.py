"""Trains, evaluates and asks networks: `python -m experiments.main --help`.

With no arguments it trains the quick config on the embedded subset of rotated MNIST. The same command again goes on
where a run was interrupted, and prints the result of one that is finished.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import glob
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import boundary, together
from experiments.boundary import Refused

QUICK = Path(__file__).parent / "configs" / "quick.py"
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # they make it cheap to touch a big temporary first
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return boundary.guarded(lambda: run(options))


def run(options: argparse.Namespace):
    compatible(options)
    address = None
    if options.distributed:
        address = together.check(options.coordinator, options.num_processes, options.process_id, options.timeout)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the loss of a process is told by `together`, in one line
    import jax  # here and not above: what the process settings set is read by the import

    if address:
        together.meet(address, options.num_processes, options.process_id, options.timeout)
    if options.distributed:
        wait = {"initialization_timeout": math.ceil(options.timeout)}
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id, **wait)
    try:
        work(options)
    except Exception:
        together.settle()
        raise
    together.leave()


def compatible(options: argparse.Namespace):
    """Options that do not go together are refused, not ignored."""
    asks = [name for name in ("evaluate", "predict", "pack", "unpack", "export") if getattr(options, name)]
    training = {name: getattr(options, name) for name in ("minutes", "force_resume", "distributed")}
    of_processes = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id", "timeout")}
    if len(asks) > 1:
        raise Refused(f"--{asks[0]} and --{asks[1]} do not go together; give one of them")
    for name, value in training.items():
        if asks and value not in (None, False):
            raise Refused(f"--{name.replace('_', '-')} is for training; it does not go with --{asks[0]}")
    for name, value in of_processes.items():
        if value != parser().get_default(name) and not options.distributed:
            raise Refused(f"--{name.replace('_', '-')} is for --distributed; give both or none")
    if options.workdir and asks and asks != ["predict"]:
        raise Refused(f"--workdir does not go with --{asks[0]}, which names the run itself")
    if options.predict and not options.workdir:
        raise Refused("--predict needs a trained run: give its folder with --workdir")
    if options.format != "text" and not options.predict:
        raise Refused("--format is for --predict; give both or none")
    if asks and options.set and not options.config:
        raise Refused(f"--set changes a config; with --{asks[0]} name its file too, with --config")
    if asks in (["pack"], ["unpack"]) and options.config:
        raise Refused(f"--config does not go with --{asks[0]}")
    if options.minutes is not None and not options.minutes > 0:
        raise Refused(f"--minutes is {options.minutes}; it must be a number above 0")


def work(options: argparse.Namespace):
    import jax

    from experiments import config, packing, saved, train

    spare()
    if options.pack:
        for path in packing.pack(*options.pack):
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return
    if options.unpack:
        file, folder = options.unpack
        epoch = packing.unpack(file, folder)
        print(f"{folder}: a run after epoch {epoch}; --workdir {folder}, with the --config and --set of its beginning, goes on")
        return
    if options.predict or options.evaluate or options.export:
        given = config.load(options.config, options.set) if options.config else None
        if options.export:
            saved.export(*options.export, given)
        elif options.predict:
            stream = (file for given in options.predict for file in (map(str.rstrip, sys.stdin) if given == "-" else [given]))
            one = len(options.predict) == 1 and options.predict != ["-"] and not Path(*options.predict).is_dir()
            answer(*saved.predict(options.workdir, stream, given), options.format, heads=not one)
        else:
            told(saved.evaluate(options.evaluate, given))
        return
    file = Path(options.config or QUICK).absolute()
    workdir = Path(options.workdir or Path("runs", "-".join([file.stem, *options.set]).replace(os.sep, "_")))
    source = {"file": str(file), "overrides": options.set}
    given = config.load(options.config or QUICK, options.set)
    minutes = math.inf if options.minutes is None else options.minutes
    result = train.train(given, workdir, source=source, minutes=minutes, force=options.force_resume)
    if jax.process_index() == 0:
        report(result, workdir)


@functools.cache
def spare():
    """Spares time and memory, once all is imported: the garbage collector would go through what is imported and what jax traces
    again and again, and glibc would keep the hundreds of MB that XLA frees when it has compiled a large program."""
    from jax import monitoring

    gc.freeze()
    gc.set_threshold(100_000)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def compiled(event, seconds, **_):
        if event.endswith("backend_compile_duration") and seconds > 1:
            trim(0)

    if trim:
        monitoring.register_event_duration_secs_listener(compiled)


def report(result: Mapping | None, workdir: Path):
    """Prints what a run came to; None: it was stopped by --minutes."""
    if result is None:
        print(f"stopped before the time was over; the same command goes on from the last checkpoint in {workdir}/")
        return
    print(f"data: {result['dataset']} ({result['dataset_note']}); {result['parameters']} parameters")
    if result.get("test_error") is not None:
        print(f"test error: {result['test_error']:.2%} of {result['images']['test']} images, after the last epoch")
    else:
        print(f"{scores(result)} of {result['images']['test']} examples, after the last epoch")
    if errors := result.get("equivariance_error"):
        print("equivariance error: how far turned images move the trained network's logits, or its fields from turned ones:")
        print("  " + "  ".join(f"{name}: {error:.1e}" for name, error in errors.items()))
    print("figures: " + "  ".join(result["figures"]))
    print(f"all of the run: {workdir}/ (result.json, metrics.jsonl, tensorboard/, checkpoints/)")


def answer(classes: Sequence[str], predictions, form: str, heads: bool):
    """Prints class probabilities, for a reader, as CSV, or as lines of JSON; files that cannot be read go to standard error."""
    table, wrong, count = csv.writer(sys.stdout), 0, 0
    if form == "csv":
        table.writerow(["file", "class", *classes])
    for path, found in predictions:
        count += 1
        if isinstance(found, Exception):
            wrong += 1
            boundary.say(str(found))
            continue
        best = classes[found.argmax()]
        if form == "csv":
            table.writerow([path, best, *(f"{p:.6f}" for p in found)])
        elif form == "jsonl":
            each = dict(zip(classes, map(float, found), strict=True))
            print(json.dumps({"file": str(path), "class": best, "probabilities": each}))
        else:
            lines = [f"class {classes[k]}: {found[k]:.4f}" for k in found.argsort()[::-1]]
            print(*[f"{path}:"][:heads], *lines, sep="\n")
        sys.stdout.flush()
    if wrong:
        raise Refused(f"{wrong} of {count} files could not be read")


def told(result: Mapping):
    """Prints what an evaluation found."""
    epoch = f"epoch {result['epoch']}: " if result["epoch"] else ""
    if "interval" not in result:
        print(f"{epoch}{scores(result)} of {result['images']} examples on {result['dataset']}")
        return
    low, high = result["interval"]
    print(f"{epoch}test error {result['test_error']:.2%} of {result['images']} images ({low:.2%} to {high:.2%} with 95 %) "
          f"on {result['dataset']}")
    if len(classes := result["classes"]) <= 20:
        cells = [["", *classes], *([name, *map(str, row)] for name, row in zip(classes, result["confusion"], strict=True))]
        width = 1 + max(len(cell) for row in cells for cell in row)
        print("confusion, a row for each class, a column for each answer:")
        print("\n".join("".join(cell.rjust(width) for cell in row) for row in cells))
    if angles := result.get("accuracy_at_angles"):
        turns, first = len(angles) - 1, result["images_turned"]
        print(f"accuracy on the first {first} of them at {turns} angles: {sum(angles[1:]) / turns:.2%} in the mean, "
              f"{min(angles):.2%} at the lowest, {max(angles):.2%} at the highest")


def scores(result: Mapping) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result.items()
                     if name.startswith("test_") and isinstance(value, int | float))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.main", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="a Python file that defines config = dict(...); default: quick.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key of the config, or network.OPTION of its network")
    parser.add_argument("--workdir", type=Path, help="folder of the run, shared by all hosts; default: runs/<config>")
    parser.add_argument("--minutes", type=float, help="stop at the end of an epoch before so many minutes are over")
    parser.add_argument("--force-resume", action="store_true", help="go on though config, code, data or machine have changed")
    parser.add_argument("--evaluate", type=Path, metavar="RUN",
                        help="the test error of a workdir, of one checkpoint in it, or of a network of PRETRAINED by its name")
    parser.add_argument("--pack", type=Path, nargs=2, metavar=("RUN", "FILE"), help="the run in a file, to go on elsewhere")
    parser.add_argument("--unpack", type=Path, nargs=2, metavar=("FILE", "RUN"), help="the folder of a run from such a file")
    parser.add_argument("--export", type=Path, nargs=2, metavar=("RUN", "FILE"), help="the network for pdo_jax.export.load")
    parser.add_argument("--predict", nargs="+", metavar="IMAGE",
                        help="class probabilities from the run at --workdir: of pictures, folders, or - for paths from stdin")
    parser.add_argument("--format", choices=["text", "csv", "jsonl"], default="text", help="of --predict")
    parser.add_argument("--distributed", action="store_true", help="one of several processes that train together")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; found by itself on TPU")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another process; default: 60")
    return parser


def process_settings(environment: Mapping[str, str], accelerators: Sequence[str]) -> dict[str, str]:
    """The environment variables to set before Python starts; what the user has set stays.

    On a CPU: how glibc takes memory. It does nothing on a GPU or TPU, so "on a CPU" is decided simply: by JAX_PLATFORMS, else
    by the absence of `accelerators`.
    """
    settings = {}
    with contextlib.suppress(RuntimeError):  # nobody's home
        settings["JAX_COMPILATION_CACHE_DIR"] = str(Path("~/.cache/pdo_jax/jax-cache").expanduser())
    platforms = environment.get("JAX_PLATFORMS")
    if platforms == "cpu" or not platforms and not accelerators:
        settings |= LARGE_PAGES
    return {name: value for name, value in settings.items() if name not in environment}


def program(function: Callable[[], int], words: str):
    """Runs a program of its own, whose interruption `words` explains, in a process that was started with the settings: glibc
    reads its own then, so one in which some are missing starts again, once."""
    boundary.install(words)
    missing = process_settings(os.environ, [path for pattern in ACCELERATORS for path in glob.glob(pattern)])
    if missing:
        check_flags(os.environ.get("XLA_FLAGS", ""))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)
    sys.exit(function())


def check_flags(flags: str):
    """XLA ends the process on a flag that it does not know; so those that the user gives are tried in another one."""
    if re.fullmatch(r"(\s*--xla_force_host_platform_device_count=\d+)*\s*", flags):
        return
    tried = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True)
    if tried.returncode < 0 or "XLA_FLAGS" in tried.stderr:
        words = next((line for line in tried.stderr.splitlines() if "XLA_FLAGS" in line), "").rpartition("] ")[2]
        boundary.say(f"error: XLA does not take XLA_FLAGS={flags!r}: {words[:200]}")
        sys.exit(boundary.FAILED)


if __name__ == "__main__":
    program(main, "the same command goes on from the last checkpoint, if it trains")
