"""The flags of the two encoders, and the model that they describe."""

from pathlib import Path

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from accelerator_setup import git_revision
from command_line import flags_of
from encoders import load_encoder
from language_model import absolute_if_folder
from longnet import LongNet
from slide_encoders import GatedAttention, load_slide_encoder, slide_fingerprint
from slide_reports.inputs import making_of_file
from stage0_encoder.adapters import WAYS, choose_what_learns
from stage0_encoder.alignment_model import (
    AlignmentModel,
    AlignmentSettings,
    joint_width,
    learns,
    take_joint_space,
    text_fingerprint,
)
from stage0_encoder.contrastive_loss import KINDS
from stage0_encoder.encoder_run import freeze_unused_of_encoder
from stage0_encoder.text_encoder import POOLINGS, load_text_encoder

NEW_SLIDE_ENCODERS = ("abmil", "longnet")
DEFAULT_WIDTH = 512


def add_model_arguments(parser) -> None:
    """Flags of the encoders, of what learns of them, and of the loss."""
    group = parser.add_argument_group("Encoders")
    group.add_argument(
        "--encoder",
        "--vision_model_name",
        default=None,
        help="image encoder for --image_root: a preset, timm or transformers name, or a folder",
    )
    group.add_argument(
        "--slide_encoder",
        default=None,
        help="slide encoder for --features_dir: abmil or longnet with random weights, mean, max, gigapath, a folder or "
        "a checkpoint",
    )
    group.add_argument("--slide_width", type=PositiveInt, default=512, help="width of a new abmil or longnet")
    group.add_argument("--slide_depth", type=PositiveInt, default=12, help="layers of a new longnet")
    group.add_argument("--slide_heads", type=PositiveInt, default=16, help="attention heads of a new longnet")
    group.add_argument(
        "--num_patches",
        type=PositiveInt,
        default=4096,
        help="patch tokens read of a slide at most: other ones each epoch in training, evenly spaced in validation",
    )
    group.add_argument("--text_model", required=True, help="transformers text model: hub name or folder")
    group.add_argument(
        "--text_pooling",
        choices=list(POOLINGS),
        default="auto",
        help="one vector of a text: the model's own pooler, first token (cls), mean, or last token (eos); auto: its "
        "own pooler where the checkpoint has one, else eos of causal models and mean of others",
    )
    group.add_argument("--max_text_tokens", type=PositiveInt, default=256, help="longer texts lose their end")
    group.add_argument(
        "--embedding_width",
        type=NonNegativeInt,
        default=None,
        help=f"of the common space; 0: no projections; default: {DEFAULT_WIDTH}, or that of the CLIP or SigLIP that is "
        "both --encoder and --text_model, whose own projections and temperature are taken",
    )
    ways = "full, lora, qlora (lora over 4-bit weights) or frozen"
    group.add_argument("--image_training", choices=list(WAYS), default="full", help=f"of image encoder: {ways}")
    group.add_argument("--text_training", choices=list(WAYS), default="full", help=f"of text encoder: {ways}")
    group.add_argument("--lora_rank", type=PositiveInt, default=16, help="of lora and qlora")
    group.add_argument("--lora_alpha", type=PositiveFloat, default=32, help="scale of the adapters is alpha / rank")
    group.add_argument("--lora_dropout", type=ClosedUnitInterval, default=0.05, help="in front of the adapters")
    group = parser.add_argument_group("Loss")
    group.add_argument(
        "--loss",
        choices=list(KINDS),
        default="unicl",
        help="clip and siglip: one text for an image; unicl (mean of logs), mil_nce (log of the sum) and multi_siglip: "
        "all images of a case and all cases with the same text belong together",
    )
    group.add_argument("--max_logit_scale", type=PositiveFloat, default=100, help="bound of the inverse temperature")


def needs_of_flags(args) -> dict[str, tuple[bool, str]]:
    """For each flag that does nothing without another: whether that is there, and what it is."""
    adapts = {"lora", "qlora"} & {args.image_training, args.text_training}
    abmil, longnet = NEW_SLIDE_ENCODERS
    deep = (args.slide_encoder == longnet, f"--slide_encoder {longnet}")
    return {
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), (bool(adapts), "lora or qlora of an encoder")),
        **dict.fromkeys(("slide_depth", "slide_heads"), deep),
        "slide_width": (args.slide_encoder in NEW_SLIDE_ENCODERS, f"--slide_encoder {abmil} or {longnet}"),
        "num_patches": (bool(args.features_dir), "--features_dir"),
        "text_learning_rate": (args.text_training != "frozen", "--text_training other than frozen"),
        "projection_learning_rate": (args.embedding_width != 0, "--embedding_width other than 0"),
    }


def build_model(args, device: torch.device, first_input: Path) -> AlignmentModel:
    """The model of the flags, with what learns of it freed and adapters put on.

    Raises:
        ValueError: the flags contradict each other or the inputs; names the flag that would do.
    """
    if bool(args.image_root) == bool(args.features_dir):
        raise ValueError("give --image_root with --encoder, or --features_dir with --slide_encoder, and not both")
    text = load_text_encoder(args.text_model, args.text_pooling)
    made = {}
    if args.image_root:
        if not args.encoder or args.slide_encoder:
            raise ValueError("--image_root needs an image encoder and no slide encoder; name it with --encoder")
        image = load_encoder(args.encoder)
        width, fingerprint = image.width, image.fingerprint()
    else:
        if not args.slide_encoder or args.encoder:
            raise ValueError("--features_dir needs a slide encoder and no image encoder; name it with --slide_encoder")
        made = making_of_file(Path(first_input))
        image = open_slide_encoder(args, made["patch_width"])
        width, fingerprint = image.width or made["patch_width"], slide_fingerprint(image)
    joint = joint_width(args.encoder) if args.encoder and args.encoder == args.text_model else None
    settings = AlignmentSettings(
        input_kind="images" if args.image_root else "features",
        loss=args.loss,
        embedding_width=first_given(args.embedding_width, joint, DEFAULT_WIDTH),
        text_model=absolute_if_folder(args.text_model),
        text_fingerprint=text_fingerprint(text),
        image_fingerprint=fingerprint,
        text_pooling=text.pooling,
        max_text_tokens=args.max_text_tokens,
        num_patches=args.num_patches,
        features_made=made,
        training=flags_of(args),
        git_revision=git_revision(),
    )
    model = AlignmentModel(image, text, settings, width)
    if joint is not None and settings.embedding_width == joint:
        take_joint_space(model, args.encoder)
    free_what_learns(args, model, device)
    return model


def free_what_learns(args, model: AlignmentModel, device: torch.device) -> None:
    """Freeze and free the weights as the flags say; projections and temperature always learn.

    Raises:
        ValueError: adapters for a slide encoder, or nothing learns.
    """
    lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout, "device": device}
    if args.image_root:
        choose_what_learns(model.image.backbone, args.image_training, flag="--image_training", **lora)
    elif args.image_training in ("lora", "qlora"):
        raise ValueError(f"--image_training {args.image_training} is for image encoders; a slide encoder takes full")
    else:
        model.image.requires_grad_(args.image_training == "full")
    choose_what_learns(model.text.backbone, args.text_training, flag="--text_training", **lora)
    model.bias.requires_grad_("siglip" in args.loss)
    freeze_unused_of_encoder(model.image)
    freeze_unused_of_encoder(model.text)
    if not any(map(learns, (model.image, model.text, model.image_projection, model.text_projection))):
        raise ValueError("nothing would learn; free an encoder with --image_training or --text_training")


def open_slide_encoder(args, patch_width: int) -> nn.Module:
    """The slide encoder of the flags, new or opened.

    Raises:
        ValueError: it wants features of another width.
    """
    abmil, longnet = NEW_SLIDE_ENCODERS
    if args.slide_encoder == abmil:
        return GatedAttention(patch_width, args.slide_width)
    if args.slide_encoder == longnet:
        return LongNet(patch_width, args.slide_width, depth=args.slide_depth, num_heads=args.slide_heads)
    try:
        encoder = load_slide_encoder(args.slide_encoder)
    except ValueError as error:
        raise ValueError(f"--slide_encoder: {error}; {' and '.join(NEW_SLIDE_ENCODERS)} are made anew") from error
    if encoder.input_width not in (None, patch_width):
        raise ValueError(
            f"--slide_encoder {args.slide_encoder} takes features of width {encoder.input_width}, and those of "
            f"--features_dir are {patch_width} wide; encode the tiles with the encoder that it was trained on"
        )
    return encoder


def first_given(*values: int | None) -> int:
    """The first that is not None."""
    return next(value for value in values if value is not None)
