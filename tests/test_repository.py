"""The repository keeps its own rules: what is installed, which way imports run, what the README promises."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from command_line import make_parser
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAGES = {"stage0_encoder", "stage0_tiling", "stage1_projector", "stage2_finetune", "inference", "evaluation", "demo"}
# A module may import those on lower floors only.
FLOORS = [
    {
        "command_line",
        "csv_separator",
        "deepspeed_zero",
        "encoder_presets",
        "encoder_backbones",
        "feature_containers",
        "hdf5_rows",
        "hub_access",
        "longnet",
        "packing",
        "per_layer_table",
        "projector_parts",
        "sharded_weights",
        "token_nll",
        "vlm_settings",
        "weight_reading",
    },
    {
        "projectors",
        "encoder_lora",
        "encoders",
        "image_encoder",
        "four_bit",
        "slide_encoders",
        "language_model",
        "accelerator_setup",
        "run_checkpoints",
        "run_log",
        "slide_features",
    },
    {"slide_vlm"},
    {"slide_reports", "report_loss", "offline_kit", "projector_average", "vlm_loading"},
    {"validation", "image_ablation"},
]


def imports_of(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_every_module_and_folder_is_installed():
    tools = PROJECT["tool"]["setuptools"]
    assert set(tools["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py") if ".venv" not in path.parts}
    assert set(tools["packages"]) == {".".join(folder.parts) for folder in folders} - {"tests"}


def test_every_folder_with_code_is_a_package():
    for stage in STAGES:
        for folder in {path.parent for path in (ROOT / stage).glob("**/*.py")} - {ROOT / "demo" / "output"}:
            assert (folder / "__init__.py").exists(), folder


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_root_modules_import_downwards_only(floor):
    higher = set().union(*FLOORS[floor + 1 :], STAGES)
    for module in FLOORS[floor]:
        files = [*ROOT.glob(f"{module}.py"), *ROOT.glob(f"{module}/*.py")]
        assert files
        for path in files:
            assert not imports_of(path) & higher, path


def test_all_root_modules_have_a_floor():
    assert set().union(*FLOORS) == {path.stem for path in ROOT.glob("*.py")} | {
        "slide_reports",
        "slide_features",
        "projector_parts",
    }


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_each_other(stage):
    metrics = {"evaluation"}  # training chooses its best model by evaluation's own metrics
    trained = dict.fromkeys(("stage0_encoder", "stage1_projector", "stage2_finetune"), metrics)
    others = trained | {"inference": {"stage0_tiling"}, "demo": STAGES, "stage0_encoder": metrics | {"stage0_tiling"}}
    allowed = {stage} | others.get(stage, set())
    for path in (ROOT / stage).glob("**/*.py"):
        assert not imports_of(path) & (STAGES - allowed), path


def test_no_script_shadows_a_library():
    ours = {path.stem for stage in STAGES for path in (ROOT / stage).glob("**/*.py")} - {"__init__"}
    libraries = {"datasets", "evaluate", "tokenizers", "accelerate", "peft", "transformers", "torch", "timm"}
    assert not ours & (libraries | set(sys.stdlib_module_names))


def test_requirements_are_pinned_and_end_with_the_checkout():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ."
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][^\s]*", line) for line in lines[:-1])


def test_files_named_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for script in set(re.findall(r"(?:stage\d_\w+|inference|evaluation)/\w+\.py", readme)):
        assert (ROOT / script).is_file(), script
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme):
        assert (ROOT / picture).is_file(), picture


def test_a_flag_of_another_kind_is_refused_in_plain_words(capsys):
    parser = make_parser(None)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--tile_size", type=int, default=256)
    for flag, told in (("--mpp=nan", "--mpp: Expected a number."), ("--tile_size=2.5", "Expected a whole number.")):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([flag])
        assert told in (error := capsys.readouterr().err) and "<class" not in error


def test_help_shows_no_class_and_no_null():
    parser = make_parser(None)
    parser.add_argument("--references", type=Path, required=True, help="JSON of reports")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--mpp", type=float, default=None, help="um/px; default: the slide's")
    parser.add_argument("--tile_size", type=int, default=256, help="pixels")
    shown = " ".join(parser.format_help().split())
    assert "JSON of reports (required)" in shown and "JSON file --mpp" in shown
    assert "default: the slide's (type: float)" in shown and "pixels (type: int, default: 256)" in shown
    assert parser.get_defaults().mpp is None
