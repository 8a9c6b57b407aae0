"""A survey in words: counts, medians, tiles, storage, hours and what deserves a look."""

from collections import Counter, defaultdict
from statistics import median

from command_line import counted
from stage0_tiling.slide_survey import BLURRED_BELOW, COORDS_BYTES, TILINGS, SurveyRow

MAX_NAMES = 8  # slides named per problem; the table has all


def summary_of(rows: list[SurveyRow], feature_width: int, tiles_per_second: float | None) -> str:
    """Several lines for a terminal."""
    good = [row for row in rows if not row.failed]
    lines = [f"{counted(len(rows), 'slide')}: {len(good)} read, {len(rows) - len(good)} failed"]
    if good:
        lines += [*_of_files(good), *_of_tissue(good), "", *_of_tiles(good, feature_width, tiles_per_second)]
    return "\n".join([*lines, *_of_problems(rows)])


def _of_files(rows: list[SurveyRow]) -> list[str]:
    widths, heights = ([getattr(row, side) for row in rows] for side in ("width", "height"))
    size = f"median {median(widths):,.0f} x {median(heights):,.0f} px, largest {max(widths):,} x {max(heights):,} px"
    if wide := [row.width_mm for row in rows if row.width_mm]:
        size += f", median {median(wide):.1f} x {median(row.height_mm for row in rows if row.height_mm):.1f} mm"
    total = sum(row.file_mb for row in rows)
    return [
        _line("formats", _counts(row.format for row in rows)),
        _line("compression", _counts(row.compression or "unknown" for row in rows)),
        _line("size", size),
        _line("files", f"{bytes_of(total)}, median {bytes_of(median(row.file_mb for row in rows))}"),
        _line("um per pixel", _counts(f"{row.mpp:.2f}" if row.mpp else "unknown" for row in rows)),
        _line("from", _counts(row.mpp_source or "unknown" for row in rows)),
        _line("ICC profile", f"{sum(bool(row.has_icc) for row in rows)} of {len(rows)}"),
    ]


def _of_tissue(rows: list[SurveyRow]) -> list[str]:
    lines = []
    if areas := [row.tissue_mm2 for row in rows if row.tissue_mm2 is not None]:
        fractions = median(row.tissue_fraction for row in rows)
        text = f"median {median(areas):,.1f} mm2 ({min(areas):,.1f} to {max(areas):,.1f}), {fractions:.0%} of a slide"
        lines.append(_line("tissue", text))
    by_mpp = defaultdict(list)
    for row in rows:
        if row.sharpness is not None:
            by_mpp[row.sharpness_mpp].append(row.sharpness)
    for mpp, values in sorted(by_mpp.items()):
        blurred = sum(value < BLURRED_BELOW for value in values)
        text = f"median {median(values):.2f} at {mpp:g} um/px, {blurred} of {len(values)} below {BLURRED_BELOW}"
        lines.append(_line("sharpness", text))
    return lines


def _of_tiles(rows: list[SurveyRow], feature_width: int, tiles_per_second: float | None) -> list[str]:
    head = f"{'tile px':>8}{'um/px':>7}{'slides':>8}{'tiles':>14}{'median':>10}{'features':>12}"
    lines = [head + (f"{'hours':>9}" if tiles_per_second else "")]
    for index, (tile_px, mpp) in enumerate(TILINGS):
        counts = [row.tiles[index] for row in rows if row.tiles[index] is not None]
        total = sum(counts)
        stored = bytes_of(total * (2 * feature_width + COORDS_BYTES) / 1e6)
        middle = f"{median(counts):,.0f}" if counts else "-"
        line = f"{tile_px:>8}{mpp:>7g}{len(counts):>8,}{total:>14,}{middle:>10}{stored:>12}"
        lines.append(line + (f"{total / tiles_per_second / 3600:>9,.2f}" if tiles_per_second else ""))
    note = f"features: {feature_width} numbers of 2 bytes per tile (--feature_width)"
    if tiles_per_second:
        return [*lines, f"{note}; hours at {tiles_per_second:g} tiles/s"]
    return [*lines, f"{note}; hours with --tiles_per_second"]


def _of_problems(rows: list[SurveyRow]) -> list[str]:
    slides = defaultdict(list)
    for row in rows:
        for problem in row.problems:
            slides["failed" if row.failed else _kind_of(problem)].append(row.slide_id)
    lines = [""] if slides else []
    for problem, names in sorted(slides.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        lines.append(f"{problem}: {len(names)}, {', '.join(names[:MAX_NAMES])}{more}")
    return lines


def _kind_of(problem: str) -> str:
    for kind in ("same pixels as another", "mpp contradicts objective"):
        if kind.split()[1] in problem.split():
            return kind
    return problem


def _line(name: str, text: str) -> str:
    return f"{name + ':':14}{text}"


def _counts(values) -> str:
    return ", ".join(f"{value} {count:,}" for value, count in Counter(values).most_common())


def bytes_of(megabytes: float) -> str:
    for unit in ("MB", "GB", "TB"):
        if megabytes < 1000 or unit == "TB":
            return f"{megabytes:,.1f} {unit}"
        megabytes /= 1000
