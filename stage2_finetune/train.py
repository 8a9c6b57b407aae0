r"""Stage 2: fine-tune the language model on (image, question, answer) triplets; loss on answer tokens only.

  accelerate launch stage2_finetune/train.py --train_json reports.json --features_dir OUT/features \
      --stage1_projector_path runs/stage1/final_model --llm_training lora --output_dir runs/stage2

Language model, projector, reducer and prompt are those of stage 1. Optionally the projector learns on, and with image
inputs the image encoder learns in epoch one and is frozen after it (as in CheXagent, Chen et al. 2024).
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm
from transformers import get_scheduler

from accelerator_setup import (
    add_optimizer_arguments,
    add_run_arguments,
    forget_frozen,
    git_revision,
    make_accelerator,
    parameter_groups,
    report_left_out,
    trainable_parameters,
    windows,
    write_run_json,
)
from command_line import DONE, SOME_FAILED, flags_of, make_parser, run
from language_model import add_lora, unfreeze_llm
from report_loss import evaluation_loss, optimizer_step
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
from sharded_weights import save_result
from slide_reports import (
    add_data_arguments,
    check_input_kind,
    inputs_digest,
    make_loaders,
    making_of,
    read_training_records,
    records_digest,
)
from slide_vlm import VLMSettings, load_vlm


def parse_arguments():
    parser = make_parser(__doc__)
    add_data_arguments(parser)
    group = parser.add_argument_group("Model")
    group.add_argument("--stage1_projector_path", required=True, help="final_model (or best_model) folder of stage 1")
    group.add_argument("--llm_name", default=None, help="where the LLM of stage 1 is now, if it moved")
    group.add_argument(
        "--vision_model_name", default=None, help="where the image encoder of stage 1 is now, if it moved"
    )
    group.add_argument(
        "--llm_training", choices=["full", "lora", "frozen"], default="lora", help="what of the LLM learns"
    )
    group.add_argument("--lora_rank", type=PositiveInt, default=16, help="rank of the LoRA adapters")
    group.add_argument("--lora_alpha", type=float, default=32, help="LoRA scale, times 1 / rank")
    group.add_argument("--lora_dropout", type=float, default=0.05, help="dropout before the LoRA adapters")
    group.add_argument("--unfreeze_projection_layer", action="store_true", help="the projector and reducer learn on")
    group.add_argument(
        "--train_ve_first_epoch", action="store_true", help="the image encoder learns in epoch one (image inputs only)"
    )
    add_optimizer_arguments(parser, learning_rate=2e-4, num_epochs=3)
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    run_dir = Path(args.output_dir)
    refuse_existing_run(run_dir, overwrite=args.overwrite, resuming=args.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, args.resume_from_checkpoint)
    state = read_run_state(checkpoint)

    # Data
    settings = VLMSettings.read(args.stage1_projector_path)
    train_records, val_records, problems = read_training_records(
        args.train_json,
        args.val_json,
        val_fraction=args.val_fraction,
        seed=args.seed,
        splits=args.splits,
        features_dir=args.features_dir,
        image_root=args.image_root,
        group_pattern=args.group_pattern,
        exclude=args.exclude,
        revise=args.revise,
        expected=making_of(settings),
    )
    if args.train_ve_first_epoch and settings.input_kind == "features":
        raise ValueError(
            "--train_ve_first_epoch needs images: feature files hold what the encoder gave in stage 0, so it cannot "
            "learn; drop the flag"
        )
    check_input_kind(args.stage1_projector_path, settings, args.image_root)
    if (Path(args.stage1_projector_path) / "adapter").is_dir():
        raise ValueError(f"{args.stage1_projector_path} holds a LoRA adapter; start stage 2 from a stage 1 result")

    accelerator = make_accelerator(
        output_dir=run_dir,
        seed=args.seed,
        mixed_precision=args.mixed_precision,
        wandb=args.wandb_project is not None,
        tensorboard=args.tensorboard,
        find_unused_parameters=args.train_ve_first_epoch,
    )

    # Model
    is_bf16 = accelerator.mixed_precision == "bf16" and args.llm_training != "full"
    model, tokenizer = load_vlm(
        args.stage1_projector_path,
        dtype=torch.bfloat16 if is_bf16 else torch.float32,
        llm_name=args.llm_name,
        encoder_name=args.vision_model_name,
    )
    model.settings.question = args.question or settings.question
    model.settings.max_question_tokens = args.max_question_tokens or settings.max_question_tokens
    model.settings.max_answer_tokens = args.max_answer_tokens or settings.max_answer_tokens
    model.settings.training = flags
    model.settings.git_revision = git_revision()
    model.requires_grad_(False)
    if args.llm_training == "full":
        unfreeze_llm(model.llm)
    if args.llm_training == "lora":
        model.llm = add_lora(model.llm, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    if args.unfreeze_projection_layer:
        model.projector.requires_grad_(True)
        model.reducer.requires_grad_(True)
        model.position_codes.requires_grad_(True)
    if args.train_ve_first_epoch:
        model.encoder.requires_grad_(True)
        model.encoder_learned = True
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing would learn; choose --llm_training lora or full, or --unfreeze_projection_layer")
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    train_batches, train_loader, val_loader = make_loaders(
        model,
        tokenizer,
        train_records,
        val_records,
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        num_workers=args.num_workers,
        seed=args.seed,
    )

    # Optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, round(args.warmup_ratio * num_steps), num_steps)

    # Resume
    identity = run_identity(
        flags,
        steps_per_epoch=steps_per_epoch,
        records_per_step=args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
        records=records_digest(train_records),
        inputs=inputs_digest(train_records),
        val_records=records_digest(val_records),
        llm=model.settings.llm_fingerprint,
        encoder=model.settings.encoder_fingerprint,
        stage1_projector=file_digest(Path(args.stage1_projector_path) / "projector" / "model.safetensors"),
    )
    resuming = {"state": state, "identity": identity, "keep": args.keep_checkpoints}
    check_identity(checkpoint, identity)
    if args.train_ve_first_epoch and state.step >= steps_per_epoch:
        model.encoder.requires_grad_(False)
        forget_frozen(optimizer)
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    begin_run_dir(accelerator, run_dir, overwrite=args.overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)
    log = RunLog(accelerator, run_dir, state.step, args.wandb_project or "slidescribe", flags)
    vlm = accelerator.unwrap_model(model)
    write_run_json(
        accelerator,
        run_dir,
        flags,
        train_records=len(train_records),
        val_records=len(val_records),
        left_out_records=len(problems),
        optimizer_steps=num_steps,
        trainable_parameters=trainable_parameters(vlm),
    )
    report_left_out(accelerator, problems)

    # Train
    progress = tqdm(total=num_steps, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    num_bad = 0
    for epoch in range(state.step // steps_per_epoch, args.num_epochs):
        model.train()
        train_batches.start_at(epoch, first_step=state.step - epoch * steps_per_epoch)
        for micro_batches in windows(train_loader, args.gradient_accumulation_steps):
            result = optimizer_step(accelerator, model, optimizer, micro_batches, args.max_grad_norm)
            state.step += 1
            num_bad += result.num_bad
            log.step(state.step, state.step / steps_per_epoch, scheduler.get_last_lr()[0], **asdict(result))
            scheduler.step()
            progress.update()
            progress.set_postfix(loss=f"{result.loss:.4f}")
            if state.step % args.save_steps == 0 and state.step % steps_per_epoch != 0:
                save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
        if len(val_records):
            val_loss = evaluation_loss(accelerator, model, val_loader)
            log.evaluation(state.step, epoch + 1, val_loss)
            if val_loss < state.best_loss:
                state.best_loss = val_loss
                save_result(accelerator, model, run_dir / "best_model", tokenizer)
        if args.train_ve_first_epoch and epoch == 0:
            vlm.encoder.requires_grad_(False)
            forget_frozen(optimizer)
        save_checkpoint(accelerator, run_dir, model, optimizer, scheduler, **resuming)
    progress.close()

    # Save
    save_result(accelerator, model, run_dir / "final_model", tokenizer)
    if accelerator.is_main_process:
        log.draw()
        print(f"{run_dir / 'final_model'}", file=sys.stdout)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return SOME_FAILED if problems or num_bad else DONE


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
