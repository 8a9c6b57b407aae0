"""Flags of train_contrastive.py beside those of records, encoders and the run."""

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from accelerator_setup import add_early_stopping_argument, add_schedule_arguments

# May differ when a run is resumed: places of models, whose fingerprints are compared, what is only evaluated, and
# chunks, which change rounding and dropout alone.
MAY_DIFFER = ("encoder", "slide_encoder", "text_model", "class_prompts", "class_labels", "chunk_size")
BEST_METRICS = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "zero_shot_balanced_accuracy")


def add_step_arguments(parser) -> None:
    """Flags of optimizer and schedule; a contrastive batch cannot be accumulated, but computed in chunks."""
    group = parser.add_argument_group("Optimization")
    group.add_argument("--batch_size", type=PositiveInt, default=64, help="items per process and step, all contrasted")
    group.add_argument(
        "--chunk_size",
        type=PositiveInt,
        default=None,
        help="items per forward pass (GradCache): the same step in the memory of so many, and a forward pass more; "
        "default: all at once",
    )
    group.add_argument("--learning_rate", type=PositiveFloat, default=1e-4, help="peak of the schedule")
    group.add_argument(
        "--text_learning_rate", type=PositiveFloat, default=None, help="of the text encoder; default: --learning_rate"
    )
    group.add_argument(
        "--projection_learning_rate",
        type=PositiveFloat,
        default=None,
        help="of both projections; default: --learning_rate",
    )
    group.add_argument("--num_epochs", type=PositiveInt, default=10, help="passes over the training records")
    group.add_argument("--weight_decay", type=NonNegativeFloat, default=0.1, help="of AdamW; never on biases and norms")
    add_schedule_arguments(group)
    group.add_argument("--max_grad_norm", type=PositiveFloat, default=1.0, help="global norm to clip gradients to")


def add_alignment_validation_arguments(parser) -> None:
    """Flags of what is measured on validation records and what the best model is."""
    group = parser.add_argument_group("Validation")
    group.add_argument(
        "--best_metric",
        choices=list(BEST_METRICS),
        default="recall_at_1",
        help="what best_model and --early_stopping_patience go by; recalls are means of both directions",
    )
    add_early_stopping_argument(group)
    group.add_argument(
        "--class_prompts", default=None, help="JSON of classes and their prompts, for zero-shot accuracy"
    )
    group.add_argument("--class_labels", default=None, help="CSV with columns id and label: the class of records")
