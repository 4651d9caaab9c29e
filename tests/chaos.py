"""Kills, signals, full disks and flipped bits at random moments of small runs; prints a table of counts. Not part of the suite.

    python tests/chaos.py [--kills 100] [--signals 20] [--processes 8] [--flips 40] [--disk DIR] [--seed 0] [--out FILE]

A straight run tells what is right. A killed one is started again until it ends; right is the same test loss and, bit for bit,
the same checkpoint. The moments are spread evenly over a run, from the first import to the last write, every other time over
what follows its first checks, and named by what the folder holds then. DIR is a small file system of its own (`mount -t tmpfs
-o size=4m tmpfs DIR`), which is filled up at random.
"""

import argparse
import collections
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

ROOT = Path(__file__).parents[1]
CONFIG = """
from functools import partial
from experiments.config import piecewise
from small_runs import Net, shift
rates = partial(piecewise, {{0: 1e-2, 1: 3e-3}})
config = dict(network=Net(num_classes=10, dropout=0.3), augment=shift, epochs=4, batch_size=20, learning_rate=rates,
              validation=100, l2=1e-2, ema=0.9, eval_batch_size=200, scan={scan})
"""
HANG = 180  # seconds
RIGHT, BITS, TRACEBACK, HANGS, SILENT = "same bits", "other bits", "traceback", "hang", "wrong in silence"


class Runs:
    """Starts runs of one config in a folder, and tells how they end."""

    def __init__(self, folder: Path, devices: int = 1, scan: bool = True):
        self.folder = folder
        self.config = folder / f"config_{devices}_{scan}.py"
        self.config.write_text(CONFIG.format(scan=scan))
        self.environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }  # fmt: skip
        began = time.monotonic()
        self.finish(folder / "warm")  # fills the cache
        began = time.monotonic()
        self.right = self.finish(folder / "straight")
        self.seconds = time.monotonic() - began

    def start(self, workdir: Path, *arguments: str) -> subprocess.Popen:
        files = ["--config", str(self.config), "--workdir", str(workdir)]
        command = [sys.executable, "-m", "experiments.main", *files, *arguments]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, workdir: Path, *arguments: str):
        """What a run came to: its test loss and the hash of its last checkpoint; or how it failed."""
        code, output = end(self.start(workdir, *arguments))
        if code is None:
            return HANGS
        if "Traceback" in output or code < 0:
            return TRACEBACK
        return what(workdir) if code == 0 else output

    def verdict(self, workdir: Path) -> str:
        """A run that was broken off is started again."""
        found = self.finish(workdir)
        if isinstance(found, tuple):
            return RIGHT if found == self.right else BITS
        return found if found in (HANGS, TRACEBACK) else "error"


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


def kills(runs: Runs, count: int, number: int, chance: random.Random):
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
            if number != signal.SIGKILL and code not in (0, 128 + number):
                yield f"{signal.Signals(number).name}: {moment}", f"exit code {code}"
                break
            if "Traceback" in output:
                yield f"{signal.Signals(number).name}: {moment}", TRACEBACK
                break
        else:
            yield f"{signal.Signals(number).name}: {moment}", runs.verdict(workdir)
        shutil.rmtree(workdir, ignore_errors=True)


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


def disks(runs: Runs, disk: Path, count: int, chance: random.Random):
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
    for name, default in (("kills", 100), ("signals", 20), ("processes", 8), ("flips", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--disk", type=Path, help="a small file system to fill up")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    chance, counts = random.Random(options.seed), collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        parts = [kills(runs, options.kills, signal.SIGKILL, chance), kills(runs, options.signals // 2, signal.SIGTERM, chance),
                 kills(runs, options.signals // 2, signal.SIGINT, chance), flips(runs, options.flips, chance),
                 processes(runs, options.processes, chance)]
        parts += [disks(runs, options.disk, 12, chance)] if options.disk else []
        for part in parts:
            for fault, found in part:
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
