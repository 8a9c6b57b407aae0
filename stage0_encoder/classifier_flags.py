"""Flags of train_classifier.py."""

from jsonargparse import Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from accelerator_setup import add_early_stopping_argument
from command_line import defaults_of, refuse_idle
from slide_reports import add_record_arguments
from stage0_encoder.classifier import OWN_NETWORKS
from stage0_encoder.classifier_data import INPUTS
from validation import refuse_two_validations

READING_FLAGS = ("image_root", "val_fraction", "seed", "splits", "fold", "group_pattern", "exclude", "revise")
READING_FLAGS += ("min_class_patients",)
# Places that may have moved when a run is resumed; what lies there is compared by its content.
PLACES = {"slides", "coords_dir", "tiles_dir", "encoder"}
NEEDED = {
    "images": ("image_root",),
    "tiles": ("slides", "coords_dir"),
    "montage": ("slides", "coords_dir"),
    "bags": ("features_dir",),
}


def add_arguments(parser) -> None:
    """All but the flags of the run."""
    _add_data_arguments(parser)
    _add_model_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_optimizer_arguments(parser)


def check_flags(args: Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        ValueError: names the flag and what would do.
    """
    defaults = defaults_of(add_arguments)
    refuse_two_validations(args, defaults)
    refuse_idle(args, defaults, needs_of_flags(args))
    for flag in NEEDED[args.input]:
        if not getattr(args, flag):
            raise ValueError(f"--input {args.input} needs --{flag}")
    for flag in {name for names in NEEDED.values() for name in names} - set(NEEDED[args.input]):
        if getattr(args, flag):
            raise ValueError(f"--{flag} is not for --input {args.input}; leave it out")
    if args.random_weights and args.encoder in OWN_NETWORKS:
        raise ValueError(f"--random_weights: --encoder {args.encoder} has random weights anyway; leave it out")
    if args.encoder_training != "full" and (args.encoder in OWN_NETWORKS or args.random_weights):
        raise ValueError(f"--encoder_training {args.encoder_training} needs published weights; choose full")
    if args.encoder_training != "full" and args.input == "bags":
        raise ValueError("--encoder_training is of image encoders; leave it out with --input bags")
    if args.input == "bags" and (args.mixup or args.cutmix):
        raise ValueError("--mixup and --cutmix mix pictures; leave them out with --input bags")
    if args.input == "montage" and args.max_tiles < args.montage_side**2:
        raise ValueError(f"--max_tiles {args.max_tiles}: a montage has {args.montage_side**2} tiles; raise it")


def needs_of_flags(args: Namespace) -> dict[str, tuple[bool, str]]:
    """For each flag that does nothing without another: whether that is there, and what it is.

    The sizes of a vit and a cnn are not among them: a recipe has them once for all encoders that it compares.
    """
    lora = (args.encoder_training == "lora", "--encoder_training lora")
    bags = (args.input == "bags", "--input bags")
    return {
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), lora),
        **dict.fromkeys(("bag_width", "bag_attention_width", "bag_dropout"), bags),
        "encoder_learning_rate": (args.encoder_training != "frozen", "--encoder_training full or lora"),
        "decay_epochs": (args.lr_scheduler_type == "step", "--lr_scheduler_type step"),
        "montage_side": (args.input == "montage", "--input montage"),
    }


def _add_data_arguments(parser) -> None:
    group = add_record_arguments(parser)
    group.add_argument(
        "--labels",
        nargs="+",
        default=["organ", "diagnosis", "grade"],
        help="what to read of the reports: diagnosis, grade, or fields of evaluation/fields; where --train_json is a "
        "CSV with the columns id and label (and group, the patient, and split), its label",
    )
    group.add_argument(
        "--min_class_patients", type=PositiveInt, default=1, help="training patients that a class has at least"
    )
    group.add_argument("--input", choices=list(INPUTS), default="images", help="what an example is")
    group.add_argument("--slides", nargs="+", default=None, help="folders, files or lists of slides")
    group.add_argument("--coords_dir", default=None, help="stage 0's OUT/coords, where the tiles of the slides are")
    group.add_argument(
        "--tiles_dir",
        default=None,
        help="folder of tiles read from the slides, 3 bytes a pixel; default: <output_dir>/tiles",
    )
    group.add_argument(
        "--max_tiles",
        type=PositiveInt,
        default=64,
        help="tiles of a slide at most, evenly spaced over its tissue; of bags drawn anew each epoch",
    )
    group.add_argument("--montage_side", type=PositiveInt, default=4, help="tiles in a row of a montage")


def _add_model_arguments(parser) -> None:
    group = parser.add_argument_group("Model")
    group.add_argument(
        "--encoder",
        default="vit",
        help="vit or cnn, from scratch in the sizes below; or a preset, timm name, hub name or folder, as of encode.py",
    )
    group.add_argument("--random_weights", action="store_true", help="a named encoder from scratch too")
    group.add_argument(
        "--encoder_training", choices=["full", "lora", "frozen"], default="full", help="of a named encoder"
    )
    group.add_argument("--lora_rank", type=PositiveInt, default=16, help="of the adapters")
    group.add_argument("--lora_alpha", type=PositiveFloat, default=32.0, help="of the adapters")
    group.add_argument("--lora_dropout", type=ClosedUnitInterval, default=0.05, help="of the adapters")
    group.add_argument("--image_size", type=PositiveInt, default=224, help="side of a picture in pixels, vit and cnn")
    group.add_argument("--vit_patch_size", type=PositiveInt, default=16, help="side of a patch in pixels")
    group.add_argument("--vit_width", type=PositiveInt, default=192, help="of the tokens")
    group.add_argument("--vit_depth", type=PositiveInt, default=12, help="blocks")
    group.add_argument("--vit_heads", type=PositiveInt, default=3, help="attention heads")
    group.add_argument("--cnn_width", type=PositiveInt, default=64, help="channels of the first stage")
    group.add_argument(
        "--cnn_depths", nargs="+", type=PositiveInt, default=[2, 2, 2, 2], help="residual blocks of each stage"
    )
    group.add_argument("--dropout", type=ClosedUnitInterval, default=0.0, help="of the vector before the classifier")
    group.add_argument("--bag_width", type=PositiveInt, default=512, help="width of gated attention's slide token")
    group.add_argument("--bag_attention_width", type=PositiveInt, default=256, help="of its attention network")
    group.add_argument("--bag_dropout", type=ClosedUnitInterval, default=0.25, help="of it")


def _add_augmentation_arguments(parser) -> None:
    group = parser.add_argument_group("Augmentation (timm's)")
    group.add_argument("--crop_scale", type=ClosedUnitInterval, default=0.6, help="least area of a random crop")
    group.add_argument("--hflip", type=ClosedUnitInterval, default=0.5, help="how often to mirror left and right")
    group.add_argument("--vflip", type=ClosedUnitInterval, default=0.5, help="how often to mirror top and bottom")
    group.add_argument("--color_jitter", type=NonNegativeFloat, default=0.2, help="brightness, contrast, saturation")
    group.add_argument("--auto_augment", default=None, help="timm's policy, such as rand-m9-mstd0.5; replaces the last")
    group.add_argument("--random_erasing", type=ClosedUnitInterval, default=0.0, help="how often to erase a rectangle")
    group.add_argument("--mixup", type=NonNegativeFloat, default=0.0, help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", type=NonNegativeFloat, default=0.0, help="alpha of CutMix; 0: none")


def _add_optimizer_arguments(parser) -> None:
    group = parser.add_argument_group("Optimization")
    group.add_argument("--batch_size", type=PositiveInt, default=32, help="examples per process and forward pass")
    group.add_argument(
        "--gradient_accumulation_steps", type=PositiveInt, default=1, help="forward passes per optimizer step"
    )
    group.add_argument("--learning_rate", type=PositiveFloat, default=1e-3, help="peak of the schedule")
    group.add_argument(
        "--encoder_learning_rate", type=PositiveFloat, default=None, help="peak for the encoder; default: the same"
    )
    group.add_argument(
        "--num_epochs", type=NonNegativeInt, default=10, help="passes over the examples; 0: save the encoder untrained"
    )
    group.add_argument("--weight_decay", type=NonNegativeFloat, default=0.05, help="of AdamW; never on biases, norms")
    group.add_argument(
        "--warmup_ratio",
        type=ClosedUnitInterval,
        default=0.05,
        help="share of steps in which the learning rate rises",
    )
    group.add_argument(
        "--lr_scheduler_type",
        choices=["cosine", "tanh", "poly", "step", "constant"],
        default="cosine",
        help="timm's schedule after the warm-up",
    )
    group.add_argument("--decay_epochs", type=PositiveInt, default=30, help="epochs between falls of `step`")
    group.add_argument("--label_smoothing", type=ClosedUnitInterval, default=0.1, help="of the training loss")
    group.add_argument(
        "--class_weighting", choices=["none", "balanced"], default="none", help="balanced: rare classes weigh more"
    )
    group.add_argument("--ema_decay", type=ClosedUnitInterval, default=0.0, help="of timm's ModelEmaV3; 0: none")
    group.add_argument("--max_grad_norm", type=PositiveFloat, default=1.0, help="global norm to clip gradients to")
    group.add_argument(
        "--best_metric",
        choices=["balanced_accuracy", "loss"],
        default="balanced_accuracy",
        help="of validation, what best_model and --early_stopping_patience go by",
    )
    add_early_stopping_argument(group)
