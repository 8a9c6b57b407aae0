"""Annotation files, splits, prompts, batches."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slide_reports
from slide_features import write_slide_features
from slide_reports import (
    Prompt,
    Record,
    RecordBatches,
    ReportDataset,
    SampleKey,
    collate,
    patient_of,
    read_case,
    read_records,
    read_training_records,
    slide_id_of,
    split_by_patient,
)
from slide_reports.lengths import CutTexts, cut_texts, tell_cut_texts
from slide_vlm import IGNORED_LABEL, IMAGE_MARKER
from tests.conftest import ROOT
from tests.tiny_models import REPORTS, make_tokenizer

REG_TRAIN = ROOT.parent / "shared" / "data" / "reports" / "reg2025_train.json"


def write_json(path, rows):
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


# Records


def test_reg_records_find_their_features(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "PIT_01_00002_02.pt").touch()
    rows = [{"id": "PIT_01_00002_01.tiff", "report": " Breast, biopsy;\n  Benign \n"}, {"id": "PIT_01_00002_02.tiff"}]
    first, second = read_records(write_json(tmp_path / "r.json", rows), features_dir=tmp_path / "f")
    assert first == Record(
        "PIT_01_00002_01.tiff",
        (tmp_path / "f" / "PIT_01_00002_01.h5",),
        "",
        "Breast, biopsy;\n  Benign",
        "PIT_01_00002",
    )
    assert second.inputs[0].suffix == ".pt" and second.answer == "" and second.group == first.group


def test_image_captions_and_questions(tmp_path):
    captions = write_json(tmp_path / "c.json", [{"image": "a/x.png", "caption": "Clear lungs."}])
    (record,) = read_records(captions, image_root=tmp_path)
    assert (record.inputs, record.question, record.answer) == ((tmp_path / "a/x.png",), "", "Clear lungs.")
    questions = write_json(tmp_path / "q.json", [{"image": "x.png", "problem": "Lungs?", "normal_caption": "Clear."}])
    (record,) = read_records(questions, image_root=tmp_path)
    assert (record.question, record.answer) == ("Lungs?", "Clear.")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "not valid JSON"),
        ("{}", "expected a list"),
        ("[]", "at least one record"),
        ('["text"]', "record 0 is a str"),
        ('[{"name": "x"}]', "unknown form"),
        ('[{"id": 3, "report": "x"}]', "record 0 has 3 under 'id'"),
        ('[{"id": "a", "report": "x"}, {"id": "b", "report": ["x"]}]', "record 1 \\(b\\)"),
        ('[{"id": "a", "report": NaN}]', "record 0 holds NaN"),
        ('[{"id": "../secret", "report": "x"}]', "outside"),
        ('[{"id": "/etc/passwd", "report": "x"}]', "outside"),
        ('[{"image": "../../etc/passwd", "caption": "x"}]', "outside"),
        ('[{"image": "a.png", "caption": null}]', "has None under 'caption'"),
        ('[{"image": "a.png", "problem": "", "normal_caption": "x"}]', "under 'problem'"),
    ],
)
def test_broken_annotations_name_file_record_and_fault(tmp_path, content, message):
    (tmp_path / "root").mkdir()
    path = write_json(tmp_path / "broken.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_records(path, features_dir=tmp_path / "root", image_root=tmp_path / "root")
    assert str(path) in str(error.value)


def test_links_out_of_the_root_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").touch()
    (tmp_path / "root" / "x.png").symlink_to(tmp_path / "secret.png")
    path = write_json(tmp_path / "r.json", [{"image": "x.png", "caption": "x"}])
    with pytest.raises(ValueError, match="outside"):
        read_records(path, image_root=tmp_path / "root")


@pytest.mark.parametrize(
    "name, slide_id, patient",
    [
        ("PIT_01_00002_01.tiff", "PIT_01_00002_01", "PIT_01_00002"),
        ("TCGA-CR-7395-01A-01-TS1.svs", "TCGA-CR-7395-01A-01-TS1", "TCGA-CR-7395"),
        ("TCGA-AA-1234-01Z-00-DX1.0b6b4c3e-1234.svs", "TCGA-AA-1234-01Z-00-DX1.0b6b4c3e-1234", "TCGA-AA-1234"),
        ("S12.345", "S12.345", "S12.345"),
        ("slide", "slide", "slide"),
    ],
)
def test_slide_and_patient_names(name, slide_id, patient):
    assert slide_id_of(name) == slide_id
    assert patient_of(slide_id) == patient


def record(i: int, patient: str, split: str = "") -> Record:
    return Record(str(i), (), "", "x", patient, split)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_no_patient_is_on_both_sides_of_a_split(patients, fraction, seed):
    records = [record(i, f"P{p}") for i, p in enumerate(patients)]
    train, held_out = split_by_patient(records, fraction, seed)
    assert Counter(train + held_out) == Counter(records)
    assert not {r.group for r in train} & {r.group for r in held_out}


def test_split_stays_when_patients_are_added():
    few, many = ([record(i, f"P{i}") for i in range(n)] for n in (200, 400))
    assert set(split_by_patient(few, 0.2, 1)[1]) <= set(split_by_patient(many, 0.2, 1)[1])
    assert 0.1 < len(split_by_patient(many, 0.2, 1)[1]) / 400 < 0.3


def test_splits_named_in_the_file_are_kept(tmp_path):
    (tmp_path / "f").mkdir()
    rows = [{"id": f"s{i}", "report": "x", "split": split} for i, split in enumerate(["train", "val", "test"])]
    for i in range(3):
        write_features(tmp_path / "f" / f"s{i}.h5", 3)
    path = write_json(tmp_path / "r.json", rows)
    train, val, problems = read_training_records(
        path, None, features_dir=tmp_path / "f", image_root=None, val_fraction=0.5, seed=0
    )
    assert ([r.id for r in train], [r.id for r in val], problems) == (["s0"], ["s1"], [])


@pytest.mark.skipif(not REG_TRAIN.exists(), reason="../shared/data/reports is not here")
def test_the_reg_2025_file_reads_whole(tmp_path):
    records = read_records(REG_TRAIN, features_dir=tmp_path)
    assert len(records) == 8494
    assert all(r.group.count("_") == 2 for r in records)
    train, val = split_by_patient(records, 0.1, 0)
    assert not {r.group for r in train} & {r.group for r in val}
    assert abs(len(val) / len(records) - 0.1) < 0.01


# Prompt


@pytest.mark.parametrize("chat", [True, False])
def test_prompt_and_answer_make_the_chat_template(chat):
    tokenizer = make_tokenizer(chat)
    prompt = Prompt.for_tokenizer(tokenizer)
    ids = prompt.question_ids(tokenizer, "Which organ? {x}", 64) + prompt.answer_ids(tokenizer, "Breast", 64)
    assert ids.count(IMAGE_MARKER) == 1
    at = ids.index(IMAGE_MARKER)
    text = tokenizer.decode(ids[:at]) + "<|image|>" + tokenizer.decode(ids[at + 1 :])
    if chat:
        turns = [{"role": "user", "content": "<|image|>\nWhich organ? {x}"}, {"role": "assistant", "content": "Breast"}]
        assert text == tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    else:
        assert text == "<bos><|image|>\nWhich organ? {x}\nBreast<eos>"


def test_a_conversation_makes_the_chat_template_and_teaches_every_answer(tmp_path):
    tokenizer = make_tokenizer()
    prompt = Prompt.for_tokenizer(tokenizer)
    inputs = (write_features(tmp_path / "a.h5", 5),)
    record = Record("a", inputs, "Organ?", "Breast", "a", later_turns=(("Benign?", "Yes"), ("Sure?", "Yes")))
    data = ReportDataset([record], tokenizer, prompt, "?", num_patches=10)
    sample = data[SampleKey(0, 0, True)]
    roles = ("user", "assistant", "user", "assistant", "user", "assistant")
    texts = ("<|image|>\nOrgan?", "Breast", "Benign?", "Yes", "Sure?", "Yes")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    at = sample["input_ids"].index(IMAGE_MARKER)
    text = tokenizer.decode(sample["input_ids"][:at]) + "<|image|>" + tokenizer.decode(sample["input_ids"][at + 1 :])
    assert text == tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    taught = tokenizer.decode([label for label in sample["labels"] if label != IGNORED_LABEL])
    assert taught == "Breast<end_of_turn>Yes<end_of_turn>Yes<end_of_turn>"
    assert len(sample["labels"]) == len(sample["input_ids"])


def test_texts_that_are_cut_are_counted(capsys, monkeypatch):
    tokenizer, limit = make_tokenizer(), 12
    texts = [*REPORTS, "\N{GREEK SMALL LETTER MU}" * 7, "Lung", "a b c d e f", "a b c d e f g h i j k l m n o p", ""]
    why = "Why is it not that of the organ beside it?"
    records = [Record(f"{n}", (), "", text, f"{n}", later_turns=((why, text),)) for n, text in enumerate(texts)]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    expected = CutTexts(2 * sum(n > limit for n in lengths), 2 * (len(texts) - 1), max(lengths))
    assert cut_texts(records, "answers", tokenizer, limit) == expected and 0 < expected.cut < expected.total
    assert cut_texts(records, "answers", tokenizer, max(lengths)) == CutTexts(0, expected.total, 0)
    longest = len(tokenizer(why, add_special_tokens=False)["input_ids"])
    assert cut_texts(records, "questions", tokenizer, longest - 1) == CutTexts(len(texts), len(texts), longest)

    limits = {"questions": longest, "answers": limit}
    found = tell_cut_texts(tokenizer, limits, train=records, val=[])
    assert found == {"cut_questions": {"train": f"0 of {len(texts)}"}, "cut_answers": {"train": str(expected)}}
    told = capsys.readouterr().err
    share = f"({expected.cut / expected.total:.1%}) have more than 12 tokens, the longest {expected.longest}; they lose"
    assert told.startswith(f"warning: train: {expected.cut} of {expected.total} answers {share}")
    assert "raise --max_answer_tokens" in told and told.count("\n") == 1
    tell_cut_texts(tokenizer, {"questions": 3}, train=records)
    assert "they lose their end: raise --max_question_tokens" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert tell_cut_texts(tokenizer, limits, train=records) == {}


def test_few_cut_texts_are_worth_no_warning():
    assert not CutTexts(cut=1, total=100, longest=9).is_much and CutTexts(2, 100, 9).is_much
    assert not CutTexts(0, 0, 0).is_much


def test_long_texts_are_cut():
    tokenizer = make_tokenizer()
    prompt = Prompt.for_tokenizer(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    whole = prompt.answer_ids(tokenizer, REPORTS[0], 512)
    assert whole[-1] == end
    assert prompt.answer_ids(tokenizer, REPORTS[0], 5) == whole[:5]
    few = len(prompt.question_ids(tokenizer, "a", 512))
    assert len(prompt.question_ids(tokenizer, "organ " * 100, 5)) <= few + 5


# Dataset and batches


def write_features(path, num_patches, seed=0, width=4):
    rng = np.random.default_rng(seed)
    coords = np.stack([np.arange(num_patches) % 7, np.arange(num_patches) // 7], axis=1) * 256
    shuffled = rng.permutation(num_patches)
    features = np.repeat(np.arange(num_patches, dtype=np.float32)[:, None], width, axis=1)
    write_slide_features(
        path,
        features[shuffled],
        coords[shuffled],
        name="s",
        encoder="e",
        mpp=0.5,
        tile_size=256,
        overlap=0,
        patch_size_level0=256,
    )
    return path


def test_patches_come_in_raster_order_whatever_the_order_of_the_file(tmp_path):
    case = read_case((write_features(tmp_path / "s.h5", 40),), 100, 100)
    assert case["patch_tokens"][0][:, 0].tolist() == list(range(40))
    assert case["coords"][0].dtype == torch.int64


def test_patches_are_drawn_by_seed_epoch_and_record_and_evenly_without_seed(tmp_path):
    tokenizer = make_tokenizer()
    records = [Record(name, (write_features(tmp_path / f"{name}.h5", 50),), "", "x", name) for name in "ab"]
    data = ReportDataset(records, tokenizer, Prompt.for_tokenizer(tokenizer), "?", num_patches=10, seed=3)

    def drawn(key, data=data):
        return tuple(data[key]["patch_tokens"][0][:, 0].int().tolist())

    first = drawn(SampleKey(0, 0, True))
    assert len(set(first)) == 10 and list(first) == sorted(first)
    assert drawn(SampleKey(0, 0, True)) == first
    assert drawn(SampleKey(0, 1, True)) != first
    assert drawn(SampleKey(1, 0, True)) != first
    fixed = ReportDataset(records, tokenizer, Prompt.for_tokenizer(tokenizer), "?", num_patches=10)
    evenly = drawn(SampleKey(0, 0, True), fixed)
    assert evenly == drawn(SampleKey(1, 5, True), fixed)
    assert max(np.diff(evenly)) - min(np.diff(evenly)) <= 1


def test_loss_is_on_the_answer_only_and_a_filler_has_none(tmp_path):
    tokenizer = make_tokenizer()
    prompt = Prompt.for_tokenizer(tokenizer)
    records = [Record("a", (write_features(tmp_path / "a.h5", 5),), "Organ?", "Breast", "a")]
    data = ReportDataset(records, tokenizer, prompt, "?", num_patches=10)
    sample = data[SampleKey(0, 0, True)]
    supervised = [label for label in sample["labels"] if label != IGNORED_LABEL]
    assert tokenizer.decode(supervised) == "Breast<end_of_turn>"
    assert sample["input_ids"][-len(supervised) :] == supervised
    assert set(data[SampleKey(0, 0, False)]["labels"]) == {IGNORED_LABEL}


def test_width_that_does_not_fit_the_model_is_named(tmp_path):
    path = write_features(tmp_path / "a.h5", 5)
    with pytest.raises(ValueError, match="a.h5 was made with patch_width 4, not 8"):
        read_case((path,), 10, 10, expected={"patch_width": 8})


def test_a_file_that_is_made_anew_otherwise_is_noticed(tmp_path):
    path = write_features(tmp_path / "a.h5", 5)
    expected = {"patch_width": 4}
    read_case((path,), 10, 10, expected=expected)
    write_features(path, 6, width=8)
    with pytest.raises(ValueError, match="a.h5 was made with patch_width 8, not 4"):
        read_case((path,), 10, 10, expected=expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_every_record_comes_once_on_equally_many_batches(n, batch_size, processes, accumulation, shuffle, epoch):
    batches = RecordBatches(
        n,
        batch_size,
        num_processes=processes,
        gradient_accumulation_steps=accumulation,
        shuffle=shuffle,
        seed=1,
    )
    batches.start_at(epoch)
    listed = list(batches)
    assert len(listed) == len(batches) == batches.steps_per_epoch * processes * accumulation
    assert sorted(key.index for batch in listed for key in batch if key.supervised) == list(range(n))
    assert all(1 <= len(batch) <= batch_size for batch in listed)
    assert all(key.epoch == epoch for batch in listed for key in batch)
    # The records of a step do not depend on how many processes share it.
    alone = RecordBatches(n, batch_size * processes * accumulation, shuffle=shuffle, seed=1)
    alone.start_at(epoch)
    window = processes * accumulation
    for step, together in enumerate(alone):
        shared = [key for batch in listed[step * window : (step + 1) * window] for key in batch if key.supervised]
        assert shared == together
    batches.start_at(epoch, first_step=1)
    assert list(batches) == listed[window:]


def test_batches_are_padded_to_their_own_longest():
    def sample(length, patches, dtype):
        return {
            "input_ids": [5] * length,
            "labels": [6] * length,
            "patch_tokens": [torch.ones(patches, 3, dtype=dtype)],
            "coords": [torch.ones(patches, 2, dtype=torch.long)],
            "visual_budgets": torch.tensor([5]),
        }

    batch = collate([sample(4, 2, torch.float16), sample(2, 5, torch.float32)])
    assert batch["input_ids"].tolist() == [[5] * 4, [5, 5, 0, 0]]
    assert batch["labels"].tolist() == [[6] * 4, [6, 6, IGNORED_LABEL, IGNORED_LABEL]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert batch["patch_mask"].sum(1).tolist() == [2, 5]
    assert batch["patch_tokens"].shape == (2, 5, 3) and batch["patch_tokens"].dtype == torch.float32


def test_names_of_the_package_are_imported_when_asked_for():
    heavy = "('torch', 'transformers', 'datasets')"
    check = f"import sys, slide_reports.record; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(slide_reports, name) is not None for name in slide_reports.__all__)
    assert {*slide_reports.__all__} <= {*dir(slide_reports)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = slide_reports.nothing
