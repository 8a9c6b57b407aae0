"""Several records in one row of a language model, exactly as if each had a row of its own.

Records of one case, asked different questions, begin alike: with the visual tokens, most of what they are. In a row
the beginning stands once, and each record goes on from it, blind to the others. Several cases stand in a row where that
leaves less padding. An explicit mask says who sees whom, and every token keeps the position that it has by itself, so
sliding windows reach as far as ever.

Shapes: B records, L longest record, R rows, C longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# A row of this many tokens costs as much in attention as in all else, in models of a few billion weights.
EVEN_ROW = 8192
PADDING = -1


@dataclass(frozen=True)
class PackedRows:
    """Where tokens of records stand in rows, and what each sees.

    Attributes:
        source_RC: place of each token among the (B, L) tokens of all records, flattened; `PADDING` at padding.
        position_ids_RC: position of each token in its own record.
        case_RC: which case it is of; padding is of that of the last record of its row.
        part_RC: 0 in what records of a case share, else the number of its record within the case.
    """

    source_RC: Tensor
    position_ids_RC: Tensor
    case_RC: Tensor
    part_RC: Tensor

    def take(self, values_BL: Tensor, padding: int) -> Tensor:
        """Values of the tokens of records, at their places in rows, (R, C)."""
        taken = values_BL.flatten()[self.source_RC.clamp(min=0)]
        return torch.where(self.source_RC == PADDING, padding, taken)

    def mask(self, sliding_window: int | None = None) -> Tensor:
        """Which tokens each token sees, (R, 1, C, C) bool; with a window, those fewer than so many positions back."""
        later, earlier = (slice(None), slice(None), None), (slice(None), None, slice(None))
        length = self.source_RC.shape[1]
        sees = torch.ones(length, length, dtype=torch.bool, device=self.source_RC.device).tril()
        sees = sees & (self.case_RC[later] == self.case_RC[earlier])
        sees &= (self.part_RC[earlier] == 0) | (self.part_RC[later] == self.part_RC[earlier])
        if sliding_window is not None:
            sees &= self.position_ids_RC[later] - self.position_ids_RC[earlier] < sliding_window
        return sees.unsqueeze(1)


def pack(input_ids: Tensor, lengths: Sequence[int], shared: Sequence[int], cases: Sequence[int]) -> PackedRows:
    """Rows for records.

    Args:
        input_ids: (B, L) right-padded.
        lengths: of each record in tokens.
        shared: tokens at its beginning that a record has in common with others of its case.
        cases: a number for each record, the same for those of one case. Of them only those share their beginning whose
            tokens there are equal.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for record, (beginning, case) in enumerate(zip(shared, cases, strict=True)):
        members.setdefault((case, *input_ids[record, :beginning].tolist()), []).append(record)
    groups = list(members.values())
    sizes = [shared[group[0]] + sum(lengths[record] - shared[record] for record in group) for group in groups]
    rows = rows_for(sizes)
    longest = max(sum(sizes[group] for group in row) for row in rows)
    columns = input_ids.shape[1]
    table = torch.full((4, len(rows), longest), PADDING)
    for number, row in enumerate(rows):
        place = 0
        for group in row:
            for part, record in enumerate(groups[group]):
                first = shared[record] if part else 0
                place = _put(table, number, place, (first, shared[record]), record * columns, group, 0)
                place = _put(table, number, place, (shared[record], lengths[record]), record * columns, group, part + 1)
        # Padding follows the last record, as in a row of its own. By itself it would be all zeros, whose gradient is
        # not finite in Gemma-3n, and attention would hand it on, times zero.
        table[1:, number, place:] = table[1:, number, place - 1 : place]
    return PackedRows(*table.to(input_ids.device))


def _put(table: Tensor, row: int, place: int, span: tuple[int, int], offset: int, case: int, part: int) -> int:
    """Put a span of a record into a row; the place after it."""
    end = place + span[1] - span[0]
    positions = torch.arange(*span)
    for layer, value in enumerate((positions + offset, positions, case, part)):
        table[layer, row, place:end] = value
    return end


def rows_for(sizes: Sequence[int]) -> list[list[int]]:
    """Which items of some sizes share a row: as many rows as cost least, each item put in the shortest row so far.

    A row costs its length, and the square of it in attention; all rows are as long as the longest.
    """
    order = sorted(range(len(sizes)), key=lambda item: -sizes[item])
    best, least = [], float("inf")
    for number in range(1, len(sizes) + 1):
        rows: list[list[int]] = [[] for _ in range(number)]
        filled = [0] * number
        for item in order:
            shortest = filled.index(min(filled))
            rows[shortest].append(item)
            filled[shortest] += sizes[item]
        cost = number * max(filled) * (1 + max(filled) / EVEN_ROW)
        if cost < least:
            best, least = rows, cost
    return [sorted(row) for row in best]


def packed_masks(config: PreTrainedConfig, rows: PackedRows) -> Tensor | dict[str, Tensor]:
    """Attention masks (R, 1, C, C) of packed rows, one for each type of layer where the decoder tells them apart.

    Raises:
        ValueError: an attention that takes no such mask, or a type of layer that is not known.
    """
    if config._attn_implementation != "sdpa":
        raise ValueError(f"attention is {config._attn_implementation}, not sdpa")
    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    types = getattr(config, "layer_types", None)
    if types is None:
        return rows.mask(windows["sliding_attention"])
    if unknown := set(types) - windows.keys():
        raise ValueError(f"layers of type {', '.join(sorted(unknown))}")
    return {name: rows.mask(windows[name]) for name in sorted(set(types))}
