"""DeepSpeed's ZeRO-2 on two processes trains as DDP does, and its checkpoints go on in either."""

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


def assert_same_run(found: Path, expected: Path, *, loss: float, weight: float) -> None:
    for key in ("lr", "lr_projector", "loss", "val_loss", "grad_norm"):
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


def test_weights_that_learn_stay_in_float32_under_bf16(runs):
    (folder,) = (runs / "lora_zero2" / "checkpoints").iterdir()
    assert {value.dtype for value in load_file(folder / "trainable.safetensors").values()} == {torch.float32}


def test_a_checkpoint_of_zero2_goes_on_in_ddp(runs):
    resumed = runs / "zero2_then_ddp"
    assert 0 < len(logged(resumed, "loss")) < len(logged(runs / "full_ddp", "loss"))
    assert_same_run(resumed, runs / "full_ddp", loss=2e-5, weight=2e-5)


def test_zero2_resumes_to_the_same_bits(runs):
    expected = weights_of(runs / "full_zero2")
    found = weights_of(runs / "zero2_then_zero2")
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
