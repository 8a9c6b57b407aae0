"""Projectors: each token by itself from the reducer's width to that of the language model."""

import re

import torch
from torch import Tensor, nn


class FixedRMSNorm(nn.Module):
    """RMSNorm without a learned scale whose output has exactly the root mean square ``output_rms``.

    Gemma-3n's own soft tokens leave through the same norm at 1.0; other language models get the root mean square of
    their text embeddings, so that visual tokens arrive at the magnitude the frozen layers expect.
    """

    def __init__(self, output_rms: float = 1.0, eps: float = 1e-6):
        super().__init__()
        self.output_rms = output_rms
        self.eps = eps

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise (..., H) over the last dimension; computed in at least float32, returned in the input's dtype."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        return (self.output_rms * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(tokens.dtype)


class BoundedScale(nn.Module):
    """One learned scale on all tokens, between ``low`` and ``high``, that begins in the middle.

    The gamma of a WSI-LLaVA (github.com/Desperadodo/UCL_2025_FYP, after Liang et al. 2025): a sigmoid bounds it, so
    that training cannot blow visual tokens up beyond the text.
    """

    def __init__(self, low: float = 0.5, high: float = 1.5):
        super().__init__()
        self.low = low
        self.high = high
        self.logit = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale (..., H)."""
        return tokens * (self.low + (self.high - self.low) * torch.sigmoid(self.logit)).to(tokens.dtype)


def build_projector(name: str, token_width: int, llm_width: int, output_rms: float = 1.0) -> nn.Sequential:
    """Projector from the reducer's tokens (..., R) to visual tokens (..., H), closed by :class:`FixedRMSNorm`.

    Args:
        name: one of

            - ``linear``
            - ``identity``, where R is H already
            - ``mlp{n}x_gelu`` with n >= 1 linear layers and GELU between them (LLaVA-1.5's ``mlp2x_gelu``, Liu et al.
              2024)
            - ``ln_mlp{n}x_gelu``, the same behind a LayerNorm (InternVL's, Chen et al. 2024)
            - ``mlp{n}x_gelu_gamma``, with a LayerNorm after each linear layer but the last and :class:`BoundedScale` on
              the normalised output
        token_width: R, the width of the tokens.
        llm_width: H, the hidden width of the language model.
        output_rms: root mean square of every visual token, before a learned scale.

    Raises:
        ValueError: the name is none of these, or ``identity`` of another width.
    """
    if name == "identity":
        if token_width != llm_width:
            raise ValueError(
                f"--projector identity needs tokens as wide as the language model, {llm_width}, not {token_width}; "
                "use linear"
            )
        return nn.Sequential(FixedRMSNorm(output_rms))
    match = re.fullmatch(r"(ln_)?mlp([1-9])x_gelu(_gamma)?", name)
    if name != "linear" and not match:
        raise ValueError(
            f"--projector {name!r} is unknown; use linear, identity, mlp2x_gelu (mlp1x_gelu to mlp9x_gelu, with ln_ in "
            "front or _gamma behind), pixel_shuffle, perceiver or qformer"
        )
    norm_first, num_linear, has_gamma = match.groups() if match else (None, 1, None)
    layers: list[nn.Module] = [nn.LayerNorm(token_width)] if norm_first else []
    layers.append(nn.Linear(token_width, llm_width))
    for _ in range(int(num_linear) - 1):
        layers += [nn.LayerNorm(llm_width)] if has_gamma else []
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    layers.append(FixedRMSNorm(output_rms))
    return nn.Sequential(*layers, BoundedScale()) if has_gamma else nn.Sequential(*layers)
