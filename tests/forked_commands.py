"""Commands of the project run in forks of a process that has imported the libraries once: seconds saved for each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Environment variables that libraries read when they are imported; a test that changes one needs a new process.
READ_AT_IMPORT = ("HF_", "HOME", "XDG_", "TORCH_", "TRANSFORMERS_", "ACCELERATE_", "CUDA_", "OMP_", "PYTHON", "PATH")


def _read_at_import() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}


ENVIRONMENT_AT_START = _read_at_import()


def can_fork() -> bool:
    """Whether the environment is still that in which the libraries are imported, as far as they read it."""
    return _read_at_import() == ENVIRONMENT_AT_START


def run_forked(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a script with its flags, as ``python SCRIPT FLAGS`` would from the repository root, and wait for its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported_libraries"])
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = context.Process(target=_run_script, args=(words, environment, str(stdout), str(stderr)))
        process.start()
        process.join()
        texts = [path.read_text() if path.exists() else "" for path in (stdout, stderr)]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _run_script(words: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (
        os.fdopen(descriptor, "w", buffering=1, closefd=False, encoding="utf-8") for descriptor in (1, 2)
    )
    # Its own worker processes begin as those of any script do.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = words
    sys.path[0] = str((ROOT / words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
