"""The folder of a run: its config, checkpoints, metrics and result, each file whole or absent after a crash."""

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from experiments.config import Config, describe

T = TypeVar("T")


class TrainError(RuntimeError):
    """A run that cannot start or go on; the message says what was found and what to do."""


def open_workdir(workdir: Path, config: Config):
    """Makes the folder; an error if it cannot be written, or holds anything but a run of this config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
        held = [path.name for path in workdir.iterdir() if path.suffix != ".partial"]
    except OSError as error:
        raise TrainError(f"cannot write to the folder {workdir}: {error.strerror}; choose another --workdir") from error
    if "config.json" in held:
        check_same(config, workdir)
    elif held:
        names = ", ".join(sorted(held)[:3])
        raise TrainError(f"{workdir} holds files that belong to no run, such as {names}; choose another --workdir")


def check_same(config: Config, workdir: Path):
    saved, given = read_json(workdir / "config.json")["config"], json.loads(json.dumps(describe(config)))
    keys = [key for key in saved | given if saved.get(key) != given.get(key)]
    differing = [f"{key}: {saved.get(key)} there, {given.get(key)} here" for key in keys]
    if differing:
        raise TrainError(
            f"{workdir} holds a run of another config; choose another --workdir, or give that run's config. "
            "They differ in\n  " + "\n  ".join(differing)
        )


def checkpoint_manager(workdir: Path) -> ocp.CheckpointManager:
    """Saves in the background, commits by renaming, keeps the last two epochs."""
    return ocp.CheckpointManager(workdir / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))


def saved_epochs(workdir: Path) -> list[int]:
    """The epochs with a whole checkpoint; one that was being written has a longer name."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def restore(workdir: Path, epoch: int, state: T) -> T:
    """The state saved after `epoch`, in the shapes and on the devices of `state`."""
    folder = workdir / "checkpoints" / str(epoch)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "default", state)
    except Exception as error:  # whatever the storage layers raise on a damaged file
        raise TrainError(
            f"cannot read the checkpoint {folder}: {type(error).__name__}: {error}\n"
            "If it is damaged, move that folder away; the run then goes on from the checkpoint before it."
        ) from error


def read_history(path: Path, epochs: int, writes: bool) -> list[dict]:
    """The lines of the first `epochs` epochs; later ones, of epochs that will run again, are cut off the file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)[:epochs]
    if writes:
        write_text(path, "".join(lines))
    return [json.loads(line) for line in lines]


def append_line(path: Path, line: Mapping):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot read {path}: {error}") from error


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str):
    """Writes the whole file or nothing of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def surroundings() -> dict:
    """What the numbers of a run depend on besides its config."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
        "host": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "commit": commit,
        "versions": {"python": platform.python_version()} | versions,
        "environment": {name: value for name, value in sorted(os.environ.items())
                        if name in ("XLA_FLAGS", "GLIBC_TUNABLES") or name.startswith("MALLOC_")},
    }
