"""Data of your own: folders of pictures, npz files, tensorflow-datasets, functions; what is wrong with them is said at once."""

import dataclasses
import io
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from small_runs import Net, make_config, make_data

from experiments import config, saved, train
from experiments.datasets import DataError, load, pictures
from experiments.workdir import TrainError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def paint(folder, count=5, sizes=((8, 8),), grey=False):
    """A folder for each colour, of pictures of one colour each."""
    for name, colour in COLOURS.items():
        (folder / name / "deeper").mkdir(parents=True)
        for k in range(count):
            values = np.full((*sizes[k % len(sizes)], 3), colour, np.uint8)
            picture = Image.fromarray(values).convert("L" if grey else "RGB")
            picture.save(folder / name / ("deeper" if k == 0 else "") / f"{k}.png")
    return folder


def shares(split):
    return np.bincount(split.labels, minlength=3).tolist()


def test_a_folder_of_pictures_of_any_size(tmp_path):
    """Colours tell their classes after the resize; a fifth of each class is the test, the same at every start."""
    paint(tmp_path, 10, sizes=[(5, 9), (8, 8), (30, 7)])
    (tmp_path / "red" / ".DS_Store").write_bytes(b"x")
    data, again = (load(f"folder:{tmp_path}", image_size=6, validation=4) for _ in range(2))
    assert data.classes == ("blue", "green", "red") and data.num_classes == 3 and data.train.images.shape == (20, 6, 6, 3)
    assert shares(data.test) == [2, 2, 2] and len(data.validation.labels) == 4
    for split in (data.train, data.validation, data.test):
        expected = np.array(list(COLOURS.values()))[split.labels] / 255
        np.testing.assert_array_equal(split.images, np.broadcast_to(expected[:, None, None], split.images.shape))
    assert sorted(set(data.validation.labels)) != [2], "the train set is shuffled before its end is held out"
    for a, b in zip((*data.train, *data.test), (*again.train, *again.test), strict=True):
        np.testing.assert_array_equal(a, b)


def test_folders_of_splits_and_grey_pictures(tmp_path):
    paint(tmp_path / "train", 3, grey=True)
    paint(tmp_path / "test", 2, grey=True)
    paint(tmp_path / "val", 1, grey=True)
    data = load(f"folder:{tmp_path}")
    assert [shares(s) for s in (data.train, data.validation, data.test)] == [[3] * 3, [1] * 3, [2] * 3]
    assert data.train.images.shape == (9, 8, 8, 1)
    with pytest.raises(ValueError, match="has a validation set of its own, of 3; set validation=0"):
        load(f"folder:{tmp_path}", validation=2)


def test_all_bad_files_are_named(tmp_path):
    """Cut, foreign, no file at all: each is named, before anything is trained."""
    paint(tmp_path, 3)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(cut := tmp_path / "red" / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "blue" / "notes.txt").write_text("hello")
    os.mkfifo(tmp_path / "green" / "pipe.png")
    with pytest.raises(DataError) as raised:
        load(f"folder:{tmp_path}")
    text = str(raised.value)
    assert text.startswith("3 of 12 files cannot be used")
    assert "notes.txt is not an image" in text and "pipe.png: it is no file" in text and "cut.jpg: " in text
    (tmp_path / "blue" / "notes.txt").unlink()
    (tmp_path / "green" / "pipe.png").unlink()
    with pytest.raises(DataError, match=r"1 of 10 files cannot be used.*\n.*cut\.jpg"):
        load(f"folder:{tmp_path}")


def test_what_is_wrong_with_a_folder(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no folder"):
        load(f"folder:{tmp_path}/none")
    with pytest.raises(DataError, match="holds no folders"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="hold no pictures"):
        load(f"folder:{tmp_path}")
    paint(tmp_path, 2, sizes=[(8, 8), (9, 8)])
    with pytest.raises(DataError, match=r"2 sizes, from \(8, 8\) to \(9, 8\) \(height, width\); say with image_size"):
        load(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="1 of the 4 classes .* fewer than 2 training images: 'a'"):
        load(f"folder:{tmp_path}", image_size=8)
    with pytest.raises(DataError, match="image_size is 1000000, which makes pictures of more than 50,000,000 pixels"):
        load(f"folder:{tmp_path}", image_size=1_000_000)
    with monkeypatch.context() as patched, pytest.raises(DataError, match="0.0 GiB of memory; give stream=True, a smaller im"):
        patched.setattr(pictures, "memory", lambda: 1000)
        load(f"folder:{tmp_path}", image_size=8)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="but no test"):
        load(f"folder:{tmp_path}")


def test_npz(tmp_path):
    """Arrays with or without a test set; labels are checked, objects never unpickled."""
    random, file = np.random.default_rng(0), tmp_path / "a.npz"
    images, labels = random.integers(0, 256, (30, 4, 4, 1), np.uint8), np.arange(30) % 3
    np.savez(file, images=images, labels=labels)
    data = load(f"npz:{file}")
    assert (data.num_classes, len(data.train.labels)) == (3, 24)
    assert shares(data.test) == [2, 2, 2] and data.train.images.max() <= 1
    np.savez(file, train_images=images, train_labels=labels, test_images=images[:6], test_labels=labels[:6])
    np.testing.assert_array_equal(load(f"npz:{file}").test.images, images[:6].astype(np.float32) / 255)
    for arrays, message in [
        (dict(images=images, labels=labels / 2), "train labels of .* are float64.*expected a whole number"),
        (dict(images=images, labels=labels[:-1]), r"int64\[29\] for images \[30, 4, 4, 1\]"),
        (dict(images=images, labels=labels - 1), "from 0"),
        (dict(images=images, labels=labels * 2), "2 of the 5 classes .* '1', '3'"),
        (dict(images=images, y=labels), "holds images, y; expected train_images"),
        (dict(images=np.array([print]), labels=labels), "no npz file of plain arrays: it holds objects"),
    ]:
        np.savez(file, **arrays)
        with pytest.raises(DataError, match=message):
            load(f"npz:{file}")
    file.write_text("no zip")
    with pytest.raises(DataError, match="no npz file of plain arrays"):
        load(f"npz:{file}")
    with pytest.raises(DataError, match="there is no file"):
        load("npz:none.npz")


class Flags(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Encoded pictures of two sizes and the names of their classes, as most sets of tensorflow-datasets have them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=list(COLOURS))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(10)}

    def _generate_examples(self, count):
        for k in range(3 * count):
            name = list(COLOURS)[k % 3]
            Image.fromarray(np.full((6 + k % 2, 8, 3), COLOURS[name], np.uint8)).save(file := io.BytesIO(), "PNG")
            file.seek(0)
            yield k, {"image": file, "label": name}


def test_tensorflow_datasets(tmp_path):
    """A set that lies prepared in its folder is read without TensorFlow; errors name what it has."""
    Flags(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = load("tfds:flags:train", image_size=4, data_dir=tmp_path)
    assert data.classes == tuple(COLOURS) and shares(data.test) == [2, 2, 2] and data.train.images.shape == (24, 4, 4, 3)
    expected = np.array(list(COLOURS.values()))[data.train.labels] / 255
    np.testing.assert_array_equal(data.train.images[:, 0, 0], expected)
    for name, message in [("flags:test", "has no split 'test'; it has train"), ("flags", r"2 shapes, .*image_size"),
                          ("no_such_set", "cannot give no_such_set"), ("../x", "names no set")]:
        with pytest.raises(DataError, match=message):
            load(f"tfds:{name}", data_dir=tmp_path)


def test_trained_evaluated_and_refused(tmp_path):
    """A run on a folder from a config and `--set dataset=…`, evaluated by its name alone; classes must be the network's."""
    paint(tmp_path / "data", 12, sizes=[(5, 9), (8, 8)])
    assert config._override(f"dataset=folder:{tmp_path}/data") == ("dataset", f"folder:{tmp_path}/data")
    own = make_config(dataset=f"folder:{tmp_path}/data", image_size=4, epochs=2, validation=3)
    with pytest.raises(TrainError, match="the network has 10 classes, folder:.* has 3"):
        train.train(dataclasses.replace(own, network=Net(num_classes=10)), tmp_path / "wrong")
    result = train.train(own, tmp_path / "run")
    assert result["images"] == {"train": 24, "validation": 3, "test": 9}
    assert "36 pictures of 3 classes" in result["dataset_note"]
    assert saved.evaluate(tmp_path / "run", own)["test_error"] == result["test_error"]


def make():
    return make_data()


def test_a_function_that_gives_a_data_set(tmp_path):
    """The same bits as the data handed over; what it gives is checked."""
    for name, given in (("there", make_config(dataset=make, epochs=1)), ("here", make_config(epochs=1))):
        train.train(given, tmp_path / name, data=None if name == "there" else make())
    lines = [train.read_json(tmp_path / name / "result.json", {})["test_loss"] for name in ("there", "here")]
    assert lines[0] == lines[1]
    with pytest.raises(TrainError, match="the function dataset gives 3; expected a datasets.Dataset"):
        train.train(make_config(dataset=lambda: 3), tmp_path / "x")
    with pytest.raises(ValueError, match="image_size is for pictures of your own"):
        load("mnist_rot/subset", image_size=3)
