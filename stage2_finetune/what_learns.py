"""What of a model learns in stage 2: the flags, the combinations that are refused, and the model opened for them."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PreTrainedTokenizerBase

import accelerator_setup
from accelerator_setup import BelowOne, forget_frozen, freeze_unused, git_revision
from command_line import flags_of, refuse_idle
from deepspeed_zero import is_zero, is_zero3, precision
from encoder_lora import add_encoder_lora
from four_bit import FourBit
from language_model import add_lora, unfreeze_llm
from run_checkpoints import file_digest
from slide_reports import check_input_kind
from slide_vlm import SlideVLM
from validation import refuse_idle_validation
from vlm_loading import load_vlm
from vlm_settings import VLMSettings


def add_learning_arguments(parser) -> None:
    group = parser.add_argument_group("What learns")
    group.add_argument(
        "--llm_training",
        choices=["full", "lora", "qlora", "frozen"],
        default="lora",
        help="what of the LLM learns; qlora is lora over 4-bit weights",
    )
    group.add_argument(
        "--unfreeze_last_layers", type=PositiveInt, default=None, help="with full: only so many last layers of the LLM"
    )
    group.add_argument("--lora_rank", type=PositiveInt, default=16, help="rank of the LoRA adapters of the LLM")
    group.add_argument(
        "--lora_alpha", type=PositiveFloat, default=32, help="LoRA scale, times 1 / rank; also of the encoder's"
    )
    group.add_argument("--lora_dropout", type=BelowOne, default=0.05, help="dropout before the LoRA adapters")
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        default=None,
        help="names of LLM layers to adapt; default: all of attention and feed-forward",
    )
    group.add_argument("--unfreeze_projection_layer", action="store_true", help="the projector and reducer learn on")
    group.add_argument(
        "--projector_learning_rate", type=PositiveFloat, default=None, help="its peak; default: --learning_rate"
    )
    group.add_argument(
        "--train_ve_first_epoch", action="store_true", help="the image encoder learns in epoch one (image inputs only)"
    )
    group.add_argument("--train_ve", action="store_true", help="the image encoder learns throughout")
    group.add_argument(
        "--encoder_lora_rank",
        type=NonNegativeInt,
        default=0,
        help="rank of LoRA adapters of the image encoder; 0: none",
    )
    group.add_argument(
        "--encoder_learning_rate", type=PositiveFloat, default=None, help="its peak; default: --learning_rate"
    )


def open_stage1(args, settings: VLMSettings, accelerator: Accelerator) -> tuple[SlideVLM, PreTrainedTokenizerBase]:
    """The model of stage 1 with the settings of this run, and its tokenizer.

    Weights that do not learn are loaded in the precision of the run, those that learn in float32: small steps get lost
    in bfloat16.
    """
    if args.train_ve_first_epoch and is_zero(accelerator):
        raise ValueError("--train_ve_first_epoch: DeepSpeed's parts of the weights that learn are fixed; use DDP")
    if args.encoder_lora_rank and (accelerator.distributed_type == DistributedType.FSDP or is_zero3(accelerator)):
        raise ValueError(
            f"--encoder_lora_rank {args.encoder_lora_rank}: adapters are merged into the encoder when it is saved, and "
            "a shard of it cannot be; use DDP (recipes/accelerate/ddp.yaml), or --train_ve"
        )
    if args.llm_training == "qlora" and is_zero3(accelerator):
        raise ValueError("--llm_training qlora: ZeRO-3 cannot cut 4-bit weights into parts; use DDP or ZeRO-2")
    is_bf16 = precision(accelerator) == "bf16" and args.llm_training != "full"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    is_four_bit = args.llm_training == "qlora"
    model, tokenizer = load_vlm(
        args.stage1_projector_path,
        device=accelerator.device if is_four_bit else "cpu",
        dtype=dtype,
        llm_name=args.llm_name,
        encoder_name=args.vision_model_name,
        ple_device=args.ple_device,
        four_bit=FourBit(weights_dtype=str(dtype).removeprefix("torch.")) if is_four_bit else None,
    )
    model.label_smoothing = args.label_smoothing
    model.settings.question = args.question or settings.question
    model.settings.max_question_tokens = args.max_question_tokens or settings.max_question_tokens
    model.settings.max_answer_tokens = args.max_answer_tokens or settings.max_answer_tokens
    model.settings.training = flags_of(args)
    model.settings.git_revision = git_revision()
    return model, tokenizer


def stage1_digest(stage1_projector_path: str | Path) -> dict[str, str]:
    """What a run began from, by content: the projector of stage 1."""
    return {"stage1_projector": file_digest(Path(stage1_projector_path) / "projector" / "model.safetensors")}


LLM_LEARNING_FLAGS = ("llm_training", "unfreeze_last_layers", "lora_rank", "lora_alpha", "lora_dropout")
LLM_LEARNING_FLAGS += ("lora_target_modules",)


def let_llm_learn(
    model: SlideVLM,
    *,
    llm_training: str,
    unfreeze_last_layers: int | None,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
    lora_target_modules: list[str] | None,
) -> None:
    """Let the frozen language model learn in full, its last layers alone, or through new adapters; or leave it frozen.

    Raises:
        ValueError: it has fewer layers, or none of the layers that adapters are to go to.
    """
    if llm_training == "full":
        unfreeze_llm(model.llm, unfreeze_last_layers)
    if llm_training in ("lora", "qlora"):
        lora = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
        model.llm = add_lora(model.llm, **lora, target_modules=lora_target_modules)


ENCODER_LEARNING_FLAGS = ("train_ve", "train_ve_first_epoch", "encoder_lora_rank", "lora_alpha", "lora_dropout")


def let_encoder_learn(
    model: SlideVLM,
    *,
    train_ve: bool,
    train_ve_first_epoch: bool,
    encoder_lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
) -> None:
    """Let the frozen image encoder learn in full or through new adapters; or leave it frozen.

    What patch tokens do not depend on, such as a pooler, stays frozen.
    """
    if train_ve or train_ve_first_epoch:
        model.unfreeze_encoder()
    if encoder_lora_rank:
        add_encoder_lora(model.encoder, rank=encoder_lora_rank, alpha=lora_alpha, dropout=lora_dropout)
    if train_ve or train_ve_first_epoch or encoder_lora_rank:
        side = model.encoder.image_size
        freeze_unused(model.encoder, model.encoder.eval().encode_patches(torch.zeros(1, 3, side, side)))


def encoder_learns(args) -> bool:
    return bool(args.train_ve or args.train_ve_first_epoch or args.encoder_lora_rank)


def freeze_encoder(model: SlideVLM, optimizer: torch.optim.Optimizer) -> None:
    """End the learning of the image encoder after epoch one."""
    model.encoder.requires_grad_(False)
    forget_frozen(optimizer)


def refuse_another_split(args, settings: VLMSettings) -> None:
    """Refuse another fold than that of stage 1, whose projector has learned from the patients now held out.

    Of the same records divided otherwise it warns only: they may say themselves who is in which split.

    Raises:
        ValueError: names both folds.
    """
    had = settings.training
    if None not in (had.get("fold"), args.fold) and had["fold"] != args.fold:
        raise ValueError(
            f"--fold {args.fold}: {args.stage1_projector_path} was trained with --fold {had['fold']}, on patients that "
            f"are held out now; train stage 1 with --fold {args.fold} as well"
        )
    if had.get("train_json") != args.train_json or os.environ.get("RANK", "0") != "0":
        return
    for flag in ("fold", "splits", "val_json", "val_fraction", "seed", "group_pattern"):
        before, now = (
            f"without --{flag}" if value is None else f"with --{flag} {value}"
            for value in (had.get(flag), getattr(args, flag))
        )
        if before != now:
            print(
                f"warning: stage 1 divided these records {before}, this stage divides them {now}; "
                "where that changes the split, its projector has learned from validation records",
                file=sys.stderr,
            )


def needs_of_flags(args) -> dict[str, tuple[Any, str]]:
    """For each flag that does nothing without another: whether that is there, and what it is."""
    adapts = args.llm_training in ("lora", "qlora")
    lora, projector = "--llm_training lora or qlora", "--unfreeze_projection_layer"
    return {
        "unfreeze_last_layers": (args.llm_training == "full", "--llm_training full"),
        "lora_rank": (adapts, lora),
        "lora_target_modules": (adapts, lora),
        "lora_alpha": (adapts or args.encoder_lora_rank, f"{lora}, or --encoder_lora_rank"),
        "lora_dropout": (adapts or args.encoder_lora_rank, f"{lora}, or --encoder_lora_rank"),
        "projector_learning_rate": (args.unfreeze_projection_layer, projector),
        "projector_ema": (args.unfreeze_projection_layer, projector),
        "vision_model_name": (args.image_root, "--image_root"),
        "encoder_learning_rate": (encoder_learns(args), "--train_ve or --encoder_lora_rank"),
    }


def refuse_contradictions(args, settings: VLMSettings, defaults: dict[str, Any]) -> None:
    """Raise ValueError for flags that cannot go together or would do nothing, or not with this result of stage 1."""
    accelerator_setup.refuse_contradictions(args, defaults)
    refuse_idle_validation(args, defaults)
    ways = {"--train_ve_first_epoch": args.train_ve_first_epoch, "--train_ve": args.train_ve}
    ways = [flag for flag, given in (ways | {"--encoder_lora_rank": args.encoder_lora_rank}).items() if given]
    if ways and settings.input_kind == "features":
        raise ValueError(
            f"{ways[0]} needs images: feature files hold what the encoder gave in stage 0, so it cannot learn; drop "
            "the flag"
        )
    if len(ways) > 1:
        raise ValueError(f"{' and '.join(ways)} are two ways for the image encoder to learn; choose one")
    refuse_idle(args, defaults, needs_of_flags(args))
    if args.llm_training == "frozen" and not args.unfreeze_projection_layer and not ways:
        raise ValueError(
            "nothing would learn; choose --llm_training lora, qlora or full, or --unfreeze_projection_layer"
        )
    refuse_another_split(args, settings)
    check_input_kind(args.stage1_projector_path, settings, args.image_root)
    if (Path(args.stage1_projector_path) / "adapter").is_dir():
        raise ValueError(
            f"{args.stage1_projector_path} holds a LoRA adapter; merge it with stage2_finetune/merge_lora.py"
        )
