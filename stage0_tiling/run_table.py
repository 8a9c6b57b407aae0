"""What a stage-0 run has done so far, slide by slide.

    OUT/state/<slide_id>.json   one small file per slide, written when its work is whole
    OUT/slides.csv              all of them as one table, made at the end of a command

Processes share no file that they write, so that any number of them can work on one folder and be killed at any time.
"""

import csv
import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from slide_features import atomic_path
from stage0_tiling.plan import TilingSettings
from stage0_tiling.slide_list import SlideEntry

OUTPUTS = {"coords": ".h5", "overlays": ".jpg", "features": ".h5", "state": ".json"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideRow:
    """A row of slides.csv; None is written as an empty field."""

    slide_id: str
    path: str
    status: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    levels: int | None = None
    mpp: float | None = None
    mpp_source: str | None = None
    tissue_fraction: float | None = None
    n_tiles: int | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class SlideState:
    """What is known of one slide.

    Attributes:
        row: its row in slides.csv.
        tiling: settings that its tiles were made with; None if it is not tiled.
        encoder: name of the encoder of its features; None if it is not encoded.
        encoder_fingerprint: of the encoder's weights.
        reader: `openslide`, `tiff` or `pillow`, whichever opened the slide last. Their results are equal within
            tolerance, so that slides of several readers share a folder. None in folders of earlier versions.
    """

    row: SlideRow
    tiling: TilingSettings | None = None
    encoder: str | None = None
    encoder_fingerprint: str | None = None
    reader: str | None = None


class RunFolder:
    """The output folder of a stage-0 run."""

    def __init__(self, folder: str | Path):
        """Name the folder; nothing is made before the first file is written."""
        self.folder = Path(folder).expanduser()

    def path(self, kind: str, slide_id: str) -> Path:
        """Where a slide's `coords`, `overlays`, `features` or `state` file lies."""
        return self.folder / kind / f"{slide_id}{OUTPUTS[kind]}"

    def read_state(self, slide_id: str) -> SlideState | None:
        """Read what is known of a slide; None if nothing is, or if its state file is not readable."""
        path = self.path("state", slide_id)
        try:
            stored = json.loads(path.read_text())
            tiling = TilingSettings(**stored["tiling"]) if stored["tiling"] else None
            return SlideState(
                SlideRow(**stored["row"]),
                tiling,
                stored["encoder"],
                stored["encoder_fingerprint"],
                stored.get("reader"),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not readable (%s); its slide is done again", path, error)
            return None

    def write_state(self, state: SlideState) -> None:
        """Record a slide, atomically."""
        with atomic_path(self.path("state", state.row.slide_id)) as partial:
            partial.write_text(json.dumps(asdict(state), indent=1))

    def write_table(self) -> None:
        """Write slides.csv: every slide that any run on this folder has recorded, by slide_id."""
        states = (self.read_state(path.stem) for path in sorted((self.folder / "state").glob("*.json")))
        with (
            atomic_path(self.folder / "slides.csv") as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, [field.name for field in fields(SlideRow)])
            writer.writeheader()
            writer.writerows(asdict(state.row) for state in states if state is not None)

    def forget(self, entries: list[SlideEntry]) -> None:
        """Delete all that earlier runs made of these slides, for --overwrite."""
        for entry in entries:
            for kind in reversed(OUTPUTS):  # the state first: without it the rest counts as missing
                self.path(kind, entry.slide_id).unlink(missing_ok=True)

    def remove_leftovers(self, entries: list[SlideEntry]) -> None:
        """Delete half-written files of killed runs of these slides."""
        names = {f"{entry.slide_id}{suffix}" for entry in entries for suffix in OUTPUTS.values()}
        for kind in OUTPUTS:
            for partial in (self.folder / kind).glob(".*.partial"):
                if partial.name[1:].removesuffix(".partial").rpartition(".")[0] in names:
                    partial.unlink(missing_ok=True)

    def is_tiled(self, state: SlideState | None) -> bool:
        """Whether a slide's coords are here, or it is known to have none."""
        return state is not None and state.tiling is not None and self._holds("coords", state.row)

    def is_encoded(self, state: SlideState | None) -> bool:
        """Whether a slide's features are here, or it is known to have none."""
        return state is not None and state.encoder is not None and self._holds("features", state.row)

    def check_tiling(self, entry: SlideEntry, settings: TilingSettings, assume_mpp: float | None) -> None:
        """Refuse to mix tiles of different settings in one folder.

        Raises:
            ValueError: if the slide's tiles are here and were made with other settings.
        """
        state = self.read_state(entry.slide_id)
        if not self.is_tiled(state):
            return
        had, wanted = asdict(state.tiling), asdict(settings)
        if state.row.mpp_source == "assumed" and assume_mpp is not None:
            had["assume_mpp"], wanted["assume_mpp"] = state.row.mpp, assume_mpp
        self._check_listed_mpp(entry, state.row)
        differing = [key for key in wanted if had[key] != wanted[key]]
        if differing:
            raise ValueError(
                f"{self.folder} holds {entry.slide_id} tiled with "
                f"{', '.join(f'--{key} {had[key]}' for key in differing)}, not "
                f"{', '.join(f'--{key} {wanted[key]}' for key in differing)}: "
                "choose another --output_dir, or tile anew with --overwrite"
            )

    def _check_listed_mpp(self, entry: SlideEntry, row: SlideRow) -> None:
        had = row.mpp if row.mpp_source == "list" else None
        if row.mpp is None or (entry.mpp is None and had is None):
            return
        if entry.mpp is None or abs(entry.mpp / row.mpp - 1) > 1e-4:
            raise ValueError(
                f"{self.folder} holds {entry.slide_id} tiled with {row.mpp:g} um per level-0 pixel ({row.mpp_source}), "
                f"and the column mpp of --slides says {'nothing' if entry.mpp is None else f'{entry.mpp:g}'}: "
                "give the same list, choose another --output_dir, or tile anew with --overwrite"
            )

    def check_encoder(self, entry: SlideEntry, encoder: str, encoder_fingerprint: str) -> None:
        """Refuse to mix features of different encoders in one folder.

        Raises:
            ValueError: if the slide's features are here and come from another encoder or other weights.
        """
        state = self.read_state(entry.slide_id)
        if not self.is_encoded(state):
            return
        mend = "choose another --output_dir, or encode anew with --overwrite"
        if state.encoder != encoder:
            raise ValueError(f"{self.folder} holds features of encoder {state.encoder}, not {encoder}: {mend}")
        if state.encoder_fingerprint != encoder_fingerprint:
            raise ValueError(f"{self.folder} holds features of encoder {encoder} with other weights: {mend}")

    def _holds(self, kind: str, row: SlideRow) -> bool:
        return row.n_tiles == 0 or self.path(kind, row.slide_id).is_file()
