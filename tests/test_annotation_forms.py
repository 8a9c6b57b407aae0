"""Every form of annotation that groups have, and sixty ways in which such a file can be broken."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slide_reports import RecordTable, read_records
from slide_reports.edits import listed_ids
from slide_reports.paths import Folders
from slide_reports.record import Record, patient_of
from slide_reports.table import column, fields
from tests.conftest import ROOT

IU_XRAY = ROOT.parent / "shared" / "data" / "reports" / "iu_xray_annotation.json"


@pytest.fixture
def roots(tmp_path):
    for name in ("features", "images"):
        (tmp_path / name).mkdir()
    return {"features_dir": tmp_path / "features", "image_root": tmp_path / "images"}


def write(path: Path, content) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(tmp_path, roots, content, name="a.json", **options):
    return list(read_records(write(tmp_path / name, content), **roots, **options))


def names(record: Record) -> list[str]:
    return [path.name for path in record.inputs]


# Forms


def test_chain_of_questions_gives_a_record_a_step(tmp_path, roots):
    chain = [
        {"question": "What is the organ?", "answer": "Breast", "next_question": "What is the final pathology report?"},
        {"question": "What is the final pathology report?", "answer": "Breast, biopsy;\n  Benign", "next_question": ""},
    ]
    first, last = read(tmp_path, roots, [{"id": "PIT_01_00020_01.tiff", "chain-of-thought": chain}])
    assert (first.id, first.question, first.answer) == ("PIT_01_00020_01.tiff", "What is the organ?", "Breast")
    assert (last.question, last.answer) == ("What is the final pathology report?", "Breast, biopsy;\n  Benign")
    assert first.inputs == last.inputs and first.group == last.group == "PIT_01_00020"


def test_conversation_keeps_every_turn_and_drops_image_markers(tmp_path, roots):
    said = [
        {"from": "system", "value": "You are a pathologist."},
        {"from": "human", "value": "<image>\nWhich organ?"},
        {"from": "gpt", "value": "Breast"},
        {"from": "human", "value": "Is it malignant?"},
        {"from": "gpt", "value": "No"},
        {"from": "human", "value": "Sure?"},
    ]
    rows = [{"id": 7, "image": "slides/a.pt", "conversations": said}]
    (record,) = read(tmp_path, roots, rows)
    assert record.turns == (
        ("You are a pathologist.\nWhich organ?", "Breast"),
        ("Is it malignant?", "No"),
        ("Sure?", ""),
    )
    assert record.id == "7" and record.inputs == (roots["features_dir"] / "slides/a.pt",)


def test_conversations_in_lines_with_several_images(tmp_path, roots):
    def row(i):
        said = [{"from": "human", "value": "Look: <image><image>"}, {"from": "gpt", "value": f"Clear {i}."}]
        return {"id": i, "image": [f"{i}a.png", f"{i}b.png"], "width": 3, "conversations": said}

    records = read(tmp_path, roots, "\n".join(json.dumps(row(i)) for i in range(3)) + "\n", "a.jsonl")
    assert [r.answer for r in records] == ["Clear 0.", "Clear 1.", "Clear 2."]
    assert names(records[1]) == ["1a.png", "1b.png"] and records[0].question == "Look:"
    (alone,) = read(tmp_path, roots, json.dumps(row(5)), "b.jsonl")
    assert alone.answer == "Clear 5."


def test_chat_messages(tmp_path, roots):
    messages = [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "Lung"}]
    (record,) = read(tmp_path, roots, [{"messages": messages, "images": ["x.jpg"]}])
    assert (record.id, record.question, record.answer) == ("x.jpg", "What?", "Lung")


def test_meta_file_mixes_sets_with_roots_and_repetitions(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        rows = [{"image": f"{name}.png", "caption": f"Caption {name}."}]
        write(tmp_path / "sets" / f"{name}.json", rows)
    entries = {
        name: {"root": f"sets/{name}", "annotation": f"sets/{name}.json", "repeat_time": times, "length": 1}
        for name, times in (("one", 1), ("two", 3))
    }
    records = list(read_records(write(tmp_path / "meta.json", entries)))
    assert [r.answer for r in records] == ["Caption one."] + 3 * ["Caption two."]
    assert records[0].inputs == (tmp_path / "sets/one/one.png",)


def test_r2gen_names_two_images_and_its_splits(tmp_path, roots):
    rows = {
        split: [{"id": f"CXR_{split}", "report": "Clear .", "image_path": [f"{split}/0.png", f"{split}/1.png"]}]
        for split in ("train", "val", "test")
    }
    records = read(tmp_path, roots, rows)
    assert [r.split for r in records] == ["train", "val", "test"]
    assert [path.relative_to(roots["image_root"]).as_posix() for path in records[1].inputs] == [
        "val/0.png",
        "val/1.png",
    ]


@pytest.mark.skipif(not IU_XRAY.exists(), reason="../shared/data/reports is not here")
def test_the_iu_xray_file_reads_whole(tmp_path):
    records = read_records(IU_XRAY, image_root=tmp_path)
    assert [column(records, "split").count(split) for split in ("train", "val", "test")] == [3062, 382, 382]


def test_wsi_vqa_shows_the_choices(tmp_path, roots):
    rows = [
        {"Id": "TCGA-A2-A0D2", "Question": "Which subtype?", "Choice": ["Luminal", "Basal"], "Answer": "Basal"},
        {"Id": "TCGA-A2-A0D2", "Question": "Which grade?", "Answer": "2"},
    ]
    choice, open_question = read(tmp_path, roots, rows)
    assert choice.question == "Which subtype?\nA. Luminal\nB. Basal" and choice.answer == "Basal"
    assert open_question.question == "Which grade?" and names(open_question) == ["TCGA-A2-A0D2.h5"]


def test_table_of_feature_files_has_caption_rows_and_question_rows(tmp_path, roots):
    lines = [
        "h5_path,caption,question,answer,slide_id,dataset",
        'a.h5,"A breast, with cancer",,,slide_001,PathText',
        "b.h5,Malignant,What is the diagnosis?,Ductal carcinoma,slide_002,VQA",
    ]
    for name, text in (("a.csv", "\r\n".join(lines)), ("b.csv", "\ufeff" + "\n".join(lines))):
        caption, question = read(tmp_path, roots, text, name)
        assert (caption.id, caption.question, caption.answer) == ("slide_001", "", "A breast, with cancer")
        assert (question.question, question.answer) == ("What is the diagnosis?", "Ductal carcinoma")
        assert names(question) == ["b.h5"]


def test_table_of_slides(tmp_path, roots):
    tabs = "slide_id\tpatient_id\treport\ns1.svs\tP9\tBenign\n"
    (record,) = read(tmp_path, roots, tabs, "a.tsv")
    assert (record.id, record.group, record.answer, names(record)) == ("s1.svs", "P9", "Benign", ["s1.h5"])


def test_case_of_several_slides(tmp_path, roots):
    (record,) = read(tmp_path, roots, [{"id": "case1", "slides": ["a.svs", "b.svs"], "report": "Benign"}])
    assert names(record) == ["a.h5", "b.h5"]


def test_parquet_and_saved_datasets_with_pictures_inside(tmp_path, roots, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"id": ["a", "b"], "report": ["One", "Two"], "question": [None, "Why?"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet", **roots))
    assert [(r.id, r.question, r.answer) for r in records] == [("a", "", "One"), ("b", "Why?", "Two")]

    picture = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    part = datasets.Dataset.from_dict({"image": [picture], "caption": ["Grey."]}, features=features)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "saved")
    train, val = read_records(tmp_path / "saved")
    assert (train.split, val.split, train.answer) == ("train", "val", "Grey.")
    assert Image.open(train.inputs[0]).getpixel((3, 3)) == (90, 90, 90)
    with pytest.raises(ValueError, match="no dataset that"):
        read_records(tmp_path / "features")


def test_excluded_and_revised_records(tmp_path, roots):
    rows = [{"id": f"s{i}.svs", "report": f"Old {i}"} for i in range(4)]
    exclude = write(tmp_path / "out.csv", "id,reason\ns1.svs,blurred\ns3,consent withdrawn\n")
    revise = write(tmp_path / "new.json", [{"id": "s2.svs", "report": "New 2"}])
    records = read(tmp_path, roots, rows, exclude=exclude, revise=revise)
    assert [(r.id, r.answer) for r in records] == [("s0.svs", "Old 0"), ("s2.svs", "New 2")]
    assert listed_ids(write(tmp_path / "plain.txt", "a\n\nb\n")) == ["a", "b"]
    assert "s1" in listed_ids(write(tmp_path / "one_column.csv", "id\ns1\n"))
    assert listed_ids(write(tmp_path / "capitals.csv", "ID\ns1\n")) == ["s1"]
    assert listed_ids(write(tmp_path / "semicolons.csv", "id;reason\ns1;blurred, twice\n")) == ["s1"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_with_the_separator_of_its_header(tmp_path, roots, separator):
    answer = "Mammastanzbiopsie, rechts;\tinvasives Karzinom, m\u00e4\u00dfig differenziert"
    rows = [["id", "report", "split"], ["s1.svs", answer, "train"], ["s2.svs", "Lunge", ""], ["", "", ""]]
    with (tmp_path / "excel.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator, lineterminator="\r\n").writerows(rows)
    found = read_records(tmp_path / "excel.csv", **roots)
    assert [(r.id, r.answer, r.split) for r in found] == [("s1.svs", answer, "train"), ("s2.svs", "Lunge", "")]


def test_exclusion_knows_a_slide_by_any_suffix_and_in_quotes(tmp_path, roots):
    rows = [{"id": name, "report": "x"} for name in ("s1", "s2.svs", "s3.tiff", "s4")]
    for name, text in (
        ("a.csv", '"id"\n"s1"\n"s2.svs"\n'),
        ("b.txt", "s1.svs\ns2.tiff\n"),
        ("c.csv", "id,why\ns1.svs ,x\ns2,y\n"),
    ):
        exclude = write(tmp_path / name, text)
        assert [r.id for r in read(tmp_path, roots, rows, exclude=exclude)] == ["s3.tiff", "s4"]
    with pytest.raises(ValueError, match="empty.csv: it is empty; list ids in it"):
        read(tmp_path, roots, rows, exclude=write(tmp_path / "empty.csv", ""))


def test_revision_replaces_the_answer_to_its_question_only(tmp_path, roots):
    chain = [{"question": "Organ?", "answer": "Breast"}, {"question": "Report?", "answer": "Old"}]
    rows = [{"id": "s1.tiff", "chain-of-thought": chain}, {"id": "s2", "report": "Old"}]
    texts = [{"id": "s1", "question": "Report?", "report": "New"}, {"id": "s2.svs", "report": "New 2"}]
    revise = write(tmp_path / "new.json", texts)
    assert [r.answer for r in read(tmp_path, roots, rows, revise=revise)] == ["Breast", "New", "New 2"]


def test_patients_by_pattern_or_field(tmp_path, roots):
    rows = [{"id": "H23-001-A.svs", "report": "x"}, {"id": "H23-001-B.svs", "report": "x", "patient_id": "someone"}]
    first, second = read(tmp_path, roots, rows, group_pattern=r"^(H\d+-\d+)")
    assert (first.group, second.group) == ("H23-001", "someone")
    assert patient_of("ab12", r"(x)|\d+") == "ab12"
    assert patient_of("ab12", r"\d+") == "12" and patient_of("ab", r"\d+") == "ab"


def test_records_of_one_slide_have_one_patient_in_every_form(tmp_path, roots):
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]
    talks = [{"id": i, "image": f"sub/TCGA-A2-A0D2-0{i}Z.pt", "conversations": said} for i in (1, 2)]
    assert {r.group for r in read(tmp_path, roots, talks)} == {"TCGA-A2-A0D2"}
    talks = [{"id": i, "image": "sub/slide.pt", "conversations": said} for i in (1, 2)]
    assert len({r.group for r in read(tmp_path, roots, talks)}) == 1
    table = "h5_path,caption\nsub/PIT_01_00020_01.h5,x\nPIT_01_00020_02.h5,x\n"
    assert {r.group for r in read(tmp_path, roots, table, "a.csv")} == {"PIT_01_00020"}
    (tile,) = read(tmp_path, roots, [{"image": "PIT_01_00020_01/tile_7.png", "caption": "x"}])
    assert tile.group == "PIT_01_00020"
    numbered = [{"id": f"s{i}", "report": "x", "patient_id": 0} for i in range(2)]
    assert {r.group for r in read(tmp_path, roots, numbered)} == {"0"}


def test_cases_whose_images_have_the_same_names_are_different_patients(tmp_path, roots):
    rows = [{"id": f"CXR{i}", "report": "x", "image_path": [f"CXR{i}/0.png", f"CXR{i}/1.png"]} for i in range(2)]
    assert {r.group for r in read(tmp_path, roots, rows)} == {"CXR0", "CXR1"}
    captions = [{"image": f"{i}/0.png", "caption": "x"} for i in range(2)]
    assert len({r.group for r in read(tmp_path, roots, captions)}) == 2
    mimic = [row | {"subject_id": 10000032} for row in rows]
    assert {r.group for r in read(tmp_path, roots, mimic)} == {"10000032"}


def test_table_of_records_reads_like_a_list(tmp_path):
    records = [
        Record(f"s{i}", (tmp_path / f"{i}.h5",) * (i % 3), "q", "a", "g", "train", (("x", "y"),) * (i % 2))
        for i in range(9)
    ]
    table = RecordTable.of(records)
    assert list(table) == records and table[4] == records[4] and table[-1] == records[-1]
    assert list(table.select([5, 1, 5])) == [records[5], records[1], records[5]]
    assert list(table[2:7]) == records[2:7] and len(table[2:7]) == 5
    for part, of_part in ((table, records), (table.select([5, 1, 5]), [records[i] for i in (5, 1, 5)])):
        for name in ("id", "inputs", "turns", "group", "split"):
            assert column(part, name) == column(of_part, name)
        assert list(fields(part, "inputs", "turns")) == list(fields(of_part, "inputs", "turns"))
    assert column(table, "turns") == [record.turns for record in records]
    assert column(table, "inputs") == [[str(path) for path in record.inputs] for record in records]


def test_a_slide_is_found_whichever_way_it_is_stored(tmp_path):
    root = tmp_path / "f"
    root.mkdir()
    (tmp_path / "secret.h5").touch()
    for name in ("a.h5", "a.pt", "b.pt", "d.pt"):
        (root / name).touch()
    (root / "c.h5").symlink_to(root / "a.h5")
    (root / "d.h5").symlink_to(tmp_path / "secret.h5")
    folders = Folders(root, None)
    names = {"a": "a.h5", "a.tiff": "a.h5", "b": "b.pt", "c": "c.h5", "none": "none.h5"}
    for _ in range(2):  # the second time from what is remembered
        for name, file in names.items():
            assert folders.locate("record 0", "slide", name) == root / file
        with pytest.raises(ValueError, match="outside"):
            folders.locate("record 1", "slide", "d")  # a link that leads out, though d.pt does not
        with pytest.raises(ValueError, match="--image_root"):
            folders.locate("record 2", "image", "a.h5")


# Broken files

GOOD = {"id": "a", "report": "x"}
DEEP = "[" * 100_000
SAID = {"from": "human", "value": "x"}
BROKEN = {
    "empty": ("", "empty"),
    "blank": (" \n ", "empty"),
    "byte order mark alone": ("\ufeff", "empty"),
    "truncated in a string": ('[{"id": "a", "rep', "record 0 is not valid JSON"),
    "truncated after a record": ('[{"id": "a", "report": "x"}', "cut short"),
    "truncated after a comma": ('[{"id": "a", "report": "x"},', "record 1 is not valid JSON"),
    "truncated in the 3rd": ('[{"id": "a"}, {"id": "b"}, {"id"', "record 2 is not valid JSON"),
    "no comma": ('[{"id": "a"} {"id": "b"}]', "after record 0"),
    "rest after the list": ('[{"id": "a"}] x', "after its list"),
    "two lists": ('[{"id": "a"}][{"id": "b"}]', "after its list"),
    "single quotes": ("[{'id': 'a'}]", "record 0 is not valid JSON"),
    "comment": ('// reports\n[{"id": "a"}]', "not valid JSON"),
    "UTF-16": ('[{"id": "a"}]'.encode("utf-16"), "UTF-8"),
    "Latin-1": ('[{"id": "a", "report": "caf\xe9"}]'.encode("latin-1"), "UTF-8"),
    "binary": (bytes(range(256)), "UTF-8"),
    "a string": ('"reports"', "found str"),
    "a number": ("3", "found int"),
    "null": ("null", "found NoneType"),
    "empty list": ("[]", "empty list"),
    "empty object": ("{}", "found no key"),
    "list of texts": ('["a"]', "record 0 is a str"),
    "list of lists": ('[["a", "x"]]', "record 0 is a list"),
    "null among records": ('[{"id": "a"}, null]', "record 1 is a NoneType"),
    "deep": (DEEP, "nested too deeply"),
    "deep field": ('[{"id": "a", "report": ' + DEEP, "nested too deeply"),
    "double key": ('[{"id": "a", "report": "x", "report": "y"}]', "'report' twice"),
    "NaN": ('[{"id": "a", "report": NaN}]', "holds NaN"),
    "infinity": ('[{"id": "a", "report": -Infinity}]', "holds -Infinity"),
    "number of 5000 digits": ('[{"id": "a", "report": ' + "9" * 5000 + "}]", "record 0 is not valid JSON"),
    "half a character": ('[{"id": "a", "report": "x \\ud83d"}]', "half a character"),
    "half a character in an id": ('[{"id": "a\\udc00", "report": "x"}]', "half a character"),
    "id of two lines": ([{"id": "a\nb", "report": 3}], "(a b)"),
    "id of two lines, unknown split": ([{"id": "a\nb", "report": "x", "split": "z"}], "(a b)"),
    "field of two lines": ([{"na\nme": "x"}], "the fields na me"),
    "no id": ([{"report": "x"}], "unknown form"),
    "unknown form": ([{"name": "x"}], "unknown form"),
    "no fields": ([{}], "the fields none"),
    "id a number": ([{"id": 3, "report": "x"}], "has 3 under 'id'"),
    "id null": ([{"id": None, "report": "x"}], "has None under 'id'"),
    "id blank": ([{"id": "  ", "report": "x"}], "under 'id'"),
    "report a list": ([GOOD, {"id": "b", "report": ["x"]}], "record 1 (b)"),
    "report a number": ([{"id": "b", "report": 5}], "has 5 under 'report'"),
    "report an object": ([{"id": "b", "report": {"a": 1}}], "under 'report'"),
    "unknown split": ([GOOD | {"split": "holdout"}], "'holdout' is no split"),
    "split a number": ([GOOD | {"split": 1}], "has 1 under 'split'"),
    "split under a key of blanks": ({"train": [GOOD], "  ": [GOOD]}, "'  ' is no split"),
    "split under an odd key": ({"train": [GOOD], "tset": [GOOD]}, "'tset' is no split"),
    "split that is no list": ({"train": {"a": GOOD}}, "expected a list of records"),
    "record in a split is text": ({"train": ["x"]}, "record 0 is a str"),
    "traversal in an id": ([{"id": "../../etc/passwd", "report": "x"}], "outside"),
    "id of 5000 letters": ([{"id": "a" * 5000, "report": "x"}], "longer than a file's name may be"),
    "text in the place of an image": ([{"image": "Breast, biopsy. " * 40, "caption": "x"}], "is it a text?"),
    "workbook": (b"PK\x03\x04 and more", "a workbook of Excel or another zip, not JSON"),
    "gzip": (b"\x1f\x8b\x08 and more", "packed by gzip"),
    "table with semicolons": ("id;report\na;Breast; biopsy\n", "than the header; quote texts with semicolons"),
    "absolute id": ([{"id": "/etc/passwd", "report": "x"}], "outside"),
    "traversal in an image": ([{"image": "../../etc/passwd", "caption": "x"}], "outside"),
    "absolute image": ([{"image": "/etc/passwd", "caption": "x"}], "outside"),
    "image is a folder up": ([{"image": "..", "caption": "x"}], "outside"),
    "image is the folder": ([{"image": ".", "caption": "x"}], "outside"),
    "image with a NUL": ([{"image": "a\0.png", "caption": "x"}], "outside"),
    "image through a link": ([{"image": "link.png", "caption": "x"}], "outside"),
    "image below a linked folder": ([{"image": "linked/secret.png", "caption": "x"}], "outside"),
    "second image leaves": ([{"id": "a", "report": "x", "image_path": ["a.png", "../b.png"]}], "outside"),
    "feature file leaves": ("h5_path,caption\n../../secret.h5,x\n", "outside"),
    "image a number": ([{"image": 3, "caption": "x"}], "has 3 under 'image'"),
    "image an empty list": ([{"id": "a", "report": "x", "image_path": []}], "under 'image_path'"),
    "image and features": ([{"image": ["a.png", "b.h5"], "conversations": [SAID]}], "both images and feature files"),
    "caption null": ([{"image": "a.png", "caption": None}], "has None under 'caption'"),
    "question blank": ([{"image": "a.png", "problem": "", "normal_caption": "x"}], "under 'problem'"),
    "chain is text": ([{"id": "a", "chain-of-thought": "x"}], "expected a list that holds something"),
    "chain is empty": ([{"id": "a", "chain-of-thought": []}], "expected a list that holds something"),
    "step without a question": ([{"id": "a", "chain-of-thought": [{"answer": "x"}]}], "step 0"),
    "step is text": ([{"id": "a", "chain-of-thought": ["x"]}], "step 0, is a str"),
    "conversation is empty": ([{"id": "a", "image": "a.png", "conversations": []}], "under 'conversations'"),
    "conversation with a stranger": (
        [{"id": "a", "image": "a.png", "conversations": [{"from": "cat", "value": "x"}]}],
        "by 'cat'",
    ),
    "message without text": (
        [{"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": 3}]}],
        "message 0",
    ),
    "conversation without an image": ([{"id": "a", "conversations": [SAID]}], "has nothing under 'image'"),
    "line that is no object": ('{"id": "a"}\n"x"\n', "record 1 is a str"),
    "line that goes on": ('{"id": "a"}\n{"id": "b"} {"id": "c"}\n', "goes on"),
    "broken line": ('{"id": "a"}\n{"id": \n{"id": "c"}', "record 1 (line 2)"),
    "meta with a fraction": ({"s": {"root": ".", "annotation": "a.json", "repeat_time": 0.5}}, "repeat_time 0.5"),
    "meta with infinity": ('{"s": {"root": ".", "annotation": "a.json", "repeat_time": 1e999}}', "repeat_time inf"),
    "meta leaves": ({"s": {"root": "../..", "annotation": "a.json"}}, "outside"),
    "meta names nothing": ({"s": {"root": ".", "annotation": "none.json"}}, "does not exist"),
    "table without columns we know": ("a,b\n1,2\n", "unknown form"),
    "table with a column twice": ("id,id\n1,2\n", "each once"),
    "table row too long": ("id,report\na,x,y\n", "another number of fields"),
    "table row too short": ("slide_id,report,split\na,x\n", "another number of fields"),
    "table with an open quote": ('id,report\na,"x\n', "not a readable CSV"),
    "table of a header": ("id,report\n", "found none"),
    "table that is empty": ("", "name the columns"),
}
TABLES = [name for name in BROKEN if name.startswith("table") or name == "feature file leaves"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_in_one_clear_line(tmp_path, roots, name):
    (tmp_path / "secret.png").write_text("secret")
    (roots["image_root"] / "link.png").symlink_to(tmp_path / "secret.png")
    (roots["image_root"] / "linked").symlink_to(tmp_path)
    content, message = BROKEN[name]
    path = write(tmp_path / ("broken.csv" if name in TABLES else "broken.json"), content)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        read_records(path, **roots)
    text = str(refused.value)
    assert message in text and str(path) in text and "\n" not in text


def test_damaged_parquet_and_dataset_are_refused_in_one_line(tmp_path, roots):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [f"s{i}" for i in range(3000)], "report": [f"Text {i}" for i in range(3000)]}), path)
    whole = path.read_bytes()
    damaged = {"data": whole[:200] + b"\xff" * 700 + whole[900:], "footer": whole[:-200] + b"\xff" * 192 + whole[-8:]}
    for content in damaged.values():
        with pytest.raises(ValueError, match=r"a.parquet: not a readable Parquet file \(") as refused:
            read_records(write(path, content), **roots)
        assert "\n" not in str(refused.value)
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match="saved: a folder, but no dataset"):
        read_records(folder, **roots)


def test_lines_end_where_json_says(tmp_path, roots):
    lines = '{"id": "a", "report": "x\u2028y"}\n{"id": "b", "report": "x\x85y"}\r\n'
    assert [r.answer for r in read(tmp_path, roots, lines, "a.jsonl")] == ["x\u2028y", "x\x85y"]


def test_pattern_that_is_no_regular_expression(tmp_path, roots):
    with pytest.raises(ValueError, match="--group_pattern"):
        read(tmp_path, roots, [GOOD], group_pattern="(")


def test_there_are_at_least_sixty_broken_files():
    assert len(BROKEN) >= 60


def test_one_line_of_100_megabytes_is_read(tmp_path, roots):
    long = "x" * (100 * 2**20)
    (record,) = read(tmp_path, roots, [{"id": "a", "report": long}])
    assert len(record.answer) == len(long)


def test_annotation_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.json: no such annotation file"):
        read_records(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_records(write(tmp_path / "a.json", [GOOD]), features_dir=tmp_path / "gone")


def test_ids_of_conversations_may_be_missing_and_are_names_or_numbers(tmp_path, roots):
    talk = {"image": "s1.h5", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A"}]}
    rows = [talk, talk | {"id": None}, talk | {"id": ""}, talk | {"id": 7}, talk | {"id": "x"}]
    assert [r.id for r in read(tmp_path, roots, rows)] == ["s1.h5", "s1.h5", "s1.h5", "7", "x"]
    for bad in (["a"], {"b": 1}, True):
        with pytest.raises(ValueError, match="record 0 has .* under 'id'; expected a name or a number"):
            read(tmp_path, roots, [talk | {"id": bad}])


def test_more_choices_than_letters_are_all_there(tmp_path, roots):
    row = {"Id": "s1", "Question": "Which?", "Answer": "54", "Choice": [str(i) for i in range(55)]}
    (record,) = read(tmp_path, roots, [row])
    lines = record.question.split("\n")
    assert lines[1] == "A. 0" and lines[26] == "Z. 25" and lines[27] == "AA. 26" and lines[53] == "BA. 52"
    assert len(lines) == 56


@pytest.mark.parametrize("indent", [None, 1])
def test_a_lone_record_with_further_fields_is_a_record(tmp_path, roots, indent):
    row = {"id": "s1.svs", "report": "Breast", "scanner": {"name": "x"}, "stains": ["HE"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row, indent=indent))
    (record,) = read_records(tmp_path / "one.jsonl", **roots)
    assert (record.id, record.answer) == ("s1.svs", "Breast")


def test_columns_may_have_blanks_around_their_names(tmp_path, roots):
    (tmp_path / "a.csv").write_text(" slide_id, report \ns1,Breast\n")
    (record,) = read_records(tmp_path / "a.csv", **roots)
    assert (record.id, record.answer) == ("s1", "Breast")
    (tmp_path / "a.csv").write_text("id, id,report\ns1,s2,Breast\n")
    with pytest.raises(ValueError, match="must name the columns, each once"):
        read_records(tmp_path / "a.csv", **roots)
