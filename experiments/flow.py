"""What networks that learned one step of the flow are worth over many: errors, spectra, and pictures of the vorticity.

    python -m experiments.flow [--out DIR] CONFIG=RUN …

with config files and the folders of their runs, such as experiments/configs/flow_p4m.py=runs/flow_p4m-seed0. From the start of
each test trajectory a network takes step after step, u <- P(u + network(u)). P, the same for all, is what is known of the flow
without learning: it takes out the part of u that has a divergence. Written are DIR/flow.json, which keeps what it had of other
runs, and the figures DIR/flow_*.png: vorticities, errors and spectra, and what stencils of a step were learned.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pdo_jax as pdo
from experiments import boundary, check, config, saved
from experiments.boundary import Refused
from experiments.datasets import flow
from experiments.main import program

TOLD = (1, 10, 50)  # steps
SHOWN = (0, 5, 10, 20, 50)
MOVED = 2  # points in a step, at the points whose stencils are shown
P4M = pdo.groups.dihedral(4)


def main(arguments: Sequence[str] | None = None) -> int:
    return boundary.guarded(lambda: run(parser().parse_args(arguments)))


def run(options: argparse.Namespace):
    pairs = [text.partition("=")[::2] for text in options.runs]
    if not all(folder for _, folder in pairs):
        raise Refused("give config files and the folders of their runs, as experiments/configs/flow_p4m.py=runs/flow_p4m-seed0")
    told, rolled, learned = {}, {}, {}
    for file, folder in pairs:
        name = Path(file).stem
        one = saved.load(folder, config.load(file))
        data = check.load(one.config)
        network = jax.jit(lambda u, one=one: one.model.outputs(one.variables, u, train=False))
        true = trajectories(data.test)
        rolled[name], learned[name] = rollout(network, true[:, 0], flow.STEPS), stencil(network, data.test.images)
        told[name] = {"trajectories": len(data.train.labels) * flow.EVERY["train"] // flow.STEPS,
                      "parameters": sum(leaf.size for leaf in jax.tree.leaves(one.variables["params"])),
                      **measures(network, data.test, true, rolled[name])}
        print(name, {key: value for key, value in told[name].items() if not key.startswith("spectrum")}, flush=True)
    stay = np.repeat(true[:, :1], flow.STEPS + 1, 1)
    told["nothing changes"] = {"one_step_error": float(relative(data.test.images, data.test.images + data.test.labels).mean()),
                               "rollout_error": errors(stay, true)}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "flow.json"
    told = (json.loads(file.read_text()) if file.exists() else {}) | told
    file.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in told.items()) + "\n}\n")
    pictures({"simulated": true} | rolled).savefig(options.out / "flow_vorticity.png", dpi=110)
    curves(true, rolled).savefig(options.out / "flow_errors.png", dpi=110)
    kernels({"carried along": carried()} | learned).savefig(options.out / "flow_stencils.png", dpi=110)


def trajectories(split) -> np.ndarray:
    """[n, STEPS + 1, SIZE, SIZE, 1, 2], out of the pairs of the test split, which come in order."""
    before = split.images.reshape(-1, flow.STEPS, *split.images.shape[1:])
    return np.concatenate([before, (split.images + split.labels)[flow.STEPS - 1 :: flow.STEPS, None]], 1)


def rollout(network: Callable, start, steps: int) -> np.ndarray:
    """[n, steps + 1, …]: the states from start [n, …] on."""
    states = [jnp.asarray(start)]
    for _ in range(steps):
        states.append(without_divergence(states[-1] + network(states[-1])))
    return np.stack(states, 1)


@jax.jit
def without_divergence(u):
    """Fields [n, size, size, channels, 2] less the gradient of p, where Δp is their divergence."""
    size = u.shape[1]
    k = np.stack(np.broadcast_arrays(*(np.where(abs(k) < size / 2, k, 0) for k in flow.waves(size))))[..., None]
    square = np.maximum((k**2).sum(0), 1)
    h = jnp.fft.rfft2(u, axes=(1, 2))
    along = (k[0] * h[..., 0] + k[1] * h[..., 1]) / square
    h = h - jnp.stack([k[0] * along, k[1] * along], -1)
    return jnp.fft.irfft2(h, s=(size, size), axes=(1, 2))


def vorticity(u: np.ndarray) -> np.ndarray:
    """∂u_1/∂x_0 - ∂u_0/∂x_1 of a field [size, size, 1, 2]."""
    k = flow.waves(len(u))
    h = np.fft.rfft2(u[:, :, 0], axes=(0, 1))
    return np.fft.irfft2(1j * (k[0] * h[..., 1] - k[1] * h[..., 0]), s=u.shape[:2])


def spectrum(u: np.ndarray) -> np.ndarray:
    """The energy of fields [n, size, size, 1, 2] at the wave numbers 1, 2, …, size / 2 - 1, the mean over n."""
    size = u.shape[1]
    power = (np.abs(np.fft.fft2(u[..., 0, :], axes=(1, 2)) / size**2) ** 2).sum(-1).mean(0) / 2
    k = np.fft.fftfreq(size, 1 / size)
    shell = np.rint(np.hypot(k[:, None], k[None, :])).astype(int)
    return np.bincount(shell.ravel(), power.ravel())[1 : size // 2]


def relative(found, expected) -> np.ndarray:
    """[n]"""
    norm = lambda x: np.sqrt((x**2).reshape(len(x), -1).sum(1))  # noqa: E731
    return norm(found - expected) / norm(expected)


def errors(rolled, true) -> dict[str, float]:
    """The relative error after so many steps, the mean over the trajectories."""
    return {str(step): float(relative(rolled[:, step], true[:, step]).mean()) for step in TOLD}


def measures(network: Callable, test, true, rolled) -> dict:
    parts = np.split(test.images, len(true))
    one = np.concatenate([part + network(part) for part in parts])
    rep = pdo.fields.standard(P4M)
    turned = rollout(network, jnp.concatenate([pdo.fields.act(true[:1, 0], rep, e) for e in range(P4M.order)]), max(TOLD))
    expected = np.concatenate([pdo.fields.act(rolled[:1, step], rep, e) for e in range(P4M.order) for step in TOLD])
    turns = relative(turned[:, TOLD].reshape(expected.shape), expected).reshape(P4M.order, -1).max(0)
    return {"one_step_error": float(relative(one, test.images + test.labels).mean()), "rollout_error": errors(rolled, true),
            "turned_rollout_error": dict(zip(map(str, TOLD), turns.tolist(), strict=True)),
            "spectrum": spectrum(rolled[:, -1]).tolist(), "spectrum_simulated": spectrum(true[:, -1]).tolist()}


def stencil(network: Callable, fields: np.ndarray) -> np.ndarray:
    """[2, size, size]: how the change at the middle point answers to the velocity around it, each component to itself.

    The mean derivative of a network at points of test states where the flow goes along axis 0, MOVED points in a step; the
    component along the flow, and the one across it.
    """
    size, speed = fields.shape[1], MOVED * 2 * np.pi / flow.SIZE / flow.STEP

    @jax.jit
    def answer(u, point, component):
        change, pullback = jax.vjp(network, u[None])
        return pullback(jnp.zeros_like(change).at[0, point[0], point[1], 0, component].set(1))[0][0, :, :, 0, component]

    found = []
    for u in fields[::10]:
        near = np.argwhere(np.hypot(u[..., 0, 0] - speed, u[..., 0, 1]) < speed / 10)[:4]
        found += [[np.roll(answer(u, point, c), size // 2 - point, (0, 1)) for c in range(2)] for point in near]
    return np.mean(found, 0)


def carried() -> np.ndarray:
    """What `stencil` is for a small disturbance that is carried along by a uniform flow, and spread by the viscosity."""
    size = flow.SIZE
    k = flow.waves(size)
    after = np.exp(-1j * MOVED * 2 * np.pi / size * k[0] - flow.VISCOSITY * flow.STEP * (k[0] ** 2 + k[1] ** 2))
    one = np.roll(np.fft.irfft2(np.conj(after) - 1, s=(size, size)), (size // 2, size // 2), (0, 1))
    return np.stack([one, one])


def kernels(stencils: dict[str, np.ndarray], reach: int = 6) -> Figure:
    """Stencils side by side, the points up to `reach` from the middle; the flow goes down."""
    figure = Figure(figsize=(2 * len(stencils) + 0.8, 4.6), layout="constrained")
    rows = figure.subplots(2, len(stencils), squeeze=False)
    for (name, both), column in zip(stencils.items(), rows.T, strict=True):
        middle = both.shape[-1] // 2
        for one, axes in zip(both, column, strict=True):
            crop = slice(middle - reach, middle + reach + 1)
            drawn = axes.imshow(one[crop, crop], cmap="RdBu_r", vmin=-0.4, vmax=0.4, extent=[-reach - 0.5, reach + 0.5] * 2)
            axes.set(xticks=[], yticks=[])
        column[0].set_title(name, fontsize=10)
    for text, axes in zip(("along the flow", "across it"), rows[:, 0], strict=True):
        axes.set_ylabel(text)
    figure.colorbar(drawn, ax=rows, shrink=0.6)
    return figure


def pictures(states: dict[str, np.ndarray]) -> Figure:
    """The vorticity of the first trajectory: a row for each network, a column for each step."""
    figure = Figure(figsize=(2.2 * len(SHOWN), 2.3 * len(states)), layout="constrained")
    limit = np.abs(vorticity(next(iter(states.values()))[0, 0])).max() * 0.8
    rows = figure.subplots(len(states), len(SHOWN), squeeze=False)
    for (name, all_), row in zip(states.items(), rows, strict=True):
        for step, axes in zip(SHOWN, row, strict=True):
            axes.imshow(vorticity(all_[0, step]), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for step, axes in zip(SHOWN, rows[0], strict=True):
        axes.set_title(f"{step} steps")
    return figure


def curves(true, rolled: dict[str, np.ndarray]) -> Figure:
    """The relative error against the step, and the spectrum after the last."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, waves = range(1, true.shape[1]), np.arange(1, flow.SIZE // 2)
    for name, states in rolled.items():
        left.semilogy(steps, [relative(states[:, step], true[:, step]).mean() for step in steps], label=name)
        right.loglog(waves, spectrum(states[:, -1]), label=name)
    left.semilogy(steps, [relative(true[:, 0], true[:, step]).mean() for step in steps], "k:", label="nothing changes")
    right.loglog(waves, spectrum(true[:, -1]), "k", label="simulated")
    left.set(xlabel="steps", ylabel="relative error of the velocity", ylim=(0.01, 3))
    right.set(xlabel="wave number", ylabel=f"energy after {len(steps)} steps", ylim=(1e-9, 1))
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    return figure


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.flow", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="CONFIG=RUN", help="a config file and the folder of its run")
    parser.add_argument("--out", type=Path, default=Path("runs/flow"), metavar="DIR", help="default: runs/flow")
    return parser


if __name__ == "__main__":
    program(main, "nothing was written")
