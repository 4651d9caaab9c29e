"""The folder of a run: config, checkpoints, metrics and result, each file whole or absent after a crash; and its lock.

All in it is data, and may come from someone else or be damaged: it is read, checked, and never executed.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from experiments.boundary import Refused

T = TypeVar("T")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class TrainError(Refused, RuntimeError):
    """A run that cannot start or go on; the message says what was found and what to do."""


@contextlib.contextmanager
def opened(workdir: Path, writes: bool = True) -> Iterator[None]:
    """Makes the folder and holds its lock; an error if it cannot be written, is no run's, or another process trains in it."""
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            inside = list(workdir.iterdir())
            _plain(inside, links=not writes)
            held = [path.name for path in inside if path.suffix != ".partial" and path.name not in (".lock", "start")]
            if held and "config.json" not in held:
                names = ", ".join(sorted(held)[:3])
                raise TrainError(f"{workdir} holds files that belong to no run, such as {names}; choose another --workdir")
            if writes:
                _lock(workdir, stack)
        except OSError as error:
            raise TrainError(f"cannot write to the folder {workdir}: {error.strerror}; choose another --workdir") from error
        yield


def _plain(paths, links=True):
    """Refuses pipes and devices, which may be read without end, and links, through which another file would be written."""
    for path in paths:
        if path.is_symlink() and not links or not (path.is_file() or path.is_dir() or path.is_symlink()):
            kind = "link" if path.is_symlink() else "pipe or device"
            raise TrainError(f"{path} is a {kind}; put the file itself in its place")


def _lock(workdir, stack):
    """An advisory lock, which the system takes back from a process that ends, however it ends."""
    file = stack.enter_context((workdir / ".lock").open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise TrainError(f"{file.read(200) or 'another process'} trains in {workdir}; wait for it, or choose another "
                         "--workdir") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


@contextlib.contextmanager
def writing(what: Path, workdir: Path) -> Iterator[None]:
    """Turns what file systems and storage layers raise, on a full disk say, into one line."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None or isinstance(error, TrainError):
            raise
        done = max(saved_epochs(workdir), default=0)
        again = f"from the checkpoint of epoch {done}" if done else "from the beginning"
        raise TrainError(f"cannot write {what}: {reason}; once it can be written, the same command goes on {again}") from error


def _reason(error) -> str | None:
    """The system's words for why something cannot be written, which storage layers hide in long messages."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO))
    return next((words for words in known if words in str(error)), None)


# Checkpoints


def checkpoint_manager(workdir: Path) -> ocp.CheckpointManager:
    """Saves in the background, commits by renaming, keeps the last two epochs."""
    return ocp.CheckpointManager(workdir / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))


def save(manager: ocp.CheckpointManager, epoch: int, state):
    """Begins to write the state after `epoch`, a NamedTuple; with it its epoch and a checksum of each of its parts."""
    about = {"epoch": epoch, "sha256": {name: digest(part) for name, part in state._asdict().items()}}
    manager.save(epoch, args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)))


def saved_epochs(workdir: Path) -> list[int]:
    """The epochs with a whole checkpoint; one that was being written has a longer name."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]{,9}", name))


def restore(workdir: Path, epoch: int, parts: T) -> T:
    """The state saved after `epoch`, or some of its parts as a dict, in the shapes and on the devices of `parts`.

    Raises:
      TrainError: the checkpoint cannot be read, is of another epoch or network, or its numbers are not those that were written.
    """
    folder = workdir / "checkpoints" / str(epoch)
    advice = "If it is damaged, move that folder away; the run then goes on from the checkpoint before it."
    named = parts if isinstance(parts, dict) else parts._asdict()
    _plain(folder.rglob("*"))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            about = read_json(folder / "about" / "metadata", {"epoch": int, "sha256": {str: str}})
            stored = _shapes({name: part for name, part in checkpointer.metadata(folder / "state").item_metadata.tree.items()
                              if name in named})
            difference = _difference(stored, _shapes(named))
            if not difference:
                arguments = ocp.checkpoint_utils.construct_restore_args(named)
                with ocp.PyTreeCheckpointer() as reader:
                    read = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(named, arguments, partial_restore=True))
    except Exception as error:  # whatever the storage layers raise on a damaged file
        reason = " ".join(str(error).split())[:300]
        raise TrainError(f"cannot read the checkpoint {folder}: {type(error).__name__}: {reason}\n{advice}") from error
    if about["epoch"] != epoch:
        raise TrainError(f"the checkpoint {folder} is that of epoch {about['epoch']}; give the folder its own name again")
    if difference:
        raise TrainError(f"the checkpoint {folder} is of another network, optimiser or version: {difference}")
    changed = [name for name, part in read.items() if digest(part) != about["sha256"].get(name)]
    if changed:
        raise TrainError(f"the checkpoint {folder} is damaged: {changed[0]} has not the checksum that was written\n{advice}")
    return read if isinstance(parts, dict) else type(parts)(**read)


def digest(tree) -> str:
    """A SHA-256 of the names, types, shapes and bytes of all arrays of a tree."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        found.update(f"{_name(path)} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(tree) -> dict:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def _difference(stored, wanted) -> str:
    """In one line: which arrays are missing, extra or of another shape."""
    kinds = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "extra": sorted(stored.keys() - wanted.keys()),
        "of another shape": [f"{name} {list(stored[name])} there, {list(wanted[name])} here"
                             for name in wanted if name in stored and stored[name] != wanted[name]],
    }
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"
                     for kind, names in kinds.items() if names)


# Metrics


LINE = {"epoch": int, "train_loss": float, "learning_rate": float, "seconds": float, str: Real}


def read_history(workdir: Path, done: int, writes: bool) -> list[dict]:
    """The lines of metrics.jsonl of the `done` epochs that the last checkpoint holds; what is behind them is cut off the file.

    That is at most one line, and one that a kill has cut short. More means that checkpoints are gone: an error.
    """
    path = workdir / "metrics.jsonl"
    try:
        _plain([path] * path.exists())
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot read {path}: {error}") from error
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) > done + 1:
        last = f"the last checkpoint is of epoch {done}" if done else "there is no checkpoint"
        raise TrainError(f"{path} tells of {len(whole)} epochs, but {last}: put the checkpoints back, or move that file away "
                         "to go on from there")
    history = [_line(text, epoch, path) for epoch, text in enumerate(whole[:done], 1)]
    if len(history) < done:
        raise TrainError(f"{path} tells of {len(history)} epochs, but there is a checkpoint of epoch {done}: put it back, or "
                         "choose another --workdir")
    if writes and len(lines) > done:
        with writing(path, workdir):
            write_text(path, "".join(lines[:done]))
    return history


def _line(text, epoch, path):
    try:
        line = json.loads(text)
        if not _wrong(line, LINE) and line["epoch"] == epoch:
            return line
    except (ValueError, RecursionError):
        pass
    raise TrainError(f"line {epoch} of {path} is damaged: {text[:100]!r}; put the file back, or choose another --workdir")


def is_number(value, kind=float):
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)


def append_line(path: Path, line: Mapping):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Board:
    """The metrics for TensorBoard; its file is made anew from the lines of a run that goes on."""

    def __init__(self, workdir: Path, history: list[dict], writes: bool):
        self.writer = None
        if not writes:
            return
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = EventsWriter(str(folder / "events"))
        for line in history:
            self.add(line)

    def add(self, line: Mapping):
        if not self.writer:
            return
        for name, value in line.items():
            if name not in ("epoch", "seconds") and is_number(value):
                self.writer.write_event(Event(step=line["epoch"], summary=summary.scalar(name, value)))
        self.writer.flush()

    def close(self):
        if self.writer:
            self.writer.close()


# Files


def read_json(path: Path, kind: Mapping) -> dict:
    """The object in a JSON file; an error unless it is of this kind: {key: kind of its value}, [kind of its items], a type, or
    a tuple of kinds. A number is finite, a key that is missing has the value None, and the key `str` stands for all others.
    """
    _plain([path] * path.exists())
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise TrainError(f"cannot read {path}: {reason}; put a whole one in its place, or choose another run") from error
    if wrong := _wrong(value, kind):
        raise TrainError(f"{path} is damaged, or of another version: it has no {wrong} as expected; put a whole one in its "
                         "place, or choose another run")
    return value


def _wrong(value, kind, name: str = "object") -> str:
    """The name of the first part that is not of its kind; empty if all are."""
    match kind:
        case dict():
            given = value if isinstance(value, dict) else {}
            rest = {key: kind[str] for key in given if key not in kind} if str in kind else {}
            found = [_wrong(given.get(key), each, repr(key)) for key, each in (kind | rest).items() if key is not str]
            return next(filter(None, found), "") if isinstance(value, dict) else name
        case [each] if isinstance(kind, list):
            return name if not isinstance(value, list) or any(_wrong(item, each) for item in value) else ""
        case tuple():
            return name if all(_wrong(value, each, name) for each in kind) else ""
    fits = is_number(value, kind) if kind in (int, float) else value is kind or kind and isinstance(value, kind)
    return "" if fits else name


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str):
    """Writes the whole file or nothing of it, also if the machine fails."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def surroundings() -> dict:
    """What the numbers of a run depend on besides its config, for the ledger.

    The commit is followed by "-dirty" where the code is not as it says; what a run writes itself into the ledger is no code.
    """
    code = ["pdo_jax", "experiments", ":!experiments/results", ":!experiments/README.md"]

    def git(*command):
        command = ["git", "-C", str(Path(__file__).parents[1]), *command]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit, dirty = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", *code)
    except (OSError, subprocess.TimeoutExpired):
        commit, dirty = "", ""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
        "host": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "commit": commit + "-dirty" * bool(dirty) or None,
        "versions": versions(),
        "environment": {name: value for name, value in sorted(os.environ.items())
                        if name in ("XLA_FLAGS", "GLIBC_TUNABLES") or name.startswith("MALLOC_")},
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
