"""Cases of several slides or images: budgets, markers, and that nothing leaks from one slide to the other."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import load_encoder
from projectors import REDUCERS
from slide_features import SlideFeatures, read_slide_features, write_slide_features
from slide_reports import (
    Prompt,
    Record,
    RecordBatches,
    ReportDataset,
    SampleKey,
    case_of_slides,
    collate,
    read_case,
    read_images,
    share_budget,
)
from slide_reports.batches import make_loader
from slide_vlm import IGNORED_LABEL, IMAGE_MARKER, expand_image_markers
from tests.conftest import run_command
from tests.tiny_models import PATCH_WIDTH, REPORTS, generate_answers, make_model, make_tokenizer

SIZES = ((30,), (20, 10), (3, 40, 1))  # tiles of the slides of three cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Record]:
    """Records of one, two and three slides."""
    folder, rng, records = tmp_path_factory.mktemp("cases"), np.random.default_rng(0), []
    for number, sizes in enumerate(SIZES):
        paths = tuple(folder / f"{number}_{i}.h5" for i in range(len(sizes)))
        for path, size in zip(paths, sizes, strict=True):
            coords = np.stack([np.arange(size) % 6, np.arange(size) // 6], axis=1) * 256
            facts = {"encoder": "e", "mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}
            write_slide_features(
                path, rng.normal(size=(size, PATCH_WIDTH)).astype(np.float16), coords, name=path.stem, **facts
            )
        records.append(Record(str(number), paths, "", REPORTS[number], str(number)))
    return records


# Budget


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(0, 20_000))
def test_a_budget_is_shared_in_proportion_and_spent_exactly(sizes, more):
    budget = min(len(sizes) + more, sum(sizes))
    shares = share_budget(budget, sizes)
    assert sum(shares) == budget and min(shares) >= 1
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
    exact = [budget * size / sum(sizes) for size in sizes]
    raised = sum(quota < 1 for quota in exact)  # what these got more, the largest got less
    assert all(abs(share - quota) < 1 + raised for share, quota in zip(shares, exact, strict=True))
    order = np.argsort(sizes, kind="stable")
    assert not raised or all(np.diff(np.array(shares)[order]) >= -1)


def test_shares_follow_the_largest_remainders():
    assert share_budget(10, [3000, 1000]) == [8, 2]  # 7.5 and 2.5: the first of equals
    assert share_budget(7, [1, 1, 1]) == [3, 2, 2]
    assert share_budget(8, [10_000, 1, 1]) == [6, 1, 1]
    with pytest.raises(ValueError, match="3 slides or images needs as many tokens; raise --num_visual_tokens"):
        share_budget(2, [5, 5, 5])


@pytest.mark.parametrize("rng", [None, 0])
def test_slides_share_the_patches_read_by_their_tiles(cases, rng):
    rng = rng if rng is None else np.random.default_rng(rng)
    case = read_case(cases[1].inputs, 9, 6, rng)
    assert [len(part) for part in case["patch_tokens"]] == [6, 3]
    assert case["visual_budgets"].tolist() == [4, 2]
    whole = read_case(cases[2].inputs, 100, 100)
    for path, tokens, coords in zip(cases[2].inputs, whole["patch_tokens"], whole["coords"], strict=True):
        stored = read_slide_features(path)
        assert tokens.numpy().tobytes() == stored.features.tobytes()
        assert coords.tolist() == stored.coords.tolist()


def test_slides_in_memory_make_the_case_that_their_files_make(cases):
    for record in cases:
        slides = [read_slide_features(path) for path in record.inputs]
        shuffled = [SlideFeatures(slide.features[::-1], slide.coords[::-1]) for slide in slides]
        read, held = read_case(record.inputs, 9, 7), case_of_slides(shuffled, 9, 7)
        for name in ("patch_tokens", "coords"):
            assert all(torch.equal(a, b) for a, b in zip(read[name], held[name], strict=True))
        assert torch.equal(read["visual_budgets"], held["visual_budgets"])


# Markers


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.data(),
)
def test_any_number_of_markers_expands_as_lists_do(rows, side, data):
    """0 stands for a marker, others for text; against the same done with lists."""
    ids = [[value or IMAGE_MARKER for value in row] for row in rows]
    labels = [[value if value > 2 else IGNORED_LABEL for value in row] for row in rows]
    counts = data.draw(st.lists(st.integers(1, 5), min_size=sum(r.count(0) for r in rows), max_size=None))
    counts = counts[: sum(row.count(0) for row in rows)]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([torch.tensor(row) for row in ids], batch_first=True),
        "labels": pad([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORED_LABEL),
        "attention_mask": pad([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True),
    }
    out = expand_image_markers(batch, torch.tensor(counts, dtype=torch.long), side)
    left = iter(counts)
    widths = [[next(left) if i == IMAGE_MARKER else 1 for i in row] for row in ids]
    longest = max(map(sum, widths))
    for r, width in enumerate(widths):
        filler = [None] * (longest - sum(width))
        for name, values, padding in (("input_ids", ids, 0), ("labels", labels, IGNORED_LABEL)):
            wide = [value for value, n in zip(values[r], width, strict=True) for _ in range(n)]
            wide = filler + wide if side == "left" else wide + filler
            assert out[name][r].tolist() == [padding if value is None else value for value in wide]
        assert out["attention_mask"][r].sum() == sum(width)


def test_the_prompt_has_a_marker_for_each_slide_and_text_between():
    tokenizer = make_tokenizer()
    prompt = Prompt.for_tokenizer(tokenizer)
    one, three = (prompt.question_ids(tokenizer, "Organ?", 64, num_images=n) for n in (1, 3))
    assert one == prompt.question_ids(tokenizer, "Organ?", 64)
    between = tokenizer(prompt.between_images, add_special_tokens=False)["input_ids"]
    at = one.index(IMAGE_MARKER)
    assert between and three == one[:at] + ([IMAGE_MARKER, *between] * 2) + one[at:]
    earlier = {name: text for name, text in vars(prompt).items() if name != "between_images"}
    assert Prompt(**earlier) == prompt  # a vlm.json of before


# Model


def plain_visual_tokens(model, record: Record, num_visual_tokens: int) -> list[torch.Tensor]:
    """Visual tokens of each slide, by itself, through a reducer of its own share."""
    sizes = [len(read_slide_features(path).features) for path in record.inputs]
    tokens = []
    for path, share in zip(record.inputs, share_budget(num_visual_tokens, sizes), strict=True):
        slide = read_case((path,), share if model.settings.token_reducer == "none" else 100, share)
        batch = collate([slide | {"input_ids": [1], "labels": [1]}])
        out, mask = model.visual_tokens(batch)
        tokens.append(out[mask])
    return tokens


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("family", ["gemma3n", "llama"])
def test_a_batch_of_one_two_and_three_slides_is_each_case_alone(cases, family, reducer):
    model, tokenizer = make_model(family, reducer, num_visual_tokens=9)
    data = ReportDataset.for_model(model, tokenizer, cases)
    samples = [data[SampleKey(i, 0, True)] for i in range(3)]
    with torch.no_grad():
        inputs = model.embed(collate(samples))
        together = model(collate(samples))
        torch.testing.assert_close(together, torch.cat([model(collate([s])) for s in samples]), atol=1e-4, rtol=0)
        for i, record in enumerate(cases):
            plain = plain_visual_tokens(model, record, 9)
            places = inputs["input_ids"][i] == model.settings.placeholder_id
            embeds = inputs["conditioning"]["inputs_embeds"][i]
            torch.testing.assert_close(embeds[places], torch.cat(plain), atol=1e-5, rtol=1e-5)
            starts = (places & ~places.roll(1)).nonzero().flatten().tolist()
            ends = (places & ~places.roll(-1)).nonzero().flatten().tolist()
            assert [end - start + 1 for start, end in zip(starts, ends, strict=True)] == list(map(len, plain))


def test_per_layer_inputs_and_decoding_see_every_marker_as_a_placeholder(cases):
    model, tokenizer = make_model("gemma3n", num_visual_tokens=9)
    data = ReportDataset.for_model(model, tokenizer, [Record("a", r.inputs, "", "", "a") for r in cases])
    batch = collate([data[SampleKey(i, 0, False)] for i in range(3)])
    assert (model.embed(batch)["input_ids"] == model.settings.placeholder_id).sum() == 27
    together = generate_answers(model, batch, stop_ids=[10**6], num_beams=2, max_new_tokens=5)
    for i in range(3):
        alone = collate([data[SampleKey(i, 0, False)]])
        assert generate_answers(model, alone, stop_ids=[10**6], num_beams=2, max_new_tokens=5)[0].token_ids == (
            together[i].token_ids
        )


@pytest.mark.parametrize("reducer", REDUCERS)
def test_gradients_reach_every_slide_and_change_no_other(cases, reducer):
    model, tokenizer = make_model("llama", reducer, num_visual_tokens=9)
    data = ReportDataset.for_model(model, tokenizer, cases)
    batch = collate([data[SampleKey(i, 0, True)] for i in range(3)])
    batch["patch_tokens"] = batch["patch_tokens"].float().requires_grad_(True)
    model(batch).sum().backward()
    reached = batch["patch_tokens"].grad.abs().amax(-1) > 0
    assert torch.equal(reached, batch["patch_mask"])
    tokens, mask = model.visual_tokens(batch)
    (of_slide,) = torch.autograd.grad(tokens[4][mask[4]].pow(3).sum(), batch["patch_tokens"])
    assert of_slide[4].abs().max() > 0
    assert of_slide[[0, 1, 2, 3, 5]].abs().max() == 0


@pytest.mark.parametrize("reducer", REDUCERS)
def test_a_budget_of_everything_is_bit_identical_to_none(reducer):
    torch.manual_seed(0)
    model, _ = make_model("llama", reducer, num_visual_tokens=7)
    sizes = torch.tensor([3, 7, 25])
    mask = torch.arange(25) < sizes.unsqueeze(1)
    coords = torch.randint(0, 5000, (3, 25, 2))
    tokens = torch.randn(3, 25, PATCH_WIDTH)
    with_budget = model.reducer(tokens, coords, mask, torch.full((3,), 7))
    without = model.reducer(tokens, coords, mask)
    assert all(torch.equal(a, b) for a, b in zip(with_budget, without, strict=True))


def test_two_views_of_a_patient_each_have_their_marker(corpus):
    model, tokenizer = make_model(encoder=load_encoder(str(corpus.encoder)), num_visual_tokens=6)
    images = (corpus.images / "0.png", corpus.images / "1.png")
    records = [Record("pair", images, "", "Breast", "0"), Record("one", images[:1], "", "Breast", "1")]
    data = ReportDataset.for_model(model, tokenizer, records)
    batch = collate([data[SampleKey(i, 0, True)] for i in range(2)])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["visual_budgets"].tolist() == [3, 3, 6]
    with torch.no_grad():
        tokens, mask = model.visual_tokens(batch)
        pair = read_images(images, model.encoder.transform, 6, 6)  # the encoder's number of patches unknown
        unchosen, unchosen_mask = model.visual_tokens(collate([pair | {"input_ids": [1], "labels": [1]}]))
    assert mask.sum(1).tolist() == [3, 3, 6]
    torch.testing.assert_close(tokens[:2][mask[:2]], unchosen[unchosen_mask])
    together = model(batch)
    alone = torch.cat([model(collate([data[SampleKey(i, 0, True)]])) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


# Drawing


def drawn(records, processes: int, workers: int, epoch: int) -> dict[int, bytes]:
    """What each record's patches were in an epoch, over all processes."""
    tokenizer = make_tokenizer()
    data = ReportDataset(records, tokenizer, Prompt.for_tokenizer(tokenizer), "?", num_patches=8, seed=5)
    seen = {}
    for process in range(processes):
        batches = RecordBatches(len(data), 2, num_processes=processes, shuffle=True, seed=5)
        batches.start_at(epoch)
        own = [batch for i, batch in enumerate(batches) if i % processes == process]
        for keys, batch in zip(own, make_loader(data, own, workers), strict=True):
            markers = (batch["input_ids"] == IMAGE_MARKER).sum(1).tolist()
            for key, tokens in zip(keys, batch["coords"].split(markers), strict=True):
                if key.supervised:
                    assert seen.setdefault(key.index, tokens.numpy().tobytes().rstrip(b"\0")) is not None
    return seen


def test_patches_are_drawn_alike_on_any_number_of_processes_and_workers(cases):
    records = [*cases, *cases[:2]]
    expected = drawn(records, 1, 0, epoch=3)
    assert expected.keys() == set(range(5))
    for processes, workers in ((2, 0), (3, 0), (1, 2), (2, 2)):
        assert drawn(records, processes, workers, epoch=3) == expected
    assert drawn(records, 1, 0, epoch=4) != expected
    assert expected[0] != expected[3]  # a record that comes twice is drawn twice


# Commands


def test_predict_and_generate_write_the_same_report_of_several_slides(corpus, cases, tmp_path):
    from tests.test_inference import save_model

    model = save_model(tmp_path / "final_model", corpus, patch_width=PATCH_WIDTH, token_reducer="grid_pool")
    names = [path.stem for path in cases[2].inputs]
    rows = [{"id": "case", "slides": names}, {"id": names[0]}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    shared = ["--model", model, "--num_beams", 1, "--max_new_tokens", 8]
    where = ["--features_dir", cases[2].inputs[0].parent, "--output", tmp_path / "p.json"]
    run_command("inference/predict.py", *shared, "--test_json", tmp_path / "t.json", *where)
    predicted = json.loads((tmp_path / "p.json").read_text())
    done = run_command("inference/generate.py", *shared, "--features", *cases[2].inputs, "--json")
    generated = json.loads(done.stdout)
    assert generated["report"] == predicted[0]["report"]
    assert generated["num_patches"] == 44 and generated["id"] == ", ".join(path.name for path in cases[2].inputs)
