import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from encoders import load_encoder
from stage0_tiling import tile
from stage0_tiling.encoding import encode_slide
from stage0_tiling.icc import to_srgb
from stage0_tiling.slide import Slide, SlideError
from tests.conftest import make_encoder
from tests.dicom_slides import write_dicom_slide
from tests.slides import DrawnSlide, write_pyramid

GAMMA = 1.8
# XYZ of the primaries under D50: those of a wide gamut, and those of sRGB
WIDE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])


def wide_gamut_profile() -> bytes:
    """An ICC profile, version 2, of three primaries and one gamma."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    tags = {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), WIDE, strict=True)}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(GAMMA * 256))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79 - 1)
    tags = {name: value + bytes(-len(value) % 4) for name, value in tags.items()}
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s12x4s", 0, b"none", 0x02400000, b"scnr", b"RGB ", b"XYZ ", b"acsp")
    head = head.ljust(68, b"\0") + fixed(0.9642, 1.0, 0.8249)
    profile = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


def by_definition(picture: np.ndarray) -> np.ndarray:
    linear = (picture / 255.0) ** GAMMA @ WIDE @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.fixture(scope="module")
def profile():
    return wide_gamut_profile()


@pytest.fixture(scope="module")
def slides(profile, tmp_path_factory):
    """One picture as a TIFF, an SVS, a DICOM slide and a PNG that carry the profile, and as a TIFF without."""
    folder = tmp_path_factory.mktemp("icc")
    picture = DrawnSlide(width=1024, height=768).draw()[0]
    with tifffile.TiffWriter(folder / "tiff.tiff") as file:
        for level in (1, 2):
            where = {"resolution": (2e4 / level,) * 2, "resolutionunit": "CENTIMETER", "subfiletype": level - 1}
            how = {"compression": "jpeg", "photometric": "rgb", "tile": (256, 256), "iccprofile": profile}
            file.write(picture[::level, ::level], **where, **how)
    write_dicom_slide(folder / "dicom", "d", picture, 0.5, icc_profile=profile)
    Image.fromarray(picture).save(folder / "png.png", icc_profile=profile, dpi=(50800, 50800))
    write_pyramid(folder / "none.tiff", picture, 0.5, 2)
    return folder


def test_colours_follow_the_profile(profile):
    picture = np.random.default_rng(0).integers(60, 256, (64, 64, 3), dtype=np.uint8)
    converted = to_srgb(profile)(picture)
    assert converted.shape == picture.shape and converted.dtype == np.uint8
    assert np.abs(converted - by_definition(picture)).max() <= 1.5
    assert np.abs(converted.astype(int) - picture).mean() > 5
    white = np.full((1, 1, 3), 255, np.uint8)
    np.testing.assert_array_equal(to_srgb(profile)(white), white)


def test_the_table_of_all_colours_gives_the_same_numbers(profile, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (300, 333, 3), dtype=np.uint8)
    convert = to_srgb.__wrapped__(profile)
    expected = convert(picture)
    assert convert._table is None, "a few tiles are converted one by one"
    monkeypatch.setattr("stage0_tiling.icc.TABLE_AFTER_PX", 1)
    np.testing.assert_array_equal(convert(picture), expected)
    np.testing.assert_array_equal(convert(picture[::2, 5:90]), expected[::2, 5:90])
    assert convert._table is not None


@pytest.mark.parametrize("after_px", [10**9, 5 * 128 * 128])
def test_threads_share_a_conversion(profile, monkeypatch, after_px):
    monkeypatch.setattr("stage0_tiling.icc.TABLE_AFTER_PX", after_px)
    convert = to_srgb.__wrapped__(profile)
    pictures = np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), dtype=np.uint8)
    expected = [convert._convert(picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(convert, pictures), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["tiff.tiff", "dicom/d_level0.dcm", "png.png"])
@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_tiles_and_thumbnails_are_converted(slides, profile, name, reader):
    convert = to_srgb(profile)
    with Slide(slides / name, reader) as plain, Slide(slides / name, reader, icc=True) as slide:
        assert slide.icc_profile == profile
        for box in ((100, 100, 256, 256, (256, 256)), (64, 32, 512, 512, (128, 128)), (-50, 700, 200, 200, (90, 90))):
            np.testing.assert_array_equal(slide.read_region(*box), convert(plain.read_region(*box)))
        np.testing.assert_array_equal(slide.read_whole(128, 96), convert(plain.read_whole(128, 96)))
        coords = np.array([[0, 0], [256, 256], [100, 30]])
        many = slide.read_tiles(coords, 256, 256, (256, 256))
        for tile, (x, y) in zip(many, coords.tolist(), strict=True):
            np.testing.assert_array_equal(tile, convert(plain.read_region(x, y, 256, 256, (256, 256))))


def test_readers_agree_on_converted_tiles(slides):
    with (
        Slide(slides / "tiff.tiff", "tiff", icc=True) as ours,
        Slide(slides / "tiff.tiff", "openslide", icc=True) as other,
    ):
        for box in ((100, 100, 256, 256, (256, 256)), (64, 32, 512, 512, (256, 256))):
            pair = [slide.read_region(*box).astype(int) for slide in (ours, other)]
            assert np.abs(pair[0] - pair[1]).mean() <= 2


def test_the_profile_of_a_tiff_that_openslide_does_not_open(slides, profile, monkeypatch):
    import openslide

    def refuse(self, path):
        raise openslide.OpenSlideUnsupportedFormatError("made up")

    monkeypatch.setattr(openslide.OpenSlide, "__init__", refuse)
    with Slide(slides / "tiff.tiff", icc=True) as slide, Slide(slides / "tiff.tiff") as plain:
        assert (slide.format, slide.icc_profile) == ("tiff", profile)
        box = 100, 100, 256, 256, (256, 256)
        np.testing.assert_array_equal(slide.read_region(*box), to_srgb(profile)(plain.read_region(*box)))


def test_a_slide_without_a_profile_stays_as_it_is(slides, caplog):
    caplog.set_level("INFO")
    with Slide(slides / "none.tiff", icc=True) as slide, Slide(slides / "none.tiff") as plain:
        np.testing.assert_array_equal(slide.read_whole(64, 48), plain.read_whole(64, 48))
    assert [record.getMessage() for record in caplog.records] == [
        "none.tiff carries no ICC profile: its colours stay as they are"
    ]


def test_profiles_that_cannot_be_used_are_refused(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile, complaint in ((b"no profile" * 20, "cannot be used"), (lab, "Lab colours, not RGB")):
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png", icc_profile=profile)
        with pytest.raises(SlideError, match=rf"a\.png: .*{complaint}.*do without --icc"):
            Slide(tmp_path / "a.png", icc=True)
        how = {"compression": "jpeg", "photometric": "rgb", "tile": (64, 64), "iccprofile": profile}
        tifffile.imwrite(tmp_path / "a.tiff", np.full((64, 64, 3), 200, np.uint8), **how)
        with pytest.raises(SlideError, match="do without --icc"):
            Slide(tmp_path / "a.tiff", icc=True)
        Slide(tmp_path / "a.png")
        Slide(tmp_path / "a.tiff")


def test_features_are_those_of_converted_tiles(slides, tmp_path):
    make_encoder(tmp_path / "encoder")
    encoder = load_encoder(tmp_path / "encoder")
    path, settings = slides / "tiff.tiff", {"tile_size": 64, "num_workers": 1}
    found = encode_slide(path, encoder, icc=True, **settings)
    with Slide(path, icc=True) as slide, torch.inference_mode():
        for (x, y), features in list(zip(found.coords.tolist(), found.features, strict=True))[:5]:
            tile = Image.fromarray(slide.read_region(x, y, 64, 64, (64, 64)))
            expected = encoder.encode_tiles(encoder.transform(tile)[None])[0]
            np.testing.assert_allclose(features, expected.half(), rtol=2e-3, atol=2e-3)
    plain = encode_slide(path, encoder, coords=found.coords, **settings)
    assert np.abs(plain.features - found.features).mean() > 0.01


def test_the_flag_converts_and_no_profile_is_written(slides, tmp_path):
    flags = ["--slides", str(slides / "tiff.tiff"), "--tile_size", "64", "--output_dir"]
    assert (
        tile.main([*flags, str(tmp_path / "icc"), "--icc"]) == 0 and tile.main([*flags, str(tmp_path / "plain")]) == 0
    )
    overlays = [(tmp_path / name / "overlays" / "tiff.jpg").read_bytes() for name in ("icc", "plain")]
    for jpeg in overlays:
        assert "icc_profile" not in Image.open(io.BytesIO(jpeg)).info and b"ICC_PROFILE" not in jpeg
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg))).astype(int) for jpeg in overlays]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1
