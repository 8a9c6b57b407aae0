"""The comparison of encoders: its plan, what is done again, its table, and one run of it on images."""

import csv
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from inference import predict
from stage0_encoder import compare_encoders, comparison_steps, train_classifier
from stage0_encoder.compare_encoders import checked_entries
from stage0_encoder.comparison_steps import JOURNAL, StepFailed, do_steps, encoder_of, plan_steps, words_of
from stage0_encoder.comparison_table import draw, write_tables
from stage1_projector import train as stage1
from stage2_finetune import train as stage2
from tests.conftest import ROOT, environment
from tests.forked_commands import can_fork, run_forked

RECIPES = sorted((ROOT / "recipes").glob("compare_encoders*.yaml"))
DATA = {"train_json": "t.json", "val_json": None, "test_json": "e.json", "slides": ["s"], "image_root": None}
DATA |= {"references": "r.json", "training_reports": "tr.json"}
NOTHING = {name: {} for name in ("train_classifier", "stage0", "stage1", "stage2", "predict", "score")}


class NoBar:
    def set_postfix_str(self, text: str) -> None:
        pass

    def update(self) -> None:
        pass


def plan(folder: Path, **settings) -> list[comparison_steps.Step]:
    return plan_steps({"encoder": "resnet18"}, folder, DATA, NOTHING | settings, seed=0)


def test_flags_become_words():
    flags = {"a": 1, "b": True, "c": False, "d": None, "e": [1, "x"], "f": Path("p")}
    assert words_of(flags) == ("--a", "1", "--b", "--e", "1", "x", "--f", "p")


def test_an_encoder_is_trained_encoded_and_given_to_the_stages(tmp_path):
    entry = {"name": "mine", "train": {"encoder": "vit"}}
    steps = plan_steps(entry, tmp_path, DATA, NOTHING, seed=3)
    assert [step.name for step in steps] == ["train", "encode", "stage1", "stage2", "predict", "score"]
    assert encoder_of(steps) == str(tmp_path / "encoder" / "final_model")
    assert ("--seed", "3") == steps[0].words[2:4] and str(tmp_path / "stage0" / "features") in steps[2].words
    on_images = plan_steps(entry, tmp_path, DATA | {"slides": None, "image_root": "i"}, NOTHING, seed=3)
    assert [step.name for step in on_images] == ["train", "stage1", "stage2", "predict", "score"]
    assert encoder_of(on_images) == str(tmp_path / "encoder" / "final_model")


@pytest.mark.parametrize(
    "entries, message",
    [
        ([{"encoder": "a"}, {"encoder": "b/a"}], "name a is another's too"),
        ([{"encoder": "a", "train": {}}], "give either encoder"),
        ([{"name": "a"}], "give either encoder"),
        ([{"encoder": "a", "epochs": 3}], "'epochs'"),
        ([{"encoder": "a", "name": "../b"}], "use letters"),
        ([], "is empty"),
    ],
)
def test_broken_recipes_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        checked_entries(entries)


def test_only_what_changed_and_what_follows_is_done_again(tmp_path, monkeypatch):
    calls, statuses = [], {}

    def fake(command, **_):
        script = Path(command[1]).parent.name
        calls.append((script, *[word for word in command if word in ("--overwrite", "latest")]))
        return subprocess.CompletedProcess(command, statuses.get(script, 0))

    monkeypatch.setattr(comparison_steps.subprocess, "run", fake)

    def do(overwrite=False, **settings):
        calls.clear()
        do_steps(plan(tmp_path, **settings), tmp_path, 1, overwrite=overwrite, on_step=NoBar())
        return list(calls)

    first = [("stage0_tiling",), ("stage1_projector", "latest"), ("stage2_finetune", "latest")]
    assert do() == [*first, ("inference",), ("evaluation",)]
    assert do() == []
    anew = [("stage2_finetune", "--overwrite"), ("inference", "--overwrite"), ("evaluation",)]
    assert do(stage2={"num_epochs": 9}) == anew
    statuses["stage2_finetune"] = 2
    with pytest.raises(StepFailed, match="stage2_finetune/train.py left with 2"):
        do(stage2={"num_epochs": 8})
    statuses.clear()
    assert do(stage2={"num_epochs": 8}) == anew  # what had been begun anew is begun anew again
    assert do(stage2={"num_epochs": 8}) == []
    statuses["inference"] = 130
    with pytest.raises(KeyboardInterrupt):
        do(stage2={"num_epochs": 8}, predict={"num_beams": 1})
    statuses.clear()
    assert do(stage2={"num_epochs": 8}, predict={"num_beams": 1}) == anew[1:]
    assert len(do(overwrite=True)) == 5
    assert all(not known["stale"] for known in json.loads((tmp_path / JOURNAL).read_text()).values())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_our_commands_take_the_flags_of_the_recipes(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare_encoders.py", "--config", str(recipe)])
    args = compare_encoders.parse_arguments()
    assert yaml.safe_load(recipe.read_text())["train_json"] == args.train_json
    parsers = {"train": train_classifier, "stage1": stage1, "stage2": stage2, "predict": predict}
    settings = {name: getattr(args, name) for name in compare_encoders.STAGE_FLAGS}
    for name, entry in checked_entries(args.encoders).items():
        for step in plan_steps(entry, tmp_path / name, DATA, settings, seed=0):
            assert (ROOT / step.script).is_file()
            if step.name in parsers:
                monkeypatch.setattr(sys, "argv", [step.script, *step.words, *step.resumed(anew=True)])
                parsers[step.name].parse_arguments()


def test_the_table_ranks_and_says_what_failed(tmp_path):
    def row(name, score, status="compared"):
        failed = status == "failed"
        facts = {"reports": 9, "encoder_parameters": 1_500_000, "seconds": 90.0, "failure": "no such file" * failed}
        interval = None if failed else [score - 0.1, score + 0.1]
        return {"name": name, "status": status, "bleu_4": score, "bleu_4_interval_95": interval, **facts}

    write_tables([row("a", 0.2), row("b", None, "failed"), row("c", 0.5)], ["bleu_4"], tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["c", "a", "b"]
    assert "0.5000 [0.4000, 0.6000] | 1.50 | 1.5 | 9" in lines[2] and "b failed: no such file" in "\n".join(lines)
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["bleu_4_low_95"] == "0.1" and rows[1]["bleu_4"] == ""


def test_the_figure_ranks_and_shows_what_is_not_known(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("evaluation.figures.Figure.savefig", lambda figure, path, **_: drawn.append(figure))
    monkeypatch.setattr("stage0_encoder.comparison_table.atomic_path", lambda path: nullcontext(path))
    results = {
        "low": {"bleu_4": 0.2, "intervals_95": {"bleu_4": [0.1, 0.3]}, "baselines": {"constant": {"bleu_4": 0.05}}},
        "high": {"bleu_4": 0.5, "intervals_95": {"bleu_4": [0.45, 0.6]}},
    }
    rows = [{"name": "low", "seconds": 90, "encoder_parameters": None}]
    rows.append({"name": "high", "seconds": 30, "encoder_parameters": 85_800_000})
    draw(results, rows, ["bleu_4"], tmp_path / "comparison.png")
    scores, minutes, parameters = drawn[0].axes
    assert [label.get_text() for label in scores.get_yticklabels()] == ["high", "low"]
    assert [text.get_text() for text in scores.texts] == ["0.50", "0.20"]
    assert [list(line.get_xdata()) for line in scores.lines if len(line.get_xdata()) == 2] == [[0.45, 0.6], [0.1, 0.3]]
    assert [text.get_text().strip() for text in minutes.texts] == ["0.5", "1.5"]
    assert [text.get_text().strip() for text in parameters.texts] == ["85.8", "not known"]


def test_encoders_are_compared_on_images_and_a_failure_does_not_end_it(corpus, tmp_path, monkeypatch, capsys):
    def run_here(command, *, stdout, stderr):
        if not can_fork():
            return real_run(command, stdout=stdout, stderr=stderr, env=environment(), cwd=ROOT)
        done = run_forked(command[1:], environment())
        stdout.write(done.stdout + done.stderr)
        return done

    real_run = subprocess.run
    monkeypatch.setattr(comparison_steps.subprocess, "run", run_here)
    recipe = {
        "train_json": str(corpus.captions),
        "test_json": str(corpus.captions),
        "image_root": str(corpus.images),
        "output_dir": str(tmp_path / "out"),
        "encoders": [{"name": "tiny", "encoder": str(corpus.encoder)}, {"encoder": str(tmp_path / "missing")}],
        "metrics": ["rouge_l", "exact_match"],
        "stage1": {"llm_name": str(corpus.llm), "num_epochs": 1, "num_workers": 0, "image_ablation_records": 0},
        "stage2": {"llm_training": "lora", "lora_rank": 2, "num_epochs": 1, "num_workers": 0},
        "predict": {"max_new_tokens": 4, "num_beams": 1},
        "score": {"num_resamples": 20},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["compare_encoders.py", "--config", str(tmp_path / "recipe.yaml")])
    assert compare_encoders.main() == 1
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())}
    tiny = rows["tiny"]
    assert (tiny["status"], tiny["reports"], len(tiny["rouge_l_interval_95"])) == ("compared", 8, 2), tiny
    assert tiny["encoder_parameters"] > 1000 and tiny["learned_parameters_stage2"] > 0 and tiny["seconds"] > 0
    assert rows["missing"]["status"] == "failed" and "no encoder folder" in rows["missing"]["failure"]
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    assert "| tiny |" in capsys.readouterr().out
