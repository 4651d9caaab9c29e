"""Measuring programs: compiled, and run in turn with those of other libraries."""

import functools
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

import pdo_jax as pdo

SERVER = Path(__file__).with_name("peers.py")
PAUSE = 0.01  # seconds before each run: OpenMP's threads spin on for some milliseconds after their work


class Program(NamedTuple):
    """`run()` runs it once and gives its seconds; `facts` is what is known before: seconds to compile, FLOPs, bytes."""

    run: Callable[[], float]
    facts: dict


class PeerError(RuntimeError):
    """A peer that cannot be measured; the message, such as "not installed", stands in the tables."""


# Programs of ours


def free_layout(function: Callable) -> Callable:
    """`jax.jit(function)`, where the compiler chooses how arguments and results lie in memory, as inside a network."""
    return jax.jit(function, in_shardings=Format(Layout.AUTO), out_shardings=Format(Layout.AUTO))


def compile_program(jitted: Callable, *arguments, options: Mapping | None = None):
    """(The compiled function, what it cost to make and what the compiler says of it); arguments may be abstract. `options` of
    the compiler, by default the library's."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    began = time.perf_counter()
    traced = jitted.trace(*abstract)
    to_lower = time.perf_counter()
    lowered = traced.lower()
    to_compile = time.perf_counter()
    compiled = lowered.compile(pdo.compiler_options() if options is None else options)
    ended = time.perf_counter()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, {
        "trace_seconds": to_lower - began,
        "lower_seconds": to_compile - to_lower,
        "compile_seconds": ended - to_compile,
        "flops": known(costs.get("flops")),
        "bytes": known(costs.get("bytes accessed")),
        "memory_bytes": held + memory.temp_size_in_bytes,
    }


def known(cost: float | None) -> float | None:
    """None where XLA does not know: of a GPU's convolutions, which cuDNN computes, it says -1."""
    return cost if cost and cost > 0 else None


def program(jitted: Callable, *arguments, carry: bool = False, steps: int = 1, options: Mapping | None = None) -> Program:
    """A program of these arguments, see `runner`."""
    compiled, facts = compile_program(jitted, *arguments, options=options)
    return Program(runner(compiled, arguments, carry, steps), facts)


def runner(compiled, arguments, carry: bool = False, steps: int = 1) -> Callable[[], float]:
    """A function that calls a compiled function once and gives its seconds, divided by the `steps` that a call takes.

    With `carry` the first result is the first argument of the next call, and may be donated.
    """
    places = compiled.input_formats[0]
    arguments = jax.tree.map(lambda x, place: jax.device_put(x, place, may_alias=False), tuple(arguments), places)

    def run():
        nonlocal arguments
        began = time.perf_counter()
        results = jax.block_until_ready(compiled(*arguments))
        seconds = time.perf_counter() - began
        if carry:
            arguments = results[0], *arguments[1:]
        return seconds / steps

    return run


def matmul_peak(dtype: str, size: int, runs: int) -> float:
    """FLOP/s of the fastest of some square matrix products, summed in float32."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    product = program(jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)), x, x)
    return 2 * size**3 / min(product.run() for _ in range(runs + 1))


# Programs of peers


class Peer:
    """A process of `peers.py` that holds one case of one peer, ready to run; `answer` is what it says of it.

    It has this process's environment, with what is set for glibc's malloc.
    """

    def __init__(self, python: str, **case):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process = subprocess.Popen([python, str(SERVER)], **pipes)
        try:
            self.answer = self.ask(op="prepare", **case)
        except BaseException:
            self.close()
            raise

    def ask(self, **request) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"failed: the process of the peer ended with code {self.process.wait()}")
        answer = json.loads(line)
        if error := answer.get("error"):
            raise PeerError(error if error == "not installed" else f"failed: {error}")
        return answer

    def run(self, mode: str) -> float:
        return self.ask(op="run", mode=mode)["seconds"]

    def close(self):
        self.process.kill()
        self.process.communicate()


# Races


def race(case: Mapping, programs: Mapping[tuple[str, str], Program], peers: Sequence[Mapping], python: str, runs: int,
         reference: str, profile: Path | None = None) -> list[dict]:
    """One row for each (program, mode) of ours and of the peers, with the seconds of `runs` runs taken in turn.

    `peers` are cases for `peers.prepare`, run in those modes that our programs have. A row's "ratio" is its median over that
    of `reference` in the same mode: above 1 the reference is faster. A peer that cannot be measured has a "note" instead.
    With `profile`, a folder with a trace of each of our programs.
    """
    modes = list(dict.fromkeys(mode for _, mode in programs))
    rows = [{**case, "program": name, "mode": mode, **made.facts} for (name, mode), made in programs.items()]
    calls = [made.run for made in programs.values()]
    with ExitStack() as stack:
        for peer in peers:
            try:
                server = Peer(python, **peer)
                stack.callback(server.close)
                about = server.answer
            except PeerError as error:
                server, about = None, {"note": str(error)}
            about = {name: value for name, value in about.items() if name != "modes"}
            for mode in modes:
                row = {**case, "program": peer["peer"], "mode": mode, **about}
                if server:
                    row["layout"] = row.pop("layout")[mode]
                rows.append(row)
                calls.append(server and functools.partial(server.run, mode))
        for row, found in zip(rows, in_turn(calls, runs), strict=True):
            row |= {"note": found} if isinstance(found, str) else summary(found) if found else {}
    if profile:
        for (name, mode), made in programs.items():
            title = re.sub(r"[^\w.-]+", "_", "-".join(map(str, [*case.values(), name, mode])), flags=re.ASCII)
            with jax.profiler.trace(str(profile / title)):
                made.run()
    return with_ratios(rows, reference)


def in_turn(calls: Sequence[Callable[[], float] | None], runs: int) -> list[list[float] | str | None]:
    """The seconds of each call in `runs` rounds, each call once a round, directly behind an untimed one of its own.

    So that a run finds caches and memory as in a series of its kind, not as another program left them. The order of each round
    is drawn, with a fixed seed. A peer that fails on the way has its message instead, and None stays None.
    """
    found, random = [None if call is None else [] for call in calls], np.random.default_rng(0)
    for _ in range(runs):
        for index in random.permutation(len(calls)):
            if isinstance(found[index], list):
                time.sleep(PAUSE)
                try:
                    calls[index]()
                    found[index].append(calls[index]())
                except PeerError as error:
                    found[index] = str(error)
    return found


def summary(seconds: Sequence[float]) -> dict:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "seconds": list(seconds)}


def with_ratios(rows: Sequence[dict], reference: str) -> list[dict]:
    base = {row["mode"]: row["median"] for row in rows if row["program"] == reference}
    for row in rows:
        if "median" in row and row["mode"] in base:
            row["ratio"] = row["median"] / base[row["mode"]]
    return list(rows)
