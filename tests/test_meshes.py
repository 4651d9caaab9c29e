"""Meshes: what one device computes, on one and two devices, over Auto, Explicit and manual axes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_item_over_every_kind_of_mesh():
    """In a process of two CPU devices: equal outputs, sharded as the input, and equal sums in the gradients."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_ENABLE_COMPILATION_CACHE": "false",
                   "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, "-W", "error", TESTS / "on_meshes.py"], env=environment, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-4]) > 100  # "… 300 cases, 0 failed"
