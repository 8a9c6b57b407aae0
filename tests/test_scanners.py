"""Slides of scanners that state what was scanned, with a label or macro image in red that must never be seen."""

import shutil

import numpy as np
import openslide
import pytest
from PIL import Image

from slide_features import read_slide_coords
from stage0_tiling import tile
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.slide_files import files_of
from stage0_tiling.slide_list import SlideEntry, find_slides
from stage0_tiling.slide_survey import survey_slide
from tests.leica_slides import write_leica_slide
from tests.mirax_slides import write_mirax_slide
from tests.slides import DrawnSlide

RED = np.full((300, 100, 3), (255, 0, 0), np.uint8)


@pytest.fixture(scope="module")
def leica(tmp_path_factory):
    picture = DrawnSlide(width=1024, height=768).draw()[0]
    path = tmp_path_factory.mktemp("leica") / "s.scn"
    write_leica_slide(path, picture, 0.5, glass=(2500, 6000), offset=(900, 3000), macro=RED)
    return path, picture


@pytest.fixture(scope="module")
def mirax(tmp_path_factory):
    picture = DrawnSlide(width=1024, height=1536).draw()[0]
    path = tmp_path_factory.mktemp("mirax") / "s.mrxs"
    write_mirax_slide(path, picture, 0.5, images=(40, 60), first=(10, 20), label=RED)
    return path, picture


@pytest.mark.parametrize(
    ("scanner", "size", "bounds"),
    [("leica", (2500, 6000), (900, 3000, 1024, 768)), ("mirax", (10240, 15360), (2560, 5120, 1024, 1536))],
)
def test_a_slide_is_tiled_where_it_was_scanned(scanner, size, bounds, request, tmp_path, monkeypatch):
    path, picture = request.getfixturevalue(scanner)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    with Slide(path) as slide:
        assert (slide.format, slide.width, slide.height) == (scanner, *size)
        assert slide.bounds == bounds and slide.objective == 20 and slide.pixel_size().mpp == pytest.approx(0.5)
        region = slide.read_region(*bounds, bounds[2:])
        assert np.abs(region.astype(int) - picture).mean() < 4
        assert (slide.read_region(0, 0, 256, 256, (256, 256)) == 255).all(), "never scanned is white"
    flags = ["--slides", str(path.parent), "--output_dir", str(tmp_path), "--tile_size", "64"]
    assert tile.main(flags) == 0
    found = read_slide_coords(tmp_path / "coords" / "s.h5")
    x, y, width, height = bounds
    assert len(found.coords) > 50 and not (found.coords % 64).any(), "the grid starts at the corner of the slide"
    assert (found.coords > [x - 64, y - 64]).all() and (found.coords < [x + width, y + height]).all()
    overlay = np.asarray(Image.open(tmp_path / "overlays" / "s.jpg")).astype(int)
    assert not ((overlay[..., 0] > 220) & (overlay[..., 1:].max(axis=2) < 60)).any(), "red is the label"

    row, _ = survey_slide(SlideEntry("s", path), min_tissue=0.1)
    assert (row.width_mm, row.height_mm) == pytest.approx((width / 2000, height / 2000), abs=1e-3)
    assert 0.05 < row.tissue_mm2 < row.width_mm * row.height_mm and row.problems == []
    assert row.compression == "jpeg"


def test_only_what_was_scanned_is_read(mirax, monkeypatch):
    read = []
    plain = Slide._read_plain
    monkeypatch.setattr("stage0_tiling.slide.MAX_READ_PX", 256)
    monkeypatch.setattr(Slide, "_read_plain", lambda self, *box: read.append(box) or plain(self, *box))
    with Slide(mirax[0]) as slide:
        thumbnail = slide.read_whole(640, 960)
    assert read and all(x + width > 2560 and x < 3584 and y + height > 5120 for x, y, width, height, _ in read)
    assert (thumbnail[320:416, 160:224] < 230).any()
    thumbnail[320:416, 160:224] = 255
    assert (thumbnail == 255).all()


def test_a_leica_slide_that_openslide_cannot_open_does_not_show_its_macro_image(leica, tmp_path):
    broken = leica[0].read_bytes().replace(b'sizeX="1250000"', b'sizeX="x250000"')
    assert broken != leica[0].read_bytes()
    for name in ("s.scn", "s.tif"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(SlideError, match=f"{name} cannot be opened"):
            Slide(tmp_path / name)


def test_a_mirax_slide_without_its_folder_does_not_show_its_label(mirax, tmp_path):
    shutil.copy(mirax[0], tmp_path / "s.mrxs")
    assert Image.open(tmp_path / "s.mrxs").size == (100, 300), "the file itself is a JPEG"
    with pytest.raises(SlideError, match="s.mrxs is no slide .* the folder s that belongs to it is missing"):
        Slide(tmp_path / "s.mrxs")


def test_a_mirax_slide_is_one_slide_of_four_files(mirax, tmp_path):
    assert [entry.path for entry in find_slides([str(mirax[0].parent)])] == [mirax[0]]
    assert [file.name for file in files_of(mirax[0])] == ["s.mrxs", "Data0000.dat", "Index.dat", "Slidedat.ini"]


def test_a_mirax_slide_cut_short_fails_in_one_line_and_the_others_go_on(mirax, tmp_path):
    for name in ("whole", "short"):
        shutil.copytree(mirax[0].with_suffix(""), tmp_path / name)
        shutil.copy(mirax[0], tmp_path / f"{name}.mrxs")
    data = tmp_path / "short" / "Data0000.dat"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    assert tile.main(["--slides", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--tile_size", "64"]) == 1
    rows = {name: RunFolder(tmp_path / "out").read_state(name).row for name in ("whole", "short")}
    assert [rows[name].status for name in ("whole", "short")] == ["done", "failed"]
    assert "short.mrxs cannot be" in rows["short"].error and "\n" not in rows["short"].error
