r"""Stage 2: fine-tune the language model on (image, question, answer) triplets; loss on answer tokens only.

  accelerate launch stage2_finetune/train.py --train_json reports.json --features_dir OUT/features \
      --stage1_projector_path runs/stage1/final_model --llm_training lora --output_dir runs/stage2

Language model, projector, reducer and prompt are those of stage 1. Optionally the projector learns on, and with image
inputs the image encoder: in full, through LoRA, or in epoch one only (as in CheXagent, Chen et al. 2024).
docs/training.md says what each way costs and when to use it.
"""

from dataclasses import asdict
from functools import partial

import torch

from accelerator_setup import (
    SCHEDULE_FLAGS,
    ZERO_FLAGS,
    add_optimizer_arguments,
    add_run_arguments,
    end_run,
    learning_rates_now,
    make_accelerator,
    make_scheduler,
    parameter_groups,
    trainable_parameters,
    windows,
    write_run_json,
)
from command_line import DONE, SOME_FAILED, chosen, defaults_of, flags_of, make_parser, run
from evaluation.metrics.for_validation import METRICS
from image_ablation import ABLATION_FLAGS, image_ablation
from projector_average import averaged, begin_average, update_average
from report_loss import optimizer_step
from run_checkpoints import (
    RUN_FOLDER_FLAGS,
    begin_or_resume,
    check_identity,
    find_run,
    run_identity,
    save_checkpoint,
)
from run_log import RunLog, finished_line
from sharded_weights import prepare, save_result
from slide_reports import (
    LOADER_FLAGS,
    RECORD_FLAGS,
    add_data_arguments,
    digests,
    make_loaders,
    making_of,
    read_training_records,
    tell_cut_texts,
)
from slide_vlm import VISUAL_PARTS
from stage2_finetune.what_learns import (
    ENCODER_LEARNING_FLAGS,
    LLM_LEARNING_FLAGS,
    add_learning_arguments,
    freeze_encoder,
    let_encoder_learn,
    let_llm_learn,
    open_stage1,
    refuse_contradictions,
    stage1_digest,
)
from validation import (
    METRIC_FLAGS,
    STOPPING_FLAGS,
    add_validation_arguments,
    epochs_to_go,
    evaluate_epoch,
    refuse_unmeasurable,
    written_reports,
)
from vlm_settings import VLMSettings


def parse_arguments():
    parser = make_parser(__doc__)
    add_arguments(parser)
    return parser.parse_args()


def add_arguments(parser) -> None:
    """All flags of this command, for those that run it."""
    add_data_arguments(parser)
    group = parser.add_argument_group("Model")
    group.add_argument("--stage1_projector_path", required=True, help="final_model (or best_model) folder of stage 1")
    group.add_argument("--llm_name", default=None, help="where the LLM of stage 1 is now, if it moved")
    group.add_argument(
        "--vision_model_name", default=None, help="where the image encoder of stage 1 is now, if it moved"
    )
    add_learning_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=2e-4, num_epochs=3)
    add_validation_arguments(parser, METRICS)
    add_run_arguments(parser)


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    run_dir, checkpoint, state = find_run(**chosen(args, RUN_FOLDER_FLAGS))

    # Data
    settings = VLMSettings.read(args.stage1_projector_path)
    refuse_contradictions(args, settings, defaults_of(add_arguments))
    made = making_of(settings)
    train_records, val_records, problems = read_training_records(**chosen(args, RECORD_FLAGS), expected=made)
    is_frozen_later = args.train_ve_first_epoch and args.num_epochs > 1  # its gradients are then missed
    accelerator = make_accelerator(
        output_dir=run_dir, find_unused_parameters=is_frozen_later, **chosen(args, ZERO_FLAGS)
    )
    refuse_unmeasurable(accelerator, val_records, **chosen(args, STOPPING_FLAGS))

    # Model
    model, tokenizer = open_stage1(args, settings, accelerator)
    model.requires_grad_(False)
    let_llm_learn(model, **chosen(args, LLM_LEARNING_FLAGS))
    if args.unfreeze_projection_layer:
        model.unfreeze_visual_parts()
    let_encoder_learn(model, **chosen(args, ENCODER_LEARNING_FLAGS))
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    train_batches, train_loader, val_loader = make_loaders(
        model, tokenizer, train_records, val_records, accelerator.num_processes, **chosen(args, LOADER_FLAGS)
    )
    reports = written_reports(val_records, tokenizer, METRICS, **chosen(args, METRIC_FLAGS))

    # Optimizer
    rates = dict.fromkeys(VISUAL_PARTS, args.projector_learning_rate) | {"encoder": args.encoder_learning_rate}
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, rates), lr=args.learning_rate)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = make_scheduler(optimizer, num_steps, **chosen(args, SCHEDULE_FLAGS))

    # Resume
    models = model.settings.fingerprints() | stage1_digest(args.stage1_projector_path)
    identity = run_identity(flags, train_batches, digests(train_records, val_records), models)
    check_identity(checkpoint, identity)
    if finished := finished_line(run_dir, state.step, flags):
        end_run(accelerator, run_dir / "final_model", finished)
        return DONE
    if args.train_ve_first_epoch and state.step >= steps_per_epoch:
        freeze_encoder(model, optimizer)
    model, optimizer, train_loader, val_loader = prepare(accelerator, model, optimizer, train_loader, val_loader)
    vlm = accelerator.unwrap_model(model)
    if args.projector_ema:
        begin_average(vlm)
    begin_or_resume(accelerator, run_dir, checkpoint, model, optimizer, scheduler, overwrite=args.overwrite)
    counts = {"train_records": len(train_records), "val_records": len(val_records), "optimizer_steps": num_steps}
    texts = {"train": train_records, "val": val_records}
    limits = {"questions": vlm.settings.max_question_tokens, "answers": vlm.settings.max_answer_tokens}
    counts |= tell_cut_texts(tokenizer, limits, **texts)
    write_run_json(accelerator, run_dir, flags, problems, **counts, trainable_parameters=trainable_parameters(vlm))
    log = RunLog(accelerator, run_dir, state.step, num_steps, args.wandb_project or "slidescribe", flags)
    saved = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    save = partial(save_checkpoint, accelerator, run_dir, model, optimizer, scheduler, **saved)

    # Train
    num_bad = 0
    for epoch in epochs_to_go(state, steps_per_epoch, args.num_epochs, args.early_stopping_patience):
        model.train()
        train_batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        for micro_batches in windows(train_loader, args.gradient_accumulation_steps):
            result = optimizer_step(accelerator, model, optimizer, micro_batches, args.max_grad_norm)
            state.step += 1
            num_bad += result.num_bad
            log.step(state.step, state.step / steps_per_epoch, **learning_rates_now(optimizer), **asdict(result))
            scheduler.step()
            update_average(vlm, args.projector_ema, state.step)
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save()
        if len(val_records):
            evaluate_epoch(accelerator, model, val_loader, reports, epoch + 1, state, log, tokenizer)
        if args.train_ve_first_epoch and epoch == 0:
            freeze_encoder(vlm, optimizer)
        save()
    log.close_bar()

    # Save
    with averaged(vlm):
        save_result(accelerator, model, run_dir / "final_model", tokenizer)
        ablation = image_ablation(accelerator, model, tokenizer, val_records, **chosen(args, ABLATION_FLAGS))
    log.end(state.step, image_ablation=ablation)
    end_run(accelerator, run_dir / "final_model")
    return SOME_FAILED if problems or num_bad else DONE


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
