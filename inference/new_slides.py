"""Slides that have no features yet: tiled and encoded as the slides were that the model was trained on."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from command_line import counted


def add_slide_arguments(parser) -> None:
    """Flags about new slides, the same for one and for many."""
    group = parser.add_argument_group("New slides")
    group.add_argument(
        "--assume_mpp", type=float, default=None, help="um/px of a slide that states none or a wrong one"
    )
    group.add_argument("--tile_size", type=PositiveInt, default=None, help="pixels; default: as in training")
    group.add_argument("--mpp", type=PositiveFloat, default=None, help="um/px of tiles; default: as in training")
    group.add_argument(
        "--segmenter", default=None, help="network that found the tissue of the model's slides, where one did; its file"
    )
    group.add_argument("--segmenter_preset", choices=("grandqc-tissue", "hest"), default=None, help="as for tile.py")
    group.add_argument("--tile_batch_size", type=PositiveInt, default=64, help="tiles per forward pass of the encoder")
    group.add_argument("--num_workers", type=PositiveInt, default=4, help="threads that read tiles")


def tissue_sources_of(args):
    """Files that the tissue of a slide is found with."""
    from stage0_tiling.tissue_sources import TissueSources, segmenter_file

    segmenter, preset = segmenter_file(args)
    return TissueSources(segmenter=segmenter, preset=preset)


def check_slide_arguments(args, settings) -> None:
    """Refuse what would fail with every slide, before anything is loaded."""
    if args.assume_mpp is not None:
        from stage0_tiling.slide_list import check_mpp

        check_mpp(args.assume_mpp)
    tissue_sources_of(args).check_segmenter(settings.tiling.get("segmenter"))


class SlideReader:
    """Slides to patch tokens with the encoder of a model, which is loaded once."""

    def __init__(self, args, model):
        from inference.slide_tokens import load_encoders
        from slide_features import MAKING_FACTS

        settings = model.settings
        name = args.vision_model_name or settings.encoder
        given = {key: getattr(args, key) for key in ("tile_size", "mpp") if getattr(args, key) is not None}
        self.tiling = settings.tiling | given
        if name is None or not {"tile_size", "mpp"} <= self.tiling.keys():
            raise ValueError(
                f"{args.model} does not say how its slides were tiled and encoded (their feature files did not); say "
                "it with --vision_model_name, --tile_size and --mpp"
            )
        if unknown := self.tiling.keys() - MAKING_FACTS.keys():
            raise ValueError(f"{args.model} was trained on tiles with {', '.join(sorted(unknown))}; update SlideScribe")
        self.encoder, self.finish = load_encoders(settings, model.device, args.vision_model_name)
        self.sources = tissue_sources_of(args)
        self.args = args
        self.settings = settings

    def read(self, paths: Sequence[str | Path], of_slides: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Patch tokens and coordinates of a case of slides; ``of_slides`` may say assume_mpp and slide_mpp of each.

        Raises:
            ValueError, OSError: a slide cannot be read, or has no tissue.
        """
        from inference.answers import budgets_of
        from slide_reports import case_of_slides
        from stage0_tiling.encoding import encode_slide

        slides = []
        for path, of_slide in zip(paths, of_slides or [{}] * len(paths), strict=True):
            slide = encode_slide(
                path,
                self.encoder,
                **self.tiling,
                sources=self.sources,
                batch_size=self.args.tile_batch_size,
                num_workers=self.args.num_workers,
                **{"assume_mpp": self.args.assume_mpp} | of_slide,
            )
            print(f"{Path(path).name}: {counted(len(slide.coords), 'tile')}", file=sys.stderr)
            slides.append(self.finish(slide))
        return case_of_slides(slides, **budgets_of(self.settings))
