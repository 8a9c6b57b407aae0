import csv
import errno
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tqdm import tqdm

from stage0_tiling import survey, tile
from stage0_tiling.lettering import label_font
from stage0_tiling.pixel_size import SlideError
from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import SlideEntry, find_slides
from stage0_tiling.slide_survey import BLURRED_BELOW, SurveyRow, detail_over_contrast, survey_slide
from stage0_tiling.survey_pictures import THUMBNAIL_PX, _shorten, write_charts, write_contact_sheets
from stage0_tiling.survey_summary import summary_of
from tests.conftest import ROOT, run_command
from tests.dicom_slides import write_dicom_slide
from tests.slides import DrawnSlide, write_pyramid

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real slides in ../shared/data are not here")


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Good slides, a copy of one, a blurred, a blank and a broken one, and some with no or a wrong mpp."""
    folder = tmp_path_factory.mktemp("collection")
    DrawnSlide(width=1536, height=1024).write(folder / "good.tiff")
    shutil.copy(folder / "good.tiff", folder / "good_again.tiff")
    picture = DrawnSlide(width=1536, height=1024, seed=1).draw()[0]
    write_pyramid(folder / "blurred.tiff", cv2.GaussianBlur(picture, (0, 0), 3), 0.5)
    DrawnSlide(width=1024, height=1024, pieces=()).write(folder / "blank.tiff")
    DrawnSlide(width=1024, height=1024, mpp=None, seed=2).write(folder / "unknown.tiff")
    DrawnSlide(width=1024, height=1024, mpp=352.8, seed=3).write(folder / "absurd.tiff")
    write_dicom_slide(folder / "case", "d", DrawnSlide(width=1024, height=800, seed=4).draw()[0], 0.5)
    (folder / "broken.svs").write_bytes(b"not a slide")
    return folder


def table(folder):
    with (folder / "survey.csv").open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def run_survey(slides, folder, *more):
    return survey.main(["--slides", str(slides), "--output_dir", str(folder), *(str(word) for word in more)])


def test_a_collection_in_a_table_in_pictures_and_in_words(collection, tmp_path):
    flags = ("--slides", collection, "--output_dir", tmp_path, "--tiles_per_second", 100, "--feature_width", 1536)
    done = run_command("stage0_tiling/survey.py", *flags, status=1)
    rows = table(tmp_path)
    assert {name: row["problems"] for name, row in rows.items() if row["problems"]} == {
        "blurred": "blurred",
        "blank": "no tissue found",
        "good_again": "same pixels as good",
        "unknown": "no mpp",
        "absurd": "implausible mpp",
        "broken": "broken.svs is no slide or image that OpenSlide or Pillow can open",
    }
    good = rows["good"]
    assert (good["format"], good["compression"], good["width"], good["levels"]) == ("generic-tiff", "jpeg", "1536", "3")
    assert float(good["width_mm"]) == pytest.approx(1536 * 0.5 / 1000, abs=1e-3)
    with Slide(collection / "good.tiff") as slide:
        for column, settings in (("256px_0.5um", (256, 0.5)), ("224px_0.5um", (224, 0.5)), ("256px_1um", (256, 1.0))):
            assert int(good[f"tiles_{column}"]) == len(plan_tiles(slide, TilingSettings(*settings)).coords)
    area = float(good["tissue_fraction"]) * float(good["width_mm"]) * float(good["height_mm"])
    assert float(good["tissue_mm2"]) == pytest.approx(area, abs=2e-3)
    assert float(good["features_mb"]) == pytest.approx(int(good["tiles_256px_0.5um"]) * (2 * 1536 + 16) / 1e6, abs=1e-3)
    assert float(good["sharpness"]) > BLURRED_BELOW > float(rows["blurred"]["sharpness"])
    assert (rows["case"]["format"], rows["case"]["compression"], rows["case"]["objective"]) == ("dicom", "jpeg", "20.0")
    size = sum(file.stat().st_size for file in (collection / "case").iterdir())
    assert float(rows["case"]["file_mb"]) == pytest.approx(size / 1e6, abs=1e-3)
    assert rows["unknown"]["tissue_fraction"] and not rows["unknown"]["tissue_mm2"]

    assert "8 slides: 7 read, 1 failed" in done.stdout and "hours at 100 tiles/s" in done.stdout
    assert "broken failed" in done.stderr
    assert Image.open(tmp_path / "survey.png").size == (1560, 912)
    sheet = Image.open(tmp_path / "survey_thumbnails_01.jpg")
    assert sheet.size[0] == 5 * 336 + 16 and "icc_profile" not in sheet.info


@pytest.mark.parametrize("writer", ["write_thumbnail", "write_charts"])
def test_a_full_disk_ends_the_survey_and_is_no_fault_of_a_slide(collection, tmp_path, monkeypatch, caplog, writer):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(survey, writer, full)
        assert run_survey(collection / "good.tiff", tmp_path) == 1
    assert caplog.messages[-1] == f"no space left in {tmp_path}; free some, then run again"
    assert "good failed" not in caplog.text
    assert not [bar for bar in getattr(tqdm, "_instances", ()) if bar.desc == "looking"], "a bar is left standing"
    assert run_survey(collection / "good.tiff", tmp_path) == 0 and table(tmp_path)["good"]["problems"] == ""


def test_a_second_run_looks_only_at_what_is_new_or_changed(collection, tmp_path, monkeypatch):
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for name in ("good", "unknown"):
        shutil.copy(collection / f"{name}.tiff", slides)
    looked = []
    monkeypatch.setattr(survey, "write_charts", lambda path, rows: None)  # which takes longer than the slides here

    def look(entry, **settings):
        looked.append(entry.slide_id)
        return survey_slide(entry, **settings)

    monkeypatch.setattr(survey, "survey_slide", look)
    assert run_survey(slides, out) == 0 and sorted(looked) == ["good", "unknown"]
    before = (out / "survey.csv").read_text()
    looked.clear()
    assert run_survey(slides, out) == 0 and looked == []
    assert (out / "survey.csv").read_text() == before

    DrawnSlide(width=1024, height=768).write(slides / "good.tiff")
    DrawnSlide(width=1024, height=768, seed=5).write(slides / "new.tiff")
    assert run_survey(slides, out) == 0 and sorted(looked) == ["good", "new"]
    assert table(out)["good"]["width"] == "1024"
    looked.clear()
    assert run_survey(slides, out, "--assume_mpp", 0.5) == 0 and len(looked) == 3
    assert table(out)["unknown"]["mpp_source"] == "assumed" and table(out)["good"]["mpp_source"] == "slide"


def test_an_interrupted_survey_keeps_what_it_saw(collection, tmp_path, monkeypatch):
    def interrupted(entry, **settings):
        if entry.slide_id == "good_again":
            raise KeyboardInterrupt
        return survey_slide(entry, **settings)

    monkeypatch.setattr(survey, "survey_slide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_survey(collection, tmp_path, "--num_workers", 1)
    kept = {path.stem for path in (tmp_path / "survey_slides").glob("*.json")}
    assert "good" in kept and "good_again" not in kept and not (tmp_path / "survey.csv").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_the_table_is_a_list_of_slides(collection, tmp_path):
    out = tmp_path / "out"
    assert run_survey(collection, out) == 1
    entries = {entry.slide_id: entry for entry in find_slides([str(out / "survey.csv")])}
    assert entries["case"].path.resolve() == (collection / "case" / "d_level0.dcm").resolve()
    assert all(entry.mpp is None and entry.path.exists() for entry in entries.values())
    assert tile.main(["--slides", str(out / "survey.csv"), "--output_dir", str(tmp_path / "run")]) == 1


@pytest.mark.parametrize("flag", ["--tiles_per_second 0", "--feature_width -1", "--min_tissue 2", "--assume_mpp 352"])
def test_flags_that_make_no_sense_are_refused(collection, tmp_path, flag):
    with pytest.raises(ValueError, match=flag.split()[0]):
        run_survey(collection, tmp_path, *flag.split())


def test_detail_over_contrast_is_the_plain_formula_whatever_the_stain():
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(float)
    padded = np.pad(grey, 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * grey
    assert detail_over_contrast(picture) == pytest.approx(laplacian.var() / grey.var(), rel=1e-4)
    paler = (128 + (picture.astype(float) - 128) / 3).astype(np.uint8)
    assert detail_over_contrast(paler) == pytest.approx(detail_over_contrast(picture), rel=0.05)
    assert detail_over_contrast(np.full((8, 8, 3), 200, np.uint8)) == 0


def test_copies_are_named_and_blank_slides_are_none():
    marks = ("a", "x"), ("b", "y"), ("c", "x"), ("d", None), ("e", None)
    rows = survey.name_copies([SurveyRow(name, name, fingerprint=mark) for name, mark in marks])
    assert [row.problems for row in rows] == [[], [], ["same pixels as a"], [], []]


def test_pictures_and_words_of_collections_of_any_size(tmp_path):
    rows = [SurveyRow(f"s{i}", f"s{i}.svs", problems=["cannot be opened"], failed=True) for i in range(3)]
    write_charts(tmp_path / "survey.png", rows)
    assert write_contact_sheets(tmp_path, rows) == 1
    assert summary_of(rows, 1024, None) == "3 slides: 0 read, 3 failed\n\nfailed: 3, s0, s1, s2"
    form = {
        "format": "aperio",
        "width": 90_000,
        "height": 70_000,
        "width_mm": 22.5,
        "height_mm": 17.5,
        "file_mb": 1500.0,
    }
    many = [SurveyRow(f"s{i}", f"s{i}.svs", mpp=0.25 + i / 1000, mpp_source="slide", **form) for i in range(70)]
    write_charts(tmp_path / "survey.png", many)
    assert write_contact_sheets(tmp_path, many) == 3
    assert write_contact_sheets(tmp_path, many[:5]) == 1
    assert [path.name for path in tmp_path.glob("*.jpg")] == ["survey_thumbnails_01.jpg"]
    assert "105.0 GB" in summary_of(many, 1024, None)


def test_an_objective_that_contradicts_the_mpp_is_named(tmp_path):
    picture = DrawnSlide(width=1024, height=768).draw()[0]
    write_pyramid(tmp_path / "a.svs", picture, 0.25, 1, aperio=True)  # says 20x
    row, _ = survey_slide(SlideEntry("a", tmp_path / "a.svs"), min_tissue=0.1)
    assert row.problems == ["0.25 um/px contradicts its objective, 20x"]
    assert "mpp contradicts objective: 1, a" in summary_of([row], 1024, None)
    write_pyramid(tmp_path / "a.svs", picture, 0.46, 1, aperio=True)
    assert survey_slide(SlideEntry("a", tmp_path / "a.svs"), min_tissue=0.1)[0].problems == []


@needs_shared
def test_real_slides_are_sharp_and_their_labels_are_never_read(monkeypatch):
    import openslide

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    for name in ("CMU-1-Small-Region.svs", "PIT_06_00633_01.tiff", "TCGA-CR-7395-01A-01-TS1.svs"):
        row, _ = survey_slide(SlideEntry(name, SHARED / "slides" / name), min_tissue=0.1, assume_mpp=0.5)
        assert row.sharpness > 4 * BLURRED_BELOW and row.tissue_mm2 > 0.2 and not row.problems
    assert row.has_icc
    with pytest.raises(SlideError, match="unreadable.svs"):
        survey_slide(SlideEntry("u", SHARED / "bad_slides" / "unreadable.svs"), min_tissue=0.1)


def test_names_below_thumbnails_are_legible_and_fit():
    font, draw = label_font(14), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    blank = bytes(font.getmask("\U0010fffe"))  # what is drawn for a letter that the font has not
    assert all(bytes(font.getmask(letter)) != blank for letter in "üïéßøłŽЖωµ…²≥")
    for name in ("W" * 100, "i" * 200, "Ж1" * 60):
        shown = _shorten(draw, name, 14)
        assert THUMBNAIL_PX - 20 < draw.textlength(shown, font) <= THUMBNAIL_PX
        assert shown[:5] == name[:5] and shown[-5:] == name[-5:]
    assert _shorten(draw, "PIT_06_00633_01", 14) == "PIT_06_00633_01"
