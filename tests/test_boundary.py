"""Every error, signal and bad option ends in one line and an exit code."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from small_runs import ROOT

from experiments import boundary, equivariance, main, reproduce, together, train  # noqa: F401 — before another user asks
from experiments.benchmark import feed
from experiments.boundary import Refused
from experiments.config import load
from experiments.datasets import DataError, store
from experiments.workdir import TrainError

# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--evaluate r --predict x.png", "--evaluate and --predict do not go together"),
        ("--evaluate r --workdir r", "--workdir does not go with --evaluate"),
        ("--predict x.png", "--predict needs a trained run"),
        ("--evaluate r --minutes 3", "--minutes is for training"),
        ("--evaluate r --force-resume", "--force-resume is for training"),
        ("--evaluate r --set seed=1", "--set changes a config; with --evaluate name its file too"),
        ("--pack r f --config c.py", "--config does not go with --pack"),
        ("--minutes 0", "--minutes is 0.0; it must be a number above 0"),
        ("--minutes nan", "--minutes is nan"),
        ("--coordinator a:1", "--coordinator is for --distributed"),
        ("--timeout 3", "--timeout is for --distributed"),
        ("--distributed --coordinator a:1", "needs all of .*; there is no --num-processes"),
        ("--distributed --coordinator a --num-processes 2 --process-id 0", "it must be HOST:PORT"),
        ("--distributed --coordinator a:0 --num-processes 2 --process-id 0", "it must be HOST:PORT"),
        ("--distributed --coordinator a:1 --num-processes 2 --process-id 2", "--process-id is 2; with 2 processes"),
        ("--distributed --coordinator a:1 --num-processes 0 --process-id 0", "--num-processes is 0"),
        ("--distributed --coordinator a:1 --num-processes 2 --process-id 0 --timeout -1", "--timeout is -1.0"),
        ("--config none", "no config file none"),
        ("--config exits.py", "does not run: SystemExit: 3"),
        (f"--set seed={'-' * 5000}1", "seed is '-"),
        (f"--set batch_size={'x' * 5000}", "batch_size is 'xxx.* … x.*; it must be int"),
        ("--set dataset=folder:~nobody-here/x", "there is no home folder for ~nobody-here/x"),
        ("--set dataset=npz:~nobody-here/x", "there is no home folder for ~nobody-here/x"),
        ("--set data_dir=~nobody-here --set dataset=cifar10", "there is no home folder for ~nobody-here"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    assert main.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and "Traceback" not in error and len(error) < 1200


def test_what_a_stream_costs_is_measured_on_enough_pictures(monkeypatch, capsys):
    for arguments in ("--steps 1", "--batch 0", "--images -1", "--images 100 --batch 50"):
        monkeypatch.setattr(sys, "argv", ["feed", *arguments.split()])
        assert feed.main() == 2
        assert capsys.readouterr().err.startswith("error: give at least 2 --steps, a --batch of 1")


def test_a_config_file_needs_no_ending(tmp_path):
    (tmp_path / "c").write_text("from small_runs import Net\nconfig = dict(network=Net())\n")
    assert load(tmp_path / "c").epochs == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainError("what to do"), 2, "error: what to do"),
        (OSError(28, "No space left on device", "x"), 2, "error: No space left on device: x"),
        (RuntimeError("Unable to initialize backend 'cuda': no"), 2, "error: JAX has no such devices here"),
        (MemoryError(), 2, "error: the memory does not suffice"),
        (KeyError("x"), 2, "error: KeyError: 'x' (where: "),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_every_error_becomes_one_line_and_a_code(error, code, line, capsys):
    def fail():
        raise error

    assert boundary.guarded(fail) == code
    assert capsys.readouterr().err.startswith(line)


STARTS = [
    ({"JAX_PLATFORMS": "cuda"}, "", 2, "error: JAX has no such devices here"),
    ({"JAX_ENABLE_X64": "maybe"}, "", 2, "error: ValueError: invalid truth value 'maybe'"),
    ({"XLA_FLAGS": "--no_such_flag=1"}, "", 2, "error: XLA does not take XLA_FLAGS='--no_such_flag=1'"),
    ({}, "--workdir " + 300 * "x", 2, "File name too long"),
    ({}, "--config \udcff\udcfe", 2, "no config file"),
    ({}, "--help | true", None, ""),
    ({}, "--evaluate none >&-", 2, "error: "),
]


@pytest.mark.parametrize(("environment", "arguments", "code", "line"), STARTS, ids=range(len(STARTS)))
def test_a_bad_environment_is_told_in_one_line(tmp_path, environment, arguments, code, line):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    command = os.fsencode(f"{sys.executable} -m experiments.main {arguments}")
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    error = ended.stderr.decode(errors="replace")
    assert ended.returncode == code or code is None
    assert line in error and "Traceback" not in error and len(error.splitlines()) <= 1


def as_another_user(function):
    """What happens to a user who owns nothing, as root can write everywhere; others cannot where the mode says so."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        return function()
    finally:
        os.seteuid(user)


def test_folders_that_must_not_be_written_are_named(capsys):
    """Of a run, new or begun, of results, of figures: one line; and of data."""
    import tensorflow_datasets  # noqa: F401 — the other user may not read where it lies

    with tempfile.TemporaryDirectory() as folder:
        (begun := Path(folder, "begun")).mkdir()
        (begun / "config.json").write_text("{}")
        file = shutil.copy(main.QUICK, folder)
        try:
            for path in (begun, Path(folder)):
                path.chmod(0o555)
            for program, arguments in [
                (main.main, ["--config", file, "--workdir", f"{folder}/new"]),
                (main.main, ["--config", file, "--workdir", str(begun)]),
                (reproduce.main, ["mnist_rot_20_float32", "--out", f"{folder}/results"]),
                (lambda given: boundary.guarded(lambda: equivariance.command(given)), ["--out", f"{folder}/figures"]),
            ]:
                assert as_another_user(lambda program=program, arguments=arguments: program(arguments)) == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith("error: ") and "Permission denied" in line and arguments[-1] in line
            with pytest.raises(DataError, match=f"(?s)cannot write the data set cifar10 under {folder}.*PDO_DATA_DIR"):
                as_another_user(lambda: store.load("cifar10", data_dir=Path(folder)))
        finally:
            for path in (Path(folder), begun):
                path.chmod(0o755)


# Processes that train together


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_that_do_not_come_are_waited_for_no_longer_than_asked():
    address = ("127.0.0.1", free_port())
    for index, reason in ((0, "process 1 did not come"), (1, "refused")):
        with pytest.raises(Refused, match=f"process {index} cannot meet the others at .* within 0.5 s .*{reason}"):
            together.meet(address, 2, index, 0.5)


def test_a_stranger_at_the_port_is_sent_away_and_twins_are_told(monkeypatch):
    """Another program that connects changes nothing; a second process of one number ends both."""
    import threading
    import time

    address, errors = ("127.0.0.1", free_port()), {}

    def come(name, index, count):
        try:
            end = time.monotonic() + 5
            errors[name] = together._gather(address, 3, end) if index == 0 else together._connect(address, count, index, end)
        except (OSError, ValueError) as error:
            errors[name] = str(error)

    threads = [
        threading.Thread(target=come, args=arguments) for arguments in (("first", 0, 3), ("second", 1, 3), ("twin", 1, 3))
    ]
    threads[0].start()
    time.sleep(0.2)
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(errors.values()) == {"process 1 is there twice"}
