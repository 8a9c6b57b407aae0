"""The files under recipes/: accelerate reads its own, and every command in them is one that our scripts take."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers.models.gemma3n import modeling_gemma3n

from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def launch_arguments(config: Path, monkeypatch):
    """What `accelerate launch --config_file` makes of a file."""
    monkeypatch.setattr("accelerate.commands.launch.is_port_in_use", lambda *_: False, raising=False)
    args = launch_command_parser().parse_args(["--config_file", str(config), "stage1_projector/train.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(config, monkeypatch):
    loaded = load_config_from_file(str(config))
    assert loaded.mixed_precision == "bf16"
    args = launch_arguments(config, monkeypatch)
    print(args)
