"""How an encoder of images or texts learns: in full, through LoRA, also over four-bit weights, or not at all."""

import copy

import torch
from torch import nn

from encoder_lora import ENCODER_LORA_TARGETS
from four_bit import KEPT_LINEAR, FourBit, quantize

WAYS = ("full", "lora", "qlora", "frozen")


def choose_what_learns(
    backbone: nn.Module, way: str, *, flag: str, rank: int, alpha: float, dropout: float, device: torch.device
) -> None:
    """Freeze or free the weights of ``backbone``, or put adapters on its attention and feed-forward layers.

    Args:
        backbone: a model of timm or transformers.
        way: one of `WAYS`.
        flag: that the user gave, for what is refused.
        rank: of the LoRA matrices.
        alpha: LoRA's scale is alpha / rank.
        dropout: in front of the LoRA matrices, while training.
        device: that four-bit weights go to.

    Raises:
        ValueError: the model has no layers for LoRA, or bitsandbytes does not open.
    """
    backbone.requires_grad_(way == "full")
    if way in ("full", "frozen"):
        return
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] in ENCODER_LORA_TARGETS
    ]
    if not layers:
        raise ValueError(f"{flag} {way}: the model has no attention or feed-forward layers that LoRA knows; use full")
    if way == "qlora":
        kept = {name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if type(module) is nn.Linear}
        form = FourBit(kept=tuple(sorted((kept - ENCODER_LORA_TARGETS) | set(KEPT_LINEAR))))
        quantize(backbone, form, device)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers, bias="none")
    inject_adapter_in_model(config, backbone)


@torch.no_grad()
def merged(backbone: nn.Module) -> nn.Module:
    """The model itself, or, when it wears adapters, a plain copy on the CPU into whose weights they are added.

    Four-bit weights become the full ones that they stand for.
    """
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in backbone.modules()):
        return backbone
    plain = copy.deepcopy(backbone)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, LoraLayer):
            linear = _plain_linear(layer.get_base_layer())
            for adapter in layer.active_adapters:
                linear.weight += layer.get_delta_weight(adapter).to(linear.weight.dtype)
            linear.training = layer.training
            plain.set_submodule(name, linear)
    plain.is_loaded_in_4bit = False
    return plain.cpu()


def _plain_linear(layer: nn.Linear) -> nn.Linear:
    """The layer itself, or of a four-bit one a full one with the very weights that it computes with."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(state)
    state.dtype = layer.compute_dtype
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight = nn.Parameter(dequantize_4bit(layer.weight.data, state), requires_grad=False)
    linear.bias = layer.bias
    return linear
