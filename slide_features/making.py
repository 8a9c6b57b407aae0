"""What a feature file says of how it was made."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class MakingFact(NamedTuple):
    """A setting that decides patch tokens or which tiles have one.

    Attributes:
        unsaid: what a file means that does not say it; None where that is unknown, and then it is not compared.
        must_agree: whether files that differ in it must not be mixed.
    """

    unsaid: Any = None
    must_agree: bool = False


# The one list of what a feature file says of its making, beside the encoder. A model keeps them in vlm.json, and a new
# slide is tiled and encoded by them: each is an argument of `stage0_tiling.encoding.encode_slide`.
MAKING_FACTS = {
    "tile_size": MakingFact(must_agree=True),
    "mpp": MakingFact(must_agree=True),
    "overlap": MakingFact(),
    "min_tissue": MakingFact(),
    "tissue_method": MakingFact("otsu"),
    "segmenter": MakingFact(),
    "max_pen": MakingFact(1.0),
    "max_fold": MakingFact(1.0),
    "max_blur": MakingFact(1.0),
    "max_edge": MakingFact(1.0),
    "icc": MakingFact(False, must_agree=True),
    "stain_normalizer": MakingFact("none", must_agree=True),
    "stain_target": MakingFact("", must_agree=True),
}


def with_unsaid(said: Mapping[str, Any]) -> dict[str, Any]:
    """Every one of `MAKING_FACTS`: as said, else what a file means that does not say it."""
    known = {name: value for name, value in said.items() if value is not None}
    return {name: known.get(name, fact.unsaid) for name, fact in MAKING_FACTS.items()}


def worth_saying(making: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `MAKING_FACTS` in `making` that a file must say: all but what it means without them."""
    return {
        name: making[name]
        for name, fact in MAKING_FACTS.items()
        if making.get(name) is not None and making[name] != fact.unsaid
    }
