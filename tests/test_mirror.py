"""Moving collections: real FTP server, bounded disk, kills; every file arrives once and whole."""

import hashlib
import json
import os
import random
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage0_tiling import mirror
from stage0_tiling.transfer import sources, targets
from stage0_tiling.transfer.download import boot_id
from stage0_tiling.transfer.listing import Item, choose, parse_bytes, path_fault, public_url, without_secrets
from stage0_tiling.transfer.manifest import Manifest
from stage0_tiling.transfer.scratch import Scratch, lock_folder
from tests.conftest import ROOT, command, environment, heed_interrupts, run_command
from tests.ftp_server import PASSWORD, USER, FlakyServer
from tests.hub_server import REPO, HubServer

QUICK = ("--retry_wait", "0.01")


def make_collection(
    folder: Path, num_files: int, seed: int = 0, kilobytes: tuple[int, int] = (60, 500)
) -> dict[str, str]:
    """Files of random content, some in folders, one empty; returns the SHA-256 of each."""
    rng = random.Random(seed)
    sums = {}
    for i in range(num_files):
        path = f"case {i % 4}/slide {i:02d}.svs" if i % 3 else f"slide {i:02d}.svs"
        content = rng.randbytes(rng.randrange(*kilobytes) * 1000 + rng.randrange(999)) if i else b""
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        sums[path] = hashlib.sha256(content).hexdigest()
    return sums


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def part_name(path: str) -> str:
    return f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.part"


def manifest_of(scratch: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (scratch / "manifest.jsonl").read_text().splitlines()[1:]]
    return {line["path"]: line for line in lines}


def call(source, target, scratch, *flags) -> int:
    """The command in this process."""
    words = ["--source", source, "--target", target, "--scratch_dir", scratch, "--retries", 0, *QUICK, *flags]
    return mirror.main([str(word) for word in words])


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def start(*words) -> subprocess.Popen:
    return subprocess.Popen(
        command("stage0_tiling/mirror.py", *words, *QUICK),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


class DiskWatch(threading.Thread):
    """Measures, again and again, the disk space of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self.num_looks = folder, 0, 0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.003):
            used = 0
            for file in list(self.folder.glob("*")):
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue
                used += max(stat.st_size, stat.st_blocks * 512)
            self.peak, self.num_looks = max(self.peak, used), self.num_looks + 1

    def __enter__(self) -> "DiskWatch":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self.join()


def test_thirty_files_arrive_once_and_whole_through_drops_and_kills(tmp_path):
    sums = make_collection(tmp_path / "ftp", 30)
    total = sum(file.stat().st_size for file in (tmp_path / "ftp").rglob("*.svs"))
    parts, target, max_disk, rng = tmp_path / "scratch" / "parts", tmp_path / "target", 900_000, random.Random(1)
    words = ["--target", target, "--scratch_dir", tmp_path / "scratch", "--max_disk", max_disk, "--num_workers", 4]
    with FlakyServer(tmp_path / "ftp") as server, DiskWatch(parts) as disk:
        for path in list(sums)[1::3]:
            size = (tmp_path / "ftp" / path).stat().st_size
            server.drop_after[path] = [rng.randrange(size), rng.randrange(size)]
        left, arrived = {}, set()
        for ends in ("killed", "killed", "killed", "done"):
            server.asked.clear()
            process = start("--source", server.url, *words)
            if ends == "killed":
                server.call_after(rng.randrange(total // 5, total // 4), process.kill)
            _, messages = process.communicate(timeout=60)
            assert process.returncode == (-signal.SIGKILL if ends == "killed" else 0), messages
            first = {path: offset for path, offset in reversed(server.asked)}
            assert not arrived & set(first)  # what has arrived is not read again
            taken_up = [path for path in first if part_name(path) in left]
            assert all(first[path] == left[part_name(path)] for path in taken_up)  # no byte twice, none left out
            assert taken_up or not left
            left = {part.name: part.stat().st_size for part in parts.iterdir()}
            arrived = set(contents(target))
            assert bool(left) == (ends == "killed")
        asked = len(server.asked)
        run_command("stage0_tiling/mirror.py", "--source", server.url, *words)
        assert len(server.asked) == asked  # a run with nothing to do asks for nothing
    assert contents(target) == sums
    assert not list(parts.iterdir())
    assert 0 < disk.peak <= max_disk
    records = manifest_of(tmp_path / "scratch")
    assert {path: record["sums"]["sha256"] for path, record in records.items()} == sums
    assert {record["state"] for record in records.values()} == {"done"}


def test_a_file_that_is_refused_costs_only_itself_and_comes_later(tmp_path, caplog):
    sums = make_collection(tmp_path / "ftp", 5, kilobytes=(1, 20))
    target, scratch = tmp_path / "target", tmp_path / "scratch"
    with FlakyServer(tmp_path / "ftp") as server:
        server.refused.add("case 2/slide 02.svs")
        assert call(server.url, target, scratch, "--retries", 2) == 1
        assert "failed: 'case 2/slide 02.svs': 550 Not for you." in caplog.text
        assert [path for path, _ in server.asked].count("case 2/slide 02.svs") == 3
        assert contents(target) == {path: each for path, each in sums.items() if path != "case 2/slide 02.svs"}
        assert manifest_of(scratch)["case 2/slide 02.svs"]["state"] == "failed"
        server.refused.clear()
        assert call(server.url, target, scratch) == 0
    assert contents(target) == sums


def test_names_that_leave_the_collection_are_refused(tmp_path, caplog):
    sums = make_collection(tmp_path / "ftp", 3, kilobytes=(1, 20))
    with FlakyServer(tmp_path / "ftp") as server:
        server.listed = [
            f"type=file;size=4;modify=20260101000000; {name}" for name in ("../../evil", "a/../../evil", "tab\there")
        ]
        assert call(server.url, tmp_path / "deep" / "target", tmp_path / "deep" / "scratch") == 1
        assert all("evil" not in path and "here" not in path for path, _ in server.asked)
    assert caplog.text.count("leaves the collection") == 3 and "control characters" in caplog.text
    assert contents(tmp_path / "deep" / "target") == sums
    assert {path.name for path in tmp_path.rglob("*") if "evil" in path.name or "here" in path.name} == set()


def test_a_server_without_rest_sends_the_file_again(tmp_path):
    sums = make_collection(tmp_path / "ftp", 2)
    with FlakyServer(tmp_path / "ftp", without=("REST",)) as server:
        server.drop_after["case 1/slide 01.svs"] = [30_000]
        assert call(server.url, tmp_path / "target", tmp_path / "scratch", "--retries", 1) == 0
        assert [offset for path, offset in server.asked if path == "case 1/slide 01.svs"] == [0, 0]
    assert contents(tmp_path / "target") == sums


def test_passwords_come_from_url_environment_or_netrc_and_stay_secret(tmp_path, monkeypatch, caplog):
    sums = make_collection(tmp_path / "ftp", 2, kilobytes=(1, 20))
    with FlakyServer(tmp_path / "ftp", anonymous=False) as server:
        caplog.set_level("DEBUG")
        call(server.private_url, tmp_path / "by url", tmp_path / "scratch 1")
        words = ["--target", tmp_path / "x", "--scratch_dir", tmp_path / "scratch x"]
        false_url = server.private_url.replace("cret", "cr3t")
        wrong = run_command("stage0_tiling/mirror.py", "--source", false_url, *words, status=2)
        assert len(wrong.stderr.splitlines()) == 1 and "530" in wrong.stderr and "s3cr3t" not in wrong.stderr
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
        (tmp_path / ".netrc").chmod(0o600)
        call(server.url, tmp_path / "by netrc", tmp_path / "scratch 2")
        (tmp_path / ".netrc").unlink()
        monkeypatch.setenv("FTP_USER", USER)
        monkeypatch.setenv("FTP_PASSWORD", PASSWORD)
        call(server.url, tmp_path / "by environment", tmp_path / "scratch 3")
    assert (
        contents(tmp_path / "by url")
        == contents(tmp_path / "by netrc")
        == contents(tmp_path / "by environment")
        == sums
    )
    written = "".join((tmp_path / f"scratch {i}" / "manifest.jsonl").read_text() for i in (1, 2, 3))
    assert PASSWORD not in written + caplog.text


def test_an_interrupt_leaves_130_and_the_next_run_goes_on(tmp_path):
    sums = make_collection(tmp_path / "ftp", 8)
    words = ["--target", tmp_path / "target", "--scratch_dir", tmp_path / "scratch", "--num_workers", 2]
    with FlakyServer(tmp_path / "ftp") as server:
        process = start("--source", server.url, *words)
        server.call_after(600_000, lambda: process.send_signal(signal.SIGINT))
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 130, messages
        assert "Traceback" not in messages
        assert len(contents(tmp_path / "target")) < len(sums)
        run_command("stage0_tiling/mirror.py", "--source", server.url, *words)
    assert contents(tmp_path / "target") == sums


def test_dry_run_lists_what_is_missing_and_writes_nothing(tmp_path, capsys):
    make_collection(tmp_path / "source", 6, kilobytes=(1, 9))
    (tmp_path / "source" / "notes.txt").write_text("not a slide")
    flags = ("--include", "*.svs", "--exclude", "case 1/*")
    places = (tmp_path / "source", tmp_path / "target", tmp_path / "scratch")
    assert call(*places, *flags, "--dry_run") == 0
    wanted = {
        path for path in contents(tmp_path / "source") if path.endswith(".svs") and not path.startswith("case 1/")
    }
    assert {line.split("\t")[1] for line in capsys.readouterr().out.splitlines()} == wanted
    assert not (tmp_path / "target").exists() and not (tmp_path / "scratch").exists()
    assert call(*places, *flags) == 0
    assert set(contents(tmp_path / "target")) == wanted
    assert call(*places, *flags, "--dry_run") == 0
    assert capsys.readouterr().out == ""


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


def test_delete_source_deletes_only_what_the_target_holds(tmp_path, caplog):
    sums = make_collection(tmp_path / "ftp", 4, kilobytes=(1, 9))
    target, scratch = tmp_path / "target", tmp_path / "scratch"
    with FlakyServer(tmp_path / "ftp") as server:
        assert call(server.private_url, target, scratch, "--include", "case 1/*") == 0
        (target / "case 1" / "slide 01.svs").write_bytes(b"x" * (target / "case 1" / "slide 01.svs").stat().st_size)
        server.refused.add("slide 03.svs")
        assert call(server.private_url, target, scratch, "--delete_source") == 1
        assert "no longer holds" in caplog.text
        assert set(contents(tmp_path / "ftp")) == {"case 1/slide 01.svs", "slide 03.svs"}
        server.refused.clear()
        assert call(server.private_url, target, scratch, "--delete_source") == 0
    assert contents(target) == sums and not contents(tmp_path / "ftp")


def test_a_file_bigger_than_the_disk_space_fails_alone(tmp_path, caplog):
    sums = make_collection(tmp_path / "source", 3, kilobytes=(1, 9))
    (tmp_path / "source" / "huge.svs").write_bytes(bytes(50_000))
    assert call(tmp_path / "source", tmp_path / "target", tmp_path / "scratch", "--max_disk", "40kB") == 1
    assert "failed: 'huge.svs': its 50000 bytes are more than --max_disk, 40000 bytes" in caplog.text
    assert contents(tmp_path / "target") == sums


def test_bad_flags_and_shared_scratch_folders_are_refused(tmp_path):
    make_collection(tmp_path / "source", 2, kilobytes=(1, 9))
    source, target, scratch = tmp_path / "source", tmp_path / "target", tmp_path / "scratch"
    (tmp_path / "empty").mkdir()
    for refused, words in (
        ((source, target, scratch, "--max_disk", "many"), "--max_disk 'many' is no size"),
        ((source, target, scratch, "--num_workers", 0), "--num_workers 0"),
        ((tmp_path / "nowhere", target, scratch), "nowhere cannot be listed"),
        ((tmp_path / "empty", target, scratch), "holds no file"),
        ((source, "kaggle://datasets/me/slides", scratch), "kaggle:// is no target"),
        ((source, "ftp://host/slides", scratch), "source only"),
        (("gopher://host/slides", target, scratch), "gopher"),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            call(*refused)
        assert words in str(caught.value)
    assert call(source, target, scratch) == 0
    with pytest.raises(ValueError, match="of its own"):
        call(source, tmp_path / "elsewhere", scratch)
    with lock_folder(scratch), pytest.raises(ValueError, match="in use by another"):
        call(source, target, scratch)


@pytest.mark.parametrize("change", ["other version", "after a crash", "longer than its file"])
def test_parts_that_cannot_be_trusted_are_not_continued(tmp_path, change):
    sums = make_collection(tmp_path / "source", 2)
    scratch, source = tmp_path / "scratch", tmp_path / "source"
    path = "case 1/slide 01.svs"
    size, version = (source / path).stat().st_size, str((source / path).stat().st_mtime)
    manifest = Manifest(make(scratch) / "manifest.jsonl", str(source), str(tmp_path / "target"))
    manifest.compact()
    boot = "another boot" if change == "after a crash" else boot_id()
    manifest.add(path, state="started", size=size, version="1" if change == "other version" else version, boot=boot)
    wrong = b"not what the source holds" * (size if change == "longer than its file" else 1)
    (make(scratch / "parts") / part_name(path)).write_bytes(wrong)
    assert call(source, tmp_path / "target", scratch) == 0
    assert contents(tmp_path / "target") == sums


def test_a_changed_file_is_sent_again_and_other_content_of_its_size_is_replaced(tmp_path):
    make_collection(tmp_path / "source", 3, kilobytes=(1, 9))
    for path in contents(tmp_path / "source"):
        (make((tmp_path / "target" / path).parent) / Path(path).name).write_bytes(
            bytes((tmp_path / "source" / path).stat().st_size)
        )
    assert call(tmp_path / "source", tmp_path / "target", tmp_path / "scratch") == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "source")
    changed = tmp_path / "source" / "case 1" / "slide 01.svs"
    changed.write_bytes(bytes(changed.stat().st_size))
    os.utime(changed, (1, 1))
    assert call(tmp_path / "source", tmp_path / "target", tmp_path / "scratch") == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "source")


def test_what_arrives_with_another_checksum_than_stated_is_refused(tmp_path):
    class Lying(sources.FsspecSource):
        def list_items(self):
            return [replace(item, sums={"sha256": "0" * 64}) for item in super().list_items()]

    make_collection(tmp_path / "source", 2, kilobytes=(1, 9))
    with mock.patch.object(sources, "FsspecSource", Lying):
        assert call(tmp_path / "source", tmp_path / "target", tmp_path / "scratch") == 1
    assert contents(tmp_path / "target") == {}


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_checksums_of_a_list_are_compared_with_what_arrives(tmp_path, kind, caplog):
    source, target = tmp_path / "source", tmp_path / "target"
    sums = make_collection(source, 4, kilobytes=(1, 9))
    lines = [f"{hashlib.new(kind, (source / path).read_bytes()).hexdigest()}  ./{path}" for path in sums]
    wrong = list(sums)[2]
    lines[2] = f"{hashlib.new(kind, b'another').hexdigest().upper()} *{wrong}"
    (tmp_path / "list").write_text("# published\n" + "\n".join(lines[1:]) + "\n")
    assert call(source, target, tmp_path / "scratch", "--checksums", tmp_path / "list") == 1
    assert contents(target) == {path: each for path, each in sums.items() if path != wrong}
    assert f"its {kind} is" in caplog.text
    for text, words in (("not a sum\n", "line 1 is none"), (f"{'0' * 64}  elsewhere.svs\n", "names no file")):
        (tmp_path / "list").write_text(text)
        with pytest.raises(ValueError, match=words):
            call(source, target, tmp_path / "scratch", "--checksums", tmp_path / "list")


def test_any_place_that_fsspec_knows_is_read_back(tmp_path):
    make_collection(tmp_path / "source", 4, kilobytes=(1, 9))
    memory = fsspec.filesystem("memory")
    assert call(tmp_path / "source", "memory://slides", tmp_path / "scratch 1") == 0
    with mock.patch.object(type(memory), "put_file", lambda self, file, path: self.pipe_file(path, b"")):
        assert call(tmp_path / "source", "memory://broken", tmp_path / "scratch 3") == 1
    assert call("memory://slides", tmp_path / "target", tmp_path / "scratch 2") == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "source")
    memory.rm("/slides", recursive=True)


def test_a_cut_line_of_the_manifest_is_dropped(tmp_path):
    manifest = Manifest(tmp_path / "manifest.jsonl", "a", "b")
    manifest.compact()
    manifest.add("x", state="done", size=1)
    manifest.add("y", state="done", size=2)
    text = (tmp_path / "manifest.jsonl").read_text()
    for cut in range(1, len(text) - text.rindex('{"path": "y"')):
        (tmp_path / "manifest.jsonl").write_text(text[:-cut])
        again = Manifest(tmp_path / "manifest.jsonl", "a", "b")
        assert again["x"]["size"] == 1
        assert again["y"] == ({"path": "y", "state": "done", "size": 2} if cut == 1 else {})
        again.compact()
        again.add("z", state="done", size=3)
        assert Manifest(tmp_path / "manifest.jsonl", "a", "b")["z"]["size"] == 3


def test_space_is_never_taken_twice(tmp_path):
    scratch, rng, stop = Scratch(tmp_path / "parts", 20 * 4096), random.Random(0), threading.Event()
    sizes = {f"{i}": rng.randrange(1, 15 * 4096) for i in range(60)}
    held, peak, lock = {}, [], threading.Lock()

    def work(paths: list[str]) -> None:
        for path in paths:
            scratch.reserve(path, sizes[path], lambda: False, stop)
            with lock:
                held[path] = sizes[path]
                peak.append(sum(held.values()))
            scratch.part(path).write_bytes(b"12")
            if path.endswith("7"):  # fails: its two bytes stay as long as nobody needs the room
                scratch.give_up(path)
            with lock:
                del held[path]
            if not path.endswith("7"):
                scratch.release(path)

    threads = [threading.Thread(target=work, args=(list(sizes)[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert max(peak) <= 20 * 4096


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


@given(st.text(alphabet="ab./\\\n", max_size=12))
def test_paths_that_pass_stay_below_the_root(path):
    if path_fault(path) is None:
        assert os.path.normpath(f"/root/{path}") == f"/root/{path}" and "\n" not in path
    else:
        assert os.path.normpath(f"/root/{path}") != f"/root/{path}" or not path or "\n" in path


def test_sizes_patterns_and_secrets():
    assert [parse_bytes(text) for text in ("19GB", "1.5 kb", "512MiB", "7")] == [19 * 10**9, 1500, 512 << 20, 7]
    for text in ("", "GB", "-1GB", "0", "1XB", "nan"):
        with pytest.raises(ValueError, match="no size"):
            parse_bytes(text)
    items = [Item("a/b.svs", 1), Item("a/c.tiff", 1), Item("label.svs", 1)]
    assert [item.path for item in choose(items, ["*.svs"], ["label*"])] == ["a/b.svs"]
    assert public_url("ftp://me:word@host:2121/a%20b/") == "ftp://host:2121/a%20b"
    assert without_secrets("ftp://me:w@rd@host/x and https://s3/k?X-Sig=abc!") == "ftp://host/x and https://s3/k"


@pytest.fixture
def s3(monkeypatch):
    """URL of a bucket of a stand-in for S3, spoken to by the real client."""
    pytest.importorskip("s3fs", reason="s3:// needs the extra: pip install -e .[s3]")
    moto = pytest.importorskip("moto.server", reason="this test needs moto[server]")
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # which knows an earlier server
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
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
