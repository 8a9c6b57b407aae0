"""Linear layers of a language model in 8 or 4 bits for inference, by bitsandbytes."""

import logging

import torch
from torch import Tensor, nn

from four_bit import KEPT_LINEAR

ADAPTERS = ("lora_A", "lora_B")


def _own_output(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A copy where gradients are asked for: Gemma-3n scales what comes of a layer in place, which a view forbids."""
    return output.clone() if output.requires_grad else output


def quantize_llm(llm: nn.Module, kind: str, device: str | torch.device) -> None:
    """Replace the linear layers of ``llm``, one by one, by 8-bit (``int8``) or 4-bit (``nf4``) ones on ``device``.

    int8 is LLM.int8() (Dettmers et al. 2022), nf4 that of QLoRA (Dettmers et al. 2023). Adapters stay as they are, and
    so do weights that are quantised already.

    Raises:
        ValueError: bitsandbytes is missing or does not run here.
    """
    try:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(f"--load_in needs bitsandbytes, which does not open here ({error})") from error
    # It says with every product that its input is rounded to float16 on the way to int8.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, linear in list(llm.named_modules()):
        if type(linear) is not nn.Linear or any(part in KEPT_LINEAR + ADAPTERS for part in name.split(".")):
            continue
        weight, bias, shape = linear.weight.detach(), linear.bias, (linear.in_features, linear.out_features)
        with torch.device("meta"):
            if kind == "int8":
                layer = Linear8bitLt(*shape, bias is not None, has_fp16_weights=False, threshold=6.0)
            else:
                layer = Linear4bit(*shape, bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
        if kind == "int8":
            layer.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
            layer.register_forward_hook(_own_output)
        else:
            layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
            layer.support_avx512bf16_for_cpu = False  # it would repack the weights and compute in bfloat16
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
        layer.training = linear.training
        llm.set_submodule(name, layer)
