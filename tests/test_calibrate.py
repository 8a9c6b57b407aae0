"""The threshold of uncertainty: its bound against plain definitions, its promise by simulation, the command."""

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import calibrate
from inference.calibrate import binomial_cdf, choose_threshold, error_bound


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.001, 0.999))
def test_binomial_cdf_is_the_plain_sum(trials, errors, rate):
    errors = min(errors, trials)
    plain = sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(errors + 1))
    assert binomial_cdf(errors, trials, rate) == pytest.approx(plain, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 400), st.floats(0.001, 0.5))
def test_error_bound_is_the_rate_at_which_so_few_errors_are_rare(trials, errors, delta):
    errors = min(errors, trials)
    bound = error_bound(errors, trials, delta)
    assert errors / trials <= bound <= 1
    if errors == 0:
        assert bound == pytest.approx(1 - delta ** (1 / trials), rel=1e-9)
    if errors < trials:
        assert binomial_cdf(errors, trials, bound) == pytest.approx(delta, rel=1e-6)
        assert error_bound(errors, trials, delta / 2) > bound


def test_promise_holds_over_many_validation_sets():
    """An answer of confidence c is right with probability c, so the true error of a threshold is known."""
    rng = np.random.default_rng(0)
    population = 1 - rng.beta(0.3, 3, size=100_000)
    broken = kept = 0
    for _ in range(200):
        confidences = rng.choice(population, 300)
        wrong = rng.random(300) > confidences
        found = choose_threshold(confidences.tolist(), wrong.tolist(), max_error=0.05, delta=0.1)
        if found is not None:
            kept += 1
            broken += (1 - population[population >= found["threshold"]]).mean() > 0.05
    assert kept > 100
    assert broken <= 0.1 * 200


def test_threshold_covers_what_it_says_and_ties_stay_together():
    confidences = [0.9] * 300 + [0.2] * 100
    wrong = [False] * 300 + [True] * 100
    found = choose_threshold(confidences, wrong, max_error=0.05, delta=0.1)
    assert (found["threshold"], found["coverage"], found["kept"], found["errors"]) == (0.9, 0.75, 300, 0)
    assert choose_threshold([0.5] * 10, [False] * 10, max_error=0.05, delta=0.1) is None
    assert choose_threshold(confidences, [False] * 400, 0.05, 0.1)["threshold"] == 0.2


def run_here(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, flags)])
    return calibrate.main()


def write_pairs(folder, num_right=200, num_wrong=20):
    rows, references = [], []
    for i in range(num_right + num_wrong):
        confidence, organ = (0.9, "Breast") if i < num_right else (0.1, "Lung")
        measures = dict.fromkeys(calibrate.MEASURES, confidence)
        rows.append({"id": f"s{i}.svs", "report": f"{organ}, biopsy;\n  Benign", "question": "Report?", **measures})
        references.append({"id": f"s{i}.svs", "report": "Breast, biopsy;\n Benign"})
    (folder / "p.json").write_text(json.dumps(rows))
    (folder / "r.json").write_text(json.dumps(references))
    return ["--predictions", folder / "p.json", "--references", folder / "r.json"]


def test_command_prints_and_writes_the_threshold(monkeypatch, tmp_path, capsys):
    pairs = write_pairs(tmp_path)
    assert run_here(monkeypatch, *pairs, "--output", tmp_path / "u.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "u.json").read_text())
    assert (found["threshold"], found["records"], found["kept"]) == (0.9, 220, 200)
    assert found["error_rate_of_all"] == pytest.approx(20 / 220) and found["error_bound"] <= 0.05
    # The field that is asked for is always right here, so everything is good.
    assert run_here(monkeypatch, *pairs, "--field", r", (\w+);") == 0
    assert json.loads(capsys.readouterr().out)["coverage"] == 1


def test_too_few_records_say_so_and_write_nothing(monkeypatch, tmp_path, capsys):
    assert run_here(monkeypatch, *write_pairs(tmp_path, 20, 2), "--output", tmp_path / "u.json") == 1
    assert "more validation records" in capsys.readouterr().err and not (tmp_path / "u.json").exists()


def test_predictions_without_confidence_or_references_are_refused(monkeypatch, tmp_path):
    flags = write_pairs(tmp_path)
    (tmp_path / "bare.json").write_text(json.dumps([{"id": "s0.svs", "report": "x"}]))
    with pytest.raises(ValueError, match="--details"):
        run_here(monkeypatch, "--predictions", tmp_path / "bare.json", *flags[2:])
    (tmp_path / "r.json").write_text(json.dumps([{"id": "other", "report": "x"}]))
    with pytest.raises(ValueError, match="no row has the id"):
        run_here(monkeypatch, *flags)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "not valid JSON"),
        ('{"s0.svs": "x"}', "holds no list"),
        ('["x"]', "row 0 has no id"),
        ('[{"id": "s0.svs", "report": "x", "mean_token_probability": 1}]', "row 0 has no question"),
    ],
)
def test_predictions_of_another_form_are_named(monkeypatch, tmp_path, content, reason):
    flags = write_pairs(tmp_path)
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=f"^--predictions .*p.json: {reason}"):
        run_here(monkeypatch, *flags)
