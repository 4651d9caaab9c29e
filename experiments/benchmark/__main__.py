"""Speed, measured: `python -m experiments.benchmark [--parts layers,steps] [--peers --peer-python PATH] [--out DIR]`.

Prints Markdown tables, and keeps `benchmark.md`, `benchmark.json` (every number of every run) and `growth.png` in DIR up to
date after each case, so that an interrupted run loses nothing. The parts:

layers     a GroupConv of p8 in each lowering: forward, and with the gradients of input and weights
steps      training steps of the paper's networks, as `experiments.programs` makes them
growth     a GroupConv of 16 channels against the order of the cyclic group, and the exponent of its growth
inference  MnistRotNet folded into plain convolutions, and as it is; in ONNX Runtime, where jax2onnx is installed
construct  from `import pdo_jax` to the first step, in fresh processes

Beside them stand plain Flax convolutions of equal channels and of equal parameters, and with --peers PyTorch (the dense network
of equal channels), escnn and e2cnn, where the Python given by --peer-python has them. The programs of a case run in turn, so
that all meet the same machine. With --tpu the networks are compiled for a TPU instead, which need not be there.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import pdo_jax as pdo
from experiments import boundary, config, main, workdir
from experiments.benchmark import tables
from experiments.benchmark.cases import FULL, LARGE, QUICK
from experiments.benchmark.race import PARTS, Options, run


def compile_for_tpu(topology: str, networks: Sequence[str] | None, out: Path):
    from experiments.benchmark import ahead

    rows = ahead.report(topology, networks)
    text = ahead.markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    workdir.write_json(out / f"{topology.replace(':', '-')}.json", rows)
    workdir.write_text(out / f"{topology.replace(':', '-')}.md", text)
    print(text)


def command(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("python -m experiments.benchmark", description="Speed, measured: see the file's head.")

    def several(name, choices, default, about):
        def read(text):
            given = tuple(text.split(","))
            if unknown := [each for each in given if each not in choices]:
                raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {','.join(choices)}")
            return given

        parser.add_argument(name, type=read, default=default, metavar="A,B", help=f"{about}, of {','.join(choices)}")

    several("--parts", tuple(PARTS), tuple(PARTS), "what to measure")
    several("--networks", tuple(FULL.tasks), None, "of steps, construct and --tpu")
    several("--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16"), "of the computation")
    several("--lowerings", pdo.lowering.LOWERINGS, (), "beside auto; default: all for layers and growth, none for steps")
    parser.add_argument("--runs", type=int, default=10, help="of each program; medians are taken of them")
    parser.add_argument("--peers", action="store_true", help="also measure PyTorch, escnn and e2cnn")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="a Python that has them")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a jax.profiler trace of each program of ours")
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="such as v5e:2x2: compile for it and report, measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all runs; the numbers mean nothing")
    given = parser.parse_args(arguments)
    if given.runs < 1:
        parser.error(f"--runs is {given.runs}; give at least 1, and 10 for numbers to report")
    if given.peers and not shutil.which(given.peer_python):
        parser.error(f"there is no Python at {given.peer_python}; give --peer-python one that has torch, escnn or e2cnn")
    if given.peers and (backend := jax.default_backend()) not in ("cpu", "gpu"):
        parser.error(f"the peers run on a CPU or GPU, this is a {backend}; set JAX_PLATFORMS=cpu or leave out --peers")
    jax.config.update("jax_enable_compilation_cache", False)  # the seconds to compile are reported
    sizes = QUICK if given.quick else FULL if jax.default_backend() == "cpu" else LARGE
    networks = given.networks or tuple(sizes.tasks)
    if missing := [name for name in networks if name not in sizes.tasks]:
        parser.error(f"--quick has no {', '.join(missing)}; its networks are {','.join(sizes.tasks)}")
    if given.tpu:
        try:
            compile_for_tpu(given.tpu, given.networks, given.out)
        except config.ConfigError as error:
            parser.error(str(error))
        return 0
    options = Options(networks, given.dtypes, given.lowerings, given.runs, given.peer_python if given.peers else None,
                      given.profile, sizes)
    results = run(options, given.parts, given.out, shlex.join(["python", "-m", "experiments.benchmark", *arguments]))
    print(tables.markdown(results))
    print(f"all of it: {given.out}/", file=sys.stderr)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # fresh processes and the peers need memory of a GPU too
    main.program(lambda: boundary.guarded(command), "the cases that ended are kept")
