"""SlideVLM: an optional image encoder, position codes, a reducer, a projector and a causal language model, one module.

Patch tokens become visual tokens, which take the place of the placeholder in the embedded prompt. Any Hugging Face
causal language model works; the one way in which Gemma-3n differs (its per-layer embeddings) is in
:meth:`SlideVLM.embed_text`.

Shapes: B batch of cases, I inputs (slides or images) of all cases, N patches, E patch token width, K visual tokens, H
language model width, T text tokens, L tokens of the whole sequence, S supervised tokens, V vocabulary.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from encoder_lora import merged_encoder
from image_encoder import ImageEncoder
from language_model import llm_width, shares_keys_and_values
from packing import PADDING, PackedRows, pack, packed_masks
from projectors import (
    PROMPT_TOPK,
    UM_PER_IMAGE_PATCH,
    UNKNOWN_UM_PER_PX,
    build_position_codes,
    build_projector,
    build_reducer,
    closeness,
)
from token_nll import capped, token_nll
from vlm_settings import VLMSettings

IGNORED_LABEL = -100
IMAGE_MARKER = -200  # stands in a batch's input_ids for a whole slide or image; no tokenizer gives a negative id
MAX_PACKING_ERROR = 0.05  # of what a leak between records would change: above the rounding of bfloat16
VISUAL_PARTS = ("position_codes", "reducer", "projector")  # what stage 1 trains


class SlideVLM(nn.Module):
    """The whole model as the one module that is prepared for distributed training; ``forward`` does everything.

    A batch is a dictionary: ``input_ids``, ``attention_mask`` and optionally ``labels`` (B, T) int64 with an
    :data:`IMAGE_MARKER` for each input of a case, one or several slides or images. The inputs of all cases follow one
    another in the order of their markers: either ``patch_tokens`` (I, N, E) with ``coords`` (I, N, 2) int64 and
    ``patch_mask`` (I, N) bool, or ``pixel_values`` (I, 3, height, width) for the encoder; ``chosen_patches`` (I, N)
    int64, padded with -1, keeps some of their patch tokens. ``visual_budgets`` (I,) int64 is the share of each input in
    its case's visual tokens; without, each has them all. Position codes take ``um_per_px`` (I,) float32; the reducer
    ``prompt_topk`` needs ``question_ids`` and ``question_mask`` (B, Q): the question's tokens alone. With ``case_ids``
    (B,) int64, the records of the batch are packed: those of one case share a row and its visual tokens, of which they
    must have the same (see `packing`).
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        settings: VLMSettings,
        encoder: ImageEncoder | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.encoder = encoder
        self.position_codes = build_position_codes(settings.position_codes, settings.patch_width)
        self.reducer = build_reducer(settings.token_reducer, settings.patch_width, settings.num_visual_tokens)
        self.projector = build_projector(
            settings.projector, self.reducer.output_width, llm_width(llm), output_rms=settings.output_rms
        )
        self.llm = llm
        self.checkpoint_layers = False
        self.encoder_learned = False  # set by a run that trains it, also after it was frozen again
        self.llm_learned = False  # whether a result holds a language model of its own
        self.label_smoothing = 0.0  # in training mode only
        self.projector_average: dict[str, Tensor] | None = None  # see projector_average.py

    @property
    def base_llm(self) -> PreTrainedModel:
        """The language model itself, also when a peft adapter is wrapped around it."""
        return self.llm.get_base_model() if hasattr(self.llm, "peft_config") else self.llm

    @property
    def device(self) -> torch.device:
        """Where the model is, and batches must be."""
        return next(self.parameters()).device

    @property
    def visual_dtype(self) -> torch.dtype:
        """In which patch tokens are reduced and projected."""
        return next((parameter.dtype for parameter in self.projector.parameters()), torch.float32)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood of each supervised token, (S,) float32; S may be 0.

        In training mode with label smoothing (Szegedy et al. 2016) its cross-entropy with the smoothed target.
        """
        inputs = self.embed_rows(batch) if "case_ids" in batch else self.embed(batch)
        targets = inputs["targets"] if "targets" in inputs else next_labels(inputs["labels"])
        supervised = targets != IGNORED_LABEL
        return token_nll(
            self._hidden(inputs)[supervised],
            targets[supervised],
            self.base_llm.get_output_embeddings(),
            softcap=self.logit_softcap,
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Last hidden states of what :meth:`embed` or :meth:`embed_rows` gave."""
        if "rows" in inputs:
            rows: PackedRows = inputs["rows"]
            places = {
                "position_ids": rows.position_ids_RC,
                "attention_mask": packed_masks(self.base_llm.get_decoder().config, rows),
            }
        else:
            places = position_arguments(inputs["attention_mask"])
        return self.base_llm.get_decoder()(**inputs["conditioning"], **places, use_cache=False).last_hidden_state

    def visual_tokens(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Visual tokens (I, K, H) in the projector's dtype and their mask (I, K), real tokens first.

        Inputs are reduced one by one, so no visual token mixes two slides.
        """
        if "pixel_values" in batch:
            patch_tokens, coords, patch_mask = self._encode_images(batch["pixel_values"])
            if "chosen_patches" in batch:
                rows = batch["chosen_patches"].clamp(min=0).unsqueeze(-1)
                patch_tokens = patch_tokens.gather(1, rows.expand(-1, -1, patch_tokens.shape[-1]))
                coords, patch_mask = coords.gather(1, rows.expand(-1, -1, 2)), batch["chosen_patches"] >= 0
        else:
            patch_tokens, coords, patch_mask = batch["patch_tokens"], batch["coords"], batch["patch_mask"]
        um_per_unit = UM_PER_IMAGE_PATCH if "pixel_values" in batch else batch.get("um_per_px", UNKNOWN_UM_PER_PX)
        patch_tokens = self.position_codes(patch_tokens.to(self.visual_dtype), coords, patch_mask, um_per_unit)
        guide = {}
        if self.settings.token_reducer == PROMPT_TOPK:
            guide["closeness"] = closeness(self.projector, patch_tokens, self._question_vectors(batch))
        tokens, token_mask = self.reducer(patch_tokens, coords, patch_mask, batch.get("visual_budgets"), **guide)
        return self.projector(tokens.to(self.visual_dtype)), token_mask

    def _question_vectors(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean embedding of the question that each input is asked, (I, H) float32."""
        assert "question_ids" in batch, f"{PROMPT_TOPK} needs the question's tokens"
        mask = batch["question_mask"].unsqueeze(-1)
        embeds = self.base_llm.get_input_embeddings()(batch["question_ids"]).float()
        means = (embeds * mask).sum(1) / mask.sum(1).clamp(min=1)
        return means.repeat_interleave((batch["input_ids"] == IMAGE_MARKER).sum(1), dim=0)

    def _encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch tokens (I, N, E) of images, their coordinates in patches and their mask."""
        patch_tokens = self.encoder.encode_patches(pixel_values)
        per_image = patch_tokens.shape[1]
        columns = self.encoder.patch_grid[1] if self.encoder.patch_grid else max(1, round(per_image**0.5))
        index = torch.arange(per_image, device=patch_tokens.device)
        coords = torch.stack([index % columns, index // columns], dim=-1).expand(len(patch_tokens), -1, -1)
        return patch_tokens, coords, torch.ones_like(coords[..., 0], dtype=torch.bool)

    def embed_text(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Arguments with which the language model reads ``input_ids`` (B, L) as embeddings instead of ids.

        The one place where Gemma-3n differs: its layers also read per-layer embeddings by token identity, which
        ``inputs_embeds`` alone drops without a word. Placeholders lie outside that table and read its row 0, as the
        native soft tokens of Gemma-3n do.
        """
        conditioning = {"inputs_embeds": self.base_llm.get_input_embeddings()(input_ids)}
        decoder = self.base_llm.get_decoder()
        if hasattr(decoder, "get_per_layer_inputs"):
            conditioning["per_layer_inputs"] = decoder.get_per_layer_inputs(input_ids)
        return conditioning

    def embed(self, batch: dict[str, Tensor], padding_side: str = "right") -> dict[str, Any]:
        """Put the visual tokens of each slide or image in the place of its marker.

        Returns:
            ``conditioning`` (arguments of the decoder: embeddings (B, L, H) and, for Gemma-3n, per-layer inputs),
            ``input_ids`` (B, L) with the placeholder id at every visual position, ``attention_mask`` and ``labels``.
        """
        expanded, visual = self._expand(batch, padding_side)
        places = expanded["input_ids"] == IMAGE_MARKER
        expanded["input_ids"] = expanded["input_ids"].masked_fill(places, self.settings.placeholder_id)
        return {"conditioning": self._condition(expanded["input_ids"], places, visual), **expanded}

    def embed_rows(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The same with several records in a row, where ``case_ids`` of the batch say which are of one case.

        Returns:
            ``conditioning`` with rows of embeddings (R, C, H), ``rows`` with the places of all tokens, and ``targets``
            (R, C), the label that each is to predict.
        """
        expanded, visual = self._expand(batch)
        ids = expanded["input_ids"]
        is_marker, targets = ids == IMAGE_MARKER, next_labels(expanded["labels"])
        index = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        shared = (is_marker * index).amax(1)  # up to the last visual token
        shared = shared.masked_fill(((targets != IGNORED_LABEL) & (index <= shared.unsqueeze(1))).any(1), 0)
        facts = torch.stack([expanded["attention_mask"].sum(1), shared, batch["case_ids"]]).tolist()
        rows = pack(ids, *facts)
        row_ids = rows.take(ids, 0)
        places = row_ids == IMAGE_MARKER
        if visual is not None:
            number = is_marker.flatten().cumsum(0) - 1  # of each visual token, in the order of records
            visual = visual[number[rows.source_RC[places]]]
        conditioning = self._condition(row_ids.masked_fill(places, self.settings.placeholder_id), places, visual)
        return {"conditioning": conditioning, "rows": rows, "targets": rows.take(targets, IGNORED_LABEL)}

    def _expand(self, batch: dict[str, Tensor], padding_side: str = "right") -> tuple[dict[str, Tensor], Tensor | None]:
        """Text with a marker for each visual token, see :func:`expand_image_markers`, and the visual tokens (…, H)."""
        if "pixel_values" in batch or "patch_tokens" in batch:
            visual, visual_mask = self.visual_tokens(batch)
            return expand_image_markers(batch, visual_mask.sum(1), padding_side), visual[visual_mask]
        # A marker without an image stays one placeholder.
        counts = torch.ones_like(batch["input_ids"][batch["input_ids"] == IMAGE_MARKER])
        return expand_image_markers(batch, counts, padding_side), None

    def _condition(self, input_ids: Tensor, places: Tensor, visual: Tensor | None) -> dict[str, Tensor]:
        """Arguments of the decoder for ``input_ids`` (B, L), with visual tokens at ``places`` (B, L), in order."""
        conditioning = self.embed_text(input_ids)
        if visual is not None:
            embeds = conditioning["inputs_embeds"]
            conditioning["inputs_embeds"] = embeds.masked_scatter(places.unsqueeze(-1), visual.to(embeds.dtype))
        return conditioning

    @torch.no_grad()
    def check_packing(self) -> None:
        """Try on a few tokens whether this language model computes packed records as it computes them one by one.

        Raises:
            ValueError: it does not, and ``--packing`` would not be exact.
        """
        ids = torch.tensor([[3, IMAGE_MARKER, 5, 6, 7, 8], [3, IMAGE_MARKER, 9, 10, 11, 0], [4, 5, 6, 7, 12, 13]])
        mask = (ids != 0).long()
        batch = {"input_ids": ids, "attention_mask": mask, "case_ids": torch.tensor([0, 0, 1])}
        batch = {name: value.to(self.device) for name, value in batch.items()}
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            packed_inputs = self.embed_rows(batch)
            rows = packed_inputs["rows"]
            plain = self._hidden(self.embed(batch)).flatten(0, 1)[rows.source_RC.clamp(min=0)]
            packed = self._hidden(packed_inputs)
            leaking = self.base_llm.get_decoder()(**packed_inputs["conditioning"], use_cache=False).last_hidden_state
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"--packing does not work with this language model ({error}); drop the flag") from error
        finally:
            for module, training in modes:
                module.training = training
        at_tokens = rows.source_RC != PADDING
        wrong, leak = ((found - plain)[at_tokens].float().abs().mean() for found in (packed, leaking))
        if not wrong <= MAX_PACKING_ERROR * leak:
            raise ValueError("--packing is not exact with this language model or its attention; drop the flag")

    @property
    def logit_softcap(self) -> float | None:
        """Bound of the logits, as the language model's configuration has it; None where it has none."""
        return getattr(self.base_llm.config.get_text_config(), "final_logit_softcapping", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, H), final softcap applied."""
        head = self.base_llm.get_output_embeddings()
        is_autocast = torch.is_autocast_enabled(hidden.device.type)
        return capped(head(hidden if is_autocast else hidden.to(head.weight.dtype)), self.logit_softcap)

    def enable_gradient_checkpointing(self, use_reentrant: bool = False) -> None:
        """Recompute the activations of the language model's layers in the backward pass instead of keeping them.

        Call it when what is trainable has been decided.

        Raises:
            ValueError: re-entrant checkpointing of Gemma-3n, which leaves its loss right and the gradient of the visual
                tokens wrong; or the language model is frozen and has dropout, which its layers, put into training mode
                so that they recompute, would apply.
        """
        if use_reentrant and shares_keys_and_values(self.base_llm):
            raise ValueError(
                "re-entrant checkpointing makes the gradient of the visual tokens wrong where layers share keys and "
                "values, as Gemma-3n's do; leave use_reentrant off"
            )
        config = self.base_llm.config.get_text_config().to_dict()
        dropout = [key for key, value in config.items() if ("dropout" in key or "pdrop" in key) and value]
        if dropout and not any(parameter.requires_grad for parameter in self.llm.parameters()):
            raise ValueError(f"--gradient_checkpointing would apply {dropout[0]} in the frozen LLM; drop the flag")
        self.base_llm.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        self.checkpoint_layers = True

    def train(self, mode: bool = True) -> "SlideVLM":
        """Training mode for what learns; whatever is frozen stays in evaluation mode.

        In training mode Gemma-3n's AltUp clamps its weights in place, frozen or not, and dropout would disturb a frozen
        encoder. Decoder layers themselves (not what is in them) enter training mode under gradient checkpointing, since
        only then do they recompute.
        """
        super().train(mode)
        for part in (self.encoder, *(getattr(self, name) for name in VISUAL_PARTS), self.llm):
            if part is None or not mode:
                continue
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
            for module in part.modules():
                own = list(module.parameters())
                if own and not any(parameter.requires_grad for parameter in own):
                    module.training = False
        if mode and self.checkpoint_layers:
            for layer in self.base_llm.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True
        return self

    def learned_state(self) -> dict[str, Tensor]:
        """Every weight that learns or has learned in this run, by name; with the optimizer, it makes a checkpoint.

        Parameters themselves, since ZeRO-3 gathers no view of one.
        """
        state = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if self.encoder_learned:
            state |= {f"encoder.{name}": value for name, value in self.encoder.state_dict(keep_vars=True).items()}
        if self.projector_average is not None:
            state |= {f"projector_average.{name}": value for name, value in self.projector_average.items()}
        return state

    def refuse_uneven_calls(self) -> None:
        """Raise ValueError where :meth:`forward` may call a module more often for one batch than for another."""
        if self.settings.token_reducer == PROMPT_TOPK:
            raise ValueError(
                f"--token_reducer {PROMPT_TOPK} scores patches in portions, more of them for a larger slide, but with "
                "ZeRO-3 processes must compute in step; use DDP or ZeRO-2"
            )
        if type(self.base_llm.get_output_embeddings()) is not nn.Linear:
            raise ValueError(
                "the adapted or quantised head computes in chunks, more of them for longer answers, but with ZeRO-3 "
                "processes must compute in step; leave it out of --lora_target_modules, or use DDP or ZeRO-2"
            )

    def visual_parameters(self) -> dict[str, Tensor]:
        """What of projector, reducer and position codes learns, by name."""
        parts = {name: getattr(self, name) for name in VISUAL_PARTS}
        named = ((f"{name}.{key}", value) for name, part in parts.items() for key, value in part.named_parameters())
        return {name: value for name, value in named if value.requires_grad}

    def unfreeze_encoder(self) -> None:
        """Let the image encoder learn, and be saved with the results of this run even when it is frozen again."""
        self.encoder.requires_grad_(True)
        self.encoder_learned = True

    def unfreeze_visual_parts(self) -> None:
        """Let projector, reducer and position codes learn."""
        for name in VISUAL_PARTS:
            getattr(self, name).requires_grad_(True)

    def result_state(self) -> dict[str, Tensor]:
        """Every weight that :meth:`save` writes, by name: the visual parts, and of LLM and encoder what learned.

        Parameters themselves, as in :meth:`learned_state`.
        """
        parts = {part: getattr(self, part).state_dict(keep_vars=True) for part in VISUAL_PARTS}
        state = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        learning = [name for name, parameter in self.llm.named_parameters() if parameter.requires_grad]
        if hasattr(self.llm, "peft_config"):
            adapter = {
                name: value
                for name, value in self.llm.state_dict(keep_vars=True).items()
                if "lora_" in name or name in learning
            }
            state |= {f"llm.{name}": value for name, value in adapter.items()}
        elif learning or self.llm_learned:
            tied = set(self.llm.all_tied_weights_keys)
            state |= {
                f"llm.{name}": value for name, value in self.llm.state_dict(keep_vars=True).items() if name not in tied
            }
        if self.encoder_learned:
            state |= {f"encoder.{name}": value for name, value in self.encoder.state_dict(keep_vars=True).items()}
        return state

    def save(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Write a result folder, whole or not at all. A frozen base language model is never copied.

        ``weights`` are those of :meth:`result_state` where the model itself holds shards of them.

        ::

            folder/vlm.json
            folder/projector/model.safetensors   projector, reducer and position codes
            folder/adapter/                      when the language model wears one
            folder/language_model/               when weights of its own learned
            folder/encoder/                      when it learned; LoRA is merged into it
            folder/tokenizer/
        """
        folder = Path(folder)
        weights = self.result_state() if weights is None else weights
        weights = {name: value.detach() for name, value in weights.items()}
        temporary = folder.with_name(folder.name + ".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "projector").mkdir(parents=True)
        self.settings.write(temporary)
        projector_state = {
            name: value.detach().cpu().contiguous()
            for name, value in weights.items()
            if name.split(".")[0] in VISUAL_PARTS
        }
        save_file(projector_state, temporary / "projector" / "model.safetensors", metadata={"format": "pt"})
        llm_state = {name.removeprefix("llm."): value for name, value in weights.items() if name.startswith("llm.")}
        if hasattr(self.llm, "peft_config"):
            self.llm.save_pretrained(temporary / "adapter", state_dict=llm_state, safe_serialization=True)
        elif llm_state:
            self.llm.save_pretrained(temporary / "language_model", state_dict=llm_state, safe_serialization=True)
        if self.encoder is not None and self.encoder.wears_lora:
            merged_encoder(self.encoder).save_pretrained(temporary / "encoder")
        elif self.encoder_learned:
            with _state_dict_gives(self.encoder, weights, prefix="encoder."):
                self.encoder.save_pretrained(temporary / "encoder")
        tokenizer.save_pretrained(temporary / "tokenizer")
        outdated = folder.with_name(folder.name + ".outdated")
        shutil.rmtree(outdated, ignore_errors=True)
        if folder.exists():
            os.replace(folder, outdated)
        os.replace(temporary, folder)
        shutil.rmtree(outdated, ignore_errors=True)

    def load_projector(self, folder: str | Path) -> None:
        """Load projector, reducer and position codes from a result folder.

        Raises:
            FileNotFoundError: the folder has no projector.
            ValueError: its shapes are not those of this model's settings.
        """
        path = Path(folder) / "projector" / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; give the final_model folder of a stage 1 or stage 2 run")
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged ({error}); copy the folder anew") from error
        for name in VISUAL_PARTS:
            part = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(name + ".")}
            try:
                getattr(self, name).load_state_dict(part)
            except RuntimeError as error:
                raise ValueError(f"{path}: does not fit this model's {name}: {' '.join(str(error).split())}") from error


@contextmanager
def _state_dict_gives(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> Iterator[None]:
    """Let ``state_dict()`` of a module and of those in it give these weights, for libraries that save by it."""

    def give(part: nn.Module, state: dict[str, Tensor], within: str, _metadata: object) -> None:
        own_names = {key: names[part] + key.removeprefix(within) for key in state}
        state.update({key: weights[name] for key, name in own_names.items() if name in weights})

    names = {part: f"{prefix}{name}." if name else prefix for name, part in module.named_modules()}
    hooks = [part.register_state_dict_post_hook(give) for part in module.children()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expand_image_markers(batch: dict[str, Tensor], counts: Tensor, padding_side: str = "right") -> dict[str, Tensor]:
    """Repeat each image marker as often as it has visual tokens, and pad all rows anew.

    Args:
        batch: ``input_ids``, ``attention_mask`` (B, T) right-padded, and optionally ``labels`` (B, T).
        counts: visual tokens of each marker, (I,) int64, at least 1, row by row in reading order.
        padding_side: ``right`` in training, ``left`` for generation.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, (B, L) int64.
    """
    input_ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = batch.get("labels", torch.full_like(input_ids, IGNORED_LABEL))
    widths = mask.long()
    is_marker = (input_ids == IMAGE_MARKER) & mask
    assert int(is_marker.sum()) == len(counts), "a marker for each slide or image, and none besides"
    widths[is_marker] = counts
    ends = widths.cumsum(1)
    target, lengths = ends - widths, ends[:, -1:]
    longest = int(lengths.max())

    positions = torch.arange(longest, device=input_ids.device).expand(len(input_ids), -1)
    expanded_mask = positions < lengths
    # What no token overwrites below belongs to the marker before it. Padding is 0, and masked.
    expanded_ids = torch.where(expanded_mask, IMAGE_MARKER, 0)
    expanded_labels = torch.full_like(expanded_ids, IGNORED_LABEL)
    rows = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1).expand_as(target)
    expanded_ids[rows[mask], target[mask]] = input_ids[mask]
    expanded_labels[rows[mask], target[mask]] = labels[mask]
    expanded = {"input_ids": expanded_ids, "attention_mask": expanded_mask.long(), "labels": expanded_labels}
    if padding_side == "left":
        source = (positions - (longest - lengths)) % longest
        expanded = {name: value.gather(1, source) for name, value in expanded.items()}
    return expanded


def next_labels(labels: Tensor) -> Tensor:
    """The label that each position of ``labels`` (B, L) is to predict: that of the token after it."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def position_arguments(attention_mask: Tensor) -> dict[str, Tensor]:
    """Attention mask and positions (B, L) of the decoder; padding does not count, on whichever side it is."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask, "position_ids": position_ids}
