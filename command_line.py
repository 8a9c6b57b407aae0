"""What all commands share: the parser, the exit statuses, and the one place where an error becomes one line.

Exit statuses: 0 all done; 1 finished, but some items failed (they are listed); 2 refused (bad flag, bad input, missing
file); 130 interrupted; 141 whoever read stdout left early, as ``| head`` does. Set ``SLIDESCRIBE_TRACEBACK=1`` to see
the traceback behind a one-line refusal.
"""

import errno
import json
import logging
import os
import re
import select
import sys
import tempfile
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from safetensors import SafetensorError
from tqdm import tqdm

DONE = 0
SOME_FAILED = 1
REFUSED = 2
INTERRUPTED = 130
KINDS = {"float": "a number", "int": "a whole number", "str": "a text", "bool": "true or false"}
NUMBERS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
    "BelowOne": "a number from 0 to below 1",
}
# jsonargparse's complaint of a number out of its range, or of Python's of a text that is none
OF_A_NUMBER = re.compile(
    r"Not of type (\w+): (?:invalid literal for int\(\) with base 10: |could not convert string to float: )?"
    r"(\S+)(?: does not conform to restriction \S.*)?$"
)
NOBODY_READS = 141  # as a shell says of a command that SIGPIPE ended


class _HelpFormatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # the description shows commands, whose line breaks matter

    def _get_help_string(self, action: Action) -> str:
        """Without the default of a flag that has none, "null": its help says what happens where that matters."""
        if action.default is not None:
            return super()._get_help_string(action)
        action.default = SUPPRESS
        try:
            return super()._get_help_string(action)
        finally:
            action.default = None

    def _get_type_str(self, action: Action) -> str | None:
        """Without Python's own name of a class, as of a path."""
        kind = super()._get_type_str(action)
        return None if kind is None or kind.startswith("<class ") else kind


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with one line, in the place of jsonargparse's several below a screen of flags."""
        of_flag = re.sub(r'(Parser key|Key) "([\w.]+)":?', r"--\2:", " ".join(message.split()))
        plain = re.sub(r"a <class '(\w+)'>", lambda kind: KINDS.get(kind[1], kind[1]), of_flag)
        plain = OF_A_NUMBER.sub(lambda found: f"expected {NUMBERS.get(found[1], found[1])}, found {found[2]}", plain)
        self.exit(REFUSED, f"error: {_shortened(plain)}; see --help\n")

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        # PositiveInt and the like are classes of their own, which optimizer states and JSON should not meet.
        parsed = super().parse_args(*args, **kwargs)
        for name, value in list(vars(parsed).items()):
            plain = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
            if plain:
                parsed[name] = plain(value)
        return parsed


class GatherValues(Action):
    """Of a flag with several values: it may be repeated, and all values of the command line count."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Take values of one more flag; those of ``--config``, which do not come this way, are overridden."""
        self._gathered = [*getattr(self, "_gathered", []), *values]
        setattr(namespace, self.dest, self._gathered)


def make_parser(description: str | None) -> ArgumentParser:
    """Argument parser with ``--config recipe.yaml``, whose values are defaults that flags override."""
    parser = _Parser(description=description, formatter_class=_HelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file of flags; flags given on the command line win")
    return parser


def log_to_stderr(*ours: logging.Logger) -> None:
    """Log to stderr: progress of our own loggers, and warnings of others that no handler of their own tells."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_untold)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(levelname)s %(message)s")
    for logger in ours:
        logger.setLevel(logging.INFO)


def flags_of(args: Namespace) -> dict[str, Any]:
    """The flags as plain values that JSON can hold, without ``--config``, whose content they are."""
    plain = (bool, int, float, str, list, type(None))
    values = {name: value for name, value in vars(args).items() if name != "config"}
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}


def defaults_of(*adding: Callable[[ArgumentParser], Any]) -> dict[str, Any]:
    """Defaults of the flags that some functions add to a parser."""
    parser = make_parser(None)
    for add in adding:
        add(parser)
    return dict(vars(parser.get_defaults()))


def idle_flags(args: Namespace, defaults: dict[str, Any], needs: dict[str, tuple[Any, str]]) -> dict[str, list[str]]:
    """Flags that would do nothing: for each thing that is needed, those that want for it.

    A flag with its default is never among them: a run's own flags, saved whole, can be given again as ``--config``.

    Args:
        args: as parsed.
        defaults: of the same flags, see :func:`defaults_of`.
        needs: for a flag, whether there is what gives it an effect, and what that is.
    """
    idle: dict[str, list[str]] = {}
    for name, (is_there, need) in needs.items():
        if not is_there and getattr(args, name) != defaults[name]:
            idle.setdefault(need, []).append(name)
    return idle


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural but for one: "1 slide", "2,048 slides"."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; names of files and texts of JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_idle(args: Namespace, defaults: dict[str, Any], needs: dict[str, tuple[Any, str]]) -> None:
    """Refuse the flags that :func:`idle_flags` finds, but for those that a run to be resumed began with.

    Raises:
        ValueError: names them all, and what they need.
    """
    began_with = flags_of_resumed(args)
    needs = {name: need for name, need in needs.items() if began_with.get(name) != getattr(args, name)}
    idle = idle_flags(args, defaults, needs)
    if not idle:
        return
    said = [
        f"{' and '.join(_as_typed(name, getattr(args, name)) for name in names)} need{'s' * (len(names) == 1)} {need}"
        for need, names in idle.items()
    ]
    flags = "the flag" if sum(map(len, idle.values())) == 1 else "the flags"
    raise ValueError(f"{'; '.join(said)}: add that, or leave {flags} out")


def flags_of_resumed(args: Namespace) -> dict[str, Any]:
    """The flags that a run began with which is to be resumed, if it has begun; else none.

    An earlier version may have let through what is refused now; without it, the run would be another.
    """
    record = Path(getattr(args, "output_dir", "")) / "run.json"
    if getattr(args, "resume_from_checkpoint", None) is None or not record.is_file():
        return {}
    return json.loads(record.read_text())["arguments"]


def _as_typed(name: str, value: Any) -> str:
    """A flag and its value as on the command line."""
    if isinstance(value, bool):
        return f"--{name}"
    return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])


def chosen(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Some of the flags, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def check_output_folder(folder: str | Path, flag: str = "--output_dir") -> None:
    """Refuse a folder that cannot be made or written to, before hours of work; makes nothing.

    Raises:
        ValueError: no name was given.
        NotADirectoryError: it, or what should hold it, is no folder.
        PermissionError: nothing can be written there, whatever the reason.
    """
    if not str(folder).strip():
        raise ValueError(f"{flag} {str(folder)!r}: name a folder")
    _check_writable(Path(folder), f"{flag} {folder}")


def check_output_file(output: str | Path | None, **inputs: str | Path | None) -> None:
    """Refuse an ``--output`` that is a folder, or one of the files that a command reads, given by flag.

    Raises:
        ValueError: it is; before hours of work whose result could not be written, or would take the input's place.
        OSError: nothing can be written where it should lie.
    """
    if output is None:
        return
    if Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it")
    _check_writable(Path(output).parent, f"--output {output}")
    if not Path(output).exists():
        return
    for flag, path in inputs.items():
        if path is not None and Path(path).exists() and Path(path).samefile(output):
            raise ValueError(f"--output {output} is the file given as {flag}, which would be lost; name another")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], int], *, to_go_on: str = "the same command goes on where this one stopped") -> NoReturn:
    """Run ``main`` and leave with its exit status, turning refusals into one line on stderr.

    Refusals are ValueError, OSError, ArithmeticError (a loss that is not finite) and SafetensorError (damaged weights).

    ``to_go_on`` is what an interrupted user is told.
    """
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"interrupted; {to_go_on}", file=sys.stderr)
        status = INTERRUPTED
    except (ValueError, OSError, ArithmeticError, SafetensorError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout.fileno()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
            sys.exit(NOBODY_READS)
        if os.environ.get("SLIDESCRIBE_TRACEBACK"):
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # else the message would stand behind it, on its line
        print(f"error: {_told(error)}", file=sys.stderr)
        status = REFUSED
    sys.exit(status)


def _check_writable(folder: Path, named: str) -> None:
    """Try a nameless file in a folder, or the nearest above it that is there.

    Permissions alone tell nothing of a read-only disk, of /proc, or to root.
    """
    try:
        path = folder.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{named}: nobody has a home folder of that name here; name another") from error
    existing = next(above for above in (path, *path.parents) if os.path.lexists(above))
    try:
        if existing.is_dir():
            for tried in (path, *(existing / part for part in path.relative_to(existing).parts)):
                tried.exists()  # raises where a name is too long to be made
            with tempfile.TemporaryFile(dir=existing):
                return
    except OSError as error:
        why = f"{error.strerror} in {existing}"
        raise PermissionError(
            f"{named}: nothing can be written there ({why}); name another folder, or get access"
        ) from error
    kind = "a file" if existing.exists() else "a link to nothing"
    raise NotADirectoryError(f"{named}: {existing} is {kind}; name a folder")


def _shortened(text: str, longest: int = 1000) -> str:
    """A message without its middle where it quotes a whole file, as of a ``--config`` that is no YAML of flags."""
    return text if len(text) <= longest else f"{text[: longest // 2]} […] {text[-longest // 2 :]}"


def _is_untold(record: logging.LogRecord) -> bool:
    """Whether no library has shown a record itself, as that of the hub does with its retries."""
    logger = logging.getLogger(record.name)
    while logger.parent is not None:
        if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


def _told(error: Exception) -> str:
    """The message of an error; PyTorch's of one in a process that reads batches is a traceback that ends with it.

    Those of a full disk and of missing access are the system's, and name no mend.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" of {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; free some, then run again"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; get access to it, or name another"
    text = str(error)
    head, traceback, rest = text.partition("\nOriginal Traceback (most recent call last):\n")
    if not (traceback and head.startswith("Caught ")):
        return text
    raised = next((line for line in rest.splitlines()[::-1] if line and not line[0].isspace()), rest)
    return raised.partition(": ")[2] or raised


def _nobody_reads(pipe: int) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
