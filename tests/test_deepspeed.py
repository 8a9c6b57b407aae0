"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes train as DDP does, and checkpoints of each go on in the others."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from accelerator_setup import make_accelerator
from tests.conftest import ROOT, environment

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed: pip install -e '.[deepspeed]'", allow_module_level=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("zero")
    command = [sys.executable, "-m", "tests.zero_runs", str(root)]
    env = environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def logged(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "final_model").glob("**/*.safetensors"))
    return {f"{path.parent.name}/{name}": value for path in files for name, value in load_file(path).items()}


def assert_same_run(found: Path, expected: Path, *, loss: float, weight: float, same_texts: bool = False) -> None:
    for key in ("lr", "lr_projector", "loss", "val_loss", "grad_norm", *(["val_rouge_l"] if same_texts else [])):
        values = logged(expected, key)
        found_values = logged(found, key)
        assert found_values == pytest.approx(values[-len(found_values) :] if values else [], abs=loss), key
        assert bool(values) == bool(found_values)
    theirs, ours = weights_of(expected), weights_of(found)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=weight, rtol=0)


@pytest.mark.parametrize(
    "name, loss, weight",
    [
        ("stage1", 5e-6, 2e-6),  # clips every step, weight decay, moving average of the projector
        ("full", 2e-5, 2e-5),  # two learning rates, gradient checkpointing
        # bfloat16, whose rounding the last bit of a weight may turn; packed, the per-layer table in its file
        ("lora", 1e-2, 1e-4),
    ],
)
def test_zero2_trains_as_ddp_does(runs, name, loss, weight):
    assert_same_run(runs / f"{name}_zero2", runs / f"{name}_ddp", loss=loss, weight=weight)
    first = [logged(runs / f"{name}_{layout}", "loss")[0] for layout in ("zero2", "ddp")]
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    (layout, *_) = [json.loads(p.read_text())["layout"] for p in runs.glob(f"{name}_zero2/checkpoints/*/progress.json")]
    assert layout["distributed_type"] == "DEEPSPEED"
    assert layout["mixed_precision"] == ("bf16" if name == "lora" else "no")


@pytest.mark.parametrize(
    "name, expected, loss, weight",
    [
        ("stage1_zero3", "stage1_ddp", 5e-6, 2e-6),
        ("full_zero3", "full_ddp", 2e-5, 2e-5),
        ("untied_zero3", "untied_ddp", 5e-6, 2e-6),  # a head that learns, in other numbers of chunks on each process
        # In bfloat16 to the last bits with what DeepSpeed does differently done in both, and close to DDP without.
        ("lora_zero3_like_torch", "lora_ddp_passing", 1e-6, 1e-7),
        ("lora_zero3", "lora_ddp", 1e-2, 2e-3),
    ],
)
def test_zero3_trains_as_ddp_does(runs, name, expected, loss, weight):
    same_texts = not name.startswith("stage1") and name != "lora_zero3"
    assert_same_run(runs / name, runs / expected, loss=loss, weight=weight, same_texts=same_texts)
    assert bool(logged(runs / name, "val_rouge_l")) == (not name.startswith("stage1"))
    counts = [
        json.loads((run / "run.json").read_text())["trainable_parameters"] for run in (runs / name, runs / expected)
    ]
    assert counts[0] == counts[1]


def test_the_model_checks_itself_under_zero3_as_with_ddp(runs):
    found, expected = ([*logged(runs / f"full_{layout}", "image_ablation")] for layout in ("zero3", "ddp"))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)


def test_weights_that_learn_stay_in_float32_under_bf16(runs):
    for layout in ("zero2", "zero3"):
        (folder,) = (runs / f"lora_{layout}" / "checkpoints").iterdir()
        assert {value.dtype for value in load_file(folder / "trainable.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["zero2_then_ddp", "zero3_then_ddp", "ddp_then_zero3", "zero2_then_zero3"])
def test_a_checkpoint_goes_on_in_another_layout(runs, name):
    resumed = runs / name
    assert "goes on with" in (runs / f"{name}.txt").read_text()
    assert 0 < len(logged(resumed, "loss")) < len(logged(runs / "full_ddp", "loss"))
    assert_same_run(resumed, runs / "full_ddp", loss=2e-5, weight=2e-5)


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_a_layout_resumes_to_the_same_bits(runs, layout):
    expected = weights_of(runs / f"full_{layout}")
    found = weights_of(runs / f"{layout}_then_{layout}")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_deepspeed_without_a_gpu_is_refused(tmp_path, monkeypatch):
    """Accelerate by itself would train with DDP, and say nothing."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ValueError, match="finds none"):
            make_accelerator(output_dir=tmp_path, seed=0, max_grad_norm=1.0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
