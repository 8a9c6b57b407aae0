import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slide_features import (
    FEATURE_SUFFIXES,
    atomic_path,
    choose_patches,
    count_tiles,
    raster_order,
    read_patches,
    read_slide_coords,
    read_slide_features,
    worth_saying,
    write_slide_coords,
    write_slide_features,
)
from tests.conftest import ROOT

ABOUT = dict(name="s1", mpp=0.5, tile_size=256, overlap=0, patch_size_level0=512)


def example(num_tiles=7, width=5, dtype=np.float16):
    rng = np.random.default_rng(0)
    coords = np.stack([rng.permutation(num_tiles), rng.permutation(num_tiles)], axis=1) * 512
    return rng.normal(size=(num_tiles, width)).astype(dtype), coords


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read(tmp_path, dtype):
    features, coords = example(dtype=dtype)
    path = tmp_path / "features" / "s1.h5"
    write_slide_features(
        path, features, coords, encoder="resnet18", level0_mpp=0.25, level0_width=9000, level0_height=8000, **ABOUT
    )
    read = read_slide_features(path)
    assert read.features.dtype == dtype and read.coords.dtype == np.int64
    np.testing.assert_array_equal(read.features, features)
    np.testing.assert_array_equal(read.coords, coords)
    assert (read.mpp, read.encoder, read.tile_size, read.patch_size_level0) == (0.5, "resnet18", 256, 512)
    np.testing.assert_array_equal(read_slide_features(path).coords, coords)
    assert [entry.name for entry in path.parent.iterdir()] == ["s1.h5"]


def test_file_carries_the_attributes_that_trident_reads(tmp_path):
    features, coords = example()
    path = tmp_path / "s1.h5"
    write_slide_features(
        path, features, coords, encoder="resnet18", level0_mpp=0.2425, level0_width=9000, level0_height=8000, **ABOUT
    )
    with h5py.File(path) as file:
        assert set(file) == {"features", "coords"}
        assert dict(file["coords"].attrs) == {
            "name": "s1",
            "patch_size": 256,
            "patch_size_level0": 512,
            "target_magnification": 20,
            "level0_magnification": 40,
            "overlap": 0,
            "level0_width": 9000,
            "level0_height": 8000,
        }
        assert {"mpp", "encoder", "tile_size", "format_version"} <= set(file.attrs)


def test_coords_file(tmp_path):
    _, coords = example()
    path = tmp_path / "s1.h5"
    write_slide_coords(path, coords, level0_mpp=0.25, level0_width=90, level0_height=80, **ABOUT)
    read = read_slide_coords(path)
    np.testing.assert_array_equal(read.coords, coords)
    assert (read.name, read.mpp, read.tile_size, read.overlap, read.patch_size_level0) == ("s1", 0.5, 256, 0, 512)
    assert (read.level0_mpp, read.level0_width, read.level0_height) == (0.25, 90, 80)
    with pytest.raises(ValueError, match="holds no dataset `features`"):
        read_slide_features(path)


@pytest.mark.parametrize("batch_axis", [False, True])
@pytest.mark.parametrize("rows", [[], [0], [6], [0, 3, 4, 6], range(7)])
def test_rows_of_one_slide(tmp_path, rows, batch_axis):
    features, coords = example()
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"] = features[None] if batch_axis else features
        file["coords"] = coords
    rows = np.array(rows, dtype=np.int64)
    if not rows.size:
        with pytest.raises(ValueError, match="no tiles"):
            read_slide_features(tmp_path / "s.h5", rows)
        return
    read = read_slide_features(tmp_path / "s.h5", rows)
    np.testing.assert_array_equal(read.features, features[rows])
    np.testing.assert_array_equal(read.coords, coords[rows])


def test_rows_across_many_reads(tmp_path):
    features, coords = example(num_tiles=5000, width=3)
    path = tmp_path / "s.h5"
    write_slide_features(path, features, coords, encoder="e", **ABOUT)
    rows = choose_patches(5000, 700, np.random.default_rng(1))
    np.testing.assert_array_equal(read_slide_features(path, rows).features, features[rows])
    with pytest.raises(ValueError, match="sorted and within 0 to 4999"):
        read_slide_features(path, np.array([3, 5000]))


def test_files_of_other_tools(tmp_path):
    features, coords = example(dtype=np.float32)
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"] = features[None]
        file["features"].attrs["encoder"] = "uni_v1"
        file["coords"] = coords
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20})
    trident = read_slide_features(tmp_path / "trident.h5")
    np.testing.assert_array_equal(trident.features, features)
    assert (trident.mpp, trident.encoder, trident.tile_size, trident.patch_size_level0) == (0.5, "uni_v1", 256, 512)

    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = features, coords.astype(np.int32)
    clam = read_slide_features(tmp_path / "clam.h5")
    assert clam.mpp is None and clam.coords.dtype == np.int64

    with h5py.File(tmp_path / "yx.h5", "w") as file:
        file["feats"], file["coords_yx"] = features.astype(np.float64), coords[:, ::-1]
    yx = read_slide_features(tmp_path / "yx.h5")
    np.testing.assert_array_equal(yx.coords, coords)
    assert yx.features.dtype == np.float32


@pytest.mark.parametrize("batch_axis", [False, True])
def test_clam_pt_file_gets_a_raster_grid(tmp_path, batch_axis):
    features, _ = example()
    tensor = torch.from_numpy(features)
    torch.save(tensor[None] if batch_axis else tensor, tmp_path / "s.pt")
    read = read_slide_features(tmp_path / "s.pt", np.array([0, 3, 6]))
    np.testing.assert_array_equal(read.features, features[[0, 3, 6]])
    np.testing.assert_array_equal(read.coords, [[0, 0], [0, 256], [0, 512]])
    assert raster_order(read_slide_features(tmp_path / "s.pt").coords).tolist() == list(range(7))


@pytest.mark.parametrize("suffix", FEATURE_SUFFIXES)
def test_every_format_gives_what_was_written(tmp_path, suffix):
    features, coords = example(num_tiles=700)
    more = {"stain_normalizer": "macenko"}
    write_slide_coords(tmp_path / "coords" / "s.1.h5", coords, **ABOUT)
    path = tmp_path / "features" / f"s.1{suffix}"
    said = {"encoder": "resnet18", "encoder_fingerprint": "f", "min_tissue": 0.25, "more_making": more}
    write_slide_features(path, features, coords, **said, **ABOUT)
    for rows in (None, np.array([0, 3, 256, 699])):
        read = read_slide_features(path, rows)
        expected = slice(None) if rows is None else rows
        np.testing.assert_array_equal(read.features, features[expected])
        np.testing.assert_array_equal(read.coords, coords[expected])
        assert (read.encoder, read.encoder_fingerprint, read.patch_size_level0) == ("resnet18", "f", 512)
        expected = {"tile_size": 256, "mpp": 0.5, "overlap": 0, "min_tissue": 0.25, "stain_normalizer": "macenko"}
        assert worth_saying(read.making) == expected
    np.testing.assert_array_equal(read_slide_features(path).coords, coords)
    assert count_tiles(path) == 700
    torn = path.with_name(f"torn{suffix}")
    torn.write_bytes(path.read_bytes()[:-100])
    for read in (count_tiles, read_slide_features):
        with pytest.raises(ValueError, match="torn.* is not a readable .*make it again"):
            read(torn)


def test_zarr_is_read_by_worker_processes(tmp_path):
    features, coords = example()
    write_slide_features(tmp_path / "s.zarr.zip", features, coords, encoder="e", **ABOUT)
    read_slide_features(tmp_path / "s.zarr.zip")  # zarr's own thread is running now, and a fork does not take it along
    loader = torch.utils.data.DataLoader([tmp_path / "s.zarr.zip"] * 4, num_workers=2, collate_fn=read_all, timeout=60)
    assert [read.tobytes() for (read,) in loader] == [features.tobytes()] * 4


def read_all(paths):
    return [read_slide_features(path).features for path in paths]


def test_a_bare_tensor_takes_positions_only_where_they_fit(tmp_path):
    features, coords = example()
    write_slide_coords(tmp_path / "coords" / "s.h5", coords[:-1], **ABOUT)
    (tmp_path / "features").mkdir()
    torch.save(torch.from_numpy(features).bfloat16(), tmp_path / "features" / "s.pt")
    read = read_slide_features(tmp_path / "features" / "s.pt")
    np.testing.assert_array_equal(read.coords[:4], [[0, 0], [256, 0], [512, 0], [0, 256]])
    assert read.features.dtype == np.float32 and read.mpp is None


def test_our_own_tensor_without_its_positions_is_refused(tmp_path):
    """Made-up ones would train a model on a slide of another shape."""
    features, coords = example()
    path = tmp_path / "features" / "s.pt"
    write_slide_features(path, features, coords, encoder="e", **ABOUT)
    for read in (read_slide_features, read_patches):
        with pytest.raises(ValueError, match=r"takes its positions from .*coords/s.h5, which is missing: bring that"):
            read(path)
    write_slide_coords(tmp_path / "coords" / "s.h5", coords[:-1], **ABOUT)
    with pytest.raises(ValueError, match="which holds other than 7 positions"):
        read_slide_features(path)


def test_a_file_that_does_not_say_how_stains_were_treated_is_of_plain_tiles(tmp_path):
    features, coords = example()
    write_slide_features(tmp_path / "s.h5", features, coords, encoder="e", **ABOUT)
    with h5py.File(tmp_path / "s.h5") as file:
        assert "stain_normalizer" not in file.attrs
    making = read_slide_features(tmp_path / "s.h5").making
    assert (making["stain_normalizer"], making["icc"], making["min_tissue"]) == ("none", False, None)


def test_bad_files_are_refused_with_the_mend(tmp_path):
    features, coords = example()
    with pytest.raises(FileNotFoundError, match=r"encode\.py"):
        read_slide_features(tmp_path / "absent.h5")
    (tmp_path / "torn.h5").write_bytes(b"\x89HDF\r\n\x1a\n half")
    with pytest.raises(ValueError, match=r"torn\.h5 is not a readable HDF5 file.*make it again"):
        read_slide_features(tmp_path / "torn.h5")
    with h5py.File(tmp_path / "uneven.h5", "w") as file:
        file["features"], file["coords"] = features, coords[:-1]
    with pytest.raises(ValueError, match="7 features but 6 positions"):
        read_slide_features(tmp_path / "uneven.h5")
    with h5py.File(tmp_path / "nan.h5", "w") as file:
        file["features"], file["coords"] = np.where(np.arange(7)[:, None] == 2, np.nan, features), coords
    with pytest.raises(ValueError, match="1 of 7 features are not finite"):
        read_slide_features(tmp_path / "nan.h5")
    torch.save({"features": torch.zeros(2, 2)}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="one bare tensor"):
        read_slide_features(tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="float16 or float32"):
        write_slide_features(tmp_path / "x.h5", features.astype(np.float64), coords, encoder="e", **ABOUT)
    with pytest.raises(ValueError, match="no tiles"):
        write_slide_features(tmp_path / "x.h5", features[:0], coords[:0], encoder="e", **ABOUT)
    assert not (tmp_path / "x.h5").exists()


def test_atomic_path_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_raster_order_is_by_row_then_column():
    coords = np.array([[512, 0], [0, 256], [0, 0], [256, 256]])
    assert coords[raster_order(coords)].tolist() == [[0, 0], [512, 0], [0, 256], [256, 256]]


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(1, 400), st.one_of(st.none(), st.integers(0, 9)))
def test_choose_patches(num_patches, budget, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    chosen = choose_patches(num_patches, budget, rng)
    assert chosen.dtype == np.int64 and len(chosen) == min(num_patches, budget)
    assert (np.diff(chosen) > 0).all() and (chosen >= 0).all() and (chosen < num_patches).all()
    if seed is None and len(chosen) > 1:
        assert np.ptp(np.diff(chosen)) <= 1
    again = choose_patches(num_patches, budget, None if seed is None else np.random.default_rng(seed))
    np.testing.assert_array_equal(chosen, again)


def test_choose_patches_samples_uniformly():
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([choose_patches(10, 4, rng) for _ in range(2000)]), minlength=10)
    assert np.abs(counts / 2000 - 0.4).max() < 0.05


@pytest.mark.parametrize("suffix", FEATURE_SUFFIXES)
def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, suffix):
    program = f"""
import resource, signal, numpy as np, slide_features
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
try:
    slide_features.write_slide_features(
        {str(tmp_path / "s") + suffix!r}, np.ones((2000, 256), np.float16), np.zeros((2000, 2), int), name="s",
        encoder="e", mpp=0.5, tile_size=256, overlap=0, min_tissue=0.1, patch_size_level0=256)
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "File too large\n", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"s.pt.json"}


def test_two_machines_with_equal_process_numbers_write_one_file_without_harm(tmp_path):
    """In containers every process may be number 1."""
    with atomic_path(tmp_path / "table") as one:
        one.write_text("of one")
        with atomic_path(tmp_path / "table") as other:
            other.write_text("of the other")
        assert (tmp_path / "table").read_text() == "of the other"
    assert (tmp_path / "table").read_text() == "of one" and len(list(tmp_path.iterdir())) == 1
