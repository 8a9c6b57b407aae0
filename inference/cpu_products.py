"""Products of float32 matrices on a CPU by oneDNN, as compiled models of PyTorch compute them.

PyTorch's own linear layers call its BLAS, MKL, which leaves half of what an AMD processor with AVX-512 can do unused.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (…, X) times the transpose of a matrix (Y, X): (…, Y); by oneDNN where no gradient is wanted."""
    if not _suits(rows, weight):
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def product(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows (G, H, N, X) times the transposes of matrices (G, H, Y, X): (G, H, N, Y); likewise where G and H are 1."""
    if weights.shape[:2] == (1, 1):
        return linear(rows, weights[0, 0])
    return rows @ weights.transpose(2, 3)


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a model compute by :func:`linear`; quantised ones and other kinds stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)


def _forward(layer: nn.Linear, rows: Tensor) -> Tensor:
    return linear(rows, layer.weight, layer.bias)


def _suits(rows: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and rows.device.type == weight.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # whose own operation of this name takes frozen weights only
    )
