"""What a stream costs, measured: `python -m experiments.benchmark.feed [--images N] [--steps N]`.

It draws 1 000 pictures of 224², links them until there are N, and, in a temporary folder, takes: how long it is to look at them
all; the share of the time that a training of a ResNet of depth 8 waits for data; the memory of all processes while an epoch of
them is read as fast as workers can, at ten moments.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from experiments import boundary, config, datasets, programs
from experiments.baselines import ResNetCNN
from experiments.boundary import Refused
from experiments.datasets import stream
from experiments.main import program

SIZE, DISTINCT, CLASSES = 224, 1000, 10


def draw(folder: Path, count: int):
    """Smooth noise as JPEG files of some 30 kB in folders of classes, and links to them."""
    random = np.random.default_rng(0)
    for k in range(count):
        path = folder / str(k % CLASSES) / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        if k < DISTINCT:
            coarse = Image.fromarray(random.integers(0, 256, (56, 56, 3), np.uint8))
            coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            os.link(folder / str(k % DISTINCT % CLASSES) / f"{k % DISTINCT}.jpg", path)


def memory() -> dict[str, int]:
    """MiB of this process and of its workers."""
    def resident(pid):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

    return {"trainer": resident(os.getpid()), "workers": sum(resident(p.pid) for p in multiprocessing.active_children())}


def waiting(given: config.Config, data: datasets.Dataset, steps: int) -> str:
    mesh = programs.all_devices()
    model = programs.make_model(given, *given.moments(stream.sample(data.train.images)))
    state = programs.place(mesh, programs.initial_state(given, model, data.train.images.shape[1:]))
    step = programs.step_function(given, model, steps, mesh.size)
    with contextlib.ExitStack() as stack:
        run = programs.streamed(given, step, data.train, mesh, 0, steps // given.epochs, stack)
        state, *_ = jax.block_until_ready(run(state, 1))  # compiles
        began, before = time.perf_counter(), memory()
        *_, told = run(state, 2)
        seconds = time.perf_counter() - began
        after = memory()
    return (f"{seconds / (steps // given.epochs):.2f} s a step of {given.batch_size} images, {told['waited'] / seconds:.2%} of "
            f"it waiting for data; MiB before and after: {before}, {after}")


def reading(data: datasets.Dataset, batch: int):
    steps = len(data.train.labels) // batch
    batches = stream.Batches(*data.train, 0, batch, np.arange(batch))
    began = time.perf_counter()
    with contextlib.closing(stream.Feed(batches, 0, steps, lambda arrays: arrays)) as feed:
        for k in range(steps):
            next(feed)
            if k % (steps // 10) == 0:
                print(f"  MiB after {(k + 1) * batch} images: {memory()}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{steps * batch} images read in {seconds:.0f} s, {steps * batch / seconds:.0f} a second")


def main() -> int:
    parser = argparse.ArgumentParser("python -m experiments.benchmark.feed", description=__doc__)
    parser.add_argument("--images", type=int, default=50_000, help="default: 50000")
    parser.add_argument("--steps", type=int, default=40, help="of training, half of them measured; default: 40")
    parser.add_argument("--batch", type=int, default=32, help="default: 32")
    options = parser.parse_args()
    return boundary.guarded(lambda: measure(options))


def measure(options: argparse.Namespace):
    if options.steps < 2 or options.batch < 1 or options.images < 15 * max(options.batch, CLASSES):
        raise Refused("give at least 2 --steps, a --batch of 1, and 15 times as many --images as a batch has, and as there are "
                      "classes")
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), options.images)
        began = time.perf_counter()
        data = datasets.load(f"folder:{folder}", streamed=True)
        data.train.images.digest()
        size = 4 * int(np.prod(data.train.images.shape)) / 2**30
        seconds = time.perf_counter() - began
        print(f"{options.images} pictures looked at in {seconds:.0f} s; {size:.1f} GiB as arrays", flush=True)
        given = config.Config(ResNetCNN(1, num_classes=CLASSES), batch_size=options.batch, epochs=2)
        print(waiting(given, data, options.steps), flush=True)
        reading(data, options.batch)


if __name__ == "__main__":
    program(main, "nothing was kept")
