from pathlib import Path

import numpy as np
import pytest
from openslide import OpenSlide
from PIL import Image

from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.tiled_tiff import TiledTiff
from tests.slides import write_pyramid

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real slides in ../shared/data are not here")


@pytest.fixture(scope="module")
def ramp():
    """A picture whose red grows with x and green with y, so that a read tells where it was read."""
    y, x = np.mgrid[:1024, :1536]
    return np.stack([x / 6, y / 4.1, np.full_like(x, 128)], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def ramp_slide(ramp, tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "ramp.tiff"
    write_pyramid(path, ramp, mpp=0.25)
    return path


@pytest.mark.parametrize("size", [64, 128, 200, 256, 512, 700])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (513, 255), (1000, 500)])
def test_region_at_any_size_is_the_area_average(ramp, ramp_slide, x, y, size):
    with Slide(ramp_slide) as slide:
        region = slide.read_region(x, y, 512, 512, (size, size))
    assert region.shape == (size, size, 3) and region.dtype == np.uint8
    expected = ramp[y : y + 512, x : x + 512].astype(float).mean(axis=(0, 1))
    np.testing.assert_allclose(region.astype(float).mean(axis=(0, 1)), expected, atol=1.5)
    ends = [region[:, 0, 0].mean(), region[:, -1, 0].mean()]
    np.testing.assert_allclose(ends, [ramp[0, x, 0], ramp[0, x + 511, 0]], atol=3)


def test_the_coarsest_level_that_is_fine_enough_is_read(ramp_slide):
    with Slide(ramp_slide) as slide:
        assert slide.num_levels == 3
        levels = {downsample: slide._level_for(downsample) for downsample in (0.5, 1, 1.9, 1.99, 2, 3.9, 4, 9)}
    assert levels == {0.5: 0, 1: 0, 1.9: 0, 1.99: 1, 2: 1, 3.9: 1, 4: 2, 9: 2}


def test_beyond_the_slide_is_white(ramp_slide):
    with Slide(ramp_slide) as slide:
        region = slide.read_region(1536 - 128, 1024 - 128, 256, 256, (256, 256))
    assert (region[:, 130:] == 255).all() and (region[130:] == 255).all() and (region[:126, :126, 2] < 140).all()


def test_the_whole_slide_in_blocks_equals_one_read(ramp_slide, monkeypatch):
    with Slide(ramp_slide) as slide:
        once = slide.read_whole(192, 128)
        monkeypatch.setattr("stage0_tiling.slide.MAX_READ_PX", 100)
        blocks = slide.read_whole(192, 128)
    assert once.shape == (128, 192, 3)
    np.testing.assert_allclose(blocks.astype(int), once, atol=2)


@pytest.mark.parametrize("reader", ["openslide", "tiff"])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(
    "box", [(0, 0, 1536, 1024, 96, 64), (37, 11, 1300, 917, 131, 99), (700, 300, 1200, 900, 50, 30)]
)
def test_a_large_region_is_read_in_bounded_blocks(ramp, tmp_path, monkeypatch, reader, levels, box):
    write_pyramid(tmp_path / "s.tiff", ramp, mpp=0.25, num_levels=levels)
    *where, columns, rows = box
    read = []
    ours, plain = TiledTiff.read, OpenSlide.read_region
    sides = lambda box: (box[2] - box[0], box[3] - box[1])  # noqa: E731
    monkeypatch.setattr(TiledTiff, "read", lambda self, at, box, *a: read.append(sides(box)) or ours(self, at, box, *a))
    monkeypatch.setattr(OpenSlide, "read_region", lambda self, *box: read.append(box[2]) or plain(self, *box))
    with Slide(tmp_path / "s.tiff", reader) as slide:
        once = slide.read_region(*where, (columns, rows))
        read.clear()
        monkeypatch.setattr("stage0_tiling.slide.MAX_READ_PX", 128)
        monkeypatch.setattr("stage0_tiling.slide.MAX_READ_ROWS", 64)
        blocks = slide.read_large_region(*where, (columns, rows))
    # a box may begin and end within a pixel; and a block is at least one pixel of the result
    assert read and all(width <= 128 + 2 and height <= 64 + 2 for width, height in read)
    assert np.abs(blocks.astype(int) - once).mean() <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_plain_images_open_as_slides(ramp, tmp_path, suffix):
    path = tmp_path / f"plain{suffix}"
    Image.fromarray(ramp).save(path, dpi=(25400 / 0.5, 25400 / 0.5))
    with Slide(path) as slide:
        assert (slide.width, slide.height, slide.num_levels) == (1536, 1024, 1)
        assert "image/" in slide.format or slide.format == "generic-tiff"
        assert slide.pixel_size().mpp == pytest.approx(0.5, rel=1e-3)
        np.testing.assert_allclose(slide.read_region(100, 50, 64, 64, (64, 64)), ramp[50:114, 100:164], atol=12)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).convert(mode).save(path)
    with Slide(path) as slide:
        region = slide.read_region(0, 0, 32, 32, (32, 32))
    assert region.shape == (32, 32, 3) and abs(int(region.mean()) - 200) < 5


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "a.png")
    with Slide(tmp_path / "a.png") as slide:
        assert (slide.read_region(0, 0, 64, 64, (64, 64)) == 255).all()


@needs_shared
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken.svs", ""),
        ("unopenable.tiff", " .*: save it in JPEG or another usual compression"),
        ("unreadable.svs", ""),
    ],
)
def test_bad_slides_are_refused_in_one_line(name, told):
    with pytest.raises(SlideError, match=name + told) as refusal, Slide(SHARED / "bad_slides" / name) as slide:
        plan_tiles(slide, TilingSettings())
    assert "\n" not in str(refusal.value)


@needs_shared
@pytest.mark.parametrize("assume_mpp", [None, 0.5])
def test_a_blank_slide_is_blank_at_any_mpp(assume_mpp):
    with Slide(SHARED / "bad_slides" / "no_tissue.tiff") as slide:
        assert len(plan_tiles(slide, TilingSettings(), assume_mpp).coords) == 0


@needs_shared
def test_label_and_macro_images_are_never_read(monkeypatch):
    import openslide

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    with Slide(SHARED / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert len(plan_tiles(slide, TilingSettings()).coords) > 40


@pytest.mark.parametrize("name", ["a.svs", "a.mrxs", "a.png"])
def test_an_empty_file_is_told_as_such(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(SlideError, match=f"{name} is empty"):
        Slide(tmp_path / name)
