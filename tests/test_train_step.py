"""The benchmark of a training step runs, and its two ways compute the same loss."""

import json

from benchmarks import train_step, training_batches


def run(monkeypatch, tmp_path, *flags) -> dict:
    words = ["train_step.py", "--num_reports", 40, "--num_visual_tokens", 6, "--vocab_size", 2000, "--batch_size", 4]
    words += ["--repeats", 1, "--steps", 1, "--json", tmp_path / "found.json", *flags]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    train_step.main()
    return json.loads((tmp_path / "found.json").read_text())


def test_the_parts_that_need_no_process_run(monkeypatch, tmp_path):
    monkeypatch.setattr(training_batches, "REG_REPORTS", tmp_path / "absent.json")
    found = run(monkeypatch, tmp_path, "--only", "step", "padding", "batches")
    assert found["step"]["ratio"] > 0  # that both ways have one loss is asserted within
    assert found["padding"]["mixed, like length"] < found["padding"]["mixed, random"]
    assert set(found["batches"]["ratios"]) == {"random", "like length", "packed"}
