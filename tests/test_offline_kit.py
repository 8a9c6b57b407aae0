"""The offline kit: packed without a network from wheels made here, installed from it, and checked."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest

import offline_kit
from tests.conftest import run_command

MODEL = "org/tiny-model"
REVISION = "a" * 40
FILES = ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
UNWANTED = ["pytorch_model.bin", "onnx/model.safetensors", "onnx/config.json", "picture.png"]


def make_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that pip takes in place of an index, and requirements that name one of them."""
    make_wheel(tmp_path / "index", "tinything", "1.5", requires="tinyneed")
    make_wheel(tmp_path / "index", "tinything", "2.0")
    make_wheel(tmp_path / "index", "tinyneed", "0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "requirements.txt").write_text("# pins\ntinything==1.5  # why\n\n# the checkout\n-e .\n")
    return tmp_path / "index"


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, with one model, in the cache layout that it writes where links are off."""
    from huggingface_hub.file_download import DryRunFileInfo

    def snapshot_download(repository, revision=None, cache_dir=None, allow_patterns=None, dry_run=False):
        assert repository == MODEL
        if dry_run:
            return [
                DryRunFileInfo(REVISION, 7, name, f"/cache/{name}", is_cached=False, will_download=True)
                for name in FILES + UNWANTED
            ]
        folder = Path(cache_dir) / "models--org--tiny-model"
        for name in allow_patterns:
            (folder / "snapshots" / REVISION / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "snapshots" / REVISION / name).write_text("content")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(REVISION)
        return str(folder / "snapshots" / REVISION)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_kit_is_packed_checked_and_installed_without_a_network(tmp_path, index, hub, monkeypatch):
    import nltk

    (tmp_path / "nltk" / "corpora").mkdir(parents=True)
    (tmp_path / "nltk" / "corpora" / "wordnet.zip").write_bytes(b"words")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    # The checkout's own build needs setuptools, which the index of this test has not got.
    monkeypatch.setattr(offline_kit, "build_requirements", lambda: [])
    kit = tmp_path / "a kit"
    words = ["--output_dir", str(kit), "--requirements", str(tmp_path / "requirements.txt"), "--models", MODEL]
    assert offline_kit.main(["pack", *words]) == 0
    assert {file.name for file in (kit / "wheels").iterdir()} == {
        "tinything-1.5-py3-none-any.whl",
        "tinyneed-0.1-py3-none-any.whl",
    }
    assert (kit / "nltk_data" / "corpora" / "wordnet.zip").read_bytes() == b"words"

    moved = tmp_path / "elsewhere" / "kit"  # as on another machine: neither index nor the first place
    moved.parent.mkdir()
    shutil.move(kit, moved)
    shutil.rmtree(index)
    assert offline_kit.main(["verify", "--output_dir", str(moved)]) == 0
    install(moved, tmp_path / "installed")
    python = tmp_path / "installed" / ".venv" / "bin" / "python"
    told = subprocess.run(
        ["sh", "-c", f'. "{tmp_path}/installed/offline_env.sh" && echo "$HF_HOME" && python -c "{ASK}"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert told[:2] == [str(moved / "huggingface"), "1.5"]
    assert python.exists() and (tmp_path / "installed" / "requirements.txt").read_text().endswith("-e .\n")


ASK = "import tinything; print(tinything.VERSION)"


def install(kit: Path, target: Path) -> None:
    """Run the kit's install.sh, but for the checkout itself, which this test's kit has no setuptools for."""
    script = (kit / "install.sh").read_text()
    lines = [line for line in script.splitlines() if "--no-deps -e" not in line and "sha256sum" not in line]
    assert len(lines) == len(script.splitlines()) - 2
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=kit).returncode == 0
    (kit / "install.sh").write_text("\n".join(lines) + "\n")
    subprocess.run(
        ["sh", kit / "install.sh", target],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        check=True,
    )


def test_models_in_the_kit_are_found_offline_by_their_names(tmp_path, hub, monkeypatch):
    from huggingface_hub._snapshot_download import snapshot_download  # the client's own, not this test's

    revision = offline_kit.fetch_model(tmp_path / "huggingface", MODEL, None)
    found = Path(snapshot_download(MODEL, cache_dir=tmp_path / "huggingface" / "hub", local_files_only=True))
    assert revision == found.name == REVISION
    assert sorted(path.name for path in found.rglob("*")) == sorted(FILES)
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_weights_are_safetensors_unless_there_are_only_others():
    assert offline_kit.choose_files(FILES + UNWANTED) == sorted(FILES)
    assert offline_kit.choose_files(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]
    assert offline_kit.choose_files(["onnx/model.safetensors", "a/b.pt"]) == ["a/b.pt"]


def test_encoders_go_by_their_short_names_too():
    assert offline_kit.repository_of("uni2-h") == ("MahmoodLab/UNI2-h", None)
    assert offline_kit.repository_of("org/name@v1.0") == ("org/name", "v1.0")
    with pytest.raises(ValueError, match="--models nonsense: neither"):
        offline_kit.repository_of("nonsense")


def test_list_tells_sizes_where_they_are_known(tmp_path, hub, capsys, monkeypatch):
    (tmp_path / "requirements.txt").write_text("tinything==1.5\n-e .\n")
    words = ["list", "--requirements", str(tmp_path / "requirements.txt"), "--models", MODEL]
    assert offline_kit.main(words) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert ["wheel", "-", "tinything==1.5"] in lines and ["model", "7", f"{MODEL}/model.safetensors"] in lines
    assert ["wheel", "-", offline_kit.build_requirements()[0]] in lines
    assert [int(size) > 0 for kind, size, _ in lines if kind == "code"] == [True]
    monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=OSError("no network")))
    assert offline_kit.main(words) == 0
    assert f"model\t-\t{MODEL}/*" in capsys.readouterr().out


def test_a_damaged_kit_is_found_out(tmp_path, caplog):
    kit = tmp_path / "kit"
    (kit / "wheels").mkdir(parents=True)
    for name in ("a", "wheels/b", "wheels/c d"):
        (kit / name).write_text(name)
    with pytest.raises(ValueError, match="not packed to its end"):
        offline_kit.verify(kit)
    offline_kit.write_sums(kit)
    assert offline_kit.verify(kit) == 0
    (kit / "a").write_text("A")
    (kit / "wheels" / "c d").unlink()
    assert offline_kit.verify(kit) == 1
    assert {record.message for record in caplog.records if record.levelname == "ERROR"} == {
        "a is not what was packed",
        "wheels/c d is missing",
    }


def test_packages_for_another_machine_are_asked_of_pip_as_wheels(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(offline_kit, "run_pip", lambda *words: asked.append(words))
    pins = ["numpy==2.4.6", "rouge_score==0.1.2"]
    offline_kit.fetch_wheels(tmp_path, pins, "3.12", ["manylinux_2_28_x86_64", "manylinux2014_x86_64"], ["rouge-score"])
    (build, *built), (download, *words) = asked
    assert (build, built[-1], download, words[-2:]) == ("wheel", "rouge_score==0.1.2", "download", pins)
    assert "--only-binary=:all:" in words and words.count("--platform") == 2 and "3.12" in words
    with pytest.raises(ValueError, match="together"):
        offline_kit.main(["pack", "--output_dir", str(tmp_path / "kit"), "--python", "3.12"])


def test_what_cannot_be_had_leaves_no_whole_kit(tmp_path, index, monkeypatch):
    (tmp_path / "requirements.txt").write_text("no-such-thing==1.0\n")
    words = [
        "offline_kit.py",
        "pack",
        "--output_dir",
        tmp_path / "kit",
        "--requirements",
        tmp_path / "requirements.txt",
    ]
    done = run_command(*words, status=2)
    assert "error: pip wheel failed" in done.stderr and "No matching distribution" in done.stderr
    assert not (tmp_path / "kit" / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("kind", "words"), [("GatedRepoError", "accept its terms"), ("RepositoryNotFoundError", "is not on")]
)
def test_hidden_models_are_refused_with_the_mend(kind, words, monkeypatch):
    from huggingface_hub import errors

    refusal = getattr(errors, kind)("401\nfor url", response=mock.Mock())
    monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=refusal))
    with pytest.raises(ValueError, match=words):
        offline_kit.model_files(MODEL, None)
