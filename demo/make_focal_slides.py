r"""Make demo slides whose lesion is a small part of healthy tissue, and say exactly where it is.

    python demo/make_focal_slides.py --output_dir demo/output/focal --num_slides 44

Each slide is healthy tissue of one organ but for one focus, a smooth blob of the tissue of one of the demo's classes.
The demo's own slides are of one class all over, so that nearly every tile of them shows it, and where a model looks
cannot be judged on them. No model is trained on these.

Writes:

    OUT/slides/FOC_<number>.tiff       as demo/make_slides.py draws them, 2304 px a side
    OUT/lesions/FOC_<number>.png       exact mask of the lesion, 255 is lesion; a pixel is 8 x 8 pixels of level 0
    OUT/focal.json                     [{"id", "report"}], the report of the lesion's class
    OUT/make_focal_slides.json         the flags; a folder made with other flags is refused

The same seed gives the same files, whatever the number of workers; slides already there are kept.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from command_line import DONE, counted, make_parser, run
from demo.make_slides import MASK_STEP, background, cover_of, outline, write_json, write_slide

SIDE = 2304  # level-0 pixels
RADIUS_UM = (130, 190)  # of the focus: 3 to 7 of the demo's tiles of 128 um
UM_PER_MASK_PIXEL = 4.0


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo/output/focal"), help="folder that receives them")
    parser.add_argument("--num_slides", type=PositiveInt, default=44, help="number of slides; classes take turns")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="seed of everything drawn")
    parser.add_argument("--num_workers", type=PositiveInt, default=2, help="number of processes")
    return parser.parse_args()


def lesion_cases() -> list[int]:
    """Classes that have a lesion: all but an organ's benign one."""
    from demo.reports import CASES

    return [number for number, case in enumerate(CASES) if case.diagnosis not in ("benign", "fibrocystic")]


def healthy_tissue(organ: str) -> Any:
    """Tissue of an organ without a lesion: that of its first class, without inflammation."""
    from demo.reports import CASES
    from demo.textures import Tissue

    first = next(case for case in CASES if case.organ == organ)
    return replace(first.tissue, lymphocytes=Tissue.lymphocytes)


def focus_field(mask: Any, rng: Any) -> Any:
    """A smooth field (H, W) in mask pixels that is positive inside the focus, whose middle lies in the tissue."""
    import cv2
    import numpy as np

    from demo.textures import smooth_noise

    radius = rng.uniform(*RADIUS_UM) / UM_PER_MASK_PIXEL
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    inner = np.argwhere(depth > min(0.5 * radius, 0.6 * depth.max()))
    y, x = inner[rng.integers(len(inner))]
    ys, xs = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32)
    return radius - np.hypot(ys - y, xs - x) + 0.12 * radius * smooth_noise(mask.shape, 16, rng)


def draw_focal_slide(case: int, rng: Any) -> tuple[Any, Any]:
    """Draw a slide with a focus of class `case`: image (H, W, 3) and the lesion's mask (H / 8, W / 8), 1 is lesion."""
    import cv2
    import numpy as np

    from demo.reports import CASES
    from demo.textures import draw_stain, render

    field = outline(SIDE // MASK_STEP, SIDE // MASK_STEP, rng)
    mask = (field > 0).astype(np.uint8)
    image, stain = background(SIDE, SIDE, rng), draw_stain(rng)
    focus = focus_field(mask, rng)
    healthy, lesion = healthy_tissue(CASES[case].organ), CASES[case].tissue
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask)
    for left, top, box_width, box_height, _ in boxes[1:]:
        rows, columns = slice(max(top - 1, 0), top + box_height + 1), slice(max(left - 1, 0), left + box_width + 1)
        part = field[rows, columns]
        size = (part.shape[1] * MASK_STEP, part.shape[0] * MASK_STEP)
        alpha = np.clip(cv2.resize(part, size, interpolation=cv2.INTER_LINEAR) * 40 + 0.5, 0, 1)
        density = render(healthy, size[1], size[0], stain, rng)
        if (focus[rows, columns] > 0).any():
            inside = cv2.resize(focus[rows, columns], size, interpolation=cv2.INTER_LINEAR)
            share = np.clip(inside + 0.5, 0, 1)[..., None]  # a seam of one mask pixel
            density = density * (1 - share) + render(lesion, size[1], size[0], stain, rng) * share
        density *= alpha[..., None]
        mask[rows, columns] &= cover_of(density)
        glass = image[rows.start * MASK_STEP :, columns.start * MASK_STEP :][: size[1], : size[0]]
        glass[:] = (glass * np.exp(-1.15 * density)).astype(np.uint8)
    return image, mask & (focus > 0)


def make_slide(number: int, output_dir: Path, seed: int) -> dict[str, str]:
    """Make one slide and its mask unless both are there; its record. The slide is written last, and marks the pair."""
    import cv2
    import numpy as np

    from demo.reports import CASES
    from slide_features import atomic_path

    cases = lesion_cases()
    case = cases[number % len(cases)]
    path = output_dir / "slides" / f"FOC_{number:03d}.tiff"
    if not path.exists():
        cv2.setNumThreads(1)
        image, lesion = draw_focal_slide(case, np.random.default_rng([seed, number]))
        _, png = cv2.imencode(".png", lesion * 255)
        with atomic_path(output_dir / "lesions" / f"{path.stem}.png") as temporary:
            temporary.write_bytes(png.tobytes())
        write_slide(path, image)
    return {"id": path.name, "report": CASES[case].report}


def main() -> int:
    args = parse_arguments()
    settings = {"num_slides": args.num_slides, "seed": args.seed}
    kept = args.output_dir / "make_focal_slides.json"
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise ValueError(f"the slides in {args.output_dir} were made with other flags; remove them or name another")
    write_json(kept, settings)

    from tqdm import tqdm

    make = partial(make_slide, output_dir=args.output_dir, seed=args.seed)
    with ProcessPoolExecutor(args.num_workers) as pool:
        records = list(tqdm(pool.map(make, range(args.num_slides)), total=args.num_slides, unit="slide"))
    write_json(args.output_dir / "focal.json", records)
    print(f"{counted(len(records), 'slide')} with a focus in {args.output_dir}", file=sys.stderr)
    return DONE


if __name__ == "__main__":
    run(main)
