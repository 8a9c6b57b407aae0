"""Training runs under DeepSpeed's ZeRO-2, ZeRO-3 and DDP, each on two processes, and checkpoints that go on in others.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.zero_runs OUTPUT_DIR

Leaves a run folder for each case under OUTPUT_DIR, and what it printed beside it. `accelerate` takes DeepSpeed to GPUs
only, so here its state is told that processes on CPUs have it as well; all else is what runs on GPUs.
"""

import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import deepspeed
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from deepspeed.runtime.zero.utils import apply_to_tensors_only

import stage1_projector.train
import stage2_finetune.train
import token_nll
from run_checkpoints import checkpoints
from sharded_weights import prepare
from tests.conftest import ROOT
from tests.forked_runs import finish_run
from tests.kill_and_resume import make_corpus_in_fork
from tests.layout_runs import draw_no_curves
from tests.tiny_models import make_llm, make_tokenizer

# As for a large model: no weight is so small that every process keeps it whole, and a parameter group is several.
IN_PARTS = {"stage3_param_persistence_threshold": 0, "sub_group_size": 2000}
# DeepSpeed's own linear function rounds once more before it adds a bias, which in bfloat16 shows.
LIKE_TORCH = {"memory_efficient_linear": False}
# Layouts in which a checkpoint is written, and goes on.
RESUMED = [("zero2", "ddp"), ("zero2", "zero2"), ("zero3", "ddp"), ("zero3", "zero3"), ("ddp", "zero3")]
RESUMED += [("zero2", "zero3")]


def main() -> None:
    root = Path(sys.argv[1])
    corpus = make_corpus_in_fork(root / "corpus")
    stage2_finetune.train.METRICS["rouge_l"] = digest_of_texts
    token_nll.ROWS_PER_CHUNK = 8  # so that processes have different numbers of chunks
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
    full += ["--best_metric", "rouge_l", "--metric_records", 3, "--max_answer_tokens", 48]
    full += ["--image_ablation_records", 4, "--projector_ema", 0.9]
    settings = {"zero2": {}, "zero3": IN_PARTS, "zero3_like_torch": IN_PARTS | LIKE_TORCH}

    def train(main, flags: list, name: str, layout: str, *more: object, epochs: int = 1) -> None:
        variables, before = {}, pass_through_functions if layout == "ddp_passing" else draw_no_curves
        if layout in settings:
            variables, before = zero_variables(layout[:5]), partial(zero_on_cpu, settings[layout])
        output = root / f"{name}_{layout}"
        finish_run(
            main,
            [*flags, "--num_epochs", epochs, *more, "--output_dir", output],
            root / f"{output.name}.txt",
            processes=2,
            env=variables,
            before=before,
        )

    one, two = stage1_projector.train.main, stage2_finetune.train.main
    for layout in ("ddp", "zero2", "zero3"):
        train(one, stage1, "stage1", layout)
    for layout in ("ddp", "zero2", "zero3", "ddp_passing", "zero3_like_torch"):
        train(two, lora, "lora", layout)
    for layout in ("ddp", "zero2", "zero3"):
        train(two, full, "full", layout, epochs=2)
    for written_in, resumed_in in RESUMED:
        output = root / f"{written_in}_then_{resumed_in}"
        middle = checkpoints(root / f"full_{written_in}")[0]
        shutil.copytree(middle, output / "checkpoints" / middle.name)
        resume = ["--resume_from_checkpoint", "latest"]
        train(two, full, f"{written_in}_then", resumed_in, *resume, epochs=2)
    # A head that learns, as it does where it is not tied to the embeddings.
    finish_run(partial(make_llama, root / "llama"), [], root / "llama.txt")
    train(one, [*common, "--llm_name", root / "llama", "--num_visual_tokens", 8], "llama", "ddp")
    untied = [*full, "--stage1_projector_path", root / "llama_ddp" / "final_model"]
    for layout in ("ddp", "zero3"):
        train(two, untied, "untied", layout)


def make_llama(folder: Path) -> int:
    """A small language model whose head is not tied to its embeddings."""
    make_llm("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return 0


def digest_of_texts(written: Sequence[str], references: Sequence[str]) -> float:
    """In the place of a metric, a number that is another one for any other text."""
    return zlib.crc32(json.dumps([written, references]).encode()) / 2**32


def zero_variables(recipe: str) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a recipe for DeepSpeed, but in float32 here."""
    config = str(ROOT / "recipes" / "accelerate" / f"{recipe}.yaml")
    words = ["--config_file", config, "--num_processes", "2", "--mixed_precision", "no", "train.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    args.main_process_port = 0
    args.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(args)[1]
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


def zero_on_cpu(settings: dict) -> None:
    """Let accelerate's state accept DeepSpeed among processes on CPUs, as it does on GPUs, with more ZeRO settings."""
    draw_no_curves()
    original = AcceleratorState.__init__

    def with_deepspeed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.DEEPSPEED
            plugin = self.deepspeed_plugins = kwargs["deepspeed_plugin"]
            plugin.deepspeed_config["zero_optimization"] |= settings
            plugin.set_mixed_precision(kwargs["mixed_precision"])
            plugin.select(_from_accelerator_state=True)

    AcceleratorState.__init__ = with_deepspeed


class Passing(torch.autograd.Function):
    """The identity, as ZeRO-3 puts it before and after every module to learn when its gradients come."""

    @staticmethod
    def forward(value):
        return value.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def pass_through_functions() -> None:
    """Let DDP have the same functions in its graph.

    Autograd then adds up the gradients of an activation in the same order, which in bfloat16 decides its last bits.
    """
    draw_no_curves()

    def prepare_with_functions(accelerator, model, *others):
        prepared = prepare(accelerator, model, *others)
        for module in model.modules():
            module.register_forward_hook(lambda module, inputs, output: apply_to_tensors_only(Passing.apply, output))
            module.register_forward_pre_hook(lambda module, inputs: apply_to_tensors_only(Passing.apply, inputs))
        return prepared

    stage2_finetune.train.prepare = prepare_with_functions


if __name__ == "__main__":
    main()
