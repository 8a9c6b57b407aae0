"""What a transfer is made of: files with a size, named by a path below the root of a collection."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import urlsplit, urlunsplit

CHECKSUM_NAMES = {32: "md5", 40: "sha1", 64: "sha256"}


@dataclass(frozen=True)
class Item:
    """One file of the source.

    path: POSIX path below the collection's root, as the source names it (not yet known to be safe)
    size: bytes
    version: what changes when the file does (modification time, ETag); empty when the source tells nothing
    sums: hexadecimal checksums of the whole file by name (md5, sha1, sha256), where they are known beforehand
    """

    path: str
    size: int
    version: str = ""
    sums: Mapping[str, str] = field(default_factory=dict)


def path_fault(path: str) -> str | None:
    """Why a path must not be used below another root, or None when it is safe: relative, plain, without '..'."""
    if not path or path.startswith("/"):
        return "its path is not relative"
    if any(ord(letter) < 32 for letter in path):
        return "its path holds control characters"
    if ".." in path.split("/"):
        return "its path leaves the collection"
    if str(PurePosixPath(path)) != path or path == ".":
        return "its path is not in its plain form"
    return None


def choose(items: Iterable[Item], include: list[str], exclude: list[str]) -> list[Item]:
    """Items whose path, or last part of it, matches a pattern of `include` (all when empty) and none of `exclude`."""

    def matches(path: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(path, each) or fnmatchcase(PurePosixPath(path).name, each) for each in patterns)

    return [item for item in items if (not include or matches(item.path, include)) and not matches(item.path, exclude)]


def add_checksums(items: list[Item], list_text: str) -> list[Item]:
    """Items with the checksums of a list as md5sum, sha1sum and sha256sum write it: a line `<checksum>  <path>` a file.

    Paths are those below the collection's root; files that the list does not name get none.

    Raises:
        ValueError: if a line is none of the list's, or no line names an item.
    """
    sums: dict[str, dict[str, str]] = {}
    for number, line in enumerate(list_text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]+) [ *](?:\./)?(.+)", line)
        kind = CHECKSUM_NAMES.get(len(match[1])) if match else None
        if kind is None and line.strip() and not line.startswith("#"):
            raise ValueError(f"line {number} is none of md5sum, sha1sum or sha256sum: {line[:60]!r}")
        if kind is not None:
            sums.setdefault(match[2], {})[kind] = match[1].lower()
    found = [replace(item, sums={**sums.get(item.path, {}), **item.sums}) for item in items]
    if not any(item.path in sums for item in items):
        raise ValueError("it names no file of the collection; its paths must be those below --source")
    return found


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 19GB (10^9), 512MiB (2^20) or 1000.

    Raises:
        ValueError: if it is no size, or none above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 19GB, 512MiB or 1000000")
    number, prefix, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size <= 0:
        raise ValueError(f"{text!r} is no size above zero")
    return size


def without_secrets(text: str) -> str:
    """The text with user names, passwords and query strings (signatures) of its URLs taken out."""
    text = re.sub(r"(\w+://)[^/\s]+@", r"\1", text)
    return re.sub(r"(\w+://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


def public_url(url: str) -> str:
    """The URL without user name and password, for logs and the manifest."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
