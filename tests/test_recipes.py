"""The files under recipes/: accelerate and SkyPilot read them, and our scripts take every command in them."""

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from transformers.models.gemma3n import modeling_gemma3n

from accelerator_setup import make_accelerator
from language_model import add_lora
from stage2_finetune.what_learns import open_stage1
from tests.conftest import ROOT
from tests.tiny_models import make_model

CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
SKY = ROOT / "recipes" / "cloud" / "sky.yaml"


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_file(name):
    assert load_config_from_file(str(CONFIGS[name])).mixed_precision == "bf16"
    words = ["--config_file", str(CONFIGS[name]), "stage1_projector/train.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    zero = args.zero_stage if args.use_deepspeed else None
    is_several = args.num_machines > 1 and bool(args.main_process_ip and args.main_process_port)
    found = (args.multi_gpu, args.use_fsdp, zero, args.num_processes, is_several)
    assert found == {
        "one_gpu": (False, False, None, 1, False),
        "ddp": (True, False, None, 8, False),
        "several_nodes": (True, False, None, 16, True),
        "fsdp2": (False, True, None, 8, False),
        "zero2": (False, False, 2, 8, False),
        "zero3": (False, False, 3, 8, False),
    }.pop(name)


def test_sharding_wraps_the_decoder_layers_of_gemma3n_and_loads_on_every_process():
    config = yaml.safe_load(CONFIGS["fsdp2"].read_text())["fsdp_config"]
    assert config["fsdp_version"] == 2 and not config["fsdp_cpu_ram_efficient_loading"]
    assert hasattr(modeling_gemma3n, config["fsdp_transformer_layer_cls_to_wrap"])
    assert not yaml.safe_load(CONFIGS["zero3"].read_text())["deepspeed_config"]["zero3_init_flag"]


@pytest.mark.parametrize(
    "variables, message",
    [
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero3.yaml"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "set it to none"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "set it to false",
        ),
    ],
)
def test_sharding_that_is_not_supported_is_refused(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(output_dir=tmp_path, seed=0, max_grad_norm=1.0)


def test_deepspeed_is_refused_where_it_is_not_installed_or_not_for_this_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="ddp.yaml"):
        make_accelerator(output_dir=tmp_path, seed=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        make_accelerator(output_dir=tmp_path, seed=0, max_grad_norm=1.0)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "its own optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
    ],
)
def test_a_configuration_of_deepspeed_may_not_bring_what_we_choose_or_cannot_save(tmp_path, monkeypatch, own, message):
    (tmp_path / "zero.json").write_text(json.dumps(own))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    with pytest.raises(ValueError, match=message):
        make_accelerator(output_dir=tmp_path, seed=0, max_grad_norm=1.0)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"llm_training": "qlora"}, "4-bit weights"),
        ({"encoder_lora_rank": 4}, "a shard of it"),
        ({"train_ve_first_epoch": True}, "use DDP"),
    ],
)
def test_zero3_refuses_what_it_cannot_part(flags, message):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=3)
    )
    args = {"llm_training": "lora", "encoder_lora_rank": 0, "train_ve_first_epoch": False} | flags
    with pytest.raises(ValueError, match=message):
        open_stage1(SimpleNamespace(**args), None, accelerator)


def test_zero3_refuses_models_that_would_not_compute_in_step():
    model, _ = make_model("llama")
    model.refuse_uneven_calls()
    model.llm = add_lora(model.llm, rank=2, alpha=4, dropout=0, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lora_target_modules"):
        model.refuse_uneven_calls()
    with pytest.raises(ValueError, match="portions"):
        make_model(token_reducer="prompt_topk")[0].refuse_uneven_calls()


def run_block(folder: Path, **variables: str) -> list[list[str]]:
    """What the task's `run` would start, as lists of words, with `accelerate` and the machine's folders replaced."""
    task = yaml.safe_load(SKY.read_text())
    (folder / "slidescribe-venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "slidescribe-venv" / "bin" / "activate").touch()
    record = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    script = f'accelerate() {{ {record} "$@"; {variables.pop("after", "true")}; }}\n' + task["run"]
    script = script.replace("/data", str(folder / "data"))
    env = os.environ | task["envs"] | {"HOME": str(folder), "SKYPILOT_NUM_GPUS_PER_NODE": "2"} | variables
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()] + [["status", str(done.returncode)]]


MAKE_RESULT = (
    'while [ "$1" != --output_dir ]; do shift; done; mkdir -p "$2/final_model"; touch "$2/final_model/vlm.json"'
)


def test_our_scripts_take_the_commands_of_the_cloud_task(tmp_path, monkeypatch):
    *launched, status = run_block(tmp_path, WANDB_PROJECT="a project", RUN="first", after=f"{MAKE_RESULT}; false")
    assert status == ["status", "0"]  # status 1 with a result, as when records were left out, does not stop the task
    parsed = []
    for words in launched:
        assert launch_command_parser().parse_args(words[1:]).num_processes == 2
        at = next(index for index, word in enumerate(words) if word.endswith("train.py"))
        module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
        monkeypatch.setattr("sys.argv", words[at:])
        parsed.append(module.parse_arguments())
    one, two = parsed
    assert one.llm_name == "google/gemma-3n-E2B-it" and two.llm_training == "lora"
    assert two.stage1_projector_path == f"{one.output_dir}/final_model" and "first" in one.output_dir
    assert {args.resume_from_checkpoint for args in parsed} == {"latest"}
    assert {args.wandb_project for args in parsed} == {"a project"}
    assert run_block(tmp_path, RUN="first") == [["status", "0"]]  # all is done: nothing starts again


def test_the_cloud_task_stops_where_a_stage_leaves_no_result(tmp_path):
    *launched, status = run_block(tmp_path, after="false")
    assert len(launched) == 1 and status == ["status", "1"]
    assert "--wandb_project" not in launched[0]


def test_no_token_stands_in_the_cloud_task():
    assert set(yaml.safe_load(SKY.read_text())["secrets"].values()) == {""}


def test_skypilot_reads_the_cloud_task(tmp_path):
    """With the extra `cloud`, or another interpreter that has SkyPilot in SKY_PYTHON."""
    python = os.environ.get("SKY_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else None)
    if python is None:
        pytest.skip("SkyPilot is not installed: pip install -e '.[cloud]', or name an interpreter in SKY_PYTHON")
    code = f"import sky; t = sky.Task.from_yaml({str(SKY)!r}); print(*t.storage_mounts, *sorted(t.secrets))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HOME": str(tmp_path)}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["/data", "HF_TOKEN", "WANDB_API_KEY"]


def test_the_tables_of_the_plan_are_those_that_its_script_prints(capsys, monkeypatch):
    from benchmarks import scaling_plan

    monkeypatch.setattr("sys.argv", ["scaling_plan.py"])
    scaling_plan.main()
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text()


def test_the_plan_by_hand():
    from benchmarks.scaling_plan import CHIPS, FIGURES, plan

    figures = {name: figure.value for name, figure in FIGURES.items()}
    figures |= {"encoder_gflop_per_tile": 1000, "tiles_per_slide": 1000, "slide_gb": 0.001, "training_utilisation": 0.5}
    figures |= {"encoder_utilisation": 0.5, "head_parameters": 0, "tokens_per_record": 100, "epochs": 1}
    found = plan(figures, CHIPS["H100 SXM"], 10_000, 1)
    assert found["limit"] == "GPU"
    assert found["stage0"] == pytest.approx(10_000 * 1000 * 1e12 / (989e12 * 0.5) / 3600)
    assert found["stage1"] == pytest.approx(10_000 * 100 * 4 * 1.89e9 / (989e12 * 0.5) / 3600)
    assert found["stage2"] == pytest.approx(found["stage1"] * 1.5)
    assert found["dollars"] == pytest.approx(3.99 * (found["stage0"] + found["stage1"] + found["stage2"]))
