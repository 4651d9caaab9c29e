"""The report of runs: one HTML file that holds all and asks for nothing."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from small_runs import make_config
from test_own import paint

from experiments import report, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paint(folder / "data", 20)
    (folder / "data" / "red").rename(folder / "data" / "<b>red$")
    for seed in (0, 1):
        own = make_config(dataset=f"folder:{folder}/data", image_size=4, epochs=2, seed=seed)
        train.train(own, folder / f"seed{seed}")
    return [folder / "seed0", folder / "seed1"]


def test_a_report_of_two_runs(runs, tmp_path, monkeypatch, capsys):
    """All pictures are inside and are pictures; no script, no address; names are escaped; the numbers are the runs'."""
    out = tmp_path / "report.html"
    monkeypatch.syspath_prepend("tests")
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    text = out.read_text()
    assert "<script" not in text and "http:" not in text and "https:" not in text and "<b>" not in text
    sources = re.findall(r"<img alt='([^']*)' src='([^']*)'", text)
    assert len(sources) == text.count("<img") and {"Curves", "Confusion"} <= {name for name, _ in sources}
    for _, source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    for run in runs:
        result = train.read_json(run / "result.json", train.RESULT)
        assert f"<td>{result['test_error']:.2%}</td>" in text and text.count(f"<h3>{run.name}</h3>") == 7
    assert text.count("accuracy against the angle") == 1


def test_the_numbers_behind_it(runs):
    """The confusion of the report is the one that the test error was made of; mistakes are sorted from the worst."""
    seen = report.look(runs[0])
    assert report._wrong(seen) / len(seen.labels) == pytest.approx(seen.result["test_error"])
    assert report._confusion(seen).sum() == len(seen.labels) == 12
    assert seen.angles.shape == (25, 12, 3) and seen.probabilities.shape == (12, 3)
    np.testing.assert_allclose(seen.angles[0], seen.angles[-1], atol=1e-5)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
