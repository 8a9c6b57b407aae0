"""The demo's slides: what they are, that they repeat, and that only their texture tells the class."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from demo.make_slides import draw_slide, list_slides
from demo.reports import CASES
from evaluation.fields import organ

ROOT = Path(__file__).resolve().parent.parent
NUM_TRAIN, NUM_TEST = 5, 2


def make(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Launch the command."""
    command = [sys.executable, "demo/make_slides.py", "--output_dir", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
