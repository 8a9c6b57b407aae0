"""Where the tissue of a slide comes from: the user's mask, a segmentation network or a method; and their flags."""

import logging
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from stage0_tiling.artefacts import ARTEFACTS
from stage0_tiling.slide import PixelSize, Slide
from stage0_tiling.tissue import TissueMask, find_tissue, read_thumbnail
from stage0_tiling.tissue_methods import METHODS
from stage0_tiling.user_masks import check_masks, find_mask, read_mask

logger = logging.getLogger("stage0_tiling")


@dataclass(frozen=True)
class TissueSources:
    """Files that tissue is found with, as this machine names them; what they are is told by TilingSettings.

    Attributes:
        masks: folder of the user's masks; None without.
        segmenter: file of a segmentation network; None without.
        preset: settings of the segmenter, where its file does not tell them.
        quality: whether blur is measured though no tile is dropped for it.
    """

    masks: Path | None = None
    segmenter: Path | None = None
    preset: str | None = None
    quality: bool = False

    def find(self, slide: Slide, pixel_size: PixelSize, method: str, slide_id: str) -> TissueMask:
        """Find the tissue of a slide: from its mask, else by the segmenter, else by the method.

        Raises:
            SlideError: if its mask cannot be read or does not fit.
        """
        path = self.masks and find_mask(self.masks, slide_id)
        if path:
            picture, _ = read_thumbnail(slide, pixel_size)
            height, width = picture.shape[:2]
            mask = read_mask(path, (height, width), slide.width, slide.height, origin=slide.bounds[:2])
            return TissueMask(mask, picture, width / slide.width, height / slide.height)
        if self.masks:
            other = "by the segmenter" if self.segmenter else f"by {method}"
            logger.info("%s has no mask in %s; its tissue is found %s", slide_id, self.masks, other)
        if self.segmenter:
            from stage0_tiling.segmenter import load_segmenter, segment

            return segment(slide, pixel_size, load_segmenter(self.segmenter, self.preset))
        return find_tissue(slide, pixel_size, method)

    def check_segmenter(self, wanted: str | None) -> None:
        """Refuse to find tissue without the network that is asked for, or by another one.

        Args:
            wanted: `Segmenter.name`, as settings and feature files tell it; None for no network.

        Raises:
            ValueError, OSError: if its file is not given, cannot be loaded, or holds another network.
        """
        if wanted is None:
            if self.segmenter:
                raise ValueError(f"--segmenter {self.segmenter}: the tiles are to be found without a network")
            return
        if self.segmenter is None:
            raise ValueError(f"the tissue is to be found by the network {wanted}: say with --segmenter where it lies")
        from stage0_tiling.segmenter import load_segmenter

        found = load_segmenter(self.segmenter, self.preset).name
        if found.rpartition("#")[2] != wanted.rpartition("#")[2]:
            raise ValueError(f"--segmenter {self.segmenter} is the network {found}, not {wanted}")


def add_tissue_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("Tissue and quality")
    group.add_argument(
        "--tissue_method",
        choices=METHODS,
        default="otsu",
        help="otsu: a threshold on colour found for each slide; hsv: the same bounds for all slides, H&E only; "
        "entropy: by texture, for unstained, pale and immunostained slides",
    )
    group.add_argument(
        "--segmenter",
        default=None,
        help="segmentation network for tissue: TorchScript (runs code: trust its source), safetensors with a .json "
        "beside it, or with --segmenter_preset a published checkpoint; used instead of --tissue_method",
    )
    group.add_argument(
        "--segmenter_preset",
        choices=("grandqc-tissue", "hest"),
        default=None,
        help="architecture and settings of the published checkpoint that --segmenter names",
    )
    group.add_argument(
        "--masks",
        default=None,
        help="folder of tissue masks <slide_id>.geojson, .json (QuPath, level-0 pixels) or .png (above 0 is tissue); "
        "slides without one are done by the segmenter or the method",
    )
    what = {
        "pen": "marker or black ink",
        "fold": "a tissue fold, or other tissue far denser than the slide's",
        "blur": "out of focus; below 1 every tile is also read at 1 um/px",
        "edge": "a dark band along the slide's border, or the edge of a coverslip",
    }
    for name in ARTEFACTS:
        text = f"largest fraction of a tile that is {what[name]}, 0 to 1; 1 keeps all"
        group.add_argument(f"--max_{name}", type=float, default=1.0, help=text)
    group.add_argument(
        "--quality",
        action="store_true",
        help="record the blur of each tile in coords/ as well, which reads every tile at 1 um/px; pen, fold, edge and "
        "tissue are always recorded",
    )


def tissue_sources(args: Namespace) -> TissueSources:
    """Check the files that the flags name.

    Raises:
        ValueError, OSError: naming the flag, if a file is not there or not of its kind.
    """
    masks = check_masks(args.masks).absolute() if args.masks else None
    return TissueSources(masks, *segmenter_file(args), quality=args.quality)


def segmenter_file(args: Namespace) -> tuple[Path | None, str | None]:
    """The file and the preset that the flags name, absolute: workers may run in other folders.

    Raises:
        ValueError: if there is a preset without a file.
    """
    if args.segmenter_preset and not args.segmenter:
        raise ValueError(f"--segmenter_preset {args.segmenter_preset}: say with --segmenter where its checkpoint lies")
    return Path(args.segmenter).expanduser().absolute() if args.segmenter else None, args.segmenter_preset
