import logging

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slide_features import read_slide_coords
from stage0_tiling import tile
from stage0_tiling.pixel_size import (
    PLAUSIBLE_MPP,
    PixelSize,
    SlideError,
    check_resolution,
    choose_pixel_size,
    stated_pixel_size,
)
from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import Slide
from tests.slides import DrawnSlide

OME = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels {}/></Image></OME>'
)


def stated(properties, assume_mpp=None, mpp=None):
    return choose_pixel_size("s.tiff", stated_pixel_size(properties), mpp, assume_mpp)


@pytest.mark.parametrize(
    ("properties", "assume_mpp", "expected"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, None, (0.25, 0.25, "slide")),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.5, (0.25, 0.25, "slide")),
        ({"openslide.mpp-x": "0.25"}, None, (0.25, 0.25, "slide")),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, None, (0.25, 0.5, "slide")),
        ({"openslide.mpp-x": "0.25", "openslide.objective-power": "20"}, None, (0.25, 0.25, "slide")),
        (
            {"tiff.XResolution": "20000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"},
            None,
            (0.5, 0.5, "slide"),
        ),
        (
            {"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"},
            None,
            (0.5, 0.5, "slide"),
        ),
        (
            {"tiff.XResolution": "20000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"},
            None,
            (0.5, 0.25, "slide"),
        ),
        ({"tiff.XResolution": "1", "tiff.YResolution": "1", "tiff.ResolutionUnit": "none"}, 0.5, (0.5, 0.5, "assumed")),
        ({"openslide.objective-power": "40"}, None, (0.25, 0.25, "objective")),
        ({"openslide.objective-power": "40"}, 0.5, (0.25, 0.25, "objective")),
        ({"openslide.mpp-x": "352.78", "openslide.mpp-y": "352.78"}, 0.5, (0.5, 0.5, "assumed")),
        ({"openslide.mpp-x": "1e400"}, 0.5, (0.5, 0.5, "assumed")),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "-1"}, 0.5, (0.5, 0.5, "assumed")),
        ({"openslide.mpp-x": "nonsense"}, 0.5, (0.5, 0.5, "assumed")),
        ({"openslide.mpp-x": "0", "openslide.objective-power": "20"}, None, (0.5, 0.5, "objective")),
        ({}, 0.5, (0.5, 0.5, "assumed")),
    ],
)
def test_mpp_comes_from_slide_then_objective_then_assumption(properties, assume_mpp, expected):
    found = stated(properties, assume_mpp)
    assert (pytest.approx(found.x), pytest.approx(found.y), found.source) == expected


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.5" PhysicalSizeYUnit="µm"', (0.25, 0.5)),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.00025" PhysicalSizeYUnit="mm"', (0.25, 0.25)),
        ('PhysicalSizeX="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1" PhysicalSizeYUnit="pixel"', (0.5, 0.5)),
        ('SizeX="100"', (0.5, 0.5)),
        ("<broken", (0.5, 0.5)),
    ],
)
def test_mpp_of_ome_xml_goes_before_the_tiff_resolution(pixels, expected):
    resolution = {"tiff.XResolution": "20000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"}
    found = stated_pixel_size({"tiff.ImageDescription": OME.format(pixels)} | resolution)
    assert (found.x, found.y) == pytest.approx(expected)


@given(st.dictionaries(st.sampled_from(["openslide.mpp-x", "openslide.mpp-y", "tiff.ImageDescription"]), st.text()))
def test_no_metadata_breaks_the_reading_of_mpp(properties):
    found = stated_pixel_size(properties)
    assert found is None or (found.x > 0 and found.y > 0)


def test_nearly_square_pixels_are_square():
    found = stated({"openslide.mpp-x": "0.2500", "openslide.mpp-y": "0.2505"})
    assert found.x == found.y == pytest.approx(0.25025, abs=1e-5)


@pytest.mark.parametrize("properties", [{}, {"openslide.mpp-x": "352.8"}, {"openslide.mpp-x": "0.01"}])
def test_unknown_or_implausible_mpp_is_refused_in_one_line_naming_the_flag(properties):
    with pytest.raises(SlideError, match="s.tiff.*--assume_mpp") as refusal:
        stated(properties)
    assert "\n" not in str(refusal.value)


@given(st.floats(*PLAUSIBLE_MPP), st.floats(*PLAUSIBLE_MPP))
def test_the_mpp_of_a_list_stands_whatever_the_slide_says(listed, said):
    assert stated({"openslide.mpp-x": str(said)}, 0.3, listed) == PixelSize(listed, listed, "list")


def test_a_list_that_contradicts_the_slide_is_said_aloud(caplog):
    stated({"openslide.mpp-x": "0.25"}, mpp=0.2501)
    stated({"openslide.mpp-x": "352.8"}, mpp=0.5)
    assert not caplog.records
    stated({"openslide.mpp-x": "0.25"}, mpp=0.5)
    assert "s.tiff says 0.25 um/px, the list of slides 0.5" in caplog.text


def test_tiles_are_enlarged_with_a_warning_and_only_so_far(caplog):
    check_resolution("s", PixelSize(0.5, 0.5, "slide"), 0.5)
    assert not caplog.records
    check_resolution("s", PixelSize(1.0, 1.0, "slide"), 0.5)
    assert "enlarged 2.00 times" in caplog.text
    with pytest.raises(SlideError, match="coarser --mpp"):
        check_resolution("s", PixelSize(4.0, 4.0, "slide"), 0.5)


def test_pixels_that_are_not_square_through_the_command(tmp_path):
    picture = DrawnSlide(width=2048, height=1024, pieces=((1.0, 0.5, 1.4, 0.4, 0),)).draw()[0]
    with tifffile.TiffWriter(tmp_path / "s.tiff") as file:
        where = {"resolution": (1e4 / 0.25, 1e4 / 0.5), "resolutionunit": "CENTIMETER"}
        file.write(picture, compression="jpeg", photometric="rgb", tile=(256, 256), **where)
    assert tile.main(f"--slides {tmp_path / 's.tiff'} --output_dir {tmp_path / 'out'} --tile_size 128".split()) == 0
    coords = read_slide_coords(tmp_path / "out" / "coords" / "s.h5").coords
    assert len(coords) > 10 and not (coords % [256, 128]).any() and (coords % [512, 256]).any(axis=0).all()
    assert RunFolder(tmp_path / "out").read_state("s").row.mpp == pytest.approx((0.25 * 0.5) ** 0.5, rel=1e-3)


def test_a_pyramid_within_an_ome_tiff_is_used(tmp_path):
    picture = DrawnSlide(width=1024, height=768).draw()[0]
    size = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    how = {"compression": "jpeg", "photometric": "rgb", "tile": (256, 256)}
    with tifffile.TiffWriter(tmp_path / "s.ome.tif", ome=True) as file:
        file.write(picture, subifds=1, metadata=size, **how)
        file.write(picture[::2, ::2], subfiletype=1, **how)
    with Slide(tmp_path / "s.ome.tif") as slide, Slide(tmp_path / "s.ome.tif", "openslide") as plain:
        assert slide.num_levels == 2 and plain.num_levels == 1
        assert slide.pixel_size() == plain.pixel_size() == PixelSize(0.25, 0.25, "slide")
        pair = [s.read_region(100, 50, 600, 600, (200, 200)).astype(int) for s in (slide, plain)]
        assert np.abs(pair[0] - pair[1]).mean() < 4
        assert slide.read_whole(128, 96).shape == (96, 128, 3)


@pytest.mark.parametrize("suffix", [".mrxs", ".bif", ".scn", ".ndpi", ".dcm", ".czi"])
def test_what_may_be_a_picture_of_the_label_is_never_opened_as_an_image(tmp_path, suffix):
    """A .mrxs file is a JPEG of the whole glass, and the first image of a .bif its label."""
    path = tmp_path / f"patient{suffix}"
    Image.new("RGB", (99, 99)).save(path, "JPEG")
    hint = "the folder patient that belongs to it is missing" if suffix == ".mrxs" else ""
    for reader in ("auto", "openslide", "tiff"):
        with pytest.raises(SlideError, match=f"patient{suffix} is no slide that OpenSlide can open: {hint}"):
            Slide(path, reader)


@pytest.fixture
def bounded(tmp_path, monkeypatch):
    """Two pieces of tissue, of which the file says that only the right one was scanned, as a MIRAX slide does."""
    drawn = DrawnSlide(width=2048, height=1024, pieces=((0.4, 0.5, 0.3, 0.3, 0), (1.5, 0.5, 0.3, 0.3, 0)))
    drawn.write(tmp_path / "s.tiff")
    bounds = {"openslide.bounds-x": "1100", "openslide.bounds-y": "40"}
    bounds |= {"openslide.bounds-width": "900", "openslide.bounds-height": "944"}
    properties = openslide.OpenSlide.properties.fget
    monkeypatch.setattr(openslide.OpenSlide, "properties", property(lambda self: dict(properties(self)) | bounds))
    return tmp_path / "s.tiff"


@pytest.mark.parametrize("reader", ["openslide", "tiff"])
def test_tissue_and_tiles_lie_within_the_bounds(bounded, reader):
    with Slide(bounded, reader) as slide:
        assert slide.bounds == (1100, 40, 900, 944)
        plan = plan_tiles(slide, TilingSettings(tile_size=64))
    with Slide(bounded, reader) as slide:
        slide.bounds = (0, 0, slide.width, slide.height)
        everything = plan_tiles(slide, TilingSettings(tile_size=64))
    left = everything.coords[:, 0] < 1000
    assert left.any() and (~left).any()
    np.testing.assert_array_equal(plan.coords, everything.coords[~left])
    column = round(1100 * plan.tissue.scale_x)
    assert (plan.tissue.picture[:, : column - 1] == 255).all() and (plan.tissue.picture[:, column:] < 200).any()


def test_what_lies_outside_the_bounds_is_not_read(bounded, monkeypatch):
    read = []
    block = Slide._read_block
    monkeypatch.setattr("stage0_tiling.slide.MAX_READ_PX", 64)
    monkeypatch.setattr(Slide, "_read_block", lambda self, *box: read.append(box) or block(self, *box))
    with Slide(bounded) as slide:
        slide.read_whole(512, 256)
    assert read and all(x + width > 1100 and y + height > 40 for x, y, width, height, *_ in read)


@pytest.mark.parametrize(
    ("stated_bounds", "expected"),
    [
        (("1500", "100", "9999", "200"), (1500, 100, 548, 200)),
        (("-5", "0", "10", "10"), (0, 0, 5, 10)),
        (("9999", "0", "10", "10"), (0, 0, 2048, 1024)),
        (("a", "0", "10", "10"), (0, 0, 2048, 1024)),
        (("0", "0", "0", "0"), (0, 0, 2048, 1024)),
    ],
)
def test_bounds_that_make_no_sense_are_mended(bounded, monkeypatch, stated_bounds, expected):
    names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    properties = dict(zip(names, stated_bounds, strict=True)) | {"openslide.vendor": "generic-tiff"}
    monkeypatch.setattr(openslide.OpenSlide, "properties", property(lambda self: properties))
    with Slide(bounded) as slide:
        assert slide.bounds == expected


def test_a_run_does_not_mix_the_mpp_of_lists(tmp_path):
    DrawnSlide(width=1024, height=768, num_levels=1).write(tmp_path / "s.tiff")
    listing, out = tmp_path / "list.csv", tmp_path / "out"

    def run(slides, *more):
        return tile.main(["--slides", str(slides), "--output_dir", str(out), "--tile_size", "64", *more])

    listing.write_text("path,mpp\ns.tiff,0.25\n")
    assert run(listing) == 0
    row = RunFolder(out).read_state("s").row
    assert (row.mpp, row.mpp_source) == (0.25, "list")
    assert read_slide_coords(out / "coords" / "s.h5").patch_size_level0 == 128
    assert run(listing) == 0
    with pytest.raises(ValueError, match=r"tiled with 0.25 um per level-0 pixel \(list\).*says nothing"):
        run(tmp_path / "s.tiff")
    listing.write_text("path,mpp\ns.tiff,0.5\n")
    with pytest.raises(ValueError, match=r"mpp of --slides says 0.5"):
        run(listing)
    assert run(listing, "--overwrite") == 0
    assert run(out / "slides.csv") == 0, "the table of a run is a list for the next"


def test_a_table_of_a_run_does_not_freeze_what_slides_state(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    DrawnSlide(width=1024, height=768, num_levels=1, mpp=0.25).write(tmp_path / "s.tiff")
    (tmp_path / "t.csv").write_text(f"slide_id,path,mpp,mpp_source\ns,{tmp_path / 's.tiff'},0.7,slide\n")
    assert tile.main(["--slides", str(tmp_path / "t.csv"), "--output_dir", str(tmp_path / "o")]) == 0
    assert RunFolder(tmp_path / "o").read_state("s").row.mpp_source == "slide"
