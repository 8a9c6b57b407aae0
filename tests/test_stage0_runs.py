"""Runs at scale: many processes on one folder, deadly slides, full disks, copies on a local disk."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slide_features import read_slide_coords
from stage0_tiling import claims as claims_module
from stage0_tiling import full_disk, tile
from stage0_tiling.claims import Claims
from stage0_tiling.in_threads import in_threads
from stage0_tiling.plan import TilingSettings
from stage0_tiling.run_table import RunFolder, SlideRow, SlideState
from stage0_tiling.slide_list import find_slides
from stage0_tiling.slide_run import SlideRun
from tests.conftest import ROOT, environment
from tests.slides import DrawnSlide

TILING = ("--tile_size", "64", "--mpp", "1.0", "--num_workers", "2")
# Runs a script with a line added to a log whenever a slide is planned, slowly, and dies at slides named `deadly`.
HOOKED = """
import os, runpy, signal, sys, time
import stage0_tiling.slide_work as work
plan = work.plan_tiles
def planned(slide, *args):
    with open(os.environ["ATTEMPTS"], "a") as log:
        print(slide.path.stem, os.getpid(), file=log)
    time.sleep(float(os.environ.get("SLOW", 0)))
    if slide.path.stem.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    return plan(slide, *args)
work.plan_tiles = planned
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for i in range(12):
        DrawnSlide(width=384, height=256, num_levels=1, seed=i).write(folder / f"slide_{i:02}.tiff")
    return folder


@pytest.fixture(scope="module")
def tiled(slides, tmp_path_factory):
    """What one uninterrupted process makes of them."""
    folder = tmp_path_factory.mktemp("tiled")
    assert run_tile(slides, folder) == 0
    return folder


def run_tile(slides, folder, *more):
    return tile.main(["--slides", str(slides), "--output_dir", str(folder), *TILING, *more])


def start(slides, folder, log, *more, slow=0.0):
    command = [sys.executable, "-c", HOOKED, "stage0_tiling/tile.py", "--slides", str(slides), "--output_dir"]
    hooks = {"ATTEMPTS": str(log), "SLOW": str(slow)}
    return subprocess.Popen(
        [*command, str(folder), *TILING, *more], cwd=ROOT, env=environment() | hooks, stderr=subprocess.PIPE, text=True
    )


def attempts(log):
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def rows(folder):
    with (folder / "slides.csv").open() as file:
        return {row["slide_id"]: row | {"seconds": ""} for row in csv.DictReader(file)}


def content(folder):
    """All that a run leaves, but for seconds: the table, positions of tiles, names of all files."""
    coords = {path.stem: read_slide_coords(path).coords.tobytes() for path in (folder / "coords").iterdir()}
    return rows(folder), coords, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Claims


def test_a_slide_is_claimed_once_and_is_free_again_when_settled(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        claim = one.take("a")
        assert claim.deaths == 0 and one.is_valid(claim)
        assert two.take("a") is None and two.take("a", after_deaths=True) is None
        assert two.owner("a") == one.owner("a") and f"process {os.getpid()}" in one.owner("a")
        assert set(json.loads(claim.path.read_text())) == {"token", "since", "host", "machine", "pid", "started"}
        one.settle(claim)
        assert two.take("a") and one.owner("b") is None
    assert not list(tmp_path.iterdir()), "claims are given back at the end"


def test_many_processes_claim_each_slide_once(tmp_path):
    program = (
        "import sys; from stage0_tiling.claims import Claims\n"
        f"with Claims({str(tmp_path / 'claims')!r}) as claims:\n"
        "    print(*(name for name in map(str, range(300)) if claims.take(name)))\n"
        "    sys.stdout.flush(); sys.stdin.read()"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=-1, stdout=-1, text=True) for _ in range(4)
    ]
    taken = [process.stdout.readline().split() for process in running]
    for process in running:
        process.communicate()
    assert sorted(sum(taken, [])) == sorted(map(str, range(300)))


def test_the_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    program = (
        "import os; from stage0_tiling.claims import Claims\n"
        f"claims = Claims({str(tmp_path)!r}).__enter__(); claims.take('a'); os.kill(os.getpid(), 9)"
    )
    for deaths in (0, 1):
        with Claims(tmp_path) as claims:
            assert claims.owner("a") is None
            if deaths:
                assert claims.take("a") is None, "a slide at which a process died is left for last"
                claim = claims.take("a", after_deaths=True)
                assert claim.deaths == deaths
                claims.give_back(claim)
                claim = claims.take("a", after_deaths=True)
                assert claim.deaths == deaths, "giving back does not forget"
                claims.settle(claim)
                assert not list(tmp_path.iterdir())
            else:
                done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
                assert done.returncode == -signal.SIGKILL


def elsewhere(path, **changes):
    """Make a claim that of a process of another machine."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "other", "host": "other"} | changes))


def test_a_claim_of_another_machine_is_stale_when_its_heart_has_stopped(tmp_path):
    with Claims(tmp_path) as theirs, Claims(tmp_path, stale_s=60) as ours:
        claim = theirs.take("a")
        elsewhere(claim.path, pid=1 << 22, started=1)
        assert ours.take("a", after_deaths=True) is None and "other" in ours.owner("a")
        before = claim.path.stat().st_mtime - 61
        os.utime(claim.path, (before, before))
        mine = ours.take("a", after_deaths=True)
        assert mine.deaths == 1 and ours.is_valid(mine) and not theirs.is_valid(claim)
        theirs.settle(claim)  # comes to itself again
        assert ours.is_valid(mine) and theirs.take("a", after_deaths=True) is None
        ours.settle(mine)
        assert not list(tmp_path.iterdir())


def test_a_process_that_was_taken_over_leaves_the_claim_of_a_third_in_sight(tmp_path):
    with Claims(tmp_path) as dead, Claims(tmp_path) as slow, Claims(tmp_path) as third, Claims(tmp_path) as other:
        for claims, deaths in ((dead, 0), (slow, 1), (third, 2)):
            claim = claims.take("a", after_deaths=True)
            assert claim.deaths == deaths
            if claims is not third:
                elsewhere(claim.path, pid=1 << 22, started=1)
                os.utime(claim.path, (1, 1))
            if claims is slow:
                taken_over = claim
        slow.settle(taken_over)  # comes to itself again, while the third is at work
        assert third.is_valid(claim)
        assert other.take("a", after_deaths=True) is None and other.take("a") is None
        third.settle(claim)
        assert not list(tmp_path.iterdir())


def test_claims_are_judged_by_the_clock_of_the_file_server(tmp_path, monkeypatch):
    with Claims(tmp_path) as theirs, Claims(tmp_path) as ours:
        claim = theirs.take("a")
        elsewhere(claim.path)
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert ours.take("a", after_deaths=True) is None


def test_the_heart_beats(tmp_path):
    with Claims(tmp_path, heartbeat_s=0.01) as claims:
        claim = claims.take("a")
        os.utime(claim.path, (1, 1))
        deadline = time.monotonic() + 20
        while claim.path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claim.path.stat().st_mtime > 1


def test_a_claim_that_is_being_written_is_respected(tmp_path):
    (tmp_path / "a.0.json").touch()
    with Claims(tmp_path) as claims:
        assert claims.take("a") is None and claims.take("a", after_deaths=True) is None
        assert claims.owner("a") == "unknown host, process unknown"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "last", "settle", "back", "die"])), max_size=40))
def test_never_two_living_processes_have_a_slide(tmp_path_factory, acts):
    folder = tmp_path_factory.mktemp("claims")
    living = [Claims(folder) for _ in range(3)]
    held = [None, None, None]
    died, deaths = set(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "_is_left", lambda _, path: claims_module._read(path).get("token") in died)
        for who, act in acts:
            if act in ("take", "last") and held[who] is None:
                held[who] = living[who].take("a", after_deaths=act == "last")
                if held[who]:
                    assert held[who].deaths == deaths and (act == "last" or not deaths)
                elif act == "last":
                    assert any(held), "free slides are given"
            elif held[who]:
                if act == "settle":
                    living[who].settle(held[who])
                    deaths = 0
                elif act == "back":
                    living[who].give_back(held[who])
                elif act == "die":
                    died.add(held[who].token)
                    living[who] = Claims(folder)
                    deaths += 1
                else:
                    continue
                held[who] = None
            assert sum(claim is not None for claim in held) <= 1
            assert all(living[i].is_valid(claim) for i, claim in enumerate(held) if claim)


# Threads that work ahead


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4))
def test_threads_do_each_item_once_and_few_ahead(num_items, num_threads):
    taken, done_with = [], []

    def items():
        for i in range(num_items):
            assert len(taken) - len(done_with) <= num_threads
            taken.append(i)
            yield i

    results = []
    for result in in_threads(items(), lambda i: 10 * i, num_threads):
        results.append(result)
        done_with.append(result)
    assert sorted(results) == [10 * i for i in range(num_items)]


def test_threads_hand_on_errors_and_end_when_closed():
    def work(i):
        if i == 3:
            raise ValueError("three")
        return i

    with pytest.raises(ValueError, match="three"):
        list(in_threads(iter(range(10)), work, 2))
    numbers = iter(range(1000))
    ahead = in_threads(numbers, lambda i: i, 2)
    next(ahead)
    before = threading.active_count()
    ahead.close()
    assert threading.active_count() < before and next(numbers) < 10


def test_the_next_slide_is_tiled_while_one_is_encoded(tmp_path):
    entries = find_slides([str(path) for path in make_files(tmp_path / "in", 3)])
    is_tiled = {entry.slide_id: threading.Event() for entry in entries}

    def prepare(entry):
        is_tiled[entry.slide_id].set()

    def finish(entry):
        following = min(int(entry.slide_id) + 1, 2)
        assert is_tiled[str(following)].wait(20)
        return SlideState(SlideRow(entry.slide_id, "", "done", n_tiles=1))

    folder = RunFolder(tmp_path / "out")
    run = SlideRun(entries, folder, lambda entry: folder.read_state(entry.slide_id) is None, description="test")
    run.do(prepare, finish, num_threads=1)
    assert run.report() == 0


def make_files(folder, number):
    folder.mkdir(parents=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(bytes(1000))
    return sorted(folder.iterdir())


# Many processes


def test_three_processes_one_killed_do_each_slide_once(slides, tiled, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    log.touch()
    running = [start(slides, out, log, "--num_workers", "1", slow=slow) for slow in (1.5, 0.1, 0.1)]
    victim = running[0]
    deadline = time.monotonic() + 60
    while f" {victim.pid}" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    victim.communicate()
    stderr = [process.communicate()[1] for process in running[1:]]
    assert [process.returncode for process in running[1:]] == [0, 0], stderr
    lines = [line.split() for line in log.read_text().splitlines()]
    by_others = Counter(name for name, pid in lines if int(pid) != victim.pid)
    of_victim = [name for name, pid in lines if int(pid) == victim.pid]
    assert len(of_victim) == 1 and by_others == Counter(rows(tiled).keys()), "each once, with what the victim began"
    assert content(out) == content(tiled)


def test_a_slide_in_work_elsewhere_is_left_to_it(slides, tiled, tmp_path, caplog):
    folder = tmp_path / "out"
    with Claims(folder / "claims") as others:
        others.take("slide_03")
        assert run_tile(slides, folder) == 0
        assert "11 done, 0 empty, 0 failed, 1 in work elsewhere; " in caplog.text
        with pytest.raises(ValueError, match="--overwrite: slide_03 is in work"):
            run_tile(slides, folder, "--overwrite")
    assert len(rows(folder)) == 11
    assert run_tile(slides, folder) == 0
    assert content(folder) == content(tiled)


def test_a_slide_that_failed_elsewhere_meanwhile_is_not_tried_again(slides, tmp_path):
    folder, failed = RunFolder(tmp_path), SlideState(SlideRow("slide_00", "x", "failed", error="e"), recorded_by="old")
    folder.write_state(failed)
    entries = find_slides([str(slides)])[:2]

    def prepare(entry):
        seen.append(entry.slide_id)
        return SlideState(SlideRow(entry.slide_id, "", "done"), tiling=TilingSettings())

    for recorded_by, expected in (("other", ["slide_01"]), (None, ["slide_00"])):
        seen = []
        run = SlideRun(entries, folder, lambda entry: state_is_open(folder, entry), description="test")
        if recorded_by:
            folder.write_state(SlideState(failed.row, recorded_by=recorded_by))
        run.do(prepare, num_threads=1)
        assert seen == expected


def state_is_open(folder, entry):
    state = folder.read_state(entry.slide_id)
    return state is None or state.row.status == "failed"


def test_a_run_told_to_end_gives_its_slides_back(slides, tmp_path):
    log = tmp_path / "log"
    log.touch()
    running = start(slides, tmp_path / "out", log, slow=0.3)
    deadline = time.monotonic() + 60
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.terminate()
    _, stderr = running.communicate()
    assert running.returncode == 130 and "Traceback" not in stderr, stderr
    assert not list((tmp_path / "out" / "claims").iterdir())


# Deadly slides


def test_a_slide_that_kills_its_process_costs_only_itself(slides, tiled, tmp_path, caplog):
    own, out, log = tmp_path / "slides", tmp_path / "out", tmp_path / "log"
    shutil.copytree(slides, own)
    shutil.copy(slides / "slide_00.tiff", own / "deadly.tiff")  # the first in order
    runs = []
    for _ in range(4):
        process = start(own, out, log)
        runs.append((process.communicate()[1], process.returncode))
    assert [status for _, status in runs] == [-signal.SIGKILL, -signal.SIGKILL, 1, 1]
    assert "13 slides, 0 of them to tile" in runs[3][0]
    for stderr, _ in runs[2:]:
        assert "failed: deadly: the process that worked on it died 2 times" in stderr
    assert attempts(log)["deadly"] == 2
    assert rows(out).pop("deadly")["status"] == "failed"
    assert {name: row["n_tiles"] for name, row in rows(out).items() if name != "deadly"} == {
        name: row["n_tiles"] for name, row in rows(tiled).items()
    }
    assert not list((out / "claims").iterdir()) and not list(out.rglob("*.partial"))
    assert run_tile(own / "deadly.tiff", out, "--overwrite") == 0
    assert RunFolder(out).read_state("deadly").deaths == 0 and rows(out)["deadly"]["status"] == "done"


# Full disks


@pytest.fixture
def full_at(monkeypatch):
    """Let no space be left from the time when a slide's coords are written."""
    from stage0_tiling import slide_work

    def fill(slide_id, error=errno.ENOSPC):
        write = slide_work.write_slide_coords

        def writing(path, *args, **kwargs):
            if path.stem == slide_id:
                raise OSError(error, os.strerror(error))
            write(path, *args, **kwargs)

        monkeypatch.setattr(slide_work, "write_slide_coords", writing)

    return fill


def test_a_slide_without_space_fails_and_the_others_go_on(slides, tmp_path, full_at, monkeypatch, caplog):
    full_at("slide_02")
    monkeypatch.setattr(full_disk, "FREE_BYTES", 0)
    assert run_tile(slides, tmp_path, "--num_workers", "1") == 1
    assert Counter(row["status"] for row in rows(tmp_path).values()) == {"done": 11, "failed": 1}
    assert rows(tmp_path)["slide_02"]["error"] == f"no space left in {tmp_path}; free some, then run again"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_run_with_one_line(slides, tiled, tmp_path, full_at, monkeypatch, caplog, error):
    with monkeypatch.context() as patch:
        patch.setattr(full_disk, "FREE_BYTES", 1 << 62 if error == errno.ENOSPC else 0)
        full_at("slide_02", error)
        assert run_tile(slides, tmp_path, "--num_workers", "1") == 1
    assert Counter(row["status"] for row in rows(tmp_path).values())["failed"] == 1
    left = 12 - len(rows(tmp_path))
    assert left > 7 and f"1 failed, {left} not done; " in caplog.text
    assert caplog.messages.count(f"no space left in {tmp_path}; free some, then run again") == 1
    monkeypatch.undo()
    assert run_tile(slides, tmp_path) == 0
    assert content(tmp_path) == content(tiled)


def test_a_really_full_disk(slides, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        assert run_tile(slides, disk / "out", "--num_workers", "1") == 1
        whole = list((disk / "out" / "coords").glob("*"))
        assert whole and all(len(read_slide_coords(path).coords) for path in whole)
        assert not list(disk.rglob("*.partial")) and not list((disk / "out" / "claims").iterdir())
        assert len(list((disk / "out" / "state").glob("*"))) < 12
    finally:
        subprocess.run(["umount", disk], check=True)
