"""Killed runs end as if they had not been; DDP and FSDP2 train as one process does, and open each other's checkpoints.

Each test starts one process, which imports everything once and forks the runs (tests/forked_runs.py).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, environment


def run_module(name: str, *words: object) -> str:
    command = [sys.executable, "-m", f"tests.{name}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_runs_killed_at_random_moments_end_with_the_same_bits():
    """The whole soak, 20 kills of each command on one and on two processes, is `python -m tests.kill_and_resume`."""
    commands = ("stage2", "classifier", "contrastive")
    lines = run_module("kill_and_resume", "--kills", 1, "--commands", *commands, "--processes", 2).splitlines()
    results = {result["command"]: result for result in map(json.loads, lines)}
    assert results.keys() == set(commands)
    for result in results.values():
        assert result["processes"] == 2 and result["kills"] >= 1 and result["weights"] > 10


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    run_module("layout_runs", root)
    return root


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "final_model").glob("**/*.safetensors"))
    return {f"{path.parent.name}/{name}": value for path in files for name, value in load_file(path).items()}


def distributed_type(run: Path) -> str:
    (progress,) = {json.loads(p.read_text())["layout"]["distributed_type"] for p in run.glob("checkpoints/*/*.json")}
    return progress


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["lora", "full", "packed", "qlora"])
def test_two_processes_train_as_one_does(layouts, name, layout):
    """`packed` has averaged projector, label smoothing, accumulated gradients, and sharded a table on the CPU too."""
    one, two = layouts / f"{name}_single", layouts / f"{name}_{layout}"
    assert distributed_type(two) == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[layout]
    for key in ("loss", "val_loss", "grad_norm"):
        expected, found = ([line[key] for line in log_of(run) if key in line] for run in (one, two))
        assert found == pytest.approx(expected, abs=5e-6)
    expected, found = weights_of(one), weights_of(two)
    assert found.keys() == expected.keys()
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], atol=2e-5, rtol=0)


@pytest.mark.parametrize("written_in, resumed_in", [("ddp", "fsdp2"), ("fsdp2", "single"), ("single", "ddp")])
def test_a_checkpoint_goes_on_in_another_layout(layouts, written_in, resumed_in):
    resumed = layouts / f"{written_in}_then_{resumed_in}"
    assert "not bit for bit" in (resumed.parent / f"{resumed.name}.txt").read_text()
    expected = [line["loss"] for line in log_of(layouts / "lora_single") if "loss" in line]
    found = [line["loss"] for line in log_of(resumed) if "loss" in line]
    assert 0 < len(found) < len(expected)
    assert found == pytest.approx(expected[-len(found) :], abs=5e-6)
    for name, value in weights_of(layouts / "lora_single").items():
        torch.testing.assert_close(weights_of(resumed)[name], value, atol=2e-5, rtol=0)


def test_fsdp_resumes_to_the_same_bits_and_writes_no_frozen_weight(layouts):
    whole, resumed = layouts / "lora_fsdp2", layouts / "fsdp2_then_fsdp2"
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed).items())
    for folder in (whole / "checkpoints").iterdir():
        names = load_file(folder / "trainable.safetensors").keys()
        assert names and all("lora_" in name or name.startswith("projector.") for name in names)


def test_a_result_of_fsdp_opens_as_any_other(layouts):
    from vlm_loading import load_vlm

    for name in ("lora", "full"):
        one, two = (load_vlm(layouts / f"{name}_{layout}" / "final_model")[0] for layout in ("single", "fsdp2"))
        theirs = two.state_dict()
        assert one.state_dict().keys() == theirs.keys()
        for key, value in one.state_dict().items():
            torch.testing.assert_close(theirs[key], value, atol=2e-5, rtol=0)
