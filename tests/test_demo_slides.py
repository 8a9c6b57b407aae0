"""The demo's slides, that only their texture tells the class, and the encoder and language model trained on them."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.contact_sheet import ROW_INCHES, write_below
from demo.make_slides import draw_slide, list_slides
from demo.reports import CASES
from encoders import load_encoder
from evaluation.fields import organ
from slide_features import write_slide_coords
from stage0_tiling.slide import Slide
from stage0_tiling.tissue import find_tissue

ROOT = Path(__file__).resolve().parent.parent
NUM_TRAIN, NUM_TEST = 5, 2


def launch(script: str, *flags: str) -> subprocess.CompletedProcess:
    """Run one of the demo's commands."""
    return subprocess.run([sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True)


def make(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Launch make_slides.py."""
    return launch("demo/make_slides.py", "--output_dir", str(folder), *flags)


def digests(folder: Path) -> dict[str, str]:
    """Hash every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few slides, made by two processes."""
    folder = tmp_path_factory.mktemp("demo")
    done = make(folder, "--num_train", str(NUM_TRAIN), "--num_test", str(NUM_TEST))
    assert done.returncode == 0, done.stderr
    return folder


def test_files_and_reports(folder: Path) -> None:
    records = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "test")}
    assert [len(part) for part in records.values()] == [NUM_TRAIN, NUM_TEST]
    names = [record["id"] for part in records.values() for record in part]
    assert sorted(names) == sorted(path.name for path in (folder / "slides").glob("*.tiff"))
    assert sorted(Path(name).stem for name in names) == sorted(path.stem for path in (folder / "masks").glob("*.png"))
    assert {record["report"] for part in records.values() for record in part} <= {case.report for case in CASES}
    assert not list(folder.rglob("*.tmp")) + list(folder.rglob(".*"))


def test_openslide_reads_a_pyramid_with_mpp_and_the_mask_fits(folder: Path) -> None:
    for path in (folder / "slides").glob("*.tiff"):
        slide = openslide.OpenSlide(path)
        assert slide.level_count == 3 and slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert all(1536 <= side <= 2304 for side in slide.dimensions)
        mask = cv2.imread(str(folder / "masks" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(mask)) == {0, 255}
        assert (mask.shape[1] * 8, mask.shape[0] * 8) == slide.dimensions
        assert 0.05 < (mask > 0).mean() < 0.8
        image = np.asarray(slide.read_region((0, 0), 2, slide.level_dimensions[2]).convert("RGB"))
        tissue = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
        # Tissue is pink and violet: it takes more green than red, which glass, grey or white, does not.
        pinkness = image[..., 0].astype(int) - image[..., 1]
        assert pinkness[tissue].mean() > 25 > 8 > np.median(np.abs(pinkness[~tissue]))


def test_same_seed_same_files_for_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    done = make(tmp_path / "again", "--num_train", str(NUM_TRAIN), "--num_test", str(NUM_TEST), "--num_workers", "1")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "again") == digests(folder)


def test_second_run_keeps_slides_and_mends_what_is_missing(folder: Path) -> None:
    before = digests(folder)
    paths = sorted((folder / "slides").glob("*.tiff"))
    paths[0].unlink()
    kept = paths[1].stat().st_mtime_ns
    assert make(folder, "--num_train", str(NUM_TRAIN), "--num_test", str(NUM_TEST)).returncode == 0
    assert digests(folder) == before and paths[1].stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_train", str(NUM_TRAIN), "--num_test", str(NUM_TEST), "--seed", "1"), "were made with"),
        (("--num_train", "0"), "--num_train"),
    ],
)
def test_refusals(folder: Path, flags: tuple[str, ...], message: str) -> None:
    done = make(folder, *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_plan_is_balanced_and_patients_do_not_cross() -> None:
    plans = {split: list_slides(split, count) for split, count in (("train", 200), ("test", 48))}
    for plan in plans.values():
        per_class = np.bincount([case for _, case in plan], minlength=len(CASES))
        assert per_class.max() - per_class.min() <= 1
    patients = {split: {name.rsplit("_", 1)[0] for name, _ in plan} for split, plan in plans.items()}
    assert not patients["train"] & patients["test"]
    names = [name for plan in plans.values() for name, _ in plan]
    assert len(set(names)) == len(names)
    assert len(patients["train"]) < len(plans["train"])  # some patients have two slides, as in REG


def test_reports_are_distinct_and_of_several_organs() -> None:
    reports = [case.report for case in CASES]
    assert len(set(reports)) == len(reports) and 20 <= len(reports) <= 30
    assert all(6 <= len(report.split()) <= 30 for report in reports)
    assert {organ(case.report) for case in CASES} == {case.organ.lower() for case in CASES}


def test_only_texture_depends_on_the_class() -> None:
    """One generator state gives two classes the same slide but for what lies inside the tissue."""
    image, mask = draw_slide(0, np.random.default_rng(3))
    other, other_mask = draw_slide(13, np.random.default_rng(3))
    assert image.shape == other.shape and not np.array_equal(image, other)
    # The masks may differ by spaces that open at the edge, which are texture.
    assert (mask & other_mask).sum() / (mask | other_mask).sum() > 0.85
    outside = cv2.erode(1 - (mask | other_mask), np.ones((5, 5), np.uint8))
    outside = cv2.resize(outside, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    assert np.mean(image[outside] == other[outside]) > 0.99


def test_encoder_trains_and_opens(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "masks").glob("*.png"):
        tissue = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0
        ys, xs = np.mgrid[0 : tissue.shape[0] - 31 : 32, 0 : tissue.shape[1] - 31 : 32]
        inside = np.array([tissue[y + 16, x + 16] for y, x in zip(ys.ravel(), xs.ravel(), strict=True)])
        coords = np.stack([xs.ravel(), ys.ravel()], 1)[inside] * 8
        where = {"name": path.stem, "mpp": 2.0, "tile_size": 64, "overlap": 0, "patch_size_level0": 256}
        write_slide_coords(tmp_path / "coords" / f"{path.stem}.h5", coords, **where)
    flags = [
        "--data_dir",
        str(folder),
        "--coords_dir",
        str(tmp_path / "coords"),
        "--output_dir",
        str(tmp_path / "encoder"),
    ]
    done = launch("demo/train_encoder.py", *flags, "--num_epochs", "1", "--max_tiles", "4")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "encoder" / "accuracy.json").read_text())) == {
        "tiles",
        "organ",
        "diagnosis",
        "grade",
    }
    encoder = load_encoder(tmp_path / "encoder")
    assert encoder.image_size == 64
    tile = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    assert encoder.encode_tiles(encoder.transform(tile)[None]).shape == (1, encoder.width)


def test_llm_trains_and_opens(folder: Path, tmp_path: Path) -> None:
    flags = ["--train_json", str(folder / "train.json"), "--output_dir", str(tmp_path / "llm"), "--num_steps", "2"]
    done = launch("demo/train_llm.py", *flags, "--batch_size", "2", "--hidden_size", "32")
    assert done.returncode == 0 and "loss" in done.stdout, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert model.config.model_type == "gemma3n_text"
    # A placeholder for visual tokens needs an id that the vocabulary has and the per-layer table has not.
    assert len(tokenizer) <= model.config.vocab_size_per_layer_input < model.config.vocab_size
    assert all(layer.altup.correct_output_scale.abs().min() > 0 for layer in model.model.layers)
    report = json.loads((folder / "train.json").read_text())[0]["report"]
    assert tokenizer.decode(tokenizer(report)["input_ids"]) == report
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("script", "flags", "mend"),
    [
        ("demo/train_encoder.py", ("--coords_dir", "nowhere"), "tile.py"),
        ("demo/train_llm.py", ("--train_json", "nowhere.json"), "make_slides.py"),
    ],
)
def test_missing_input_is_refused(script: str, flags: tuple[str, ...], mend: str) -> None:
    done = launch(script, *flags)
    assert done.returncode == 2 and "nowhere" in done.stderr and mend in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_stage0_finds_the_tissue_of_every_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert make(tmp_path, "--num_train", str(len(CASES)), "--num_test", "1").returncode == 0
    ious = {}
    for path in sorted((tmp_path / "slides").glob("*.tiff")):
        exact = cv2.imread(str(tmp_path / "masks" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED) > 0
        with Slide(path) as slide:
            found = find_tissue(slide, slide.pixel_size()).mask.astype(np.uint8)
        found = cv2.resize(found, exact.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
        ious[path.stem] = (found & exact).sum() / (found | exact).sum()
    mean, worst = np.mean(list(ious.values())), min(ious, key=ious.get)
    with capsys.disabled():
        print(f"\nmean IoU of tissue on {len(ious)} demo slides {mean:.3f}, worst {ious[worst]:.3f} ({worst})")
    assert mean >= 0.9
    assert ious[worst] >= 0.75


@pytest.mark.parametrize("num_lines", [1, 5, 12])
def test_reports_of_a_contact_sheet_stay_apart_and_in_their_row(num_lines):
    figure = Figure(figsize=(7, ROW_INCHES))
    axis = figure.add_axes((0, 0, 1, 1))
    report = "\n".join(["Urinary bladder, transurethral resection;"] * num_lines)
    write_below(axis, [("written", report, "black"), ("reference", report, "black")])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 4 and boxes[-1].y0 >= 0
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
