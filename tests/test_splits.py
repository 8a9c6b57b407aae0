"""Splits by patient: exact shares, no leak, the same again, and the commands that make and check them."""

import json
import subprocess
import sys
from collections import Counter
from math import nan

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import slide_reports.check
import slide_reports.split
from slide_features import write_slide_features
from slide_reports import read_records, read_training_records
from slide_reports.findings import find_all
from slide_reports.inputs import with_inputs
from slide_reports.splits import assign_splits, fold_of, read_fold, read_splits, share_seen
from tests.conftest import ROOT, environment, run_command

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
REG_TRAIN = ROOT.parent / "shared" / "data" / "reports" / "reg2025_train.json"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abc")), min_size=1, max_size=120), st.integers(0, 3))
def test_every_patient_has_one_split_and_strata_have_their_shares(records, seed):
    groups, strata = [f"P{patient}" for patient, _ in records], [stratum for _, stratum in records]
    assigned = assign_splits(groups, SHARES, seed, strata)
    assert assigned.keys() == set(groups) and set(assigned.values()) <= SHARES.keys()
    assert assign_splits(list(reversed(groups)), SHARES, seed, list(reversed(strata))) == assigned
    largest = max(groups.count(group) for group in set(groups))
    held = sum(assigned[group] == "test" for group in groups)
    assert abs(held - 0.1 * len(groups)) <= len(set(strata)) * largest  # no stratum misses by more than a patient


def test_splits_stay_when_records_are_added():
    few, many = ([f"P{i}" for i in range(n)] for n in (300, 600))
    before, after = assign_splits(few, SHARES, 1), assign_splits(many, SHARES, 1)
    assert all(after[group] == split for group, split in before.items())
    strata = ["ab"[i % 2] for i in range(600)]
    before = assign_splits(few, SHARES, 1, strata[:300])
    after = assign_splits(many, SHARES, 1, strata, earlier=before)
    assert all(after[group] == split for group, split in before.items())
    for stratum in "ab":
        of = [group for group, other in zip(many, strata, strict=True) if other == stratum]
        assert sum(after[group] == "val" for group in of) == pytest.approx(30, abs=1)


def test_small_strata_leave_no_split_empty():
    groups = [f"P{i}" for i in range(50)]
    assigned = assign_splits(groups, SHARES, 0, [str(i // 5) for i in range(50)])
    assert Counter(assigned.values()) == {"train": 40, "val": 5, "test": 5}


def test_shares_must_add_up():
    with pytest.raises(ValueError, match="must add up to 1"):
        assign_splits(["a"], {"train": 0.8, "val": 0.3}, 0)
    with pytest.raises(ValueError, match="must add up to 1"):
        assign_splits(["a"], {"train": float("nan"), "val": 1.0}, 0)


def test_folds_are_even_and_stay():
    folds = [fold_of(f"P{i}", 5, 0) for i in range(2000)]
    assert set(folds) == set(range(5)) and min(np.bincount(folds)) > 320
    assert folds[:10] == [fold_of(f"P{i}", 5, 0) for i in range(10)]


def test_share_seen():
    assert share_seen(["a ", "b"], ["a", "c", "c", "b\n"]) == 0.5 and share_seen(["a"], []) == 0.0


@pytest.mark.skipif(not REG_TRAIN.exists(), reason="../shared/data/reports is not here")
def test_reg_2025_splits_by_patient_with_the_stated_shares_of_every_organ(tmp_path):
    done = run_command(
        "slide_reports/split.py", "--train_json", REG_TRAIN, "--output", tmp_path / "s.csv", "--stratify", "organ"
    )
    assigned = read_splits(tmp_path / "s.csv")
    ids = [row["id"] for row in json.loads(REG_TRAIN.read_text())]
    splits = np.array([assigned["_".join(name.split("_")[:3])] for name in ids])
    for split, share in SHARES.items():
        assert abs((splits == split).mean() - share) < 0.01
    assert "breast" in done.stdout and "occur word for word in train" in done.stdout


@pytest.fixture
def corpus_of_8(tmp_path):
    """Eight slides of four patients with reports; their feature files."""
    rng = np.random.default_rng(0)
    for i in range(8):
        write_features(tmp_path / "f" / f"PIT_01_{i // 2:05d}_{i % 2:02d}.h5", rng.normal(size=(6, 4)))
    rows = [{"id": f"PIT_01_{i // 2:05d}_{i % 2:02d}.tiff", "report": f"Breast, biopsy;\n  Kind {i}"} for i in range(8)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    return tmp_path


def write_features(path, features, **options):
    facts = {"name": path.stem, "encoder": "e", "mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}
    coords = np.stack([np.arange(len(features)), np.zeros(len(features), np.int64)], axis=1) * 256
    write_slide_features(path, features.astype(np.float16), coords, **(facts | options))


def check(folder, *flags, status):
    command = ["slide_reports/check.py", "--train_json", folder / "r.json", "--features_dir", folder / "f"]
    return run_command(*command, "--json", folder / "found.json", *flags, status=status)


def test_check_finds_nothing_in_a_good_corpus(corpus_of_8):
    (corpus_of_8 / "f" / "PIT_01_00000_00.pt").touch()  # the same slide in another format
    done = check(corpus_of_8, status=0)
    assert "nothing found" in done.stdout and json.loads((corpus_of_8 / "found.json").read_text())["findings"] == []


def test_check_names_everything_that_is_wrong(corpus_of_8, corpus):
    folder, rows = corpus_of_8, json.loads((corpus_of_8 / "r.json").read_text())
    write_features(folder / "f" / "PIT_01_00001_00.h5", np.ones((5, 7)))  # another width
    write_features(folder / "f" / "PIT_01_00001_01.h5", np.ones((5, 4)), encoder="other")
    import h5py

    with h5py.File(folder / "f" / "PIT_01_00002_00.h5", "r+") as file:
        file["features"][2, 1] = np.nan
    (folder / "f" / "PIT_01_00002_01.h5").write_bytes(b"cut short")
    (folder / "f" / "PIT_01_00003_00.h5").unlink()
    write_features(folder / "f" / "stranger.h5", np.ones((5, 4)))
    rows[0]["report"] += "\N{REPLACEMENT CHARACTER} \N{ZERO WIDTH SPACE}"
    rows[1]["report"] = " "
    rows += [rows[7], rows[6] | {"report": "Another text"}]
    (folder / "r.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps([rows[7]]))
    done = check(folder, "--val_json", folder / "val.json", "--llm_name", corpus.llm, status=2)
    assert "Traceback" not in done.stderr
    found = json.loads((folder / "found.json").read_text())
    kinds = {(finding["severity"], finding["kind"]): finding["count"] for finding in found["findings"]}
    assert kinds[("wrong", "shared patients")] == 1
    assert sum(finding["kind"] == "bad inputs" for finding in found["findings"]) == 4
    assert kinds[("left out", "missing inputs")] == 1 and kinds[("left out", "empty reports")] == 1
    assert kinds[("odd", "extra features")] == 1 and kinds[("odd", "several answers")] == 1
    assert kinds[("odd", "repeated records")] == 1 and kinds[("odd", "repeated texts")] == 1
    for words in (
        "patch_width 7, not 4",
        "encoder other",
        "PIT_01_00002_00.h5",
        "U+FFFD",
        "U+200B",
        "stranger.h5",
    ):
        assert words in done.stdout, words
    assert found["lengths"]["train"]["answer"][0] > 3


def test_check_opens_images(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = [{"image": name, "caption": name} for name in ("good.png", "cut.png", "gone.png")]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    records = read_records(tmp_path / "r.json", image_root=tmp_path)
    found = [(finding.severity, finding.what) for finding in find_all({"train": records}, None)]
    assert len(found) == 2
    assert found[0][0] == "left out" and "gone.png missing" in found[0][1]
    assert found[1][0] == "wrong" and "cut.png does not open" in found[1][1]


def test_training_refuses_a_patient_on_both_sides_and_takes_a_table_of_splits(corpus_of_8):
    folder = corpus_of_8
    reading = {"val_fraction": 0.25, "seed": 0, "features_dir": str(folder / "f"), "image_root": None}
    (folder / "val.json").write_text(json.dumps(json.loads((folder / "r.json").read_text())[:1]))
    with pytest.raises(ValueError, match="PIT_01_00000 of train also in val"):
        read_training_records(str(folder / "r.json"), str(folder / "val.json"), **reading)
    lines = [f"PIT_01_{i:05d},{'val' if i == 2 else 'train'}" for i in range(4)]
    (folder / "s.csv").write_text("\n".join(["group,split", *lines]))
    train, val, problems = read_training_records(str(folder / "r.json"), None, splits=folder / "s.csv", **reading)
    assert (len(train), {record.group for record in val}, problems) == (6, {"PIT_01_00002"}, [])
    (folder / "s.csv").write_text("group,split\nPIT_01_00000,train\n")
    with pytest.raises(ValueError, match="lacks 3 patients, PIT_01_00001 first"):
        read_training_records(str(folder / "r.json"), None, splits=folder / "s.csv", **reading)


def test_a_fold_is_validation_and_the_others_training(corpus_of_8):
    folder, reading = corpus_of_8, {"val_fraction": 0.25, "seed": 0, "image_root": None}
    reading |= {"features_dir": str(folder / "f"), "splits": folder / "folds.csv"}
    rows = ["PIT_01_00000,train,0", "PIT_01_00001,val,1", "PIT_01_00002,train,1", "PIT_01_00003,test,0"]
    (folder / "folds.csv").write_text("\n".join(["group, split ,fold", *rows]))

    def patients(fold):
        parts = read_training_records(str(folder / "r.json"), None, fold=fold, **reading)[:2]
        return [sorted(record.group[-1] for record in part[::2]) for part in parts]

    assert patients(0) == [["1", "2"], ["0"]]
    assert patients(1) == [["0"], ["1", "2"]]
    assert patients(None) == [["0", "2"], ["1"]]
    for fold, more, message in (
        (2, {}, "--fold 2: --splits .*folds.csv has no such fold but 0, 1"),
        (0, {"splits": None}, "--fold 0: say with --splits which table"),
    ):
        with pytest.raises(ValueError, match=message):
            read_training_records(str(folder / "r.json"), None, fold=fold, **(reading | more))
    with pytest.raises(ValueError, match="--fold 0 and --val_json .* both say"):
        read_training_records(str(folder / "r.json"), "val.json", fold=0, **reading)
    (folder / "folds.csv").write_text("group,split\n" + "\n".join(row[:-2] for row in rows))
    with pytest.raises(ValueError, match="gives its patients no fold; make it with slide_reports/split.py"):
        patients(0)
    (folder / "folds.csv").write_text("group,split,fold\n" + "\n".join([*rows[:2], "PIT_01_00002,train,"]))
    with pytest.raises(ValueError, match="gives 1 patient, PIT_01_00002 first, no fold"):
        patients(0)


def test_the_folds_of_split_are_those_of_training(tmp_path, monkeypatch):
    """Each patient outside test is in validation in exactly one turn, by the two commands' own table."""
    records = [{"id": f"P{i}.svs", "report": f"Report {i}"} for i in range(60)]
    (tmp_path / "r.json").write_text(json.dumps(records))
    flags = ["--train_json", tmp_path / "r.json", "--output", tmp_path / "s.csv", "--num_folds", 3]
    monkeypatch.setattr("sys.argv", [str(word) for word in ["split.py", *flags]])
    assert slide_reports.split.main() == 0
    turns = [read_fold(tmp_path / "s.csv", fold) for fold in range(3)]
    plain = read_splits(tmp_path / "s.csv")
    for group, split in plain.items():
        found = sorted(turn[group] for turn in turns)
        assert found == (["test"] * 3 if split == "test" else ["train", "train", "val"]), group


def test_strata_are_a_field_of_the_records_or_found_in_the_answer(tmp_path, monkeypatch, capsys):
    records = [{"id": f"P{i}.svs", "report": "Report", "centre": "AB"[i % 4 == 0]} for i in range(40)]
    (tmp_path / "r.json").write_text(json.dumps(records))

    def split(stratify):
        flags = ["--train_json", tmp_path / "r.json", "--output", tmp_path / "s.csv", "--stratify", stratify]
        monkeypatch.setattr("sys.argv", [str(word) for word in ["split.py", *flags]])
        assert slide_reports.split.main() == 0
        return [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]

    shares = "train 80.0%, val 10.0%, test 10.0%".split()
    assert split("centre") == [["a", "30:", *shares], ["b", "10:", *shares]]
    assert [line[:2] for line in split("rt$")] == [["rt", "40:"]]
    with pytest.raises(ValueError, match="--stratify center: no record has such a field, and no answer"):
        split("center")


def test_check_tells_of_a_table_that_leaves_nothing_to_train_on(corpus_of_8, monkeypatch, capsys):
    folder = corpus_of_8
    (folder / "s.csv").write_text("group,split,fold\n" + "".join(f"PIT_01_0000{i},train,1.0\n" for i in range(4)))
    command = ["check.py", "--train_json", folder / "r.json", "--features_dir", folder / "f", "--splits"]
    command += [folder / "s.csv", "--fold", "1"]  # which programs for tables write as 1.0
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    assert slide_reports.check.main() == 2
    assert "wrong: no record to train on, 8 in val, 0 in test; mend --splits" in capsys.readouterr().out
    (folder / "s.csv").write_text("group,split,fold\n" + "".join(f"PIT_01_0000{i},test,1\n" for i in range(4)))
    with pytest.raises(ValueError, match="has no patients but those of the split test"):
        slide_reports.check.main()


def test_training_tells_what_the_check_finds_in_texts(corpus_of_8, capsys, monkeypatch):
    """Each once, by the first process only, and not what `with_inputs` reports as a problem."""
    rows = json.loads((corpus_of_8 / "r.json").read_text())
    rows[0]["report"] += "\N{ZERO WIDTH SPACE}"
    rows[2]["report"] = ""
    rows += [rows[1], rows[0] | {"report": "Another text"}]
    (corpus_of_8 / "r.json").write_text(json.dumps(rows))
    (corpus_of_8 / "val.json").write_text(json.dumps([rows[1] | {"id": "PIT_01_00009_00.tiff"}]))
    write_features(corpus_of_8 / "f" / "PIT_01_00009_00.h5", np.ones((5, 4)))
    files = [str(corpus_of_8 / name) for name in ("r.json", "val.json")]
    reading = {"val_fraction": 0, "seed": 0, "features_dir": str(corpus_of_8 / "f"), "image_root": None}
    train, val, problems = read_training_records(*files, **reading)
    assert (len(train), len(val)) == (9, 1) and problems == [f"{rows[2]['id']}: its report is empty"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    for line, words in zip(
        warnings,
        (
            f"train: {rows[0]['id']} has several answers",
            f"train: {rows[1]['id']} repeated word for word",
            f"train: {rows[0]['id']} with U+200B",
            "1 of 1 texts of val (100.0%) occur word for word in train",
        ),
        strict=True,
    ):
        assert words in line
    monkeypatch.setenv("RANK", "1")
    read_training_records(*files, **reading)
    assert "warning" not in capsys.readouterr().err


def test_records_that_another_file_stands_for_are_counted(corpus_of_8, capsys, monkeypatch):
    folder, rows = corpus_of_8, json.loads((corpus_of_8 / "r.json").read_text())
    for number, row in enumerate(rows):
        row["split"] = ("train", "train", "val", "val", "val", "val", "test", "test")[number]
    (folder / "r.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps([{"id": "PIT_01_00009_00.tiff", "report": "x"}]))
    write_features(folder / "f" / "PIT_01_00009_00.h5", np.ones((5, 4)))
    reading = {"val_fraction": 0, "seed": 0, "features_dir": str(folder / "f"), "image_root": None}
    files = [str(folder / name) for name in ("r.json", "val.json")]
    train, val, _ = read_training_records(*files, **reading)
    assert (len(train), len(val)) == (2, 1)
    told = f"warning: 4 of the 8 records of --train_json are of the split val and left out, since --val_json {files[1]}"
    assert capsys.readouterr().err.startswith(told)
    read_training_records(files[0], None, **reading)
    assert "left out" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    read_training_records(*files, **reading)
    assert not capsys.readouterr().err


def test_repetitions_that_a_meta_file_asks_for_are_no_finding(corpus_of_8, capsys):
    folder, rows = corpus_of_8, json.loads((corpus_of_8 / "r.json").read_text())
    entry = {"root": "f", "annotation": "r.json", "length": 8}
    (folder / "meta.json").write_text(json.dumps({"reports": entry | {"repeat_time": 3}}))
    reading = {"val_fraction": 0.25, "seed": 0, "features_dir": str(folder / "f"), "image_root": None}
    train, val, _ = read_training_records(str(folder / "meta.json"), None, **reading)
    assert len(train) + len(val) == 24 and [record.id for record in train[:4]] == [train[0].id] * 3 + [train[3].id]
    assert "warning" not in capsys.readouterr().err
    (folder / "r.json").write_text(json.dumps([*rows, rows[0]]))
    read_training_records(str(folder / "meta.json"), None, **reading)
    assert f"{rows[0]['id']} repeated word for word" in capsys.readouterr().err


def test_training_refuses_a_patient_of_its_test_split(corpus_of_8):
    rows = json.loads((corpus_of_8 / "r.json").read_text())
    for number, row in enumerate(rows):
        row["split"] = "test" if number == 1 else "val" if number > 5 else "train"
    (corpus_of_8 / "r.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="PIT_01_00000 of train also in test; split by patient"):
        read_training_records(
            str(corpus_of_8 / "r.json"), None, val_fraction=0, seed=0, features_dir=str(corpus_of_8 / "f")
        )


def test_no_table_is_made_where_a_slide_is_of_two_patients(corpus_of_8):
    """Neither where records repeat a slide or picture, nor where sets of a meta file name theirs alike."""
    rows = json.loads((corpus_of_8 / "r.json").read_text())
    rows += [rows[3] | {"question": "Which organ?"}, {"id": "case", "slides": ["b", "b.svs"], "report": "x"}]
    split = ["slide_reports/split.py", "--train_json", corpus_of_8 / "r.json", "--output", corpus_of_8 / "s.csv"]
    (corpus_of_8 / "r.json").write_text(json.dumps(rows))
    run_command(*split)
    before = (corpus_of_8 / "s.csv").read_bytes()
    for twice in (rows[0] | {"patient_id": "somebody"}, {"id": "other", "slides": ["PIT_01_00000_00"], "report": "x"}):
        (corpus_of_8 / "r.json").write_text(json.dumps([*rows, twice]))
        told = "error: PIT_01_00000_00 under two patients, who may fall into two splits; give all records of a slide"
        assert told in run_command(*split, status=2).stderr
    assert (corpus_of_8 / "s.csv").read_bytes() == before
    pictures = [{"image": "0.png", "caption": "x"}, {"image": "./0.png", "caption": "y", "patient_id": "p"}]
    meta = {name: {"root": name, "annotation": f"{name}.json"} for name in ("a", "b")}
    for name, row in zip(meta, pictures, strict=True):
        (corpus_of_8 / f"{name}.json").write_text(json.dumps([row]))
    (corpus_of_8 / "r.json").write_text(json.dumps(meta))
    run_command(*split)
    (corpus_of_8 / "r.json").write_text(json.dumps(pictures))
    assert "error: 0.png under two patients" in run_command(*split, status=2).stderr


def test_training_refuses_a_slide_in_two_splits_under_two_patients(corpus_of_8):
    folder, rows = corpus_of_8, json.loads((corpus_of_8 / "r.json").read_text())
    flags = {"val_fraction": 0, "seed": 0, "features_dir": str(folder / "f")}
    (folder / "val.json").write_text(json.dumps([rows[0] | {"patient_id": "somebody"}]))
    with pytest.raises(ValueError, match=r"PIT_01_00000_00.h5 of train also in val under another patient; give all"):
        read_training_records(str(folder / "r.json"), str(folder / "val.json"), **flags)
    (folder / "val.json").write_text(json.dumps([{"id": "case", "slides": ["PIT_01_00001_01"], "report": "x"}]))
    with pytest.raises(ValueError, match=r"PIT_01_00001_01.h5 of train also in val under another patient"):
        read_training_records(str(folder / "r.json"), str(folder / "val.json"), **flags)


def test_a_patient_is_one_however_a_table_writes_the_number(corpus_of_8):
    rows = [{"id": f"s{i}", "report": "x", "patient_id": p} for i, p in enumerate(["7", "7 ", "7.0", 7, 7.0, "7.5"])]
    (corpus_of_8 / "p.json").write_text(json.dumps([*rows, {"id": "s6", "report": "x", "patient_id": "007"}]))
    groups = [record.group for record in read_records(corpus_of_8 / "p.json", locate_inputs=False)]
    assert groups == ["7"] * 5 + ["7.5", "007"]
    (corpus_of_8 / "p.json").write_text(json.dumps([rows[0] | {"patient_id": ["7"]}]))
    with pytest.raises(ValueError, match=r"record 0 has \['7'\] under 'patient_id'; expected a name or a number"):
        read_records(corpus_of_8 / "p.json", locate_inputs=False)
    pq.write_table(
        pa.table({"id": ["a", "b"], "report": ["x", "y"], "patient_id": [nan, 7.0]}), corpus_of_8 / "p.parquet"
    )
    assert [record.group for record in read_records(corpus_of_8 / "p.parquet", locate_inputs=False)] == ["a", "7"]
    (corpus_of_8 / "s.csv").write_text("group,split\n7 ,val\n")
    assert read_splits(corpus_of_8 / "s.csv") == {"7": "val"}


def test_records_without_a_split_among_others_are_trained_on_and_told(corpus_of_8, capsys):
    rows = json.loads((corpus_of_8 / "r.json").read_text())
    for row in rows[4:]:
        row["split"] = "train" if row in rows[4:6] else "val"
    (corpus_of_8 / "r.json").write_text(json.dumps(rows))
    reading = {"val_fraction": 0, "seed": 0, "features_dir": str(corpus_of_8 / "f")}
    train, val, _ = read_training_records(str(corpus_of_8 / "r.json"), None, **reading)
    assert (len(train), len(val)) == (6, 2)
    assert f"{rows[3]['id']} name no split where others do; they are trained on" in capsys.readouterr().err


def test_ids_of_no_record_are_told_of_both_files_together(corpus_of_8, capsys, monkeypatch):
    folder = corpus_of_8
    rows = json.loads((folder / "r.json").read_text())
    (folder / "train.json").write_text(json.dumps(rows[:6]))
    (folder / "val.json").write_text(json.dumps(rows[6:]))
    first, last = rows[0]["id"], rows[-1]["id"]
    (folder / "out.csv").write_text(f"id\n{last}\nmistyped.svs\n")
    texts = [{"id": first, "report": "New"}, {"id": "else.svs", "report": "x"}]
    texts.append({"id": rows[1]["id"], "question": "Which organ?", "report": "Breast"})
    (folder / "new.json").write_text(json.dumps(texts))
    reading = {"val_fraction": 0, "seed": 0, "features_dir": str(folder / "f"), "image_root": None}
    reading |= {"exclude": folder / "out.csv", "revise": folder / "new.json"}
    train, val, _ = read_training_records(str(folder / "train.json"), str(folder / "val.json"), **reading)
    assert (len(train), len(val), train[0].answer) == (6, 1, "New")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and "out.csv: no record has the id mistyped.svs;" in warnings[0]
    assert f"has the id and the question of else.svs, {rows[1]['id']};" in warnings[1]
    command = ["check.py", "--train_json", folder / "train.json", "--val_json", folder / "val.json"]
    more = ["--exclude", folder / "out.csv", "--revise", folder / "new.json", "--features_dir", folder / "f"]
    monkeypatch.setattr("sys.argv", [str(word) for word in [*command, *more, "--json", folder / "found.json"]])
    assert slide_reports.check.main() == 0
    found = [row for row in json.loads((folder / "found.json").read_text())["findings"] if row["kind"] == "unknown ids"]
    assert [(row["severity"], row["count"]) for row in found] == [("odd", 1), ("odd", 2)]
    assert "odd: --exclude" in capsys.readouterr().out


def test_a_table_of_splits_may_come_back_from_a_spreadsheet(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"\xef\xbb\xbfgroup;split;fold\r\na;train;1\r\n7;val;0\r\n;;\r\n")
    assert read_splits(tmp_path / "s.csv") == {"a": "train", "7": "val"}


@pytest.mark.parametrize(
    "table, message",
    [
        ("group,split,fold\na,train,0\na,train,1\n", "a is in two folds"),
        ("id,split\na,train\n", "expected the columns group and split"),
        ("group,split\na,holdout\n", "line 2: 'holdout' is no split"),
        ("group,split\na,train\na,val\n", "a is in two splits"),
        ("group,split\n\xe9,train\n", "not in UTF-8"),
        ('group,split\n"a,train\n', "not a readable CSV"),
    ],
)
def test_broken_tables_of_splits(tmp_path, table, message):
    (tmp_path / "s.csv").write_text(table, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as refused:
        read_splits(tmp_path / "s.csv", "--earlier")
    assert str(refused.value).startswith(f"--earlier {tmp_path / 's.csv'}: ")


def test_a_finding_is_one_line_though_names_hold_line_ends(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a\nb", "report": ""}, {"id": "c", "report": "x"}]))
    command = ["slide_reports/check.py", "--train_json", str(tmp_path / "r.json"), "--val_fraction", "0"]
    done = run_command(*command, "--features_dir", tmp_path, status=1)
    assert "left out: train: a b without a report\n" in done.stdout


@pytest.mark.parametrize(
    "flags", [("--num_folds", "0"), ("--stratify", "("), ("--group_pattern", "["), ("--output", ".")]
)
def test_split_refuses_flags_that_mean_nothing(tmp_path, flags):
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "report": "x"}]))
    command = ["slide_reports/split.py", "--train_json", str(tmp_path / "r.json"), "--output", str(tmp_path / "s.csv")]
    done = run_command(*command, *flags, status=2)
    assert done.stderr.startswith(f"error: {flags[0]}") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    """As in `check.py … | head -1`, whose reader is gone before the table comes."""
    program = "import sys, time, command_line\n" + (
        "def main():\n    print('x' * 100_000, flush=True)\n    return 0\n"
        "sys.argv = ['check.py']\ncommand_line.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_stray_feature_file_is_left_out_and_not_all_others(corpus_of_8):
    write_features(corpus_of_8 / "f" / "PIT_01_00000_00.h5", np.ones((6, 4)), encoder="another")
    reading = {"features_dir": corpus_of_8 / "f"}
    usable, problems = with_inputs(read_records(corpus_of_8 / "r.json", **reading))
    assert len(usable) == 7 and len(problems) == 1
    assert "PIT_01_00000_00.h5 was made with encoder another, not e; encode it like the others" in problems[0]
