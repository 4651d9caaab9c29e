"""Kills, signals, full disks and flipped bits at random moments of small runs; prints a table of counts. Not part of the suite.

    python tests/chaos.py [--kills 100] [--signals 20] [--streams 40] [--processes 8] [--flips 40] [--disk DIR] [--seed 0]

A straight run tells what is right. A killed one is started again until it ends; right is the same test loss and, bit for bit,
the same checkpoint. The moments are spread evenly over a run, from the first import to the last write, every other time over
what follows its first checks, and named by what the folder holds then. Of the runs on a stream of pictures half are killed, an
eighth each end by SIGTERM and SIGINT, and of a quarter a process that reads is killed. No broken run may leave a process or
shared memory. DIR is a small file system of its own (`mount -t tmpfs -o size=4m tmpfs DIR`), which is filled up at random.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
CONFIG = """
from functools import partial
from experiments.config import piecewise
from small_runs import Net, shift
rates = partial(piecewise, {{0: 1e-2, 1: 3e-3}})
config = dict(augment=shift, epochs=4, learning_rate=rates, l2=1e-2, ema=0.9, eval_batch_size=200, {options})
"""
DIGITS = "network=Net(num_classes=10, dropout=0.3), batch_size=20, validation=100, scan=True"
STREAM = "network=Net(num_classes=3, dropout=0.3), batch_size=4, validation=15, image_size=8, stream=True, dataset='folder:{}'"
PICTURES = 40  # of each of three classes
HANG, SOON = 180, 20  # seconds: for a run, and for what it started to end behind it
RIGHT, BITS, TRACEBACK, HANGS, SILENT = "same bits", "other bits", "traceback", "hang", "wrong in silence"
LEFT = "left something behind"
SHARED, MARK = Path("/dev/shm"), "RUN_OF_CHAOS"


class Runs:
    """Starts runs of one config in a folder, and tells how they end."""

    def __init__(self, folder: Path, options: str):
        folder.mkdir()
        self.folder, self.config, self.shared, self.right = folder, folder / "config.py", set(), None
        self.config.write_text(CONFIG.format(options=options))
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }  # fmt: skip

    def measure(self):
        """A run without a fault: what it comes to, and how long it takes."""
        if self.right is None:
            self.finish(self.folder / "warm")  # fills the cache
            began = time.monotonic()
            self.right = self.finish(self.folder / "straight")
            self.seconds = time.monotonic() - began

    def start(self, workdir: Path, *arguments: str) -> subprocess.Popen:
        files = ["--config", str(self.config), "--workdir", str(workdir)]
        command = [sys.executable, "-m", "experiments.main", *files, *arguments]
        if not workdir.exists():
            self.shared = shared_memory()
        own = self.environment | {MARK: str(workdir)}  # which all that it starts has too
        return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, workdir: Path, *arguments: str):
        """What a run came to: its test loss and the hash of its last checkpoint; or how it failed."""
        code, output = end(self.start(workdir, *arguments))
        if code is None:
            return HANGS
        if "Traceback" in output or code < 0:
            return TRACEBACK
        return what(workdir) if code == 0 else output

    def verdict(self, workdir: Path) -> str:
        """A run that was broken off has left nothing, and is started again."""
        if not self.leaves_nothing(workdir):
            return LEFT
        found = self.finish(workdir)
        if not self.leaves_nothing(workdir):
            return LEFT
        if isinstance(found, tuple):
            return RIGHT if found == self.right else BITS
        return found if found in (HANGS, TRACEBACK) else "error"

    def leaves_nothing(self, workdir: Path) -> bool:
        """Whether all processes of a run that has ended have ended soon, and shared memory is as it was."""
        soon = time.monotonic() + SOON
        while left := [f"process {pid}: {words(pid)}" for pid in belonging(workdir)] + sorted(shared_memory() - self.shared):
            if time.monotonic() > soon:
                print("left: " + ", ".join(left), file=sys.stderr)
                return False
            time.sleep(0.1)
        return True


def belonging(workdir: Path) -> list[int]:
    """The processes that a run has started, and those that these have."""
    mark = f"{MARK}={workdir}".encode()
    return [int(pid.name) for pid in Path("/proc").glob("[0-9]*") if mark in content(pid / "environ").split(b"\0")]


def words(pid: int) -> str:
    return content(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode()


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def shared_memory() -> set[str]:
    return {str(path) for path in SHARED.glob("*")}


def end(process) -> tuple[int | None, str]:
    try:
        output, _ = process.communicate(timeout=HANG)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]


def what(workdir: Path):
    result = json.loads((workdir / "result.json").read_text())
    about = json.loads((workdir / "checkpoints" / "4" / "about" / "metadata").read_text())
    lines = [json.loads(line)["epoch"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return result["test_loss"], result["test_error"], json.dumps(about, sort_keys=True), tuple(lines)


def phase(workdir: Path) -> str:
    """What a run was doing, by what its folder holds."""
    if not (workdir / "config.json").exists():
        return "start and checks"
    if (workdir / "result.json").exists():
        return "end"
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    if any("tmp" in name for name in names):
        return "writing a checkpoint"
    metrics = workdir / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    return "compiling and first epoch" if lines == 0 else "evaluation and last writes" if lines >= 4 else "a later epoch"


def kills(runs: Runs, count: int, chance: random.Random, number: int):
    """Kills at moments spread over the run, every fourth time two of them in a row."""
    for k in range(count):
        workdir = runs.folder / f"killed_{number}_{k}"
        moments = [(k + chance.random()) / count, *([chance.random()] if k % 4 == 0 else [])]
        for again, moment_of_run in enumerate(moments):
            process = runs.start(workdir)
            while k % 2 and not (workdir / "config.json").exists() and process.poll() is None:
                time.sleep(0.01)  # every other time the start does not count, which takes most of a small run
            time.sleep(runs.seconds * (0.4 if k % 2 else 1) * moment_of_run)
            if again == 0:
                moment = phase(workdir)
            process.send_signal(number)
            code, output = end(process)
            if number != signal.SIGKILL and code not in (0, -number, 128 + number):
                yield f"{signal.Signals(number).name}: {moment}", f"exit code {code}"
                break
            if "Traceback" in output:
                yield f"{signal.Signals(number).name}: {moment}", TRACEBACK
                break
        else:
            yield f"{signal.Signals(number).name}: {moment}", runs.verdict(workdir)
        shutil.rmtree(workdir, ignore_errors=True)


def readers(runs: Runs, count: int, chance: random.Random):
    """A process that reads for a stream is killed: the run says so in a line, and goes on when it is started again."""
    for k in range(count):
        workdir = runs.folder / f"reader_{k}"
        process = runs.start(workdir)
        while not (reading := [pid for pid in belonging(workdir) if "spawn_main" in words(pid)]) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.4 * runs.seconds * (k + chance.random()) / count)
        moment = phase(workdir)
        for pid in reading[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code, output = end(process)
        if "Traceback" in output or code not in (0, 2) or code == 2 and output.count("error: ") != 1:
            yield f"a process that reads killed: {moment}", HANGS if code is None else TRACEBACK
        else:
            told = "told in a line" if code else "of no consequence"
            yield f"a process that reads killed: {moment}, {told}", runs.verdict(workdir)
        shutil.rmtree(workdir)


def paint(folder: Path) -> Path:
    """Pictures of noise of several sizes, as PNG and JPEG, in a folder for each of three classes."""
    noise = np.random.default_rng(0)
    for number, name in enumerate(("a", "b", "c")):
        (folder / name).mkdir(parents=True)
        for k in range(PICTURES):
            pixels = noise.integers(80 * number, 80 * number + 96, (200 + k, 240, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.{'png' if k % 2 else 'jpg'}")
    return folder


def processes(runs: Runs, count: int, chance: random.Random):
    """One of two processes is killed: the other ends soon, with a line; both started again end with the bits of two."""
    right = None
    for k in range(-1, count):
        workdir, killed = runs.folder / f"pair_{k}", k % 2
        pair = start_pair(runs, workdir)
        if k >= 0:
            time.sleep(1.5 * runs.seconds * (k + chance.random()) / count)
            pair[killed].kill()
            began = time.monotonic()
            _, output = end(pair[1 - killed])
            waited = time.monotonic() - began
            pair[killed].communicate()
            if "Traceback" in output or waited > 65:
                yield f"process {killed} of two killed", TRACEBACK if "Traceback" in output else HANGS
                continue
            pair = start_pair(runs, workdir)
        ends = [end(process) for process in pair]
        found = what(workdir) if all(code == 0 for code, _ in ends) else str(ends)
        if k < 0:
            right = found
        else:
            yield f"process {killed} of two killed", RIGHT if found == right else "error" if isinstance(found, str) else BITS
        shutil.rmtree(workdir, ignore_errors=True)


def start_pair(runs, workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--distributed", "--coordinator", address, "--num-processes", "2", "--process-id"]
    return [runs.start(workdir, *shared, str(index)) for index in (0, 1)]


def flips(runs: Runs, count: int, chance: random.Random):
    """A bit of the last checkpoint, config or metrics is flipped before a run goes on: refused, or of no consequence."""
    begun = runs.folder / "begun"
    shutil.copytree(runs.folder / "straight", begun)
    (begun / "result.json").unlink()
    for _ in range(count):
        workdir = runs.folder / "flipped"
        shutil.copytree(begun, workdir)
        files = [*(workdir / "checkpoints" / "4").rglob("*"), workdir / "config.json", workdir / "metrics.jsonl"]
        files = [path for path in files if path.is_file() and path.stat().st_size]
        path = chance.choice(files)
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        code, output = end(runs.start(workdir))
        told = "refused in a line" if code == 2 and "Traceback" not in output and "error: " in output else TRACEBACK
        found = HANGS if code is None else told if code else RIGHT if what(workdir)[:3] == runs.right[:3] else SILENT
        yield f"a bit flipped in {'a checkpoint' if 'checkpoints' in path.parts else path.name}", found
        shutil.rmtree(workdir)


def disks(runs: Runs, count: int, chance: random.Random, disk: Path):
    """A disk that is full after a random number of bytes; with more room the run then goes on."""
    for k in range(count):
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = shutil.disk_usage(disk).free
        (disk / "fill").write_bytes(b"\0" * int(free - 600_000 * (k + chance.random()) / count))
        code, output = end(runs.start(disk / "run"))
        (disk / "fill").unlink()
        if code is None or "Traceback" in output or code not in (0, 2):
            yield "a full disk", HANGS if code is None else TRACEBACK
        else:
            yield f"a full disk, {'told in a line' if code else 'large enough'}", runs.verdict(disk / "run")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("kills", 100), ("signals", 20), ("streams", 40), ("processes", 8), ("flips", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--disk", type=Path, help="a small file system to fill up")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    chance, counts = random.Random(options.seed), collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        digits = Runs(Path(folder, "digits"), DIGITS)
        stream = Runs(Path(folder, "stream"), STREAM.format(paint(Path(folder, "pictures"))))
        plan = [(flips, digits, options.flips), (processes, digits, options.processes), (readers, stream, options.streams // 4)]
        plan += [(disks, digits, 12, options.disk)] if options.disk else []
        for runs, kill, others in ((digits, options.kills, options.signals // 2),
                                   (stream, options.streams // 2, options.streams // 8)):
            plan += [(kills, runs, kill, signal.SIGKILL), (kills, runs, others, signal.SIGTERM),
                     (kills, runs, others, signal.SIGINT)]
        for function, runs, count, *more in plan:
            if count:
                runs.measure()
                for fault, found in function(runs, count, chance, *more):
                    fault += " (a stream)" * (runs is stream)
                    counts[fault][found] += 1
                    print(f"{fault}: {found}", file=sys.stderr, flush=True)
    table = report(counts)
    print(table)
    if options.out:
        options.out.write_text(table)


def report(counts) -> str:
    columns = sorted({found for row in counts.values() for found in row}, key=lambda name: (name != RIGHT, name))
    lines = ["| fault, and what the run was doing | n | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for fault, row in sorted(counts.items()):
        lines.append(f"| {fault} | {row.total()} | " + " | ".join(str(row[name] or "") for name in columns) + " |")
    total = sum(counts.values(), collections.Counter())
    lines.append(f"| all | {total.total()} | " + " | ".join(str(total[name]) for name in columns) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
