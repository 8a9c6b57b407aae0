"""Options of generate.py and predict.py, called in this process on one tiny model."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from tests.test_inference import save_model


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    from tests.tiny_models import PATCH_WIDTH

    return save_model(tmp_path_factory.mktemp("model") / "final_model", corpus, patch_width=PATCH_WIDTH)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a command of inference in this process: exit status, stdout and stderr."""

    def run(command, *flags, stdin=""):
        module = __import__(f"inference.{command}", fromlist=["main"])
        monkeypatch.setattr(sys, "argv", [f"inference/{command}.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = module.main()
        said = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=said.out, stderr=said.err)

    return run


def one(corpus, number=0):
    return corpus.features / (json.loads(corpus.reports.read_text())[number]["id"].replace(".tiff", ".h5"))


def test_generate(run_here, corpus, model):
    done = run_here("generate", "--model", model, "--features", one(corpus), "--num_beams", 2, "--max_new_tokens", 5)
    print(done)
