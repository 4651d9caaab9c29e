"""Pictures from files that may come from anyone, as arrays: of a few formats, whose readers run no other program."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .sources import DataError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
LARGEST = 50_000_000  # pixels
GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")  # modes
SHOWN = 20  # bad files that an error names


def read(path: Path, shape: Sequence[int]) -> np.ndarray:
    """[height, width, channels] float32 in [0, 1] of an image file, as `shape` says.

    Raises:
      DataError: no plain file of a known format; more pixels than `LARGEST`, or a mode that has no one meaning here.
    """
    height, width, channels = shape
    with _opened(path) as picture:
        bands = _bands(ImageOps.exif_transpose(picture), channels, path)
    return _stack(bands, height, width)


def shape_of_all(paths: Sequence[Path], size: int | None, what: str) -> tuple[int, int, int]:
    """(height, width, channels) of image files that are brought to size × size, from their heads; grey if all of them are.

    Raises:
      DataError: files that cannot be read, all of them by name; several sizes, and no `size`.
    """
    heads = try_each(paths, _head, f"looking at {what}")
    if wrong := _wrong(heads):  # what is cut short may have a whole head
        rest = [path for path, head in zip(paths, heads, strict=True) if not isinstance(head, DataError)]
        refuse(wrong + _wrong(try_each(rest, lambda path: read(path, (1, 1, 1)), f"reading {what}")), len(paths))
    sizes = sorted({head[0] for head in heads})
    if size is None and len(sizes) > 1:
        raise DataError(f"the pictures of {what} have {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]} (height, width); say "
                        "with image_size what they shall be brought to")
    if size and size**2 > LARGEST:
        raise DataError(f"image_size is {size}, which makes pictures of more than {LARGEST:,} pixels; give a smaller one")
    height, width = (size, size) if size else sizes[0]
    return height, width, 1 if all(grey for _, grey in heads) else 3


def read_all(paths: Sequence[Path], shape: Sequence[int], what: str) -> np.ndarray:
    """[n, height, width, channels] of image files.

    Raises:
      DataError: files that cannot be read, all of them by name; more than the memory holds.
    """
    total = 4 * len(paths) * int(np.prod(shape))
    if total > memory() / 2:
        raise DataError(f"{what} would take {total / 2**30:.1f} GiB as {len(paths)} arrays {tuple(shape)}, and there are "
                        f"{memory() / 2**30:.1f} GiB of memory; give stream=True, a smaller image_size, or fewer pictures")
    images = np.empty((len(paths), *shape), np.float32)
    done = try_each(range(len(paths)), lambda k: np.copyto(images[k], read(paths[k], shape)), f"reading {what}")
    refuse(_wrong(done), len(paths))
    return images


def memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def brought_to(image: np.ndarray, size: int | None) -> np.ndarray:
    """float32 of bytes or floats [height, width, channels], brought to size × size as `read` does."""
    values = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    return _stack(np.moveaxis(values, -1, 0), size, size) if size else values


def files(path: Path) -> list[Path]:
    """The file itself, or all files in a folder and in those inside, in order; names that begin with a dot do not count."""
    if not path.is_dir():
        return [path]
    return [inside for inside in sorted(path.rglob("*")) if not inside.is_dir()
            and not any(part.startswith(".") for part in inside.relative_to(path).parts)]


def try_each(items: Sequence, function: Callable, words: str | None = None) -> list:
    """The function of each, in threads; where it fails, its error. A progress bar, if there are words for it, which a process
    that reads for a stream has not: tqdm makes a semaphore, and one that is killed would leave it behind."""
    def tried(item):
        try:
            return function(item)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = (items[start : start + 1024] for start in range(0, len(items), 1024))  # a million waiting calls take memory
        results = (result for part in parts for result in pool.map(tried, part))
        return list(tqdm(results, words, len(items), unit="picture", leave=False) if words else results)


def _wrong(results):
    return [str(result) for result in results if isinstance(result, DataError)]


def refuse(wrong: Sequence[str], count: int):
    """An error that names the files of which something is wrong, if there are any."""
    if wrong:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(f"{len(wrong)} of {count} files cannot be used; mend or remove them:\n  "
                        + "\n  ".join(wrong[:SHOWN]) + more)


def _head(path):
    """((height, width) as it is shown, whether it is grey), without reading the pixels."""
    with _opened(path) as picture:
        width, height = picture.size[::-1] if picture.getexif().get(0x0112, 1) >= 5 else picture.size
        return (height, width), picture.mode in GREY


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"cannot read the image {path}: it is no file, but a folder, a pipe or a device")
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > LARGEST:
                raise Image.DecompressionBombError
            if getattr(picture, "n_frames", 1) != 1:
                raise DataError(f"{path} holds {picture.n_frames} pictures; give a file with one")
            yield picture
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path} has more than {LARGEST:,} pixels; give a smaller one") from None
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image file that can be read; give a PNG or JPEG") from error
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror or error}") from error
    except Exception as error:  # what readers of formats raise on damaged files
        raise DataError(f"cannot read the image {path}: {type(error).__name__}: {str(error)[:200]}") from error


def _stack(bands, height, width):
    """Bands [height, width] as an image of this size: the mean of the pixels that fall together."""
    if bands[0].shape != (height, width):
        pictures = (Image.fromarray(np.ascontiguousarray(band)) for band in bands)
        bands = [np.asarray(picture.resize((width, height), Image.Resampling.BOX)) for picture in pictures]
    return np.stack(bands, -1)


def _bands(picture, channels, path):
    """For each channel an array [height, width], float32 in [0, 1]."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        if picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise DataError(f"{path} is transparent in parts, and what lies behind them is not known; save it without alpha")
    if picture.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(picture, np.float32) / (1 if picture.mode == "F" else 65535)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise DataError(f"{path} has numbers outside 0 … {1 if picture.mode == 'F' else 65535}; bring them into it")
        return [values] * channels
    if picture.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        raise DataError(f"{path} is a picture in {picture.mode}; save it in RGB or grey")
    if "A" in picture.getbands() or picture.mode == "P":
        picture = picture.convert("RGB")
    bytes_ = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    return np.moveaxis(bytes_.reshape(*bytes_.shape[:2], channels), -1, 0)
