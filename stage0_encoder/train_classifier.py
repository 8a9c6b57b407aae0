r"""Train an image classifier, whose encoder stage 0 and stage 2 then take, on labels from reports or from a table.

  accelerate launch stage0_encoder/train_classifier.py --train_json reports.json --input tiles --slides slides/ \
      --coords_dir OUT/coords --labels organ diagnosis grade --encoder vit --output_dir runs/vit
  accelerate launch stage0_tiling/encode.py --slides slides/ --output_dir OUT --encoder runs/vit/best_model

--encoder vit and cnn are networks of timm's classes with random weights, any other name is fine-tuned. --input is
`images` (--image_root), `tiles` or a `montage` of a slide's tiles (--slides, --coords_dir), or `bags` of feature
vectors with gated attention (--features_dir), whose result stage0_tiling/encode_slides.py takes. --train_json may also
be a CSV with the columns id and label.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from accelerator_setup import (
    ACCELERATOR_FLAGS,
    add_run_arguments,
    learning_rates_now,
    make_accelerator,
    parameter_groups,
    trainable_parameters,
    windows,
    write_run_json,
)
from command_line import DONE, SOME_FAILED, chosen, flags_of, make_parser, run
from encoders import ImageEncoder, weights_fingerprint
from report_loss import optimizer_step
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
from slide_reports import RecordBatches, inputs_digest
from stage0_encoder.classification_scores import table
from stage0_encoder.classifier import Classifier
from stage0_encoder.classifier_data import Examples, make_loader, sources_of
from stage0_encoder.classifier_flags import PLACES, READING_FLAGS, add_arguments, check_flags
from stage0_encoder.classifier_run import (
    build_encoder,
    choose_what_learns,
    evaluate,
    training_transform,
    usable,
    weights_of_classes,
)
from stage0_encoder.labels import labels_digest, read_labelled
from stage0_encoder.waiting import TimedBatches
from validation import stops_early


def parse_arguments():
    parser = make_parser(__doc__)
    add_arguments(parser)
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    check_flags(args)
    run_dir = Path(args.output_dir)
    refuse_existing_run(run_dir, overwrite=args.overwrite, resuming=args.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, args.resume_from_checkpoint)
    state = read_run_state(checkpoint)

    # Data
    train, val, class_names = read_labelled(
        args.train_json,
        args.val_json,
        args.labels,
        features_dir=args.coords_dir or args.features_dir,
        **chosen(args, READING_FLAGS),
    )
    if args.early_stopping_patience and not len(val.records):
        raise ValueError("--early_stopping_patience needs validation records; give --val_json or --val_fraction")
    accelerator = make_accelerator(
        output_dir=run_dir,
        find_unused_parameters=True,  # many published encoders have a head that they do not use here
        **chosen(args, ACCELERATOR_FLAGS),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("the classifier's weights are not sharded; use recipes/accelerate/ddp.yaml")
    train, val, tile_files, problems = usable(args, accelerator, train, val)

    # Model
    encoder = build_encoder(args, train)
    begins_as = weights_fingerprint(encoder.state_dict())
    choose_what_learns(args, encoder)
    classifier = Classifier(
        encoder,
        class_names,
        dropout=args.dropout,
        label_smoothing=args.label_smoothing,
        class_weights=weights_of_classes(args, train, class_names),
        mixup=Mixup(args.mixup, args.cutmix, label_smoothing=0.0) if args.mixup or args.cutmix else None,
    )
    examples = {"montage_side": args.montage_side, "max_tiles": args.max_tiles}
    train_data = Examples(
        args.input,
        sources_of(train, args.input, tile_files),
        train.labels,
        training_transform(args, encoder),
        seed=args.seed,
        **examples,
    )
    plain = encoder.transform if isinstance(encoder, ImageEncoder) else None
    val_data = Examples(args.input, sources_of(val, args.input, tile_files), val.labels, plain, **examples)
    train_batches = RecordBatches(
        len(train_data),
        args.batch_size,
        num_processes=accelerator.num_processes,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        shuffle=True,
        seed=args.seed,
    )
    val_batches = RecordBatches(len(val_data), args.batch_size, num_processes=accelerator.num_processes)
    train_loader = make_loader(train_data, train_batches, args.num_workers)
    val_loader = make_loader(val_data, val_batches, args.num_workers)

    # Optimizer
    groups = parameter_groups(classifier, args.weight_decay, {"encoder": args.encoder_learning_rate})
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler, _ = create_scheduler_v2(
        optimizer,
        args.lr_scheduler_type,
        num_epochs=max(1, num_steps),  # timm's epochs stand for steps here
        warmup_epochs=round(args.warmup_ratio * num_steps),
        warmup_lr=0.0,
        decay_epochs=max(1, args.decay_epochs * steps_per_epoch),
        step_on_epochs=False,
        updates_per_epoch=1,
    )

    # Resume
    identity = run_identity(
        {name: value for name, value in flags.items() if name not in PLACES},
        train_batches,
        {"records": labels_digest(train), "val_records": labels_digest(val)},
        {"inputs": inputs_digest(train.records), "encoder_weights": begins_as},
    )
    resuming = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    check_identity(checkpoint, identity)
    model, optimizer, train_loader, val_loader = accelerator.prepare(classifier, optimizer, train_loader, val_loader)
    if args.ema_decay:
        classifier.__dict__["average"] = ModelEmaV3(classifier, decay=args.ema_decay, use_warmup=True)
    begin_run_dir(accelerator, run_dir, overwrite=args.overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)
    log = RunLog(accelerator, run_dir, state.step, num_steps, args.wandb_project or "slidescribe", flags)
    facts = {"train_records": len(train.records), "val_records": len(val.records)}
    facts |= {"train_examples": len(train_data), "optimizer_steps": num_steps}
    facts |= {"classes": {name: len(names) for name, names in class_names.items()}}
    write_run_json(
        accelerator, run_dir, flags, problems, **facts, trainable_parameters=trainable_parameters(classifier)
    )

    # Train
    num_bad = 0
    averaged = classifier.average.module if classifier.average else classifier
    timed = TimedBatches(train_loader)
    for epoch in range(state.step // max(1, steps_per_epoch), args.num_epochs):
        if stops_early(state.evaluations_since_best, args.early_stopping_patience):
            break
        model.train()
        train_batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        timed.restart()
        for micro_batches in windows(timed, args.gradient_accumulation_steps):
            result = optimizer_step(accelerator, model, optimizer, micro_batches, args.max_grad_norm)
            state.step += 1
            num_bad += result.num_bad
            rates = learning_rates_now(optimizer) | {"data_wait_fraction": timed.fraction_since_last()}
            log.step(state.step, state.step / steps_per_epoch, **rates, **asdict(result))
            scheduler.step_update(state.step)
            if classifier.average:
                classifier.average.update(classifier, step=state.step)
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
        if len(val.records):
            log.evaluation(state.step, epoch + 1, **evaluate(accelerator, averaged, val_loader, val, args, state))
        save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
    log.close_bar()

    # Save
    if args.num_epochs == 0 and len(val.records):
        log.evaluation(state.step, 0, **evaluate(accelerator, averaged, val_loader, val, args, state))
    if accelerator.is_main_process:
        averaged.save(run_dir / "final_model")
    log.end(state.step, image_ablation=None)
    if accelerator.is_main_process:
        if len(val.records):
            print(table(json.loads((run_dir / "scores.json").read_text())), file=sys.stderr)
        if timed.fraction is not None:
            print(f"waited for data in {timed.fraction:.1%} of the time of training", file=sys.stderr)
        print(f"{run_dir / 'final_model'}", file=sys.stdout)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return SOME_FAILED if problems or num_bad else DONE


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
