"""Copies of slides on a local disk: which files, in how much space, what is left behind."""

import errno
import os
import signal
import subprocess
import sys
import threading

from stage0_tiling.local_cache import LocalCache
from stage0_tiling.run_table import RunFolder, SlideRow, SlideState
from stage0_tiling.slide import Slide
from stage0_tiling.slide_files import files_of
from stage0_tiling.slide_list import find_slides
from stage0_tiling.slide_run import SlideRun
from tests.conftest import ROOT
from tests.dicom_slides import write_dicom_slide
from tests.slides import DrawnSlide


def make(folder, **sizes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name.replace("__", ".")).write_bytes(os.urandom(size))
    return folder


def names(path):
    return [str(file.relative_to(path.parent)) for file in files_of(path)]


def copies(folder):
    """All that lies in a cache, but for its locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name[0] != "." and path.is_file())


def test_a_slide_of_many_files_is_copied_whole(tmp_path):
    source = make(tmp_path / "in", a__svs=10, b__mrxs=5, other__dat=1)
    make(source / "b", Index__dat=3, Slidedat__ini=4)
    (source / "c.vms").write_bytes(
        b"[Virtual Microscope Specimen]\r\nImageFile=c-0.jpg\r\nMapFile=c.map\nMap=../a.svs\n"
    )
    make(source, **{"c-0__jpg": 6, "c__map": 6})
    assert names(source / "a.svs") == ["a.svs"]
    assert names(source / "b.mrxs") == ["b.mrxs", "b/Index.dat", "b/Slidedat.ini"]
    assert names(source / "c.vms") == ["c.vms", "c-0.jpg", "c.map"]
    with LocalCache(tmp_path / "cache", bound=1000) as cache:
        for path in (source / "b.mrxs", source / "c.vms", source / "a.svs"):
            copy = cache.stage(path)
            assert copy.name == path.name and copy.is_relative_to(tmp_path / "cache")
            for name in names(path):
                assert (copy.parent / name).read_bytes() == (source / name).read_bytes()
            assert oct(next((tmp_path / "cache").glob("slidescribe-*")).stat().st_mode)[-3:] == "700"
            cache.drop(copy)
            assert cache.used == 0 and not copies(tmp_path / "cache")


def test_a_copy_of_a_dicom_slide_is_of_its_series_alone_and_without_its_label(tmp_path):
    picture = DrawnSlide(width=600, height=400).draw()[0]
    ours = write_dicom_slide(tmp_path / "in", "one", picture, 0.5, label=picture[:80, :80])
    write_dicom_slide(tmp_path / "in", "two", picture, 0.5)
    with LocalCache(tmp_path / "cache", bound=1 << 30) as cache, Slide(ours[0]) as original:
        copy = cache.stage(ours[0])
        assert [path.name for path in sorted(copy.parent.iterdir())] == ["one_level0.dcm", "one_level1.dcm"]
        with Slide(copy) as slide:
            assert slide.num_levels == original.num_levels == 2
            assert (slide.read_whole(150, 100) == original.read_whole(150, 100)).all()


def test_links_are_followed_as_openslide_does_and_no_further(tmp_path):
    store = make(tmp_path / "store", x__mrxs=5)
    make(store / "x", Data__dat=9)
    make(store / "x" / "sub", deep__dat=1)
    (store / "x" / "loop").symlink_to(store / "x")
    os.mkfifo(store / "x" / "pipe")
    links = make(tmp_path / "links")
    (links / "x.mrxs").symlink_to(store / "x.mrxs")
    (links / "x").symlink_to(store / "x")
    assert names(links / "x.mrxs") == ["x.mrxs", "x/Data.dat", "x/sub/deep.dat"]
    with LocalCache(tmp_path / "cache", bound=1000) as cache:
        copy = cache.stage(links / "x.mrxs")
        assert not copy.is_symlink() and (copy.parent / "x" / "Data.dat").stat().st_size == 9


def test_space_is_bounded_and_a_copy_waits_for_room(tmp_path):
    source = make(tmp_path / "in", a__svs=600, b__svs=600, c__svs=300, large__svs=1001)
    with LocalCache(tmp_path / "cache", bound=1000) as cache:
        a = cache.stage(source / "a.svs")
        c = cache.stage(source / "c.svs")
        assert cache.stage(source / "large.svs") == source / "large.svs", "read where it lies"
        staged = []
        waiting = threading.Thread(target=lambda: staged.append(cache.stage(source / "b.svs")))
        waiting.start()
        cache.drop(c)
        assert waiting.is_alive() and not staged and cache.used == 600
        cache.drop(a)
        waiting.join(20)
        assert staged[0].read_bytes() == (source / "b.svs").read_bytes() and cache.used == 600
        cache.drop(source / "large.svs")
        assert cache.used == 600
    assert not copies(tmp_path / "cache") and not list((tmp_path / "cache").glob("slidescribe-*"))


def test_a_run_stays_within_the_bound_and_cleans_up(tmp_path):
    source = make(tmp_path / "in", **{f"s{i}__svs": 400 for i in range(6)}, big__svs=5000)
    cache, seen = LocalCache(tmp_path / "cache", bound=1000), []

    def check(entry):
        seen.append(entry.path)
        present = [path for path in (tmp_path / "cache").rglob("*.svs")]
        assert entry.path.exists() and len(present) <= 2 and cache.used <= 1000

    def finish(entry):
        check(entry)
        return SlideState(SlideRow(entry.slide_id, str(entry.path), "done", n_tiles=1))

    folder = RunFolder(tmp_path / "out")
    entries = find_slides([str(source)])
    run = SlideRun(entries, folder, lambda e: folder.read_state(e.slide_id) is None, description="test", cache=cache)
    with cache:
        run.do(check, finish, num_threads=3)
        assert cache.used == 0
    assert run.report() == 0
    assert {path.is_relative_to(source) for path in seen if path.stem == "big"} == {True}
    assert not any(path.is_relative_to(source) for path in seen if path.stem != "big")
    assert {folder.read_state(e.slide_id).row.path for e in entries} == {str(e.path) for e in entries}


def test_a_copy_that_fails_is_the_failure_of_its_slide(tmp_path, monkeypatch, caplog):
    source = make(tmp_path / "in", good__svs=10, short__svs=10, unreadable__svs=10)
    copy = LocalCache._copy

    def flawed(self, path, target):
        if path.stem == "unreadable":
            raise OSError(errno.EIO, "Input/output error", str(path))
        if path.stem == "short":
            target.write_bytes(b"")
            monkeypatch.setattr("stage0_tiling.local_cache.CHUNK_BYTES", 0)  # reads nothing
        copy(self, path, target)
        monkeypatch.setattr("stage0_tiling.local_cache.CHUNK_BYTES", 100)

    monkeypatch.setattr(LocalCache, "_copy", flawed)
    cache, folder = LocalCache(tmp_path / "cache", 1000), RunFolder(tmp_path / "out")
    entries = find_slides([str(source)])
    run = SlideRun(entries, folder, lambda e: folder.read_state(e.slide_id) is None, description="test", cache=cache)
    with cache:
        run.do(lambda e: SlideState(SlideRow(e.slide_id, "", "done", n_tiles=1)), num_threads=1)
        assert cache.used == 0
    assert run.report() == 1
    errors = {entry.slide_id: folder.read_state(entry.slide_id).row.error for entry in entries}
    assert errors["good"] is None and "Input/output error" in errors["unreadable"]
    assert errors["short"] == f"short.svs: its copy in {tmp_path / 'cache'} has 0 bytes, not 10"


def test_a_cache_on_a_full_disk_is_done_without(tmp_path, monkeypatch, caplog):
    source = make(tmp_path / "in", a__svs=10)

    def full(self, path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalCache, "_copy", full)
    with LocalCache(tmp_path / "cache", 1000) as cache:
        assert cache.stage(source / "a.svs") == source / "a.svs" and cache.used == 0
    assert "a.svs: no space left in" in caplog.text


def test_a_copy_under_way_ends_when_the_run_does(tmp_path):
    source = make(tmp_path / "in", a__svs=600, b__svs=600)
    ended = []
    with LocalCache(tmp_path / "cache", bound=1000) as cache:
        cache.stage(source / "a.svs")

        def stage():
            try:
                cache.stage(source / "b.svs")
            except KeyboardInterrupt:
                ended.append(True)

        waiting = threading.Thread(target=stage)
        waiting.start()
        cache.stop()
        waiting.join(20)
    assert ended


def test_leftovers_of_killed_runs_are_removed_and_those_of_others_kept(tmp_path):
    source = make(tmp_path / "in", a__svs=10)
    program = (
        "import sys; from pathlib import Path; from stage0_tiling.local_cache import LocalCache\n"
        f"cache = LocalCache({str(tmp_path / 'cache')!r}, 1000).__enter__()\n"
        f"cache.stage(Path({str(source / 'a.svs')!r})); print('ready', flush=True); sys.stdin.read()"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=-1, stdout=-1, text=True) for _ in range(2)
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    running[0].send_signal(signal.SIGKILL)
    running[0].wait()
    assert len(copies(tmp_path / "cache")) == 2
    with LocalCache(tmp_path / "cache", 1000):
        assert len(copies(tmp_path / "cache")) == 1
    running[1].communicate()
    with LocalCache(tmp_path / "cache", 1000):
        assert not copies(tmp_path / "cache")
