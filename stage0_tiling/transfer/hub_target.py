"""A data set on the Hugging Face hub as target: each file is sent as soon as it is whole, and committed with others."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

# The hub's client keeps caches of its own beside the scratch folder; it reads these when it is imported.
os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
os.environ.setdefault("HF_XET_SHARD_CACHE_SIZE_LIMIT", "256mb")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfUriError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_hf_uri

from stage0_tiling.transfer.listing import public_url

PATHS_PER_REQUEST = 500


class HubTarget:
    """The data set of a URL hf://datasets/org/name[@branch][/folder], which must exist."""

    splits_batches = True

    def __init__(self, url: str, *, batch_files: int, batch_bytes: int) -> None:
        """Look up the data set and list its files.

        Raises:
            ValueError: if the URL names no data set, or none that exists and can be seen.
        """
        self.name = public_url(url)
        self.batch_files, self.batch_bytes = batch_files, batch_bytes
        try:
            uri = parse_hf_uri(url)
        except HfUriError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if uri.type != "dataset":
            raise ValueError(f"{self.name} is no data set; write hf://datasets/org/name")
        self._api = HfApi()
        self._where = {"repo_id": uri.id, "repo_type": "dataset", "revision": uri.revision or "main"}
        self._folder = uri.path_in_repo.strip("/")
        self._waiting: dict[str, CommitOperationAdd] = {}
        self._sums: dict[str, dict[str, str]] = {}
        self._one_commit = threading.Lock()  # the hub refuses a commit that another one overtook
        try:
            tree = list(self._api.list_repo_tree(**self._where, recursive=True))
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"{self.name} does not exist, or HF_TOKEN may not see it; make it with: "
                f"hf repo create {uri.id} --repo-type dataset --private"
            ) from error
        self._stored = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def sizes(self) -> dict[str, int]:
        prefix = f"{self._folder}/" if self._folder else ""
        return {p.removeprefix(prefix): file.size for p, file in self._stored.items() if p.startswith(prefix)}

    def hashers(self, size: int) -> dict[str, Any]:
        return {"git_sha1": hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)}  # of files that are not in LFS

    def holds(self, path: str, size: int, sums: dict[str, str], careful: bool) -> bool:
        return self._agrees(self._path(path), size, sums)

    def upload(self, path: str, file: Path, sums: dict[str, str]) -> None:
        addition = CommitOperationAdd(self._path(path), str(file))
        self._api.preupload_lfs_files(additions=[addition], num_threads=1, **self._where)
        self._waiting[path], self._sums[addition.path_in_repo] = addition, sums

    def commit(self, paths: list[str]) -> None:
        """Commit what was uploaded and look it up; after a failure it may be called again, with fewer paths too.

        Raises:
            OSError: if the hub does not show what was committed.
        """
        with self._one_commit:
            additions = [self._waiting[path] for path in paths]
            self._look_up(additions)
            missing = [addition for addition in additions if not self._is_stored(addition)]
            if missing:  # else an earlier call was answered by a broken connection, but had worked
                title = f"Add {missing[0].path_in_repo}" if len(missing) == 1 else f"Add {len(missing)} files"
                self._api.create_commit(operations=missing, commit_message=title, num_threads=1, **self._where)
                self._look_up(missing)
            for addition in additions:
                if not self._is_stored(addition):
                    raise OSError(f"{addition.path_in_repo} was committed but is not there; does a .gitignore name it?")
            for path in paths:
                del self._waiting[path]

    def _look_up(self, additions: list[CommitOperationAdd]) -> None:
        paths = [addition.path_in_repo for addition in additions]
        for start in range(0, len(paths), PATHS_PER_REQUEST):
            found = self._api.get_paths_info(paths=paths[start : start + PATHS_PER_REQUEST], **self._where)
            self._stored.update({entry.path: entry for entry in found if isinstance(entry, RepoFile)})

    def _is_stored(self, addition: CommitOperationAdd) -> bool:
        sums = self._sums[addition.path_in_repo]
        return self._agrees(addition.path_in_repo, addition.upload_info.size, sums)

    def _agrees(self, path_in_repo: str, size: int, sums: dict[str, str]) -> bool:
        stored = self._stored.get(path_in_repo)
        if stored is None or stored.size != size:
            return False
        return stored.lfs.sha256 == sums["sha256"] if stored.lfs else stored.blob_id == sums.get("git_sha1")

    def _path(self, path: str) -> str:
        return f"{self._folder}/{path}" if self._folder else path
