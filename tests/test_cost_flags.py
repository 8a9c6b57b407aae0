"""Whole runs with the flags that make a step cheaper: --packing and --ple_device cpu."""

import importlib
import json

import pytest
from accelerate.state import AcceleratorState

from tests.tiny_models import REPORTS

QUESTIONS = ("Write the report.", "Which organ?", "How was it taken?")


@pytest.fixture
def train(monkeypatch, corpus, tmp_path):
    """Run a training script here, on three questions about each slide; the lines of its log."""
    rows = [
        {"id": path.stem, "question": question, "report": REPORTS[(place + number) % len(REPORTS)]}
        for place, path in enumerate(sorted(corpus.features.iterdir()))
        for number, question in enumerate(QUESTIONS)
    ]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(script: str, name: str, *flags: object) -> list[dict]:
        words = [script, "--train_json", tmp_path / "asked.json", "--features_dir", corpus.features, "--num_workers", 0]
        words += ["--output_dir", tmp_path / name, "--batch_size", 6, "--num_epochs", 1, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, words)))
        try:
            assert importlib.import_module(script).main() == 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    return run


def test_packed_runs_resume_and_a_table_on_the_cpu_changes_no_loss(train, corpus, tmp_path):
    stage1 = ["--llm_name", corpus.llm, "--num_visual_tokens", 8]
    plain = train("stage1_projector.train", "plain", *stage1, "--packing", "--save_steps", 3, "--keep_checkpoints", 9)
    mapped = train("stage1_projector.train", "mapped", *stage1, "--packing", "--ple_device", "cpu")
    losses = [line["loss"] for line in plain if "loss" in line]
    assert len(losses) >= 8 and losses == [line["loss"] for line in mapped if "loss" in line]
    evaluated, expected = ([line["val_loss"] for line in log if "val_loss" in line] for log in (mapped, plain))
    assert evaluated == expected and len(expected) == 1
    resume = ["--save_steps", 3, "--resume_from_checkpoint", tmp_path / "plain" / "checkpoints" / "step_3"]
    resumed = train("stage1_projector.train", "plain", *stage1, "--packing", "--keep_checkpoints", 9, *resume)
    assert [line["loss"] for line in resumed if "loss" in line] == pytest.approx(losses, abs=1e-6)

    stage2 = ["--stage1_projector_path", tmp_path / "plain" / "final_model", "--llm_training", "lora", "--packing"]
    packed = train("stage2_finetune.train", "lora", *stage2, "--gradient_checkpointing", "--ple_device", "cpu")
    assert all(line["loss"] > 0 for line in packed if "loss" in line)
