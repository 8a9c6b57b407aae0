"""The cache of a language model behind prefixes that rows share: beams of a search, questions about one slide.

Transformers' own cache holds the prompt once per beam, joins it anew at every step and copies it whole whenever beams
change places. Here a prefix is held once, and its rows attend to it together, as in Hydragen (Juravsky et al. 2024):
the queries of all rows that share it are one matrix. What follows the prefix lies in small buffers of a row each, and
one softmax spans both. It is the attention of the plain path, in another order of additions.

Shapes: B rows, G groups of rows that share a prefix, n rows of a group, Q queries of a row, H key-value heads, r query
heads of each, P columns of the longest prefix, W columns behind it, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from inference.cpu_products import product

SHAREABLE = {"full_attention", "sliding_attention", "dummy"}
ATTENTION = "shared_prefix"
HIDDEN = torch.finfo(
    torch.float32
).min  # a score; not minus infinity, of which a softmax makes NaN where all are hidden


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, read: up to and with its last visual token, or further in a conversation.

    Attributes:
        input_ids: (P,) int64, the placeholder id at visual positions.
        conditioning: arguments of the decoder at these positions, (P, …) each.
        layers: keys and values (H, P, D) of each layer that stores them; None for a model that cannot share them.
    """

    input_ids: Tensor
    conditioning: dict[str, Tensor]
    layers: list[tuple[Tensor, Tensor]] | None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Sharing:
    """Which rows share which prefix, and where it lies among their columns.

    Attributes:
        group_sizes: rows of each prefix; rows of a group follow one another.
        paddings: (B,) int64, columns before each row's prefix.
        columns: that lie in prefixes. A row sees so much of its prefix; what is left of it lies behind, read again.
    """

    group_sizes: list[int]
    paddings: Tensor
    columns: int
    _views: dict[tuple[int, bool], tuple[Tensor, "PrefixView"]] = field(default_factory=dict)

    def repeat_rows(self, times: int) -> None:
        """Let each row be as many."""
        self.group_sizes = [size * times for size in self.group_sizes]
        self.paddings = self.paddings.repeat_interleave(times)

    def view_of_prefix(self, mask: Tensor, first: int, length: int, *, is_sliding: bool) -> "PrefixView":
        """What rows see of their prefixes: from a mask (B, 1, Q, columns from ``first`` on)."""
        known = self._views.get((first, is_sliding))
        if known is None or known[0] is not mask:  # layers of one kind have one mask
            places = torch.arange(length, device=mask.device) + self.paddings[:, None] - first
            inside = (places >= 0) & (places < self.columns - first)
            index = places.clamp(0, mask.shape[-1] - 1)[:, None].expand(-1, mask.shape[2], -1)
            seen = mask[:, 0].expand(len(places), -1, -1).gather(-1, index) & inside[:, None]
            self._views = {kept: value for kept, value in self._views.items() if kept[1] != is_sliding}
            self._views[first, is_sliding] = mask, PrefixView.of(seen)
        return self._views[first, is_sliding][1]


@dataclass(frozen=True)
class PrefixView:
    """What rows see of their prefixes.

    Attributes:
        seen: columns outside which no row sees anything.
        hidden: of these, those that some row does not see, and (B, Q, columns) bool, where.
    """

    seen: slice
    hidden: list[tuple[slice, Tensor]]

    @classmethod
    def of(cls, seen: Tensor) -> "PrefixView":
        """From (B, Q, P) bool. What a row sees is one piece, so that it misses columns at either end only."""
        rows = seen.flatten(0, 1)
        counts = rows.sum(0).tolist()
        begin, end = _run(counts, at_least=1)
        by_all = slice(*(place - begin for place in _run(counts[:end], at_least=len(rows))))
        hidden = ~seen[..., begin:end]
        ends = (slice(0, by_all.start), slice(by_all.stop, end - begin))
        return cls(slice(begin, end), [(part, hidden[..., part]) for part in ends if part.start < part.stop])


def _run(counts: list[int], *, at_least: int) -> tuple[int, int]:
    """Begin and end of the run of columns that so many rows see; an empty one at the end where there is none."""
    places = [place for place, count in enumerate(counts) if count >= at_least]
    return (places[0], places[-1] + 1) if places else (len(counts), len(counts))


class SharedPrefixLayer(CacheLayerMixin):
    """Keys and values of one attention layer: a prefix of each group, and buffers (B, H, W, D) of a fixed capacity.

    A sliding layer keeps all columns and shows those that its window reaches, as transformers' own does.
    """

    def __init__(
        self,
        capacity: int,
        sliding_window: int | None = None,
        sharing: Sharing | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.capacity = capacity
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.sharing = sharing
        self.prefix = prefix
        self.length = 0
        self.num_alike = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            state.new_empty((*state.shape[:2], self.capacity, state.shape[3])) for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, first = self.length, self._first_seen()
        self.length += key_states.shape[2]
        assert self.length <= self.capacity
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        begin = max(0, first - self._columns_before())
        keys, values = self.keys[:, :, begin : self.length], self.values[:, :, begin : self.length]
        keys.behind = self, first  # read by `attend`, which gets these very tensors
        return keys, values

    def _columns_before(self) -> int:
        return self.sharing.columns if self.sharing else 0

    def _first_seen(self) -> int:
        """The first column that the next query sees."""
        return max(self.get_seq_length() - self.sliding_window + 1, 0) if self.is_sliding else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_seen()
        return self.get_seq_length() - first + query_length, first

    def get_seq_length(self) -> int:
        return self._columns_before() + self.length

    def get_max_length(self) -> int:
        return self.sliding_window if self.is_sliding else -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows change places, each within the rows of its own sample."""
        for buffer in (self.keys, self.values):
            moving = buffer[:, :, self.num_alike : self.length]
            moving.copy_(moving.index_select(0, beam_idx.to(buffer.device)))

    def repeat_rows(self, times: int, more_columns: int) -> None:
        """Give each row as many copies, and room for more columns; what is there now is alike in all copies."""
        self.capacity, self.num_alike = self.length + more_columns, self.length
        if self.is_initialized:
            for name in ("keys", "values"):
                buffer = getattr(self, name)
                rows, heads, _, width = buffer.shape
                larger = buffer.new_empty((rows, times, heads, self.capacity, width))
                larger[:, :, :, : self.length] = buffer[:, None, :, : self.length]
                setattr(self, name, larger.flatten(0, 1))


class SharedPrefixCache(Cache):
    """A :class:`SharedPrefixLayer` for each attention layer that stores keys and values.

    Args:
        config: of the language model.
        capacity: columns behind the prefixes.
        prefixes: of the groups, in the order of their rows; none where a prefix itself is to be read.
        sharing: see :class:`Sharing`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int,
        prefixes: list[Prefix] | None = None,
        sharing: Sharing | None = None,
    ):
        kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        stored = _stacked(prefixes) if prefixes else None
        layers: list[CacheLayerMixin | DummyLayer] = []
        for kind, more in zip(kinds, arguments, strict=True):
            if kind == "dummy":
                layers.append(DummyLayer())
                continue
            own = stored and stored[sum(isinstance(layer, SharedPrefixLayer) for layer in layers)]
            layers.append(SharedPrefixLayer(capacity, more.get("sliding_window"), sharing, own))
        super().__init__(layers=layers)
        self.sharing = sharing

    @property
    def stores(self) -> list[SharedPrefixLayer]:
        """The layers that store something."""
        return [layer for layer in self.layers if isinstance(layer, SharedPrefixLayer)]

    def repeat_rows(self, times: int, more_columns: int) -> None:
        """See :meth:`SharedPrefixLayer.repeat_rows`."""
        self.sharing.repeat_rows(times)
        for layer in self.stores:
            layer.repeat_rows(times, more_columns)


def can_share_prefix(llm: PreTrainedModel) -> bool:
    """Whether all layers are attention layers whose keys and values can be split, under PyTorch's own attention."""
    config = llm.config.get_text_config(decoder=True)
    kinds = set(get_layer_types_and_kwargs(config)[0])
    return kinds <= SHAREABLE and llm.config._attn_implementation == "sdpa"


@contextmanager
def shared_attention(llm: PreTrainedModel) -> Iterator[None]:
    """Let a language model attend by `attend`."""
    config = llm.config
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _stacked(prefixes: list[Prefix]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (G, H, P, D) of each layer, padded at the end."""
    if len(prefixes) == 1:
        return [(keys[None], values[None]) for keys, values in prefixes[0].layers]
    longest = max(map(len, prefixes))
    stacked = []
    for layers in zip(*(prefix.layers for prefix in prefixes), strict=True):
        pair = []
        for part in (0, 1):
            first = layers[0][part]
            # Zeros, not empty memory: a NaN in a masked column would spread.
            rows = first.new_zeros((len(layers), first.shape[0], longest, first.shape[2]))
            for row, layer in zip(rows, layers, strict=True):
                row[:, : layer[part].shape[1]] = layer[part]
            pair.append(rows)
        stacked.append(tuple(pair))
    return stacked


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, over a prefix that rows share and what lies behind it.

    Args:
        module: the attention layer.
        query: (B, H * r, Q, D).
        key: (B, H, W, D), as `SharedPrefixLayer.update` gave it.
        value: likewise.
        attention_mask: (B, 1, Q, columns) bool.
        scaling: of the scores; default: D ** -0.5.
        **kwargs: what PyTorch's attention takes where there is no prefix.

    Returns:
        (B, Q, H * r, D), and None for the attention weights.
    """
    layer, first = getattr(key, "behind", (None, 0))
    if layer is None or layer.prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, _, num_queries, width = query.shape
    heads = key.shape[1]
    query = (query * scale).reshape(rows, heads, -1, num_queries, width)  # B H r Q D
    sharing = layer.sharing
    hidden = ~attention_mask[:, :, None, :, max(0, sharing.columns - first) :]
    scores = (query.flatten(2, 3) @ key.transpose(2, 3)).float().unflatten(2, (-1, num_queries))  # B H r Q W
    weights, own_sum = _softmax(scores.masked_fill_(hidden, HIDDEN))
    mixed = (weights.to(value.dtype).flatten(2, 3) @ value).view(*query.shape)
    if first < sharing.columns:  # else the window has left the prefix behind
        view = sharing.view_of_prefix(attention_mask, first, layer.prefix[0].shape[2], is_sliding=layer.is_sliding)
        keys, values = (part[:, :, view.seen] for part in layer.prefix)
        of_prefix, prefix_sum = _attend_to_shared(query, keys, values, view.hidden, sharing.group_sizes)
        mixed = torch.lerp(mixed.float(), of_prefix.float(), (prefix_sum - own_sum).sigmoid()).to(value.dtype)
    return mixed.flatten(1, 2).transpose(1, 2).contiguous(), None


def _attend_to_shared(
    query: Tensor, keys: Tensor, values: Tensor, hidden: list[tuple[slice, Tensor]], group_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """What rows (B, H, r, Q, D) find in the prefixes (G, H, P, D) of their groups; for the second see `_softmax`."""
    groups, on_cpu = len(group_sizes), query.device.type == "cpu"
    if groups > 1 and (on_cpu or len(set(group_sizes)) > 1):
        ends = list(accumulate(group_sizes))
        parts = []
        for group, (end, size) in enumerate(zip(ends, group_sizes, strict=True)):
            rows, one = slice(end - size, end), slice(group, group + 1)
            own_hidden = [(columns, where[rows]) for columns, where in hidden]
            parts.append(_attend_to_shared(query[rows], keys[one], values[one], own_hidden, [size]))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    query = query.unflatten(0, (groups, -1)).transpose(1, 2)  # G H n r Q D
    hidden = [(columns, where.unflatten(0, (groups, 1, -1))[:, :, :, None]) for columns, where in hidden]
    if on_cpu:  # head by head, so that the scores stay in the processor's cache
        heads = zip(query.split(1, 1), keys.split(1, 1), values.split(1, 1), strict=True)
        parts = [_attend_heads(*head, hidden) for head in heads]
        found = [torch.cat(part, 1) for part in zip(*parts, strict=True)]
    else:
        found = _attend_heads(query, keys, values, hidden)
    return tuple(part.transpose(1, 2).flatten(0, 1) for part in found)


def _attend_heads(
    query: Tensor, keys: Tensor, values: Tensor, hidden: list[tuple[slice, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The same with rows in groups (G, H, n, r, Q, D), and where they do not see (G, 1, n, 1, Q, columns)."""
    scores = product(query.flatten(2, 4), keys).float().view(*query.shape[:-1], -1)
    for columns, where in hidden:
        scores[..., columns].masked_fill_(where, HIDDEN)
    weights, sums = _softmax(scores)
    return product(weights.flatten(2, 4).to(values.dtype), values.transpose(2, 3)).view_as(query), sums


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, and the logarithm of the sum that it divides by, found without a second sum:
    the largest weight is e to the largest score over it.
    """
    weights = scores.softmax(-1)
    return weights, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def whole_mask(*args: object, **kwargs: object) -> Tensor | None:
    """The mask of PyTorch's attention, never left out as superfluous: `attend` cuts it in two."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, whole_mask)
