"""Every projector, reducer and position code in the whole model: trains, saves, asks the question, knows the slide."""

import dataclasses
import importlib
import itertools
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from encoders import load_encoder
from language_model import fingerprint
from projectors import PROMPT_TOPK, REDUCERS, UNKNOWN_UM_PER_PX
from slide_features import read_slide_features, write_slide_features
from slide_reports import Record, ReportDataset, SampleKey, case_of_slides, collate, read_case
from slide_vlm import IGNORED_LABEL, VISUAL_PARTS
from tests.tiny_models import PATCH_WIDTH, REPORTS, make_model, make_sample
from vlm_loading import load_vlm

PROJECTORS = ("linear", "mlp2x_gelu", "mlp2x_gelu_gamma", "ln_mlp2x_gelu")


def train(model, batch, steps: int) -> list[float]:
    model.requires_grad_(False)
    for name in VISUAL_PARTS:
        getattr(model, name).requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(batch).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reducer", [*REDUCERS, PROMPT_TOPK])
def test_every_combination_trains_on_slides(reducer):
    for projector, codes in itertools.product(PROJECTORS, ("none", "sincos")):
        model, tokenizer = make_model("llama", reducer, 4, projector=projector, position_codes=codes)
        batch = collate([make_sample(tokenizer, REPORTS[i], n, seed=i) for i, n in enumerate((3, 9))])
        losses = train(model, batch, 5)
        assert losses[-1] < losses[0], (projector, codes, losses)


@pytest.mark.parametrize("projector, reducer", [("ln_mlp2x_gelu", "pixel_shuffle"), ("linear", "qformer")])
@pytest.mark.parametrize("codes", ["none", "sincos"])
def test_images_train_too(corpus, projector, reducer, codes):
    encoder = load_encoder(str(corpus.encoder))
    model, tokenizer = make_model("llama", reducer, 16, encoder=encoder, projector=projector, position_codes=codes)
    paths = [corpus.images / f"{i}.png" for i in range(2)]
    records = [Record(str(i), (path,), "", REPORTS[i], str(i)) for i, path in enumerate(paths)]
    data = ReportDataset.for_model(model, tokenizer, records)
    batch = collate([data[SampleKey(i, 0, True)] for i in range(2)])
    with torch.no_grad():
        _, mask = model.visual_tokens(batch)
    assert mask.sum(1).tolist() == [4 if reducer == "pixel_shuffle" else 16] * 2  # of 4 x 4 patches
    losses = train(model, batch, 5)
    assert losses[-1] < losses[0]


def test_identity_leaves_the_learning_to_position_codes():
    model, tokenizer = make_model("llama", "none", 4, projector="linear", position_codes="sincos")
    settings = dataclasses.replace(model.settings, projector="identity", patch_width=32)
    model = type(model)(model.llm, settings).eval()
    sample = make_sample(tokenizer, REPORTS[0], 4)
    sample["patch_tokens"] = [torch.randn(4, 32)]
    batch = collate([sample])
    assert model.device == torch.device("cpu")
    losses = train(model, batch, 5)
    assert losses[-1] < losses[0]


# The question


def question_model():
    return make_model("llama", PROMPT_TOPK, 3, projector="mlp2x_gelu_gamma")


def test_the_question_alone_decides_in_training_and_inference_alike():
    model, tokenizer = question_model()
    many, chosen = 24, {}
    for question in ("Which organ?", "What is the grade of the carcinoma?"):
        in_training = collate([make_sample(tokenizer, REPORTS[0], many, question=question)])
        in_inference = collate([make_sample(tokenizer, "", many, question=question)])
        in_batch = [make_sample(tokenizer, REPORTS[1], many, question="Is there any sign of malignancy here?")]
        in_batch = collate([make_sample(tokenizer, REPORTS[0], many, question=question), *in_batch])
        assert (in_inference["labels"] == IGNORED_LABEL).all()
        with torch.no_grad():
            tokens, mask = model.visual_tokens(in_training)
            assert mask.sum() == 3
            assert torch.equal(tokens, model.visual_tokens(in_inference)[0])
            torch.testing.assert_close(tokens[0], model.visual_tokens(in_batch)[0][0])
        chosen[question] = tokens
    assert not torch.equal(*chosen.values())


def test_chosen_tokens_are_those_closest_to_the_mean_embedding_of_the_question():
    model, tokenizer = question_model()
    question = "What is the grade of the carcinoma?"
    batch = collate([make_sample(tokenizer, REPORTS[0], 24, question=question)])
    with torch.no_grad():
        ids = torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"])
        asked = model.llm.get_input_embeddings()(ids).mean(0)
        visual = model.projector(batch["patch_tokens"][0])
        best = torch.cosine_similarity(visual, asked, dim=1).topk(3).indices.sort().values
        torch.testing.assert_close(model.visual_tokens(batch)[0][0], visual[best])


def test_each_slide_of_each_case_is_asked_its_own_question(corpus):
    model, tokenizer = make_model("gemma3n", PROMPT_TOPK, 6)
    paths = sorted(corpus.features.iterdir(), key=lambda path: -len(read_slide_features(path).coords))[:3]
    records = [
        Record("two", tuple(paths[:2]), "Which organ?", REPORTS[0], "a"),
        Record("one", tuple(paths[2:]), "Grade?", REPORTS[1], "b"),
    ]
    data = ReportDataset.for_model(model, tokenizer, records)
    samples = [data[SampleKey(i, 0, True)] for i in range(2)]
    with torch.no_grad():
        together = model(collate(samples))
        torch.testing.assert_close(together, torch.cat([model(collate([s])) for s in samples]), atol=1e-4, rtol=0)
        samples[0]["question_ids"], samples[1]["question_ids"] = samples[1]["question_ids"], samples[0]["question_ids"]
        assert (model(collate(samples)) - together).abs().max() > 1e-3


# Micrometres


def write_slide(path, scale: int, mpp0: float | None):
    rng = np.random.default_rng(0)
    coords = np.stack([np.arange(6) % 3, np.arange(6) // 3], axis=1) * 256 * scale
    features = rng.normal(size=(6, PATCH_WIDTH)).astype(np.float16)
    facts = {"name": path.stem, "encoder": "made-up", "mpp": 0.5, "tile_size": 256, "overlap": 0}
    write_slide_features(path, features, coords, **facts, patch_size_level0=256 * scale, level0_mpp=mpp0)


def test_a_slide_says_its_micrometres_from_its_file_and_from_memory(tmp_path):
    paths = tmp_path / "at_20x.h5", tmp_path / "at_40x.h5"
    write_slide(paths[0], 1, 0.5)
    write_slide(paths[1], 2, None)
    case = read_case(paths, 12, 12)
    assert case["um_per_px"].tolist() == [0.5, 0.25]
    slides = [read_slide_features(path) for path in paths]
    assert case_of_slides(slides, 12, 12)["um_per_px"].tolist() == [0.5, 0.25]
    torch.save(torch.randn(5, PATCH_WIDTH), tmp_path / "bare.pt")
    assert read_case([tmp_path / "bare.pt"], 5, 5)["um_per_px"].tolist() == [UNKNOWN_UM_PER_PX]

    model, tokenizer = make_model("llama", "none", 12, position_codes="sincos")
    torch.nn.init.normal_(model.position_codes.mixing.weight)
    sample = make_sample(tokenizer, REPORTS[0], 1) | case
    with torch.no_grad():
        tokens, _ = model.visual_tokens(collate([sample]))
        torch.testing.assert_close(tokens[0], tokens[1])  # the same tissue from two scanners
        tokens, _ = model.visual_tokens(collate([sample | {"um_per_px": torch.tensor([0.5, 0.5])}]))
        assert (tokens[0] - tokens[1]).abs().max() > 0.01


# Results


@pytest.mark.parametrize("reducer", ["qformer", PROMPT_TOPK])
def test_a_saved_model_opens_with_equal_loss(reducer, tmp_path):
    model, tokenizer = make_model("gemma3n", reducer, 4, projector="mlp2x_gelu_gamma", position_codes="sincos")
    model.llm.save_pretrained(tmp_path / "llm")
    model.settings.llm_name, model.settings.llm_fingerprint = str(tmp_path / "llm"), fingerprint(model.llm)
    batch = collate([make_sample(tokenizer, REPORTS[i], n, seed=i) for i, n in enumerate((3, 9))])
    train(model, batch, 2)
    model.save(tmp_path / "final_model", tokenizer)
    opened, _ = load_vlm(tmp_path / "final_model")
    assert opened.position_codes.mixing.weight.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(opened(batch), model.eval()(batch), atol=1e-6, rtol=0)


def test_results_of_before_position_codes_open(tmp_path):
    model, tokenizer = make_model("llama")
    model.llm.save_pretrained(tmp_path / "llm")
    model.settings.llm_name = str(tmp_path / "llm")
    model.llm.requires_grad_(False)
    model.save(tmp_path / "final_model", tokenizer)
    settings = json.loads((tmp_path / "final_model" / "vlm.json").read_text())
    del settings["position_codes"]
    (tmp_path / "final_model" / "vlm.json").write_text(json.dumps(settings))
    opened, _ = load_vlm(tmp_path / "final_model")
    assert opened.settings.position_codes == "none"


def run_here(monkeypatch, script: str, *flags: object) -> None:
    """Run a training or inference command in this process, where its imports are at hand."""
    monkeypatch.setattr("sys.argv", [script, *map(str, flags)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        assert importlib.import_module(script.removesuffix(".py").replace("/", ".")).main() == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_stage_2_and_inference_inherit_projector_reducer_and_codes(corpus, tmp_path, monkeypatch, capsys):
    data = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--num_workers", 0]
    data += ["--batch_size", 11, "--num_epochs", 1, "--learning_rate", 0.01]
    parts = ["--projector", "mlp2x_gelu_gamma", "--token_reducer", PROMPT_TOPK, "--position_codes", "sincos"]
    one, two = tmp_path / "one" / "final_model", tmp_path / "two" / "final_model"
    model = ["--num_visual_tokens", 5, "--llm_name", corpus.llm, "--output_dir", one.parent]
    run_here(monkeypatch, "stage1_projector/train.py", *data, *parts, *model)
    stage2 = ["--stage1_projector_path", one, "--llm_training", "lora", "--unfreeze_projection_layer"]
    run_here(monkeypatch, "stage2_finetune/train.py", *data, *stage2, "--output_dir", two.parent)
    settings = json.loads((two / "vlm.json").read_text())
    assert [settings[name] for name in ("projector", "token_reducer", "position_codes")] == parts[1::2]
    before, after = (load_file(folder / "projector" / "model.safetensors") for folder in (one, two))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"position_codes.mixing.weight", "projector.5.logit"} <= changed
    capsys.readouterr()
    answer = ["--features", next(corpus.features.iterdir()), "--question", "Which organ?", "--max_new_tokens", 4]
    run_here(monkeypatch, "inference/generate.py", "--model", two, *answer)
    assert capsys.readouterr().out.endswith("\n")


def test_stage_1_on_images_resolves_a_projector_that_reduces(corpus, tmp_path, monkeypatch):
    data = ["--train_json", corpus.captions, "--image_root", corpus.images, "--vision_model_name", corpus.encoder]
    flags = [*data, "--num_workers", 0, "--num_epochs", 1, "--llm_name", corpus.llm, "--output_dir", tmp_path / "run"]
    run_here(monkeypatch, "stage1_projector/train.py", *flags, "--projector", "pixel_shuffle")
    settings = json.loads((tmp_path / "run" / "final_model" / "vlm.json").read_text())
    assert (settings["projector"], settings["token_reducer"]) == ("ln_mlp2x_gelu", "pixel_shuffle")
    assert settings["training"]["projector"] == "pixel_shuffle"
