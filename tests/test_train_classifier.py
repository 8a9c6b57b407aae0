"""The classifier: labels, loss, own networks, the command on pictures, tiles and bags, exact resumption, results."""

import csv
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup

from encoders import load_encoder
from evaluation.fields import parse_report
from run_checkpoints import RunState
from slide_encoders import GatedAttention, load_slide_encoder
from stage0_encoder import train_classifier
from stage0_encoder.classification_scores import for_log, score_all, table
from stage0_encoder.classifier import Classifier, balanced_weights, own_cnn, own_vit
from stage0_encoder.classifier_data import collate, seeded
from stage0_encoder.encoder_run import is_over
from stage0_encoder.labels import UNLABELLED, label_of, read_label_table, read_labelled
from stage0_encoder.tile_files import montage
from stage0_encoder.waiting import TimedBatches
from tests.conftest import run_command, run_on_two
from tests.labelled_pictures import COLORS, make_pictures

TRAIN = "stage0_encoder/train_classifier.py"
TINY_VIT = ["--encoder", "vit", "--image_size", 16, "--vit_patch_size", 8, "--vit_width", 12, "--vit_depth", 1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of three colours with a table of labels, two of each patient."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def small_batch(num_labels: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples = [
        {
            "input": torch.randn(3, 16, 16, generator=generator),
            "labels": np.array(labels),
            "record": number,
            "counts": True,
            "is_bad": False,
        }
        for number, labels in enumerate([[0, 2], [1, UNLABELLED], [UNLABELLED, 0], [1, 1]])
    ]
    return collate(samples)


def small_classifier(**arguments) -> Classifier:
    torch.manual_seed(0)
    encoder = own_vit(image_size=16, patch_size=8, width=12, depth=1, num_heads=3)
    return Classifier(encoder, {"organ": ["a", "b"], "grade": ["1", "2", "3"]}, **arguments)


def test_labels_are_read_of_reports():
    prostate = parse_report("Prostate, biopsy;\n  Acinar adenocarcinoma, Gleason's score 8 (4+4), grade group 4")
    assert [label_of(prostate, name) for name in ("organ", "diagnosis", "grade", "gleason_score", "cin")] == [
        *("prostate", "acinar adenocarcinoma", "grade_group 4", "8"),
        None,
    ]
    bladder = parse_report("Urinary bladder, biopsy;\n  Non-invasive papillary urothelial carcinoma, low grade")
    assert label_of(bladder, "grade") == "who_grade low"


def test_a_patient_is_on_one_side_and_classes_are_those_of_training(pictures):
    reading = {"image_root": pictures, "val_fraction": 0.4, "seed": 0}
    train, val, classes = read_labelled(pictures / "labels.csv", None, ["organ"], **reading)
    assert classes == {"label": sorted(COLORS)}
    assert len(train.records) + len(val.records) == 24 and len(val.records) > 2
    assert not {record.group for record in train.records} & {record.group for record in val.records}
    with (pictures / "labels.csv").open() as file:
        truth = {row["id"]: row["label"] for row in csv.DictReader(file)}
    for cases in (train, val):
        assert [sorted(COLORS)[label] for label in cases.labels[:, 0]] == [truth[r.id] for r in cases.records]


def test_reports_give_several_labels_and_rare_classes_are_none(corpus):
    reading = {"features_dir": corpus.features, "val_fraction": 0.2, "seed": 0}
    train, _, classes = read_labelled(corpus.reports, None, ["organ", "grade"], **reading)
    assert classes["organ"] == ["breast", "lung", "prostate", "stomach"]
    assert classes["grade"] == ["grade_group 2", "nottingham_grade 2"]
    assert (train.labels[:, 1] == UNLABELLED).sum() > 0
    with pytest.raises(ValueError, match="two classes, but organ has 0"):
        read_labelled(corpus.reports, None, ["organ"], min_class_patients=99, **reading)
    with pytest.raises(ValueError, match="--labels colour: no field of reports"):
        read_labelled(corpus.reports, None, ["colour"], **reading)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a.png,\n", "line 2 has no label"),
        ("a.png,x\na.png,y\n", "line 3: id 'a.png' occurs a second time"),
        ("../a.png,x\n", "outside"),
        ("", "holds no rows"),
    ],
)
def test_broken_tables_are_refused(tmp_path, rows, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.csv").write_text("id,label\n" + rows)
    with pytest.raises(ValueError, match=message):
        read_label_table(tmp_path / "labels.csv", image_root=tmp_path / "images")


def test_tables_of_labels_from_a_spreadsheet(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.csv").write_text("id;label\na.png;Tumor, mäßig\n", encoding="utf-8-sig")
    (record,) = read_label_table(tmp_path / "labels.csv", image_root=tmp_path / "images")
    assert (record.id, record.answer) == ("a.png", "Tumor, mäßig")
    (tmp_path / "labels.csv").write_text("id;label\na.png;mäßig\n", encoding="cp1252")
    with pytest.raises(ValueError, match=r"labels\.csv: not in UTF-8 \(byte 16\); save it as UTF-8"):
        read_label_table(tmp_path / "labels.csv", image_root=tmp_path / "images")


def test_the_loss_is_cross_entropy_where_there_are_labels():
    classifier, batch = small_classifier().eval(), small_batch()
    logits = classifier.logits(batch)
    expected = sum(
        torch.nn.functional.cross_entropy(part, batch["labels"][:, 1 + number], reduction="sum")
        for number, part in enumerate(logits)
    )
    torch.testing.assert_close(classifier(batch).sum(), expected, rtol=1e-6, atol=1e-6)


def test_smoothing_and_weights_are_those_of_torch_and_scikit_learn():
    labels = torch.tensor([0, 1, 1, 1, 2, UNLABELLED])
    weights = balanced_weights(labels, 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels[:5].numpy())
    torch.testing.assert_close(weights.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    batch = small_batch()
    classifier = small_classifier(label_smoothing=0.2, class_weights=[torch.tensor([1.0, 3.0]), weights]).train()
    logits = classifier.logits(batch)
    expected = sum(
        torch.nn.functional.cross_entropy(
            part, batch["labels"][:, 1 + number], weight=weight, label_smoothing=0.2, reduction="sum"
        )
        for number, (part, weight) in enumerate(zip(logits, [torch.tensor([1.0, 3.0]), weights], strict=True))
    )
    torch.testing.assert_close(classifier(batch).sum(), expected, rtol=1e-5, atol=1e-5)


def test_mixup_mixes_labels_as_pictures():
    batch = small_batch()
    before = batch["pixels"].clone()
    np.random.seed(3)
    share = float(np.random.beta(0.8, 0.8))
    np.random.seed(3)
    mixup = Mixup(0.8, 0.0, label_smoothing=0.0)
    mixup._params_per_batch = lambda: (share, False)
    classifier = small_classifier(mixup=mixup).train()
    losses = classifier(batch).split(4)
    torch.testing.assert_close(batch["pixels"], share * before + (1 - share) * before.flip(0))
    for number, (found, logits) in enumerate(zip(losses, classifier.logits(batch), strict=True)):
        labels = batch["labels"][:, 1 + number]
        plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        swapped = torch.nn.functional.cross_entropy(logits, labels.flip(0), reduction="none")
        torch.testing.assert_close(found, share * plain + (1 - share) * swapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_own_networks_open_again_in_load_encoder_and_in_timm(tmp_path, kind):
    sizes = {"patch_size": 8, "width": 12, "depth": 2, "num_heads": 2}
    encoder = own_vit(image_size=32, **sizes) if kind == "vit" else own_cnn(image_size=32, width=4, depths=[1, 1, 1, 1])
    assert type(encoder.backbone).__name__ == ("VisionTransformer" if kind == "vit" else "ResNet")
    Classifier(encoder, {"organ": ["a", "b"]}).save(tmp_path / "model")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder.eval().encode_tiles(pixels)
        again = load_encoder(tmp_path / "model")
        assert torch.equal(again.encode_tiles(pixels), expected) and again.image_size == 32
        of_timm = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        assert torch.equal(of_timm(pixels), expected)
    head = load_file(tmp_path / "model" / "classifier.safetensors")
    assert head["head.weight"].shape == (2, encoder.width)


def test_a_frozen_encoder_stays_as_it_is_and_checkpoints_hold_what_learns():
    encoder = own_cnn(image_size=32, width=4, depths=[1, 1, 1, 1]).requires_grad_(False)
    classifier = Classifier(encoder, {"organ": ["a", "b"]})
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    classifier.train()(small_batch())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert set(classifier.learned_state()) == {"head.weight", "head.bias"}
    encoder.requires_grad_(True)
    classifier.begin_average(0.9)
    learned = classifier.learned_state()
    assert "encoder.backbone.bn1.running_mean" in learned and "average.encoder.backbone.conv1.0.weight" in learned
    assert not any("average" in name for name, _ in classifier.named_parameters())


def test_montage_puts_tiles_in_raster_order_on_white():
    tiles = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 4, 4, 3), dtype=np.uint8)
    picture = montage(tiles, 2)
    assert [int(picture[y, x, 0]) for y in (0, 4) for x in (0, 4)] == [0, 1, 2, 255]
    assert picture.shape == (8, 8, 3)
    drawn = montage(np.repeat(tiles, 4, axis=0), 2, np.random.default_rng(0))
    assert (drawn != 255).all()


def test_augmentation_leaves_the_random_generators_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded([1, 2, 3]):
        first = torch.rand(2), np.random.rand()
    assert torch.equal(torch.rand(3), expected)
    with seeded([1, 2, 3]):
        assert torch.equal(torch.rand(2), first[0]) and np.random.rand() == first[1]


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 3, 40), np.full(40, UNLABELLED)], axis=1)
    labels[:5, 0] = UNLABELLED
    probabilities = [rng.random((40, 3)), rng.random((40, 2))]
    scores = score_all(probabilities, labels, {"organ": ["a", "b", "c"], "grade": ["1", "2"]})
    true, predicted = labels[5:, 0], probabilities[0][5:].argmax(1)
    assert scores["organ"]["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    assert list(scores["organ"]["f1"].values()) == pytest.approx(list(f1_score(true, predicted, average=None)))
    assert np.sum(scores["organ"]["confusion"]) == 35 and scores["grade"]["n"] == 0
    assert for_log(scores)["val_balanced_accuracy"] == scores["organ"]["balanced_accuracy"]


def test_the_table_shows_classes_that_occur_beside_chance():
    labels = np.array([[0], [0], [1]])
    probabilities = [np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.1, 0.9, 0.0]])]
    lines = table(score_all(probabilities, labels, {"organ": ["a", "b", "c"]})).splitlines()
    assert lines[1].split() == ["organ", "3", "0.7500", "0.5000", "0.6667"]
    assert [line.split()[:2] for line in lines[2:4]] == [["a", "2"], ["b", "1"]]
    assert lines[4].strip() == "(1 more class has no validation record)"


def test_the_end_for_want_of_a_better_score_is_said(capsys):
    accelerator, args = Mock(is_main_process=True), Mock(early_stopping_patience=2, best_metric="loss")
    state = RunState()
    for score, over in ((0.5, False), (0.4, False), (0.5, True)):
        state.note(score)
        assert is_over(accelerator, args, state) is over
    assert capsys.readouterr().err == "\nstopped early: 2 epochs without a better loss\n"


def test_waiting_is_a_share_of_the_time(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 4.0, 4.0, 7.0, 8.0])  # made, asked, got, step ends, asked, got, step ends
    monkeypatch.setattr("stage0_encoder.waiting.time.perf_counter", lambda: next(clock))
    timed = TimedBatches([1, 2])
    batches = iter(timed)
    assert timed.told() == ""
    next(batches)
    assert timed.fraction_since_last() == 0.25
    next(batches)
    assert timed.fraction_since_last() == 0.75
    assert timed.fraction == 0.5
    assert timed.told() == "waited for data in 50.0% of the time of training; more --num_workers may help"


@pytest.fixture
def train_here(monkeypatch, capsys):
    """Run the command in this process: the libraries are here already."""

    def run_here(*words: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [TRAIN, *map(str, words)])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train_classifier.main() == status
        AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().err

    return run_here


def train(pictures: Path, output: Path, *flags: object, status: int = 0):
    common = ["--train_json", pictures / "labels.csv", "--image_root", pictures, "--batch_size", 3]
    common += ["--num_workers", 0, "--val_fraction", 0.25, "--output_dir", output]
    return run_command(TRAIN, *common, *flags, status=status)


def test_a_run_learns_colours_and_resumes_exactly(pictures, tmp_path):
    flags = [*TINY_VIT, "--num_epochs", 3, "--learning_rate", 0.02, "--mixup", 0.2, "--ema_decay", 0.8]
    flags += ["--save_steps", 4, "--keep_checkpoints", 99, "--dropout", 0.1, "--gradient_accumulation_steps", 1]
    whole = tmp_path / "whole"
    train(pictures, whole, *flags)
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["label"]["balanced_accuracy"] > 0.9
    for name in ("predictions.csv", "confusion_label.png", "curves.png", "run.json", "best_model/classifier.json"):
        assert (whole / name).is_file(), name
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert {"lr", "data_wait_fraction", "grad_norm"} <= lines[0].keys()
    assert "supervised_tokens_per_s" not in lines[0]
    begun = tmp_path / "begun"
    shutil.copytree(whole, begun)
    shutil.rmtree(begun / "final_model")
    train(pictures, begun, *flags, "--resume_from_checkpoint", begun / "checkpoints" / "step_8")
    for name in ("model.safetensors", "classifier.safetensors"):
        again, expected = (load_file(run / "final_model" / name) for run in (begun, whole))
        assert all(torch.equal(again[key], value) for key, value in expected.items())


def test_what_two_processes_evaluate_is_what_is_saved(pictures, tmp_path):
    """Running statistics of batch normalisation are each process's own, those of the first are saved."""
    flags = ["--train_json", pictures / "labels.csv", "--image_root", pictures, "--batch_size", 4, "--num_workers", 0]
    flags += ["--encoder", "cnn", "--image_size", 32, "--cnn_width", 4, "--cnn_depths", 1, 1, 1, 1]
    flags += ["--val_fraction", 0.5, "--num_epochs", 1, "--ema_decay", 0.5, "--learning_rate", 0.02]
    run_on_two(TRAIN, *flags, "--output_dir", tmp_path / "run")
    encoder = load_encoder(tmp_path / "run" / "best_model").eval()
    head = load_file(tmp_path / "run" / "best_model" / "classifier.safetensors")
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        with torch.no_grad():
            encoded = encoder.encode_tiles(encoder.transform(Image.open(pictures / row["id"]).convert("RGB"))[None])
            logits = torch.nn.functional.linear(encoded, head["head.weight"], head["head.bias"])
        assert logits.softmax(dim=1).max() == pytest.approx(float(row["label_probability"]), abs=2e-4), row["id"]
    assert len(rows) == 12


def test_a_named_encoder_is_tuned_with_lora_and_a_broken_picture_left_out(corpus, pictures, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    (images / "3.png").write_bytes(b"no picture")
    flags = ["--encoder", corpus.encoder, "--encoder_training", "lora", "--lora_rank", 2, "--num_epochs", 1]
    done = train(images, tmp_path / "run", *flags, status=1)
    assert "3.png" in done.stderr and "1 record left out" in done.stderr
    tuned, base = load_encoder(tmp_path / "run" / "final_model"), load_encoder(corpus.encoder)
    assert tuned.backbone.state_dict().keys() == base.backbone.state_dict().keys()
    assert tuned.fingerprint() != base.fingerprint()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not run["trainable_parameters"]["encoder"].startswith("0 ")


def test_bags_give_a_slide_encoder(corpus, tmp_path, train_here):
    words = ["--train_json", corpus.reports, "--input", "bags", "--features_dir", corpus.features]
    words += ["--labels", "organ", "--bag_width", 16, "--bag_attention_width", 8, "--num_epochs", 3]
    words += ["--val_fraction", 0.3, "--num_workers", 0, "--batch_size", 1, "--learning_rate", 0.01]
    train_here(*words, "--output_dir", tmp_path / "run")
    encoder = load_slide_encoder(tmp_path / "run" / "final_model")
    assert isinstance(encoder, GatedAttention) and encoder.width == 16
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["organ"]["balanced_accuracy"] > 0.6


def test_montages_are_made_of_the_slides_tiles(tmp_path, train_here, monkeypatch):
    from slide_features import write_slide_coords
    from tests.slides import write_pyramid

    rows = ["id,label"]
    for number in range(8):
        name = list(COLORS)[number % 2]
        picture = np.full((96, 96, 3), COLORS[name], dtype=np.uint8)
        write_pyramid(tmp_path / "slides" / f"s{number}.tiff", picture, mpp=0.5, num_levels=1)
        grid = np.array([(x, y) for y in (0, 32, 64) for x in (0, 32, 64)])
        facts = {"mpp": 0.5, "tile_size": 32, "overlap": 0, "patch_size_level0": 32}
        write_slide_coords(tmp_path / "coords" / f"s{number}.h5", grid, name=f"s{number}", **facts)
        rows.append(f"s{number}.tiff,{name}")
    rows.append("s9.tiff,reddish")  # of which there is no slide
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    words = ["--train_json", tmp_path / "labels.csv", "--input", "montage", "--slides", tmp_path / "slides"]
    words += ["--coords_dir", tmp_path / "coords", "--max_tiles", 4, "--montage_side", 2, "--num_epochs", 1]
    words += ["--val_fraction", 0.25, "--num_workers", 0, "--batch_size", 4, *TINY_VIT]
    assert "s9.tiff" in train_here(*words, "--output_dir", tmp_path / "run", status=1)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["train_examples"] == run["train_records"]
    tiles = np.load(next((tmp_path / "run" / "tiles").glob("s0-*.npy")))
    assert tiles.shape == (4, 32, 32, 3) and abs(tiles[0, 16, 16].astype(int) - COLORS["reddish"]).max() < 12
    assert load_encoder(tmp_path / "run" / "final_model").image_size == 16
    monkeypatch.setattr(sys, "argv", [str(word) for word in (TRAIN, *words, "--output_dir", tmp_path / "other")])
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        sys.argv += ["--encoder", str(tmp_path / "missing")]
        train_classifier.main()
    assert not (tmp_path / "other" / "tiles").exists()  # which may take hours to read


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "tiles"], "--input tiles needs --slides"),
        (["--image_root", "x", "--features_dir", "y"], "--features_dir is not for --input images"),
        (["--image_root", "x", "--encoder_training", "lora"], "needs published weights"),
        (["--input", "bags", "--features_dir", "x", "--mixup", "1"], "mix pictures"),
        (["--image_root", "x", "--lora_rank", "4"], "--lora_rank 4 needs --encoder_training lora: add that, or leave"),
        (
            ["--encoder", "x", "--encoder_training", "frozen", "--encoder_learning_rate", "1", "--decay_epochs", "2"],
            "--encoder_learning_rate 1.0 needs --encoder_training full or lora; --decay_epochs 2 needs --lr_scheduler",
        ),
        (["--image_root", "x", "--splits", "s.csv", "--val_fraction", "0.3"], "both say what validation is"),
    ],
)
def test_contradicting_flags_are_refused(flags, message, monkeypatch, tmp_path):
    words = [TRAIN, "--train_json", "x.json", "--output_dir", str(tmp_path / "run"), *flags]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match=message):
        train_classifier.main()
    assert not (tmp_path / "run").exists()
