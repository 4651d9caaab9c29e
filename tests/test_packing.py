"""A packed run goes on elsewhere to the same bits; a damaged file is refused, and nothing is left behind."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_runs import final_state, flat, make_config, make_data

from experiments import main, packing, train
from experiments.workdir import TrainError, saved_epochs


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of three epochs that stopped after the second."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "time_for_more", lambda began, minutes, history, compiles: len(history) < 2)
        assert train.train(make_config(ema=0.9), run, make_data()) is None
    return run


@pytest.mark.parametrize("part", [packing.PART, 4000])
def test_a_packed_run_goes_on_elsewhere_to_the_same_bits(begun, tmp_path, monkeypatch, capsys, part):
    """In one file or in parts, through the command line; its metrics come along."""
    monkeypatch.setattr(packing, "PART", part)
    file, there, straight = tmp_path / "new" / "run.zip", tmp_path / "there", tmp_path / "straight"
    (tmp_path / ".unpacking-there" / "left by a killed one").mkdir(parents=True)
    assert main.main(["--pack", str(begun), str(file)]) == 0
    sizes = [path.stat().st_size for path in file.parent.iterdir()]
    assert (len(sizes) == 1) is (part > 4000) and max(sizes) <= part
    assert main.main(["--unpack", str(file), str(there)]) == 0
    assert "after epoch 2" in capsys.readouterr().out and saved_epochs(there) == [2]
    assert not list(tmp_path.glob(".unpacking*")) and not list(there.glob("left*"))
    config, data = make_config(ema=0.9), make_data()
    results = [train.train(config, folder, data) for folder in (there, straight)]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    np.testing.assert_array_equal(*(flat(final_state(folder, config)) for folder in (there, straight)))
    lines = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


def rewrite(file: Path, changes: dict[str, bytes]):
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def climb(file: Path):
    manifest = {"format": packing.FORMAT, "files": {"../out": packing._sha256(b"x")}}
    rewrite(file, {packing.MANIFEST: json.dumps(manifest).encode(), "../out": b"x"})


@pytest.mark.parametrize("damage, message", [
    (lambda file: file.write_bytes(file.read_bytes()[:-40]), "run.zip is damaged, or no packed run .BadZipFile.*copy it again"),
    (lambda file: file.write_bytes(b"years of work"), "run.zip is damaged, or no packed run"),
    (lambda file: rewrite(file, {"metrics.jsonl": b"{}"}), "run.zip is damaged: metrics.jsonl has SHA-256"),
    (lambda file: rewrite(file, {packing.MANIFEST: b'{"format": "other", "files": {}}'}), "is 'other', expected 'a packed run"),
    (climb, "the name '../out', which leads out of the folder"),
    (lambda file: file.unlink(), "no file .*run.zip, nor parts run.zip.1-of"),
], ids=["cut", "other", "changed", "version", "climbing", "none"])
def test_a_damaged_file_is_refused_and_nothing_is_left_behind(begun, tmp_path, damage, message):
    file = tmp_path / "run.zip"
    packing.pack(begun, file)
    damage(file)
    with pytest.raises(TrainError, match=message):
        packing.unpack(file, tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} <= {"run.zip"}


def test_a_missing_part_and_folders_that_cannot_be_used_are_named(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PART", 4000)
    parts = packing.pack(begun, tmp_path / "run.zip")
    parts[1].unlink()
    with pytest.raises(TrainError, match=f"lacks its part run.zip.2-of-{len(parts)}"):
        packing.unpack(tmp_path / "run.zip", tmp_path / "there")
    with pytest.raises(TrainError, match="is there already"):
        packing.unpack(tmp_path / "run.zip", begun)
    with pytest.raises(TrainError, match="has no checkpoint"):
        packing.pack(tmp_path, tmp_path / "none.zip")
    with pytest.raises(TrainError, match="cannot write .*; choose another file"):
        packing.pack(begun, parts[0] / "x.zip")


def test_a_file_that_would_unpack_to_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes(100_000))
    with pytest.raises(TrainError, match="would unpack to 100000 bytes, more than 1000"):
        packing.unpack(tmp_path / "bomb.zip", tmp_path / "run")
    assert not (tmp_path / "run").exists()
