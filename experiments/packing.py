"""A run in one file, to go on elsewhere: its config, metrics, last checkpoint and result, each under its SHA-256.

The file is a zip archive; what is larger than `PART` is cut into FILE.1-of-3, FILE.2-of-3, …
"""

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path, PurePosixPath

from experiments.workdir import TrainError, saved_epochs

PART, LARGEST = 15_000_000, 2**30  # bytes of a part, and of all files when unpacked
MANIFEST, FORMAT = "manifest.json", "a packed run of pdo_jax, version 1"


def pack(run: Path, file: Path) -> list[Path]:
    """Writes a run's last epoch into `file`, or into parts of it; returns their paths."""
    epoch = max(saved_epochs(run), default=None)
    if epoch is None:
        raise TrainError(f"{run} has no checkpoint, so there is nothing to pack; give the folder of a run")
    try:
        names = ["config.json", "metrics.jsonl", *(["result.json"] if (run / "result.json").exists() else [])]
        inside = (path for path in (run / "checkpoints" / str(epoch)).rglob("*") if path.is_file())
        members = {name: (run / name).read_bytes() for name in (*names, *(str(path.relative_to(run)) for path in inside))}
    except OSError as error:
        raise TrainError(f"cannot read {error.filename}: {error.strerror}; pack a run while nothing trains in it") from error
    manifest = {"format": FORMAT, "epoch": epoch, "files": {name: _sha256(data) for name, data in members.items()}}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {MANIFEST: json.dumps(manifest, indent=1).encode(), **members}.items():
            archive.writestr(name, data)
    data = buffer.getvalue()
    parts = [data[start : start + PART] for start in range(0, len(data), PART)]
    paths = [file] if len(parts) == 1 else _parts(file, len(parts))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path, part in zip(paths, parts, strict=True):
            path.write_bytes(part)
    except OSError as error:
        raise TrainError(f"cannot write {error.filename}: {error.strerror}; choose another file") from error
    return paths


def unpack(file: Path, run: Path) -> int:
    """Makes the folder `run`, new or empty, of a packed run, all of it or nothing; returns the epoch that it is at."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise TrainError(f"{run} is there already; give a folder that is new or empty")
    members, whole = _members(_read(file), file), run.with_name(f".unpacking-{run.name}")
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(whole, ignore_errors=True)  # what a killed one has left
        for name, data in members.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_bytes(data)
        epoch = max(saved_epochs(whole), default=0)
        whole.rename(run)
    except OSError as error:
        raise TrainError(f"cannot write the folder {run}: {error.strerror}; choose another") from error
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    return epoch


def _read(file: Path) -> bytes:
    try:
        if file.exists():
            return file.read_bytes()
        counts = [int(path.suffix.rpartition("-")[2]) for path in file.parent.glob(f"{file.name}.*-of-*")]
        if not counts:
            raise TrainError(f"no file {file}, nor parts {file.name}.1-of-…; give what --pack wrote")
        missing = [part.name for part in _parts(file, counts[0]) if not part.exists()]
        if missing:
            raise TrainError(f"{file} lacks its part {missing[0]}; copy it there too")
        return b"".join(part.read_bytes() for part in _parts(file, counts[0]))
    except OSError as error:
        raise TrainError(f"cannot read {file}: {error.strerror}") from error


def _members(data: bytes, file: Path) -> dict[str, bytes]:
    """The files of a packed run, each checked; names that would lead out of the folder are refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST:
                raise TrainError(f"{file} would unpack to {size} bytes, more than {LARGEST}; it is no packed run")
            manifest = json.loads(archive.read(MANIFEST))
            if manifest["format"] != FORMAT:
                raise TrainError(f"{file} is {manifest['format']!r}, expected {FORMAT!r}")
            members = {name: archive.read(name) for name in manifest["files"]}
            sums = manifest["files"]
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, TrainError):
            raise
        raise TrainError(f"{file} is damaged, or no packed run ({type(error).__name__}: {error}); copy it again") from error
    for name, content in members.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise TrainError(f"{file} holds the name {name!r}, which leads out of the folder; it is no packed run")
        if _sha256(content) != sums[name]:
            raise TrainError(f"{file} is damaged: {name} has SHA-256 {_sha256(content)}, expected {sums[name]}; copy it again")
    return members


def _parts(file: Path, count: int) -> list[Path]:
    return [file.with_name(f"{file.name}.{k}-of-{count}") for k in range(1, count + 1)]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
