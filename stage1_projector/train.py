r"""Stage 1: train the projector (and reducer) against a frozen language model, on patch-token / report pairs.

  accelerate launch stage1_projector/train.py --train_json reports.json --features_dir OUT/features \
      --llm_name google/gemma-3n-E2B-it --output_dir runs/stage1

or on images, with the image encoder in the model:

  accelerate launch stage1_projector/train.py --train_json captions.json --image_root images/ \
      --vision_model_name vit_base_patch16_siglip_224 --llm_name google/gemma-3-1b-it --output_dir runs/stage1
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

import accelerator_setup
from accelerator_setup import (
    SCHEDULE_FLAGS,
    ZERO_FLAGS,
    add_optimizer_arguments,
    add_run_arguments,
    end_run,
    git_revision,
    learning_rates_now,
    make_accelerator,
    make_scheduler,
    parameter_groups,
    trainable_parameters,
    windows,
    write_run_json,
)
from command_line import DONE, SOME_FAILED, chosen, defaults_of, flags_of, make_parser, run
from deepspeed_zero import precision
from encoders import load_encoder
from evaluation.metrics.for_validation import METRICS
from image_ablation import ABLATION_FLAGS, image_ablation
from language_model import (
    absolute_if_folder,
    choose_placeholder,
    fingerprint,
    load_llm,
    load_tokenizer,
    text_embedding_rms,
)
from projector_average import averaged, begin_average, update_average
from projectors import choose_parts
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
    DEFAULT_QUESTIONS,
    LOADER_FLAGS,
    RECORD_FLAGS,
    Prompt,
    add_data_arguments,
    default_num_visual_tokens,
    describe_encoder,
    describe_features,
    digests,
    make_loaders,
    read_training_records,
    tell_cut_texts,
)
from slide_vlm import SlideVLM
from validation import (
    METRIC_FLAGS,
    STOPPING_FLAGS,
    add_validation_arguments,
    epochs_to_go,
    evaluate_epoch,
    refuse_idle_validation,
    refuse_unmeasurable,
    written_reports,
)
from vlm_settings import VLMSettings


def parse_arguments():
    parser = make_parser(__doc__)
    add_arguments(parser)
    return parser.parse_args()


def add_arguments(parser) -> None:
    """All flags of this command."""
    add_data_arguments(parser)
    group = parser.add_argument_group("Model")
    group.add_argument("--llm_name", required=True, help="Hugging Face causal language model: hub name or folder")
    group.add_argument("--llm_revision", default=None, help="hub revision of --llm_name")
    group.add_argument("--vision_model_name", default=None, help="image encoder for --image_root: name or folder")
    group.add_argument(
        "--projector",
        default="mlp2x_gelu",
        help="linear, identity, mlp{n}x_gelu (ln_ in front, _gamma behind), pixel_shuffle, perceiver or qformer",
    )
    group.add_argument(
        "--token_reducer",
        default="none",
        help="none (a sample), grid_pool, adaptive_pool, kmeans, prumerge, prompt_topk, perceiver or qformer",
    )
    group.add_argument("--position_codes", default="none", help="none, or sincos of each patch's place in microns")
    group.add_argument(
        "--num_visual_tokens",
        type=PositiveInt,
        default=None,
        help="visual tokens of a case at most; default: 256 of slides, all of an image's patches",
    )
    add_optimizer_arguments(parser, learning_rate=1e-3, num_epochs=3)
    add_validation_arguments(parser, METRICS)
    add_run_arguments(parser)


def main() -> int:
    args = parse_arguments()
    flags = flags_of(args)
    run_dir, checkpoint, state = find_run(**chosen(args, RUN_FOLDER_FLAGS))

    # Data
    refuse_contradictions(args, defaults_of(add_arguments))
    train_records, val_records, problems = read_training_records(**chosen(args, RECORD_FLAGS))
    accelerator = make_accelerator(output_dir=run_dir, **chosen(args, ZERO_FLAGS))
    refuse_unmeasurable(accelerator, val_records, **chosen(args, STOPPING_FLAGS))

    # Model
    model, tokenizer = build_model(args, precision(accelerator), train_records[0].inputs[0])
    model.requires_grad_(False)
    model.unfreeze_visual_parts()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    train_batches, train_loader, val_loader = make_loaders(
        model, tokenizer, train_records, val_records, accelerator.num_processes, **chosen(args, LOADER_FLAGS)
    )
    reports = written_reports(val_records, tokenizer, METRICS, **chosen(args, METRIC_FLAGS))

    # Optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    steps_per_epoch = train_batches.steps_per_epoch
    num_steps = args.num_epochs * steps_per_epoch
    scheduler = make_scheduler(optimizer, num_steps, **chosen(args, SCHEDULE_FLAGS))

    # Resume
    identity = run_identity(flags, train_batches, digests(train_records, val_records), model.settings.fingerprints())
    check_identity(checkpoint, identity)
    if finished := finished_line(run_dir, state.step, flags):
        end_run(accelerator, run_dir / "final_model", finished)
        return DONE
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
        save()
    log.close_bar()

    # Save
    with averaged(vlm):
        save_result(accelerator, model, run_dir / "final_model", tokenizer)
        ablation = image_ablation(accelerator, model, tokenizer, val_records, **chosen(args, ABLATION_FLAGS))
    log.end(state.step, image_ablation=ablation)
    end_run(accelerator, run_dir / "final_model")
    return SOME_FAILED if problems or num_bad else DONE


def refuse_contradictions(args, defaults: dict[str, Any]) -> None:
    """Raise ValueError for flags that cannot go together, or of which one would do nothing."""
    accelerator_setup.refuse_contradictions(args, defaults)
    refuse_idle_validation(args, defaults)
    if args.llm_revision and Path(args.llm_name).is_dir():
        raise ValueError(f"--llm_revision {args.llm_revision} is of the hub, and --llm_name {args.llm_name} a folder")
    if args.image_root and not args.vision_model_name:
        raise ValueError("--image_root needs an image encoder; name it with --vision_model_name")
    if args.vision_model_name and not args.image_root:
        raise ValueError("--vision_model_name needs --image_root; feature files hold what the encoder of stage 0 gave")


def build_model(args, mixed_precision: str, first_input: Path):
    """The frozen language model with a new projector and reducer, and its tokenizer."""
    tokenizer = load_tokenizer(args.llm_name, revision=args.llm_revision)
    llm_dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    llm = load_llm(args.llm_name, revision=args.llm_revision, dtype=llm_dtype, ple_device=args.ple_device)
    encoder = load_encoder(args.vision_model_name) if args.image_root else None
    inputs = describe_encoder(encoder) if encoder else describe_features(first_input)
    projector, reducer = choose_parts(args.projector, args.token_reducer, encoder.patch_grid if encoder else None)
    settings = VLMSettings(
        llm_name=absolute_if_folder(args.llm_name),
        llm_revision=args.llm_revision,
        llm_fingerprint=fingerprint(llm),
        **inputs,
        projector=projector,
        token_reducer=reducer,
        position_codes=args.position_codes,
        num_visual_tokens=args.num_visual_tokens or default_num_visual_tokens(encoder),
        output_rms=text_embedding_rms(llm),
        placeholder_id=choose_placeholder(llm),
        prompt=asdict(Prompt.for_tokenizer(tokenizer)),
        question=args.question or DEFAULT_QUESTIONS[inputs["input_kind"]],
        max_question_tokens=args.max_question_tokens or 128,
        max_answer_tokens=args.max_answer_tokens or 512,
        training=flags_of(args),
        git_revision=git_revision(),
    )
    model = SlideVLM(llm, settings, encoder)
    model.label_smoothing = args.label_smoothing
    if not model.visual_parameters():
        raise ValueError(f"nothing would learn with --projector {args.projector}; add --position_codes sincos")
    return model, tokenizer


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
