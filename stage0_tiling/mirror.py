r"""Copy a collection of slides to another place through little disk space; killed at any point, it goes on.

    python stage0_tiling/mirror.py --source ftp://host/slides --target hf://datasets/org/name \
        --scratch_dir /scratch/mirror --max_disk 19GB --include "*.svs"

Sources: ftp:// file:// s3:// hf://datasets/... kaggle://owner/name or a local folder. Targets: the same without FTP;
Kaggle gets datasets name-1, name-2, ... Every file is checked by size and SHA-256 (what Kaggle holds: by size) and
noted in SCRATCH_DIR/manifest.jsonl. The same command run again sends only what is missing, and continues downloads
where they stopped.

Passwords: FTP from the URL, FTP_USER and FTP_PASSWORD, or ~/.netrc; S3 as boto finds them; the hub's from HF_TOKEN;
Kaggle's as its client finds them. A password in the URL can be seen by other users of the machine while the command
runs; none is logged or stored.
"""

import ftplib
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, counted, log_to_stderr, make_parser, run
from stage0_tiling.transfer.listing import Item, add_checksums, choose, parse_bytes, path_fault, without_secrets
from stage0_tiling.transfer.manifest import Manifest
from stage0_tiling.transfer.mover import Mover, is_there
from stage0_tiling.transfer.scratch import Scratch, lock_folder
from stage0_tiling.transfer.sources import open_filesystem, open_source
from stage0_tiling.transfer.targets import open_target

logger = logging.getLogger("stage0_tiling")


def add_arguments(parser) -> None:
    group = parser.add_argument_group("Places")
    group.add_argument("--source", required=True, help="URL of the collection, or a local folder")
    group.add_argument(
        "--target", required=True, help="URL to copy it to, or a local folder; a data set of the hub must exist"
    )
    group.add_argument("--include", nargs="+", default=[], help='patterns of the files to take, such as "*.svs"; all')
    group.add_argument("--exclude", nargs="+", default=[], help="patterns of the files to leave")
    group.add_argument(
        "--checksums", default=None, help="list of the files' checksums, as md5sum, sha1sum or sha256sum write it"
    )
    group.add_argument(
        "--delete_source",
        action="store_true",
        help="move: delete each file at the source when the target has been seen to hold it",
    )
    group = parser.add_argument_group("Disk and network")
    group.add_argument(
        "--scratch_dir", required=True, help="folder for downloads and the manifest, one for each transfer"
    )
    group.add_argument(
        "--max_disk", default="19GB", help="disk space for downloads and what waits to be sent, as 19GB or 512MiB"
    )
    group.add_argument("--num_workers", type=int, default=4, help="files in flight at once")
    group.add_argument("--retries", type=int, default=5, help="tries of a file in a row that get no further")
    group.add_argument("--retry_wait", type=float, default=1.0, help="seconds before the first retry; doubles, to 60")
    group.add_argument("--batch_files", type=int, default=50, help="files in a commit to a data set, at most")
    group.add_argument("--dry_run", action="store_true", help="print what would be sent, and write nothing")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    log_to_stderr(logger)

    # Places
    max_bytes = check(args)
    check_apart(args)
    folder = Path(args.scratch_dir)
    work_dir = folder / "clients"
    source = open_source(args.source, work_dir)
    target = open_target(args.target, batch_files=args.batch_files, batch_bytes=max_bytes // 2, work_dir=work_dir)
    if args.delete_source:
        check_deletion(source.name, target.name)

    # Data
    listed = choose(list_source(source), args.include, args.exclude)
    if args.checksums:
        listed = with_checksums(listed, Path(args.checksums))
    if not listed:
        raise ValueError(f"{source.name} holds no file that --include and --exclude leave")
    faults = {item.path: fault for item in listed if (fault := path_fault(item.path))}
    items = [item for item in listed if item.path not in faults]

    # Move
    with nullcontext() if args.dry_run else lock_folder(folder):
        manifest = Manifest(folder / "manifest.jsonl", source.name, target.name)
        there, todo = split(items, manifest, target)
        if args.dry_run:
            return print_plan(todo, faults)
        manifest.compact()
        shutil.rmtree(work_dir, ignore_errors=True)  # what a kill left
        scratch = Scratch(folder / "parts", max_bytes, source.copies)
        warn_of_little_space(folder, scratch)
        mover = Mover(
            source, target, scratch, manifest, args.num_workers, args.retries, args.retry_wait, args.delete_source
        )
        try:
            mover.settle(there)
            with logging_redirect_tqdm():
                mover.move(todo, total_bytes=sum(item.size for item in items))
        finally:
            manifest.compact()
    return report(mover, faults | mover.failed, num_there=len(there))


def with_checksums(items: list[Item], path: Path) -> list[Item]:
    try:
        return add_checksums(items, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--checksums {path}: {error}") from error


def split(items: list[Item], manifest: Manifest, target: Any) -> tuple[list[Item], list[Item]]:
    """The items that the target holds already, and those to send."""
    sizes = target.sizes()
    there, todo = [], []
    for item in items:
        (there if is_there(item, manifest, target, sizes) else todo).append(item)
    num_bytes = tqdm.format_sizeof(sum(item.size for item in todo), "B")
    logger.info("%s: %d there already, %d (%s) to send", counted(len(items), "file"), len(there), len(todo), num_bytes)
    return there, todo


def check(args: Any) -> int:
    """Check the flags and return --max_disk in bytes."""
    for name, least in (("num_workers", 1), ("retries", 0), ("retry_wait", 0), ("batch_files", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: at least {least} is needed")
    try:
        return parse_bytes(args.max_disk)
    except ValueError as error:
        raise ValueError(f"--max_disk {error}") from error


def check_deletion(source: str, target: str) -> None:
    if source.startswith(("hf://", "kaggle://")):
        raise ValueError("--delete_source: a data set keeps deleted files in its history; delete them there by hand")
    if target.startswith("kaggle://"):
        raise ValueError(
            "--delete_source: Kaggle tells no checksums of what arrived; delete by hand when you have looked"
        )


def check_apart(args: Any) -> None:
    """Refuse places that are no folders, or of which one would write into another's files."""
    places = {}
    for flag in ("source", "target", "scratch_dir"):
        if not (url := getattr(args, flag)).strip():
            raise ValueError(f"--{flag} is empty; name a folder{'' if flag == 'scratch_dir' else ' or URL'}")
        places[flag] = local_folder(url)
        if flag != "source" and places[flag] and (above := file_on_the_way(places[flag])):
            raise NotADirectoryError(f"--{flag} {url}: {above} is a file; name a folder")
    # a listing of the source would hold what this command wrote; the scratch folder has files of its own names
    for inner, outer in (
        ("target", "source"),
        ("scratch_dir", "source"),
        ("scratch_dir", "target"),
        ("target", "scratch_dir"),
    ):
        folder, around = places[inner], places[outer]
        if folder and around and folder.is_relative_to(around):
            raise ValueError(f"--{inner} {folder} lies in --{outer} {around}; give a folder outside of it")


def file_on_the_way(folder: Path) -> Path | None:
    """The file that stands where a folder is to be made, if there is one."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return None if existing.is_dir() else existing


def local_folder(url: str) -> Path | None:
    """The folder of a local path or file:// URL, or None for what is elsewhere."""
    return Path(open_filesystem(url)[1]).resolve() if urlsplit(url).scheme in ("", "file", "local") else None


def list_source(source: Any) -> list[Item]:
    """The files of the source, with what its protocol raises made one kind of error."""
    try:
        return source.list_items()
    except (ftplib.Error, EOFError, OSError) as error:
        raise OSError(f"{source.name} cannot be listed: {without_secrets(str(error) or 'it hung up')}") from error


def print_plan(todo: list[Item], faults: dict[str, str]) -> int:
    for item in todo:
        print(f"{item.size}\t{item.path}")
    for path, fault in faults.items():
        logger.error("would fail: %r: %s", path, fault)
    return SOME_FAILED if faults else DONE


def warn_of_little_space(folder: Path, scratch: Scratch) -> None:
    """Say so when the disk has less room than --max_disk allows to use."""
    free = shutil.disk_usage(folder).free + scratch.bytes_on_disk()
    if free < scratch.max_bytes:
        logger.warning("--max_disk is %d bytes, but only %d are free at %s", scratch.max_bytes, free, folder)


def report(mover: Mover, failed: dict[str, str], num_there: int) -> int:
    """Log what became of the files, list those that failed, and return the exit status."""
    logger.info("%s sent, %d were there, %d failed", counted(mover.num_moved, "file"), num_there, len(failed))
    for path, error in sorted(failed.items()):
        logger.error("failed: %r: %s", path, error)
    return SOME_FAILED if failed else DONE


if __name__ == "__main__":
    run(main)
