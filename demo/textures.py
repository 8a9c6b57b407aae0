"""Made-up H&E texture: an organ's architecture, a diagnosis' growth and a grade's nuclei, drawn at 0.5 um/px.

Fields of architecture live at 1 um/px, nuclei and colour at 0.5 um/px. Lengths are in um. Nothing here is real tissue;
it is drawn so that organ, diagnosis and grade can be seen in a tile of 128 um, and nothing else tells them.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

MPP = 0.5
# Optical density (red, green, blue) per unit of stain, close to Ruifrok and Johnston 2001, eosin a little warmer.
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.08, 0.95, 0.24], np.float32)

Rng = np.random.Generator
Field = np.ndarray  # (height, width) float32


@dataclass(frozen=True)
class Tissue:
    """What a class looks like. Shares lie between 0 and 1, densities are nuclei per 1000 um2."""

    architecture: str  # ducts, glands, crypts, papillae or alveoli
    filled: float = 0.0  # how far cells fill the glands' lumina, as sieve-like bridges
    stratified: float = 0.25  # depth of the epithelium's nuclei: a basal row at 0.2, all of it at 1
    thickness_um: float = 14.0  # of the epithelium
    goblets: float = 0.0  # mucus vacuoles in the epithelium
    nests: str = "none"  # tumour between the glands: acini, cords or sheets
    nest_share: float = 0.0
    nucleus_um: float = 7.0
    nucleus_spread: float = 0.08
    crowding: float = 13.0  # density of epithelial and tumour nuclei
    darkness: float = 0.8
    lymphocytes: float = 0.3  # density of small dark cells in the stroma
    necrosis: float = 0.0  # share of lumina (or granulomas) with debris
    granulomas: float = 0.0


@dataclass(frozen=True)
class Stain:
    """One slide's staining: the two stain vectors and their strengths."""

    haematoxylin: np.ndarray
    eosin: np.ndarray


def draw_stain(rng: Rng) -> Stain:
    """A laboratory's staining, drawn anew for each slide."""
    vectors = [vector + rng.normal(0, 0.025, 3).astype(np.float32) for vector in (HAEMATOXYLIN, EOSIN)]
    strengths = rng.uniform(0.85, 1.2), rng.uniform(0.75, 1.2)
    return Stain(*(np.clip(v, 0.01, 1.1) * np.float32(s) for v, s in zip(vectors, strengths, strict=True)))


def smooth_noise(shape: tuple[int, int], scale_um: float, rng: Rng) -> Field:
    """Noise of unit deviation with features of about `scale_um` pixels."""
    small = rng.standard_normal([max(4, int(side / scale_um) + 3) for side in shape]).astype(np.float32)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC) / 0.7


def soft(distance: Field, softness: float = 1.2) -> Field:
    """1 where `distance` is well above zero, 0 where well below, a short ramp between."""
    return np.clip(distance / softness + 0.5, 0, 1)


def jittered_points(shape: tuple[int, int], spacing: float, jitter: float, rng: Rng) -> np.ndarray:
    """Points (n, 2) as (y, x) on a hexagonal grid, each moved by up to `jitter` of the spacing."""
    ys, xs = np.mgrid[0 : shape[0] + spacing : spacing * 0.87, 0 : shape[1] + spacing : spacing]
    xs[1::2] += spacing / 2
    points = np.stack([ys.ravel(), xs.ravel()], 1) + rng.uniform(-jitter, jitter, (ys.size, 2)) * spacing
    inside = (points >= 0).all(1) & (points[:, 0] < shape[0]) & (points[:, 1] < shape[1])
    return points[inside]


def nearest(shape: tuple[int, int], points: np.ndarray) -> tuple[Field, np.ndarray]:
    """Distance to the nearest point, and a number that tells which (Voronoi cells)."""
    seeds = np.full(shape, 255, np.uint8)
    rows, columns = points.astype(int).T
    seeds[rows, columns] = 0
    return cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)


def to_border(cells: np.ndarray) -> Field:
    """Distance to the border between Voronoi cells."""
    inside = np.ones(cells.shape, np.uint8)
    inside[:, 1:] &= cells[:, 1:] == cells[:, :-1]
    inside[1:] &= cells[1:] == cells[:-1]
    return cv2.distanceTransform(inside, cv2.DIST_L2, 5)


def warp(field: Field, shift: tuple[Field, Field]) -> Field:
    """Bend a field by a smooth displacement, so that nothing stays a circle or a straight line."""
    height, width = field.shape
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    return cv2.remap(field, xs + shift[1], ys + shift[0], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def round_glands(shape: tuple[int, int], spacing: float, radius: float, presence: float, rng: Rng) -> Field:
    """Depth below the outline of the nearest gland, negative outside."""
    points = jittered_points(shape, spacing, 0.22, rng)
    points = points[rng.random(len(points)) < presence]
    if len(points) == 0:
        points = np.array([[0.0, 0.0]])
    distance, cells = nearest(shape, points)
    radii = (radius * rng.uniform(0.75, 1.2, cells.max() + 1)).astype(np.float32)
    return radii[cells] - distance


def architecture(tissue: Tissue, shape: tuple[int, int], rng: Rng) -> tuple[Field, Field, Field]:
    """Depth below the glands' outline, share of white space outside glands, strength of stromal fibres."""
    empty = np.zeros(shape, np.float32)
    presence = 0.55 if tissue.nest_share else 0.95  # a tumour takes the glands' place
    if tissue.architecture == "ducts":  # small ducts in lobules, fat lobules between them
        depth = round_glands(shape, 58, 21, presence, rng)
        fat_points = jittered_points(shape, 30, 0.18, rng)
        fat_here = smooth_noise(shape, 55, rng) - 0.35
        fat = soft(12.5 - nearest(shape, fat_points)[0]) * soft(fat_here, 0.15)
        return np.where(fat_here > 0, np.minimum(depth, -8), depth), fat, empty + 0.7
    if tissue.architecture == "glands":  # large lobed glands in smooth muscle
        lobes = 7 * smooth_noise(shape, 17, rng)
        return round_glands(shape, 116, 42, presence, rng) + lobes, empty, empty + 1.0
    if tissue.architecture == "crypts":  # a close honeycomb of round crypts
        return round_glands(shape, 66, 28, presence, rng), empty, empty + 0.2
    if tissue.architecture == "papillae":  # fronds: a stromal core, urothelium, a slit
        angle = rng.uniform(0, np.pi)
        ys, xs = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
        along = ys * np.float32(np.cos(angle)) + xs * np.float32(np.sin(angle)) + 16 * smooth_noise(shape, 90, rng)
        period = 150.0
        from_core = np.abs((along / period) % 1 - 0.5) * period
        return (from_core - (66 - tissue.thickness_um)).astype(np.float32), empty, empty + 0.5
    # alveoli: air spaces and thin walls
    from_wall = to_border(nearest(shape, jittered_points(shape, 48, 0.32, rng))[1])
    return 1000 - from_wall, soft(from_wall - 3.8 - max(0, tissue.thickness_um - 4)), empty + 0.4


@dataclass
class Compartments:
    """Where is what, each (height, width) float32 between 0 and 1 at 1 um/px."""

    lumen: Field
    epithelium: Field
    nuclei_zone: Field
    tumour: Field
    debris: Field
    lymphoid: Field
    fibres: Field


def lay_out(tissue: Tissue, shape: tuple[int, int], rng: Rng) -> Compartments:
    """Draw one piece's compartments."""
    depth, white, fibres = architecture(tissue, shape, rng)
    if tissue.architecture == "alveoli":
        from_wall = 1000 - depth
        epithelium = soft(from_wall - 1.2) * (1 - white) if tissue.thickness_um > 4 else np.zeros(shape, np.float32)
        lumen, basal = white, epithelium
    else:
        epithelium = soft(depth)
        lumen = soft(depth - tissue.thickness_um)
        basal = epithelium * soft(tissue.thickness_um * tissue.stratified - depth + 3)
    epithelium = epithelium * (1 - lumen)
    debris = np.zeros(shape, np.float32)

    if tissue.filled:  # bridges of cells with punched-out holes
        holes = soft(6.0 - nearest(shape, jittered_points(shape, 24, 0.25, rng))[0]) * (tissue.filled < 1)
        bridges = lumen * (1 - holes)
        epithelium, basal, lumen = epithelium + bridges, basal + bridges, lumen * holes
    if tissue.necrosis:
        centre = soft(depth - tissue.thickness_um - 5) if tissue.architecture != "alveoli" else debris
        debris = centre * (smooth_noise(shape, 60, rng) < 4 * tissue.necrosis - 1.5)
        epithelium, basal, lumen = epithelium * (1 - debris), basal * (1 - debris), lumen * (1 - debris)

    tumour, tumour_lumen = draw_nests(tissue, shape, rng)
    # Air spaces fill with tumour; glands, their lumina and, where it grows in cords, fat are spared.
    spare = np.clip(epithelium + lumen + debris, 0, 1) * (tissue.architecture != "alveoli")
    spare = np.maximum(spare, white * (tissue.architecture == "ducts") * (tissue.nests == "cords"))
    keep = 1 - tumour - tumour_lumen
    tumour, tumour_lumen = tumour * (1 - spare), tumour_lumen * (1 - spare)
    lumen = np.maximum(lumen + white * (tissue.architecture == "ducts"), 0)
    lumen = np.clip(lumen * np.clip(keep, 0, 1) + tumour_lumen, 0, 1)
    epithelium = epithelium * (1 - tumour)

    lymphoid = soft(smooth_noise(shape, 45, rng) - 0.3, 0.8) if tissue.lymphocytes > 1 else np.ones(shape, np.float32)
    if tissue.granulomas:
        depth = round_glands(shape, 125, 44, tissue.granulomas, rng)
        nodule, core = soft(depth), soft(depth - 24)
        lumen, epithelium, basal = lumen * (1 - nodule), epithelium * (1 - nodule), basal * (1 - nodule)
        debris = np.maximum(debris, core)
        tumour = np.maximum(tumour * (1 - nodule), 0.45 * (nodule - core))
        lymphoid = np.maximum(0.1 * lymphoid, soft(11 - np.abs(depth), 3))
    lymphoid = lymphoid * (1 - lumen) * (1 - epithelium) * (1 - 0.8 * tumour) * (1 - debris)
    return Compartments(lumen, epithelium, basal * (1 - tumour), tumour, debris, lymphoid, fibres)


def draw_nests(tissue: Tissue, shape: tuple[int, int], rng: Rng) -> tuple[Field, Field]:
    """Tumour between the glands: its cells and the lumina it forms."""
    none = np.zeros(shape, np.float32)
    here = soft(smooth_noise(shape, 110, rng) - (1.3 - 2.6 * tissue.nest_share), 0.3)
    if tissue.nests == "acini":
        depth = round_glands(shape, 33, 13, 0.95, rng)
        return soft(depth) * (1 - soft(depth - 8)) * here, soft(depth - 8) * here
    if tissue.nests == "cords":
        return soft(7.5 - 16 * np.abs(smooth_noise(shape, 24, rng))) * here, none
    if tissue.nests == "sheets":
        return soft(8 * (smooth_noise(shape, 55, rng) + 0.9)) * here, none
    return none, none


def nucleus_stamps(diameter_um: float, spread: float, elongation: float, darkness: float, rng: Rng) -> list[Field]:
    """A set of nuclei to print, haematoxylin per pixel at 0.5 um/px: rim, chromatin, and in large ones a nucleolus."""
    stamps = []
    for _ in range(28):
        diameter = diameter_um / MPP * np.clip(rng.normal(1, spread), 0.55, 1.9)
        stretch = elongation * np.exp(rng.normal(0, 0.08 + 0.4 * spread))
        a, b = diameter / 2 * np.sqrt(stretch), diameter / 2 / np.sqrt(stretch)
        half = int(np.ceil(max(a, b))) + 2
        ys, xs = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
        angle = rng.uniform(0, np.pi)
        u, v = xs * np.cos(angle) + ys * np.sin(angle), ys * np.cos(angle) - xs * np.sin(angle)
        lobes = 1 + 0.35 * spread * np.sin(rng.integers(2, 5) * np.arctan2(v, u) + rng.uniform(0, 6))
        radius = np.sqrt((u / a) ** 2 + (v / b) ** 2) / lobes
        body = np.clip((1 - radius) * min(a, b) / 1.2 + 0.5, 0, 1)
        chromatin = cv2.GaussianBlur(rng.standard_normal(ys.shape).astype(np.float32), (0, 0), 1.2)
        tone = 0.72 + 0.55 * chromatin + 0.35 * np.clip(radius - 0.55, 0, 1) / 0.45
        if diameter_um > 10:
            tone += 0.9 * np.exp(-((u - rng.normal(0, a / 4)) ** 2 + (v - rng.normal(0, b / 4)) ** 2) / 4)
        stamps.append((body * np.clip(tone, 0.3, 1.5) * darkness * rng.uniform(0.85, 1.15)).astype(np.float32))
    return stamps


def print_nuclei(ink: Field, where: Field, density: float, stamps: list[Field], rng: Rng) -> None:
    """Print nuclei into `ink` (0.5 um/px) with `density` per 1000 um2 where the field `where` (1 um/px) is 1."""
    spacing = np.sqrt(1000 / density / 0.87)
    points = jittered_points(where.shape, spacing, 0.3, rng)
    rows, columns = points.astype(int).T
    points = points[where[rows, columns] > rng.random(len(points))] / MPP
    choice = rng.integers(len(stamps), size=len(points))
    height, width = ink.shape
    for (y, x), kind in zip(points.astype(int).tolist(), choice.tolist(), strict=True):
        stamp = stamps[kind]
        half = stamp.shape[0] // 2
        if half <= y < height - half and half <= x < width - half:
            patch = ink[y - half : y + half + 1, x - half : x + half + 1]
            np.maximum(patch, stamp, out=patch)


def fibre_texture(shape: tuple[int, int], strength: Field, rng: Rng) -> Field:
    """Wavy bundles of collagen or muscle at 1 um/px, around zero; strong ones are long and parallel."""
    side = int(np.hypot(*shape)) + 8
    length = 14 + 30 * float(strength.mean())
    strands = rng.standard_normal((side // 3 + 1, int(side / length) + 3)).astype(np.float32)
    strands = cv2.resize(strands, (side, side), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(0, 180), 1)
    turned = cv2.warpAffine(strands, turn, (side, side), borderMode=cv2.BORDER_REFLECT)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    wave = tuple(6 * smooth_noise(shape, 40, rng) for _ in range(2))
    return warp(np.ascontiguousarray(turned[top : top + shape[0], left : left + shape[1]]), wave)


def render(tissue: Tissue, height: int, width: int, stain: Stain, rng: Rng) -> np.ndarray:
    """Draw (height, width, 3) float32 optical density of tissue at 0.5 um/px."""
    # Two slides of one class differ as two patients do.
    tissue = replace(
        tissue,
        nucleus_um=tissue.nucleus_um * rng.uniform(0.95, 1.05),
        crowding=tissue.crowding * rng.uniform(0.93, 1.07),
        darkness=tissue.darkness * rng.uniform(0.92, 1.08),
    )
    shape = (height // 2 + 1, width // 2 + 1)
    parts = lay_out(tissue, shape, rng)
    bend = tuple(5 * smooth_noise(shape, 28, rng) for _ in range(2))
    for name, field in vars(parts).items():
        setattr(parts, name, warp(field.astype(np.float32), bend))
    solid = 1 - parts.lumen
    stroma = np.clip(solid - parts.epithelium - parts.tumour - parts.debris, 0, 1)

    eosin = stroma * (0.42 + 0.16 * parts.fibres * fibre_texture(shape, parts.fibres, rng))
    eosin += 0.34 * (parts.epithelium + parts.tumour) + 0.62 * parts.debris
    haematoxylin = 0.16 * (parts.epithelium + parts.tumour) + 0.03 * stroma + 0.1 * parts.debris
    if tissue.goblets:
        vacuoles = soft(4.6 - nearest(shape, jittered_points(shape, 13, 0.25, rng))[0])
        vacuoles = vacuoles * parts.epithelium * (1 - parts.nuclei_zone) * tissue.goblets
        eosin, haematoxylin = eosin * (1 - 0.85 * vacuoles), haematoxylin * (1 - 0.4 * vacuoles)

    ink = np.zeros((shape[0] * 2, shape[1] * 2), np.float32)
    cells = nucleus_stamps(tissue.nucleus_um, tissue.nucleus_spread, 1.25, tissue.darkness, rng)
    print_nuclei(ink, 0.85 * stroma, 1.3, nucleus_stamps(7, 0.15, 3.2, 0.75, rng), rng)
    print_nuclei(ink, parts.lymphoid, tissue.lymphocytes, nucleus_stamps(6, 0.06, 1.05, 1.15, rng), rng)
    print_nuclei(ink, parts.nuclei_zone, tissue.crowding * (2.6 - 1.6 * tissue.stratified), cells, rng)
    print_nuclei(ink, parts.tumour, tissue.crowding, cells, rng)
    print_nuclei(ink, parts.debris, 5, nucleus_stamps(3, 0.3, 1.2, 0.9, rng), rng)

    full = ink.shape[::-1]
    grain = 1 + 0.1 * smooth_noise(ink.shape, 3, rng)
    eosin = cv2.resize(np.clip(eosin, 0.015, 2), full, interpolation=cv2.INTER_LINEAR) * grain
    haematoxylin = cv2.resize(haematoxylin, full, interpolation=cv2.INTER_LINEAR) * grain + ink
    eosin = np.maximum(eosin * (1 - 0.35 * np.clip(ink, 0, 1)), 0.3 * ink)
    density = haematoxylin[..., None] * stain.haematoxylin + eosin[..., None] * stain.eosin
    return density[:height, :width]
