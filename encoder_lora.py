"""LoRA adapters (Hu et al. 2021) on an image encoder of timm or transformers, merged into it when it is saved."""

import copy

from torch import nn

from image_encoder import ImageEncoder

# Attention and feed-forward layers of the vision transformers of timm, transformers and the published encoders.
ENCODER_LORA_TARGETS = frozenset(
    "qkv q kv k v proj fc1 fc2 fc1_g fc1_x w1 w2 w3 w12 query key value dense q_proj k_proj v_proj o_proj out_proj "
    "up_proj down_proj gate_proj weights_in weights_out".split()
)


def add_encoder_lora(encoder: ImageEncoder, *, rank: int, alpha: float, dropout: float) -> None:
    """Put adapters on the attention and feed-forward layers of ``encoder``; they alone learn.

    Raises:
        ValueError: it has no such layers, as convolutional networks have none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, module in encoder.backbone.named_modules()
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] in ENCODER_LORA_TARGETS
    ]
    if not layers:
        raise ValueError(
            f"--encoder_lora_rank: {encoder.name} has no attention or feed-forward layers that LoRA knows; "
            "use --train_ve instead"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers, bias="none")
    inject_adapter_in_model(config, encoder.backbone)


def merged_encoder(encoder: ImageEncoder) -> ImageEncoder:
    """The encoder itself, or, when it wears adapters, a copy on the CPU into whose weights they are added."""
    if not encoder.wears_lora:
        return encoder
    from peft.tuners.lora import LoraLayer

    merged = copy.deepcopy(encoder).cpu()
    for name, module in list(merged.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            merged.backbone.set_submodule(name, module.get_base_layer())
    return merged
