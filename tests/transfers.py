"""Collections to move, the command that moves them, and a watch on the disk space that it takes."""

import hashlib
import json
import random
import subprocess
import threading
from pathlib import Path

from stage0_tiling import mirror
from tests.conftest import ROOT, command, environment, heed_interrupts

QUICK = ("--retry_wait", "0.01")


def make_collection(
    folder: Path, num_files: int, seed: int = 0, kilobytes: tuple[int, int] = (60, 500)
) -> dict[str, str]:
    """Files of random content, some in folders, one empty; returns the SHA-256 of each."""
    rng = random.Random(seed)
    sums = {}
    for i in range(num_files):
        path = (
            f"case {i % 4}/slide {i:02d}.svs"
            if i % 3
            else f"slide {i:02d} µm ✓.svs"
            if i == 9
            else f"slide {i:02d}.svs"
        )
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
