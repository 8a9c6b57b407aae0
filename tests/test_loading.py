"""Reading patch tokens and sending batches fast: equal to the plain way, whatever the file and whatever changed."""

import os

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slide_features import read_patches, read_slide_features, write_slide_features
from slide_features.reading import _layout
from slide_reports import Prompt, Record, ReportDataset, collate
from slide_reports.batches import RecordBatches, make_loader
from slide_reports.transfer import SharedBatch
from tests.tiny_models import make_tokenizer

FACTS = {"encoder": "made-up", "mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}


def write(path, num_tiles=300, width=8, seed=0, dtype=np.float16, shuffled=False):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_tiles, width)).astype(dtype)
    coords = np.stack([np.arange(num_tiles) % 10, np.arange(num_tiles) // 10], axis=1) * 256
    if shuffled:
        coords = rng.permutation(coords)
    write_slide_features(path, features, coords, name=path.stem, **FACTS)
    return features, coords


def foreign(path, form):
    """A file of another system."""
    rng = np.random.default_rng(1)
    features, coords = rng.normal(size=(40, 6)).astype(np.float32), rng.permutation(80).reshape(40, 2)
    with h5py.File(path, "w") as file:
        if form == "batch axis":
            file["features"], file["coords"] = features[None], coords
        elif form == "yx":
            file["features"], file["coords_yx"] = features, coords.astype(np.float32)
        elif form == "features alone":
            file["feats"] = features
        elif form == "compressed":
            file.create_dataset("features", data=features, compression="gzip")
            file["coords"] = coords
        elif form == "compressed positions":
            file["features"] = features
            file.create_dataset("coords", data=coords[None], compression="gzip")
        elif form == "double":
            file["features"], file["coords"] = features.astype(np.float64), coords[None].astype(np.int32)


@pytest.mark.parametrize("rows", [None, [0], [3, 4, 5, 39], [], "chosen"])
@pytest.mark.parametrize("form", ["batch axis", "yx", "features alone", "compressed", "compressed positions", "double"])
def test_patches_are_those_of_the_whole_file(tmp_path, form, rows):
    foreign(tmp_path / "x.h5", form)
    whole = read_slide_features(tmp_path / "x.h5")
    chosen = np.arange(0, 40, 7) if rows == "chosen" else None if rows is None else np.array(rows, dtype=np.int64)
    if rows == []:
        with pytest.raises(ValueError, match="no tiles"):
            read_patches(tmp_path / "x.h5", rows=chosen)
        return
    for _ in range(2):  # anew, and as it is remembered
        asked = (lambda coords: chosen) if rows == "chosen" else chosen
        features, coords = read_patches(tmp_path / "x.h5", rows=asked)
        expected = slice(None) if chosen is None else chosen
        np.testing.assert_array_equal(features, whole.features[expected])
        np.testing.assert_array_equal(coords, whole.coords[expected])
        assert features.dtype == whole.features.dtype and coords.dtype == np.int64


def test_a_file_that_is_replaced_or_broken_is_noticed(tmp_path):
    path = tmp_path / "x.h5"
    for seed in (0, 1):
        features, coords = write(path, seed=seed, shuffled=seed == 1)
        read = read_patches(path, rows=np.arange(5, 9))
        np.testing.assert_array_equal(read[0], features[5:9])
        np.testing.assert_array_equal(read[1], coords[5:9])
    for rows in ([-1], [300], [4, 3]):
        with pytest.raises(ValueError, match="rows must be sorted and within 0 to 299"):
            read_patches(path, rows=np.array(rows))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        read_patches(path)
    path.write_bytes(whole.replace(b"features", b"somethin"))
    with pytest.raises(ValueError, match="holds no dataset `features`"):
        read_patches(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no feature file"):
        read_patches(path)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match="no feature file"):
        read_patches(path)


def test_the_library_opens_a_file_once(tmp_path, monkeypatch):
    write(tmp_path / "x.h5")
    _layout.cache_clear()
    opened, plain = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda *args, **more: opened.append(args) or plain(*args, **more))
    for _ in range(3):
        read_patches(tmp_path / "x.h5", rows=np.arange(4))
    assert len(opened) == 1
    os.utime(tmp_path / "x.h5", ns=(1, 1))
    read_patches(tmp_path / "x.h5", rows=np.arange(4))
    assert len(opened) == 2


def dataset(folder, num_records=7):
    records = []
    for i in range(num_records):
        write(folder / f"{i}.h5", num_tiles=20 + 40 * i, seed=i, shuffled=i % 2 == 1, dtype=np.float16)
        inputs = (folder / f"{i}.h5", folder / "0.h5") if i == 3 else (folder / f"{i}.h5",)
        records.append(Record(str(i), inputs, "" if i % 3 else "Which organ?", f"Breast {i}.", str(i)))
    prompt = Prompt("<bos>", "{question}", "<eos>")
    return ReportDataset(records, make_tokenizer(), prompt, "Write.", num_patches=48, seed=5, num_visual_tokens=16)


def test_batches_of_worker_processes_are_those_of_this_one(tmp_path):
    data = dataset(tmp_path)
    batches = RecordBatches(len(data), 2, shuffle=True, seed=3)
    for epoch in range(2):
        batches.start_at(epoch)
        kept = []
        for sent, plain in zip(make_loader(data, batches, 2), make_loader(data, batches, 0), strict=True):
            assert type(sent) is dict and list(sent) == list(plain)
            kept.append((sent, plain))
        for sent, plain in kept:  # what was sent first is still what it was
            for name, tensor in plain.items():
                assert sent[name].dtype == tensor.dtype
                torch.testing.assert_close(sent[name], tensor, rtol=0, atol=0)
                assert sent[name].is_contiguous()
                sent[name].add_(1) if tensor.dtype != torch.bool else None  # and may be changed in place


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([torch.float16, torch.float32, torch.int64, torch.bool]), min_size=5, max_size=5),
)
def test_tensors_of_any_shape_and_type_are_taken_apart_as_they_were(shapes, dtypes):
    batch = {
        str(i): torch.randint(0, 2, shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    take_apart, parts = SharedBatch(batch).__reduce__()
    found = take_apart(*parts)
    assert found.keys() == batch.keys()
    for name, tensor in batch.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_samples_collate_alike_in_a_worker_or_not(tmp_path):
    data = dataset(tmp_path, 2)
    samples = [data[key] for key in next(iter(RecordBatches(2, 2)))]
    assert collate(samples).keys() == next(iter(make_loader(data, RecordBatches(2, 2), 1))).keys()
