"""The contact sheet of a run, OUT/index.html: a card for each slide, to filter and sort in a browser.

One file without any request to elsewhere. Its pictures are those in OUT/thumbnails and OUT/overlays, named relatively
and loaded when they come into view, so that it stays light with ten thousand slides and may be moved with the folder.
It names no folder of the machine that it was made on.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from command_line import counted
from slide_features import atomic_path

STATUSES = ("failed", "empty", "done")  # in the order of the sheet
TEMPLATE = Path(__file__).with_name("contact_sheet.html")
FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^/\\\s'\"]+[/\\])+")

Row = Mapping[str, object]


def write_contact_sheet(folder: Path, rows: Sequence[Row]) -> None:
    """Write `folder`/index.html, atomically; a sheet that says the same already is left alone.

    Args:
        folder: output folder of a run.
        rows: of slides.csv, by slide_id: the fields of `SlideRow`.
    """
    page = contact_sheet(folder, rows)
    path = folder / "index.html"
    if path.is_file() and path.read_text(encoding="utf-8") == page:
        return
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")


def contact_sheet(folder: Path, rows: Sequence[Row]) -> str:
    """The page as HTML. All text of slides is escaped: names come from anywhere."""
    pictures = {kind: {path.stem for path in (folder / kind).glob("*.jpg")} for kind in ("thumbnails", "overlays")}
    ordered = sorted(rows, key=lambda row: _place(row["status"]))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        slides=counted(len(rows), "slide"),
        figures="".join(_figure(*figure) for figure in _summary(rows)),
        statuses=_options(rows),
        cards="\n".join(_card(row, pictures) for row in ordered),
    )


def _summary(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Name, value and CSS class of the figures on top."""
    counts = [(status, _count(rows, status), status) for status in STATUSES]
    tiles = sum(row["n_tiles"] or 0 for row in rows)
    seconds = sum(row["seconds"] or 0 for row in rows if row["n_tiles"])
    fractions = sorted(row["tissue_fraction"] for row in rows if row["tissue_fraction"] is not None)
    figures = [("slides", f"{len(rows):,}", ""), *((name, f"{count:,}", css) for name, count, css in counts)]
    figures.append(("tiles", f"{tiles:,}", ""))
    if fractions:
        figures.append(("median tissue", f"{100 * fractions[len(fractions) // 2]:.1f} %", ""))
    if seconds:
        figures.append(("tiles/s per worker", f"{tiles / seconds:,.0f}", ""))
    return [(name, value, css if value != "0" else "") for name, value, css in figures]


def _figure(name: str, value: str, css: str) -> str:
    return f'<div class="{css}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'


def _options(rows: Sequence[Row]) -> str:
    options = [f'<option value="{status}">{status} ({_count(rows, status)})</option>' for status in STATUSES]
    return '<option value="">All slides</option>' + "".join(options)


def _card(row: Row, pictures: Mapping[str, set[str]]) -> str:
    slide_id, status = str(row["slide_id"]), str(row["status"])
    width, height = row["width"], row["height"]
    data = {
        "name": slide_id,
        "status": status,
        "tiles": row["n_tiles"],
        "tissue": row["tissue_fraction"],
        "seconds": row["seconds"],
        "pixels": width * height if width and height else None,
    }
    attributes = " ".join(f'data-{key}="{_text(value)}"' for key, value in data.items())
    name = escape(slide_id)
    if slide_id in pictures["overlays"]:
        name = f'<a href="{_link("overlays", slide_id)}">{name}</a>'
    error = f'<p class="error">{escape(_without_folders(row))}</p>' if row["error"] else ""
    error += f'<p class="warning">{escape(str(row["warning"]))}</p>' if row.get("warning") else ""
    return (
        f'<article class="{escape(status)}" {attributes}>{_frame(row, pictures)}<div class="about">'
        f'<div class="head"><h2>{name}</h2><span class="badge">{escape(status)}</span></div>'
        f"{_facts(row)}{error}</div></article>"
    )


def _frame(row: Row, pictures: Mapping[str, set[str]]) -> str:
    """The thumbnail, with the overlay above it when it is pointed at, clicked or asked for."""
    slide_id = str(row["slide_id"])
    if slide_id not in pictures["thumbnails"] or not row["width"] or not row["height"]:
        return '<div class="none">no picture</div>'
    images = f'<img loading="lazy" alt="" src="{_link("thumbnails", slide_id)}">'
    if slide_id in pictures["overlays"]:
        images += f'<img loading="lazy" alt="" class="overlay" src="{_link("overlays", slide_id)}">'
    return (
        f'<button class="frame" aria-pressed="false" aria-label="Tissue and tiles of {escape(slide_id)}">'
        f'<span class="picture" style="--shape:{row["width"] / row["height"]:.4f}">{images}</span></button>'
    )


def _facts(row: Row) -> str:
    facts = {
        "format": row["format"],
        "tissue": None if row["tissue_fraction"] is None else f"{100 * row['tissue_fraction']:.1f} %",
        "size": row["width"] and f"{row['width']:,} x {row['height']:,}",
        "tiles": None if row["n_tiles"] is None else f"{row['n_tiles']:,}",
        "um/px": row["mpp"] and f"{row['mpp']:.4g} ({row['mpp_source']})",
        "seconds": None if row["seconds"] is None else f"{row['seconds']:,.1f}",
    }
    known = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    return f'<dl class="facts">{known}</dl>'


def _without_folders(row: Row) -> str:
    """The error with file names only, which need not be hidden from who gets the sheet."""
    error = str(row["error"]).replace(f"{Path(str(row['path'])).parent}/", "")
    return FOLDERS.sub("", error)


def _link(kind: str, slide_id: str) -> str:
    return escape(f"{kind}/{quote(slide_id, safe='')}.jpg")


def _text(value: object) -> str:
    return "" if value is None else escape(str(value))


def _count(rows: Sequence[Row], status: str) -> int:
    return sum(row["status"] == status for row in rows)


def _place(status: object) -> int:
    return STATUSES.index(status) if status in STATUSES else -1
