"""Embeddings of texts by a transformers model given by name or folder: embedding cosine, BERTScore, REG's EMB."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_TOKENS = 512


class TextEncoder:
    """A transformers encoder in evaluation mode; texts are cut at 512 tokens (or what the model takes, if fewer)."""

    def __init__(self, model: str | Path, *, device: str = "cpu", batch_size: int = 32):
        """Load tokenizer and model from the local cache or a folder. ValueError when they do not load."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(model))
            self.model = AutoModel.from_pretrained(str(model), use_safetensors=True).eval().to(device)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--embedding_model {model}: does not load ({str(error).splitlines()[0]})") from None
        self.torch, self.device, self.batch_size = torch, device, batch_size
        positions = getattr(self.model.config, "max_position_embeddings", MAX_TOKENS)
        self.max_tokens = min(MAX_TOKENS, positions)

    def batches(self, texts: Sequence[str], layer: int = -1) -> Iterator[tuple[list[int], Any, Any, Any]]:
        """Yield (places in `texts`, hidden states (B, T, H), mask (B, T), mask without special tokens (B, T))."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            tokens = self.tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_special_tokens_mask=True,
                return_tensors="pt",
            ).to(self.device)
            special = tokens.pop("special_tokens_mask")
            with self.torch.inference_mode():
                states = self.model(**tokens, output_hidden_states=True).hidden_states[layer]
            mask = tokens["attention_mask"]
            yield places, states.float(), mask.bool(), (mask.bool() & ~special.bool())

    def mean_pooled(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the last hidden states over all tokens of a text, (N, H) float32."""
        rows: np.ndarray | None = None
        for places, states, mask, _ in self.batches(texts):
            weights = mask.unsqueeze(-1).float()
            pooled = ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).cpu().numpy()
            rows = np.zeros((len(texts), pooled.shape[1]), dtype=np.float32) if rows is None else rows
            rows[places] = pooled
        return rows if rows is not None else np.zeros((0, 1), dtype=np.float32)
