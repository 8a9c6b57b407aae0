"""Aligning encoders of images, slides and texts: pairs, retrieval, text models, whole runs, resumption, embeddings."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from encoders import load_encoder
from slide_encoders import load_slide_encoder
from slide_reports import Record, SampleKey
from stage0_encoder import train_contrastive
from stage0_encoder.alignment_model import load_alignment
from stage0_encoder.contrastive_step import refuse_batch_statistics
from stage0_encoder.pairs import Items, PairDataset, collate_pairs
from stage0_encoder.retrieval import read_zero_shot, retrieval_scores, zero_shot_scores
from stage0_encoder.text_encoder import load_text_encoder
from stage0_encoder.what_aligns import build_model
from tests.conftest import run_command, run_on_two

TRAIN, EMBED = "stage0_encoder/train_contrastive.py", "stage0_encoder/embed.py"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of a BERT, a SigLIP and a CLIP."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    from tests.tiny_models import make_text_model, make_tokenizer

    root = tmp_path_factory.mktemp("models")
    make_text_model(root / "bert")
    text = SMALL | {"vocab_size": 328, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    made = {
        "siglip": SiglipModel(
            SiglipConfig(
                text_config=text | {"max_position_embeddings": 24, "projection_size": 16},
                vision_config=vision,
            )
        ),
        "clip": CLIPModel(
            CLIPConfig(text_config=text | {"max_position_embeddings": 48}, vision_config=vision, projection_dim=8)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        make_tokenizer(chat=False).save_pretrained(root / name)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root / "clip")
    return root


def slide_flags(corpus, models) -> list:
    return [
        *(TRAIN, "--train_json", corpus.reports, "--features_dir", corpus.features, "--val_fraction", 0.3),
        *("--slide_encoder", "abmil", "--slide_width", 16, "--text_model", models / "bert", "--num_patches", 8),
        *("--embedding_width", 16, "--num_workers", 0, "--learning_rate", 0.003, "--num_epochs", 3),
    ]


@pytest.fixture(scope="module")
def slides(corpus, models, tmp_path_factory) -> Path:
    """A run of 3 epochs of 5 steps on slides, with a checkpoint in the middle of each epoch too."""
    output = tmp_path_factory.mktemp("slides") / "run"
    flags = [*slide_flags(corpus, models), "--batch_size", 4, "--save_steps", 3, "--keep_checkpoints", 20]
    done = run_command(*flags, "--output_dir", output)
    assert "waited for data in" in done.stderr
    best = r"best_model is of epoch \d, by recall_at_1; recall at 1 / 5 / 10 among \d texts and \d images or slides: "
    assert re.search(best + r"image to text 1\.000 / 1\.000 / 1\.000, text to image 1\.000", done.stderr)
    assert done.stdout.strip() == str(output / "final_model")
    return output


def log_lines(run: Path, key: str = "loss") -> list[dict]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in line]


def model_flags(models: Path, **changes) -> SimpleNamespace:
    flags = {
        **{"image_root": "images", "features_dir": None, "slide_encoder": None, "loss": "siglip"},
        **{"encoder": str(models / "siglip"), "text_model": str(models / "siglip"), "text_pooling": "auto"},
        **{"embedding_width": None, "max_text_tokens": 64, "num_patches": 8, "image_training": "full"},
        **{"text_training": "full", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0},
    }
    return SimpleNamespace(**flags | changes)


def record(name: str, inputs: tuple, answer: str) -> Record:
    return Record(name, tuple(map(Path, inputs)), "", answer, name)


# Pairs


def test_each_image_of_a_record_is_an_item_and_texts_are_told_apart_by_their_words():
    records = [
        record("a", ("1.png", "2.png"), "Breast;  carcinoma"),
        record("b", ("3.png",), "breast;\n carcinoma"),
        record("c", ("3.png",), "No tumour"),
    ]
    items = Items.of(records)
    assert items.records.tolist() == [0, 0, 1, 2] and items.inputs.tolist() == [0, 1, 0, 0]
    assert items.texts.tolist() == [0, 0, 0, 1]
    assert items.cases.tolist() == [0, 0, 1, 1]  # the same image in two records is one case


def slide_dataset(corpus, models, **changes) -> PairDataset:
    paths = sorted(corpus.features.iterdir(), key=lambda path: -path.stat().st_size)[:4]
    records = [record(path.stem, (path,), f"Report {place}") for place, path in enumerate(paths)]
    tokens = load_text_encoder(models / "bert").tokens(32)
    return PairDataset(records, Items.of(records), tokens, **({"num_patches": 3} | changes))


def test_patches_of_a_slide_are_drawn_anew_each_epoch_and_evenly_in_validation(corpus, models):
    train, val = slide_dataset(corpus, models, seed=0), slide_dataset(corpus, models)
    drawn = [[train[SampleKey(0, epoch, True)]["cells"].tolist() for epoch in range(6)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len({str(cells) for cells in drawn[0]}) > 3
    assert all(len(cells) == 3 and cells == sorted(cells, key=lambda cell: cell[::-1]) for cells in drawn[0])
    assert val[SampleKey(0, 0, True)]["cells"].tolist() == val[SampleKey(0, 1, True)]["cells"].tolist()


def test_a_slide_that_cannot_be_read_gives_its_place_away_and_does_not_count(corpus, models, tmp_path, capsys):
    data = slide_dataset(corpus, models)
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    data.records[1] = record("bad", (tmp_path / "bad.h5",), "Report")
    samples = [data[SampleKey(place, 0, True)] for place in (0, 1)]
    assert "left out of epoch 1: bad" in capsys.readouterr().err
    batch = collate_pairs(samples, data.tokens)
    assert batch["is_valid"].tolist() == [True, False] and batch["is_bad"].tolist() == [False, True]
    assert batch["items"].tolist() == [0, 2]


# Retrieval


def test_recall_counts_every_right_answer_and_each_text_once():
    angles = torch.tensor([0.0, 0.4, 1.0, 2.0])
    images = torch.stack([angles.cos(), angles.sin()], dim=1)
    turned = torch.tensor([0.1, 0.1, 1.8, 0.6])  # the first two items have one text
    texts = torch.stack([turned.cos(), turned.sin()], dim=1)
    scores = retrieval_scores(images, texts, torch.arange(4), torch.tensor([0, 0, 1, 2]))
    # Image 0 and its text: nearest. Image 1 at 0.4: text 2 at 0.6 is nearer than its own at 0.1. Image 2 at 1.0: text 2
    # (0.6) before its own at 1.8. Image 3 at 2.0: text 1 (1.8) first, then text 2, its own.
    assert scores["image_to_text_recall_at_1"] == 1 / 4
    assert scores["image_to_text_recall_at_5"] == 1
    # Text 0: image 0 is first. Text 1 (1.8): image 3 before image 2. Text 2 (0.6): image 1 first, image 3 is last.
    assert scores["text_to_image_recall_at_1"] == 1 / 3
    assert scores["recall_at_1"] == pytest.approx((1 / 4 + 1 / 3) / 2)


def test_recall_is_that_of_a_plain_search():
    rng = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(60, 4, generator=rng), dim=-1) for _ in range(2))
    cases, numbers = torch.randint(0, 45, (60,), generator=rng), torch.randint(0, 20, (60,), generator=rng)
    first = {number: place for place, number in reversed(list(enumerate(numbers.tolist())))}
    texts = texts[[first[number] for number in numbers.tolist()]]
    belong = {(case, number) for case, number in zip(cases.tolist(), numbers.tolist(), strict=True)}
    found = retrieval_scores(images, texts, cases, numbers)
    for k in (1, 5, 10):
        hits = []
        for image in range(60):
            order = sorted(first, key=lambda number: -float(images[image] @ texts[first[number]]))
            hits.append(any((int(cases[image]), number) in belong for number in order[:k]))
        assert found[f"image_to_text_recall_at_{k}"] == pytest.approx(np.mean(hits))
        hits = []
        for number, place in first.items():
            order = sorted(range(60), key=lambda image: -float(images[image] @ texts[place]))
            hits.append(any((int(cases[image]), number) in belong for image in order[:k]))
        assert found[f"text_to_image_recall_at_{k}"] == pytest.approx(np.mean(hits))


def test_embeddings_that_are_all_alike_find_nothing():
    alike = torch.ones(20, 1)
    scores = retrieval_scores(alike, alike, torch.arange(20), torch.arange(20))
    assert scores["recall_at_1"] == scores["recall_at_10"] == 0


def test_zero_shot_accuracy_is_balanced_over_the_classes_that_occur():
    labels = {"a": "benign", "b": "benign", "c": "benign", "d": "tumour"}
    scores = zero_shot_scores(["benign", "benign", "tumour", "tumour", "benign"], ["a", "b", "c", "d", "e"], labels)
    assert scores["zero_shot_accuracy"] == 3 / 4
    assert scores["zero_shot_balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert zero_shot_scores(["benign"], ["e"], labels) == {}


@pytest.mark.parametrize(
    ("prompts", "labels", "message"),
    [
        ("[", "id,label\n", "no JSON"),
        ('{"one": "a"}', "id,label\n", "at least two classes"),
        ('{"one": "a", "two": []}', "id,label\n", "'two' needs a prompt"),
        ('{"one": "a", "two": "b"}', "name\n", "columns id and label"),
        ('{"one": "a", "two": "b"}', "id,label\nx,three\n", "'three' is no class"),
    ],
)
def test_broken_classes_are_refused_in_one_line(prompts, labels, message, tmp_path):
    (tmp_path / "p.json").write_text(prompts)
    (tmp_path / "l.csv").write_text(labels)
    with pytest.raises(ValueError, match=message):
        read_zero_shot(tmp_path / "p.json", tmp_path / "l.csv")


# Encoders


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_published_pair_of_towers_keeps_its_space(name, models):
    from transformers import AutoModel

    places = {"encoder": str(models / name), "text_model": str(models / name)}
    model = build_model(model_flags(models, **places), torch.device("cpu"), None).eval()
    reference = AutoModel.from_pretrained(models / name).eval()
    tokens = model.text.tokens(64)
    ids, mask = tokens.pad([tokens.ids_of(text) for text in ("Breast, biopsy", "Stomach")])
    assert ids.shape[1] == (24 if name == "siglip" else mask.sum(1).max())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = {} if name == "siglip" else {"attention_mask": mask.long()}
    with torch.no_grad():
        found = model({"pixel_values": pixels, "input_ids": ids, "text_mask": mask})
        expected = reference(input_ids=ids, pixel_values=pixels, **masks)
        bias = found.bias if name == "siglip" else 0
        logits = found.log_scale.exp() * found.images @ found.texts.T + bias
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=0, atol=1e-5)


def test_poolings_do_not_see_padding(models):
    with pytest.raises(ValueError, match="no text model to open there"):
        load_text_encoder(models / "nothing")
    for pooling in ("pooler", "cls", "mean", "eos"):
        text = load_text_encoder(models / "bert", pooling)
        tokens = text.tokens(32)
        ids = [tokens.ids_of(each) for each in ("Lung", "Prostate, biopsy; acinar adenocarcinoma")]
        with torch.no_grad():
            together = text(*tokens.pad(ids))
            alone = torch.cat([text(*tokens.pad([each])) for each in ids])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["lora", "qlora"])
def test_adapters_are_merged_into_what_is_saved(way, models, tmp_path):
    ways = {"image_training": way, "text_training": way}
    model = build_model(model_flags(models, **ways), torch.device("cpu"), None)
    named = dict(model.named_parameters())
    learning = {name for name, parameter in named.items() if parameter.requires_grad}
    assert all("lora_" in name for name in learning - {"log_scale", "bias"}) and len(learning) > 10
    with torch.no_grad():
        for name in learning - {"log_scale", "bias"}:
            named[name].normal_(std=0.3)
    model.eval()
    model.save(tmp_path / "model")
    assert any("lora_" in name for name, _ in model.named_parameters())  # the model itself goes on with them
    opened = load_alignment(tmp_path / "model")
    tokens = model.text.tokens(32)
    ids, mask = tokens.pad([tokens.ids_of("Breast, biopsy")])
    batch = {"pixel_values": torch.randn(1, 3, 32, 32), "input_ids": ids, "text_mask": mask}
    with torch.no_grad():
        for theirs, ours in zip(opened(batch), model(batch), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        stage0 = load_encoder(tmp_path / "model" / "image_encoder").encode_tiles(batch["pixel_values"])
        torch.testing.assert_close(stage0, model.image.encode_tiles(batch["pixel_values"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "needs an image encoder"),
        ({"features_dir": "x"}, "and not both"),
        ({"text_model": "bert", "embedding_width": 0, "encoder": "tiny"}, "24 wide and the text encoder 16"),
    ],
)
def test_contradictions_are_refused(changes, message, corpus, models):
    places = {"bert": str(models / "bert"), "tiny": str(corpus.encoder)}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        build_model(model_flags(models, **changes), torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--text_training", "lora", "--slide_width", 8],
            "--slide_width 8 needs --slide_encoder abmil or longnet: add",
        ),
        (
            ["--lora_rank", 4, "--num_patches", 9],
            "--lora_rank 4 needs lora or qlora of an encoder; --num_patches 9 needs",
        ),
        (["--text_training", "frozen", "--text_learning_rate", 1], "needs --text_training other than frozen"),
        (["--embedding_width", 0, "--projection_learning_rate", 1], "needs --embedding_width other than 0"),
        (["--val_json", "v.json", "--val_fraction", 0.3], "both say what validation is"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message, monkeypatch, tmp_path):
    words = [TRAIN, "--train_json", "x.json", "--image_root", "x", "--encoder", "y", "--text_model", "z", *flags]
    monkeypatch.setattr("sys.argv", [*map(str, words), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=message):
        train_contrastive.main()


def test_chunks_are_refused_with_batch_normalisation():
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    encoder.name = "resnet"
    model = SimpleNamespace(image=encoder, text=torch.nn.Linear(1, 1))
    refuse_batch_statistics(model, None)
    with pytest.raises(ValueError, match="resnet has batch normalisation"):
        refuse_batch_statistics(model, 8)
    refuse_batch_statistics(SimpleNamespace(image=encoder.requires_grad_(False), text=model.text), 8)


# Whole runs


def test_a_run_leaves_what_the_other_stages_leave(slides):
    names = {path.name for path in slides.iterdir()}
    assert names == {"run.json", "log.jsonl", "curves.png", "checkpoints", "best_model", "final_model"}
    steps, evaluations = log_lines(slides), log_lines(slides, "val_loss")
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert {"lr", "data_wait_fraction", "logit_scale", "mean_positives", "samples_per_s"} <= set(steps[0])
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    assert {f"val_{way}recall_at_{k}" for way in ("", "image_to_text_", "text_to_image_") for k in (1, 5, 10)} <= set(
        evaluations[0]
    )
    assert evaluations[-1]["val_recall_at_1"] == 1  # the texture of a tiny slide tells its report
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {path.name for path in (slides / "final_model").iterdir()} == {
        *("alignment.json", "space.safetensors", "slide_encoder", "text_encoder")
    }
    assert not list(slides.glob("**/*.writing"))


def test_a_resumed_run_ends_with_the_same_bits(corpus, models, slides, tmp_path):
    """From a checkpoint in the middle of the second epoch; the slide encoder has dropout."""
    resumed = tmp_path / "run"
    shutil.copytree(slides, resumed)
    shutil.rmtree(resumed / "final_model")
    for folder in (resumed / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > 6:
            shutil.rmtree(folder)
    flags = [*slide_flags(corpus, models), "--batch_size", 4, "--save_steps", 3, "--keep_checkpoints", 20]
    run_command(*flags, "--output_dir", resumed, "--resume_from_checkpoint", "latest")
    assert [line["loss"] for line in log_lines(resumed)] == [line["loss"] for line in log_lines(slides)]
    for name in ("space.safetensors", "slide_encoder/model.safetensors", "text_encoder/model.safetensors"):
        ours, theirs = (load_file(run / "final_model" / name) for run in (resumed, slides))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    finished = run_command(*flags, "--output_dir", resumed, "--resume_from_checkpoint", "latest")
    assert f"{resumed} is finished, after 15 steps; its result is {resumed / 'final_model'}\n" in finished.stderr
    refused = run_command(
        *flags, "--output_dir", resumed, "--resume_from_checkpoint", "latest", "--loss", "clip", status=2
    )
    assert "loss was 'unicl' and is 'clip'" in refused.stderr and "Traceback" not in refused.stderr


def test_two_processes_and_chunks_learn_what_one_does(corpus, models, tmp_path):
    """Without dropout, whose draws differ between layouts; the text model's own pooler is left without a gradient."""
    flags = [*slide_flags(corpus, models), "--text_pooling", "mean", "--num_epochs", 2, "--loss", "multi_siglip"]
    flags[flags.index("abmil")] = "mean"
    at = flags.index("--slide_width")
    del flags[at : at + 2]
    layouts = {"one": [8], "chunks": [8, "--chunk_size", 3], "two": [4, "--chunk_size", 3]}

    def words(name: str) -> list:
        return [*flags, "--batch_size", *layouts[name], "--output_dir", tmp_path / name]

    run_command(*words("one"))
    run_command(*words("chunks"))
    assert "find_unused_parameters" not in run_on_two(*words("two"))
    learned = json.loads((tmp_path / "two" / "run.json").read_text())["trainable_parameters"]["text"].split(" / ")
    assert learned[0] != learned[1]  # the pooler is frozen
    lines = {name: log_lines(tmp_path / name) + log_lines(tmp_path / name, "val_loss") for name in layouts}
    for name in ("chunks", "two"):
        for key in ("loss", "grad_norm", "logit_scale", "mean_positives", "val_loss", "val_recall_at_1"):
            expected = [line[key] for line in lines["one"] if key in line]
            assert [line[key] for line in lines[name] if key in line] == pytest.approx(expected, rel=1e-4), (name, key)


def test_slide_encoder_and_embeddings_of_a_run_are_of_use(corpus, slides, tmp_path):
    opened = load_slide_encoder(slides / "final_model" / "slide_encoder")
    assert opened.width == 16
    run_command(
        *("stage0_tiling/encode_slides.py", "--features_dir", corpus.features, "--output_dir", tmp_path / "tokens"),
        *("--slide_encoder", slides / "final_model" / "slide_encoder"),
    )
    reports = json.loads(corpus.reports.read_text())
    organs = {row["id"]: row["report"].split(",")[0] for row in reports}
    prompts = {row["report"].split(",")[0]: [row["report"]] for row in reports}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{name},{organ}\n" for name, organ in organs.items()))
    done = run_command(
        *(EMBED, "--model", slides / "final_model", "--records", corpus.reports, "--features_dir", corpus.features),
        *("--output_dir", tmp_path, "--class_prompts", tmp_path / "prompts.json", "--num_workers", 0),
        *("--class_labels", tmp_path / "labels.csv", "--batch_size", 5),
    )
    scores = json.loads(done.stdout)
    arrays = np.load(tmp_path / "embeddings.npz")
    rows = (tmp_path / "items.csv").read_text().splitlines()
    assert arrays["images"].shape == arrays["texts"].shape == (22, 16) and len(rows) == 23
    assert rows[0] == "row,id,input,patient,case,text,class" and rows[1].startswith("0,PIT_01_00000_00.tiff,")
    np.testing.assert_allclose(np.linalg.norm(arrays["images"], axis=1), 1, atol=1e-5)
    assert scores["items"] == 22 and scores["zero_shot_balanced_accuracy"] > 0.9


def test_images_align_and_the_encoder_opens_in_stage_0(corpus, models, tmp_path):
    flags = [
        *(TRAIN, "--train_json", corpus.captions, "--image_root", corpus.images, "--encoder", corpus.encoder),
        *("--text_model", models / "bert", "--text_training", "frozen", "--embedding_width", 8, "--loss", "mil_nce"),
        *("--batch_size", 4, "--num_epochs", 1, "--num_workers", 0, "--mixed_precision", "bf16", "--val_fraction", 0.3),
    ]
    run_command(*flags, "--output_dir", tmp_path / "run")
    final = tmp_path / "run" / "final_model"
    assert not (final / "text_encoder").exists()  # a frozen text model is named, not copied
    encoder = load_encoder(final / "image_encoder")
    before = load_encoder(corpus.encoder)
    pixels = encoder.transform(Image.open(corpus.images / "0.png"))[None]
    with torch.no_grad():
        assert not torch.equal(encoder.encode_tiles(pixels), before.encode_tiles(pixels))
        embedded = load_alignment(final).embed_images({"pixel_values": pixels})
    assert embedded.shape == (1, 8) and embedded.norm() == pytest.approx(1, abs=1e-5)
    again = run_command(*flags, "--output_dir", tmp_path / "run", status=2)
    assert "--resume_from_checkpoint latest" in again.stderr
