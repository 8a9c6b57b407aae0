"""Four-bit weights (nf4 with double quantisation, QLoRA of Dettmers et al. 2023) for a frozen language model.

The model is loaded in full first, so that its fingerprint is that of its files, and then quantised layer by layer. The
layers are bitsandbytes' and the codes are those of ``from_pretrained(quantization_config=…)``.
"""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

# lm_head as transformers leaves it; the other three are Gemma-3n's AltUp, which reads and clamps them as matrices.
KEPT_LINEAR = ("lm_head", "correction_coefs", "prediction_coefs", "modality_router")


@dataclass(frozen=True)
class FourBit:
    """How the weights of linear layers are held, as ``vlm.json`` says it.

    Attributes:
        weights_dtype: what the weights were rounded to before they were quantised.
        quant_storage: dtype of the stored bytes; FSDP2 shards bfloat16, but not bitsandbytes' own uint8.
        quant_type: bitsandbytes' name of the code.
        double_quantization: whether the scales are quantised too.
        kept: names of linear layers that stay as they are.
    """

    weights_dtype: str = "float32"
    quant_storage: str = "bfloat16"
    quant_type: str = "nf4"
    double_quantization: bool = True
    kept: tuple[str, ...] = KEPT_LINEAR

    def to_json(self) -> dict:
        """The same as plain values."""
        return asdict(self) | {"kept": list(self.kept)}


def quantize(llm: PreTrainedModel, form: FourBit, device: str | torch.device = "cpu") -> None:
    """Put 4-bit layers in the place of the linear layers of ``llm``, on ``device``, which is never given the full ones.

    Layers compute in the dtype that ``llm`` has.

    Raises:
        ValueError: bitsandbytes is missing or does not run here.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(f"4-bit weights need bitsandbytes, which does not open here ({error})") from error

    for name, linear in list(llm.named_modules()):
        if type(linear) is not nn.Linear or name.rsplit(".", 1)[-1] in form.kept:
            continue
        weight, bias = linear.weight.detach(), linear.bias
        with torch.device("meta"):
            layer = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias is not None,
                compute_dtype=weight.dtype,
                compress_statistics=form.double_quantization,
                quant_type=form.quant_type,
                quant_storage=getattr(torch, form.quant_storage),
            )
        layer.weight = Params4bit(
            weight.to(getattr(torch, form.weights_dtype)),
            compress_statistics=form.double_quantization,
            quant_type=form.quant_type,
            quant_storage=getattr(torch, form.quant_storage),
            module=layer,
        ).to(device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
        # On CPUs with AVX-512 bf16 the layer would repack its weights for ever when it is first read without gradient,
        # and compute in bfloat16 from then on.
        layer.support_avx512bf16_for_cpu = False
        layer.training = linear.training
        llm.set_submodule(name, layer)
    llm.is_loaded_in_4bit = True  # peft asks


def dequantize(llm: PreTrainedModel) -> None:
    """Put linear layers in the place of the 4-bit ones, with the very weights that those compute with."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(llm.named_modules()):
        if not isinstance(layer, Linear4bit):
            continue
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        state = copy.copy(layer.weight.quant_state)
        state.dtype = layer.compute_dtype  # a 4-bit layer expands its codes straight to the dtype that it computes in
        weight = dequantize_4bit(layer.weight.data, state)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = layer.bias
        linear.training = layer.training
        llm.set_submodule(name, linear)
    llm.is_loaded_in_4bit = False
