"""Position codes: where on the slide each patch token lies."""

import math

import torch
from torch import Tensor, nn

SHORTEST_UM = 256.0  # two tiles of 256 px at 0.5 um: neighbours differ
LONGEST_UM = 131_072.0  # beyond the length of a slide, 75 mm
NUM_WAVELENGTHS = 16
UNKNOWN_UM_PER_PX = 0.5  # where a feature file does not say: its positions are taken as pixels of a tile grid at 20x
UM_PER_IMAGE_PATCH = 128.0  # an image has no micrometres: one patch of its grid stands as one tile


class PositionCodes(nn.Module):
    """``sincos``: sines and cosines of the place in micrometres, through a learned matrix, added to each patch token.

    The codes of Vaswani et al. (2017) for both axes, with wavelengths from two tiles to a whole slide. Micrometres, so
    that the same tissue has the same codes from every scanner; counted from the corner of the slide's tissue, so that
    it does not matter where on the glass the tissue lies. The matrix begins at zero, and a model as it would without.
    """

    def __init__(self, width: int):
        super().__init__()
        steps = torch.linspace(0, 1, NUM_WAVELENGTHS, dtype=torch.float64)
        wavelengths = SHORTEST_UM * (LONGEST_UM / SHORTEST_UM) ** steps
        self.register_buffer("radians_per_um", (2 * math.pi / wavelengths).float(), persistent=False)
        self.mixing = nn.Linear(4 * NUM_WAVELENGTHS, width, bias=False)
        nn.init.zeros_(self.mixing.weight)

    def forward(self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, um_per_unit: Tensor | float) -> Tensor:
        """Add codes to patch tokens.

        Args:
            patch_tokens: (B, N, E).
            coords: (B, N, 2) integers, (x, y) in level-0 pixels or any other unit.
            patch_mask: (B, N).
            um_per_unit: micrometres of one such unit, (B,) or one for all.

        Returns:
            (B, N, E).
        """
        far = torch.iinfo(torch.int64).max
        low = coords.long().masked_fill(~patch_mask.unsqueeze(-1), far).amin(1, keepdim=True)
        offset = (coords - low).masked_fill(~patch_mask.unsqueeze(-1), 0).to(self.radians_per_um.dtype)
        if isinstance(um_per_unit, Tensor):
            um_per_unit = um_per_unit.to(offset.dtype)[:, None, None]
        angles = (offset * um_per_unit).unsqueeze(-1) * self.radians_per_um  # (B, N, 2, wavelengths)
        codes = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return patch_tokens + self.mixing(codes.to(self.mixing.weight.dtype)).to(patch_tokens.dtype)


class NoPositionCodes(nn.Module):
    """``none``: patch tokens as they are; where they lie is said by their order alone."""

    def forward(self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, um_per_unit: Tensor | float) -> Tensor:
        """As :class:`PositionCodes`."""
        return patch_tokens


def build_position_codes(name: str, width: int) -> nn.Module:
    """Position codes for patch tokens of width E: ``none`` or ``sincos``.

    Raises:
        ValueError: another name.
    """
    if name == "none":
        return NoPositionCodes()
    if name == "sincos":
        return PositionCodes(width)
    raise ValueError(f"--position_codes {name!r} is unknown; use none or sincos")
