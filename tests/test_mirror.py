"""Moving collections: real FTP server, bounded disk, kills; every file arrives once and whole."""

import hashlib
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage0_tiling.transfer import sources
from stage0_tiling.transfer.download import boot_id
from stage0_tiling.transfer.listing import Item, choose, parse_bytes, path_fault, public_url, without_secrets
from stage0_tiling.transfer.manifest import Manifest
from stage0_tiling.transfer.scratch import Scratch, lock_folder
from tests.conftest import run_command
from tests.ftp_server import PASSWORD, USER, FlakyServer
from tests.transfers import DiskWatch, call, contents, make, make_collection, manifest_of, part_name, start


def test_thirty_files_arrive_once_and_whole_through_drops_and_kills(tmp_path, seed=1):
    sums = make_collection(tmp_path / "ftp", 30)
    total = sum(file.stat().st_size for file in (tmp_path / "ftp").rglob("*.svs"))
    parts, target, max_disk, rng = tmp_path / "scratch" / "parts", tmp_path / "target", 900_000, random.Random(seed)
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


def test_an_ftp_url_may_be_of_one_file_and_of_nothing(tmp_path):
    make_collection(tmp_path / "source", 2, kilobytes=(1, 9))
    path = next(path for path in sorted((tmp_path / "source").rglob("*")) if path.is_file())
    with FlakyServer(tmp_path / "source") as server:
        url = f"{server.url}/{quote(str(path.relative_to(tmp_path / 'source')))}"
        assert call(url, tmp_path / "target", tmp_path / "scratch") == 0
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()
        with pytest.raises(OSError, match="cannot be listed: the server has no /nowhere, or does not show it"):
            call(f"{server.url}/nowhere", tmp_path / "other", tmp_path / "other scratch")


def test_bad_flags_and_shared_scratch_folders_are_refused(tmp_path):
    make_collection(tmp_path / "source", 2, kilobytes=(1, 9))
    source, target, scratch = tmp_path / "source", tmp_path / "target", tmp_path / "scratch"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    for refused, words in (
        ((source, target, scratch, "--max_disk", "many"), "--max_disk 'many' is no size"),
        ((source, target, scratch, "--num_workers", 0), "--num_workers 0"),
        ((source, source / "copy", scratch), "--target"),
        ((f"file://{source}", target, source / "scratch"), "lies in --source"),
        ((tmp_path / "nowhere", target, scratch), "nowhere cannot be listed"),
        ((tmp_path / "empty", target, scratch), "holds no file"),
        ((source, "ftp://host/slides", scratch), "source only"),
        (("gopher://host/slides", target, scratch), "gopher://host/slides: Protocol not known"),
        (("", target, scratch), "--source is empty"),
        ((source, " ", scratch), "--target is empty"),
        ((source, tmp_path / "a_file", scratch), "a_file is a file; name a folder"),
        ((source, target, tmp_path / "a_file" / "scratch"), "--scratch_dir"),
        ((source, target, target), "lies in --target"),
        ((source, scratch / "copy", scratch), "lies in --scratch_dir"),
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
