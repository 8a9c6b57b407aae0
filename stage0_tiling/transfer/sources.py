"""Where files come from: FTP through ftplib, whose REST continues a download, and all else through fsspec.

A source has `name` (its URL without secrets), `list_items()`, `read(item, offset)`, which yields blocks of bytes,
`delete(item)`, and `copies`, how often a file lies on the disk while it arrives. `open_source` chooses one by the URL.
"""

import ftplib
import netrc
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from stage0_tiling.transfer.listing import Item, public_url

FTP_PORT = 21
TIMEOUT_SECONDS = 60
READ_BYTES = 1 << 18
REMOTE_BLOCK_BYTES = 8 << 20  # of a range request
_NO_SUCH_COMMAND = ("500", "501", "502", "504")


class ResumeRefusedError(Exception):
    """The server cannot send a file from its middle."""


def open_source(url: str, work_dir: Path) -> Any:
    """The source of a URL, or of a local folder.

    work_dir: folder for what a source's client downloads before it can be read

    Raises:
        ValueError: if the URL's scheme is none that can be read from.
    """
    scheme = urlsplit(url).scheme
    if scheme == "kaggle":
        from stage0_tiling.transfer.kaggle_source import KaggleSource

        return KaggleSource(url, work_dir)
    return FtpSource(url) if scheme == "ftp" else FsspecSource(url)


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path of an fsspec URL; a local path is one too.

    Raises:
        ValueError: if nothing installed reads it.
    """
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # a client that is not installed; a scheme that nobody knows
        raise ValueError(f"{public_url(url)}: {error}") from error


class FsspecSource:
    """A folder, bucket or data set that fsspec reads; several threads may read at once."""

    copies = 1

    def __init__(self, url: str) -> None:
        self.name = public_url(url)
        self._files, self._root = open_filesystem(url)

    def list_items(self) -> list[Item]:
        # Local folders that cannot be listed raise; object stores have none, and take no such argument.
        strict = {"on_error": "raise"} if "file" in self._files.protocol else {}
        found = self._files.find(self._root, detail=True, **strict)
        if not found and not self._files.exists(self._root):
            raise FileNotFoundError(f"{self.name} does not exist")
        if list(found) == [self._root]:  # the URL is of one file
            self._root = self._root.rpartition("/")[0]
        return _items(found, self._root.rstrip("/"))

    def read(self, item: Item, offset: int) -> Iterator[bytes]:
        with self._files.open(self._path(item), "rb", block_size=REMOTE_BLOCK_BYTES) as file:
            file.seek(offset)
            while block := file.read(READ_BYTES):
                yield block

    def delete(self, item: Item) -> None:
        self._files.rm_file(self._path(item))

    def _path(self, item: Item) -> str:
        return f"{self._root.rstrip('/')}/{item.path}"


class FtpSource:
    """A folder of an FTP server; a connection for every file in flight.

    Name and password come from the URL, else FTP_USER and FTP_PASSWORD, else ~/.netrc, else anonymous.
    """

    copies = 1

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"{public_url(url)} names no server; write ftp://host/folder")
        self.name = public_url(url)
        self._host, self._port = parts.hostname, parts.port or FTP_PORT
        self._root = "/" + unquote(parts.path).strip("/")
        self._login = _ftp_login(parts.hostname, parts.username, parts.password)

    def list_items(self) -> list[Item]:
        user, password = self._login
        files = fsspec.filesystem(
            "ftp",
            host=self._host,
            port=self._port,
            username=user,
            password=password,
            timeout=TIMEOUT_SECONDS,
            skip_instance_cache=True,
        )
        try:
            found = files.find(self._root, detail=True, on_error="raise")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the server has no {self._root}, or does not show it") from error
        # The URL is of one file: find() does not describe it, and some servers list it as if it lay in itself
        itself = f"{self._root}/{self._root.rpartition('/')[2]}"
        if list(found) in ([self._root], [itself]) and (info := files.info(self._root))["type"] == "file":
            found = {self._root: info}
            self._root = self._root.rpartition("/")[0] or "/"
        return _items(found, self._root.rstrip("/"))

    def read(self, item: Item, offset: int) -> Iterator[bytes]:
        with closing(self._connect()) as ftp:
            ftp.voidcmd("TYPE I")
            try:
                data = ftp.transfercmd(f"RETR {self._path(item)}", rest=offset or None)
            except ftplib.error_perm as error:
                if offset and str(error)[:3] in _NO_SUCH_COMMAND:
                    raise ResumeRefusedError(str(error)) from error
                raise
            with data:
                while block := data.recv(READ_BYTES):
                    yield block

    def delete(self, item: Item) -> None:
        with closing(self._connect()) as ftp:
            ftp.delete(self._path(item))

    def _connect(self) -> ftplib.FTP:
        ftp = ftplib.FTP(timeout=TIMEOUT_SECONDS)
        try:
            ftp.connect(self._host, self._port)
            ftp.login(*self._login)
        except BaseException:
            ftp.close()
            raise
        return ftp

    def _path(self, item: Item) -> str:
        return f"{self._root.rstrip('/')}/{item.path}"


def _items(found: dict[str, dict], root: str) -> list[Item]:
    """Items of fsspec's listing; what is neither a file nor a link to one (a device, a broken link) is left out."""
    items = []
    for name, info in sorted(found.items()):
        if info.get("type") != "file" and not (info.get("islink") and os.path.isfile(name)):
            continue
        path = name.removeprefix(f"{root}/")
        if info.get("size") is None:
            raise ValueError(f"{path}: the source states no size, without which a transfer cannot be checked")
        version = next((info[key] for key in ("ETag", "modify", "mtime", "blob_id") if info.get(key)), "")
        lfs = info.get("lfs") or {}
        sums = {"sha256": lfs["sha256"]} if lfs.get("sha256") else {}
        items.append(Item(path, int(info["size"]), str(version), sums))
    return items


def _ftp_login(host: str, user: str | None, password: str | None) -> tuple[str, str]:
    user = unquote(user) if user else os.environ.get("FTP_USER")
    password = unquote(password) if password else os.environ.get("FTP_PASSWORD")
    if password is None:
        try:
            known = netrc.netrc().authenticators(host)
        except FileNotFoundError:
            known = None
        except netrc.NetrcParseError as error:
            raise ValueError(f"~/.netrc cannot be read: {error}") from error
        if known and user in (None, known[0]):
            user, password = known[0], known[2]
    return user or "anonymous", password or ("" if user else "anonymous@")
