"""Data sets larger than memory: images that are read when they are asked for, and a feed of their batches.

What a feed gives is a function of seed and step alone, as it is for arrays in memory: the number of the step, which every
checkpoint holds, is all that it takes to go on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import pictures
from .sources import DataError

SHARE = 1 / 4  # of the memory, which arrays may take before "auto" streams: they are copied once or twice
SAMPLE = 2**30  # bytes of images from which moments are computed
ENDS = 4096  # bytes at both ends of a file that tell it from others, with its size
SHARED = "/dev/shm"  # where worker processes put their batches
WORKERS = 8  # at most, in a process
SILENCE = 300.0  # seconds without a batch
PATIENCE = 10.0  # seconds that workers are given to end
AGAIN = "the same command goes on from the last checkpoint"


class Source(Protocol):
    """Images by number, any in any order; what worker processes get, so it must pickle."""

    shape: tuple[int, int, int]

    def __getitem__(self, k: int) -> np.ndarray:
        """float32 of this shape, in [0, 1]; a DataError names what cannot be read."""

    def digest(self, rows: np.ndarray) -> str:
        """A hash of what these images are, cheaper than to read them."""


class Files:
    """Pictures in a folder, brought to one shape; told from others by name, size, and the bytes at both ends of the files."""

    def __init__(self, root: Path, paths: Sequence[Path], shape: tuple[int, int, int]):
        self.root, self.shape = os.fsencode(root), shape
        self.names = np.array([os.fsencode(path.relative_to(root)) for path in paths])  # one block of memory, quick to send

    def path(self, k: int) -> Path:
        return Path(os.fsdecode(os.path.join(self.root, self.names[k])))

    def __getitem__(self, k: int) -> np.ndarray:
        return pictures.read(self.path(k), self.shape)

    def digest(self, rows: np.ndarray) -> str:
        found = hashlib.sha256(f"{self.shape}".encode())
        for name, ends in zip(self.names[rows], pictures.try_each(rows, lambda k: fingerprint(self.path(k))), strict=True):
            found.update(hashlib.sha256(name).digest() + (ends if isinstance(ends, bytes) else b""))
        return found.hexdigest()


class Records:
    """A split of tensorflow-datasets; told from others as its files are."""

    def __init__(self, split: Any, what: str, size: int | None, shape: tuple[int, int, int]):
        self.split, self.what, self.size, self.shape = split, what, size, shape

    def __getitem__(self, k: int) -> np.ndarray:
        try:
            return pictures.brought_to(np.asarray(self.split[int(k)]["image"]), self.size)
        except Exception as error:  # of many kinds
            words = " ".join(str(error).split())[:300]
            raise DataError(f"{self.what} cannot be read at image {k}: {type(error).__name__}: {words}") from error

    def digest(self, rows: np.ndarray) -> str:
        found = hashlib.sha256(f"{self.what} {self.shape}".encode() + np.ascontiguousarray(rows).tobytes())
        for path in sorted(Path(self.split.dataset_info.data_dir).iterdir()):
            found.update(path.name.encode() + fingerprint(path))
        return found.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images [n, height, width, channels], read when asked for: slices and arrays of numbers give others of this kind,
    `np.asarray` reads them, and `images[k]` reads one."""

    source: Source
    rows: np.ndarray  # of the images, in the source

    dtype, ndim = np.dtype(np.float32), 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.rows), *self.source.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        rows = self.rows[index]
        return self.source[rows] if np.ndim(rows) == 0 else Images(self.source, rows)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        found = np.empty(self.shape, np.float32)
        done = pictures.try_each(range(len(self)), lambda k: np.copyto(found[k], self.source[self.rows[k]]))
        if wrong := [error for error in done if error]:
            raise wrong[0]
        return found if dtype is None else found.astype(dtype, copy=False)

    def digest(self) -> str:
        return self.source.digest(self.rows)


def fingerprint(path: Path) -> bytes:
    """A hash of a file's size and of the bytes at both ends, which copies keep, and times of change would not."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            found = hashlib.sha256(str(size).encode())
            for start in {0, max(0, size - ENDS)}:
                file.seek(start)
                found.update(file.read(ENDS))
        return found.digest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def wanted(stream: bool | str, count: int, shape: Sequence[int]) -> bool:
    """Whether so many images are to be streamed: as `stream` says, or, if it is "auto", above this share of the memory."""
    return stream is True or stream == "auto" and 4 * count * int(np.prod(shape)) > SHARE * pictures.memory()


def sample(images) -> np.ndarray:
    """What moments are computed from: all images, or of a stream those that fit in `SAMPLE` bytes, drawn evenly."""
    if not isinstance(images, Images):
        return images
    most = max(1, SAMPLE // (4 * int(np.prod(images.shape[1:]))))
    drawn = np.sort(np.random.default_rng(0).permutation(len(images))[:most])
    return np.asarray(images[drawn])


def verify(given, index: int = 0, count: int = 1):
    """Reads all streamed images of a data set once, as process `index` of `count` its part of them.

    Raises:
      DataError: some cannot be read, all of them by name.
    """
    streamed = [split.images for split in (given.train, given.validation, given.test) if isinstance(split.images, Images)]
    if not streamed:
        return
    every = [(images.source, row) for images in streamed for row in images.rows][index::count]
    done = pictures.try_each(every, lambda at: _sound(at[0][at[1]], at[1]), f"reading all of {given.name} once")
    pictures.refuse([str(error) for error in done if error], len(every))


def _sound(image, row):
    if not np.isfinite(image).all():
        raise DataError(f"image {row} has numbers that are not finite")


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the train set in an epoch, counted from 1."""
    return np.random.default_rng([seed, epoch]).permutation(count).astype(np.int32)


_last_permutation = functools.lru_cache(1)(permutation)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The images and labels of a step, counted from 0 over all epochs: those of its rows that are `mine` in every batch."""

    images: Images
    labels: np.ndarray
    seed: int
    size: int  # of a whole batch
    mine: np.ndarray

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, k = divmod(step, len(self.labels) // self.size)
        rows = _last_permutation(self.seed, epoch + 1, len(self.labels))[k * self.size : (k + 1) * self.size][self.mine]
        return np.asarray(self.images[rows]), self.labels[rows]


class Feed:
    """What `put` makes of the batches of the steps from `first` to `last`, each while the step before it runs.

    Worker processes of Grain take turns to read whole batches, and a thread hands these to `put`. `next` waits for a bounded
    time, counted in `waited`; `close` ends all. Workers end with the process that started them, however it ends.
    """

    def __init__(self, batches: Batches, first: int, last: int, put: Callable[[tuple[np.ndarray, np.ndarray]], Any]):
        import grain
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # Grain reads its own, which nobody sets here
        sys.warnoptions.append("ignore:resource_tracker")  # Python's, which tidies the shared memory of a killed process up
        resource_tracker.ensure_running()  # here, since to start it undoes the thread's mask of signals
        workers = _workers(len(batches.mine) * 4 * int(np.prod(batches.images.shape[1:])))
        self.waited = 0.0
        self._ready, self._stop = queue.Queue(1), threading.Event()
        steps = grain.MapDataset.range(first, last).map(batches).to_iter_dataset(grain.ReadOptions(0, 0))
        options = grain.MultiprocessingOptions(num_workers=min(workers, max(1, last - first)), per_worker_buffer_size=1)
        steps = steps.mp_prefetch(options, worker_init_fn=_end_with_parent)
        self._thread = threading.Thread(target=self._pump, args=(steps, put), daemon=True)
        self._thread.start()

    def __next__(self):
        began = time.perf_counter()
        try:
            found = self._ready.get(timeout=SILENCE)
        except queue.Empty:
            raise DataError(f"no batch has come for {SILENCE:g} s; see whether the data can still be read; {AGAIN}") from None
        finally:
            self.waited += time.perf_counter() - began
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        self._stop.set()
        self._thread.join(PATIENCE)
        for process in multiprocessing.active_children() if self._thread.is_alive() else ():
            if process.name.startswith("grain"):
                process.kill()
                process.join(PATIENCE)

    def _pump(self, steps, put):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for the workers, which would each tell of a Ctrl-C
        try:
            with contextlib.closing(iter(steps)) as found:
                for batch in found:
                    if not self._offer(put([np.array(part) for part in batch])):  # no longer in shared memory
                        return
        except DataError as error:
            self._offer(DataError(f"{error}; once that is as it was, {AGAIN}"))
        except Exception as error:
            words = " ".join(str(error).split()).partition(". Search the logs")[0][:200]
            self._offer(DataError(f"the processes that read the data have failed ({type(error).__name__}: {words}); {AGAIN}. "
                                  "If the memory was full, give a smaller batch_size; a program of your own that trains stands "
                                  "behind `if __name__ == '__main__':`"))

    def _offer(self, batch) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(batch, timeout=0.2)
                return True
        return False


def _workers(size: int) -> int:
    """How many processes read batches of so many bytes: one for each core, as far as there is shared memory for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(WORKERS, cores)
    if not os.path.isdir(SHARED):
        return most
    free = shutil.disk_usage(SHARED).free
    if free < 6 * size:  # a worker has up to three batches there, and three more are on their way to the devices
        raise DataError(f"{SHARED} has {free / 2**20:.0f} MiB free, and batches of {size / 2**20:.0f} MiB need six times as "
                        "much: give it more (docker run --shm-size, or a volume in memory), or a smaller batch_size")
    return min(most, free // (3 * size) - 1)


def _end_with_parent(*_):
    """In a worker: a thread that ends it when the process that started it has ended, killed or not."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def one_ahead(function: Callable[[int], Any], count: int) -> Iterator:
    """function(0), …, function(count - 1): while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        made = (pool.submit(function, k) for k in range(count))
        for pair in itertools.pairwise(itertools.chain(made, [None])):
            yield pair[0].result()
