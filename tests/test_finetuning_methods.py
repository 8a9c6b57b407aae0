"""Ways to fine-tune: 4-bit weights, adapters of language model and encoder, last layers, averages, smoothing."""

import copy
import importlib
import json
import os
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from hypothesis import given, settings, strategies
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, Gemma3nForCausalLM

from accelerator_setup import freeze_unused, learning_rates_now, make_scheduler, parameter_groups
from command_line import defaults_of, flags_of, make_parser, run
from encoder_lora import add_encoder_lora, merged_encoder
from encoders import load_encoder
from evaluation.figures import curves_figure
from four_bit import KEPT_LINEAR, FourBit, dequantize, quantize
from image_ablation import image_ablation, other_records
from language_model import add_lora, fingerprint, load_llm, unfreeze_llm
from projector_average import averaged, begin_average, update_average
from run_checkpoints import RunState, load_checkpoint, save_checkpoint
from run_log import draw_curves, finished_line, loss_name, plain_numbers
from slide_reports import RecordBatches, ReportDataset, make_loader, read_records
from stage2_finetune.compare_peft import idle_by_method, train
from stage2_finetune.merge_check import (
    MergeCheck,
    example_prompts,
    largest_difference,
    logits_of,
    mean_divergence,
    round_as_merged,
)
from stage2_finetune.train import add_arguments
from stage2_finetune.what_learns import open_stage1, refuse_another_split, refuse_contradictions
from tests.conftest import run_command
from tests.tiny_models import generate_answers, make_batch, make_llm, make_model
from validation import epochs_to_go, greedy_answers, stops_early
from vlm_loading import load_vlm
from vlm_settings import VLMSettings

STAGE1, STAGE2 = "stage1_projector.train", "stage2_finetune.train"


def call(module: str, monkeypatch, *words: object) -> int:
    """Run a command's main in this process, as one process on the CPU; its exit status."""
    monkeypatch.setattr("sys.argv", [module, *map(str, words)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        with pytest.raises(SystemExit) as left:
            run(importlib.import_module(module).main)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return left.value.code


def log_lines(folder, key="loss"):
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in line]


@pytest.fixture(scope="module")
def stage1(corpus, tmp_path_factory):
    """A stage 1 run on features, in this process."""
    output = tmp_path_factory.mktemp("stage1") / "run"
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--llm_name", corpus.llm]
    flags += ["--num_visual_tokens", 8, "--num_workers", 0, "--learning_rate", 0.02, "--num_epochs", 2]
    flags += ["--max_answer_tokens", 24]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(STAGE1, monkeypatch, *flags, "--batch_size", 4, "--val_fraction", 0.3, "--output_dir", output) == 0
    return output


def stage2_flags(corpus, stage1, output, *more):
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--num_workers", 0, "--batch_size", 4]
    flags += ["--stage1_projector_path", stage1 / "final_model", "--output_dir", output, "--val_fraction", 0.3]
    return [*flags, *more]


# 4-bit weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_transformers(dtype, tmp_path):
    make_llm().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=list(KEPT_LINEAR),
    )
    theirs = Gemma3nForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=config)
    ours = load_llm(str(tmp_path), dtype=dtype)
    quantize(ours, FourBit(weights_dtype=str(dtype).removeprefix("torch.")))
    own, wanted = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.dtype == own[name].dtype, name
        assert torch.equal(value.data.view(torch.uint8), own[name].data.view(torch.uint8)), name
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert any("nested_absmax" in name for name in state)  # the scales are quantised too
    assert not any("coefs.weight.absmax" in name or "lm_head.weight.absmax" in name for name in state)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted if "absmax" in name)


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_full_layers_compute_what_the_four_bit_ones_do(weights_dtype):
    model, tokenizer = make_model()
    full = model.eval()(make_batch(tokenizer)).detach()
    quantize(model.llm, FourBit(weights_dtype=weights_dtype))
    with torch.no_grad():
        coded = model(make_batch(tokenizer))
        again = model(make_batch(tokenizer))
    assert torch.equal(coded, again)  # reading the weights leaves them as they are
    assert (coded - full).abs().max() > 1e-3
    dequantize(model.llm)
    with torch.no_grad():
        torch.testing.assert_close(model(make_batch(tokenizer)), coded, atol=1e-5, rtol=0)


def test_qlora_learns_over_frozen_codes():
    model, tokenizer = make_model(seed=5)
    quantize(model.llm, FourBit())
    model.requires_grad_(False)
    codes = {name: value.clone() for name, value in model.llm.state_dict().items()}
    model.llm = add_lora(model.llm, rank=4, alpha=8, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    batch, losses = make_batch(tokenizer), []
    for _ in range(12):
        model.train()
        loss = model(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = {name.replace("base_layer.", ""): value for name, value in model.base_llm.state_dict().items()}
    assert all(torch.equal(codes[name].view(torch.uint8), after[name].view(torch.uint8)) for name in codes)


@pytest.fixture(scope="module")
def qlora(corpus, stage1, tmp_path_factory):
    """A QLoRA run of two epochs with its flags."""
    output = tmp_path_factory.mktemp("qlora") / "run"
    flags = stage2_flags(corpus, stage1, output, "--llm_training", "qlora", "--learning_rate", 5e-3, "--num_epochs", 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(STAGE2, monkeypatch, *flags, "--keep_checkpoints", 10) == 0
    return output, flags


def test_a_qlora_run_resumes_bit_for_bit_and_opens_in_four_bits(corpus, qlora, monkeypatch):
    output, flags = qlora
    losses = [line["loss"] for line in log_lines(output)]
    assert losses[-1] < losses[0]
    adapter = load_file(output / "final_model" / "adapter" / "adapter_model.safetensors")
    half = output / "checkpoints" / f"step_{len(losses) // 2}"
    assert all("lora_" in name for name in load_file(half / "trainable.safetensors"))
    assert call(STAGE2, monkeypatch, *flags, "--keep_checkpoints", 10, "--resume_from_checkpoint", half) == 0
    assert [line["loss"] for line in log_lines(output)] == losses
    resumed = load_file(output / "final_model" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], adapter[name]) for name in adapter)

    written = json.loads((output / "final_model" / "vlm.json").read_text())["llm_four_bit"]
    assert written["weights_dtype"] == "float32" and written["double_quantization"]
    model, _ = load_vlm(output / "final_model")
    assert type(model.base_llm.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    assert {path.name for path in (output / "final_model").iterdir()} == {
        "adapter",
        "projector",
        "tokenizer",
        "vlm.json",
    }


def test_the_wrong_base_is_refused_under_four_bits_too(qlora, tmp_path):
    make_llm(seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not those that this model was trained with"):
        load_vlm(qlora[0] / "final_model", llm_name=str(tmp_path))


# Merging


def same_logits(one, other, limit):
    batch = make_batch(one[1])
    with torch.no_grad():
        torch.testing.assert_close(one[0](batch), other[0](batch), atol=limit, rtol=0)


def test_a_four_bit_adapter_merges_into_a_plain_checkpoint(corpus, qlora, tmp_path, monkeypatch, capsys):
    unmerged, merged = qlora[0] / "final_model", tmp_path / "merged"
    words = ["--model", unmerged, "--output_dir", merged]
    assert call("stage2_finetune.merge_lora", monkeypatch, *words) == 0
    assert str(merged) in capsys.readouterr().out
    assert {path.name for path in merged.iterdir()} == {"language_model", "projector", "tokenizer", "vlm.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    same_logits(load_vlm(unmerged), load_vlm(merged), 1e-4)
    plain = Gemma3nForCausalLM.from_pretrained(merged / "language_model")
    assert fingerprint(plain) != fingerprint(load_llm(str(corpus.llm)))
    assert call("stage2_finetune.merge_lora", monkeypatch, *words) == 2
    assert "exists; name another folder, or add --overwrite" in capsys.readouterr().err
    assert call("stage2_finetune.merge_lora", monkeypatch, *words, "--overwrite", "--num_prompts", 1) == 0
    words = ["--model", merged, "--output_dir", tmp_path / "again"]
    assert call("stage2_finetune.merge_lora", monkeypatch, *words) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_merging_in_bfloat16_agrees(qlora, tmp_path, monkeypatch, capsys):
    merged = tmp_path / "merged"
    words = ["--model", qlora[0] / "final_model", "--output_dir", merged, "--dtype", "bf16"]
    assert call("stage2_finetune.merge_lora", monkeypatch, *words) == 0
    assert "bf16: logits differ by " in capsys.readouterr().err
    written = load_file(merged / "language_model" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def adapted(stage1):
    """A model with an adapter, its prompts, and its logits with the adapter and without."""
    model, tokenizer = load_vlm(stage1 / "final_model")
    model.llm = add_lora(model.llm, rank=4, alpha=8, dropout=0.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    prompts = example_prompts(model, tokenizer, 2)
    logits = logits_of(model, prompts)
    with model.llm.disable_adapter():
        nats = mean_divergence(logits_of(model, prompts), logits)
    return model, prompts, logits, nats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [None, "one layer lost", "scaled wrongly", "rounded to float8"])
def test_a_merged_model_that_is_another_is_found_out(adapted, dtype, fault):
    model, prompts, unmerged, adapter_nats = adapted
    meant, merged = copy.deepcopy(model), copy.deepcopy(model)
    round_as_merged(meant.llm, dtype)
    layer = merged.base_llm.model.layers[0].mlp.down_proj
    if fault == "one layer lost":
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    if fault == "scaled wrongly":
        layer.scaling["default"] *= 1.5
    merged.llm = merged.llm.merge_and_unload()
    with torch.no_grad():
        for weight in merged.llm.parameters():
            weight.copy_(weight.to(torch.float8_e4m3fn if fault == "rounded to float8" else dtype))
    logits = logits_of(merged, prompts)
    difference = largest_difference(logits, logits_of(meant, prompts))
    apart = largest_difference(logits, unmerged)
    check = MergeCheck(difference, apart, mean_divergence(logits, unmerged), adapter_nats, dtype)
    assert check.agrees == (fault is None), check
    if dtype == torch.float32 and fault is None:
        assert largest_difference(logits, unmerged) <= 1e-5


def test_what_rounding_costs_is_held_against_what_the_adapter_does():
    def agrees(nats, adapter_nats, dtype=torch.bfloat16):
        return MergeCheck(0.0, 0.0, nats, adapter_nats, dtype).agrees

    assert agrees(9e-4, 0.1) and not agrees(1.1e-3, 1.0)
    assert agrees(9e-6, 1e-3) and not agrees(2e-5, 1e-3)
    assert agrees(1e-8, 0.0) and not agrees(2e-6, 0.0)
    assert not agrees(2e-5, 0.1, torch.float32)
    logits = torch.randn(70, 50)
    expected = F.kl_div(logits[1:].log_softmax(-1), logits[:-1].softmax(-1), reduction="batchmean")
    assert mean_divergence(logits[1:], logits[:-1]) == pytest.approx(float(expected), rel=1e-5)


def test_merge_command_and_generate_from_what_it_made(corpus, stage1, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_vlm(stage1 / "final_model")
    model.requires_grad_(False)
    model.llm = add_lora(model.llm, rank=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for parameter in model.llm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save(tmp_path / "run", tokenizer)
    merge = ["stage2_finetune/merge_lora.py", "--model", tmp_path / "run", "--output_dir", tmp_path / "merged"]
    assert run_command(*merge).stdout.strip() == str(tmp_path / "merged")
    same_logits((model.eval(), tokenizer), load_vlm(tmp_path / "merged"), 1e-4)
    features = next(corpus.features.glob("*.h5"))
    ask = ["--features", features, "--max_new_tokens", 8, "--num_beams", 1, "--device", "cpu"]
    reports = []
    for name in ("run", "merged"):
        assert call("inference.generate", monkeypatch, *ask, "--model", tmp_path / name) == 0
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] and reports[0].strip()


# What learns


def test_encoder_lora_is_refused_where_weights_are_sharded():
    args = SimpleNamespace(encoder_lora_rank=4, train_ve_first_epoch=False)
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="--encoder_lora_rank 4: adapters are merged .* use DDP"):
        open_stage1(args, None, sharded)


def test_stage_2_holds_out_whom_stage_1_held_out(capsys):
    def divide(had: dict, **flags: object) -> str:
        args = dict.fromkeys(("fold", "splits", "val_json", "val_fraction", "seed", "group_pattern"))
        args |= {"train_json": "a.json", "stage1_projector_path": "one/final_model"}
        had = args | had
        settings = VLMSettings(llm_name="tiny", patch_width=2, training=had)
        refuse_another_split(SimpleNamespace(**(args | flags)), settings)
        return capsys.readouterr().err

    assert divide({"fold": 1, "seed": 0}, fold=1, seed=0) == divide({"seed": 0}, train_json="b.json", seed=1) == ""
    with pytest.raises(ValueError, match="--fold 1: one/final_model was trained with --fold 0, on patients that"):
        divide({"fold": 0}, fold=1, train_json="b.json")
    for flags, before, now in (
        ({"seed": 1}, "with --seed 0", "with --seed 1"),
        ({"fold": 0}, "without --fold", "with --fold 0"),
        ({"val_fraction": 0.2}, "with --val_fraction 0.1", "with --val_fraction 0.2"),
    ):
        told = divide({"seed": 0, "val_fraction": 0.1}, **({"seed": 0, "val_fraction": 0.1} | flags))
        assert told.startswith(f"warning: stage 1 divided these records {before}, this stage divides them {now}; ")
        assert told.count("\n") == 1


def test_a_run_that_stops_early_says_so(capsys):
    state, epochs = RunState(), []
    for epoch in epochs_to_go(state, 5, 9, 2):
        epochs.append(epoch)
        state.step += 5
        state.note(-abs(epoch - 1))  # the second is the best
    told = "stopped after 4 of 9 epochs: none of the last 2 was better than epoch 2, whose model is best_model"
    assert epochs == [0, 1, 2, 3] and told in capsys.readouterr().err
    assert list(epochs_to_go(state, 5, 9, 2)) == [] and told in capsys.readouterr().err  # resumed
    assert list(epochs_to_go(state, 5, 9, 0)) == [4, 5, 6, 7, 8] and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("limits", "written"),
    [
        ((0.55, 0.95), ["0.6", "0.7", "0.8", "0.9"]),
        ((0.009, 0.3), ["0.01", "0.02", "0.05", "0.1", "0.2"]),
        ((0.0001, 1.0), ["0.0001", "0.001", "0.01", "0.1", "1"]),
    ],
)
def test_numbers_of_a_logarithmic_axis_do_not_crowd(limits, written):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 3.5)).subplots()
    axes.set(yscale="log", ylim=limits)
    plain_numbers(axes)
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    axes.figure.draw_without_rendering()
    shown = {
        tick.get_loc(): tick.label1.get_text() for tick in ticks if limits[0] <= round(tick.get_loc(), 9) <= limits[1]
    }
    assert [words for _, words in sorted(shown.items()) if words] == written


def test_curves_show_the_metric_and_plain_numbers(tmp_path, monkeypatch):
    from matplotlib import pyplot

    rates = {"lr": 1e-3, "lr_projector": 1e-2}
    lines = [{"step": step, "loss": 6.0 - step / 10, "supervised_tokens_per_s": 1, **rates} for step in range(1, 7)]
    for step, loss, rouge in ((2, 5.9, 0.1), (4, 5.7, 0.3), (6, 5.8, 0.2)):
        lines.append({"step": step, "val_loss": loss, "val_rouge_l": rouge, "val_median_rank": 7.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    losses, rates, metrics = figures[0].axes
    words = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (losses, rates, metrics)]
    assert losses.get_ylabel() == "loss per supervised token"
    assert words == [["training", "validation", "lowest, 5.7"], ["all else", "projector"], ["rouge_l", "highest, 0.3"]]
    assert "10" not in losses.yaxis.get_minor_formatter()(5.8) and list(tmp_path.glob("curves*.png"))


def test_losses_are_called_what_they_are():
    steps = {"loss per supervised token": {"supervised_tokens_per_s": 9.0}, "contrastive loss": {"logit_scale": 14.0}}
    steps |= {"cross-entropy per label": {"samples_per_s": 2.0}}
    runs = {
        name: [{"step": 1, "loss": 1.0, "lr": 0.1} | more, {"step": 1, "val_loss": 1}] for name, more in steps.items()
    }
    for name, lines in runs.items():
        assert curves_figure({"a": lines, "b": lines}).axes[0].get_ylabel() == loss_name(lines) == name
    assert curves_figure(runs).axes[0].get_ylabel() == "loss"


def test_last_layers_alone_learn():
    llm = make_llm()
    llm.requires_grad_(False)
    unfreeze_llm(llm, last_layers=2)
    learning = {name for name, parameter in llm.named_parameters() if parameter.requires_grad}
    assert learning == {
        name for name, _ in llm.named_parameters() if name.startswith(("model.layers.2.", "model.layers.3."))
    }
    with pytest.raises(ValueError, match="has 4 layers"):
        unfreeze_llm(llm, last_layers=5)


def test_parts_have_rates_of_their_own_and_keep_them_through_the_schedule():
    model, _ = make_model()
    rates = {"projector": 1e-2, "encoder": None}
    model.llm.requires_grad_(False)
    unfreeze_llm(model.llm, last_layers=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, rates), lr=1e-3)
    scheduler = make_scheduler(optimizer, 10, lr_scheduler_type="linear", warmup_ratio=0, lr_num_cycles=1)
    assert learning_rates_now(optimizer) == {"lr": 1e-3, "lr_projector": 1e-2}
    optimizer.step()
    scheduler.step()
    assert learning_rates_now(optimizer) == pytest.approx({"lr": 0.9e-3, "lr_projector": 0.9e-2})
    of_projector = {id(p) for p in model.projector.parameters()}
    for group in optimizer.param_groups:
        assert all((id(p) in of_projector) == ("part" in group) for p in group["params"])
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    learning = sum(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == learning


def test_encoder_lora_is_merged_when_saved_and_learns(corpus, tmp_path):
    encoder = load_encoder(str(corpus.encoder))
    pixels = torch.randn(2, 3, 32, 32)
    before = encoder.encode_patches(pixels).detach()
    add_encoder_lora(encoder, rank=2, alpha=4, dropout=0.0)
    assert torch.equal(encoder.encode_patches(pixels), before)  # B starts at zero
    assert all("lora_" in name for name, p in encoder.backbone.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in encoder.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    learned = encoder.encode_patches(pixels).detach()
    assert (learned - before).abs().max() > 0.01
    merged_encoder(encoder).save_pretrained(tmp_path)
    assert encoder.wears_lora
    opened = load_encoder(str(tmp_path))
    torch.testing.assert_close(opened.encode_patches(pixels), learned, atol=1e-5, rtol=0)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("way", [("--encoder_lora_rank", 2), ("--train_ve",)])
def test_a_run_that_adapts_the_encoder_keeps_what_it_learned(corpus, tmp_path, monkeypatch, way):
    images = ["--image_root", corpus.images, "--num_workers", 0, "--batch_size", 4, "--val_fraction", 0.3]
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--train_json", corpus.captions, "--vision_model_name", corpus.encoder, "--llm_name", corpus.llm, *images]
    assert call(STAGE1, monkeypatch, *flags, "--num_epochs", 1, "--output_dir", one) == 0
    flags = ["--train_json", corpus.captions, "--stage1_projector_path", one / "final_model", *images, *way]
    flags += ["--llm_training", "frozen", "--encoder_learning_rate", 1e-3, "--num_epochs", 2, "--output_dir", two]
    assert call(STAGE2, monkeypatch, *flags) == 0
    losses = [line["loss"] for line in log_lines(two)]
    whole = load_file(two / "final_model" / "encoder" / "model.safetensors")
    half = two / "checkpoints" / f"step_{len(losses) // 2}"
    assert call(STAGE2, monkeypatch, *flags, "--resume_from_checkpoint", half) == 0
    assert [line["loss"] for line in log_lines(two)] == losses
    resumed = load_file(two / "final_model" / "encoder" / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert log_lines(two)[0]["lr_encoder"] == 1e-3
    trainable = json.loads((two / "run.json").read_text())["trainable_parameters"]
    assert trainable["llm"].startswith("0 /") and not trainable["encoder"].startswith("0 /")
    base, own = (
        load_file(corpus.encoder / "model.safetensors"),
        load_file(two / "final_model/encoder/model.safetensors"),
    )
    assert base.keys() == own.keys()
    assert not torch.equal(base["blocks.0.attn.qkv.weight"], own["blocks.0.attn.qkv.weight"])
    if way == ("--train_ve",):
        return

    # The result, merged, has the last validation loss.
    ablation = log_lines(two, "image_ablation")[-1]["image_ablation"]
    flags[flags.index("--stage1_projector_path") + 1] = two / "final_model"
    flags[-1] = tmp_path / "three"
    flags += ["--encoder_learning_rate", 1e-30]  # learns nothing
    assert call(STAGE2, monkeypatch, *flags) == 0
    again = log_lines(tmp_path / "three", "image_ablation")[-1]["image_ablation"]
    assert again["right"] == pytest.approx(ablation["right"], abs=1e-5)


def test_what_an_output_does_not_depend_on_stops_learning():
    parts = {"used": torch.nn.Linear(3, 3), "frozen": torch.nn.Linear(3, 3), "pooler": torch.nn.Linear(3, 2)}
    network = torch.nn.ModuleDict(parts)
    network["frozen"].requires_grad_(False)
    output = network["frozen"](network["used"](torch.ones(1, 3)))
    assert freeze_unused(network, output) == ["pooler.weight", "pooler.bias"]
    assert [name for name, each in network.named_parameters() if each.requires_grad] == ["used.weight", "used.bias"]
    assert freeze_unused(network, output) == []
    with pytest.raises(ValueError, match="nothing of ModuleDict would learn: .* such as used.weight"):
        freeze_unused(network, torch.ones(1))  # which has no graph


class Pooled(torch.nn.Module):
    """A network with a pooler that its output does not depend on; as of a training run."""

    def __init__(self, learns: tuple[str, ...]):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.pooler = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        for name, each in self.named_parameters():
            each.requires_grad_(name.split(".")[0] in learns)
        self.optimizer = torch.optim.AdamW([each for each in self.parameters() if each.requires_grad])
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)

    def learned_state(self) -> dict[str, torch.Tensor]:
        return {name: each for name, each in self.named_parameters() if each.requires_grad}


def test_a_run_of_a_version_that_let_an_unused_pooler_learn_can_be_resumed(tmp_path):
    accelerator = Accelerator(cpu=True)
    old = Pooled(("used", "pooler"))
    old.used(torch.ones(1, 2)).sum().backward()
    old.optimizer.step()
    state = {"state": RunState(step=1), "identity": {}, "keep": 1}
    save_checkpoint(accelerator, tmp_path, old, old.optimizer, old.scheduler, **state)

    def resume(new):
        checkpoint = tmp_path / "checkpoints" / "step_1"
        load_checkpoint(accelerator, tmp_path, checkpoint, new, new.optimizer, new.scheduler)
        return new

    new = resume(Pooled(("used",)))
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())
    assert [int(new.optimizer.state[each]["step"]) for each in new.used.parameters()] == [1, 1]
    resume(Pooled(("used", "pooler")))
    with pytest.raises(ValueError, match=r"other weights learned then \(used.bias\)"):
        resume(Pooled(("pooler",)))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_convolutions_take_no_lora():
    import timm

    from image_encoder import ImageEncoder

    backbone = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    encoder = ImageEncoder(backbone, None, name="resnet10t", image_size=32, mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(ValueError, match="use --train_ve instead"):
        add_encoder_lora(encoder, rank=2, alpha=4, dropout=0.0)


# Refusals


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--llm_training", "lora", "--lora_target_modules", "all-linear"],
            "gets no gradient in training and yet acts",
        ),
        (["--llm_training", "lora", "--lora_target_modules", "q_proj", "correction_coefs"], "gets no gradient"),
        (["--llm_training", "lora", "--lora_target_modules", "query"], "has no such layer; it has "),
        (["--llm_training", "full", "--lora_target_modules", "q_proj"], "needs --llm_training lora or qlora"),
        (["--llm_training", "lora", "--unfreeze_last_layers", 1], "needs --llm_training full"),
        (["--llm_training", "full", "--unfreeze_last_layers", 9], "the language model has 4 layers"),
        (
            ["--llm_training", "qlora", "--mixed_precision", "fp16"],
            "fp16 overflows in Gemma-3n, over full and over 4-bit",
        ),
        (["--llm_training", "lora", "--mixed_precision", "fp16"], "fp16 overflows in Gemma-3n"),
        (["--projector_learning_rate", 1e-3], "needs --unfreeze_projection_layer"),
        (["--projector_ema", 0.9], "needs --unfreeze_projection_layer"),
        (["--encoder_learning_rate", 1e-3], "needs --train_ve or --encoder_lora_rank"),
        (["--encoder_lora_rank", 2], "--encoder_lora_rank needs images"),
        (["--early_stopping_patience", 1, "--val_fraction", 0], "--early_stopping_patience needs validation records"),
        (["--best_metric", "rouge_l", "--val_fraction", 0], "--best_metric rouge_l needs validation records"),
        (["--lr_num_cycles", 2], "needs --lr_scheduler_type cosine_with_restarts"),
        (
            ["--llm_training", "full", "--lora_rank", 4, "--lora_dropout", 0],
            "--lora_rank 4 needs --llm_training lora or qlora; --lora_dropout 0.0 needs --llm_training lora or qlora, "
            "or --encoder_lora_rank: add that, or leave the flags out",
        ),
        (
            ["--metric_records", 9],
            "--metric_records 9 needs --best_metric other than loss: add that, or leave the flag",
        ),
        (["--val_json", "v.json"], "--val_fraction 0.3 and --val_json v.json both say what validation is"),
    ],
)
def test_unsafe_or_contradictory_flags_are_one_line(corpus, stage1, tmp_path, monkeypatch, capsys, flags, message):
    status = call(STAGE2, monkeypatch, *stage2_flags(corpus, stage1, tmp_path / "run", *flags))
    told = capsys.readouterr().err
    assert status == 2 and message in told and "Traceback" not in told
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_reentrant_checkpointing_of_gemma3n_is_refused_and_of_others_not():
    with pytest.raises(ValueError, match="gradient of the visual tokens wrong"):
        make_model("gemma3n")[0].enable_gradient_checkpointing(use_reentrant=True)
    make_model("llama")[0].enable_gradient_checkpointing(use_reentrant=True)


def test_an_old_transformers_is_refused(corpus, monkeypatch):
    monkeypatch.setattr("language_model.transformers.__version__", "5.20.3")
    with pytest.raises(ValueError, match="transformers 5.20.3 is too old.*install 5.21 or later"):
        load_llm(str(corpus.llm))


# Schedule, smoothing, average, early stopping


def test_restarts_return_to_the_peak():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, 12, lr_scheduler_type="cosine_with_restarts", warmup_ratio=0, lr_num_cycles=3)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == [0, 4, 8]
    assert rates[3] < 0.2 and rates[7] < 0.2


def test_label_smoothing_equals_its_definition_and_spares_evaluation():
    model, tokenizer = make_model()
    batch = make_batch(tokenizer)
    plain = model.eval()(batch)
    model.label_smoothing = 0.1
    assert torch.equal(model(batch), plain)
    model.requires_grad_(True)
    inputs = model.embed(batch)
    with torch.no_grad():
        hidden = model.llm.get_decoder()(**inputs["conditioning"], attention_mask=inputs["attention_mask"])
        log_p = model.logits(hidden.last_hidden_state[:, :-1]).log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    log_p, targets = log_p[targets != -100], targets[targets != -100]
    nll = F.nll_loss(log_p, targets, reduction="none")
    smoothed = 0.9 * nll - 0.1 * log_p.mean(-1)
    model.training = True  # of the whole, not of its layers, whose dropout and clamps are not of interest here
    torch.testing.assert_close(model(batch), smoothed, atol=1e-5, rtol=1e-5)


def test_projector_average_follows_its_definition_and_leaves_the_weights():
    model, _ = make_model(token_reducer="perceiver")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="--unfreeze_projection_layer"):
        begin_average(model, 0.9)
    model.unfreeze_visual_parts()
    begin_average(model, 0.9)
    name, weight = next(iter(model.visual_parameters().items()))
    expected = weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            weight.add_(1.0)
        update_average(model, 0.5, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(model.projector_average[name], expected)
    own = weight.detach().clone()
    with averaged(model):
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), own)
    assert f"projector_average.{name}" in model.learned_state()


def test_a_run_with_every_option_resumes_bit_for_bit_and_saves_the_average(corpus, tmp_path, monkeypatch):
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--llm_name", corpus.llm]
    flags += ["--num_visual_tokens", 8, "--num_workers", 0, "--learning_rate", 0.02, "--num_epochs", 2]
    flags += ["--batch_size", 4, "--val_fraction", 0.3, "--keep_checkpoints", 10, "--output_dir", tmp_path / "run"]
    flags += ["--projector_ema", 0.8, "--label_smoothing", 0.1, "--best_metric", "rouge_l", "--metric_records", 3]
    flags += ["--lr_scheduler_type", "cosine_with_restarts", "--lr_num_cycles", 2, "--max_answer_tokens", 12]
    assert call(STAGE1, monkeypatch, *flags) == 0
    steps, evaluations = log_lines(tmp_path / "run"), log_lines(tmp_path / "run", "val_loss")
    assert all(0 <= line["val_rouge_l"] <= 1 for line in evaluations) and len(evaluations) == 2
    final = tmp_path / "run" / "final_model" / "projector" / "model.safetensors"
    whole = load_file(final)
    last = load_file(tmp_path / "run" / "checkpoints" / f"step_{len(steps)}" / "trainable.safetensors")
    for name, value in whole.items():
        if name.startswith("projector."):
            assert torch.equal(value, last[f"projector_average.{name}"]) and not torch.equal(value, last[name])
    half = tmp_path / "run" / "checkpoints" / f"step_{len(steps) // 2}"
    assert call(STAGE1, monkeypatch, *flags, "--resume_from_checkpoint", half) == 0
    assert [line["loss"] for line in log_lines(tmp_path / "run")] == [line["loss"] for line in steps]
    assert log_lines(tmp_path / "run", "val_loss") == evaluations
    assert all(torch.equal(value, whole[name]) for name, value in load_file(final).items())
    assert len(log_lines(tmp_path / "run", "image_ablation")) == 1


def test_early_stopping_ends_the_run_and_a_resumed_one_does_not_go_on(corpus, tmp_path, monkeypatch, capsys):
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--llm_name", corpus.llm]
    flags += ["--num_visual_tokens", 8, "--num_workers", 0, "--learning_rate", 1e-30, "--num_epochs", 9]
    flags += ["--batch_size", 8, "--val_fraction", 0.3, "--output_dir", tmp_path / "run", "--image_ablation_records", 0]
    flags += ["--early_stopping_patience", 2]
    assert call(STAGE1, monkeypatch, *flags) == 0
    assert len(log_lines(tmp_path / "run", "val_loss")) == 3  # the first is the best
    assert not log_lines(tmp_path / "run", "image_ablation")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert "\nleft out records: 0\n" in capsys.readouterr().err  # on a line of its own, before the bar
    assert call(STAGE1, monkeypatch, *flags, "--resume_from_checkpoint", "latest") == 0
    told, result = capsys.readouterr(), tmp_path / "run" / "final_model"
    steps = log_lines(tmp_path / "run")[-1]["step"]
    assert f"{tmp_path / 'run'} is finished, after {steps} steps; its result is {result}\n" in told.err
    assert told.out == f"{result}\n"
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    flags[flags.index("--image_ablation_records") + 1] = 4  # which it has yet to do
    assert call(STAGE1, monkeypatch, *flags, "--resume_from_checkpoint", "latest") == 0
    assert "is finished" not in capsys.readouterr().err and log_lines(tmp_path / "run", "image_ablation")
    assert len(log_lines(tmp_path / "run", "val_loss")) == 3
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["steps_taken"]
        == log_lines(tmp_path / "run")[-1]["step"]
    )


def test_a_run_is_finished_at_its_last_step_with_the_same_flags_for_the_end(tmp_path):
    flags = {"resume_from_checkpoint": "latest", "early_stopping_patience": 0, "image_ablation_records": 9}

    def write(**facts: object) -> None:
        (tmp_path / "run.json").write_text(json.dumps({"arguments": flags} | facts))

    assert finished_line(tmp_path, 5, flags) is None  # begun by nobody
    write(steps_taken=5)
    assert finished_line(tmp_path, 5, flags) is None  # no result
    (tmp_path / "final_model").mkdir()
    assert finished_line(tmp_path, 5, flags).startswith(f"{tmp_path} is finished, after 5 steps; its result is ")
    for step, other in ((4, {}), (5, {"early_stopping_patience": 2}), (5, {"resume_from_checkpoint": None})):
        assert finished_line(tmp_path, step, flags | other) is None
    write()  # killed while it was resumed
    assert finished_line(tmp_path, 5, flags) is None


def test_the_best_score_is_remembered():
    state = RunState()
    assert [state.note(score) for score in (0.2, 0.1, 0.2, 0.3)] == [True, False, False, True]
    assert state.evaluations_since_best == 0
    assert [stops_early(n, 2) for n in (0, 1, 2, 3)] == [False, False, True, True]
    assert not stops_early(100, 0)


def test_greedy_answers_are_those_of_inference():
    model, tokenizer = make_model(seed=2)
    model.label_smoothing = 0.3
    batch = make_batch(tokenizer, sizes=(5, 8, 3, 7))
    ours = greedy_answers(model, batch, stop_ids=[1, 4], max_new_tokens=9)
    theirs = generate_answers(model, batch, stop_ids=[1, 4], num_beams=1, max_new_tokens=9)
    assert ours == [answer.token_ids for answer in theirs] and any(ours)


# Image ablation


@given(strategies.lists(strategies.tuples(strategies.integers(0, 4), strategies.integers(0, 6)), max_size=24))
@settings(max_examples=60, deadline=None)
def test_partners_are_others_with_other_texts_wherever_possible(pairs):
    texts, inputs = [text for text, _ in pairs], [image for _, image in pairs]
    partners = other_records(texts, inputs, seed=0)
    if len(set(texts)) < 2 or len(set(inputs)) < 2:
        assert partners is None
        return
    assert sorted(partners) == list(range(len(texts)))
    assert all(place != partner for place, partner in enumerate(partners))
    largest = max(map(texts.count, texts))
    if len(set(inputs)) == len(inputs):  # only texts are to be told apart
        alike = sum(texts[place] == texts[partner] for place, partner in enumerate(partners))
        assert alike <= max(0, 2 * largest - len(texts))


def test_the_check_tells_models_that_use_the_image_from_those_that_do_not(corpus, capsys):
    records = read_records(str(corpus.reports), features_dir=str(corpus.features))
    model, tokenizer = make_model("llama", num_visual_tokens=3)  # every slide has three: their number tells nothing
    model.settings.max_answer_tokens = 24
    data = ReportDataset.for_model(model, tokenizer, records, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        (batch,) = make_loader(data, RecordBatches(len(data), len(data)))
        model.train()
        model(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    accelerator = Accelerator(cpu=True)
    options = {"image_ablation_records": 20, "batch_size": 4, "num_workers": 0, "seed": 0}
    used = image_ablation(accelerator, model, tokenizer, records, **options)
    assert used.uses_image and used.shuffled > 1.03 * used.right and used.zero > used.right
    assert "DOES NOT" not in capsys.readouterr().err
    with torch.no_grad():
        for name, parameter in model.projector.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.zero_()  # every visual token is the same
    unused = image_ablation(accelerator, model, tokenizer, records, **options)
    assert unused.shuffled_over_right == pytest.approx(1, abs=1e-3) and not unused.uses_image
    assert "THIS MODEL DOES NOT USE THE IMAGE" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)


def test_comparison_of_lora_and_qlora(corpus, stage1, tmp_path, monkeypatch, capsys):
    flags = stage2_flags(corpus, stage1, tmp_path / "both", "--learning_rate", 1e-3, "--num_epochs", 1)
    assert call("stage2_finetune.compare_peft", monkeypatch, *flags) == 0
    rows = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert [row["method"] for row in rows] == ["lora", "qlora"]
    assert all(row["peak_memory_mb"] > 0 and row["train_seconds"] > 0 and row["final_val_loss"] > 0 for row in rows)
    assert rows[0]["trainable_parameters"] == rows[1]["trainable_parameters"]
    assert capsys.readouterr().out == (tmp_path / "both" / "comparison.md").read_text()
    assert (tmp_path / "both" / "comparison.csv").read_text().startswith("method,final_val_loss,")
    assert (tmp_path / "both" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_flags_of_one_method_are_not_given_to_another():
    def idle(*flags: object) -> dict[str, list[str]]:
        parser = make_parser(None)
        parser.add_argument("--methods", nargs="+")
        add_arguments(parser)
        words = ["--train_json", "a", "--stage1_projector_path", "b", "--output_dir", "c", "--methods", *flags]
        return idle_by_method(parser.parse_args([*map(str, words)]))

    assert idle("lora", "full", "--lora_rank", 4, "--unfreeze_last_layers", 1) == {
        "lora": ["unfreeze_last_layers"],
        "full": ["lora_rank"],
    }
    assert idle("lora", "qlora", "lora", "--unfreeze_last_layers", 1) == {"lora": [], "qlora": []}  # which refuse it
    with pytest.raises(ValueError, match="--llm_training full: say with --methods what to compare"):
        idle("lora", "--llm_training", "full")


def test_flags_that_a_run_saved_can_be_given_again(corpus, stage1, tmp_path):
    parser = make_parser(None)
    add_arguments(parser)
    saved = tmp_path / "saved.yaml"
    args = parser.parse_args([*map(str, stage2_flags(corpus, stage1, tmp_path / "run", "--llm_training", "full"))])
    saved.write_text(json.dumps(flags_of(args)))
    again = parser.parse_args(["--config", str(saved)])
    assert flags_of(again) == flags_of(args) and again.lora_rank == 16
    refuse_contradictions(again, VLMSettings.read(stage1 / "final_model"), defaults_of(add_arguments))


def test_a_run_of_a_version_that_let_idle_flags_through_can_be_resumed(corpus, stage1, tmp_path):
    parser = make_parser(None)
    add_arguments(parser)
    flags = stage2_flags(corpus, stage1, tmp_path / "run", "--llm_training", "full", "--lora_rank", 4)
    flags += ["--resume_from_checkpoint", "latest", "--val_json", "v.json"]
    check = partial(refuse_contradictions, settings=VLMSettings.read(stage1 / "final_model"))
    args = parser.parse_args([*map(str, flags)])
    with pytest.raises(ValueError, match="--val_fraction 0.3 and --val_json"):  # a run that has not begun
        check(args, defaults=defaults_of(add_arguments))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"arguments": flags_of(args)}))
    check(args, defaults=defaults_of(add_arguments))
    args.lora_rank = 8
    with pytest.raises(ValueError, match="--lora_rank 8 needs"):
        check(args, defaults=defaults_of(add_arguments))


def test_a_comparison_does_not_take_a_failed_launch_for_a_run(corpus, stage1, tmp_path, monkeypatch, capsys):
    """A launcher of several processes leaves with 1 when they refuse, which a run does that left records out."""
    commands = []

    def launch(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("stage2_finetune.compare_peft.subprocess.run", launch)
    old = tmp_path / "both" / "lora" / "run.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"steps_taken": 3}')  # of an earlier comparison
    os.utime(old, (1, 1))
    flags = stage2_flags(corpus, stage1, tmp_path / "both", "--num_processes", 2)
    assert call("stage2_finetune.compare_peft", monkeypatch, *flags) == 2
    assert "with --llm_training lora left with 1; see above" in capsys.readouterr().err
    assert len(commands) == 1 and "--nproc_per_node=2" in commands[0]


def test_a_comparison_that_is_resumed_keeps_the_time_of_a_finished_run(tmp_path, monkeypatch):
    launch = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr("stage2_finetune.compare_peft.subprocess.run", lambda command, **_: launch)
    flags = {"llm_training": "lora", "output_dir": str(tmp_path / "lora")}
    with pytest.raises(ValueError, match="left with 0"):
        train(flags, 1, tmp_path)
    (tmp_path / "lora").mkdir()
    facts = tmp_path / "lora" / "run.json"
    facts.write_text('{"steps_taken": 3, "seconds_since_start_or_resume": 78.9}')
    os.utime(facts, (1, 1))
    assert train(flags, 1, tmp_path) == 78.9
