"""Moving collections to and from Kaggle's datasets, with a stand-in for its client."""

import inspect
import json
import re
import signal
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage0_tiling.transfer import kaggle_target
from stage0_tiling.transfer.kaggle_sets import INDEX, stored_name
from tests import kaggle_client
from tests.conftest import ROOT
from tests.kaggle_client import count, log, plan
from tests.transfers import QUICK, DiskWatch, call, contents, make_collection, manifest_of

TARGET = "kaggle://me/slides"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """Folder of the datasets of the stand-in's owner."""
    for name in ("kaggle", "kaggle.api", "kaggle.api.kaggle_api_extended"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what was there comes back
    kaggle_client.install()
    monkeypatch.setattr(kaggle_target, "POLL_SECONDS", 0.01)
    monkeypatch.setenv(kaggle_client.ROOT, str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", "s3cret")
    (tmp_path / "kaggle" / "me").mkdir(parents=True)
    return tmp_path / "kaggle" / "me"


def index_of(dataset) -> dict[str, dict]:
    return {each["path"]: each for each in json.loads((dataset / INDEX).read_text())["files"]}


def held(kaggle) -> dict[str, str]:
    """SHA-256 of what the datasets hold, by the paths of their indexes; every file but once."""
    found = {}
    for dataset in (folder for folder in kaggle.iterdir() if (folder / INDEX).exists()):
        there = contents(dataset)
        for path, entry in index_of(dataset).items():
            if entry["name"] in there:
                assert path not in found and there[entry["name"]] == entry["sha256"]
                found[path] = entry["sha256"]
    return found


def test_the_stand_in_has_the_signatures_of_the_client():
    real = pytest.importorskip("kaggle.api.kaggle_api_extended").KaggleApi
    for name in ("authenticate", *(name for name in vars(kaggle_client.KaggleApi) if name.startswith("dataset_"))):
        ours, theirs = (inspect.signature(getattr(each, name)) for each in (kaggle_client.KaggleApi, real))
        assert [(each.name, each.default) for each in ours.parameters.values()] == [
            (each.name, each.default) for each in theirs.parameters.values()
        ]


def test_numbered_datasets_are_filled_and_come_back(tmp_path, kaggle, capsys, caplog):
    caplog.set_level("DEBUG")
    sums = make_collection(tmp_path / "source", 14, kilobytes=(10, 60))
    (tmp_path / "source" / "flat_name.svs").write_bytes(b"as it is")
    (tmp_path / "source" / "dataset-metadata.json").write_text("{}")
    (tmp_path / "source" / "table.csv").write_text("a,b\n" * 2000)
    with zipfile.ZipFile(tmp_path / "source" / "masks.zip", "w") as archive:
        archive.writestr("mask.txt", "kept whole")
    plan(pending=2)
    with DiskWatch(tmp_path / "scratch") as disk:
        assert call(tmp_path / "source", TARGET, tmp_path / "scratch", "--batch_files", 5, "--max_disk", "300kB") == 0
    sums = contents(tmp_path / "source")
    assert held(kaggle) == sums and len(sums) == 18
    assert sorted(folder.name for folder in kaggle.iterdir()) == [f"slides-{i + 1}" for i in range(count("create"))]
    assert all(len(index_of(folder)) <= 5 for folder in kaggle.iterdir()) and 4 <= count("create") <= 6
    assert count("upload") == len(sums) + count("create")  # every file once, and the indexes
    assert any((folder / "flat_name.svs").exists() for folder in kaggle.iterdir())
    assert 0 < disk.peak <= 300_000
    made = len(log())
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch") == 0
    assert "18 there already, 0 (0.00B) to send" in caplog.text
    assert call(tmp_path / "source", TARGET, tmp_path / "another scratch") == 0  # known by the indexes alone
    assert not [line for line in log()[made:] if not line.startswith("download") or INDEX not in line]
    with DiskWatch(tmp_path / "back") as disk:
        assert call(TARGET, tmp_path / "target", tmp_path / "back", "--max_disk", "300kB") == 0
    assert contents(tmp_path / "target") == sums and 0 < disk.peak <= 300_000
    assert all("sha256" in record["sums"] for record in manifest_of(tmp_path / "back").values())
    assert capsys.readouterr().out == "" and "s3cret" not in caplog.text


@pytest.mark.parametrize("moment", ["kill_in_upload", "kill_after_create"])
def test_a_kill_uploads_no_dataset_twice(tmp_path, kaggle, moment):
    sums = make_collection(tmp_path / "source", 12, kilobytes=(5, 20))
    places = ("--source", tmp_path / "source", "--target", TARGET, "--scratch_dir", tmp_path / "scratch")
    words = [sys.executable, "-m", "tests.kaggle_client", *map(str, places), "--batch_files", "4", *QUICK]
    plan(**{moment: 7 if moment == "kill_in_upload" else 2, "pending": 1})
    died = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    made = held(kaggle)
    assert 0 < len(made) < len(sums)
    done = [path for path, each in manifest_of(tmp_path / "scratch").items() if each["state"] == "done"]
    assert set(done) <= set(made)
    assert len(done) < len(made) or moment == "kill_in_upload"  # there, and nobody was told
    plan()
    before = len(log())
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and not again.stdout, again.stderr
    assert held(kaggle) == sums
    names = {stored_name(path) for path in made}
    assert not [line for line in log()[before:] if line.removeprefix("upload ") in names]


def test_an_upload_that_the_client_left_out_and_a_lost_answer_are_made_good(tmp_path, kaggle):
    sums = make_collection(tmp_path / "source", 6, kilobytes=(1, 9))
    plan(lost=[stored_name("case 1/slide 01.svs")], no_answer=1)
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch", "--retries", 1) == 0
    assert held(kaggle) == sums
    assert list(index_of(kaggle / "slides-2")) == ["case 1/slide 01.svs"]


def test_a_network_that_is_down_makes_no_dataset_of_one_file_and_none_twice(tmp_path, kaggle, caplog):
    sums = make_collection(tmp_path / "source", 6, kilobytes=(1, 9))
    plan(no_upload=2)
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch", "--retries", 1) == 1
    assert not list(kaggle.iterdir()) and f"{len(sums)} failed" in caplog.text
    plan(no_list=1)
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch", "--retries", 1) == 0
    assert held(kaggle) == sums and count("create") == 1 and count("upload") == len(sums) + 1


def test_a_dataset_that_could_not_be_looked_at_is_no_other_batch(tmp_path, kaggle, caplog):
    sums = make_collection(tmp_path / "source", 6, kilobytes=(1, 9))
    words = (tmp_path / "source", TARGET, tmp_path / "scratch", "--batch_files", 3, "--num_workers", 1)
    plan(no_list=1)
    assert call(*words) == 1
    assert "3 files sent, 0 were there, 3 failed" in caplog.text
    assert call(*words) == 0
    assert held(kaggle) == sums and count("create") == 2 and count("upload") == len(sums) + 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"refuse": "over quota"}, "Kaggle refuses me/slides-1: over quota"),
        ({"fail": 1}, "Kaggle could not make me/slides-1"),
        ({"lost": [INDEX]}, f"me/slides-1 was made without its {INDEX}"),
    ],
)
def test_what_kaggle_refuses_is_not_tried_again_in_the_same_run(tmp_path, kaggle, caplog, wrong, words):
    sums = make_collection(tmp_path / "source", 5, kilobytes=(1, 9))
    plan(**wrong)
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch", "--retries", 3) == 1
    assert f"failed: 'slide 00.svs': {words}" in caplog.text and f"{len(sums)} failed" in caplog.text
    assert count("upload") == len(sums) + 1 and not held(kaggle)
    plan()
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch") == 0
    assert held(kaggle) == sums


def test_a_file_that_kaggle_changed_costs_only_itself(tmp_path, kaggle, caplog):
    sums = make_collection(tmp_path / "source", 5, kilobytes=(1, 9))
    plan(cut=[stored_name("case 2/slide 02.svs")])
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch", "--retries", 2) == 1
    assert "failed: 'case 2/slide 02.svs': me/slides-1 shows 3 bytes of case_2__slide_02" in caplog.text
    assert "4 files sent, 0 were there, 1 failed" in caplog.text and "trying again" not in caplog.text
    assert {p for p, each in manifest_of(tmp_path / "scratch").items() if each["state"] == "done"} == set(sums) - {
        "case 2/slide 02.svs"
    }
    assert count("create") == 1


def test_other_datasets_of_the_name_are_passed_over_and_gaps_too(tmp_path, kaggle, caplog):
    sums = make_collection(tmp_path / "source", 3, kilobytes=(1, 9))
    (kaggle / "slides-3").mkdir()
    (kaggle / "slides-3" / "mine.svs").write_bytes(b"made by hand")
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch") == 0
    assert "me/slides-3 (ready) has no index" in caplog.text
    assert held(kaggle) == sums and (kaggle / "slides-4").exists() and not (kaggle / "slides-1").exists()


def test_a_changed_file_goes_to_a_new_dataset_and_is_what_comes_back(tmp_path, kaggle):
    make_collection(tmp_path / "source", 3, kilobytes=(1, 9))
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch") == 0
    (tmp_path / "source" / "case 1" / "slide 01.svs").write_bytes(b"another")
    assert call(tmp_path / "source", TARGET, tmp_path / "scratch") == 0
    assert list(index_of(kaggle / "slides-2")) == ["case 1/slide 01.svs"]
    assert call(TARGET, tmp_path / "target", tmp_path / "back") == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "source")


def test_any_single_dataset_is_a_source(tmp_path, kaggle):
    sums = make_collection(kaggle / "reghf1", 8, kilobytes=(1, 9))
    assert call("kaggle://me/reghf1", tmp_path / "target", tmp_path / "scratch", "--max_disk", "30kB") == 0
    assert contents(tmp_path / "target") == sums
    with pytest.raises(ValueError, match="keeps deleted files"):
        call("kaggle://me/reghf1", tmp_path / "x", tmp_path / "y", "--delete_source")
    (kaggle / "reghf1" / "huge.svs").write_bytes(bytes(16_000))  # twice that is more than there is
    assert call("kaggle://me/reghf1", tmp_path / "target", tmp_path / "scratch", "--max_disk", "30kB") == 1


def test_refusals_are_one_line(tmp_path, kaggle, monkeypatch):
    make_collection(tmp_path / "source", 2, kilobytes=(1, 9))
    places = (tmp_path / "source", TARGET, tmp_path / "scratch")
    with pytest.raises(ValueError, match="Kaggle tells no checksums"):
        call(*places, "--delete_source")
    for url, words in (
        ("kaggle://me", "names no dataset"),
        ("kaggle://me/a_b", "names no dataset"),
        ("kaggle://me/abc", "4 to 45"),
    ):
        with pytest.raises(ValueError, match=words):
            call(tmp_path / "source", url, tmp_path / "scratch")
    with pytest.raises(OSError, match="neither me/other nor me/other-1 can be seen"):
        call("kaggle://me/other", tmp_path / "target", tmp_path / "scratch")
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(ValueError, match="finds no credentials; set KAGGLE_API_TOKEN"):
        call(*places)
    monkeypatch.setitem(sys.modules, "kaggle", None)
    monkeypatch.delitem(sys.modules, "kaggle.api.kaggle_api_extended")
    with pytest.raises(ValueError, match="pip install kaggle"):
        call(*places)
    assert not (tmp_path / "scratch").exists()


@given(st.sets(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=300), min_size=2))
def test_names_at_kaggle_are_plain_and_apart(paths):
    names = {stored_name(path) for path in paths}
    assert len(names) == len(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}", name) for name in names)


def test_names_at_kaggle_keep_what_is_plain():
    assert stored_name("PIT_01_00002_01.tiff") == "PIT_01_00002_01.tiff"
    assert stored_name("a/slide 1.svs").startswith("a__slide_1-") and stored_name("a/slide 1.svs").endswith(".svs")
    for path in ("masks.zip", "dataset-metadata.json", INDEX, "a.tar.gz", ".hidden"):
        assert stored_name(path) != path and not stored_name(path).endswith((".zip", ".gz"))
