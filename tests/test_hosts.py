"""Several devices, and several processes: the same numbers. The scripts for many hosts train, with two processes on the
loopback interface in place of two hosts.

`srun`, `scontrol`, `gcloud` are stand-ins that start what they are given twice, with the variables that the real ones set; of
Kubernetes the pods are played: the containers of the file, started again where they fail.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import small_runs
import yaml
from small_runs import ROOT, flat, write_config

from experiments import config as configs
from experiments import saved, train
from experiments.workdir import read_json, saved_epochs

TASKS = """#!{python}
import os, subprocess, sys
command = {command}
tasks = [subprocess.Popen(command, env=os.environ | {{
    "SLURM_NTASKS": "2", "SLURM_PROCID": str(k), "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "127.0.0.1"}}) for k in (0, 1)]
sys.exit(max(task.wait() for task in tasks))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    for name, text in {
        "srun": TASKS.format(python=sys.executable, command="sys.argv[2:]"),
        "gcloud": TASKS.format(python=sys.executable, command="['bash', '-c', sys.argv[sys.argv.index('--command') + 1]]"),
        "scontrol": "#!/bin/sh\necho 127.0.0.1\nsleep 0.2\necho node2\n",  # who reads one line alone breaks its pipe
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return small_runs.environment(folder / "cache") | {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]", "CHECKOUT": str(ROOT)}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    changes = {"augment": "shift", "epochs": "6", "ema": "0.9", "label_smoothing": "0.1"}
    return write_config(tmp_path_factory.mktemp("config") / "config.py", "dropout=0.3", **changes)


@pytest.fixture(scope="module")
def by_slurm(environment, config, tmp_path_factory):
    """A run that two tasks of SLURM trained to its end."""
    workdir = tmp_path_factory.mktemp("slurm") / "run"
    subprocess.run([ROOT / "experiments/hosts/slurm.sh", config, workdir], env=environment, cwd=ROOT, check=True, timeout=300)
    assert read_json(workdir / "result.json", {"devices": str})["devices"] == "2 x cpu, 2 process(es)"
    return workdir


def weights(workdir):
    return flat(saved.load(workdir)[2])


def test_two_devices_two_processes_jit_and_pmap_agree(environment, config, by_slurm, tmp_path):
    """Same numbers from a mesh, from pmap and from two processes, with dropout, augmentation, averages and smoothing; and,
    without dropout and augmentation, from one device."""
    plain = write_config(tmp_path / "plain.py", "")
    runs = {"mesh": (config, []), "pmap": (config, ["parallel=pmap"]), "two": (plain, [])}
    program = "from experiments.config import load\nfrom experiments.train import train\n" + "".join(
        f"train(load({str(file)!r}, {changes}), {str(tmp_path / name)!r})\n" for name, (file, changes) in runs.items())
    subprocess.run([sys.executable, "-c", program], env=small_runs.environment(tmp_path / "cache", devices=2), check=True)
    train.train(configs.load(plain), tmp_path / "one")
    mesh, one = weights(tmp_path / "mesh"), weights(tmp_path / "one")
    np.testing.assert_allclose(mesh, weights(tmp_path / "pmap"), rtol=0, atol=1e-3)  # sums in another order
    np.testing.assert_allclose(mesh, weights(by_slurm), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one, weights(tmp_path / "two"), rtol=1e-3, atol=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "mesh", tmp_path / "pmap", by_slurm)]
    assert len({result["test_error"] for result in results}) == 1


def test_a_tpu_slice(environment, config, by_slurm, tmp_path):
    """The processes find each other through JAX alone, and train the same network to the bit."""
    script = ROOT / "experiments/hosts/tpu.sh"
    subprocess.run([script, "slice", "zone", config, tmp_path / "run"], env=environment, cwd=tmp_path, check=True, timeout=300)
    np.testing.assert_array_equal(weights(tmp_path / "run"), weights(by_slurm))


def test_a_pod_that_dies_in_kubernetes(environment, config, by_slurm, tmp_path):
    """One of two is killed after the first epoch: the other ends by itself, both are started again, to the same bits."""
    _, job = yaml.safe_load_all((ROOT / "experiments/hosts/kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    values |= {"CONFIG": str(config), "WORKDIR": str(tmp_path / "run"), "COORDINATOR": f"127.0.0.1:{free_port()}"}

    def pod(index):
        known = values | {"JOB_COMPLETION_INDEX": str(index)}
        words = [re.sub(r"\$\((\w+)\)", lambda match: known[match.group(1)], word) for word in container["args"]]
        return subprocess.Popen([sys.executable, *container["command"][1:], *words], env=environment, cwd=ROOT)

    pods = [pod(0), pod(1)]
    end = time.monotonic() + 200
    while saved_epochs(tmp_path / "run") != [1] and time.monotonic() < end:
        time.sleep(0.02)
    pods[1].send_signal(signal.SIGKILL)
    assert pods[1].wait(60) == -signal.SIGKILL and pods[0].wait(60) == 2, "the other one ends too"
    assert not (tmp_path / "run" / "result.json").exists()
    assert [p.wait(200) for p in [pod(0), pod(1)]] == [0, 0]
    np.testing.assert_array_equal(weights(tmp_path / "run"), weights(by_slurm))
