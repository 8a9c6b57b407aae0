r"""Pack what a machine without internet needs: code, Python packages, models, WordNet; check it on the other side.

    python offline_kit.py list --models google/gemma-3n-E2B-it uni2-h
    python offline_kit.py pack --output_dir kit --models google/gemma-3n-E2B-it uni2-h
    python offline_kit.py verify --output_dir kit

docs/offline.md, the README.md of the kit, says how it is used; install.sh in it does so. It holds

    slidescribe.tar.gz   this checkout as committed
    requirements.txt     the pinned packages
    wheels/              them, what they need, and what installs the checkout
    huggingface/hub/     models, as Hugging Face's cache stores them, without links
    nltk_data/ wordnet/  WordNet, where this machine has it: from nltk's data, else Debian's package wordnet-base
    kit.json             what was asked for, and the revisions that were found
    SHA256SUMS           of every file, written last: a kit without it is not whole
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from command_line import DONE, SOME_FAILED, check_output_folder, counted, first_line, log_to_stderr, make_parser, run
from encoder_presets import find_preset

ROOT = Path(__file__).resolve().parent
DEBIAN_WORDNET = Path("/usr/share/wordnet")
SUMS = "SHA256SUMS"
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
WEIGHTS = "*.safetensors"
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth")  # where there is nothing else; they are read as tensors only
COPIES_FOR_OTHERS = ("onnx/*", "openvino/*", "original/*", "*.gguf")

logger = logging.getLogger("offline_kit")


def main(argv: Sequence[str] | None = None) -> int:
    """List, pack or verify a kit; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("action", choices=("list", "pack", "verify"), help="verify checks the sums of a packed kit")
    parser.add_argument("--output_dir", default="offline_kit", help="folder of the kit")
    parser.add_argument("--models", nargs="+", default=[], help="hub names (org/name[@revision]) or names of encoders")
    parser.add_argument("--requirements", default=str(ROOT / "requirements.txt"), help="the packages to pack")
    group = parser.add_argument_group("Packages for another machine than this one; give both")
    group.add_argument("--python", default=None, help='its version, such as "3.12"; this one\'s')
    group.add_argument("--platform", nargs="+", default=[], help="its wheel tags, as manylinux_2_28_x86_64")
    group.add_argument(
        "--build",
        nargs="+",
        default=["rouge-score"],
        help="packages that exist as source only: they are built here, so they must be pure Python",
    )
    args = parser.parse_args(argv)
    log_to_stderr(logger)
    if bool(args.python) != bool(args.platform):
        raise ValueError("--python and --platform describe another machine together; give both, or none")
    kit = Path(args.output_dir)
    if args.action == "verify":
        return verify(kit)
    requirements = read_requirements(Path(args.requirements))
    models = [repository_of(name) for name in args.models]
    if args.action == "list":
        print_list(requirements, models)
        return DONE
    check_output_folder(kit)
    pack(kit, requirements, models, args.python, args.platform, args.build)
    return DONE


def read_requirements(path: Path) -> list[str]:
    """The pinned packages of a requirements file, without its line that installs the checkout."""
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-e "))]


def repository_of(name: str) -> tuple[str, str | None]:
    """Hub name and revision of `org/name[@revision]` or of a listed encoder's short name.

    Raises:
        ValueError: if it is neither.
    """
    preset = find_preset(name)
    repository, _, revision = (preset.repository if preset and "/" not in name else name).partition("@")
    repository = repository.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--models {name}: neither org/name of the hub nor an encoder of docs/encoders.md")
    return repository, revision or None


def print_list(requirements: list[str], models: list[tuple[str, str | None]]) -> None:
    """Print a line for each thing that would be packed: what, its bytes where they can be known, its name."""
    for line in [*build_requirements(), *requirements]:
        print(f"wheel\t-\t{line}")
    for repository, revision in models:
        try:
            files = model_files(repository, revision)
        except (OSError, ValueError) as error:
            logger.warning("%s: %s", repository, first_line(error))
            files = {"*": None}
        for name, size in files.items():
            print(f"model\t{'-' if size is None else size}\t{repository}/{name}")
    if (wordnet := find_wordnet()) is not None:
        print(f"wordnet\t{sum(file.stat().st_size for file in files_below(wordnet))}\t{wordnet}")
    print(f"code\t{len(archive_code())}\tslidescribe.tar.gz")


def pack(
    kit: Path,
    requirements: list[str],
    models: list[tuple[str, str | None]],
    python: str | None,
    platforms: list[str],
    build: list[str],
) -> None:
    """Fill the kit's folder. Packed again, it fetches only what is missing.

    Raises:
        OSError, ValueError: if something cannot be had; the kit then has no SHA256SUMS.
    """
    kit.mkdir(parents=True, exist_ok=True)
    (kit / SUMS).unlink(missing_ok=True)
    code = archive_code()
    (kit / "slidescribe.tar.gz").write_bytes(code)
    (kit / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements))
    logger.info("wheels of %d packages and what they need", len(requirements))
    fetch_wheels(kit / "wheels", [*build_requirements(), *requirements], python, platforms, build)
    revisions = {repository: fetch_model(kit / "huggingface", repository, revision) for repository, revision in models}
    copy_wordnet(kit)
    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    (kit / "kit.json").write_text(
        json.dumps({"python": version, "platform": platforms or "as this one", "models": revisions}, indent=2) + "\n"
    )
    (kit / "install.sh").write_text(INSTALL.replace("@PYTHON@", version))
    (kit / "install.sh").chmod(0o755)
    shutil.copy(ROOT / "docs" / "offline.md", kit / "README.md")
    write_sums(kit)
    size = sum(file.stat().st_size for file in files_below(kit))
    logger.info("%s is whole: %.1f GB; copy it, and run its install.sh", kit, size / 1e9)


def build_requirements() -> list[str]:
    """What pip needs to install the checkout itself."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def archive_code() -> bytes:
    """The checkout as committed, a tar.gz of one folder.

    Raises:
        ValueError: if this is no checkout of git.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        if subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True).stdout:
            logger.warning("changes of this checkout that are not committed are left out")
        archive = [*git, "archive", "--format=tar.gz", "--prefix=slidescribe/", "HEAD"]
        return subprocess.run(archive, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{ROOT} cannot be packed: git archive needs a checkout with a commit ({error})") from error


def fetch_wheels(
    folder: Path, requirements: list[str], python: str | None, platforms: list[str], build: list[str]
) -> None:
    """Put wheels of packages and of all that they need into `folder`.

    Raises:
        OSError: if pip cannot have one of them; it has said which.
    """
    if python is None:
        run_pip("wheel", "--wheel-dir", str(folder), "--find-links", str(folder), *requirements)
        return
    sources = [line for line in requirements if re.split(r"[=<>~! \[]", line)[0].lower().replace("_", "-") in build]
    if sources:
        run_pip("wheel", "--no-deps", "--wheel-dir", str(folder), *sources)
    tags = [word for platform in platforms for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *tags]
    run_pip("download", "--dest", str(folder), "--find-links", str(folder), *target, *requirements)


def run_pip(*words: str) -> None:
    """Run pip of this Python, with what it says on stderr.

    Raises:
        OSError: if it fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--progress-bar", "off"]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise OSError(f"pip {words[0]} failed; its message is above")


def model_files(repository: str, revision: str | None) -> dict[str, int | None]:
    """Names and bytes of the files of a model that we read: configuration, tokenizer, and weights in safetensors.

    Raises:
        ValueError: if the hub has no such model, or hides it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        listed = snapshot_download(repository, revision=revision, dry_run=True)
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, then run hf auth login"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"{repository}@{revision or 'main'} is not on the hub, or HF_TOKEN may not see it") from error
    files = {info.filename: info.file_size for info in listed}
    return {name: files[name] for name in choose_files(list(files))}


def choose_files(names: list[str]) -> list[str]:
    """Of a repository's files those that we read: pickled weights only where there are no others."""

    def matching(*patterns: str) -> set[str]:
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}

    weights = matching(WEIGHTS) - matching(*COPIES_FOR_OTHERS) or matching(*PICKLED_WEIGHTS)
    return sorted((matching(*MODEL_FILES) | weights) - matching(*COPIES_FOR_OTHERS))


def fetch_model(cache: Path, repository: str, revision: str | None) -> str:
    """Download a model into a Hugging Face cache and return the revision that was found.

    Raises:
        ValueError: if the hub has no such model, or hides it.
    """
    os.environ["HF_HUB_DISABLE_SYMLINKS"] = "1"  # before the import: links do not survive every disk and copy
    from huggingface_hub import snapshot_download

    files = model_files(repository, revision)
    logger.info(
        "%s: %s, %.1f GB", repository, counted(len(files), "file"), sum(size or 0 for size in files.values()) / 1e9
    )
    folder = snapshot_download(repository, revision=revision, cache_dir=str(cache / "hub"), allow_patterns=list(files))
    return Path(folder).name


def find_wordnet() -> Path | None:
    """WordNet of nltk's data folders (a folder or a zip), else Debian's, else None."""
    import nltk

    for name in ("corpora/wordnet.zip", "corpora/wordnet"):
        for folder in nltk.data.path:
            if (Path(folder) / name).exists():
                return Path(folder) / name
    return DEBIAN_WORDNET if (DEBIAN_WORDNET / "data.noun").is_file() else None


def copy_wordnet(kit: Path) -> None:
    """Copy WordNet into the kit, to where nltk looks for it, or say that there is none."""
    wordnet = find_wordnet()
    if wordnet is None:
        logger.warning(
            "no WordNet on this machine, so METEOR will count without synonyms there: "
            "run python -m nltk.downloader wordnet, or apt-get install wordnet-base, and pack again"
        )
    elif wordnet == DEBIAN_WORDNET:
        shutil.copytree(wordnet, kit / "wordnet", dirs_exist_ok=True)
    elif wordnet.is_dir():
        shutil.copytree(wordnet, kit / "nltk_data" / "corpora" / wordnet.name, dirs_exist_ok=True)
    else:
        (kit / "nltk_data" / "corpora").mkdir(parents=True, exist_ok=True)
        shutil.copy(wordnet, kit / "nltk_data" / "corpora")


def write_sums(kit: Path) -> None:
    """Write SHA256SUMS of all files of the kit, in the form that sha256sum --check reads."""
    lines = [f"{sha256_of(file)}  {file.relative_to(kit).as_posix()}\n" for file in files_below(kit)]
    partial = kit / f".{SUMS}.partial"
    partial.write_text("".join(lines))
    os.replace(partial, kit / SUMS)


def verify(kit: Path) -> int:
    """Check every file of a kit against SHA256SUMS, log what is wrong, and return the exit status.

    Raises:
        ValueError: if the kit is not whole.
    """
    if not (kit / SUMS).is_file():
        raise ValueError(f"{kit} holds no {SUMS}: it was not packed to its end, or not copied as a whole")
    sums = dict(reversed(line.split("  ", 1)) for line in (kit / SUMS).read_text().splitlines())
    faults = {}
    for name, expected in sums.items():
        if not (kit / name).is_file():
            faults[name] = "is missing"
        elif sha256_of(kit / name) != expected:
            faults[name] = "is not what was packed"
    for name, fault in faults.items():
        logger.error("%s %s", name, fault)
    logger.info("%s, %d of them bad", counted(len(sums), "file"), len(faults))
    return SOME_FAILED if faults else DONE


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder (or the one file), in order, without a kit's SHA256SUMS."""
    if folder.is_file():
        yield folder
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS)


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


INSTALL = """\
#!/bin/sh
# Installs SlideScribe from this kit into a folder, without internet: sh install.sh FOLDER
set -eu
kit=$(cd "$(dirname "$0")" && pwd)
target=${1:?usage: sh install.sh FOLDER}
python=${PYTHON:-python@PYTHON@}
(cd "$kit" && sha256sum --check --quiet SHA256SUMS)
mkdir -p "$target"
target=$(cd "$target" && pwd)
tar -xzf "$kit/slidescribe.tar.gz" -C "$target" --strip-components=1
"$python" -m venv "$target/.venv"
pip="$target/.venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet --no-index --find-links "$kit/wheels" -r "$kit/requirements.txt"
$pip install --quiet --no-index --find-links "$kit/wheels" --no-deps -e "$target"
touch "$target/.venv/.requirements-installed"
cat > "$target/offline_env.sh" <<END
export HF_HUB_OFFLINE=1 HF_HOME="$kit/huggingface" NLTK_DATA="$kit/nltk_data"
. "$target/.venv/bin/activate"
END
echo "installed; begin each session with: . $target/offline_env.sh"
"""

if __name__ == "__main__":
    run(main)
