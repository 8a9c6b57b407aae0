r"""Train an image classifier, whose encoder stage 0 and stage 2 then take, on labels from reports or from a table.

  accelerate launch stage0_encoder/train_classifier.py --train_json reports.json --input tiles --slides slides/ \
      --coords_dir OUT/coords --labels organ diagnosis grade --encoder vit --output_dir runs/vit
  accelerate launch stage0_tiling/encode.py --slides slides/ --output_dir OUT --encoder runs/vit/best_model

--encoder vit and cnn are networks of timm's classes with random weights, any other name is fine-tuned. --input is
`images` (--image_root), `tiles` or a `montage` of a slide's tiles (--slides, --coords_dir), or `bags` of feature
vectors with gated attention (--features_dir), whose result stage0_tiling/encode_slides.py takes. --train_json may also
be a CSV with the columns id and label.
"""

from functools import partial
from pathlib import Path

from accelerator_setup import add_run_arguments, learning_rates_now, windows, write_run_json
from command_line import DONE, SOME_FAILED, flags_of, make_parser, run
from image_encoder import weights_fingerprint
from report_loss import optimizer_step
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
from stage0_encoder.classifier_flags import add_arguments, check_flags
from stage0_encoder.classifier_run import (
    best_scores,
    build_classifier,
    build_encoder,
    choose_what_learns,
    evaluate,
    facts_of,
    identity_of,
    make_loaders,
    make_optimizer,
    make_timm_scheduler,
    read_cases,
    usable,
    without_text,
)
from stage0_encoder.encoder_run import end, is_over, make_encoder_accelerator, save_result
from stage0_encoder.waiting import TimedBatches


def parse_arguments():
    parser = make_parser(__doc__)
    add_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    check_flags(args)
    return args


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    run_dir = Path(args.output_dir)
    refuse_existing_run(run_dir, overwrite=args.overwrite, resuming=args.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, args.resume_from_checkpoint)
    state = read_run_state(checkpoint)

    # Data
    train, val, class_names = read_cases(args)
    accelerator = make_encoder_accelerator(args, run_dir)
    encoder = build_encoder(args, train)  # before tiles are read for hours: its weights may be out of reach
    train, val, tile_files, problems = usable(args, accelerator, train, val)

    # Model
    begins_as = weights_fingerprint(encoder.state_dict())
    choose_what_learns(args, encoder)
    classifier = build_classifier(args, encoder, train, class_names)
    batches, *loaders = make_loaders(args, encoder, train, val, tile_files, accelerator.num_processes)

    # Optimizer
    optimizer = make_optimizer(args, classifier)
    steps_per_epoch = batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = make_timm_scheduler(args, optimizer, steps_per_epoch)

    # Resume
    identity = identity_of(flags, batches, train, val, begins_as)
    check_identity(checkpoint, identity)
    if finished := finished_line(run_dir, state.step, flags):
        end(accelerator, run_dir, finished)
        return DONE
    model, optimizer, train_loader, val_loader = accelerator.prepare(classifier, optimizer, *loaders)
    classifier.begin_average(args.ema_decay)
    begin_run_dir(accelerator, run_dir, overwrite=args.overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)
    write_run_json(accelerator, run_dir, flags, problems, **facts_of(classifier, train, val, batches, num_steps))
    log = RunLog(accelerator, run_dir, state.step, num_steps, args.wandb_project or "slidescribe", flags)
    resuming = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    save = partial(save_checkpoint, accelerator, run_dir, model, optimizer, scheduler, **resuming)
    validate = partial(evaluate, accelerator, classifier.result, val_loader, val, args, state)

    # Train
    num_bad, timed = 0, TimedBatches(train_loader)
    for epoch in range(state.step // max(1, steps_per_epoch), args.num_epochs):
        if is_over(accelerator, args, state):
            break
        model.train()
        batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        timed.restart()
        for micro_batches in windows(timed, args.gradient_accumulation_steps):
            result = optimizer_step(accelerator, model, optimizer, micro_batches, args.max_grad_norm)
            state.step += 1
            num_bad += result.num_bad
            rates = learning_rates_now(optimizer) | {"data_wait_fraction": timed.fraction_since_last()}
            log.step(state.step, state.step / steps_per_epoch, **rates, **without_text(result))
            scheduler.step_update(state.step)
            classifier.update_average(state.step)
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save()
        if len(val.records):
            log.evaluation(state.step, epoch + 1, **validate())
        save()
    log.close_bar()

    # Save
    if args.num_epochs == 0 and len(val.records):
        log.evaluation(state.step, 0, **validate())
    save_result(accelerator, classifier.result, run_dir / "final_model")
    log.end(state.step, image_ablation=None)
    end(accelerator, run_dir, best_scores(run_dir), timed.told())
    return SOME_FAILED if problems or num_bad else DONE


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
