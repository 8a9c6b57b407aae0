"""Moving collections to and from data sets, S3 and other places, through the real clients."""

import hashlib
import os
import random
import signal
import subprocess
from unittest import mock

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from stage0_tiling.transfer import targets
from tests.conftest import ROOT, command
from tests.hub_server import REPO, HubServer
from tests.transfers import QUICK, DiskWatch, call, contents, make_collection, manifest_of


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def run_online(*words, status=0) -> str:
    """Run the command with the environment as it is: the others are kept from the hub."""
    line = command("stage0_tiling/mirror.py", *words, *QUICK)
    done = subprocess.run(line, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr


def hub_contents(hub: HubServer) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in hub.files.items()}


def test_data_set_gets_batches_and_recognises_what_was_committed_before_a_kill(tmp_path, hub):
    sums = make_collection(tmp_path / "source", 14, kilobytes=(10, 90))
    words = ["--source", tmp_path / "source", "--target", f"hf://datasets/{REPO}/sub", "--num_workers", 3]
    words += ["--scratch_dir", tmp_path / "scratch", "--max_disk", "600kB", "--batch_files", 4]
    process = subprocess.Popen(
        command("stage0_tiling/mirror.py", *words), cwd=ROOT, env={**os.environ}, stderr=subprocess.DEVNULL
    )
    hub.on_commit = lambda number: process.kill() if number == 2 else None  # committed, and nobody was told
    with DiskWatch(tmp_path / "scratch" / "parts") as disk:
        assert process.wait(60) == -signal.SIGKILL
        committed, uploads = {path for commit in hub.commits for path in commit}, len(hub.uploads)
        assert len(committed) >= 4
        hub.mischief = ["refuse", "hang up"]
        messages = run_online(*words)
    assert hub_contents(hub) == {f"sub/{path}": each for path, each in sums.items()}
    paths = [path for commit in hub.commits for path in commit]
    assert len(paths) == len(set(paths))  # every file in one commit
    assert uploads and len(hub.uploads) == len(set(hub.uploads))  # and sent once
    assert max(map(len, hub.commits)) <= 5 and "hf_secret" not in messages
    assert "500" in messages and "disconnected" in messages and messages.count("trying again") == 2
    assert 0 < disk.peak <= 600_000
    commits = len(hub.commits)
    run_online(*words)
    assert len(hub.commits) == commits


def test_a_file_that_the_hub_refuses_costs_only_itself(tmp_path, hub):
    sums = make_collection(tmp_path / "source", 6, kilobytes=(10, 60))
    hub.poison = {"case 2/slide 02.svs"}
    words = [
        "--source",
        tmp_path / "source",
        "--target",
        f"hf://datasets/{REPO}",
        "--scratch_dir",
        tmp_path / "scratch",
    ]
    messages = run_online(*words, "--retries", 1, status=1)
    assert set(hub.files) == set(sums) - hub.poison
    assert "failed: 'case 2/slide 02.svs': " in messages and "Traceback" not in messages


def test_a_data_set_that_does_not_exist_is_refused_with_the_mend(tmp_path, hub):
    make_collection(tmp_path / "source", 2, kilobytes=(1, 2))
    words = ["--source", tmp_path / "source", "--scratch_dir", tmp_path / "scratch", "--target"]
    assert "hf repo create org/other --repo-type dataset" in run_online(*words, "hf://datasets/org/other", status=2)
    with pytest.raises(ValueError, match="is no data set"):
        call(tmp_path / "source", "hf://org/model", tmp_path / "scratch")


def test_a_data_set_is_a_source_whose_checksums_are_used(tmp_path, hub):
    sums = make_collection(tmp_path / "source", 5, kilobytes=(10, 90))
    hub.files = {path: (tmp_path / "source" / path).read_bytes() for path in sums}
    words = [
        "--source",
        f"hf://datasets/{REPO}",
        "--scratch_dir",
        tmp_path / "scratch",
        "--target",
        tmp_path / "target",
    ]
    run_online(*words)
    assert contents(tmp_path / "target") == sums


def test_any_place_that_fsspec_knows_is_read_back(tmp_path):
    make_collection(tmp_path / "source", 4, kilobytes=(1, 9))
    memory = fsspec.filesystem("memory")
    assert call(tmp_path / "source", "memory://slides", tmp_path / "scratch 1") == 0
    with mock.patch.object(type(memory), "put_file", lambda self, file, path: self.pipe_file(path, b"")):
        assert call(tmp_path / "source", "memory://broken", tmp_path / "scratch 3") == 1
    assert call("memory://slides", tmp_path / "target", tmp_path / "scratch 2") == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "source")
    memory.rm("/slides", recursive=True)


PIECES = st.lists(st.binary(max_size=40), max_size=12)


@given(PIECES, st.integers(1, 16))
def test_etag_is_that_of_its_definition(pieces, part_bytes):
    content = b"".join(pieces)
    with mock.patch.object(targets, "S3_PART_BYTES", part_bytes):
        etag = targets.ETag(len(content))
        for piece in pieces:
            etag.update(piece)
    parts = [content[i : i + part_bytes] for i in range(0, len(content), part_bytes)]
    if len(content) < 2 * part_bytes:
        assert etag.hexdigest() == hashlib.md5(content).hexdigest()
    else:
        whole = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
        assert etag.hexdigest() == f"{whole}-{len(parts)}"


@pytest.fixture
def s3(monkeypatch):
    """URL of a bucket of a stand-in for S3, spoken to by the real client."""
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # which knows an earlier server
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
    yield "s3://bucket"
    server.stop()


def test_s3_is_checked_by_its_etag_and_comes_back(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(targets, "S3_PART_BYTES", 5 << 20)  # S3's least
    sums = make_collection(tmp_path / "source", 5, kilobytes=(1, 90))
    (tmp_path / "source" / "large.svs").write_bytes(random.Random(0).randbytes(12 << 20))
    with mock.patch.object(targets.S3Target, "_reads_back", side_effect=AssertionError("the ETag should do")):
        assert call(tmp_path / "source", f"{s3}/slides", tmp_path / "scratch 1") == 0
        assert call(tmp_path / "source", f"{s3}/slides", tmp_path / "scratch 1") == 0
    assert {record["state"] for record in manifest_of(tmp_path / "scratch 1").values()} == {"done"}
    assert call(f"{s3}/slides", tmp_path / "target", tmp_path / "scratch 2", "--delete_source") == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "source") and len(contents(tmp_path / "target")) == 6
    assert sums.items() <= contents(tmp_path / "target").items()
    assert fsspec.filesystem("s3", use_listings_cache=False).find("bucket/slides") == []
    with pytest.raises(ValueError, match="cannot be used"):
        call(tmp_path / "source", "s3://no-such-bucket/slides", tmp_path / "scratch 3")


def test_s3_content_that_its_etag_does_not_tell_is_read_back(tmp_path, s3):
    make_collection(tmp_path / "source", 2, kilobytes=(1, 90))
    with mock.patch.object(targets.ETag, "hexdigest", return_value="that of an encrypting bucket"):
        assert call(tmp_path / "source", f"{s3}/slides", tmp_path / "scratch") == 0
        broken = {"_put": lambda self, file, path: self._files.pipe_file(path, bytes(file.stat().st_size))}
        with mock.patch.multiple(targets.S3Target, **broken):
            assert call(tmp_path / "source", f"{s3}/broken", tmp_path / "scratch 2") == 1
