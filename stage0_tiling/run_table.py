"""What a stage-0 run has done so far, slide by slide.

    OUT/state/<slide_id>.json   one small file per slide, written when its work is whole
    OUT/settings/*.json         what all are made with, see `folder_settings`
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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from slide_features import FEATURE_SUFFIXES, atomic_path, count_tiles, read_slide_coords
from stage0_tiling.claims import Claims
from stage0_tiling.contact_sheet import write_contact_sheet
from stage0_tiling.folder_settings import check_same_features, check_same_tiling, read_settings, record_settings
from stage0_tiling.plan import TilingSettings
from stage0_tiling.slide_list import SlideEntry
from stage0_tiling.user_masks import fingerprint_mask

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
OTHER_TILING = "choose another --output_dir, or tile anew with --overwrite"
OTHER_FEATURES = "choose another --output_dir, or encode anew with --overwrite"
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
    warning: str | None = None


@dataclass(frozen=True)
class SlideState:
    """What is known of one slide.

    Attributes:
        row: its row in slides.csv.
        tiling: settings that its tiles were made with; None if it is not tiled.
        encoded: by name of the folder that holds the features, what made them: `encoder`, its `fingerprint`, and what
            else must agree with other slides' features.
        reader: `openslide`, `tiff` or `pillow`, whichever opened the slide last. Their results are equal within
            tolerance, so that slides of several readers share a folder. None in folders of earlier versions.
        recorded_by: the claim under which this was recorded; tells a new failure from one of an earlier run.
        deaths: how many processes had died at the slide when it was given up; else 0.
        num_bytes: size of the slide's file when it was tiled; None in folders of earlier versions.
        mask: fingerprint of the user's mask that its tissue was found with, empty where there was none for it; None
            without --masks, and in folders of earlier versions.
    """

    row: SlideRow
    tiling: TilingSettings | None = None
    encoded: dict[str, dict[str, Any]] = field(default_factory=dict)
    reader: str | None = None
    recorded_by: str | None = None
    deaths: int = 0
    num_bytes: int | None = None
    mask: str | None = None

    @property
    def is_deadly(self) -> bool:
        """Whether the slide was given up because processes died at it."""
        return self.deaths >= MAX_DEATHS


STORED_STATE = TypeAdapter(SlideState)


class RunFolder:
    """The output folder of a stage-0 run."""

    def __init__(self, folder: str | Path, masks: Path | None = None):
        """Name the folder, and that of the user's masks; nothing is made before the first file is written."""
        self.folder = Path(folder).expanduser().absolute()
        self.masks = masks
        self._begun: dict[str, dict[str, Any]] = {}
        self._warned: set[tuple[object, ...]] = set()

    def begin(self, settings: TilingSettings, made_by: dict[str, dict[str, Any]] | None = None) -> None:
        """Record what this run makes its results with, unless an earlier one has: one folder holds one kind.

        Args:
            settings: of the tiles.
            made_by: what makes the features, by the folder that they go to.

        Raises:
            ValueError: if the folder was begun with others.
        """
        self._begun = {"tiling": asdict(settings), **(made_by or {})}
        self.check_begun()  # of several, none is recorded before all fit
        for name, wanted in self._begun.items():
            self._check_same(name, record_settings(self._settings_path(name), wanted), wanted)

    def check_begun(self) -> None:
        """Refuse a folder that another run has begun with other settings, be it since `begin`.

        Raises:
            ValueError: naming the settings that differ.
        """
        for name, wanted in self._begun.items():
            self._check_same(name, read_settings(self._settings_path(name)) or wanted, wanted)

    def _check_same(self, name: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        if name == "tiling":
            check_same_tiling(f"{self.folder} was begun with slides", stored, wanted, OTHER_TILING)
        else:
            check_same_features(self.folder / name, stored, wanted, OTHER_FEATURES)

    def _settings_path(self, name: str) -> Path:
        return self.folder / "settings" / f"{name}.json"

    def path(self, kind: str, slide_id: str) -> Path:
        """Where a slide's file of a kind lies, see `OUTPUTS`."""
        return self.folder / kind / f"{slide_id}{OUTPUTS[kind]}"

    def features_path(self, folder: str, slide_id: str, suffix: str) -> Path:
        """Where a slide's features of one of several encoders lie."""
        return self.folder / folder / f"{slide_id}{suffix}"

    def read_state(self, slide_id: str) -> SlideState | None:
        """Read what is known of a slide; None if nothing is, or if its state file is not readable."""
        path = self.path("state", slide_id)
        try:
            stored = json.loads(path.read_text())
            encoded = _encoded(stored)
            known = {field.name: stored[field.name] for field in fields(SlideState) if field.name in stored}
            return STORED_STATE.validate_python(known | {"encoded": encoded})
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error)
        self._warn("%s is not readable (%s); its slide is done again", path, reason)
        return None

    def _warn(self, *message: object) -> None:
        """Warn once of what is looked at several times."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(*message)

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

    def forget(
        self,
        entries: list[SlideEntry],
        settings: TilingSettings,
        made_by: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Delete all that earlier runs made of these slides, for --overwrite, and `begin` anew where no others stay.

        Raises:
            ValueError: if one of them is in work, or others stay that were made with other settings.
        """
        names = {entry.slide_id for entry in entries}
        kept = next((path for path in (self.folder / "state").glob("*.json") if path.stem not in names), None)
        if kept:
            self.begin(settings, made_by)
        claims = Claims(self.folder / "claims")
        for entry in entries:
            if owner := claims.owner(entry.slide_id):
                raise ValueError(f"--overwrite: {entry.slide_id} is in work ({owner}): wait for it, or stop it")
        for entry in entries:
            state = self.read_state(entry.slide_id)
            folders = {"features", *(state.encoded if state else ())}
            for kind in reversed(OUTPUTS):  # the state first: without it the rest counts as missing
                self.path(kind, entry.slide_id).unlink(missing_ok=True)
            for name in folders:
                for suffix in (*FEATURE_SUFFIXES, ".pt.json"):
                    self.features_path(name, entry.slide_id, suffix).unlink(missing_ok=True)
            claims.forget(entry.slide_id)
        if not kept:
            for path in (self.folder / "settings").glob("*.json"):
                path.unlink(missing_ok=True)

    def remove_leftovers(self, entry: SlideEntry) -> None:
        """Delete half-written files of a slide whose process was killed; nobody else may be writing them."""
        names = {f"{entry.slide_id}{suffix}" for suffix in {*OUTPUTS.values(), *FEATURE_SUFFIXES, ".pt.json"}}
        for folder in {self.folder / kind for kind in OUTPUTS} | set(self._feature_folders()):
            for partial in folder.glob(".*.partial"):
                if partial.name[1:].removesuffix(".partial").rpartition(".")[0] in names:
                    partial.unlink(missing_ok=True)

    def is_tiled(self, state: SlideState | None) -> bool:
        """Whether a slide's coords are here, or it is known to have none."""
        return state is not None and state.tiling is not None and self._holds("coords", state.row)

    def is_encoded(self, state: SlideState | None, folder: str = "features", suffix: str = ".h5") -> bool:
        """Whether a slide's features of one encoder are here, whole, or it is known to have none."""
        if state is None or folder not in state.encoded:
            return False
        if state.row.n_tiles == 0:
            return True
        try:
            return count_tiles(self.features_path(folder, state.row.slide_id, suffix)) == state.row.n_tiles
        except (ValueError, OSError):
            return False

    def needs_tiling(self, entry: SlideEntry, settings: TilingSettings) -> bool:
        """Whether a slide is still to be tiled; raises ValueError if it was tiled with other settings."""
        self.check_tiling(entry, settings, entry.assume_mpp)
        state = self.read_state(entry.slide_id)
        if state is not None and state.row.status == "failed":
            return not state.is_deadly
        return not self.is_tiled(state) or self.is_changed(state, entry) or not self._has_its_tiles(state)

    def is_changed(self, state: SlideState, entry: SlideEntry) -> bool:
        """Whether the slide's file is another than the one that was tiled, by its size, or its mask, by its content."""
        try:
            changed = state.num_bytes is not None and entry.path.stat().st_size != state.num_bytes
        except OSError:  # it is named when it is opened
            return False
        if changed:
            self._warn("%s is another file than when it was tiled; it is done again", entry.slide_id)
        if self.masks and state.mask is not None and fingerprint_mask(self.masks, entry.slide_id) != state.mask:
            self._warn("the mask of %s is not what it was when it was tiled; it is done again", entry.slide_id)
            return True
        return changed

    def _has_its_tiles(self, state: SlideState) -> bool:
        """Whether the coords file is whole."""
        if state.row.n_tiles == 0:
            return True
        try:
            return len(read_slide_coords(self.path("coords", state.row.slide_id)).coords) == state.row.n_tiles
        except (ValueError, OSError):
            return False

    def lacks_tile_squares(self, entry: SlideEntry) -> bool:
        """Whether a slide has tiles, but not as GeoJSON."""
        coords, squares = (self.path(kind, entry.slide_id) for kind in ("coords", "geojson_tiles"))
        return coords.is_file() and not squares.is_file()

    def needs_encoding(
        self, entry: SlideEntry, settings: TilingSettings, made_by: dict[str, dict[str, Any]], suffix: str
    ) -> bool:
        """Whether a slide is still to be tiled or encoded; raises ValueError if either was done otherwise.

        `made_by` is what makes the features, by the folder that they go to, and `suffix` that of their files.
        """
        for name, made in made_by.items():
            self.check_encoder(entry, made, name)
        if self.needs_tiling(entry, settings):
            return True
        state = self.read_state(entry.slide_id)
        return not state.is_deadly and not all(self.is_encoded(state, name, suffix) for name in made_by)

    def check_tiling(self, entry: SlideEntry, settings: TilingSettings, assume_mpp: float | None) -> None:
        """Refuse to mix tiles of different settings in one folder.

        Raises:
            ValueError: if the slide's tiles are here and were made with other settings.
        """
        state = self.read_state(entry.slide_id)
        if not self.is_tiled(state):
            return
        had, wanted = asdict(state.tiling), asdict(settings)
        is_assumed = state.row.mpp_source == "assumed" and assume_mpp is not None
        if is_assumed and not _is_same_mpp(assume_mpp, state.row.mpp):
            had["assume_mpp"], wanted["assume_mpp"] = state.row.mpp, assume_mpp
        self._check_listed_mpp(entry, state.row)
        check_same_tiling(f"{self.folder} holds {entry.slide_id}", had, wanted, OTHER_TILING)

    def _check_listed_mpp(self, entry: SlideEntry, row: SlideRow) -> None:
        had = row.mpp if row.mpp_source == "list" else None
        if row.mpp is None or (entry.mpp is None and had is None):
            return
        if entry.mpp is None or not _is_same_mpp(entry.mpp, row.mpp):
            raise ValueError(
                f"{self.folder} holds {entry.slide_id} tiled with {row.mpp:g} um per level-0 pixel ({row.mpp_source}), "
                f"and the column mpp of --slides says {'nothing' if entry.mpp is None else f'{entry.mpp:g}'}: "
                "give the same list, choose another --output_dir, or tile anew with --overwrite"
            )

    def check_encoder(self, entry: SlideEntry, made_by: dict[str, Any], folder: str = "features") -> None:
        """Refuse to mix features of different encoders, or of tiles treated differently, in one folder.

        Raises:
            ValueError: if the slide's features are here, in any format, and were made otherwise.
        """
        state = self.read_state(entry.slide_id)
        if not any(self.is_encoded(state, folder, suffix) for suffix in FEATURE_SUFFIXES):
            return
        check_same_features(self.folder / folder, state.encoded[folder], made_by, OTHER_FEATURES)

    def _feature_folders(self) -> list[Path]:
        return [folder for folder in self.folder.glob("features*") if folder.is_dir()]

    def _holds(self, kind: str, row: SlideRow) -> bool:
        return row.n_tiles == 0 or self.path(kind, row.slide_id).is_file()


def _is_same_mpp(one: float, other: float) -> bool:
    """Whether they are equal but for the rounding of a table."""
    return abs(one / other - 1) <= 1e-4


def _encoded(stored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a state file says of features; earlier versions knew one encoder a folder."""
    if "encoded" in stored:
        return stored["encoded"]
    if stored["encoder"] is None:
        return {}
    return {"features": {"encoder": stored["encoder"], "fingerprint": stored["encoder_fingerprint"]}}
