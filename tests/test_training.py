"""The training commands: whole runs, equal losses across processes and layouts, exact resumption, what is saved."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from command_line import run
from run_checkpoints import check_identity, checkpoint_to_resume, checkpoints, find_run
from run_log import RunLog
from tests.conftest import ROOT, command, environment, no_access, run_command

STAGE1, STAGE2 = "stage1_projector/train.py", "stage2_finetune/train.py"


def stage1_flags(corpus, output: Path) -> list:
    return [
        *(STAGE1, "--train_json", corpus.reports, "--features_dir", corpus.features, "--llm_name", corpus.llm),
        *("--output_dir", output, "--num_visual_tokens", 8, "--num_workers", 0, "--learning_rate", 0.01),
    ]


@pytest.fixture(scope="module")
def stage1(corpus, tmp_path_factory) -> Path:
    """A stage 1 run of 3 epochs of 5 steps."""
    output = tmp_path_factory.mktemp("stage1") / "run"
    run_command(*stage1_flags(corpus, output), "--batch_size", 4, "--num_epochs", 3, processes=1)
    return output


def log_lines(run: Path, key: str = "loss") -> list[dict]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in line]


def test_stage1_leaves_a_whole_run_folder(stage1):
    names = {path.name for path in stage1.iterdir()}
    assert names == {"run.json", "log.jsonl", "curves.png", "checkpoints", "best_model", "final_model"}
    lines = log_lines(stage1)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    fields = (
        "step epoch loss lr grad_norm seconds samples_per_s supervised_tokens_per_s padding_fraction peak_memory_bytes"
    )
    assert set(lines[0]) == set(fields.split())
    assert [line["epoch"] for line in log_lines(stage1, "val_loss")] == [1, 2, 3]
    assert {path.name for path in (stage1 / "final_model").iterdir()} == {"vlm.json", "projector", "tokenizer"}
    settings = json.loads((stage1 / "final_model" / "vlm.json").read_text())
    assert settings["tiling"] == {"tile_size": 256, "mpp": 0.5, "overlap": 0, "min_tissue": 0.1}
    assert settings["encoder"] == "made-up"
    assert settings["llm_fingerprint"]
    run_facts = json.loads((stage1 / "run.json").read_text())
    assert run_facts["cut_answers"] == {"train": "0 of 20", "val": "0 of 2"}
    assert set(run_facts["trainable_parameters"]) == {"llm", "projector"}  # the reducer has none


def test_checkpoints_hold_only_what_learns(stage1):
    newest = sorted((stage1 / "checkpoints").iterdir())[-1]
    assert all(name.startswith("projector.") for name in load_file(newest / "trainable.safetensors"))
    assert len(list((stage1 / "checkpoints").iterdir())) == 2


def test_an_existing_run_is_not_overwritten_unasked(corpus, stage1):
    done = run_command(*stage1_flags(corpus, stage1), status=2)
    assert "--resume_from_checkpoint latest" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_overwrite_leaves_the_old_run(corpus, tmp_path):
    flags = stage1_flags(corpus, tmp_path / "run")
    run_command(*flags, "--num_epochs", 1, "--batch_size", 30)
    run_command(*flags, "--overwrite", "--token_reducer", "unknown", status=2)
    assert (tmp_path / "run" / "final_model" / "vlm.json").exists() and log_lines(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("command_line.tempfile.TemporaryFile", no_access)
    with pytest.raises(PermissionError, match=rf"--output_dir .*nothing can be written .*denied in {tmp_path}\)"):
        find_run(output_dir=str(tmp_path / "a" / "run"), overwrite=False, resume_from_checkpoint=None)
    (tmp_path / "run").mkdir()
    monkeypatch.undo()
    run_dir, checkpoint, state = find_run(
        output_dir=str(tmp_path / "run"), overwrite=False, resume_from_checkpoint="latest"
    )
    assert (run_dir, checkpoint, state.step) == (tmp_path / "run", None, 0)


def test_weights_and_biases_without_a_login_is_one_line(tmp_path, monkeypatch):
    class NoLogin(Exception):
        pass

    def init_trackers(*_, **__):
        raise NoLogin("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(errors=SimpleNamespace(Error=NoLogin)))
    with pytest.raises(ValueError, match="--wandb_project mine: no key .or set WANDB_MODE=offline"):
        RunLog(SimpleNamespace(init_trackers=init_trackers), tmp_path, 0, 1, "mine", {})


def test_two_processes_give_the_first_step_of_one(corpus, tmp_path):
    runs = {}
    for processes, batch_size, accumulation in ((1, 4, 1), (2, 2, 1), (1, 1, 4)):
        output = tmp_path / f"{processes}x{batch_size}"
        flags = ["--batch_size", batch_size, "--gradient_accumulation_steps", accumulation, "--num_epochs", 2]
        flags += ["--best_metric", "rouge_l", "--max_answer_tokens", 24]
        done = run_command(*stage1_flags(corpus, output), *flags, processes=processes)
        assert done.stderr.count("image ablation on 2 records") == 1
        ablation = log_lines(output, "image_ablation")[0]["image_ablation"]
        assert json.loads((output / "run.json").read_text())["image_ablation"] == ablation
        runs[processes, batch_size, "ablation"] = [ablation[name] for name in ("right", "shuffled", "zero")]
        runs[processes, batch_size, "written"] = [line["val_rouge_l"] for line in log_lines(output, "val_rouge_l")]
        runs[processes, batch_size] = [line["loss"] for line in log_lines(output)]
        norms = [line["grad_norm"] for line in log_lines(output)]
        runs[processes, batch_size, "norm"] = norms
        runs[processes, batch_size, "val"] = [line["val_loss"] for line in log_lines(output, "val_loss")]
    # The command that accelerate documents for CPUs; in 1.15 it starts a single process.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    flags = [*stage1_flags(corpus, tmp_path / "launched"), "--batch_size", 4, "--num_epochs", 2]
    flags += ["--max_answer_tokens", 24]
    subprocess.run([*launch, *map(str, flags)], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert log_lines(tmp_path / "launched")[0]["loss"] == pytest.approx(runs[1, 4][0], abs=1e-5)

    one = runs[1, 4]
    for other in ((2, 2), (1, 1)):
        assert runs[other][0] == pytest.approx(one[0], rel=1e-6)
        assert runs[other] == pytest.approx(one, abs=1e-4)  # the last step of an epoch has fewer records
        assert runs[*other, "norm"][0] == pytest.approx(runs[1, 4, "norm"][0], rel=1e-4)
        assert runs[*other, "val"] == pytest.approx(runs[1, 4, "val"], abs=1e-4)
        assert runs[*other, "ablation"] == pytest.approx(runs[1, 4, "ablation"], abs=1e-4)
        assert runs[*other, "written"] == pytest.approx(runs[1, 4, "written"], abs=1e-6)


def test_killed_lora_run_resumes_to_the_same_losses_and_weights(corpus, stage1, tmp_path):
    flags = [
        *(STAGE2, "--train_json", corpus.reports, "--features_dir", corpus.features, "--num_workers", 0),
        *("--stage1_projector_path", stage1 / "final_model", "--llm_training", "lora", "--lora_dropout", 0.2),
        *("--unfreeze_projection_layer", "--batch_size", 2, "--num_epochs", 4, "--save_steps", 3),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_command(*flags, "--output_dir", whole)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*flags, "--output_dir", killed), cwd=ROOT, env=environment(), **quiet)
    # Killed in the second epoch, past a checkpoint that is not at an epoch's end.
    while process.poll() is None and (not (killed / "log.jsonl").exists() or len(log_lines_so_far(killed)) < 14):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "final_model").exists()
    run_command(*flags, "--output_dir", killed, "--resume_from_checkpoint", "latest")
    expected, resumed = log_lines(whole), log_lines(killed)
    assert [line["step"] for line in resumed] == [line["step"] for line in expected]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in expected], abs=1e-6)
    assert [line["lr"] for line in resumed] == [line["lr"] for line in expected]
    for name in ("projector/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(killed / "final_model" / name), load_file(whole / "final_model" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert not list(killed.glob("**/*.writing"))


def log_lines_so_far(run: Path) -> list[str]:
    return (run / "log.jsonl").read_text().splitlines()


def test_full_fine_tuning_saves_a_language_model_that_opens_by_itself(corpus, stage1, tmp_path):
    flags = [
        *(STAGE2, "--train_json", corpus.reports, "--features_dir", corpus.features, "--num_workers", 0),
        *("--stage1_projector_path", stage1 / "best_model", "--llm_training", "full", "--learning_rate", 1e-3),
        *("--batch_size", 8, "--num_epochs", 2, "--gradient_checkpointing", "--output_dir", tmp_path / "run"),
    ]
    run_command(*flags)
    from transformers import Gemma3nForCausalLM

    tuned = Gemma3nForCausalLM.from_pretrained(tmp_path / "run" / "final_model" / "language_model").state_dict()
    base = Gemma3nForCausalLM.from_pretrained(corpus.llm).state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert not changed & {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"}
    losses = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_image_records_train_the_encoder_in_epoch_one_only(corpus, tmp_path):
    images = ["--image_root", corpus.images, "--num_workers", 0, "--batch_size", 4, "--val_fraction", 0.3]
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [STAGE1, "--train_json", corpus.captions, "--vision_model_name", corpus.encoder, "--llm_name", corpus.llm]
    run_command(*flags, *images, "--num_visual_tokens", 16, "--num_epochs", 1, "--output_dir", one)
    flags = [STAGE2, "--train_json", corpus.questions, "--stage1_projector_path", one / "final_model"]
    flags += ["--train_ve_first_epoch", "--learning_rate", 1e-3, "--save_steps", 1, "--keep_checkpoints", 20]
    run_command(*flags, *images, "--num_epochs", 3, "--output_dir", two)

    def encoder_at(step: int) -> dict:
        state = load_file(two / "checkpoints" / f"step_{step}" / "trainable.safetensors")
        return {name: value for name, value in state.items() if name.startswith("encoder.")}

    steps = len(log_lines(two))
    end_of_one = steps // 3
    assert steps % 3 == 0 and end_of_one >= 2
    first, after_one, last = encoder_at(1), encoder_at(end_of_one), encoder_at(steps)
    assert any(not torch.equal(first[name], after_one[name]) for name in first)
    assert all(torch.equal(after_one[name], last[name]) for name in last)
    optimizer = load_file(two / "checkpoints" / f"step_{steps}" / "optimizer.safetensors")
    early = load_file(two / "checkpoints" / "step_1" / "optimizer.safetensors")
    assert len(optimizer) < len(early)

    # Resumed from the middle of epoch one and from after it, the run ends with the same weights.
    whole = load_file(two / "final_model" / "encoder" / "model.safetensors")
    losses = [line["loss"] for line in log_lines(two)]
    for step in (1, end_of_one):
        resume = ["--resume_from_checkpoint", two / "checkpoints" / f"step_{step}"]
        run_command(*flags, *images, "--num_epochs", 3, "--output_dir", two, *resume)
        assert [line["loss"] for line in log_lines(two)] == pytest.approx(losses, abs=1e-6)
        resumed = load_file(two / "final_model" / "encoder" / "model.safetensors")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    answer = run_command("inference/generate.py", "--model", two / "final_model", "--image", corpus.images / "0.png")
    assert answer.stdout.endswith("\n")


BLOWS_UP = {"--learning_rate": 1e30, "--max_grad_norm": 1e30, "--warmup_ratio": 0, "--num_workers": 0}


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        (1, {"--train_json": "missing.json"}, "missing.json: no such annotation file"),
        (1, {"--features_dir": "nowhere"}, "--features_dir nowhere: no such folder"),
        (1, {"--projector": "q_former"}, "--projector 'q_former' is unknown"),
        (1, {"--projector": "pixel_shuffle"}, "needs the whole patch grid of an image"),
        (1, {"--position_codes": "rope"}, "--position_codes 'rope' is unknown"),
        (1, {"--batch_size": 0}, "batch_size"),
        (1, {"--num_epochs": 0}, "num_epochs"),
        (1, {"--save_steps": 0}, "--save_steps"),
        (1, {"--save_steps": -3}, "--save_steps"),
        (1, {"--label_smoothing": 1}, "--label_smoothing"),
        (1, {"--seed": -1}, "--seed -1: give a number"),
        (1, {"--lr_num_cycles": 3}, "--lr_num_cycles 3 needs --lr_scheduler_type"),
        (1, {"--packing": None, "--random_batches": None}, "drop one"),
        (1, {"--overwrite": None, "--resume_from_checkpoint": "latest"}, "give one of them"),
        (
            1,
            {"--image_root": ".", "--vision_model_name": "vit"},
            "--features_dir is for slides and --image_root for images",
        ),
        (1, {"--vision_model_name": "vit"}, "--vision_model_name needs --image_root"),
        (1, {"--best_metric": "rouge_l", "--val_fraction": 0}, "--best_metric rouge_l needs validation records"),
        (1, {"--early_stopping_patience": 2, "--val_fraction": 0}, "--early_stopping_patience needs validation"),
        (1, {"--val_fraction": 1}, "no record is left to train on beside 22 for validation"),
        (1, {"--output_dir": "/dev/null/run"}, "--output_dir /dev/null/run: /dev/null is a file"),
        (1, BLOWS_UP | {"--batch_size": 4}, "the gradient norm is nan at a loss of nan, so no step was taken"),
        (1, BLOWS_UP | {"--batch_size": 99}, "step 1: the validation loss is nan; lower --learning_rate"),
        (2, {"--lora_dropout": 1.5}, "--lora_dropout"),
        (2, {"--vision_model_name": "vit"}, "--vision_model_name vit needs --image_root"),
        (1, {"--llm_revision": "v2"}, "--llm_revision v2 is of the hub, and --llm_name"),
        (1, {"--resume_from_checkpoint": "nowhere/step_3"}, "no such checkpoint"),
        (2, {"--train_ve_first_epoch": None}, "--train_ve_first_epoch needs images"),
        (2, {"--llm_training": "frozen"}, "nothing would learn"),
        (2, {"--stage1_projector_path": "nowhere"}, "vlm.json: not found"),
    ],
)
def test_refusals_are_one_line(corpus, stage1, tmp_path, monkeypatch, capsys, stage, changes, message):
    flags = {"--train_json": corpus.reports, "--features_dir": corpus.features, "--output_dir": tmp_path / "run"}
    flags |= {"--llm_name": corpus.llm} if stage == 1 else {"--stage1_projector_path": stage1 / "final_model"}
    words = [word for pair in (flags | changes).items() for word in pair if word is not None]
    script = STAGE1 if stage == 1 else STAGE2
    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as left:
        run(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)
    AcceleratorState._reset_state(reset_partial_state=True)
    stderr = capsys.readouterr().err
    assert left.value.code == 2
    assert stderr.splitlines()[-1].startswith("error: ") and message in stderr.splitlines()[-1]
    assert "usage:" not in stderr and "Traceback" not in stderr
    assert not (tmp_path / "run" / "final_model").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--batch_size": 2}, "batch_size was 4 and is 2"),
        ({"--seed": 7}, "seed was 0 and is 7"),
        ({"--train_json": "shorter"}, "the training records (by content) were others"),
        ({"--features_dir": "made anew"}, "the feature files or images (by content) were others"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_resumed(corpus, stage1, tmp_path, monkeypatch, capsys, changes, message):
    flags = stage1_flags(corpus, stage1)
    flags += ["--batch_size", 4, "--num_epochs", 3, "--resume_from_checkpoint", "latest"]
    if "--train_json" in changes:
        shorter = tmp_path / "shorter.json"
        shorter.write_text(json.dumps(json.loads(corpus.reports.read_text())[:18]))
        changes = {"--train_json": shorter}
    if "--features_dir" in changes:
        shutil.copytree(corpus.features, tmp_path / "features")
        one = next(iter((tmp_path / "features").iterdir()))
        others = sorted((tmp_path / "features").iterdir())
        shutil.copy(next(path for path in others if path.stat().st_size != one.stat().st_size), one)
        changes = {"--features_dir": tmp_path / "features"}
    words = [*flags, *(word for pair in changes.items() for word in pair)]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as left:
        run(importlib.import_module("stage1_projector.train").main)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_only_another_division_of_the_same_batch_may_change(tmp_path):
    had = {"batch_size": 4, "gradient_accumulation_steps": 1, "records_per_step": 8, "val_records": "a"}
    (tmp_path / "progress.json").write_text(json.dumps({"layout": {}, "identity": had}))
    check_identity(tmp_path, had)
    check_identity(tmp_path, had | {"batch_size": 2, "gradient_accumulation_steps": 2})
    with pytest.raises(ValueError, match="records_per_step was 8 and is 16.*processes"):
        check_identity(tmp_path, had | {"records_per_step": 16})
    with pytest.raises(ValueError, match="the validation records .by content. were others; resume"):
        check_identity(tmp_path, had | {"val_records": "b"})


def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path):
    folders = [tmp_path / "checkpoints" / f"step_{step}" for step in (9, 10, 11)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "trainable.safetensors").write_bytes(b"weights")
        progress = {"layout": {}, "files": {"trainable.safetensors": 7}}
        (folder / "progress.json").write_text(json.dumps(progress))
    (folders[2] / "trainable.safetensors").write_bytes(b"wei")
    assert checkpoints(tmp_path) == folders[:2]
    assert checkpoint_to_resume(tmp_path, "latest") == folders[1]
    with pytest.raises(FileNotFoundError, match="not all of it"):
        checkpoint_to_resume(tmp_path, str(folders[2]))
    assert checkpoint_to_resume(tmp_path / "another", "latest") is None


def test_float16_is_refused_even_from_accelerate_config(corpus, tmp_path):
    env = environment() | {"ACCELERATE_MIXED_PRECISION": "fp16"}
    done = subprocess.run(
        command(*stage1_flags(corpus, tmp_path / "run")), cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "overflow" in done.stderr


def test_missing_features_are_listed_and_the_rest_trains(corpus, tmp_path):
    records = json.loads(corpus.reports.read_text())
    records.append({"id": "PIT_09_00001_01.tiff", "report": "Lung, biopsy"})
    records.append({"id": "PIT_01_00000_00.tiff", "report": " "})
    (tmp_path / "more.json").write_text(json.dumps(records))
    flags = stage1_flags(corpus, tmp_path / "run")
    flags[flags.index("--train_json") + 1] = tmp_path / "more.json"
    done = run_command(*flags, "--batch_size", 32, "--num_epochs", 1, status=1)
    assert "2 records left out" in done.stderr and "PIT_09_00001_01" in done.stderr
    assert "its report is empty" in done.stderr
    assert (tmp_path / "run" / "final_model" / "vlm.json").exists()


def test_a_picture_that_breaks_while_training_is_left_out(corpus, tmp_path):
    shutil.copytree(corpus.images, tmp_path / "images")
    broken = tmp_path / "images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:900])  # its header still opens
    flags = [STAGE1, "--train_json", corpus.captions, "--vision_model_name", corpus.encoder, "--llm_name", corpus.llm]
    flags += ["--image_root", tmp_path / "images", "--val_fraction", 0, "--num_epochs", 2, "--batch_size", 4]
    done = run_command(*flags, "--output_dir", tmp_path / "run", "--num_workers", 1, status=1)
    assert "left out of epoch 2: 2.png" in done.stderr
    assert sum(line.get("records_left_out", 0) for line in log_lines(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "final_model" / "vlm.json").exists()


def test_a_run_takes_its_flags_from_a_file_and_the_command_line_wins(corpus, tmp_path):
    flags = {"train_json": corpus.reports, "features_dir": corpus.features, "llm_name": corpus.llm, "num_workers": 0}
    flags |= {"num_epochs": 7, "batch_size": 20, "num_visual_tokens": 4}
    (tmp_path / "flags.yaml").write_text("".join(f"{name}: {value}\n" for name, value in flags.items()))
    words = ["--config", tmp_path / "flags.yaml", "--num_epochs", 2, "--output_dir", tmp_path / "run"]
    run_command(STAGE1, *words)
    assert log_lines(tmp_path / "run", "val_loss")[-1]["epoch"] == 2
    training = json.loads((tmp_path / "run" / "final_model" / "vlm.json").read_text())["training"]
    assert (training["num_epochs"], training["batch_size"], training["num_visual_tokens"]) == (2, 20, 4)


def test_bfloat16_trains_close_to_float32(corpus, tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        output = tmp_path / precision
        run_command(*stage1_flags(corpus, output), "--mixed_precision", precision, "--num_epochs", 1)
        losses[precision] = [line["loss"] for line in log_lines(output)]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)
    assert losses["bf16"] != losses["no"]
