import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slide_features import read_slide_coords
from stage0_tiling import tile as stage0_tile
from stage0_tiling.outlines import outline
from stage0_tiling.slide import SlideError
from stage0_tiling.user_masks import fill, fill_within, find_mask, read_mask
from tests.slides import DrawnSlide

SHAPE, WIDTH, HEIGHT = (60, 80), 1600, 1200  # a thumbnail of 20 level-0 pixels a pixel
SQUARE = [[200, 200], [1000, 200], [1000, 1000], [200, 1000], [200, 200]]
HOLE = [[400, 400], [400, 600], [600, 600], [600, 400], [400, 400]]
ISLAND = [[1200, 200], [1400, 200], [1400, 400], [1200, 400], [1200, 200]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
BOTH = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [ISLAND]]}


def feature(geometry):
    return {"type": "Feature", "id": "x", "geometry": geometry, "properties": {"objectType": "annotation"}}


def exact(with_island):
    mask = np.zeros(SHAPE, bool)
    mask[10:50, 10:50] = True
    mask[20:30, 20:30] = False
    mask[10:20, 60:70] = with_island
    return mask


@pytest.mark.parametrize(
    ("content", "with_island"),
    [
        ({"type": "FeatureCollection", "features": [feature(POLYGON)]}, False),
        ([feature(POLYGON), feature({"type": "Polygon", "coordinates": [ISLAND]})], True),
        (feature(BOTH), True),
        (BOTH, True),
        ({"type": "GeometryCollection", "geometries": [BOTH, {"type": "Point", "coordinates": [0, 0]}]}, True),
    ],
)
def test_geojson_in_the_forms_that_tools_export(content, with_island, tmp_path):
    (tmp_path / "s.geojson").write_text(json.dumps(content))
    mask = read_mask(find_mask(tmp_path, "s"), SHAPE, WIDTH, HEIGHT)
    np.testing.assert_array_equal(mask, exact(with_island))


def test_no_annotation_is_no_tissue(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "FeatureCollection", "features": []}')
    assert not read_mask(find_mask(tmp_path, "s"), SHAPE, WIDTH, HEIGHT).any()


@pytest.mark.parametrize("form", ["grey", "colour", "small"])
def test_png_of_any_size_and_depth(form, tmp_path):
    mask = exact(True)
    scale = {"grey": 4, "colour": 1, "small": 1}[form]
    picture = np.kron(mask, np.ones((scale, scale))).astype(np.uint8) * (1 if form == "grey" else 255)
    if form == "colour":
        picture = np.dstack([picture * 0, picture, picture * 0])
    if form == "small":
        picture = picture[5::10, 5::10]
        mask = np.kron(picture > 0, np.ones((10, 10))).astype(bool)
    cv2.imwrite(str(tmp_path / "s.png"), picture)
    np.testing.assert_array_equal(read_mask(find_mask(tmp_path, "s"), SHAPE, WIDTH, HEIGHT), mask)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.geojson", b"{", "no GeoJSON of polygons"),
        ("s.geojson", b"\xff\xfe\x00", "no GeoJSON of polygons"),
        ("s.geojson", b'{"type": "Polygon"}', "no GeoJSON of polygons"),
        ("s.geojson", b'{"type": "Polygon", "coordinates": [[1, 2]]}', "no GeoJSON of polygons"),
        ("s.geojson", b'{"type": "Polygon", "coordinates": []}', "empty ring"),
        ("s.geojson", b'{"type": "Polygon", "coordinates": [[[NaN, 2], [1, 2], [3, 4]]]}', "not finite"),
        ("s.geojson", b'{"type": "Point", "coordinates": [1, 2]}', "no Polygon or MultiPolygon"),
        ("s.geojson", b"null", "no GeoJSON of polygons"),
        ("s.png", b"", "no readable PNG"),
        ("s.png", b"\x89PNG torn", "no readable PNG"),
    ],
)
def test_a_broken_mask_is_one_clear_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=message) as refused:
        read_mask(find_mask(tmp_path, "s"), SHAPE, WIDTH, HEIGHT)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_mask_of_another_shape_or_a_second_one_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "s.png"), np.ones((80, 60), np.uint8))
    with pytest.raises(SlideError, match="not the slide's aspect ratio"):
        read_mask(find_mask(tmp_path, "s"), SHAPE, WIDTH, HEIGHT)
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(SlideError, match="two masks, s.json and s.png"):
        find_mask(tmp_path, "s")
    assert find_mask(tmp_path, "other") is None


@st.composite
def stars(draw):
    """A star-shaped polygon around (50, 40), with a smaller copy of itself as a hole; and its area."""
    count = draw(st.integers(3, 25))
    angles = np.sort([draw(st.floats(0, 0.999)) for _ in range(count)]) * 2 * np.pi
    radii = np.array([draw(st.floats(4, 38)) for _ in range(count)])
    ring = np.stack([50 + radii * np.cos(angles), 40 + radii * np.sin(angles)], 1)
    hole = draw(st.floats(0.1, 0.8))
    x, y = ring.T - [[50], [40]]
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    around = np.linalg.norm(ring - np.roll(ring, 1, axis=0), axis=1).sum()
    wraps = np.diff(np.append(angles, angles[0] + 2 * np.pi)).max() < np.pi  # else the centre lies outside
    return ring, (ring - [50, 40]) * hole + [50, 40], area * (1 - hole**2), around * (1 + hole), wraps


@settings(deadline=None, max_examples=150)
@given(stars())
def test_filled_area_is_the_polygons(star):
    ring, hole, area, around, wraps = star
    if not wraps:
        return
    filled = fill([ring, hole[::-1]], (80, 100))
    for shift in ((0, 0), (-70, 30.25), (60, -50), (500, 0)):  # also partly and wholly beyond the picture
        moved = [ring + shift, hole[::-1] + shift]
        mask = np.zeros((80, 100), bool)
        fill_within(mask, moved)
        np.testing.assert_array_equal(mask, fill(moved, mask.shape))
    assert abs(filled.sum() - area) <= 0.2 * around + 4  # a pixel is decided by its centre
    np.testing.assert_array_equal(filled, fill([np.vstack([ring, ring[:1]]), hole], (80, 100)))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_outlines_of_a_mask_fill_to_the_mask(seed, share):
    mask = np.random.default_rng(seed).random((12, 17)) < share
    filled = [fill([exterior, *holes], mask.shape) for exterior, holes in outline(mask)]
    np.testing.assert_array_equal(np.any([mask & False, *filled], axis=0), mask)


def test_what_reaches_beyond_the_slide_is_cut():
    square = np.array([[-50, -50], [150, -50], [150, 40], [-50, 40]])
    assert fill([square], (80, 100)).sum() == 40 * 100


def test_the_command_uses_masks_where_there_are_some(tmp_path, caplog):
    slides, masks, out = (tmp_path / name for name in ("slides", "masks", "out"))
    masks.mkdir()
    for name in ("outlined", "painted", "found", "torn"):
        DrawnSlide(width=512, height=384, num_levels=2).write(slides / f"{name}.tiff")
    square = [[[128, 128], [384, 128], [384, 256], [128, 256], [128, 128]]]
    (masks / "outlined.geojson").write_text(json.dumps([feature({"type": "Polygon", "coordinates": square})]))
    painted = np.zeros((96, 128), np.uint8)
    painted[:32] = 1
    cv2.imwrite(str(masks / "painted.png"), painted)
    (masks / "torn.json").write_text("{")
    common = ["--slides", str(slides), "--output_dir", str(out), "--tile_size", "128", "--min_tissue", "1"]
    assert stage0_tile.main([*common, "--masks", str(masks)]) == 1
    assert read_slide_coords(out / "coords" / "outlined.h5").coords.tolist() == [[128, 128], [256, 128]]
    assert read_slide_coords(out / "coords" / "painted.h5").coords.tolist() == [[x, 0] for x in (0, 128, 256, 384)]
    assert f"found has no mask in {masks}; its tissue is found by otsu" in caplog.text
    assert "failed: torn: mask torn.json is no GeoJSON of polygons" in caplog.text
    with pytest.raises(ValueError, match="tiled with --masks, not without --masks: choose another"):
        stage0_tile.main(common)


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "no such folder"), (".", "holds no <slide_id>.geojson")])
def test_a_folder_without_masks_is_refused(folder, message, tmp_path):
    (tmp_path / "s").mkdir()
    DrawnSlide(width=256, height=256, num_levels=1).write(tmp_path / "s" / "s.tiff")
    arguments = ["--slides", str(tmp_path / "s"), "--output_dir", str(tmp_path / "out"), "--masks"]
    with pytest.raises((ValueError, OSError), match=f"--masks .*{message}"):
        stage0_tile.main([*arguments, str(tmp_path / folder)])
