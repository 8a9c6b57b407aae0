"""The same training run in every layout of processes, and each layout's checkpoint opened in the others.

    OMP_NUM_THREADS=1 python -m tests.layout_runs OUTPUT_DIR

Leaves a run folder for each case under OUTPUT_DIR, and what it printed beside it. `accelerate` shards on GPUs only, so
here its state is told that processes on CPUs shard as well; all else is what runs on GPUs.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

import run_log
import stage1_projector.train
import stage2_finetune.train
from run_checkpoints import checkpoints
from tests.conftest import ROOT, Corpus
from tests.forked_runs import finish_run
from tests.kill_and_resume import make_corpus_in_fork

LAYOUTS = {"single": 1, "ddp": 2, "fsdp2": 2}
GLOBAL_BATCH = 4


def main() -> None:
    root = Path(sys.argv[1])
    corpus = make_corpus_in_fork(root / "corpus")
    sharding = sharding_variables()
    common = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--num_workers", 0]
    stage1 = [*common, "--llm_name", corpus.llm, "--num_visual_tokens", 8, "--learning_rate", 0.01]
    stage2 = [*common, "--stage1_projector_path", root / "stage1_single" / "final_model"]
    lora = [*stage2, "--llm_training", "lora", "--lora_dropout", 0, "--unfreeze_projection_layer"]
    full = [*stage2, "--llm_training", "full", "--gradient_checkpointing", "--learning_rate", 1e-3]

    def train(main, flags: list, name: str, layout: str, epochs: int = 2, *more: object) -> None:
        processes = LAYOUTS[layout]
        words = [*flags, "--batch_size", GLOBAL_BATCH // processes, "--num_epochs", epochs, *more]
        variables, before = (sharding, shard_on_cpu) if layout == "fsdp2" else ({}, draw_no_curves)
        output = root / f"{name}_{layout}"
        finish_run(
            main,
            [*words, "--output_dir", output],
            root / f"{output.name}.txt",
            processes=processes,
            env=variables,
            before=before,
        )

    train(stage1_projector.train.main, stage1, "stage1", "single", 1)
    for layout in LAYOUTS:
        train(stage2_finetune.train.main, lora, "lora", layout)
        train(stage2_finetune.train.main, full, "full", layout, 1)
    packed = [*lora, "--train_json", asked_thrice(corpus, root), "--packing", "--label_smoothing", 0.1]
    packed += ["--projector_ema", 0.9, "--val_fraction", 0.2]
    train(stage2_finetune.train.main, packed, "packed", "single", 1)
    halved = ["--batch_size", GLOBAL_BATCH // 4, "--gradient_accumulation_steps", 2]
    train(stage2_finetune.train.main, packed, "packed", "ddp", 1, *halved)
    train(stage2_finetune.train.main, packed, "packed", "fsdp2", 1, *halved, "--ple_device", "cpu")
    for layout in LAYOUTS:
        train(stage2_finetune.train.main, [*lora, "--llm_training", "qlora"], "qlora", layout, 1)
    # What each layout reached after one epoch goes on in the others.
    for written_in, resumed_in in (("ddp", "fsdp2"), ("fsdp2", "single"), ("single", "ddp"), ("fsdp2", "fsdp2")):
        name = f"{written_in}_then"
        output = root / f"{name}_{resumed_in}"
        middle = checkpoints(root / f"lora_{written_in}")[0]
        shutil.copytree(middle, output / "checkpoints" / middle.name)
        resume = ["--resume_from_checkpoint", "latest"]
        train(stage2_finetune.train.main, lora, name, resumed_in, 2, *resume)


def asked_thrice(corpus: Corpus, root: Path) -> Path:
    """The reports of the corpus, each slide asked for three times, as a file."""
    rows = json.loads(corpus.reports.read_text())
    asked = [row | {"question": question} for row in rows for question in ("Report?", "Which organ is it?", "Grade?")]
    (root / "asked.json").write_text(json.dumps(asked))
    return root / "asked.json"


def sharding_variables() -> dict[str, str]:
    """The environment that `accelerate launch` makes of recipes/accelerate/fsdp2.yaml, but in float32 here."""
    config = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    words = ["--config_file", config, "--num_processes", "2", "--mixed_precision", "no", "train.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    args.main_process_port = 0
    made = prepare_multi_gpu_env(args)
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


def draw_no_curves() -> None:
    """Pictures take most of the time of so short a run, and are not what is compared."""
    run_log.draw_curves = lambda *_: None


def shard_on_cpu() -> None:
    """Let accelerate's state accept sharding among processes on CPUs."""
    draw_no_curves()
    original = AcceleratorState.__init__

    def with_sharding(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    AcceleratorState.__init__ = with_sharding


if __name__ == "__main__":
    main()
