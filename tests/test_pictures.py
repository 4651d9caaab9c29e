"""Pictures that are asked about: one meaning for every depth, and a refusal before hostile ones are read."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.datasets import DataError, pictures


def picture(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_pictures_are_scaled_by_their_depth(tmp_path):
    """8 and 16 bits, floats and opaque alpha give the same numbers in [0, 1]."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    expected = grey[..., None] / np.float32(255)
    opaque = np.full_like(grey, 255)
    for path in (
        picture(tmp_path / "8.png", grey),
        picture(tmp_path / "16.png", grey.astype(np.uint16) * 257),
        picture(tmp_path / "f.tiff", (grey / 255).astype(np.float32)),
        picture(tmp_path / "a.png", np.stack([grey, grey, grey, opaque], -1)),
        picture(tmp_path / "la.png", np.stack([grey, opaque], -1)),
    ):
        np.testing.assert_allclose(pictures.read(path, (8, 8, 1)), expected, atol=1e-6, err_msg=path.name)
        assert pictures.read(path, (4, 2, 3)).shape == (4, 2, 3)


def bomb(path):
    """A PNG of 60 000 × 60 000 pixels in 100 bytes."""
    import struct
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return path


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pictures_without_one_meaning_are_refused_before_they_are_read(tmp_path):
    grey = np.full((8, 8), 9, np.uint8)
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "p.png").write_bytes(pickle.dumps(Evil()))
    os.mkfifo(tmp_path / "pipe")
    whole = picture(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.fromarray(grey), Image.fromarray(grey + 1)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((8, 8, 4), np.uint8), "CMYK").save(tmp_path / "c.tiff")
    for path, message in [
        (picture(tmp_path / "t.png", np.stack([grey, grey, grey, grey], -1)), "transparent in parts"),
        (picture(tmp_path / "big.tiff", np.full((8, 8), 7.0, np.float32)), "numbers outside 0 … 1"),
        (picture(tmp_path / "nan.tiff", np.full((8, 8), np.nan, np.float32)), "numbers outside 0 … 1"),
        (tmp_path / "c.tiff", "a picture in CMYK; save it in RGB"),
        (tmp_path / "two.gif", "holds 2 pictures"),
        (tmp_path / "cut.png", "cannot read the image"),
        (tmp_path / "x.eps", "is not an image file that can be read"),
        (tmp_path / "p.png", "is not an image file that can be read"),
        (tmp_path / "pipe", "it is no file, but a folder, a pipe or a device"),
        (Path("/dev/zero"), "it is no file"),
        (tmp_path, "it is no file"),
        (tmp_path / "none.png", "No such file"),
        (bomb(tmp_path / "bomb.png"), "has more than 50,000,000 pixels"),
    ]:
        with pytest.raises(DataError, match=message):
            pictures.read(path, (8, 8, 1))
