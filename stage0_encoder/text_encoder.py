"""Text encoders: any transformers text model, texts to one vector each.

    encoder = load_text_encoder("microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext")
    tokens = encoder.tokens(max_tokens=256)
    encoder(*tokens.pad([tokens.ids_of(text) for text in texts]))     (B, D)

Shapes: B texts, T tokens, D width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from language_model import load_tokenizer, why_not_opened

POOLINGS = ("auto", "pooler", "cls", "mean", "eos")
ELSEWHERE = "give a transformers text model, by hub name or folder, with --text_model"


@dataclass(frozen=True)
class TextTokens:
    """Texts to token ids, without the model.

    Attributes:
        tokenizer: of the model.
        max_tokens: a longer text loses its end.
        fixed_length: tokens that every text is padded to; None for the longest of a batch.
        pad_id: id of padding.
    """

    tokenizer: Any
    max_tokens: int
    fixed_length: int | None
    pad_id: int

    def ids_of(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens of the model."""
        return self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]

    def pad(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(B, T) int64 ids, padded behind, and the (B, T) boolean mask of real tokens."""
        length = self.fixed_length or max(1, max(map(len, ids)))
        ids_BT = torch.full((len(ids), length), self.pad_id, dtype=torch.int64)
        mask_BT = torch.zeros(len(ids), length, dtype=torch.bool)
        for row, of_text in enumerate(ids):
            ids_BT[row, : len(of_text)] = torch.tensor(of_text, dtype=torch.int64)
            mask_BT[row, : len(of_text)] = True
        return ids_BT, mask_BT


class TextEncoder(nn.Module):
    """A transformers text model and its tokenizer.

    Attributes:
        backbone: the model itself.
        tokenizer: its tokenizer.
        name: what `load_text_encoder` opens again.
        pooling: how one vector is made of the tokens: `pooler` (the model's own), `cls` (first token), `mean` (of the
            real tokens) or `eos` (last real token).
        width: D.
        fixed_length: tokens that every text is padded to, where the model was trained so; None where to the longest.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Any, *, name: str, pooling: str, fixed_length: int | None):
        """Wrap `backbone`."""
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.name = name
        self.pooling = pooling
        self.fixed_length = fixed_length
        config = backbone.config
        self.width = getattr(config, "hidden_size", None) or config.d_model
        if pooling == "pooler":
            self.width = getattr(config, "projection_size", None) or self.width

    def tokens(self, max_tokens: int) -> "TextTokens":
        """How texts become token ids for this model, of so many tokens at most."""
        max_tokens = min(max_tokens, config_length(self.backbone.config), self.fixed_length or 2**31)
        pad_id = self.tokenizer.pad_token_id
        return TextTokens(self.tokenizer, max_tokens, self.fixed_length, 0 if pad_id is None else pad_id)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D) from padded ids and their mask."""
        # SigLIP was trained on padded texts without a mask.
        masks = {} if self.fixed_length else {"attention_mask": mask_BT.long()}
        output = self.backbone(input_ids=ids_BT, **masks)
        if self.pooling == "pooler":
            return output.pooler_output
        tokens_BTD = output.last_hidden_state
        if self.pooling == "cls":
            return tokens_BTD[:, 0]
        if self.pooling == "eos":
            last_B = (mask_BT.sum(dim=1) - 1).clamp(min=0)
            return tokens_BTD[torch.arange(len(tokens_BTD), device=last_B.device), last_B]
        mask_BT1 = mask_BT[..., None]
        return tokens_BTD.masked_fill(~mask_BT1, 0).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)

    def save_pretrained(self, folder: Path, backbone: nn.Module) -> None:
        """Save `backbone`, which is the encoder's own or that with its adapters merged, and the tokenizer."""
        backbone.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"token_pooling": self.pooling}, indent=2))


def config_length(config: Any) -> int:
    """Tokens that the model has positions for; RoBERTa's begin behind its padding id."""
    length = getattr(config, "max_position_embeddings", None) or 2**31
    begins_late = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return length - (config.pad_token_id + 1 if begins_late else 0)


def load_text_encoder(name: str | Path, pooling: str = "auto") -> TextEncoder:
    """Open a text model, in evaluation mode on the CPU, in float32.

    Of CLIP and SigLIP the text tower is opened.

    Args:
        name: hub name or folder.
        pooling: one of `POOLINGS`. `auto` is the model's own pooler where its weights are in the checkpoint, else the
            last token of a causal model and the mean of others; a folder that was saved here says its own.

    Raises:
        ValueError: there is no such model, it lacks weights, or it has no pooler of its own though one is asked for.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
        is_joint = hasattr(config, "text_config") and hasattr(config, "vision_config")
        text_config = config.text_config if is_joint else config
        if getattr(text_config, "is_encoder_decoder", False):
            raise ValueError("it has an encoder and a decoder, and a text model of one part is needed")
        backbone, info = _model_class(text_config).from_pretrained(
            str(name), config=text_config, output_loading_info=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: no text model to open there ({why_not_opened(name, error)}); {ELSEWHERE}") from error
    tokenizer = load_tokenizer(name)
    missing = sorted(info["missing_keys"])
    of_body = [key for key in missing if "pooler" not in key]
    if of_body:
        raise ValueError(f"{name} lacks {len(of_body)} weights of a text model, e.g. {of_body[0]}; {ELSEWHERE}")
    is_siglip = text_config.model_type in ("siglip_text_model", "siglip2_text_model")
    is_clip = text_config.model_type == "clip_text_model"
    has_pooler = is_siglip or is_clip or (getattr(backbone, "pooler", None) is not None and not missing)
    if pooling == "auto":
        pooling = getattr(text_config, "token_pooling", None) or ("pooler" if has_pooler else _usual(text_config))
    if pooling == "pooler" and not has_pooler:
        raise ValueError(f"--text_pooling pooler: {name} has no pooler of its own; use cls, mean or eos")
    fixed = text_config.max_position_embeddings if is_siglip else None
    return TextEncoder(backbone.eval(), tokenizer, name=str(name), pooling=pooling, fixed_length=fixed)


def _usual(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return "eos" if config.model_type in CAUSAL and config.model_type not in MASKED else "mean"


def _model_class(config: Any) -> Any:
    import transformers

    towers = {
        "siglip_text_model": "SiglipTextModel",
        "siglip2_text_model": "Siglip2TextModel",
        "clip_text_model": "CLIPTextModel",
    }
    return getattr(transformers, towers.get(config.model_type, "AutoModel"))
