"""What of a model learns in stage 2: the flags, the combinations that are refused, and the model opened for them."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PreTrainedTokenizerBase

from accelerator_setup import forget_frozen, git_revision
from command_line import flags_of
from deepspeed_zero import is_zero, is_zero3, precision
from four_bit import FourBit
from slide_reports import check_input_kind
from slide_vlm import SlideVLM, VLMSettings, load_vlm


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
    group.add_argument("--lora_alpha", type=float, default=32, help="LoRA scale, times 1 / rank; also of the encoder's")
    group.add_argument("--lora_dropout", type=float, default=0.05, help="dropout before the LoRA adapters")
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
        raise ValueError("--encoder_lora_rank does not work with sharded weights; use DDP, or --train_ve")
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
    model.settings.question = args.question or settings.question
    model.settings.max_question_tokens = args.max_question_tokens or settings.max_question_tokens
    model.settings.max_answer_tokens = args.max_answer_tokens or settings.max_answer_tokens
    model.settings.training = flags_of(args)
    model.settings.git_revision = git_revision()
    return model, tokenizer


def encoder_learns(args) -> bool:
    return bool(args.train_ve or args.train_ve_first_epoch or args.encoder_lora_rank)


def freeze_encoder(model: SlideVLM, optimizer: torch.optim.Optimizer) -> None:
    """End the learning of the image encoder after epoch one."""
    model.encoder.requires_grad_(False)
    forget_frozen(optimizer)


def refuse_contradictions(args, settings: VLMSettings) -> None:
    """Raise ValueError for flags that cannot go together, or not with this result of stage 1."""
    ways = {"--train_ve_first_epoch": args.train_ve_first_epoch, "--train_ve": args.train_ve}
    ways = [flag for flag, given in (ways | {"--encoder_lora_rank": args.encoder_lora_rank}).items() if given]
    if ways and settings.input_kind == "features":
        raise ValueError(
            f"{ways[0]} needs images: feature files hold what the encoder gave in stage 0, so it cannot learn; drop "
            "the flag"
        )
    if len(ways) > 1:
        raise ValueError(f"{' and '.join(ways)} are two ways for the image encoder to learn; choose one")
    adapts = args.llm_training in ("lora", "qlora")
    needs = {
        "--unfreeze_last_layers": (args.unfreeze_last_layers, args.llm_training == "full", "--llm_training full"),
        "--lora_target_modules": (args.lora_target_modules, adapts, "--llm_training lora or qlora"),
        "--projector_learning_rate": (
            *(args.projector_learning_rate, args.unfreeze_projection_layer),
            "--unfreeze_projection_layer",
        ),
        "--projector_ema": (args.projector_ema, args.unfreeze_projection_layer, "--unfreeze_projection_layer"),
        "--encoder_learning_rate": (args.encoder_learning_rate, ways, "--train_ve or --encoder_lora_rank"),
    }
    for flag, (given, has_need, need) in needs.items():
        if given and not has_need:
            raise ValueError(f"{flag} needs {need}")
    if args.llm_training == "frozen" and not args.unfreeze_projection_layer and not ways:
        raise ValueError(
            "nothing would learn; choose --llm_training lora, qlora or full, or --unfreeze_projection_layer"
        )
    check_input_kind(args.stage1_projector_path, settings, args.image_root)
    if (Path(args.stage1_projector_path) / "adapter").is_dir():
        raise ValueError(
            f"{args.stage1_projector_path} holds a LoRA adapter; merge it with stage2_finetune/merge_lora.py"
        )
