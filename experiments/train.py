"""The training loop: from a `Config` to a folder with checkpoints, metrics, figures and a result.

`programs` holds what runs on the devices. Everything random is a function of the seed and of the step number, so that a run
that was killed and started again ends with the same bits as one that was not (same devices; a GPU needs
XLA_FLAGS=--xla_gpu_deterministic_ops=true).
The test set is evaluated once, after the last epoch.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from experiments import check, datasets, figures, programs, record, saved
from experiments.config import Config, describe
from experiments.datasets import stream
from experiments.measures import equivariance_error
from experiments.workdir import (
    Board,
    TrainError,
    append_line,
    checkpoint_manager,
    opened,
    read_history,
    read_json,
    restore,
    save,
    saved_epochs,
    surroundings,
    write_json,
    writing,
)

RESULT = {"test_loss": Real, "test_error": (Real, None), "validation_error": (Real, None), "images": {"test": int},
          "dataset": str, "dataset_note": str, "parameters": int, "figures": [str],
          "equivariance_error": ({str: Real}, None)}
"""What is read of a result again."""


def train(
    config: Config,
    workdir: Path,
    data: datasets.Dataset | None = None,
    source: Mapping | None = None,
    minutes: float = math.inf,
    force: bool = False,
) -> dict | None:
    """Trains to the config's last epoch, on from the last checkpoint in `workdir` if there is one; returns the result.

    `data` stands in for the config's data set. `source` says where the config came from, {"file": path, "overrides": [...]}.
    No epoch is begun that would not end within `minutes` if it took as long as one of the last two, nor the evaluation at the
    end if it took as long as the first epoch, which is compiled: then None is returned, and all that was done is in the last
    checkpoint. `force` goes on with a run whose config, code, data, devices or versions have changed; the result tells so.
    """
    began = time.perf_counter()
    workdir, writes = Path(workdir).absolute(), jax.process_index() == 0
    with opened(workdir, writes), contextlib.ExitStack() as stack:
        own = data is not None or callable(config.dataset)
        given, data = data, check.data(data or check.load(config))
        values = stream.sample(data.train.images)
        model = programs.make_model(config, *check.moments(config, values))
        known = record.of(config, data, source)
        record.agree(known)
        forced, around = record.resume(workdir, known, force), surroundings()
        if (workdir / "result.json").exists():
            return read_json(workdir / "result.json", RESULT)
        shape, sizes = data.train.images.shape[1:], {name: len(getattr(data, name).labels) for name in datasets.SPLITS}
        mesh = programs.all_devices()
        check.run(config, model, data, mesh)
        done = max(saved_epochs(workdir), default=0)
        if not done:
            stream.verify(data, jax.process_index(), jax.process_count())
        if writes:
            inputs = {"shape": shape, "mean": model.mean.tolist(), "deviation": model.deviation.tolist(),
                      "range": [float(values.min()), float(values.max())], "own": own, "classes": data.classes}
            with writing(workdir / "config.json", workdir):
                write_json(workdir / "config.json", {"record": known, "input": inputs, "forced": forced, "source": source})

        del values
        if config.start and not done:
            left = minutes - (time.perf_counter() - began) / 60
            variables = first_run(config, workdir / "start", data, given, left, force)
            if variables is None:
                return None
            state = programs.place(mesh, programs.started_state(config, model, shape, variables))
        else:
            state = programs.place(mesh, programs.initial_state(config, model, shape))
            state = restore(workdir, done, state) if done else state
        train_epoch, scan = programs.epoch_program(config, model, data.train, mesh, state, stack)
        evaluate = programs.evaluation_program(config, model, mesh)
        state, history = run_epochs(config, workdir, state, done, mesh, train_epoch, evaluate, data, began, minutes)
        if len(history) < config.epochs or not time_for_more(began, minutes, history, compiles=True):
            return None

        numbers, totals = evaluate(state.variables, data.test)
        result = {f"test_{name}": value for name, value in numbers.items()}
        result |= {f"validation_{name}": history[-1].get(f"validation_{name}") for name in config.metrics}
        result |= {
            "train_loss": history[-1]["train_loss"],
            "dataset": data.name,
            "dataset_note": data.note,
            "images": sizes,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "train_seconds": sum(line["seconds"] for line in history),
        }
        if config.start and (file := workdir / "start" / "result.json").exists():  # a run that was packed goes on without it
            first = read_json(file, RESULT)
            result["start"] = {key: first.get(key) for key in ("test_loss", "parameters", "train_seconds", "commit")}
            result["train_seconds"] += first["train_seconds"]
        if writes:
            variables = jax.device_get(state.variables)
            result["equivariance_error"] = equivariance_error(model, variables, data.test.images[:64])
            confusion = totals.get("error") if data.test.labels.ndim == 1 else None
            with writing(workdir, workdir):
                result["figures"] = figures.draw(workdir / "figures", history, confusion, model.network, variables, shape)
                result |= {"wall_seconds": time.perf_counter() - began, "scan": scan} | around
                result |= {"forced": forced} if forced else {}
                result["config"] = describe(config)
                write_json(workdir / "result.json", result)
        return result


def first_run(config, folder, data, given, minutes, force):
    """The variables of the run of `config.start`, which is trained if there is no finished one; None if the time was over."""
    first = config.first()
    if not (folder / "result.json").exists() and train(first, folder, given, minutes=minutes, force=force) is None:
        return None
    run = saved.load(folder, first)
    if run.about["record"]["data"] != record.data_of(data):
        raise TrainError(f"{folder} holds a run on other data than those of {data.name} here; move it away")
    return jax.device_get(run.variables)


def run_epochs(config, workdir, state, done, mesh, train_epoch, evaluate, data, began, minutes):
    """The epochs after `done`: each is a line of metrics.jsonl and a checkpoint. The last state, and all lines."""
    writes = jax.process_index() == 0
    history = read_history(workdir, done, writes)
    progress = tqdm(total=config.epochs, initial=done, unit="epoch", disable=not writes)
    with checkpoint_manager(workdir) as manager, contextlib.closing(Board(workdir, history, writes)) as board, progress as bar:
        for epoch in range(done + 1, config.epochs + 1):
            if not time_for_more(began, minutes, history, compiles=epoch == done + 1):
                break
            epoch_began = time.perf_counter()
            state, metrics = train_epoch(state, epoch)
            if not all(map(math.isfinite, metrics.values())):
                kept = f"The checkpoint of epoch {epoch - 1} is kept, in {workdir / 'checkpoints'}. " if epoch > 1 else ""
                raise TrainError(
                    f"training diverged in epoch {epoch}: {metrics}. {kept}Lower the learning rate, or look for bad numbers in "
                    "the data."
                )
            if len(data.validation.labels):
                found, _ = evaluate(state.variables, data.validation)
                metrics |= {f"validation_{name}": found[name] for name in ("loss", *config.metrics)}
            history.append({"epoch": epoch, **metrics, "seconds": time.perf_counter() - epoch_began})
            with writing(workdir, workdir):
                manager.wait_until_finished()  # so that metrics.jsonl is never ahead of the checkpoints by more than a line
                if writes:  # before the checkpoint, so that a run that resumes from it has all its lines
                    append_line(workdir / "metrics.jsonl", history[-1])
                board.add(history[-1])
                save(manager, epoch, programs.place(mesh, jax.tree.map(np.array, state)))
            bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items() if name.endswith("error")})
            bar.update()
        with writing(workdir / "checkpoints", workdir):
            manager.wait_until_finished()
    return state, history


def time_for_more(began: float, minutes: float, history: Sequence[Mapping], compiles: bool) -> bool:
    """Whether an epoch as long as the last two, or what is compiled first and so takes as long as the first epoch, would end
    within `minutes`; process 0 decides for all."""
    lines = [*history[:1], *history[-1:]] if compiles else history[-2:]
    seconds = time.perf_counter() - began + max((line["seconds"] for line in lines), default=0)
    return minutes == math.inf or bool(multihost_utils.broadcast_one_to_all(np.bool_(seconds < 60 * minutes)))
