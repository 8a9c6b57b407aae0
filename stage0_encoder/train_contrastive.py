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

from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerator_setup import SCHEDULE_FLAGS, add_run_arguments, learning_rates_now, make_scheduler, write_run_json
from command_line import DONE, SOME_FAILED, chosen, defaults_of, flags_of, make_parser, refuse_idle, run
from run_checkpoints import (
    begin_run_dir,
    check_identity,
    checkpoint_to_resume,
    load_checkpoint,
    read_run_state,
    refuse_existing_run,
    save_checkpoint,
)
from run_log import RunLog, finished_line
from slide_reports import add_record_arguments
from stage0_encoder.contrastive_flags import add_alignment_validation_arguments, add_step_arguments
from stage0_encoder.contrastive_run import (
    best_line,
    facts_of,
    identity_of,
    make_batches,
    make_optimizer,
    read_classes,
    read_pairs,
    score_to_go_by,
)
from stage0_encoder.contrastive_step import contrastive_step, refuse_batch_statistics
from stage0_encoder.encoder_run import end, is_over, make_encoder_accelerator, save_result
from stage0_encoder.retrieval import evaluate
from stage0_encoder.waiting import TimedBatches
from stage0_encoder.what_aligns import add_model_arguments, build_model, needs_of_flags
from validation import refuse_two_validations

STEP_FLAGS = ("chunk_size", "max_grad_norm", "max_logit_scale")


def parse_arguments():
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    defaults = defaults_of(add_arguments)
    refuse_two_validations(args, defaults)
    refuse_idle(args, defaults, needs_of_flags(args))
    return args


def add_arguments(parser) -> None:
    """All flags of this command."""
    add_record_arguments(parser)
    add_model_arguments(parser)
    add_step_arguments(parser)
    add_alignment_validation_arguments(parser)
    add_run_arguments(parser)


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    run_dir = Path(args.output_dir)
    refuse_existing_run(run_dir, overwrite=args.overwrite, resuming=args.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, args.resume_from_checkpoint)
    state = read_run_state(checkpoint)

    # Data
    zero_shot = read_classes(args)
    train_records, val_records, problems = read_pairs(args)
    accelerator = make_encoder_accelerator(args, run_dir)

    # Model
    model = build_model(args, accelerator.device, train_records[0].inputs[0])
    refuse_batch_statistics(model, args.chunk_size)
    train_batches, train_loader = make_batches(args, model, train_records, accelerator.num_processes, shuffle=True)
    val_batches, val_loader = make_batches(args, model, val_records, accelerator.num_processes, shuffle=False)

    # Optimizer
    optimizer = make_optimizer(args, model)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = make_scheduler(optimizer, num_steps, **chosen(args, SCHEDULE_FLAGS))

    # Resume
    identity = identity_of(flags, train_batches, train_records, val_records, model)
    check_identity(checkpoint, identity)
    if finished := finished_line(run_dir, state.step, flags):
        end(accelerator, run_dir, finished)
        return DONE
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    bare = accelerator.unwrap_model(model)
    begin_run_dir(accelerator, run_dir, overwrite=args.overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)
    facts = facts_of(bare, train_records, val_records, train_batches, num_steps)
    write_run_json(accelerator, run_dir, flags, problems, **facts)
    log = RunLog(accelerator, run_dir, state.step, num_steps, args.wandb_project or "slidescribe", flags)
    resuming = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    save = partial(save_checkpoint, accelerator, run_dir, model, optimizer, scheduler, **resuming)

    # Train
    num_bad, timed = 0, TimedBatches(train_loader)
    for epoch in range(state.step // steps_per_epoch, args.num_epochs):
        if is_over(accelerator, args, state):
            break
        model.train()
        train_batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        timed.restart()
        for batch in timed:
            result = contrastive_step(accelerator, model, optimizer, batch, **chosen(args, STEP_FLAGS))
            state.step += 1
            num_bad += result.num_bad
            rates = learning_rates_now(optimizer) | {"data_wait_fraction": timed.fraction_since_last()}
            log.step(state.step, state.step / steps_per_epoch, **rates, **asdict(result))
            scheduler.step()
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save()
        if len(val_records):
            scores = evaluate(accelerator, model, val_loader, zero_shot, val_batches.records_per_step)
            log.evaluation(state.step, epoch + 1, **scores)
            if state.note(score_to_go_by(scores, args.best_metric)):
                save_result(accelerator, bare, run_dir / "best_model")
        save()
    log.close_bar()

    # Save
    save_result(accelerator, bare, run_dir / "final_model")
    log.end(state.step, image_ablation=None)
    end(accelerator, run_dir, best_line(run_dir, args.best_metric), timed.told())
    return SOME_FAILED if problems or num_bad else DONE


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
