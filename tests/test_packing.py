"""Several records in a row: who sees whom, and the same loss and gradients as one record a row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packing
from language_model import add_lora
from packing import PADDING, pack, rows_for
from slide_reports import Record, RecordBatches, ReportDataset, collate, make_loader
from slide_vlm import IMAGE_MARKER
from tests.tiny_models import REPORTS, make_batch, make_model, make_sample

FAMILIES = ["gemma3n", "gemma3", "llama", "qwen3", "biogpt"]
QUESTIONS = ["Write the report.", "Which organ?", "How was it taken, and what is the diagnosis?", "Grade?"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=7))
def test_every_token_sees_its_own_record_up_to_itself(records):
    lengths = [length for length, _, _ in records]
    shared = [min(length, beginning) for length, beginning, _ in records]
    cases = [case for _, _, case in records]
    ids = torch.zeros(len(records), max(lengths), dtype=torch.long)
    for record, (length, beginning, case) in enumerate(zip(lengths, shared, cases, strict=True)):
        ids[record, :beginning] = 100 + case
        ids[record, beginning:length] = 200 + record
    rows = pack(ids, lengths, shared, cases)
    assert sum(rows.source_RC.shape) <= sum(lengths) + len(records) + 1
    seen = set()
    for window in (None, 3):
        mask = rows.mask(window)[:, 0]
        for row, place in (rows.source_RC != PADDING).nonzero().tolist():
            record, position = divmod(int(rows.source_RC[row, place]), ids.shape[1])
            assert int(rows.position_ids_RC[row, place]) == position
            sees = mask[row, place].nonzero().flatten()
            sources = rows.source_RC[row, sees]
            first = 0 if window is None else max(0, position - window + 1)
            assert (sources % ids.shape[1]).tolist() == list(range(first, position + 1))
            assert torch.equal(ids.flatten()[sources], ids[record, first : position + 1])
            seen.add((record, position))
    for record, (length, beginning) in enumerate(zip(lengths, shared, strict=True)):
        assert {(record, position) for position in range(beginning, length)} <= seen
    padding = rows.source_RC == PADDING
    assert rows.mask()[:, 0][padding].any(-1).all()  # an empty row of a mask would be NaN


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_rows_hold_every_item_once_and_cost_no_more_than_a_row_each(sizes):
    rows = rows_for(sizes)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    longest = max(sum(sizes[item] for item in row) for row in rows)
    assert len(rows) * longest * (1 + longest / 8192) <= len(sizes) * max(sizes) * (1 + max(sizes) / 8192)


def packed_batch(tokenizer, cases=(0, 0, 1, 0, 2, 1), sizes=(9, 3, 20)):
    """Records of three cases with different questions, in the order given, and the same unpacked."""
    samples = []
    for number, case in enumerate(cases):
        question, answer = QUESTIONS[number % len(QUESTIONS)], REPORTS[number % len(REPORTS)]
        samples.append(make_sample(tokenizer, answer, sizes[case], seed=case, question=question) | {"case_id": case})
    batch = collate(samples)
    return batch, {name: value for name, value in batch.items() if name != "case_ids"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reducer, even_row", [("none", packing.EVEN_ROW), ("none", 100), ("grid_pool", 30)])
def test_loss_and_gradients_equal_those_of_a_row_each(family, reducer, even_row, monkeypatch):
    """The window of sliding layers, 16 tokens, is shorter than the visual tokens of a case and its records."""
    monkeypatch.setattr(packing, "EVEN_ROW", even_row)
    model, tokenizer = make_model(family, reducer, num_visual_tokens=20)
    model.llm.requires_grad_(False)
    torch.manual_seed(1)
    model.llm = add_lora(model.llm, rank=2, alpha=4, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    packed, plain = packed_batch(tokenizer)
    with torch.no_grad():
        rows = model.embed_rows(packed)["rows"].source_RC
    assert (len(rows) > 1 and (rows == PADDING).any()) == (even_row <= 100)
    results = []
    for batch in (packed, plain):
        nll = model(batch)
        nll.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((nll, gradients))
        model.zero_grad()
    (ours, gradients), (theirs, wanted) = results
    torch.testing.assert_close(ours.sort().values, theirs.sort().values, atol=1e-5, rtol=1e-5)
    assert ours.sum().item() == pytest.approx(theirs.sum().item(), rel=1e-6)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5 * float(largest), rtol=1e-5, msg=name)


def test_visual_tokens_of_a_case_are_computed_once():
    model, tokenizer = make_model(num_visual_tokens=20)
    packed, plain = packed_batch(tokenizer, cases=(2, 2, 2, 2))
    with torch.no_grad():
        rows, records = model.embed_rows(packed)["rows"], model.embed(plain)
    tokens = int(records["attention_mask"].sum())
    before = plain["input_ids"][0].tolist().index(IMAGE_MARKER)
    assert int((rows.source_RC != PADDING).sum()) == tokens - 3 * (before + 20)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_allowed_where_it_is_exact(family, dtype):
    model, _ = make_model(family)
    model.llm.to(dtype)
    model.check_packing()


def test_packing_is_refused_elsewhere(monkeypatch):
    model, _ = make_model("llama")
    model.llm.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="--packing does not work with this language model .attention is eager"):
        model.check_packing()
    model, _ = make_model("llama")
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    monkeypatch.setattr("packing.PackedRows.mask", lambda rows, window=None: mask.expand(-1, -1, 1, 1))
    with pytest.raises(ValueError, match="--packing is not exact"):
        model.check_packing()


def test_gradient_checkpointing_changes_nothing_in_packed_rows():
    model, tokenizer = make_model(num_visual_tokens=20)
    model.llm.requires_grad_(False)
    packed, _ = packed_batch(tokenizer)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(packed).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.projector.parameters()])
        model.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def case_records(corpus, per_case=3):
    paths = sorted(corpus.features.iterdir())[:5]
    return [
        Record(f"{path.stem} {number}", (path,), QUESTIONS[number], REPORTS[number], path.stem)
        for number in range(per_case)
        for path in paths
    ]


@pytest.mark.parametrize("reducer", ["none", "grid_pool", "prompt_topk"])
def test_records_of_a_case_are_drawn_alike_and_give_the_unpacked_loss(corpus, reducer):
    model, tokenizer = make_model(token_reducer=reducer, num_visual_tokens=4)
    records = case_records(corpus)
    data = ReportDataset.for_model(model, tokenizer, records, seed=5, packing=True)
    batches = RecordBatches(len(data), 6, shuffle=True, seed=2, cases=data.cases)
    assert data.cases.tolist() == (list(range(15)) if reducer == "prompt_topk" else [*range(5)] * 3)
    total = {"packed": 0.0, "plain": 0.0}
    alone = 0
    with torch.no_grad():
        for batch in make_loader(data, batches):
            alone += int((batch["case_ids"].unique(return_counts=True)[1] == 1).sum())
            total["packed"] += float(model(batch).sum())
            total["plain"] += float(model({k: v for k, v in batch.items() if k != "case_ids"}).sum())
    assert total["packed"] == pytest.approx(total["plain"], rel=1e-6)
    assert alone == 15 if reducer == "prompt_topk" else alone <= 4  # the end of a batch parts a case


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=50), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_records_of_a_case_follow_one_another_and_none_is_lost(cases, batch_size, processes, shuffle):
    batches = RecordBatches(len(cases), batch_size, num_processes=processes, shuffle=shuffle, seed=1, cases=cases)
    batches.start_at(2)
    order = [key.index for batch in batches for key in batch if key.supervised]
    assert sorted(order) == list(range(len(cases)))
    in_order = np.array(cases)[order]
    assert 1 + np.count_nonzero(np.diff(in_order)) == len(set(cases))


def test_a_record_without_visual_tokens_shares_nothing():
    model, tokenizer = make_model()
    batch = make_batch(tokenizer)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    batch["input_ids"] = torch.where(batch["input_ids"] == IMAGE_MARKER, 3, batch["input_ids"])
    with torch.no_grad():
        packed = model(batch | {"case_ids": torch.zeros(3, dtype=torch.long)})
        torch.testing.assert_close(packed.sum(), model(batch).sum(), rtol=1e-6, atol=0)
