"""A stand-in for Kaggle's client, kaggle 2.2.4, with datasets in a local folder; it can be told to misbehave.

`python -m tests.kaggle_client FLAGS` runs mirror.py with it.
"""

import json
import os
import shutil
import signal
import sys
import types
import zipfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import requests

OWNER = "me"
ROOT = "KAGGLE_STAND_IN"  # environment: folder of the datasets, of `log`, and of `mischief.json`
SKIPPED = ("dataset-metadata.json", "datapackage.json", "kernel-metadata.json", "model-metadata.json")
UPLOAD_URL = "https://storage.example/upload?token=s3cret"


def install() -> None:
    """Let `import kaggle` find the stand-in."""
    package, api = types.ModuleType("kaggle"), types.ModuleType("kaggle.api")
    module = types.ModuleType("kaggle.api.kaggle_api_extended")
    module.KaggleApi, package.api, api.kaggle_api_extended = KaggleApi, api, module
    sys.modules |= {"kaggle": package, "kaggle.api": api, "kaggle.api.kaggle_api_extended": module}


def root() -> Path:
    return Path(os.environ[ROOT])


def mischief() -> dict:
    """What goes wrong.

    kill_in_upload, kill_after_create: number of the upload or dataset at which the process is killed
    lost: files whose next upload fails, which the client then leaves out
    pending: questions for a new dataset's status that are answered with "not yet"
    no_upload, no_list: how many of the next datasets cannot be sent, or listed, because the network is down
    refuse: error that datasets are refused with
    no_answer: the number of the dataset that is made, but reported as an error
    fail: number of the dataset that Kaggle cannot make
    cut: files that arrive with other bytes
    """
    file = root() / "mischief.json"
    return json.loads(file.read_text()) if file.exists() else {}


def plan(**fields) -> None:
    (root() / "mischief.json").write_text(json.dumps(fields))


def log(line: str | None = None) -> list[str]:
    file = root() / "log"
    if line is not None:
        with file.open("a") as lines:
            lines.write(f"{line}\n")
    return file.read_text().splitlines() if file.exists() else []


def count(kind: str) -> int:
    return sum(line.startswith(kind) for line in log())


def break_off(kind: str) -> None:
    todo = mischief()
    if todo.get(kind):
        plan(**todo | {kind: todo[kind] - 1})
        raise requests.ConnectionError("the network is down")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_such_dataset(dataset: str) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = 403 if dataset.endswith("1") else 404
    return requests.HTTPError(f"{response.status_code} for {dataset}", response=response)


class KaggleApi:
    def authenticate(self) -> None:
        print("Authentication required to call the Kaggle API.")
        if not os.environ.get("KAGGLE_API_TOKEN"):
            sys.exit(1)

    def dataset_status(self, dataset, format=None):
        folder = root() / dataset
        if not folder.is_dir():
            raise no_such_dataset(dataset)
        if (folder / ".failed").exists():
            return "failed"
        if (folder / ".pending").exists():
            left = int((folder / ".pending").read_text()) - 1
            if left >= 0:
                (folder / ".pending").write_text(str(left))
                return "blobs_received"
        return "ready"

    def dataset_list_files(self, dataset, page_token=None, page_size=20):
        folder = root() / dataset
        if not folder.is_dir():
            raise no_such_dataset(dataset)
        break_off("no_list")
        first, num = int(page_token or 0), min(page_size, 3)
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        shown = [
            SimpleNamespace(
                name=file.relative_to(folder).as_posix(),
                total_bytes=file.stat().st_size,
                creation_date=datetime.fromtimestamp(file.stat().st_mtime),
            )
            for file in files[first : first + num]
        ]
        token = str(first + num) if first + num < len(files) else ""
        return SimpleNamespace(dataset_files=shown, error_message="", next_page_token=token)

    def dataset_download_file(self, dataset, file_name, path=None, force=False, quiet=True, licenses=[]):  # noqa: B006
        print(f"Dataset URL: https://www.kaggle.com/datasets/{dataset}")
        log(f"download {dataset}/{file_name}")
        name = quote(f"datasets/1/2/{file_name}", safe="")
        if file_name.endswith(".csv"):  # the real one packs such files
            with zipfile.ZipFile(Path(path) / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(root() / dataset / file_name, file_name)
        else:
            shutil.copy(root() / dataset / file_name, Path(path) / name)
        return True

    def dataset_create_new(
        self, folder, public=False, quiet=False, convert_to_csv=True, dir_mode="skip", ignore_patterns=None
    ):
        metadata = json.loads((Path(folder) / "dataset-metadata.json").read_text())
        owner, slug = metadata["id"].split("/")
        assert not public and owner == OWNER and metadata["licenses"] == [{"name": "other"}]
        assert 6 <= len(slug) <= 50 and 6 <= len(metadata["title"]) <= 50
        if (root() / owner / slug).exists():
            return SimpleNamespace(status="error", error="The requested title is already in use by a dataset.")
        break_off("no_upload")
        sent = [file for name in os.listdir(folder) if (file := self._upload(Path(folder) / name)) is not None]
        todo = mischief()
        if "refuse" in todo:
            return SimpleNamespace(status="error", error=todo["refuse"])
        self._make(root() / owner / slug, sent, todo)
        number = count("create")
        if todo.get("kill_after_create") == number:
            kill()
        lost_answer = todo.get("no_answer") == number
        return SimpleNamespace(status="error" if lost_answer else "Ok", error="already in use" if lost_answer else None)

    def _upload(self, file: Path) -> Path | None:
        if file.name in SKIPPED or not file.is_file():
            return None
        todo = mischief()
        print(f"PUT {UPLOAD_URL}")
        log(f"upload {file.name}")
        if todo.get("kill_in_upload") == count("upload"):
            kill()
        if file.name in todo.get("lost", []):
            todo["lost"].remove(file.name)
            plan(**todo)
            return None
        return file

    def _make(self, folder: Path, sent: list[Path], todo: dict) -> None:
        making = folder.with_name(f".{folder.name}")
        making.mkdir(parents=True)
        for file in sent:
            if zipfile.is_zipfile(file) and file.suffix == ".zip":
                zipfile.ZipFile(file).extractall(making / file.stem)
            else:
                shutil.copyfile(file, making / file.name)
            if file.name in todo.get("cut", []):
                (making / file.name).write_bytes(b"cut")
        log(f"create {folder.name} {len(sent)}")
        if todo.get("fail") == count("create") or any(set(file.name) & set("@&") for file in sent):
            for file in making.iterdir():
                file.unlink()
            (making / ".failed").touch()
        (making / ".pending").write_text(str(todo.get("pending", 0)))
        making.rename(folder)


if __name__ == "__main__":
    from command_line import run
    from stage0_tiling import mirror
    from stage0_tiling.transfer import kaggle_target

    install()
    kaggle_target.POLL_SECONDS = 0.01
    run(mirror.main)
