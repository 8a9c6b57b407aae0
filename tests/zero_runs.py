"""Training runs under DeepSpeed's ZeRO-2 and under DDP, each on two processes, and checkpoints that go on in either.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.zero_runs OUTPUT_DIR

Leaves a run folder for each case under OUTPUT_DIR, and what it printed beside it. `accelerate` takes DeepSpeed to GPUs
only, so here its state is told that processes on CPUs have it as well; all else is what runs on GPUs.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import deepspeed
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env

import stage1_projector.train
import stage2_finetune.train
from run_checkpoints import checkpoints
from tests.conftest import ROOT
from tests.forked_runs import finish_run
from tests.kill_and_resume import make_corpus_in_fork
from tests.layout_runs import draw_no_curves


def main() -> None:
    root = Path(sys.argv[1])
    corpus = make_corpus_in_fork(root / "corpus")
    zero = zero_variables()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled; gloo does without
    few = root / "few.json"
    few.write_text(json.dumps(json.loads(corpus.reports.read_text())[:10]))
    common = ["--train_json", few, "--features_dir", corpus.features, "--num_workers", 0, "--batch_size", 1]
    common += ["--gradient_accumulation_steps", 2, "--val_fraction", 0.2, "--image_ablation_records", 0]
    stage1 = [*common, "--llm_name", corpus.llm, "--num_visual_tokens", 8, "--learning_rate", 0.01]
    stage1 += ["--max_grad_norm", 0.05, "--weight_decay", 0.1, "--projector_ema", 0.9]
    stage2 = [*common, "--stage1_projector_path", root / "stage1_ddp" / "final_model"]
    stage2 += ["--unfreeze_projection_layer", "--projector_learning_rate", 1e-4]
    lora = [*stage2, "--llm_training", "lora", "--lora_dropout", 0, "--mixed_precision", "bf16", "--packing"]
    lora += ["--best_metric", "rouge_l", "--metric_records", 2, "--max_answer_tokens", 48, "--ple_device", "cpu"]
    full = [*stage2, "--llm_training", "full", "--gradient_checkpointing", "--learning_rate", 1e-3]

    def train(main, flags: list, name: str, layout: str, *more: object, epochs: int = 1) -> None:
        variables, before = (zero, zero_on_cpu) if layout == "zero2" else ({}, draw_no_curves)
        output = root / f"{name}_{layout}"
        finish_run(
            main,
            [*flags, "--num_epochs", epochs, *more, "--output_dir", output],
            root / f"{output.name}.txt",
            processes=2,
            env=variables,
            before=before,
        )

    for layout in ("ddp", "zero2"):
        train(stage1_projector.train.main, stage1, "stage1", layout)
    for layout in ("ddp", "zero2"):
        train(stage2_finetune.train.main, lora, "lora", layout)
        train(stage2_finetune.train.main, full, "full", layout, epochs=2)
    for written_in, resumed_in in (("zero2", "ddp"), ("zero2", "zero2")):
        output = root / f"{written_in}_then_{resumed_in}"
        middle = checkpoints(root / f"full_{written_in}")[0]
        shutil.copytree(middle, output / "checkpoints" / middle.name)
        resume = ["--resume_from_checkpoint", "latest"]
        train(stage2_finetune.train.main, full, f"{written_in}_then", resumed_in, *resume, epochs=2)


def zero_variables() -> dict[str, str]:
    """The environment that `accelerate launch` makes of recipes/accelerate/zero2.yaml, but in float32 here."""
    config = str(ROOT / "recipes" / "accelerate" / "zero2.yaml")
    words = ["--config_file", config, "--num_processes", "2", "--mixed_precision", "no", "train.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    args.main_process_port = 0
    args.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(args)[1]
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


def zero_on_cpu() -> None:
    """Let accelerate's state accept DeepSpeed among processes on CPUs, as it does on GPUs."""
    draw_no_curves()
    original = AcceleratorState.__init__

    def with_deepspeed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.DEEPSPEED
            plugin = self.deepspeed_plugins = kwargs["deepspeed_plugin"]
            plugin.set_mixed_precision(kwargs["mixed_precision"])
            plugin.select(_from_accelerator_state=True)

    AcceleratorState.__init__ = with_deepspeed


if __name__ == "__main__":
    main()
