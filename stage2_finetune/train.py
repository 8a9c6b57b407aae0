r"""Stage 2: fine-tune the language model on (image, question, answer) triplets; loss on answer tokens only.

  accelerate launch stage2_finetune/train.py --train_json reports.json --features_dir OUT/features \
      --stage1_projector_path runs/stage1/final_model --llm_training lora --output_dir runs/stage2

Language model, projector, reducer and prompt are those of stage 1. Optionally the projector learns on, and with image
inputs the image encoder: in full, through LoRA, or in epoch one only (as in CheXagent, Chen et al. 2024).
docs/training.md says what each way costs and when to use it.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from accelerator_setup import (
    SCHEDULE_FLAGS,
    ZERO_FLAGS,
    add_optimizer_arguments,
    add_run_arguments,
    learning_rates_now,
    make_accelerator,
    make_scheduler,
    parameter_groups,
    trainable_parameters,
    windows,
    write_run_json,
)
from command_line import DONE, SOME_FAILED, chosen, flags_of, make_parser, run
from encoder_lora import add_encoder_lora
from evaluation.metrics.for_validation import METRICS
from image_ablation import ABLATION_FLAGS, image_ablation
from language_model import add_lora, unfreeze_llm
from projector_average import averaged, begin_average, update_average
from report_loss import optimizer_step
from run_checkpoints import (
    begin_run_dir,
    check_identity,
    checkpoint_to_resume,
    file_digest,
    load_checkpoint,
    read_run_state,
    refuse_existing_run,
    run_identity,
    save_checkpoint,
)
from run_log import RunLog
from sharded_weights import prepare, save_result
from slide_reports import (
    LOADER_FLAGS,
    RECORD_FLAGS,
    add_data_arguments,
    digests,
    make_loaders,
    making_of,
    read_training_records,
)
from slide_vlm import VISUAL_PARTS, VLMSettings
from stage2_finetune.what_learns import (
    add_learning_arguments,
    encoder_learns,
    freeze_encoder,
    open_stage1,
    refuse_contradictions,
)
from validation import (
    METRIC_FLAGS,
    add_validation_arguments,
    score_to_go_by,
    stops_early,
    validate,
    written_reports,
)


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
    run_dir = Path(args.output_dir)
    refuse_existing_run(run_dir, overwrite=args.overwrite, resuming=args.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, args.resume_from_checkpoint)
    state = read_run_state(checkpoint)

    # Data
    settings = VLMSettings.read(args.stage1_projector_path)
    refuse_contradictions(args, settings)
    train_records, val_records, problems = read_training_records(
        **chosen(args, RECORD_FLAGS), expected=making_of(settings)
    )

    accelerator = make_accelerator(
        output_dir=run_dir, find_unused_parameters=encoder_learns(args), **chosen(args, ZERO_FLAGS)
    )

    # Model
    model, tokenizer = open_stage1(args, settings, accelerator)
    model.requires_grad_(False)
    if args.llm_training == "full":
        unfreeze_llm(model.llm, args.unfreeze_last_layers)
    if args.llm_training in ("lora", "qlora"):
        lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
        model.llm = add_lora(model.llm, **lora, target_modules=args.lora_target_modules)
    if args.unfreeze_projection_layer:
        model.unfreeze_visual_parts()
    if args.train_ve or args.train_ve_first_epoch:
        model.unfreeze_encoder()
    if args.encoder_lora_rank:
        add_encoder_lora(model.encoder, rank=args.encoder_lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.label_smoothing = args.label_smoothing
    train_batches, train_loader, val_loader = make_loaders(
        model, tokenizer, train_records, val_records, accelerator.num_processes, **chosen(args, LOADER_FLAGS)
    )
    reports = written_reports(accelerator, val_records, tokenizer, METRICS, **chosen(args, METRIC_FLAGS))

    # Optimizer
    rates = dict.fromkeys(VISUAL_PARTS, args.projector_learning_rate) | {"encoder": args.encoder_learning_rate}
    groups = parameter_groups(model, args.weight_decay, rates)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = make_scheduler(optimizer, num_steps, **chosen(args, SCHEDULE_FLAGS))

    # Resume
    stage1 = {"stage1_projector": file_digest(Path(args.stage1_projector_path) / "projector" / "model.safetensors")}
    identity = run_identity(
        flags, train_batches, digests(train_records, val_records), model.settings.fingerprints(), stage1
    )
    resuming = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    check_identity(checkpoint, identity)
    if args.train_ve_first_epoch and state.step >= steps_per_epoch:
        freeze_encoder(model, optimizer)
    model, optimizer, train_loader, val_loader = prepare(accelerator, model, optimizer, train_loader, val_loader)
    vlm = accelerator.unwrap_model(model)
    if args.projector_ema:
        begin_average(vlm)
    begin_run_dir(accelerator, run_dir, overwrite=args.overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)
    log = RunLog(accelerator, run_dir, state.step, num_steps, args.wandb_project or "slidescribe", flags)
    counts = {"train_records": len(train_records), "val_records": len(val_records), "optimizer_steps": num_steps}
    learning = trainable_parameters(vlm)
    write_run_json(accelerator, run_dir, flags, problems, **counts, trainable_parameters=learning)

    # Train
    num_bad = 0
    for epoch in range(state.step // steps_per_epoch, args.num_epochs):
        if stops_early(state.evaluations_since_best, args.early_stopping_patience):
            break
        model.train()
        train_batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        for micro_batches in windows(train_loader, args.gradient_accumulation_steps):
            result = optimizer_step(accelerator, model, optimizer, micro_batches, args.max_grad_norm)
            state.step += 1
            num_bad += result.num_bad
            log.step(state.step, state.step / steps_per_epoch, **learning_rates_now(optimizer), **asdict(result))
            scheduler.step()
            if args.projector_ema:
                update_average(vlm, args.projector_ema, state.step)
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
        if len(val_records):
            with averaged(vlm):
                scores = validate(accelerator, model, val_loader, reports)
                log.evaluation(state.step, epoch + 1, **scores)
                if state.note(score_to_go_by(scores, args.best_metric)):
                    save_result(accelerator, model, run_dir / "best_model", tokenizer)
        if args.train_ve_first_epoch and epoch == 0:
            freeze_encoder(vlm, optimizer)
        save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
    log.close_bar()

    # Save
    with averaged(vlm):
        save_result(accelerator, model, run_dir / "final_model", tokenizer)
        ablation = image_ablation(accelerator, model, tokenizer, val_records, **chosen(args, ABLATION_FLAGS))
    log.end(state.step, image_ablation=ablation)
    if accelerator.is_main_process:
        print(f"{run_dir / 'final_model'}", file=sys.stdout)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return SOME_FAILED if problems or num_bad else DONE


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
