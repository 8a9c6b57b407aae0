"""Rows read straight from HDF5 files: equal to the library's, whatever the layout, and nothing else is read."""

import os

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdf5_rows import read_rows_directly
from slide_features import choose_patches, read_patches, read_slide_features, write_slide_features

PLAIN = ["contiguous", "chunks"]
OTHER = ["compressed", "narrow chunks", "userblock", "never written", "in memory"]


def make_dataset(path, layout: str, array: np.ndarray, rows_per_chunk: int = 3) -> h5py.File:
    chunks = (1,) * (array.ndim - 2) + (min(rows_per_chunk, array.shape[-2]), array.shape[-1])
    if layout == "narrow chunks":
        chunks = (*chunks[:-1], array.shape[-1] - 1)
    path.unlink(missing_ok=True)
    with h5py.File(path, "w", userblock_size=512 if layout == "userblock" else 0) as file:
        if layout == "never written":
            file.create_dataset("x", shape=array.shape, dtype=array.dtype, chunks=chunks)
        else:
            more = {"compression": "gzip"} if layout == "compressed" else {}
            file.create_dataset("x", data=array, chunks=None if layout == "contiguous" else chunks, **more)
    return h5py.File(path, "r", **({"driver": "core"} if layout == "in memory" else {}))


@settings(max_examples=80, deadline=None)
@given(
    layout=st.sampled_from(PLAIN),
    rows_per_chunk=st.integers(1, 50),
    dtype=st.sampled_from(["<f2", "<f4", ">f4", "<f8", "<i8"]),
    has_batch_axis=st.booleans(),
    rows=st.lists(st.integers(0, 39), max_size=60).map(sorted),
)
def test_equals_the_library_in_every_plain_layout(
    tmp_path_factory, layout, rows_per_chunk, dtype, has_batch_axis, rows
):
    array = np.random.default_rng(0).normal(size=(40, 5)).astype(dtype)
    path = tmp_path_factory.getbasetemp() / "rows.h5"
    stored = array[None] if has_batch_axis else array
    with make_dataset(path, layout, stored, rows_per_chunk) as file:
        out = read_rows_directly(file["x"], np.array(rows, dtype=np.int64))
    assert out.dtype == array.dtype
    assert out.tobytes() == array[rows].tobytes()


@pytest.mark.parametrize("layout", OTHER)
def test_what_is_stored_otherwise_is_left_to_the_library(tmp_path, layout):
    array = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    with make_dataset(tmp_path / "x.h5", layout, array) as file:
        assert read_rows_directly(file["x"], np.array([1, 7])) is None


@pytest.mark.parametrize("layout", PLAIN + OTHER)
def test_feature_files_of_any_layout_give_the_rows_asked_for(tmp_path, layout):
    array = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    make_dataset(tmp_path / "x.h5", layout, array).close()
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file.move("x", "features")
    expected = np.zeros_like(array) if layout == "never written" else array
    rows = np.array([0, 3, 4, 5, 39])
    assert (read_slide_features(tmp_path / "x.h5", rows=rows).features == expected[rows]).all()


def test_few_of_many_rows_read_little_else(tmp_path, monkeypatch):
    features = np.random.default_rng(0).normal(size=(5_000, 64)).astype(np.float16)
    facts = {"encoder": "e", "mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}
    write_slide_features(tmp_path / "x.h5", features, np.zeros((5_000, 2), dtype=np.int64), name="x", **facts)
    seen, plain = [], os.preadv

    def counted(file_number, buffers, offset):
        seen.append(plain(file_number, buffers, offset))
        return seen[-1]

    monkeypatch.setattr(os, "preadv", counted)
    rows = choose_patches(5_000, 100, np.random.default_rng(1))
    assert (read_slide_features(tmp_path / "x.h5", rows=rows).features == features[rows]).all()
    positions = [5000 * 16]  # in two chunks, one behind the other
    assert seen[:1] == positions and sum(seen[1:]) == 100 * 64 * 2
    seen.clear()
    read_slide_features(tmp_path / "x.h5", rows=np.arange(256, 512))
    assert seen == [*positions, 256 * 64 * 2]  # what lies together is read together


def test_a_file_that_ends_too_early_is_named(tmp_path, monkeypatch):
    with make_dataset(tmp_path / "x.h5", "contiguous", np.ones((40, 5), dtype=np.float32)) as file:
        monkeypatch.setattr(os, "preadv", lambda *_: 3)
        with pytest.raises(OSError, match="x.h5 ends within row 7"):
            read_rows_directly(file["x"], np.array([7]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_feature_that_is_not_finite_is_found(tmp_path, dtype, bad):
    features = np.full((6, 5), np.finfo(dtype).max, dtype=dtype)
    facts = {"encoder": "e", "mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}
    write_slide_features(tmp_path / "x.h5", features, np.zeros((6, 2), dtype=np.int64), name="x", **facts)
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file["features"][4, 2] = file["features"][1, 0] = bad
    read_slide_features(tmp_path / "x.h5", rows=np.array([3]))
    for read in (read_slide_features, read_patches):
        for rows in (np.array([4]), np.array([1, 4]), lambda coords: np.array([1]), None):
            with pytest.raises(ValueError, match="2 of 6 features are not finite"):  # of the file, whatever is read
                read(tmp_path / "x.h5", rows)
