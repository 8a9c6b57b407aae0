"""Small pictures whose colour is their class, for the classifier."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"reddish": (200, 60, 60), "greenish": (60, 200, 60), "bluish": (60, 60, 200)}


def make_pictures(root: Path) -> Path:
    """Write 24 pictures of 20 px and labels.csv, two pictures of each patient; the folder."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = ["id,label,group"]
    for number in range(24):
        name = list(COLORS)[number // 2 % 3]
        noisy = np.clip(np.array(COLORS[name]) + rng.integers(-30, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / f"{number}.png")
        rows.append(f"{number}.png,{name},patient{number // 2}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root
