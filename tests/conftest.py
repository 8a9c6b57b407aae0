"""Fixtures: a small corpus on disk, and a way to run the project's commands as a user does."""

import errno
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep, so commands can run beside it

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.forked_commands import can_fork, run_forked

ROOT = Path(__file__).resolve().parent.parent


# The files that take longest, by far: begun first, they end before the rest does, whatever the number of processes.
LONGEST_FIRST = ("test_demo", "test_training", "test_inference", "test_resume_and_layouts", "test_stage0_runs_ray")
LONGEST_FIRST += ("test_finetuning_methods", "test_stage0_commands", "test_demo_slides")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files of tests by how long they take."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@dataclass(frozen=True)
class Corpus:
    """A tiny language model, feature files with reports, and images with captions and questions."""

    llm: Path
    features: Path
    reports: Path
    images: Path
    captions: Path
    questions: Path
    encoder: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(root: Path) -> Corpus:
    """Make the corpus under `root`."""
    from PIL import Image

    from slide_features import write_slide_features
    from tests.tiny_models import PATCH_WIDTH, REPORTS, make_llm, make_tokenizer

    make_llm().save_pretrained(root / "llm")
    make_tokenizer().save_pretrained(root / "llm")
    rng = np.random.default_rng(0)
    reports, captions, questions = [], [], []
    (root / "images").mkdir()
    kinds = rng.normal(size=(len(REPORTS), PATCH_WIDTH))
    for i in range(22):
        kind = i % len(REPORTS)
        slide_id, num_patches = f"PIT_01_{i // 2:05d}_{i % 2:02d}", int(rng.integers(3, 30))
        write_slide_features(
            root / "features" / f"{slide_id}.h5",
            (kinds[kind] + 0.1 * rng.normal(size=(num_patches, PATCH_WIDTH))).astype(np.float16),
            np.stack([np.arange(num_patches) % 5, np.arange(num_patches) // 5], axis=1) * 256,
            name=slide_id,
            encoder="made-up",
            mpp=0.5,
            tile_size=256,
            overlap=0,
            min_tissue=0.1,
            patch_size_level0=256,
        )
        reports.append({"id": slide_id + ".tiff", "report": REPORTS[kind]})
        if i < 8:
            picture = np.full((40, 40, 3), 60 * kind + 20, dtype=np.uint8) + rng.integers(0, 20, (40, 40, 3), np.uint8)
            Image.fromarray(picture).save(root / "images" / f"{i}.png")
            captions.append({"image": f"{i}.png", "caption": REPORTS[kind]})
            organ = REPORTS[kind].split(",")[0]
            questions.append({"image": f"{i}.png", "problem": "Which organ?", "normal_caption": organ})
    for name, rows in (("reports", reports), ("captions", captions), ("questions", questions)):
        (root / f"{name}.json").write_text(json.dumps(rows))
    make_encoder(root / "encoder")
    return Corpus(
        root / "llm",
        root / "features",
        root / "reports.json",
        root / "images",
        root / "captions.json",
        root / "questions.json",
        root / "encoder",
    )


def make_encoder(folder: Path) -> None:
    """A vision transformer of 32 px images and 16 patches in timm's hub layout."""
    import timm
    import torch
    from safetensors.torch import save_file

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **kwargs)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "num_features": 24,
        "model_args": {key: value for key, value in kwargs.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def command(*arguments: object, processes: int | None = None) -> list[str]:
    """Command line of a script of the project; under ``accelerate launch`` for one process, torchrun for several.

    ``accelerate launch --cpu --num_processes 2`` starts a single process (accelerate 1.15), and torchrun sets what
    Accelerate reads.
    """
    words = [str(argument) for argument in arguments]
    if processes is None:
        return [sys.executable, *words]
    if processes == 1:
        return [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *words]


def environment() -> dict[str, str]:
    """Environment of a command: no network, no GPU, and one thread a process so that two fit on two cores."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return os.environ | quiet | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def heed_interrupts() -> None:
    """For a child that is to be interrupted: a background job of a shell ignores interrupts, and hands that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def no_access(*_: object, **__: object) -> None:
    """In place of what makes a file: the tests may run as a user to whom everything is allowed."""
    raise PermissionError(errno.EACCES, "Permission denied")


def run_on_two(*arguments: object) -> str:
    """Run a script on two processes that know of each other, each a fork as of :func:`run_command`; their stderr."""
    from tests.forked_runs import free_port

    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(rank: int) -> subprocess.CompletedProcess:
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_forked([str(argument) for argument in arguments], environment() | own)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, (0, 1)))
    stderr = done[0].stderr + done[1].stderr
    assert [each.returncode for each in done] == [0, 0], stderr
    return stderr


def run_command(*arguments: object, processes: int | None = None, status: int = 0) -> subprocess.CompletedProcess:
    """Run a script from the repository root and check its exit status.

    Without a launcher it is a fork of a process that has the libraries already, where the environment allows it.
    """
    if processes is None and can_fork():
        done = run_forked([str(argument) for argument in arguments], environment())
    else:
        done = subprocess.run(
            command(*arguments, processes=processes), cwd=ROOT, env=environment(), capture_output=True, text=True
        )
    assert done.returncode == status, f"{arguments[0]} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done
