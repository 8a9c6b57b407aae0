"""What a stage-0 run has done so far, slide by slide.

    OUT/state/<slide_id>.json   one small file per slide, written when its work is whole
    OUT/slides.csv              all of them as one table, made at the end of a command
    OUT/index.html              the same as a contact sheet with pictures

Processes share no file that they write, so that any number of them can work on one folder and be killed at any time;
which process works on which slide is settled in `claims.py`.
"""

import csv
import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from slide_features import atomic_path
from stage0_tiling.claims import Claims
from stage0_tiling.contact_sheet import write_contact_sheet
from stage0_tiling.plan import TilingSettings
from stage0_tiling.slide_list import SlideEntry

MAX_DEATHS = 2  # processes that a slide may take with it before it is left alone
OUTPUTS = {
    "coords": ".h5",
    "overlays": ".jpg",
    "thumbnails": ".jpg",
    "geojson": ".geojson",
    "geojson_tiles": ".geojson",
    "features": ".h5",
    "state": ".json",
}
OLD_S = 3600  # seconds after which a half-written table is of a killed run

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
        recorded_by: the claim under which this was recorded; tells a new failure from one of an earlier run.
        deaths: how many processes had died at the slide when it was given up; else 0.
    """

    row: SlideRow
    tiling: TilingSettings | None = None
    encoder: str | None = None
    encoder_fingerprint: str | None = None
    reader: str | None = None
    recorded_by: str | None = None
    deaths: int = 0

    @property
    def is_deadly(self) -> bool:
        """Whether the slide was given up because processes died at it."""
        return self.deaths >= MAX_DEATHS


class RunFolder:
    """The output folder of a stage-0 run."""

    def __init__(self, folder: str | Path):
        """Name the folder; nothing is made before the first file is written."""
        self.folder = Path(folder).expanduser().absolute()

    def path(self, kind: str, slide_id: str) -> Path:
        """Where a slide's file of a kind lies, see `OUTPUTS`."""
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
                stored.get("recorded_by"),
                stored.get("deaths", 0),
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
        """Write slides.csv and index.html: every slide that any run on this folder has recorded, by slide_id."""
        states = (self.read_state(path.stem) for path in sorted((self.folder / "state").glob("*.json")))
        rows = [asdict(state.row) for state in states if state is not None]
        with (
            atomic_path(self.folder / "slides.csv") as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, [field.name for field in fields(SlideRow)])
            writer.writeheader()
            writer.writerows(rows)
        write_contact_sheet(self.folder, rows)
        self._remove_old_tables()

    def _remove_old_tables(self) -> None:
        """Delete half-written tables of killed runs; a young one may be another process's, which is writing it now."""
        for name in ("slides.csv", "index.html"):
            for partial in self.folder.glob(f".{name}.*.partial"):
                with suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > OLD_S:
                        partial.unlink()

    def forget(self, entries: list[SlideEntry]) -> None:
        """Delete all that earlier runs made of these slides, for --overwrite.

        Raises:
            ValueError: if one of them is in work.
        """
        claims = Claims(self.folder / "claims")
        for entry in entries:
            if owner := claims.owner(entry.slide_id):
                raise ValueError(f"--overwrite: {entry.slide_id} is in work ({owner}): wait for it, or stop it")
        for entry in entries:
            for kind in reversed(OUTPUTS):  # the state first: without it the rest counts as missing
                self.path(kind, entry.slide_id).unlink(missing_ok=True)
            claims.forget(entry.slide_id)

    def remove_leftovers(self, entry: SlideEntry) -> None:
        """Delete half-written files of a slide whose process was killed; nobody else may be writing them."""
        for kind, suffix in OUTPUTS.items():
            for partial in (self.folder / kind).glob(".*.partial"):
                if partial.name[1:].removesuffix(".partial").rpartition(".")[0] == f"{entry.slide_id}{suffix}":
                    partial.unlink(missing_ok=True)

    def is_tiled(self, state: SlideState | None) -> bool:
        """Whether a slide's coords are here, or it is known to have none."""
        return state is not None and state.tiling is not None and self._holds("coords", state.row)

    def is_encoded(self, state: SlideState | None) -> bool:
        """Whether a slide's features are here, or it is known to have none."""
        return state is not None and state.encoder is not None and self._holds("features", state.row)

    def needs_tiling(self, entry: SlideEntry, settings: TilingSettings) -> bool:
        """Whether a slide is still to be tiled; raises ValueError if it was tiled with other settings."""
        self.check_tiling(entry, settings, entry.assume_mpp)
        state = self.read_state(entry.slide_id)
        if state is not None and state.row.status == "failed":
            return not state.is_deadly
        return not self.is_tiled(state)

    def lacks_tile_squares(self, entry: SlideEntry) -> bool:
        """Whether a slide has tiles, but not as GeoJSON."""
        coords, squares = (self.path(kind, entry.slide_id) for kind in ("coords", "geojson_tiles"))
        return coords.is_file() and not squares.is_file()

    def needs_encoding(self, entry: SlideEntry, settings: TilingSettings, encoded_by: dict[str, str]) -> bool:
        """Whether a slide is still to be tiled or encoded; raises ValueError if either was done otherwise."""
        self.check_encoder(entry, **encoded_by)
        if self.needs_tiling(entry, settings):
            return True
        state = self.read_state(entry.slide_id)
        return not state.is_deadly and not self.is_encoded(state)

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
        differing = [key for key in wanted if had[key] != wanted[key]]
        if differing:
            raise ValueError(
                f"{self.folder} holds {entry.slide_id} tiled with "
                f"{', '.join(f'--{key} {had[key]}' for key in differing)}, not "
                f"{', '.join(f'--{key} {wanted[key]}' for key in differing)}: "
                "choose another --output_dir, or tile anew with --overwrite"
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
