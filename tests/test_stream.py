"""Streamed data sets: the numbers of those in memory, also after a kill and in shards; workers end; mistakes are one line."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import finish, flat, from_folder, kill, make_config, make_data, start, wait_for
from test_own import Flags, paint

from experiments import check, saved, train
from experiments.datasets import DataError, load, pictures, stream
from experiments.workdir import TrainError, saved_epochs


def noise(folder, count=20):
    """Pictures of noise of several sizes, in a folder for each class."""
    random = np.random.default_rng(0)
    paint(folder, count)
    for k, path in enumerate(sorted(folder.rglob("*.png"))):
        Image.fromarray(random.integers(0, 256, (6 + k % 3, 7, 3), np.uint8)).save(path)
    return folder


def workers() -> list:
    return [process for process in multiprocessing.active_children() if process.name.startswith("grain")]


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def started_by(process) -> list[int]:
    """The processes that this one has started, from the kernel."""
    return [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if about(pid)[1:2] == [str(process.pid)]]


def about(pid) -> list[str]:
    """State and parent of a process, if it is there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_images_are_arrays_that_are_read_when_asked_for(tmp_path):
    """Slices and picks are lazy and of one order with those of memory, for a folder with a split and its held-out ends."""
    noise(tmp_path)
    there, here = (load(f"folder:{tmp_path}", image_size=4, validation=5, streamed=streamed) for streamed in (False, True))
    for split in ("train", "validation", "test"):
        memory, streamed = getattr(there, split), getattr(here, split)
        assert isinstance(streamed.images, stream.Images) and isinstance(memory.images, np.ndarray)
        assert streamed.images.shape == memory.images.shape and streamed.images.dtype == memory.images.dtype
        np.testing.assert_array_equal(np.asarray(streamed.images), memory.images)
        np.testing.assert_array_equal(np.asarray(streamed.images[1:][[2, 0]]), memory.images[1:][[2, 0]])
        np.testing.assert_array_equal(streamed.images[-1], memory.images[-1])
        np.testing.assert_array_equal(streamed.labels, memory.labels)
    assert (there.classes, there.num_classes, there.note) == (here.classes, here.num_classes, here.note)


def test_two_shards_are_the_halves_of_each_batch():
    """In the order of one process, over two epochs, whose orders are those of the loop over arrays."""
    data = make_data().train
    whole, *halves = (stream.Batches(*data, 5, 16, mine) for mine in (np.arange(16), np.arange(8), np.arange(8, 16)))
    for step in range(8):
        images, labels = whole(step)
        rows = np.random.default_rng([5, 1 + step // 4]).permutation(70)[step % 4 * 16 :][:16]
        np.testing.assert_array_equal(images, data.images[rows])
        for whole_part, parts in zip((images, labels), zip(*(half(step) for half in halves), strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), whole_part)


def test_auto_streams_what_takes_more_than_a_quarter_of_the_memory(monkeypatch, tmp_path):
    noise(tmp_path)
    takes = 4 * 60 * 4 * 4 * 3
    for memory, streams in ((4 * takes, False), (4 * takes - 4, True)):
        monkeypatch.setattr(pictures, "memory", lambda memory=memory: memory)
        assert isinstance(load(f"folder:{tmp_path}", image_size=4, streamed="auto").train.images, stream.Images) is streams


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """The folder of pictures, and a run that held them in memory."""
    folder = tmp_path_factory.mktemp("memory")
    noise(folder / "data", 40)
    train.train(from_folder(folder / "data", scan=False), folder / "run")
    return folder / "data", folder / "run"


def assert_the_same(there, here):
    """Every bit of the state, and every number of every epoch and of the test."""
    np.testing.assert_array_equal(*(flat(saved.load(run)[2]) for run in (there, here)))
    kept = [[{key: value for key, value in line.items() if key not in ("seconds", "waited")} for line in lines(run)]
            for run in (there, here)]
    assert kept[0] == kept[1]
    results = [json.loads((run / "result.json").read_text()) for run in (there, here)]
    assert results[0]["test_loss"] == results[1]["test_loss"] and results[0]["images"] == results[1]["images"]


def test_the_same_bits_as_from_memory(memory, tmp_path):
    """With dropout, augmentation and a validation set. No worker is left, and the run is evaluated as a stream too."""
    data, there = memory
    config = from_folder(data, stream=True)
    result = train.train(config, tmp_path)
    assert_the_same(there, tmp_path)
    assert not workers() and all(0 <= line["waited"] <= line["seconds"] for line in lines(tmp_path))
    assert saved.evaluate(tmp_path)["test_error"] == result["test_error"]
    assert saved.load(tmp_path, dataclasses.replace(config, stream="auto")).config.stream is True
    assert saved.load(there).config.stream is False


def test_a_killed_run_leaves_no_worker_and_goes_on_to_the_same_bits(memory, tmp_path):
    data, there = memory
    file, run = tmp_path / "config.py", tmp_path / "run"
    file.write_text(f"from small_runs import from_folder\nconfig = vars(from_folder({str(data)!r}, stream=True))\n")
    killed = start(file, run)
    wait_for(lambda: saved_epochs(run) == [1], killed)
    started = started_by(killed)
    assert len(started) >= 2  # a worker, and Python's tracker of shared memory
    kill(killed)
    deadline = time.monotonic() + 20
    while alive := [pid for pid in started if about(pid)[:1] not in ([], ["Z"])]:
        assert time.monotonic() < deadline, f"left: {alive}"
        time.sleep(0.05)
    finish(start(file, run))
    assert_the_same(there, run)


class Numbers:
    """A source without files: image k is full of k; the one at `bad` cannot be read."""

    shape = (2, 2, 1)

    def __init__(self, bad=None):
        self.bad = bad

    def __getitem__(self, k):
        if k == self.bad:
            raise DataError("cannot read the image 9")
        return np.full(self.shape, k, np.float32)

    def digest(self, rows):
        return str(rows)


def feed(bad=None, put=lambda batch: batch):
    images = stream.Images(Numbers(bad), np.arange(40))
    return stream.Feed(stream.Batches(images, np.arange(40), 0, 4, np.arange(4)), 0, 500, put)


def test_what_goes_wrong_on_the_way_is_one_line_and_ends_the_workers(monkeypatch):
    """An image that cannot be read, a worker that dies, one that is silent; `close` in the middle takes no time."""
    for harm, message in (("image", "cannot read the image 9; once that is as it was, the same command goes on"),
                          ("death", "the processes that read the data have failed .*exit code -9.; the same command"),
                          ("silence", "no batch has come for 1 s; see whether the data can still be read")):
        running = feed(9 if harm == "image" else None)
        if harm != "image":
            next(running)
            monkeypatch.setattr(stream, "SILENCE", 1.0 if harm == "silence" else 60.0)
            for worker in workers():
                os.kill(worker.pid, signal.SIGKILL if harm == "death" else signal.SIGSTOP)
        with pytest.raises(DataError, match=message):
            for _ in range(400):
                next(running)
        began = time.monotonic()
        monkeypatch.setattr(stream, "PATIENCE", 1.0 if harm == "silence" else 60.0)
        running.close()
        assert not workers() and time.monotonic() - began < 9


def test_mistakes_are_one_line_before_compute(tmp_path, monkeypatch):
    data = noise(tmp_path / "data", 8)
    with pytest.raises(TrainError, match="patterns is arrays in memory, which cannot be streamed; stream is for folder"):
        train.train(make_config(stream=True), tmp_path / "arrays", make_data())
    with pytest.raises(TrainError, match="is streamed, and scan=True needs all of it on the devices; leave scan out"):
        train.train(from_folder(data, stream=True, scan=True), tmp_path / "scan")
    with monkeypatch.context() as patched, pytest.raises(DataError, match="MiB free, and batches of .* --shm-size.*batch_size"):
        patched.setattr(stream.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
        train.train(from_folder(data, stream=True), tmp_path / "shared")
    path = data / "red" / "3.png"
    path.write_bytes(path.read_bytes()[:-30])  # its head is whole
    with pytest.raises(DataError, match=r"(?s)^1 of 24 files cannot be used.*red/3\.png"):
        train.train(from_folder(data, stream=True), tmp_path / "broken")
    assert not (tmp_path / "broken" / "config.json").exists()


def test_what_a_run_was_trained_on_is_told_from_other_files(tmp_path):
    """By names and sizes of the files and the bytes at their ends, not by times."""
    data = noise(tmp_path / "data", 4)
    digest = lambda: load(f"folder:{data}", image_size=4, streamed=True).train.images.digest()
    first, path = digest(), data / "red" / "3.png"
    os.utime(path, (0, 0))
    assert digest() == first
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert digest() != first


def test_tensorflow_datasets_are_streamed(tmp_path):
    """The same arrays as in memory, in a worker too; without one size, and without image_size, they cannot be."""
    Flags(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    there, here = (load("tfds:flags:train", image_size=4, data_dir=tmp_path, streamed=streamed) for streamed in (False, True))
    for split in ("train", "test"):
        np.testing.assert_array_equal(np.asarray(getattr(here, split).images), getattr(there, split).images)
        np.testing.assert_array_equal(getattr(here, split).labels, getattr(there, split).labels)
    stream.verify(here)
    assert check.data(here).train.images.digest() != here.test.images.digest()
    with pytest.raises(DataError, match=r"the images of flags have no one shape, \(None, None, 3\), so they cannot be str"):
        load("tfds:flags:train", data_dir=tmp_path, streamed=True)
