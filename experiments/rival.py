"""escnn's regular C8 network on rotated MNIST, in PyTorch, in the recipe of mnist_rot_small.py: `mnist_rot_small_escnn`.

    python -m experiments.rival --python PYTHON [--seed SEED] [--set validation=2000]

PYTHON is one that has torch and escnn; this file runs in it too, on data that it is handed, and imports nothing of this
project there. The network is MnistRotNet's with escnn's layers: six 5×5 R2Conv of regular fields with a rim of one zero, batch
norm, SiLU, a 2×2 maximum after the second layer and dropout after the others, a pointwise layer, the mean over space, the
maximum over the group, and a linear layer. Optimiser, schedule, L2, label smoothing, average of weights and batch size are read
from the config; float32. It starts anew each time, and holds no checkpoints.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEATURES, HEAD = 7, 64


def main() -> int:
    from experiments import boundary

    options = parser().parse_args()
    return boundary.guarded(lambda: work(options))


def work(options: argparse.Namespace):
    import numpy as np

    from experiments import config, datasets, reproduce, workdir
    from experiments.boundary import Refused

    if not shutil.which(options.python):
        raise Refused(f"there is no Python at {options.python}; give --python one that has torch and escnn")
    recipe = config.load(Path(__file__).parent / "configs" / "mnist_rot_small.py", [f"seed={options.seed}", *options.set])
    data = datasets.load(recipe.dataset, validation=recipe.validation)
    mean, deviation = recipe.moments(data.train.images)
    steps = len(data.train.labels) // recipe.batch_size
    rates = [float(recipe.learning_rate(step / steps, recipe.epochs)) for step in range(recipe.epochs * steps)]
    task = dict(seed=recipe.seed, batch=recipe.batch_size, epochs=recipe.epochs, l2=recipe.l2, ema=recipe.ema, rates=rates,
                smoothing=recipe.label_smoothing, dropout=recipe.network.dropout, features=FEATURES, head=HEAD)
    held = data.validation if recipe.validation else data.test
    with tempfile.TemporaryDirectory() as folder:
        arrays = {}
        for name, split in {"train": data.train, "held": held}.items():
            arrays[f"{name}_images"] = ((split.images - mean) / deviation).astype(np.float32)
            arrays[f"{name}_labels"] = np.asarray(split.labels, np.int64)
        np.savez(Path(folder, "data.npz"), **arrays)
        Path(folder, "task.json").write_text(json.dumps(task))
        began, around = time.monotonic(), workdir.surroundings()
        done = subprocess.run([options.python, __file__, "--train", folder], stderr=subprocess.PIPE, text=True)
        if not (told := Path(folder, "found.json")).exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise Refused(f"{options.python} has not trained escnn's network: {last}")
        found = json.loads(told.read_text())
    found |= {"dataset": data.name, "dataset_note": data.note, "wall_seconds": time.monotonic() - began}
    found["images"] = {name: len(getattr(data, name).labels) for name in datasets.SPLITS}
    found |= {key: around[key] for key in ("host", "commit")} | {"config": {key: task[key] for key in task if key != "rates"}}
    print({key: found[key] for key in ("parameters", "held_error", "held_loss", "wall_seconds")})
    if not recipe.validation:
        found |= {"test_error": found.pop("held_error"), "test_loss": found.pop("held_loss")}
        workdir.write_json(reproduce.RESULTS / f"mnist_rot_small_escnn_seed{recipe.seed}.json", found)
        reproduce.write_table(reproduce.RESULTS)


def train(folder):
    """In the other Python: the network of task.json, trained and evaluated; what was found goes into found.json."""
    import escnn
    import numpy as np
    import torch

    task = json.loads(Path(folder, "task.json").read_text())
    torch.manual_seed(task["seed"])
    data = {name: torch.from_numpy(array) for name, array in np.load(Path(folder, "data.npz")).items()}
    data |= {name: images.permute(0, 3, 1, 2).contiguous() for name, images in data.items() if name.endswith("images")}
    network = make_network(escnn, torch, task)
    optimiser = torch.optim.Adam(network.parameters())
    kernels = [value for name, value in network.named_parameters() if name.endswith("weights") or name == "linear.weight"]
    statistics = [value for name, value in network.named_buffers() if name.endswith(("running_mean", "running_var"))]
    values = [*network.parameters(), *statistics]
    average, step, batch = [value.detach().clone() for value in values], 0, task["batch"]
    began = time.monotonic()
    for epoch in range(task["epochs"]):
        network.train()
        order, wrong, total = torch.randperm(len(data["train_labels"])), 0, 0.0
        for rows in order[: len(order) // batch * batch].split(batch):
            optimiser.param_groups[0]["lr"] = task["rates"][step]
            labels = data["train_labels"][rows]
            logits = network(data["train_images"][rows])
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=task["smoothing"])
            total, wrong = total + loss.item(), wrong + (logits.argmax(1) != labels).sum().item()
            loss = loss + task["l2"] / 2 * sum(kernel.square().sum() for kernel in kernels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            keep = min(task["ema"], (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, value in zip(average, values, strict=True):
                    mean.lerp_(value, 1 - keep)
            step += 1
        seen = len(order) // batch * batch
        print(f"epoch {epoch + 1}: train error {wrong / seen:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    seconds = time.monotonic() - began
    with torch.no_grad():
        for mean, value in zip(average, values, strict=True):
            value.copy_(mean)
        network.eval()
        logits = torch.cat([network(images) for images in data["held_images"].split(500)])
    found = {"held_error": (logits.argmax(1) != data["held_labels"]).double().mean().item(),
             "held_loss": torch.nn.functional.cross_entropy(logits, data["held_labels"]).item(),
             "train_loss": total / (seen // batch), "parameters": sum(p.numel() for p in network.parameters()),
             "train_seconds": seconds, "devices": "1 x cpu, 1 process(es)",
             "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "escnn": escnn.__version__}}
    Path(folder, "found.json").write_text(json.dumps(found))


def make_network(escnn, torch, task):
    from escnn import gspaces, nn

    space = gspaces.rot2dOnR2(N=8)
    image = nn.FieldType(space, [space.trivial_repr])
    field, wide = (nn.FieldType(space, n * [space.regular_repr]) for n in (task["features"], task["head"]))

    class Silu(torch.nn.Module):
        """Pointwise, so that it keeps regular fields; escnn has no SiLU of its own."""

        def forward(self, x):
            return nn.GeometricTensor(torch.nn.functional.silu(x.tensor), x.type)

    def activated(source, target, size, padding):
        conv = nn.R2Conv(source, target, size, padding=padding, bias=False)
        return [conv, nn.InnerBatchNorm(target), Silu()]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = []
            for number in range(1, 7):
                layers += activated(image if number == 1 else field, field, 5, 1)
                layers.append(nn.PointwiseMaxPool(field, 2) if number == 2 else nn.PointwiseDropout(field, task["dropout"]))
            self.body = torch.nn.Sequential(*layers, *activated(field, wide, 1, 0))
            self.pool = nn.GroupPooling(wide)
            self.linear = torch.nn.Linear(task["head"], 10)

        def forward(self, x):
            x = self.body(nn.GeometricTensor(x, image)).tensor.mean((2, 3), keepdim=True)
            return self.linear(self.pool(nn.GeometricTensor(x, wide)).tensor.flatten(1))

    return Network()


def parser():
    parser = argparse.ArgumentParser("python -m experiments.rival", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", required=True, help="one with torch and escnn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes a field of the config")
    return parser


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2])
    else:
        from experiments.main import program

        program(main, "it starts anew")
