"""Encoding by several processes, from copies, and on Ray: always what one plain process makes."""

import subprocess
import sys
import time

import pytest
import torch

from encoders import load_encoder
from slide_features import read_slide_features
from stage0_tiling import encode as stage0_encode
from stage0_tiling import tile as stage0_tile
from stage0_tiling.run_table import RunFolder
from tests.conftest import ROOT, environment, run_on_two
from tests.slides import DrawnSlide

# Runs a script with a line added to a log whenever a slide is encoded, slowly.
HOOKED = """
import os, runpy, sys, time
import stage0_tiling.encoding as encoding
encode = encoding.encode_slide_with
def logged(slide, *args, **kwargs):
    with open(os.environ["ATTEMPTS"], "a") as log:
        print(slide.path.stem, file=log)
    time.sleep(float(os.environ.get("SLOW", 0)))
    return encode(slide, *args, **kwargs)
encoding.encode_slide_with = logged
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for i in range(6):
        DrawnSlide(width=384, height=256, num_levels=1, seed=i).write(folder / f"slide_{i}.tiff")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model_args = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=model_args).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(slides, encoder, tmp_path_factory):
    """What one uninterrupted process makes of them."""
    folder = tmp_path_factory.mktemp("plain")
    assert encode(slides, folder, encoder) == 0
    return folder


@pytest.fixture(autouse=True)
def as_many_threads_as_the_commands():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(slides, folder, encoder, *more):
    tiling = ("--tile_size", 64, "--mpp", 1.0, "--num_workers", 1, "--batch_size", 4)
    return [str(x) for x in ("--slides", slides, "--output_dir", folder, "--encoder", encoder, *tiling, *more)]


def encode(slides, folder, encoder, *more):
    return stage0_encode.main(flags(slides, folder, encoder, *more))


def content(folder):
    """Features, positions and records of a run, but for seconds and who recorded them; names of all files."""
    features, rows = {}, {}
    for path in sorted((folder / "features").iterdir()):
        read, state = read_slide_features(path), RunFolder(folder).read_state(path.stem)
        features[path.stem] = read.features.tobytes(), read.coords.tobytes(), read.encoder_fingerprint
        rows[path.stem] = vars(state.row) | {"seconds": None, "encoded": state.encoded}
    return features, rows, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_joins_another_that_is_then_killed(slides, encoder, plain, tmp_path, caplog):
    log, out = tmp_path / "log", tmp_path / "out"
    log.touch()
    command = [sys.executable, "-c", HOOKED, "stage0_tiling/encode.py", *flags(slides, out, encoder)]
    other = subprocess.Popen(
        command, cwd=ROOT, env=environment() | {"ATTEMPTS": str(log), "SLOW": "1000"}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 100
        while not log.read_text() and time.monotonic() < deadline and other.poll() is None:
            time.sleep(0.05)
        (in_work,) = log.read_text().split()
        assert encode(slides, out, encoder) == 0
        assert "in work elsewhere; " in caplog.text
        done = {path.stem for path in (out / "features").iterdir()}
        assert 3 <= len(done) < 6 and in_work not in done, "others than those that the first run has in work"
        kept = {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()}
    finally:
        other.kill()
        other.wait()
    assert encode(slides, out, encoder) == 0
    assert content(out) == content(plain)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_squares_are_written_by_the_encoding_script_too(slides, encoder, tmp_path):
    """As by the tiling script, also for slides encoded before."""
    slide, squares = slides / "slide_0.tiff", "geojson_tiles/slide_0.geojson"
    tiling = ("--tile_size", "64", "--mpp", "1.0", "--geojson_tiles")
    assert stage0_tile.main(["--slides", str(slide), "--output_dir", str(tmp_path / "tiled"), *tiling]) == 0
    assert encode(slide, tmp_path / "out", encoder) == 0
    features = (tmp_path / "out" / "features" / "slide_0.h5").stat().st_mtime_ns
    assert encode(slide, tmp_path / "out", encoder, "--geojson_tiles") == 0
    assert (tmp_path / "out" / squares).read_bytes() == (tmp_path / "tiled" / squares).read_bytes()
    assert (tmp_path / "out" / "features" / "slide_0.h5").stat().st_mtime_ns == features
    run_on_two("stage0_tiling/encode.py", *flags(slides, tmp_path / "two", encoder, "--geojson_tiles"))
    assert len(list((tmp_path / "two" / "geojson_tiles").iterdir())) == 6


def test_copies_on_a_local_disk_give_the_same(slides, encoder, plain, tmp_path):
    cache = tmp_path / "cache"
    assert encode(slides, tmp_path / "out", encoder, "--local_cache", cache, "--local_cache_gb", 0.1) == 0
    assert content(tmp_path / "out") == content(plain)
    assert [path.name for path in cache.iterdir()] == [".slidescribe.lock"]


def test_a_cache_without_room_is_refused(slides, encoder, tmp_path):
    with pytest.raises(ValueError, match="--local_cache_gb 0: expected more than 0"):
        encode(slides, tmp_path / "out", encoder, "--local_cache", tmp_path, "--local_cache_gb", 0)
    assert not (tmp_path / "out").exists()


def test_the_last_line_tells_tiles_and_speed(slides, encoder, plain, tmp_path, caplog, capsys):
    assert encode(slides / "slide_0.tiff", tmp_path, encoder) == 0
    number = len(read_slide_features(plain / "features" / "slide_0.h5").coords)
    assert f"1 done, 0 empty, 0 failed; {number} tiles in " in caplog.text and "tiles/s; see " in caplog.text
    assert "1/1 [" in (bar := capsys.readouterr().err) and "tiles/s, 0 left" in bar
    assert encode(slides / "slide_0.tiff", tmp_path, encoder) == 0
    assert "1 slide, 0 of them to encode" in caplog.text
