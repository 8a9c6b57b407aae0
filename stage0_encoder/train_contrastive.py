r"""Align an image or slide encoder with a text encoder: images, or slides, find their reports and the reverse.

  accelerate launch stage0_encoder/train_contrastive.py --train_json captions.json --image_root images/ \
      --encoder google/siglip-base-patch16-224 --text_model google/siglip-base-patch16-224 --loss siglip \
      --image_training lora --text_training lora --output_dir runs/siglip

or a slide encoder over feature files, where reports that many slides share are positives of them all:

  accelerate launch stage0_encoder/train_contrastive.py --train_json reports.json --features_dir OUT/features \
      --slide_encoder abmil --text_model michiyasunaga/BioLinkBERT-base --loss unicl --output_dir runs/slides

final_model/image_encoder opens with --encoder of stage 0 and --vision_model_name of stage 1, final_model/slide_encoder
with --slide_encoder of encode_slides.py. docs/encoder_training.md says more.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from accelerator_setup import (
    SCHEDULE_FLAGS,
    add_run_arguments,
    learning_rates_now,
    make_accelerator,
    make_scheduler,
    parameter_groups,
    report_left_out,
    trainable_parameters,
    write_run_json,
)
from command_line import DONE, SOME_FAILED, chosen, flags_of, make_parser, run
from run_checkpoints import (
    begin_run_dir,
    check_identity,
    checkpoint_to_resume,
    load_checkpoint,
    read_run_state,
    refuse_existing_run,
    run_identity,
    save_checkpoint,
)
from run_log import RunLog
from slide_reports import (
    RECORD_FLAGS,
    RecordBatches,
    add_record_arguments,
    inputs_digest,
    read_training_records,
    records_digest,
)
from stage0_encoder.contrastive_step import contrastive_step, refuse_batch_statistics
from stage0_encoder.pairs import Items, PairDataset, make_pair_loader
from stage0_encoder.retrieval import evaluate, read_zero_shot
from stage0_encoder.what_aligns import add_model_arguments, build_model
from validation import stops_early

# May differ when a run is resumed: places of models, whose fingerprints are compared, what is only evaluated, and
# chunks, which change rounding and dropout alone.
MAY_DIFFER = ("encoder", "slide_encoder", "text_model", "class_prompts", "class_labels", "chunk_size")
BEST_METRICS = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "zero_shot_balanced_accuracy")


def parse_arguments():
    parser = make_parser(__doc__)
    add_record_arguments(parser)
    add_model_arguments(parser)
    add_step_arguments(parser)
    group = parser.add_argument_group("Validation")
    group.add_argument(
        "--best_metric",
        choices=list(BEST_METRICS),
        default="recall_at_1",
        help="what best_model and --early_stopping_patience go by; recalls are means of both directions",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=NonNegativeInt,
        default=0,
        help="stop after so many epochs without a better --best_metric; 0: never",
    )
    group.add_argument(
        "--class_prompts", default=None, help="JSON of classes and their prompts, for zero-shot accuracy"
    )
    group.add_argument("--class_labels", default=None, help="CSV with columns id and label: the class of records")
    add_run_arguments(parser)
    return parser.parse_args()


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
    group.add_argument(
        "--warmup_ratio", type=ClosedUnitInterval, default=0.03, help="share of steps in which the learning rate rises"
    )
    group.add_argument(
        "--lr_scheduler_type",
        choices=["cosine", "cosine_with_restarts", "constant_with_warmup", "linear"],
        default="cosine",
        help="after the warm-up",
    )
    group.add_argument(
        "--lr_num_cycles", type=PositiveInt, default=1, help="times that cosine_with_restarts falls from the peak to 0"
    )
    group.add_argument("--max_grad_norm", type=PositiveFloat, default=1.0, help="global norm to clip gradients to")


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    run_dir = Path(args.output_dir)
    refuse_existing_run(run_dir, overwrite=args.overwrite, resuming=args.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, args.resume_from_checkpoint)
    state = read_run_state(checkpoint)

    # Data
    zero_shot = read_classes(args)
    train_records, val_records, problems = read_training_records(**chosen(args, RECORD_FLAGS))
    if args.early_stopping_patience and not len(val_records):
        raise ValueError("--early_stopping_patience needs validation records; give --val_json or --val_fraction")

    accelerator = make_accelerator(
        output_dir=run_dir,
        wandb=args.wandb_project is not None,
        find_unused_parameters=True,  # such as the pooler of a text model whose tokens are averaged
        **chosen(args, ("seed", "mixed_precision", "tensorboard")),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("contrastive training does not shard weights; choose DDP (multi-GPU) in `accelerate config`")

    # Model
    model = build_model(args, accelerator.device, train_records[0].inputs[0])
    refuse_batch_statistics(model, args.chunk_size)
    train_batches, train_loader = make_batches(args, model, train_records, accelerator.num_processes, shuffle=True)
    val_batches, val_loader = make_batches(args, model, val_records, accelerator.num_processes, shuffle=False)

    # Optimizer
    rates = {"text": args.text_learning_rate}
    rates |= dict.fromkeys(("image_projection", "text_projection"), args.projection_learning_rate)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, rates), lr=args.learning_rate)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = make_scheduler(optimizer, num_steps, **chosen(args, SCHEDULE_FLAGS))

    # Resume
    identity = run_identity(
        {name: value for name, value in flags.items() if name not in MAY_DIFFER},
        steps_per_epoch=steps_per_epoch,
        records_per_step=train_batches.records_per_step,
        records=records_digest(train_records),
        inputs=inputs_digest(train_records),
        val_records=records_digest(val_records),
        text=model.settings.text_fingerprint,
        image=model.settings.image_fingerprint,
    )
    resuming = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    check_identity(checkpoint, identity)
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    bare = accelerator.unwrap_model(model)
    begin_run_dir(accelerator, run_dir, overwrite=args.overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)
    log = RunLog(accelerator, run_dir, state.step, args.wandb_project or "slidescribe", flags)
    write_run_json(
        accelerator,
        run_dir,
        flags,
        train_records=len(train_records),
        train_items=train_batches.num_records,
        val_records=len(val_records),
        left_out_records=len(problems),
        optimizer_steps=num_steps,
        trainable_parameters=trainable_parameters(bare),
    )
    report_left_out(accelerator, problems)

    # Train
    progress = tqdm(total=num_steps, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    num_bad, waited, spent = 0, 0.0, 1e-9
    stepping = chosen(args, ("chunk_size", "max_grad_norm", "max_logit_scale"))
    for epoch in range(state.step // steps_per_epoch, args.num_epochs):
        if stops_early(state.evaluations_since_best, args.early_stopping_patience):
            break
        model.train()
        train_batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        for batch, wait in timed(train_loader):
            began = time.perf_counter()
            result = contrastive_step(accelerator, model, optimizer, batch, **stepping)
            state.step += 1
            num_bad += result.num_bad
            waited += wait
            seconds = wait + time.perf_counter() - began
            spent += seconds
            rates_now = learning_rates_now(optimizer) | {"data_wait_fraction": round(wait / seconds, 4)}
            log.step(state.step, state.step / steps_per_epoch, **rates_now, **asdict(result))
            scheduler.step()
            progress.update()
            progress.set_postfix(loss=f"{result.loss:.4f}", waiting=f"{waited / spent:.0%}")
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
        if len(val_records):
            scores = evaluate(accelerator, model, val_loader, zero_shot, val_batches.records_per_step)
            log.evaluation(state.step, epoch + 1, **scores)
            if state.note(score_to_go_by(scores, args.best_metric)):
                save_model(accelerator, model, run_dir / "best_model")
        save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
    progress.close()

    # Save
    save_model(accelerator, model, run_dir / "final_model")
    log.end(state.step, image_ablation=None)
    if accelerator.is_main_process:
        print(f"waited for data in {waited / spent:.1%} of the time of training", file=sys.stderr)
        print(f"{run_dir / 'final_model'}", file=sys.stdout)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return SOME_FAILED if problems or num_bad else DONE


def read_classes(args):
    """Classes and labels of ``--class_prompts``, if any."""
    if bool(args.class_prompts) != bool(args.class_labels):
        raise ValueError("--class_prompts and --class_labels go together: the classes, and which records are of which")
    if args.best_metric.startswith("zero_shot") and not args.class_prompts:
        raise ValueError(f"--best_metric {args.best_metric} needs --class_prompts and --class_labels")
    return read_zero_shot(args.class_prompts, args.class_labels) if args.class_prompts else None


def make_batches(args, model, records, num_processes: int, *, shuffle: bool):
    """Batches of the items of records and their loader, for training where ``shuffle``."""
    dataset = PairDataset(
        records,
        Items.of(records),
        model.text.tokens(args.max_text_tokens),
        args.num_patches,
        image_transform=model.image.transform if args.image_root else None,
        seed=args.seed if shuffle else None,
        expected=model.settings.features_made,
    )
    batches = RecordBatches(len(dataset), args.batch_size, num_processes=num_processes, shuffle=shuffle, seed=args.seed)
    return batches, make_pair_loader(dataset, batches, args.num_workers)


def timed(loader):
    """Batches, each with the seconds that it was waited for."""
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began


def score_to_go_by(scores: dict[str, float], best_metric: str) -> float:
    """The score that decides which model is the best; higher is better.

    Raises:
        ValueError: no validation record has a label.
    """
    if f"val_{best_metric}" not in scores:
        raise ValueError(f"--best_metric {best_metric}: no validation record is in --class_labels")
    return -scores["val_loss"] if best_metric == "loss" else scores[f"val_{best_metric}"]


def save_model(accelerator, model, folder: Path) -> None:
    """Write a result folder. Collective: call on every rank."""
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save(folder)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
