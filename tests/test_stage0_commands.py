import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from encoders import load_encoder
from slide_features import read_slide_coords, read_slide_features
from stage0_tiling import encode as stage0_encode
from stage0_tiling.encoding import encode_slide
from stage0_tiling.slide import Slide, SlideError
from tests.conftest import ROOT, environment, heed_interrupts, run_command
from tests.slides import DrawnSlide

LOGGING = """
import logging, sys
from command_line import log_to_stderr
for name, handler in (("aloud", logging.StreamHandler()), ("silent", logging.NullHandler())):
    logging.getLogger(name).addHandler(handler)
log_to_stderr(logging.getLogger("ours"))
logging.getLogger("ours").info("progress")
for name in ("aloud.part", "silent.part", "other"):
    logging.getLogger(name).warning("said by %s", name)
    logging.getLogger(name).info("chatter")
"""
COLUMNS = (
    "slide_id,path,status,format,width,height,levels,mpp,mpp_source,tissue_fraction,n_tiles,seconds,error,warning"
).split(",")
TILING = ("--tile_size", 64, "--mpp", 1.0, "--num_workers", 2)
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three good slides, a blank one and a broken one."""
    folder = tmp_path_factory.mktemp("slides")
    for i in range(3):
        DrawnSlide(width=1024, height=768, num_levels=2, seed=i).write(folder / f"good_{i}.tiff")
    DrawnSlide(width=1024, height=768, num_levels=2, pieces=()).write(folder / "blank.tiff")
    (folder / "broken.svs").write_bytes(b"not a slide")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model_args = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=model_args).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoded(slides, encoder, tmp_path_factory):
    """Output folder of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("encoded")
    run_command("stage0_tiling/encode.py", *flags(slides, folder, encoder), status=1)
    return folder


@pytest.fixture(autouse=True)
def as_many_threads_as_the_commands():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(slides, folder, encoder, *more):
    flags = ("--slides", slides, "--output_dir", folder, "--encoder", encoder, "--batch_size", 7, *TILING, *more)
    return [str(flag) for flag in flags]


def encode(slides, folder, encoder, *more, status=0):
    """Run the command in this process, which saves its start."""
    assert stage0_encode.main(flags(slides, folder, encoder, *more)) == status


def table(folder):
    with (folder / "slides.csv").open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def content(folder):
    """All that a run made, but for the seconds."""
    rows = {name: row | {"seconds": None} for name, row in table(folder).items()}
    files = {}
    for path in sorted((folder / "features").iterdir()):
        read = read_slide_features(path)
        files[path.name] = (read.features.tobytes(), read.coords.tobytes(), read.encoder)
    return rows, files, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_tile_writes_coords_overlays_and_a_table(slides, tmp_path):
    done = run_command("stage0_tiling/tile.py", "--slides", slides, "--output_dir", tmp_path, *TILING, status=1)
    assert done.stdout == "" and "slide/s" in done.stderr and "failed: broken" in done.stderr
    rows = table(tmp_path)
    assert list(rows["blank"]) == COLUMNS
    assert {name: row["status"] for name, row in rows.items()} == {
        "good_0": "done",
        "good_1": "done",
        "good_2": "done",
        "blank": "empty",
        "broken": "failed",
    }
    assert "broken.svs is no slide or image" in rows["broken"]["error"]
    good = rows["good_0"]
    assert (good["format"], good["width"], good["height"], good["levels"]) == ("generic-tiff", "1024", "768", "2")
    assert (float(good["mpp"]), good["mpp_source"]) == (pytest.approx(0.5, rel=1e-3), "slide")
    coords = read_slide_coords(tmp_path / "coords" / "good_0.h5")
    assert len(coords.coords) == int(good["n_tiles"]) > 10
    assert (coords.name, coords.mpp, coords.tile_size, coords.patch_size_level0) == ("good_0", 1.0, 64, 128)
    assert {path.stem for path in (tmp_path / "coords").iterdir()} == {"good_0", "good_1", "good_2"}
    assert {path.stem for path in (tmp_path / "overlays").iterdir()} == {"good_0", "good_1", "good_2", "blank"}
    overlay = cv2.imread(str(tmp_path / "overlays" / "good_0.jpg"))
    assert 1024 <= max(overlay.shape) <= 2048

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "coords").iterdir()}
    again = run_command("stage0_tiling/tile.py", "--slides", slides, "--output_dir", tmp_path, *TILING, status=1)
    assert "5 slides, 1 of them to tile" in again.stderr
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "coords").iterdir()}


def test_features_are_the_encoders_tokens_of_the_tiles(slides, encoder, encoded):
    rows = table(encoded)
    assert [rows[name]["status"] for name in ("good_0", "blank", "broken")] == ["done", "empty", "failed"]
    features = read_slide_features(encoded / "features" / "good_0.h5")
    coords = read_slide_coords(encoded / "coords" / "good_0.h5")
    np.testing.assert_array_equal(features.coords, coords.coords)
    assert len(features.features) % 7 != 0, "the last batch must be a short one here"
    assert features.features.dtype == np.float16 and features.encoder == str(encoder)
    assert (features.mpp, features.tile_size, features.overlap, features.min_tissue) == (1.0, 64, 0, 0.1)

    model = load_encoder(encoder)
    with Slide(slides / "good_0.tiff") as slide, torch.inference_mode():
        for (x, y), token in zip(features.coords.tolist(), features.features, strict=True):
            tile = Image.fromarray(slide.read_region(x, y, 128, 128, (64, 64)))
            expected = model.encode_tiles(model.transform(tile)[None])[0]
            np.testing.assert_allclose(token, expected.half(), rtol=2e-3, atol=2e-3)
    with h5py.File(encoded / "features" / "good_0.h5") as file:
        assert file["coords"].attrs["level0_width"] == 1024


def test_encode_slide_gives_what_the_command_stores(slides, encoder, encoded):
    counted = []
    result = encode_slide(
        slides / "good_1.tiff", load_encoder(encoder), tile_size=64, mpp=1.0, batch_size=7, on_tiles=counted.append
    )
    stored = read_slide_features(encoded / "features" / "good_1.h5")
    np.testing.assert_allclose(result.features, stored.features, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(result.coords, stored.coords)
    assert sum(counted) == len(result.coords) and set(counted[:-1]) == {7}
    assert (result.mpp, result.tile_size, result.patch_size_level0) == (1.0, 64, 128)
    with pytest.raises(SlideError, match="blank.tiff: no tissue found by otsu"):
        encode_slide(slides / "blank.tiff", load_encoder(encoder))


def test_bfloat16_is_close(slides, encoder, encoded):
    model = load_encoder(encoder)
    settings = {"tile_size": 64, "mpp": 1.0, "batch_size": 7, "dtype": torch.bfloat16}
    result = encode_slide(slides / "good_0.tiff", model, **settings).features.astype(np.float32)
    stored = read_slide_features(encoded / "features" / "good_0.h5").features.astype(np.float32)
    cosine = (result * stored).sum(1) / np.linalg.norm(result, axis=1) / np.linalg.norm(stored, axis=1)
    assert 0.99 < cosine.min() and not np.array_equal(result, stored)


def test_a_second_run_does_only_what_is_missing(slides, encoder, encoded, tmp_path, caplog):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(encoded), str(folder)], check=True)
    before = content(folder)
    (folder / "features" / "good_1.h5").unlink()
    kept = (folder / "features" / "good_0.h5").stat().st_mtime_ns
    encode(slides, folder, encoder, status=1)
    assert "5 slides, 2 of them to encode" in caplog.text  # the deleted one, and the broken one is tried again
    assert content(folder) == before
    assert (folder / "features" / "good_0.h5").stat().st_mtime_ns == kept


def test_tiles_of_tile_are_taken_over(slides, encoder, encoded, tmp_path):
    run_command("stage0_tiling/tile.py", "--slides", slides / "good_0.tiff", "--output_dir", tmp_path, *TILING)
    made = (tmp_path / "coords" / "good_0.h5").stat().st_mtime_ns
    encode(slides / "good_0.tiff", tmp_path, encoder)
    assert (tmp_path / "coords" / "good_0.h5").stat().st_mtime_ns == made
    assert content(tmp_path)[1]["good_0.h5"] == content(encoded)[1]["good_0.h5"]


def test_other_settings_or_weights_are_refused(slides, encoder, encoded, tmp_path):
    before = content(encoded)
    with pytest.raises(ValueError, match="tiled with --tile_size 64, not --tile_size 96.*--overwrite"):
        encode(slides, encoded, encoder, "--tile_size", 96)
    other = load_encoder(encoder)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds features of encoder .* not .*other"):
        encode(slides, encoded, tmp_path / "other")
    own = tmp_path / "own"
    subprocess.run(["cp", "-a", str(encoder), str(own)], check=True)
    encode(slides / "good_0.tiff", tmp_path / "out", own)
    other.save_pretrained(own)
    with pytest.raises(ValueError, match="with other weights"):
        encode(slides / "good_0.tiff", tmp_path / "out", own)
    assert before == content(encoded)


def test_overwrite_starts_anew(slides, encoder, tmp_path):
    good = slides / "good_0.tiff"
    encode(good, tmp_path, encoder)
    encode(good, tmp_path, encoder, "--tile_size", 96, "--overwrite")
    assert read_slide_features(tmp_path / "features" / "good_0.h5").tile_size == 96


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--encoder", "resnet55"), "unknown encoder resnet55: did you mean"),
        (("--slides", "nowhere"), "--slides nowhere: no such file or folder"),
        (("--overlap", 64), "--overlap 64: expected 0 to 63"),
        (("--assume_mpp", 300), "--assume_mpp 300"),
        (("--batch_size", 0), "--batch_size 0"),
    ],
)
def test_refusals_come_before_work(slides, encoder, tmp_path, wrong, message):
    with pytest.raises((ValueError, OSError), match=message):
        encode(slides, tmp_path / "out", encoder, *wrong)
    assert not (tmp_path / "out").exists()


def test_a_refusal_is_one_line_and_status_2(slides, encoder, tmp_path):
    arguments = flags("nowhere", tmp_path / "out", encoder)
    refused = run_command("stage0_tiling/encode.py", *arguments, status=2)
    assert refused.stderr == "error: --slides nowhere: no such file or folder\n" and refused.stdout == ""


def test_a_recipe_sets_defaults_that_flags_override(slides, tmp_path):
    (tmp_path / "recipe.yaml").write_text("tile_size: 96\nmpp: 1.0\noverlap: 32\n")
    arguments = ("--config", tmp_path / "recipe.yaml", "--slides", slides / "good_0.tiff", "--overlap", 0)
    run_command("stage0_tiling/tile.py", *arguments, "--output_dir", tmp_path / "out")
    coords = read_slide_coords(tmp_path / "out" / "coords" / "good_0.h5")
    assert (coords.tile_size, coords.mpp, coords.overlap) == (96, 1.0, 0)


def test_two_processes_share_the_slides(slides, encoder, encoded, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    good = [str(path) for path in sorted(slides.glob("*.tiff"))]
    command += ["stage0_tiling/encode.py", *flags(slides, tmp_path, encoder, "--slides", *good)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encoding 0" in done.stderr and "encoding 1" in done.stderr
    rows, files, names = content(tmp_path)
    expected_rows, expected_files, expected_names = content(encoded)
    del expected_rows["broken"]
    expected_names.remove("state/broken.json")
    assert rows == expected_rows and files == expected_files and names == expected_names


def test_accelerate_launch(slides, encoder, encoded, tmp_path):
    run_command("stage0_tiling/encode.py", *flags(slides / "good_0.tiff", tmp_path, encoder), processes=2)
    assert content(tmp_path)[1]["good_0.h5"] == content(encoded)[1]["good_0.h5"]


@pytest.fixture
def running(slides, encoder, tmp_path):
    """An encode run that has written some features and not all, in a process group of its own."""
    command = [sys.executable, "stage0_tiling/encode.py", *flags(slides, tmp_path, encoder)]
    slow = "import runpy, sys, slide_features.atomic as s, time\n"
    slow += "write, s.os.replace = s.os.replace, lambda a, b: (time.sleep(0.4), write(a, b))\n"
    slow += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command[1:1] = ["-c", slow]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "features").glob("*.h5")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_a_killed_run_leaves_nothing_half_written_and_is_resumed(running, slides, encoder, encoded, tmp_path):
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    finished = list((tmp_path / "features").glob("*.h5"))
    assert 0 < len(finished) < 3, "killed too early or too late"
    for path in finished:
        read_slide_features(path)
    assert not (tmp_path / "slides.csv").exists()
    encode(slides, tmp_path, encoder, status=1)
    assert content(tmp_path) == content(encoded)


def test_an_interrupted_run_says_so(running, tmp_path):
    os.kill(running.pid, signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in stderr
    assert (tmp_path / "slides.csv").exists()


def test_a_slide_that_fails_half_way_fails_alone_and_is_tried_again(slides, encoder, encoded, tmp_path):
    own = tmp_path / "slides"
    own.mkdir()
    for name in ("good_0.tiff", "good_1.tiff"):
        (own / name).write_bytes((slides / name).read_bytes())
    out = tmp_path / "out"
    run_command("stage0_tiling/tile.py", "--slides", own, "--output_dir", out, *TILING)
    (own / "good_0.tiff").write_bytes(b"torn")
    encode(own, out, encoder, status=1)
    rows = table(out)
    assert (rows["good_0"]["status"], rows["good_1"]["status"]) == ("failed", "done")
    assert not (out / "features" / "good_0.h5").exists()
    (own / "good_0.tiff").write_bytes((slides / "good_0.tiff").read_bytes())
    encode(own, out, encoder)
    assert table(out)["good_0"]["status"] == "done" and table(out)["good_0"]["error"] == ""
    assert content(out)[1] == {name: content(encoded)[1][name] for name in ("good_0.h5", "good_1.h5")}


def test_a_list_of_slides_with_a_missing_one(slides, encoder, tmp_path):
    (tmp_path / "list.csv").write_text(f"path\n{slides / 'good_0.tiff'}\n{slides / 'gone.tiff'}\n")
    encode(tmp_path / "list.csv", tmp_path / "out", encoder, status=1)
    rows = table(tmp_path / "out")
    assert rows["good_0"]["status"] == "done" and rows["gone"]["error"] == "gone.tiff does not exist"


def test_tile_starts_without_the_heavy_libraries():
    check = "import sys, stage0_tiling.tile\nprint([m for m in ('torch', 'timm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real slides in ../shared/data are not here")
def test_real_and_bad_slides(tmp_path):
    sources = (SHARED / "slides", SHARED / "bad_slides")
    run_command("stage0_tiling/tile.py", "--slides", *sources, "--output_dir", tmp_path, status=1)
    status = {name: row["status"] for name, row in table(tmp_path).items()}
    assert status["no_tissue"] == "empty" and status["CMU-1-Small-Region"] == status["needle_biopsy"] == "done"
    assert all(status[name] == "failed" for name in ("broken", "unopenable", "unreadable"))
    for name in ("PIT_06_00633_01", "TCGA-CR-7395-01A-01-TS1"):
        assert status[name] == "failed" and "--assume_mpp" in table(tmp_path)[name]["error"]
    run_command("stage0_tiling/tile.py", "--slides", SHARED / "slides", "--output_dir", tmp_path, "--assume_mpp", 0.5)
    rows = table(tmp_path)
    assert {name: (row["status"], row["mpp_source"]) for name, row in rows.items() if row["format"]} == {
        "CMU-1-Small-Region": ("done", "slide"),
        "PIT_06_00633_01": ("done", "assumed"),
        "TCGA-CR-7395-01A-01-TS1": ("done", "assumed"),
        "needle_biopsy": ("done", "slide"),
        "no_tissue": ("empty", ""),
    }
    assert not any("label" in str(path) or "macro" in str(path) for path in Path(tmp_path).rglob("*"))


def tile(slides, folder, status=0):
    return run_command("stage0_tiling/tile.py", "--slides", slides, "--output_dir", folder, *TILING, status=status)


def test_another_slide_under_the_same_name_and_broken_records_are_done_again(tmp_path):
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / "a.tiff"
    DrawnSlide(width=512, height=512, num_levels=1, seed=1).write(path)
    tile(path, tmp_path / "out")
    first = int(table(tmp_path / "out")["a"]["n_tiles"])
    DrawnSlide(width=1024, height=768, num_levels=1, seed=2).write(path)
    again = tile(path, tmp_path / "out")
    assert "a is another file than when it was tiled" in again.stderr
    assert int(table(tmp_path / "out")["a"]["n_tiles"]) > first
    assert "1 slide, 0 of them to tile" in tile(path, tmp_path / "out").stderr

    coords = tmp_path / "out" / "coords" / "a.h5"
    whole = coords.read_bytes()
    coords.write_bytes(whole[:1000])
    assert "1 slide, 1 of them to tile" in tile(path, tmp_path / "out").stderr
    assert len(read_slide_coords(coords).coords) == int(table(tmp_path / "out")["a"]["n_tiles"])

    state = tmp_path / "out" / "state" / "a.json"
    state.write_text(state.read_text().replace('"width": 1024', '"width": "wide"'))
    assert "a.json is not readable (row.width" in tile(path, tmp_path / "out").stderr


def test_overwrite_leaves_other_folders_of_features_alone(slides, encoder, tmp_path):
    backup = tmp_path / "features_backup" / "good_0.h5"
    backup.parent.mkdir()
    backup.write_bytes(b"mine")
    run_command("stage0_tiling/encode.py", *flags(slides / "good_0.tiff", tmp_path, encoder))
    run_command("stage0_tiling/encode.py", *flags(slides / "good_0.tiff", tmp_path, encoder, "--overwrite"))
    assert backup.read_bytes() == b"mine"


def test_what_a_library_tells_itself_is_not_told_twice():
    done = subprocess.run(
        [sys.executable, "-c", LOGGING], capture_output=True, text=True, env=environment(), check=True
    )
    lines = ["INFO progress", "said by aloud.part", "WARNING said by silent.part", "WARNING said by other"]
    assert done.stderr.splitlines() == lines
