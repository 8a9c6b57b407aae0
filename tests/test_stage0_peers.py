"""The benchmark against other tools: they take turns, and what cannot be measured is skipped with the reason."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import stage0_peers
from benchmarks.stage0_peers import Peer, Skipped, ask, compare, make_environment, run_or_skip, start
from tests.conftest import ROOT


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder for made-up peers, which say how many tiles their slide has by its name."""
    (tmp_path / "serve.py").write_text((ROOT / "benchmarks" / "peers" / "serve.py").read_text())
    monkeypatch.setattr(stage0_peers, "SCRIPTS", tmp_path)

    def write(name, body="return int(path[-1])", first=""):
        text = f"{first}\nfrom serve import serve\ndef work(path, num_workers):\n    {body}\nserve(work)\n"
        (tmp_path / f"{name.replace('-', '_')}_tiles.py").write_text(text)
        return Peer(name, ())

    return write


def start_here(peer, timeout=30):
    return start(peer, Path(sys.executable), 2, timeout)


def test_a_peer_is_asked_again_and_again_and_may_print(scripts):
    running = start_here(scripts("chatty-tool", "print('noise'); return num_workers * int(path[-1])"))
    assert [ask(running, f"slide {i}", 30)[0] for i in (1, 4)] == [2, 8]
    assert ask(running, "slide 1", 30)[1] >= 0
    running.process.kill()


def test_reasons_of_peers_that_fail(scripts):
    with pytest.raises(Skipped, match="ModuleNotFoundError: No module named 'absent_tool'"):
        start_here(scripts("broken", first="import absent_tool"))
    with pytest.raises(Skipped, match=r"after 0\.5 s"):
        start_here(scripts("late", first="import time; time.sleep(60)"), timeout=0.5)
    running = start_here(scripts("torn"))
    with pytest.raises(Skipped, match="ValueError: invalid literal"):
        ask(running, "slide x", 30)
    running.process.kill()


def test_peers_take_turns_and_one_that_fails_is_taken_out(scripts, tmp_path, monkeypatch):
    turns = []
    monkeypatch.setattr(stage0_peers, "tile_and_decode", lambda *_: turns.append("ours") or 6)
    log = f"open({str(tmp_path / 'log')!r}, 'a').write('.'); return 3"
    running = {"good": start_here(scripts("good", log)), "bad": start_here(scripts("bad", "1 / 0"))}
    good, skipped = running["good"], {}
    found = compare(tmp_path / "s7", running, 1, 2, 30, skipped)
    good.process.kill()
    assert len(turns) == 3 and (tmp_path / "log").read_text() == "...", "one to warm up, two that count"
    assert set(found) == {"ours", "good"} and len(found["good"]["ratios"]) == 2
    assert (found["ours"]["tiles"], found["good"]["tiles"]) == (6, 3)
    assert skipped == {"bad": "s7: ZeroDivisionError: division by zero"}


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(stage0_peers, "run_or_skip", lambda command: (tmp_path / "p").mkdir(exist_ok=True))
    monkeypatch.setattr(stage0_peers.shutil, "rmtree", lambda folder: commands.append(folder))
    python = make_environment(Peer("p", ("tool==1",)), tmp_path)
    assert python == make_environment(Peer("p", ("tool==1",)), tmp_path) and not commands
    make_environment(Peer("p", ("tool==2",)), tmp_path)
    assert commands == [tmp_path / "p"]
    assert python == make_environment(Peer("p-tuned", ("tool==2",), shares="p"), tmp_path)
    assert commands == [tmp_path / "p"] and not (tmp_path / "p-tuned").exists()


def test_a_python_that_is_absent_or_does_not_start_is_the_reason(tmp_path, monkeypatch):
    shim = tmp_path / "python3.1"
    shim.write_text("#!/bin/sh\nexit 127\n")
    for mode in (0o644, 0o755):
        shim.chmod(mode)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        with pytest.raises(Skipped, match=r"needs python3\.1 on the PATH"):
            make_environment(Peer("q", (), "3.1"), tmp_path)
    assert not (tmp_path / "q").exists()


def test_what_pip_says_last_is_the_reason():
    with pytest.raises(Skipped, match="^ERROR: no wheel$"):
        run_or_skip([sys.executable, "-c", "import sys; sys.exit('warning: old\\nERROR: no wheel\\n')"])


def test_the_command_reports_what_it_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage0_peers, "PEERS", (Peer("gone", (), "3.1"),))
    flags = ("--side", 1024, "--repeats", 1, "--num_workers", 1, "--work_dir", tmp_path / "w")
    monkeypatch.setattr(sys, "argv", ["stage0_peers.py", *map(str, flags), "--json", str(tmp_path / "figures.json")])
    stage0_peers.main()
    assert "skipped gone: needs python3.1 on the PATH" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["a"]["ours"]["tiles"] > figures["b"]["ours"]["tiles"] > 0 and list(figures["skipped"]) == ["gone"]
