"""The fast reader of tiled TIFFs: equal to OpenSlide, each compressed tile decoded once, damage refused alike."""

import base64
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import torch

from benchmarks.make_slides import make_slide
from encoders import load_encoder
from stage0_tiling import encode as stage0_encode
from stage0_tiling import tile as stage0_tile
from stage0_tiling.encoding import encode_slide
from stage0_tiling.memory import Lender
from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.tiff_codecs import JpegDecoder, TileError
from stage0_tiling.tiff_levels import StoredTable
from stage0_tiling.tile_cache import TileCache, bytes_for
from tests.conftest import ROOT, make_encoder, run_command
from tests.slides import DrawnSlide, write_pyramid

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real slides in ../shared/data are not here")
# 32 x 32 px of YCbCr with half as many columns of chroma (Aperio's form of it): ramps, written with OpenJPEG
SMALL_CHROMA = base64.b64decode(
    "/0//UQAvAAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAADBwEBBwIBBwIB/1IADAAAAAEAAgQEAAH/XAAKQEBISFBISFD/ZAAlAAFD"
    "cmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjD/kAAKAAAAAACkAAH/k8+0wBIo6cvjvA0sPniD/OW1xmL9NqWj54AP6nhvbbcfITs8DVsI"
    "S3RBgO98X6UOXXdOP8+0PCkfTNq7fK3urQH9jOFvv8+0PBQZu7R9wDu/RI0bf+BbP8B8IkB8IgA2oYU/PaY0L6B8gQApIQLPwPkDACFwxRozf8A6"
    "JAOiAF+nxzGdrCk/oD4RAIQgJ0vAfCIANfV3gP/Z"
)
FORMS = {
    "with the level": {},
    "without the level": {"step": 4},
    "one level": {"num_levels": 1},
    "444": {"step": 4, "subsampling": (1, 1)},
    "rgb": {"step": 4, "colors": "rgb"},
    "240": {"step": 4, "tile": 240},
    "svs": {"step": 4, "tile": 240, "shared_tables": True, "aperio": True},
    "svs rgb": {"step": 4, "tile": 240, "shared_tables": True, "aperio": True, "colors": "rgb", "subsampling": (1, 1)},
    "svs jpeg 2000": {"compression": "aperio_jp2000_rgb", "aperio": True},
    "svs jpeg 2000 ycbcr": {"compression": "aperio_jp2000_ycbc", "aperio": True},
}


@pytest.fixture(scope="module")
def picture():
    """A picture of 40x tissue: what a microscope resolves, enlarged, with the noise of a camera."""
    drawn = cv2.resize(DrawnSlide(width=800, height=600, seed=3).draw()[0], (1588, 1190), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).normal(0, 2, drawn.shape)
    return np.clip(drawn + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=FORMS)
def slide_path(request, picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("forms") / "slide.tiff"
    write_pyramid(path, picture, 0.25, **{"num_levels": 2} | FORMS[request.param])
    return path


@pytest.fixture(scope="module")
def plain(picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "slide.tiff"
    write_pyramid(path, picture, 0.25, 1)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "vit"
    make_encoder(folder)
    return folder


def tiles_of(path, reader, settings, assume_mpp=None):
    """Positions and pixels of all tiles."""
    with Slide(path, reader) as slide:
        assert slide.reader == reader
        plan = plan_tiles(slide, settings, assume_mpp)
        size = (settings.tile_size,) * 2
        sides = plan.grid.tile_width, plan.grid.tile_height
        return plan.coords, [slide.read_region(x, y, *sides, size) for x, y in plan.coords.tolist()]


def assert_equal(path, settings, assume_mpp=None):
    coords, expected = tiles_of(path, "openslide", settings, assume_mpp)
    same, tiles = tiles_of(path, "tiff", settings, assume_mpp)
    np.testing.assert_array_equal(coords, same)
    assert len(coords) > 0
    for tile, other in zip(tiles, expected, strict=True):
        assert tile.shape == other.shape and tile.dtype == np.uint8
        assert np.abs(tile.astype(int) - other).mean() <= 2


@pytest.mark.parametrize(
    "settings",
    [
        TilingSettings(128, 0.25),
        TilingSettings(128, 0.5),
        TilingSettings(128, 0.5, overlap=37),
        TilingSettings(64, 1.0),
        TilingSettings(100, 0.495),
        TilingSettings(50, 1.1, overlap=9),
        TilingSettings(96, 0.2),
        TilingSettings(32, 2.0, min_tissue=0),
    ],
    ids=lambda s: f"{s.tile_size} at {s.mpp} overlap {s.overlap}",
)
def test_tiles_equal_those_of_openslide(slide_path, settings):
    assert_equal(slide_path, settings)


def test_without_shrinking_tiles_are_the_same_to_the_bit(plain):
    for settings in (TilingSettings(256, 0.25), TilingSettings(256, 0.3), TilingSettings(200, 0.45)):
        for tile, other in zip(
            *(tiles_of(plain, reader, settings)[1] for reader in ("tiff", "openslide")), strict=True
        ):
            np.testing.assert_array_equal(tile, other)


def test_features_equal_those_of_openslide(slide_path, encoder):
    model = load_encoder(encoder)
    found = [encode_slide(slide_path, model, tile_size=64, reader=reader) for reader in ("openslide", "tiff")]
    np.testing.assert_array_equal(found[0].coords, found[1].coords)
    a, b = (torch.from_numpy(result.features.astype(np.float32)) for result in found)
    assert torch.cosine_similarity(a, b).min() >= 0.999


@needs_shared
@pytest.mark.parametrize("mpp", [0.5, 1.0, 1.37])
@pytest.mark.parametrize("name", [path.name for path in sorted(SHARED.glob("slides/*.*"))])
def test_real_slides_equal_those_of_openslide(name, mpp):
    assert_equal(SHARED / "slides" / name, TilingSettings(128, mpp), assume_mpp=0.5)


@needs_shared
def test_only_the_pyramid_of_a_real_slide_is_read(monkeypatch):
    path = SHARED / "slides" / "CMU-1-Small-Region.svs"
    with tifffile.TiffFile(path) as tiff:
        known = set(tiff.pages[0].dataoffsets)
        assert len(tiff.pages) == 4, "it has a thumbnail, a label and a macro image"
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: asked.append(args[2]) or pread(*args))
    tiles_of(path, "tiff", TilingSettings())
    assert asked and set(asked) <= known


@pytest.fixture
def decoded(monkeypatch):
    """The compressed tiles that were decoded, in order, and by how much they were shrunk."""
    seen, decode = [], JpegDecoder.__call__
    monkeypatch.setattr(JpegDecoder, "__call__", lambda self, *args: seen.append(args[:2]) or decode(self, *args))
    return seen


@pytest.mark.parametrize("overlap", [0, 30])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_each_compressed_tile_is_decoded_once_and_only_if_needed(plain, decoded, overlap, num_threads):
    with Slide(plain, "tiff") as slide, ThreadPoolExecutor(num_threads) as pool:
        settings = TilingSettings(100, 0.5, overlap)
        plan = plan_tiles(slide, settings)
        decoded.clear()
        read = lambda xy: slide.read_region(*xy, 200, 200, (100, 100))  # noqa: E731
        list(pool.map(read, plan.coords.tolist()))
        needed = set()
        for x, y in plan.coords.tolist():
            needed |= {
                (row, column)
                for row in range(y // 256, min(-(-(y + 200) // 256), -(-slide.height // 256)))
                for column in range(x // 256, min(-(-(x + 200) // 256), -(-slide.width // 256)))
            }
    assert len(decoded) == len(needed) < 5 * 7
    assert {shrink for _, shrink in decoded} == {2, 1}, "1 at the edges of the slide only"


@pytest.mark.parametrize(
    ("tile_size", "mpp", "overlap"),
    [
        (32, 0.5, 0),
        (64, 0.25, 0),
        (128, 0.25, 0),
        (16, 1, 0),
        (30, 0.5, 0),
        (56, 0.25, 0),
        (64, 0.25, 32),
        (25, 0.5, 5),
    ],
)
@pytest.mark.parametrize("num_levels", [1, 2])
def test_many_tiles_at_once_equal_one_by_one_and_decode_no_compressed_tile_twice(
    picture, decoded, tmp_path, monkeypatch, tile_size, mpp, overlap, num_levels
):
    side, width = 64, picture.shape[1]
    write_pyramid(tmp_path / "slide.tiff", picture, 0.25, num_levels, tile=side)
    monkeypatch.setattr("stage0_tiling.tile_cache.MIN_BYTES", 0)
    with Slide(tmp_path / "slide.tiff", "tiff") as slide:
        assert slide._tiff._cache._max_bytes == int(2.5 * width * side * 3) < picture.nbytes / 7
        plan = plan_tiles(slide, TilingSettings(tile_size, mpp, overlap))
        tile = {"width": plan.grid.tile_width, "height": plan.grid.tile_height, "size": (tile_size, tile_size)}
        decoded.clear()
        chunks = np.split(plan.coords, range(5, len(plan.coords), 5))
        tiles = np.concatenate([slide.read_tiles(chunk, **tile) for chunk in chunks])
        assert len(decoded) == len({bytes(data) for data, _ in decoded}) > 50
        for tile_at_once, (x, y) in zip(tiles, plan.coords.tolist(), strict=True):
            np.testing.assert_array_equal(tile_at_once, slide.read_region(x, y, **tile))


def test_many_tiles_are_read_into_a_given_array(plain):
    coords = np.array([[256, 256], [512, 256], [1536, 1024], [70, 30]])
    with Slide(plain, "tiff") as slide:
        out = np.zeros((4, 256, 256, 3), np.uint8)
        assert slide.read_tiles(coords, 256, 256, (256, 256), out) is out
        for tile, (x, y) in zip(out, coords.tolist(), strict=True):
            np.testing.assert_array_equal(tile, slide.read_region(x, y, 256, 256, (256, 256)))
        assert slide.read_tiles(coords[:0], 256, 256, (256, 256)).shape == (0, 256, 256, 3)


def test_compressed_tiles_that_lie_together_are_read_at_once(plain, monkeypatch):
    asked, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: asked.append(args[1]) or pread(*args))
    with Slide(plain, "tiff") as slide:
        counts = slide._tiff._levels[0].counts[:3].ravel()
        coords = np.array([(x, y) for y in range(0, 768, 256) for x in range(0, 1536, 256)])
        asked.clear()
        slide.read_tiles(coords, 256, 256, (256, 256))
        assert len(asked) < 18 and sum(asked) < counts.sum()
        monkeypatch.setattr("stage0_tiling.tiled_tiff.READ_BYTES", int(counts[:2].sum()))
        slide._tiff.forget()
        asked.clear()
        slide.read_tiles(coords[:4], 256, 256, (256, 256))
        assert max(asked) <= max(counts[:2].sum(), counts.max()) and 2 <= len(asked) <= 4


def test_thumbnails_are_those_of_openslide_to_the_bit(slide_path):
    for size in ((99, 74), (397, 297), (1588, 1190), (500, 400)):
        pictures = []
        for reader in ("openslide", "tiff"):
            with Slide(slide_path, reader) as slide:
                pictures.append(slide.read_whole(*size))
        np.testing.assert_array_equal(*pictures)


def test_overlapping_boxes_that_hold_whole_tiles_are_noticed(plain, decoded):
    with Slide(plain, "tiff") as slide:
        decoded.clear()
        for x in range(0, 1280, 256):
            slide.read_region(x, 256, 512, 512, (512, 512))
    assert len(decoded) <= 12 + 4, "12 tiles, and those of the first box once more"


def test_the_cache_is_bounded_and_threads_share_work():
    cache, made = TileCache(max_bytes=250), []

    def make():
        made.append(1)
        return np.zeros(100, np.uint8)

    with ThreadPoolExecutor(8) as pool:
        tiles = list(pool.map(lambda _: cache.get("a", make), range(50)))
    assert len(made) == 1 and all(tile is tiles[0] for tile in tiles)
    cache.get("b", make)
    cache.get("a", make)
    cache.get("c", make)  # drops b, which was used longest ago
    assert len(made) == 3 and cache._num_bytes == 200
    cache.get("a", make)
    assert len(made) == 3
    with pytest.raises(TileError):
        cache.get("d", lambda: (_ for _ in ()).throw(TileError("bad")))
    cache.get("d", make)
    assert not cache._pending


def test_the_cache_holds_two_rows_of_tiles_and_half_of_one_within_bounds():
    sizes = {bytes_for(width, 256, 3) // 2**20 for width in (1_000, 10_000, 60_000)}
    assert sizes == {128} and bytes_for(100_000, 256, 3) == int(2.5 * 100_000 * 256 * 3)
    assert bytes_for(10**6, 512, 4) == 512 * 2**20


def test_the_cache_of_openslide_has_room_for_two_rows_and_a_half(plain, monkeypatch):
    capacities, cache = [], openslide.OpenSlideCache
    monkeypatch.setattr("stage0_tiling.tile_cache.MIN_BYTES", 0)
    monkeypatch.setattr(openslide, "OpenSlideCache", lambda size: capacities.append(size) or cache(size))
    with Slide(plain, "openslide") as slide:
        slide.read_region(0, 0, 512, 512, (256, 256))
        assert capacities == [int(2.5 * slide.width * 256 * 4)]


def test_long_tables_are_read_when_a_tile_of_their_level_is_wanted(slide_path, monkeypatch):
    monkeypatch.setattr("stage0_tiling.tile_cache.MIN_BYTES", 0)
    boxes = [(0, 0, 512, 512, (256, 256)), (900, 600, 300, 200, (300, 200))]
    with Slide(slide_path, "tiff") as slide:
        expected = [slide.read_region(*box) for box in boxes]
        whole = slide.read_whole(397, 297)
        tables = [(level.offsets, level.counts) for level in slide._tiff._levels]
    monkeypatch.setattr("stage0_tiling.tiff_levels.MANY_TILES", 0)
    monkeypatch.setattr("stage0_tiling.slide_opening.MANY_TILES", 0)
    monkeypatch.setattr("stage0_tiling.tiled_tiff.MANY_TILES", 0)
    with Slide(slide_path, "tiff") as slide:
        for level, (offsets, counts) in zip(slide._tiff._levels, tables, strict=True):
            assert isinstance(level.offset_table, StoredTable) and "offsets" not in level.__dict__
            np.testing.assert_array_equal(level.offsets, offsets)
            np.testing.assert_array_equal(level.counts, counts)
            level.release()
        np.testing.assert_array_equal(slide.read_whole(397, 297), whole)
        for box, picture in zip(boxes, expected, strict=True):
            np.testing.assert_array_equal(slide.read_region(*box), picture)


def test_a_file_cut_short_under_a_long_table_is_a_slide_error(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("stage0_tiling.tiff_levels.MANY_TILES", 0)
    path = Path(shutil.copy(plain, tmp_path / "s.tiff"))
    with Slide(path, "tiff") as slide:
        os.truncate(path, 8)
        with pytest.raises(SlideError, match="s.tiff cannot be read at .*shorter"):
            slide.read_tiles(np.array([[256, 256]]), 256, 256, (256, 256))


def test_memory_is_lent_again_once_no_view_of_it_is_left():
    lend = Lender()
    first = lend((4, 5, 3))
    first[:] = 7
    view = first[1:3]
    address = first.ctypes.data
    del first
    second = lend((4, 5, 3))
    assert second.ctypes.data != address, "a view still shows it"
    second[:] = 0
    assert (view == 7).all() and view.flags.writeable
    del view
    assert lend((3, 5, 3)).ctypes.data == address
    assert lend((0, 5, 3)).shape == (0, 5, 3) and lend((300, 300, 3)).shape == (300, 300, 3)


def damage(source: Path, path: Path, tile: int, how: str, level: int = 0) -> None:
    """Copy a slide with one compressed tile damaged."""
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[level]
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
        tag = page.tags["TileByteCounts"]
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        place = tag.valueoffset + width * tile
    data = bytearray(source.read_bytes())
    if how == "missing":
        data[place : place + width] = bytes(width)
    elif how == "torn":
        data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    elif how == "noise":
        data[offset : offset + count] = np.random.default_rng(0).bytes(count)
    elif how == "cut":
        data = data[: offset + count // 2]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["torn", "noise"])
def test_a_damaged_tile_fails_the_slide_as_with_openslide(plain, tmp_path, how):
    damage(plain, tmp_path / "bad.tiff", 8, how)
    one, many = (256, 256, 256, 256, (128, 128)), (np.array([[0, 256], [256, 256], [512, 256]]), 256, 256, (128, 128))
    for reader, read in product(("openslide", "tiff"), (Slide.read_region, Slide.read_tiles)):
        with Slide(tmp_path / "bad.tiff", reader) as slide:
            slide.read_region(768, 768, 256, 256, (128, 128))
            with pytest.raises(SlideError, match=r"bad.tiff cannot be read at \(256, 256\), level 0") as refusal:
                read(slide, *(one if read is Slide.read_region else many))
            assert "\n" not in str(refusal.value)


def test_a_file_that_ends_early_is_refused(plain, tmp_path):
    with Slide(plain, "tiff") as slide:
        slide._tiff._file_bytes = 1000
        with pytest.raises(SlideError, match="beyond the end of the file"):
            slide.read_region(0, 0, 256, 256, (256, 256))
    damage(plain, tmp_path / "cut.tiff", 30, "cut")
    with pytest.raises(SlideError, match="cut.tiff"), Slide(tmp_path / "cut.tiff") as slide:
        plan_tiles(slide, TilingSettings())


@pytest.mark.parametrize("form", [{}, {"aperio": True, "shared_tables": True}])
@pytest.mark.parametrize("level", [0, 1])
def test_a_tile_that_is_not_there_is_what_openslide_makes_of_it(picture, tmp_path, form, level):
    write_pyramid(tmp_path / "whole.tiff", picture, 0.25, 2, **form)
    damage(tmp_path / "whole.tiff", tmp_path / "sparse.tiff", 1, "missing", level)
    regions = []
    for reader in ("openslide", "tiff"):
        with Slide(tmp_path / "sparse.tiff", reader) as slide:
            step = 2**level
            regions.append(slide.read_region(200 * step, 50 * step, 400 * step, 200 * step, (400, 200)))
    np.testing.assert_array_equal(*regions)
    assert (level == 1 and form) or (regions[0] == 255).all(axis=2).any()


def test_jpeg_2000_that_openslide_does_not_open(picture, tmp_path):
    write_pyramid(tmp_path / "j2k.tiff", picture, 0.25, 2, compression="jpeg2000")
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(tmp_path / "j2k.tiff")
    with Slide(tmp_path / "j2k.tiff") as slide:
        assert (slide.reader, slide.format, slide.num_levels, slide.pixel_size().mpp) == ("tiff", "tiff", 2, 0.25)
        np.testing.assert_array_equal(slide.read_region(300, 200, 500, 400, (500, 400)), picture[200:600, 300:800])
        beyond = slide.read_region(1500, 1100, 200, 200, (200, 200))
        assert (beyond[100:] == 255).all() and (beyond[:, 100:] == 255).all() and (beyond[:90, :80] < 255).any()
        assert len(plan_tiles(slide, TilingSettings(64)).coords) > 5


def test_jpeg_2000_with_small_chroma_equals_openslide(tmp_path):
    path = tmp_path / "small_chroma.svs"
    how = {"tile": (32, 32), "compression": "aperio_jp2000_ycbc", "photometric": "rgb", "metadata": None}
    about = "Aperio Image Library\r\n64x64|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(path, iter([SMALL_CHROMA] * 4), shape=(64, 64, 3), dtype=np.uint8, description=about, **how)
    tiles, thumbnails = [], []
    for reader in ("openslide", "tiff"):
        with Slide(path, reader) as slide:
            tiles.append(slide.read_region(32, 0, 32, 32, (32, 32)))
            thumbnails.append(slide.read_whole(64, 64))
    assert np.abs(tiles[0].astype(int) - tiles[1]).max() <= 1 and tiles[0].std() > 20
    np.testing.assert_array_equal(*thumbnails)


def test_what_the_fast_reader_cannot_read_goes_to_openslide_or_is_refused(picture, tmp_path):
    tifffile.imwrite(tmp_path / "lzw.tiff", picture, tile=(256, 256), photometric="rgb", compression="lzw")
    tifffile.imwrite(tmp_path / "strips.tiff", picture, photometric="rgb")
    cv2.imwrite(str(tmp_path / "plain.png"), picture)
    for name, reader in (("lzw.tiff", "openslide"), ("strips.tiff", "pillow"), ("plain.png", "pillow")):
        with Slide(tmp_path / name) as slide:
            assert slide.reader == reader
        with pytest.raises(SlideError, match=f"{name} .* --reader tiff .*use --reader auto"):
            Slide(tmp_path / name, "tiff")
    assert not [link for link in Path("/proc/self/fd").glob("*") if str(tmp_path) in _target(link)]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def test_readers_are_recorded_and_mix_in_one_folder(picture, encoder, tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "out"
    write_pyramid(slides / "a.tiff", picture, 0.25, 1)
    cv2.imwrite(str(slides / "b.png"), picture)
    flags = ["--slides", str(slides), "--output_dir", str(out), "--tile_size", "64", "--assume_mpp", "0.25"]
    state = lambda name: json.loads((out / "state" / f"{name}.json").read_text())  # noqa: E731
    assert stage0_tile.main([*flags, "--reader", "tiff"]) == 1
    assert (state("a")["reader"], state("b")["row"]["status"]) == ("tiff", "failed")
    assert "--reader tiff" in state("b")["row"]["error"]
    assert stage0_tile.main([*flags, "--reader", "openslide", "--overwrite"]) == 0
    assert (state("a")["reader"], state("b")["reader"]) == ("openslide", "pillow")
    assert stage0_encode.main([*flags, "--encoder", str(encoder)]) == 0
    assert (state("a")["reader"], state("b")["reader"]) == ("tiff", "pillow")
    old = state("a")
    del old["reader"]  # a folder of an earlier version
    (out / "state" / "a.json").write_text(json.dumps(old))
    made = (out / "features" / "a.h5").stat().st_mtime_ns
    assert stage0_encode.main([*flags, "--encoder", str(encoder), "--reader", "openslide"]) == 0
    assert (out / "features" / "a.h5").stat().st_mtime_ns == made


def test_the_benchmark_runs_and_writes_ratios(tmp_path):
    small = ("--side", 2048, "--tiles", 20, 40, "--sides", 1024, "--encoded", 2, "--repeats", 1)
    done = run_command("benchmarks/stage0.py", *small, "--work_dir", tmp_path / "s", "--json", tmp_path / "r.json")
    measured = json.loads((tmp_path / "r.json").read_text())
    assert all(measured[part]["ratio"] > 0 for part in ("a", "b", "linear", "memory"))
    assert measured["b"]["openslide_tiles"] == measured["b"]["tiles"] and "floor" in done.stdout
    assert measured["memory"]["peak_bytes"]["1024"] > 2**26 and measured["memory"]["decoding_ratio"] == 1
    assert measured["linear"]["above_floor"].keys() == {"20", "40"} and len(measured["b"]["floor_ratios"]) == 1
    run_command("benchmarks/make_slides.py", "--output_dir", tmp_path / "made", "--side", 1024)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["a.svs", "b.svs"]


def test_a_benchmark_slide_with_equal_tiles_written_once_reads_as_with_all(tmp_path):
    for name, sparse in (("all", False), ("once", True)):
        make_slide(tmp_path / f"{name}.svs", 2048, 0.3, 0.5, sparse)
    with Slide(tmp_path / "all.svs", "openslide") as one, Slide(tmp_path / "once.svs", "openslide") as other:
        np.testing.assert_array_equal(one.read_whole(1024, 1024), other.read_whole(1024, 1024))
    assert (tmp_path / "once.svs").stat().st_size < (tmp_path / "all.svs").stat().st_size
