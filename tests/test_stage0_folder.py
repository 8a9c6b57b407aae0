"""What the results of one folder are made with: first come, first served, also of runs that begin together."""

import json
import multiprocessing
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from slide_features import read_slide_coords
from stage0_tiling import encode, encode_slides, flags, folder_settings, survey, tile
from stage0_tiling.folder_settings import read_settings, record_settings
from stage0_tiling.plan import TilingSettings
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import SlideError
from stage0_tiling.slide_list import find_slides
from stage0_tiling.slide_run import SlideRun
from stage0_tiling.user_masks import read_mask
from tests.conftest import ROOT, environment, no_access
from tests.slides import DrawnSlide


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for i in range(3):
        DrawnSlide(width=384, height=256, num_levels=1, seed=i).write(folder / f"slide_{i}.tiff")
    return folder


def run_tile(slides, folder, *more):
    words = ["--slides", slides, "--output_dir", folder, "--tile_size", 64, "--num_workers", 1, *more]
    return tile.main([str(word) for word in words])


def record(path, number, start, stood):
    start.wait()
    stood.put(record_settings(path, {"number": number})["number"])


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_record_stands_for_all(tmp_path, has_links, monkeypatch):
    if not has_links:

        def link(*_):
            raise OSError(folder_settings.errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", link)
    forked = multiprocessing.get_context("fork")
    start, stood = forked.Event(), forked.Queue()
    path = tmp_path / "settings" / "tiling.json"
    processes = [forked.Process(target=record, args=(path, i, start, stood)) for i in range(6)]
    for process in processes:
        process.start()
    start.set()
    numbers = {stood.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert numbers == {read_settings(path)["number"]}, "all processes go by the same record"
    assert [file.name for file in path.parent.iterdir()] == ["tiling.json"]


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not readable .*delete it"):
        read_settings(tmp_path / "a.json")


@pytest.mark.parametrize("stored", ["{}", '{"mpp": 0.5}'])
def test_a_record_without_settings_is_no_record(slides, tmp_path, stored):
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "tiling.json").write_text(stored)
    with pytest.raises(ValueError, match=r"tiling.json holds no settings: delete it|the record lacks tile_size: "):
        run_tile(slides, tmp_path)
    assert not (tmp_path / "coords").exists()


def test_settings_are_told_as_flags():
    had = {"tile_size": 256, "mpp": 0.5, "masks": True, "icc": False, "segmenter": None}
    other = {"tile_size": 256, "mpp": 1.0, "masks": False, "icc": True, "segmenter": "grandqc"}
    with pytest.raises(ValueError) as refusal:
        folder_settings.check_same_tiling("s.svs", had, other, "mend")
    assert str(refusal.value) == (
        "s.svs tiled with --mpp 0.5, --masks and without --icc, --segmenter, "
        "not --mpp 1.0, --icc, --segmenter grandqc and without --masks: mend"
    )
    with pytest.raises(ValueError, match="^s.svs tiled without --icc, not with --icc: mend$"):
        folder_settings.check_same_tiling("s.svs", had, had | {"icc": True}, "mend")


def test_of_two_runs_that_begin_together_on_an_empty_folder_one_is_refused(slides, tmp_path):
    entries, one, other = find_slides([str(slides)]), RunFolder(tmp_path), RunFolder(tmp_path)
    fine, coarse = TilingSettings(64, 0.5), TilingSettings(64, 1.0)
    for folder, settings in ((one, fine), (other, coarse)):  # neither finds a slide of the other's
        run = SlideRun(entries, folder, lambda entry, f=folder, s=settings: f.needs_tiling(entry, s), description="")
        assert len(run.missing) == 3
    one.begin(fine)
    with pytest.raises(ValueError, match=r"was begun with slides tiled with --mpp 0.5, not --mpp 1.0: choose another"):
        other.begin(coarse)
    one.begin(fine)
    made_by = {"features": {"encoder": "a", "fingerprint": "1"}}
    one.begin(fine, made_by)
    with pytest.raises(ValueError, match="features holds features of encoder a, not b"):
        other.begin(fine, {"features_b": made_by["features"], "features": {"encoder": "b", "fingerprint": "2"}})
    assert not (tmp_path / "settings" / "features_b.json").exists(), "nothing is recorded of a run that is refused"


def test_a_run_stops_where_another_has_begun_the_folder_anew(slides, tmp_path):
    entries, folder = find_slides([str(slides)]), RunFolder(tmp_path)
    settings = TilingSettings(64, 0.5)
    folder.begin(settings)
    run = SlideRun(entries, folder, lambda entry: folder.needs_tiling(entry, settings), description="")
    (tmp_path / "settings" / "tiling.json").unlink()
    RunFolder(tmp_path).begin(TilingSettings(64, 1.0))
    with pytest.raises(ValueError, match="--mpp 1.0, not --mpp 0.5"), run.working():
        list(run.take())
    assert not list((tmp_path / "claims").iterdir()), "and keeps no claim"


def test_other_slides_with_other_settings_are_refused_and_overwrite_begins_anew(slides, tmp_path):
    first, second = slides / "slide_0.tiff", slides / "slide_1.tiff"
    assert run_tile(first, tmp_path) == 0
    assert run_tile(second, tmp_path) == 0
    for more in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="tiled with --mpp 0.5, not --mpp 1.0"):
            run_tile(second, tmp_path, "--mpp", 1, *more)
    assert len(list((tmp_path / "coords").iterdir())) == 2, "nothing is deleted where that is refused"
    assert run_tile(slides, tmp_path, "--mpp", 1, "--overwrite") == 0
    assert json.loads((tmp_path / "settings" / "tiling.json").read_text())["mpp"] == 1.0


def test_two_commands_with_different_settings_do_not_mix(slides, tmp_path):
    command = [sys.executable, "stage0_tiling/tile.py", "--slides", slides, "--output_dir", tmp_path, "--tile_size"]
    runs = [
        subprocess.Popen([*map(str, command), size], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
        for size in ("64", "96")
    ]
    told = [run.communicate(timeout=100)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], told
    sizes = {read_slide_coords(path).tile_size for path in (tmp_path / "coords").iterdir()}
    assert len(sizes) == 1 and len(list((tmp_path / "coords").iterdir())) == 3


def test_a_changed_mask_is_seen_and_its_slide_done_again(slides, tmp_path, caplog):
    masks, out = tmp_path / "masks", tmp_path / "out"
    masks.mkdir()
    whole = np.full((32, 48), 255, np.uint8)
    cv2.imwrite(str(masks / "slide_0.png"), whole)
    cv2.imwrite(str(masks / "slide_1.png"), whole)

    def tiles():
        assert run_tile(slides, out, "--masks", masks) == 0
        return {path.stem: len(read_slide_coords(path).coords) for path in (out / "coords").iterdir()}

    before = tiles()
    made = {path: path.stat().st_mtime_ns for path in (out / "coords").iterdir()}
    assert tiles() == before and made == {path: path.stat().st_mtime_ns for path in made}
    whole[:, 24:] = 0
    cv2.imwrite(str(masks / "slide_0.png"), whole)
    (masks / "slide_1.png").unlink()
    cv2.imwrite(str(masks / "slide_2.png"), whole)
    after = tiles()
    assert after["slide_0"] == before["slide_0"] // 2
    for name in ("slide_0", "slide_1", "slide_2"):
        told = f"the mask of {name} is not what it was when it was tiled; it is done again"
        assert caplog.text.count(told) == 1, "once, however often it is looked at"
    caplog.clear()
    assert tiles() == after and "done again" not in caplog.text


# Flags


@pytest.mark.parametrize(
    ("command", "wrong", "message"),
    [
        (tile, ["--num_workers", "-1"], "--num_workers -1: expected 0 or more threads"),
        (tile, ["--output_dir", ""], "--output_dir '': name a folder"),
        (tile, ["--output_dir", "FILE"], "--output_dir .*FILE: .*FILE is a file; name a folder"),
        (tile, ["--output_dir", "FILE/below"], "below: .*FILE is a file; name a folder"),
        (survey, ["--output_dir", ""], "--output_dir '': name a folder"),
        (survey, ["--num_workers", "-2"], "--num_workers -2: expected 0 or more threads"),
        (encode, ["--encoder", ""], "--encoder '': name an encoder"),
        (encode, ["--encoder", "vit_tiny_patch16_224", " "], "--encoder ' ': name an encoder"),
        (encode, ["--ray_actors", "2"], "--ray_actors 2 is for --engine ray: add that"),
        (encode, ["--ray_address", "a:1"], "--ray_address a:1 is for --engine ray"),
        (encode, ["--local_cache", "FILE"], "--local_cache .*FILE: .*FILE is a file; name a folder"),
    ],
)
def test_flags_that_mean_nothing_are_refused(slides, tmp_path, command, wrong, message):
    (tmp_path / "FILE").write_text("x")
    words = ["--slides", str(slides), "--output_dir", str(tmp_path / "out")]
    words += ["--encoder", "resnet18"] if command is encode else []
    wrong = [str(tmp_path / word) if word.startswith("FILE") else word for word in wrong]
    with pytest.raises((ValueError, OSError), match=message):
        command.main([*words, *wrong])
    assert not (tmp_path / "out").exists()


def test_folders_and_slides_without_access_are_named(slides, tmp_path, monkeypatch, caplog):
    """The tests may run as a user to whom everything is allowed."""
    with monkeypatch.context() as patched:
        patched.setattr("command_line.tempfile.TemporaryFile", no_access)
        for command in (tile, survey):
            with pytest.raises(PermissionError, match="--output_dir .*/out: nothing can be written there"):
                command.main(["--slides", str(slides), "--output_dir", str(tmp_path / "out")])
        with pytest.raises(PermissionError, match="--output_dir .*: nothing can be written there"):
            command = ["--features_dir", str(slides), "--slide_encoder", "mean", "--output_dir", str(tmp_path)]
            encode_slides.main(command)
    real, slide = os.access, slides / "slide_1.tiff"
    monkeypatch.setattr(flags.os, "access", lambda path, mode: path != slide and real(path, mode))
    assert run_tile(slides, tmp_path / "out") == 1
    assert "failed: slide_1: slide_1.tiff may not be read by this user: get access to it" in caplog.text
    assert len(list((tmp_path / "out" / "coords").iterdir())) == 2


def test_very_many_tiles_and_what_is_not_measured_are_told(slides, tmp_path, caplog):
    assert run_tile(slides / "slide_0.tiff", tmp_path, "--overlap", 60) == 0
    assert "--overlap 60 of 64 px makes 256 times as many tiles as none" in caplog.text
    caplog.clear()
    assert run_tile(slides, tmp_path, "--overlap", 60, "--quality") == 0
    told = [record.getMessage() for record in caplog.records if "--quality" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("--quality: 1 slide, slide_0 first, tiled before without the blur")
    assert set(read_slide_coords(tmp_path / "coords" / "slide_1.h5").quality) >= {"blur"}
    caplog.clear()
    assert run_tile(slides, tmp_path, "--overlap", 60, "--quality", "--overwrite") == 0
    assert "--quality" not in caplog.text


@pytest.mark.parametrize("colours", [[0, 0, 0, 9, 9, 9], [255, 255, 255, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
def test_a_mask_with_a_palette_is_read_where_numbers_and_colours_agree(tmp_path, colours):
    numbers = np.zeros((20, 30), np.uint8)
    numbers[5:9] = 1
    picture = Image.fromarray(numbers, "P")
    picture.putpalette(colours)
    picture.save(tmp_path / "m.png")
    if colours[0] == 0 and colours[-1]:
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (20, 30), 300, 200), numbers > 0)
        return
    with pytest.raises(SlideError, match="mask m.png has a palette in which numbers and colours differ"):
        read_mask(tmp_path / "m.png", (20, 30), 300, 200)
