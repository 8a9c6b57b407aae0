r"""How fast slides become tiles, against other tools of the package index, in one run on one machine.

    OMP_NUM_THREADS=1 python benchmarks/stage0_peers.py --work_dir ~/.cache/slidescribe_peers --json peers.json

Two slides are made as in benchmarks/stage0.py and cut to tiles of 256 px at 0.5 um/px by this project and by LazySlide,
TIAToolbox, slideflow and histolab: the slide is opened, its tissue found by the tool's own method, and every tile
decoded to RGB.

    a   slide at 0.5 um/px
    b   slide at 0.25 um/px, no level at 0.5

Each tool gets a virtual environment of its own, made in WORK_DIR/venvs by the first run (17 GB and many minutes) and
used again, and is run there by benchmarks/peers/<name>_tiles.py with the fastest settings that it documents. slideflow
is measured in two ways, both on cuCIM: "slideflow" is installed as its documentation says, with the tile filters that
it has switched on; "slideflow-tuned" is the fastest that we found, without them. One that cannot be installed or fails
is skipped, with the reason. Every repetition measures all of them one after the other; the ratio is the median of the
repetitions' ratios of tiles/s. Tools find slightly different tissue. Imports are not measured.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import cv2

from benchmarks.make_slides import MPP, make_slide
from benchmarks.stage0 import tile_and_decode

SCRIPTS = Path(__file__).resolve().with_name("peers")


@dataclass(frozen=True)
class Peer:
    """A tool to compare with.

    Attributes:
        name: of the tool, or of a way to use it, and of the script.
        requirements: what pip installs; what is not pinned here is chosen by the tool, or by PIP_CONSTRAINT.
        python: version that has wheels of all of them, found on the PATH; None is the one that runs this.
        shares: name of the peer whose virtual environment it uses; None is its own.
    """

    name: str
    requirements: tuple[str, ...]
    python: str | None = None
    shares: str | None = None


# What its documentation has pip install, and the setuptools that it still imports from. It reads with cuCIM where CuPy
# is installed, GPU or not; otherwise with libvips, a system library that pip does not bring.
SLIDEFLOW = ("slideflow[cucim]==3.0.2", "cupy-cuda11x==13.6.0", "torch", "torchvision", "setuptools<81")

PEERS = (
    Peer("lazyslide", ("lazyslide==0.13.0",)),
    Peer("tiatoolbox", ("tiatoolbox==2.1.3",)),
    Peer("slideflow", SLIDEFLOW, "3.10"),
    Peer("slideflow-tuned", SLIDEFLOW, "3.10", shares="slideflow"),
    Peer("histolab", ("histolab==0.7.0", "openslide-bin==4.0.1.2"), "3.10"),
)


@dataclass(frozen=True)
class Running:
    """The process of a peer, and the file that it complains into."""

    process: subprocess.Popen
    errors: TextIO


class Skipped(Exception):
    """A tool that cannot be measured; the message says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS], help="only these (default: all)")
    parser.add_argument("--side", type=int, default=20_000, help="level-0 pixels of the slides' sides (default: 20000)")
    parser.add_argument("--tissue", type=float, default=0.3, help="fraction of a slide that is tissue (default: 0.3)")
    parser.add_argument("--num_workers", type=int, default=2, help="threads or processes of each tool (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one to warm up (default: 5)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one repetition of a tool (default: 600)")
    parser.add_argument("--work_dir", type=Path, help="keeps slides and environments; default: a temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    args = parser.parse_args()
    cv2.setNumThreads(args.num_workers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.work_dir or Path(scratch)).expanduser().absolute()
        chosen = [peer for peer in PEERS if not args.peers or peer.name in args.peers]
        figures = {"side": args.side, "num_workers": args.num_workers, "repeats": args.repeats, "cpus": os.cpu_count()}
        figures |= {"load_before": os.getloadavg()[0], "skipped": {}}
        running = start_all(chosen, folder / "venvs", args.num_workers, args.timeout, figures["skipped"])
        try:
            for name, mpp in MPP.items():
                path = folder / f"{name}_{args.side}_{args.tissue:g}.svs"
                make_slide(path, args.side, args.tissue, mpp)
                figures[name] = compare(path, running, args.num_workers, args.repeats, args.timeout, figures["skipped"])
        finally:
            for peer in running.values():
                peer.process.kill()
                peer.process.wait()
    report(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def start_all(
    peers: list[Peer], folder: Path, num_workers: int, timeout: float, skipped: dict[str, str]
) -> dict[str, Running]:
    """Install and start the peers; processes that have imported their tool and wait for slides."""
    running = {}
    for peer in peers:
        try:
            running[peer.name] = start(peer, make_environment(peer, folder), num_workers, timeout)
        except Skipped as reason:
            skipped[peer.name] = str(reason)
    return running


def make_environment(peer: Peer, folder: Path) -> Path:
    """Make a tool's virtual environment, unless one with the same requirements is there; its Python.

    Raises:
        Skipped: if a Python or a package cannot be had.
    """
    environment, requirements = folder / (peer.shares or peer.name), "\n".join(peer.requirements)
    mark = environment / "requirements.txt"
    python = environment / "bin" / "python"
    if mark.is_file() and mark.read_text() == requirements:
        return python
    base = find_python(peer.python)
    if environment.exists():
        shutil.rmtree(environment)
    print(f"installing {peer.name} in {environment}", file=sys.stderr)
    run_or_skip([base, "-m", "venv", environment])
    run_or_skip([python, "-m", "pip", "install", "--prefer-binary", *peer.requirements])
    mark.write_text(requirements)
    return python


def find_python(version: str | None) -> str:
    """A Python of that version; one on the PATH must start, since pyenv puts commands there that stand for none."""
    if version is None:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        raise Skipped(f"needs python{version} on the PATH")
    return found


def run_or_skip(command: list[str | Path]) -> None:
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        raise Skipped(last_line(done.stderr or done.stdout))


def start(peer: Peer, python: Path, num_workers: int, timeout: float) -> Running:
    """Start a peer's script and wait until its tool is imported."""
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [python, SCRIPTS / f"{peer.name.replace('-', '_')}_tiles.py", str(num_workers)],
        cwd=python.parents[1],  # some leave logs where they run
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    peer_process = Running(process, errors)
    read_answer(peer_process, timeout)
    return peer_process


def clean_environment() -> dict[str, str]:
    """Ours without PYTHONPATH, on which a tool would find this project's modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def ask(peer: Running, path: Path, timeout: float) -> tuple[int, float]:
    """Let a peer do a slide once; its tiles and seconds."""
    peer.process.stdin.write(f"{path}\n")
    peer.process.stdin.flush()
    answer = read_answer(peer, timeout)
    return answer["tiles"], answer["seconds"]


def read_answer(peer: Running, timeout: float) -> dict:
    timer = threading.Timer(timeout, peer.process.kill)
    timer.start()
    line = peer.process.stdout.readline()
    timer.cancel()
    if not line:
        if peer.process.wait() == -signal.SIGKILL:
            raise Skipped(f"killed, by memory or after {timeout:g} s")
        peer.errors.seek(0)
        raise Skipped(last_line(peer.errors.read()))
    answer = json.loads(line)
    if "error" in answer:
        raise Skipped(answer["error"])
    return answer


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def compare(
    path: Path,
    running: dict[str, Running],
    num_workers: int,
    repeats: int,
    timeout: float,
    skipped: dict[str, str],
) -> dict:
    """Measure all on one slide in turns; tiles, tiles/s and ratio of each. A peer that fails is taken out."""
    runs: dict[str, list[tuple[int, float]]] = {"ours": []} | {name: [] for name in running}
    for repetition in range(-1, repeats):
        started = time.perf_counter()
        tiles = tile_and_decode(path, "auto", num_workers)
        found = {"ours": (tiles, time.perf_counter() - started)}
        for name in list(running):
            try:
                found[name] = ask(running[name], path, timeout)
            except (Skipped, BrokenPipeError) as reason:
                skipped[name] = f"{path.name}: {reason}"
                running.pop(name).process.kill()
                del runs[name]
        if repetition >= 0:
            for name, measured in found.items():
                runs[name].append(measured)
    return {name: summary(measured, runs["ours"]) for name, measured in runs.items()}


def summary(measured: list[tuple[int, float]], ours: list[tuple[int, float]]) -> dict:
    speeds = [tiles / seconds for tiles, seconds in measured]
    ratios = [tiles / seconds / speed for (tiles, seconds), speed in zip(ours, speeds, strict=True)]
    return {
        "tiles": measured[0][0],
        "tiles_per_s": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": [seconds for _, seconds in measured],
    }


def report(figures: dict) -> None:
    print("{side} px wide, {num_workers} workers, {cpus} CPUs, load {load_before:.1f}".format(**figures))
    for name in MPP:
        for tool, found in figures[name].items():
            times = "" if tool == "ours" else f", ours is {found['ratio']:.1f} x"
            print(f"{name}  {tool:<16}{found['tiles']:>6} tiles {found['tiles_per_s']:>7.0f} tiles/s{times}")
        ratios = {tool: found["ratio"] for tool, found in figures[name].items() if tool != "ours"}
        if ratios:
            fastest = min(ratios, key=ratios.get)
            print(f"{name}  {ratios[fastest]:.1f} x the fastest, {fastest}")
    for name, reason in figures["skipped"].items():
        print(f"skipped {name}: {reason}")


if __name__ == "__main__":
    main()
