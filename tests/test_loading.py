"""Reading patch tokens and sending batches fast: equal to the plain way, whatever the file and whatever changed."""

import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import run
from slide_features import read_patches, read_slide_features, write_slide_features
from slide_features.header import read_header
from slide_reports import Prompt, Record, ReportDataset, collate
from slide_reports.batches import RecordBatches, make_loader
from slide_reports.transfer import PIECES, BatchMemory, SendingCollate, SentBatch
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


def test_a_file_of_the_same_size_and_time_is_noticed(tmp_path):
    path = tmp_path / "x.h5"
    features, _ = write(path)
    assert read_slide_features(path, rows=np.arange(4)).encoder == "made-up"
    before = path.stat()
    path.write_bytes(
        path.read_bytes().replace(b"made-up", b"made-UP").replace(features.tobytes(), (-features).tobytes())
    )
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # written in place, as rsync --inplace --times does
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    read = read_slide_features(path, rows=np.arange(4))
    assert read.encoder == "made-UP"
    np.testing.assert_array_equal(read.features, -features[:4])


def test_a_file_that_is_replaced_while_it_is_opened_is_read_as_one_or_the_other(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    write(path, num_tiles=300, width=8)
    new = tmp_path / "new.h5"
    features, coords = write(new, num_tiles=500, width=12, seed=1, shuffled=True)
    plain = h5py.File

    def replace_first(*args, **more):
        if new.exists():
            new.replace(path)
        return plain(*args, **more)

    read_header.cache_clear()
    monkeypatch.setattr(h5py, "File", replace_first)
    for _ in range(2):
        read = read_patches(path, rows=np.arange(5, 9))
        np.testing.assert_array_equal(read[0], features[5:9])
        np.testing.assert_array_equal(read[1], coords[5:9])


def test_the_library_opens_a_file_once(tmp_path, monkeypatch):
    write(tmp_path / "x.h5")
    read_header.cache_clear()
    opened, plain = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda *args, **more: opened.append(args) or plain(*args, **more))
    for read in (read_slide_features, read_patches, read_slide_features):
        read(tmp_path / "x.h5", rows=np.arange(4))
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
    receive, parts = SentBatch(batch).__reduce__()
    found = receive(*parts)
    assert found.keys() == batch.keys()
    for name, tensor in batch.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_a_piece_is_used_again_only_when_its_tensors_are_gone():
    memory = BatchMemory(1)
    memory.become_reader()
    first = {"x": torch.arange(1000), "y": torch.tensor([True])}

    def send(batch):
        sent = SentBatch(batch, memory)
        receive, parts = sent.__reduce__()
        return receive(*parts), parts

    received = [send({"x": first["x"] + i, "y": first["y"]}) for i in range(PIECES + 2)]
    for i, (batch, _) in enumerate(received):
        assert torch.equal(batch["x"], first["x"] + i), "each is still what it was"
    used = [parts[0] for _, parts in received]
    assert [piece.number for piece in used[:PIECES]] == list(range(PIECES))
    assert all(isinstance(where, torch.Tensor) for where in used[PIECES:]), "without a free piece, new memory"
    view = received[2][0]["x"][5:7]
    received.clear()  # all but a view of the third
    numbers = set()
    for _ in range(9):
        batch, parts = send(first)
        numbers.add(parts[0].number)
        assert torch.equal(batch["x"], first["x"]) and view.tolist() == [7, 8]
        del batch
    assert 2 not in numbers and numbers
    larger, parts = send({"x": torch.arange(50_000)})
    assert torch.equal(larger["x"], torch.arange(50_000)) and view.tolist() == [7, 8]


def test_a_batch_that_was_lost_frees_its_piece_and_is_never_taken_for_another():
    memory = BatchMemory(2)
    memory.become_reader()
    lost = SentBatch({"x": torch.arange(3)}, memory).__reduce__()
    forked = multiprocessing.get_context("fork")

    def another(queue):
        memory.become_reader()
        queue.put(memory._own)

    queue = forked.Queue()
    readers = [forked.Process(target=another, args=(queue,)) for _ in range(2)]
    for reader in readers:
        reader.start()
        assert queue.get(timeout=60) == 1, "the first reader lives, and has its pieces to itself"
        reader.join()
    memory.become_reader()  # as if after its death
    new, parts = SentBatch({"x": torch.arange(5)}, memory).__reduce__()
    assert parts[0].number == 0
    with pytest.raises(RuntimeError, match="has died, and the batch with it"):
        lost[0](*lost[1])
    assert torch.equal(new(*parts)["x"], torch.arange(5))


def test_passes_that_are_left_early_or_run_side_by_side_give_the_same(tmp_path):
    data = dataset(tmp_path)
    batches = RecordBatches(len(data), 1, shuffle=True, seed=3)
    loader, plain = make_loader(data, batches, 2), [batch for batch in make_loader(data, batches, 0)]
    for _ in range(3):
        for number, batch in enumerate(loader):
            assert torch.equal(batch["patch_tokens"], plain[number]["patch_tokens"])
            if number == 1:
                break
    for one, other, expected in zip(loader, loader, plain, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(one[name], tensor) and torch.equal(other[name], tensor)
            one[name].zero_()


def test_what_a_worker_process_refuses_is_one_line(tmp_path, capsys):
    data = dataset(tmp_path, num_records=3)
    loader = make_loader(data, RecordBatches(len(data), 1), 1)
    (tmp_path / "1.h5").unlink()
    with pytest.raises(SystemExit) as left:
        run(lambda: len(list(loader)))
    assert left.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"error: no feature file {tmp_path / '1.h5'}; stage0_tiling/encode.py makes it"
    assert not any("Traceback" in line for line in told)


def test_loaders_of_many_workers_have_few_files_open():
    before = len(os.listdir("/proc/self/fd"))
    loaders = [SendingCollate(collate, 64) for _ in range(2)]
    assert all(loader._memory for loader in loaders)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    memory = loaders[0]._memory
    memory.become_reader()
    batch = {"x": torch.arange(100_000)}
    receive, parts = SentBatch(batch, memory).__reduce__()
    assert torch.equal(receive(*parts)["x"], batch["x"])
    assert os.fstat(memory._file).st_blocks * 512 < 2**20, "only what was written takes memory"
    del loaders, memory
    assert len(os.listdir("/proc/self/fd")) <= before


def test_too_little_shared_memory_is_one_clear_line(monkeypatch):
    def refuse(num_bytes):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", refuse)
    with pytest.raises(
        OSError, match=r"a batch of 8 MiB does not fit .* \(docker run --shm-size 8g\), or --num_workers 0"
    ):
        SentBatch({"x": torch.zeros(2**20, dtype=torch.int64)})


def test_without_memory_of_our_own_batches_go_the_plain_way(monkeypatch):
    def refuse(name):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert SendingCollate(collate, 2)._memory is None


def test_the_way_of_sending_can_be_given_to_a_process_that_is_not_forked():
    sending = pickle.loads(pickle.dumps(SendingCollate(collate, 2)))
    assert sending._memory is None
