r"""Make small slides with reports: pyramidal, tiled JPEG TIFF at 0.5 um/px, which any slide reader opens.

    python demo/make_slides.py --output_dir demo/output --num_train 200 --num_test 48

Writes:

    OUT/slides/PIT_<centre>_<patient>_<slide>.tiff   levels of 0.5, 1 and 2 um/px, 1536 to 2304 px a side
    OUT/masks/<slide_id>.png           exact tissue mask, 255 is tissue; a pixel is 4 um, 8 x 8 pixels of level 0
    OUT/train.json  OUT/test.json      [{"id", "report"}], no patient in both
    OUT/make_slides.json               the flags; a folder made with other flags is refused

Texture follows organ, diagnosis and grade. Shape, size, staining, background and pen are drawn independently of them.
The same seed gives the same files, whatever the number of workers; slides already there are kept.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from command_line import DONE, counted, make_parser, run

MASK_STEP = 8  # level-0 pixels per mask pixel
SIDES = range(1536, 2305, 256)
JPEG_QUALITY = 82
SLIDES_PER_SECOND_CYCLE = 3  # each third round over the classes gives second slides of the round before
PEN_COLOURS = ((30, 40, 150), (20, 95, 60), (25, 25, 30), (150, 30, 40))


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("slides")
    group.add_argument("--output_dir", type=Path, default=Path("demo/output"), help="folder that receives them")
    group.add_argument("--num_train", type=int, default=200, help="number of training slides")
    group.add_argument("--num_test", type=int, default=48, help="number of test slides, of other patients")
    group.add_argument("--seed", type=int, default=0, help="seed of everything drawn")
    group.add_argument("--num_workers", type=int, default=2, help="number of processes")
    return parser.parse_args(argv)


def check_settings(args: Namespace) -> None:
    """Refuse counts that make nothing and a folder made with other flags; note the flags in the folder."""
    for flag, least in (("num_train", 1), ("num_test", 1), ("seed", 0), ("num_workers", 1)):
        if args[flag] < least:
            raise ValueError(f"--{flag} is {args[flag]}; give {least} or more")
    settings = {flag: args[flag] for flag in ("num_train", "num_test", "seed")}
    path = args.output_dir / "make_slides.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        made_with = " ".join(f"--{flag} {value}" for flag, value in json.loads(path.read_text()).items())
        raise ValueError(
            f"the slides in {args.output_dir} were made with {made_with}; remove them or name another folder"
        )
    write_json(path, settings)


def list_slides(split: str, count: int) -> list[tuple[str, int]]:
    """Plan `count` slides as (file name, class); classes take turns, so none has more than one slide above another."""
    from demo.reports import CASES

    plan = []
    for index in range(count):
        turn, case = divmod(index, len(CASES))
        is_second = turn % SLIDES_PER_SECOND_CYCLE == SLIDES_PER_SECOND_CYCLE - 1
        patient = (turn - is_second) * len(CASES) + case + 1 + (0 if split == "train" else 50_000)
        plan.append((f"PIT_{patient % 6 + 1:02d}_{patient:05d}_{1 + is_second:02d}.tiff", case))
    return plan


def outline(height: int, width: int, rng: Any) -> Any:
    """Draw one to three pieces, or one to three needle cores, as a smooth field that is positive inside tissue."""
    import cv2
    import numpy as np

    from demo.textures import smooth_noise

    field = np.full((height, width), -1.0, np.float32)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    is_core, count = rng.random() < 0.4, int(rng.integers(1, 4))
    lanes = rng.permutation(count)
    upright = rng.random() < 0.5
    long_side, short_side = (height, width) if upright else (width, height)
    lane = short_side / count
    for number in lanes:
        middle = (number + 0.5) * lane + rng.uniform(-0.05, 0.05) * lane
        along, across = (ys, xs) if upright else (xs, ys)
        start = long_side * rng.uniform(0.3, 0.7)
        if is_core:
            half_width = min(rng.uniform(28, 42), lane * 0.36)
            half_length = long_side * rng.uniform(0.3, 0.42)
            bend = rng.uniform(-8, 8) * np.sin(along / long_side * rng.uniform(2, 6))
            start = long_side / 2
            inside = np.minimum(half_width - np.abs(across - middle - bend), half_length - np.abs(along - start))
            field = np.maximum(field, inside / 40)
        else:
            a, b = long_side * rng.uniform(0.2, 0.3), min(lane * rng.uniform(0.34, 0.44), long_side * 0.36)
            start = np.clip(start, a + 12, long_side - a - 12)
            field = np.maximum(field, 1 - np.hypot((along - start) / a, (across - middle) / b))
    field += 0.06 * smooth_noise((height, width), 26, rng) + 0.02 * smooth_noise((height, width), 6, rng)
    border = np.minimum(np.minimum(ys, height - 1 - ys), np.minimum(xs, width - 1 - xs))
    return cv2.GaussianBlur(np.minimum(field, border / 8 - 0.5), (0, 0), 1.0)


def background(height: int, width: int, rng: Any) -> Any:
    """Draw glass (height, width, 3) uint8: near white, on some slides grey, a little uneven."""
    import cv2
    import numpy as np

    from demo.textures import smooth_noise

    level = rng.uniform(205, 222) if rng.random() < 0.2 else rng.uniform(236, 248)
    tint = rng.normal(0, 1.5, 3)
    shade = 1 + 0.008 * smooth_noise((height // 16, width // 16), 40, rng)
    glass = np.clip(level * shade[..., None] + tint, 0, 255).astype(np.uint8)
    return cv2.resize(glass, (width, height), interpolation=cv2.INTER_LINEAR)


def draw_pen(image: Any, mask: Any, rng: Any) -> None:
    """Draw a pen stroke into `image`, on the glass or touching a piece's edge, as wide as a marker's."""
    import cv2
    import numpy as np

    height, width = mask.shape
    y, x = np.argwhere(cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5) > rng.uniform(4, 24))[rng.integers(1000)]
    steps = np.cumsum(rng.normal(0, 7, (6, 2)) + rng.normal(0, 14, 2), 0) + (x, y)
    steps = np.clip(steps, 4, [width - 5, height - 5]) * MASK_STEP
    ink = np.zeros(image.shape[:2], np.uint8)
    thickness = int(rng.integers(50, 90))
    cv2.polylines(ink, [steps.astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
    cover = cv2.GaussianBlur(ink, (0, 0), 3).astype(np.float32)[..., None] / 255 * 0.85
    colour = np.array(PEN_COLOURS[rng.integers(len(PEN_COLOURS))], np.float32)
    image[:] = (image * (1 - cover) + colour * cover).astype(np.uint8)


def draw_slide(case: int, rng: Any) -> tuple[Any, Any]:
    """Draw a slide of class `case`: image (height, width, 3) and mask (height / 8, width / 8), 1 is tissue; uint8."""
    import cv2
    import numpy as np

    from demo.reports import CASES
    from demo.textures import draw_stain, render

    height, width = (int(rng.choice(SIDES)) for _ in range(2))
    field = outline(height // MASK_STEP, width // MASK_STEP, rng)
    mask = (field > 0).astype(np.uint8)
    image, stain = background(height, width, rng), draw_stain(rng)
    has_pen = rng.random() < 0.25
    texture_rng = np.random.default_rng(rng.integers(2**63))  # a class that draws more must not move what follows

    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask)
    for left, top, box_width, box_height, _ in boxes[1:]:
        # The field is read one pixel beyond the piece, so that the enlarged edge passes where the mask says.
        rows, columns = slice(max(top - 1, 0), top + box_height + 1), slice(max(left - 1, 0), left + box_width + 1)
        part = field[rows, columns]
        size = (part.shape[1] * MASK_STEP, part.shape[0] * MASK_STEP)
        alpha = np.clip(cv2.resize(part, size, interpolation=cv2.INTER_LINEAR) * 40 + 0.5, 0, 1)
        density = render(CASES[case].tissue, size[1], size[0], stain, texture_rng) * alpha[..., None]
        mask[rows, columns] &= cover_of(density)
        glass = image[rows.start * MASK_STEP :, columns.start * MASK_STEP :][: size[1], : size[0]]
        glass[:] = (glass * np.exp(-1.15 * density)).astype(np.uint8)
    if has_pen:
        draw_pen(image, mask, rng)
    return image, mask


def cover_of(density: Any) -> Any:
    """Mask (height / 8, width / 8) uint8 of a piece's optical density: what is stained, and spaces enclosed by it.

    An air space that opens at the piece's edge looks like glass and is glass.
    """
    import cv2
    import numpy as np

    stained = cv2.resize(density[..., 1], None, fx=1 / MASK_STEP, fy=1 / MASK_STEP, interpolation=cv2.INTER_AREA) > 0.1
    closed = cv2.morphologyEx(stained.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    framed = cv2.copyMakeBorder(closed, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(framed, None, (0, 0), 2)
    return (framed[1:-1, 1:-1] != 2).astype(np.uint8)


def write_slide(path: Path, image: Any) -> None:
    """Write (height, width, 3) uint8 as a tiled JPEG pyramid of three levels with its resolution."""
    import cv2
    import tifffile

    from demo.textures import MPP
    from slide_features import atomic_path

    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as file:
        for level in range(3):
            pixels_per_cm = 1e4 / (MPP * 2**level)
            file.write(
                image,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                software="SlideScribe demo",
                metadata=None,
            )
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def make_slide(task: tuple[str, int], output_dir: Path, seed: int) -> None:
    """Make one slide and its mask unless both are there; the slide, written last, marks the pair as whole."""
    import cv2
    import numpy as np

    from slide_features import atomic_path

    name, case = task
    path = output_dir / "slides" / name
    if path.exists():
        return
    cv2.setNumThreads(1)
    image, mask = draw_slide(case, np.random.default_rng([seed, *name.encode()]))
    _, png = cv2.imencode(".png", mask * 255)
    with atomic_path(output_dir / "masks" / f"{path.stem}.png") as temporary:
        temporary.write_bytes(png.tobytes())
    write_slide(path, image)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    from slide_features import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    check_settings(args)

    from tqdm import tqdm

    from demo.reports import CASES

    plans = {"train": list_slides("train", args.num_train), "test": list_slides("test", args.num_test)}
    tasks = [task for plan in plans.values() for task in plan]
    make = partial(make_slide, output_dir=args.output_dir, seed=args.seed)
    with ProcessPoolExecutor(args.num_workers) as pool:
        for _ in tqdm(pool.map(make, tasks), total=len(tasks), desc="slides", unit="slide"):
            pass
    for split, plan in plans.items():
        records = [{"id": name, "report": CASES[case].report} for name, case in plan]
        write_json(args.output_dir / f"{split}.json", records)
    print(f"{counted(len(tasks), 'slide')} of {len(CASES)} classes in {args.output_dir}", file=sys.stderr)
    return DONE


if __name__ == "__main__":
    run(main)
