"""The score command: what it reads, counts, compares with and writes."""

import csv
import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from evaluation import compare, plots, score
from evaluation.metrics.meteor.formula import WITH_SYNONYMS, WITHOUT_SYNONYMS, open_wordnet
from evaluation.page import marked_differences
from evaluation.report_files import read_reports, shown

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

TRAIN = [
    {"id": "1", "report": "Lung, biopsy;\n  Adenocarcinoma"},
    {"id": "2", "report": "Lung, biopsy;\n  Small cell carcinoma"},
    {"id": "3", "report": "Lung, biopsy;\n  Small cell carcinoma"},
    {"id": "4", "report": "Bladder, transurethral resection;\n  No tumor present"},
]
REFERENCES = [
    {"id": "a", "report": "Lung, biopsy;\n  Adenocarcinoma"},
    {"id": "b", "report": "Urinary bladder, transurethral resection;\n  No tumor present"},
]
GLEASON = "Prostate, biopsy;\n  Acinar adenocarcinoma, Gleason's score {}, grade group {}, tumor volume: {}%"


def run_score(folder: Path, predictions: object, references: object, train: object = None, *flags: object):
    """Run the command on JSON contents in this process; returns its exit status and metrics.json."""
    words = []
    for name, content in (("predictions", predictions), ("references", references), ("train_json", train)):
        if content is not None:
            (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
            words += [f"--{name}", str(folder / f"{name}.json")]
    status = score.main([*words, "--output_dir", str(folder / "out"), "--num_resamples", "50", *map(str, flags)])
    written = folder / "out" / "metrics.json"
    return status, json.loads(written.read_text()) if written.exists() else None


def test_perfect_predictions_and_baselines(tmp_path: Path) -> None:
    status, metrics = run_score(tmp_path, REFERENCES, REFERENCES, TRAIN)
    assert status == 0
    assert metrics["n"] == 2 and metrics["missing_predictions"] == []
    for name in ("bleu_1", "bleu_2", "bleu_3", "rouge_l", "rouge_1_f1", "exact_match", "chrf", "levenshtein_ratio"):
        assert metrics[name] == pytest.approx(1, abs=1e-6)
    assert metrics["meteor_variant"] == (WITH_SYNONYMS if open_wordnet() else WITHOUT_SYNONYMS)
    constant, modal = metrics["baselines"]["constant"], metrics["baselines"]["organ_modal"]
    assert constant["report"] == TRAIN[1]["report"]
    assert modal["reports"] == {"lung": TRAIN[1]["report"], "urinary bladder": TRAIN[3]["report"]}
    assert constant["exact_match"] == modal["exact_match"] == 0
    assert modal["rouge_l"] > constant["rouge_l"]
    assert metrics["references_seen_in_training"] == 1 and metrics["predictions_verbatim_from_training"] == 0.5
    assert metrics["distinct_predictions"] == 2 and metrics["mistakes"]["cases_affected"] == 0
    assert metrics["shuffled_images"]["exact_match"] == 0 and metrics["shuffled_images"]["n"] == 40
    # Lung's report has three words, fewer than BLEU's four: 0.15 of its score is out of reach.
    assert metrics["reg"]["reg_status"] == "partial: KEY and EMB not computed" and "reg_score" not in metrics
    assert metrics["reg"]["reg_ceiling"]["ceiling"] == pytest.approx((0.15 + 0.3) / 2)
    assert metrics["intervals_95"]["exact_match"] == [1, 1]


def test_odd_input_is_counted_and_scores_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = [{"id": name, "report": "Lung, biopsy;\n  Adenocarcinoma"} for name in "abcdefg"]
    references += [{"id": "n", "report": None}, references[0], {"id": "o", "report": " "}]
    predictions = """[
        {"id": "a", "report": "Lung, biopsy; Adenocarcinoma"}, {"id": "a", "report": "a second one"},
        {"id": "b", "report": null}, {"id": "c", "report": NaN}, {"id": "d", "report": 3}, {"id": "e", "report": "  "},
        {"id": "f", "report": ["Lung, biopsy; Adenocarcinoma"]}, {"id": "zzz", "report": "text"},
        {"id": "o", "report": ""}
    ]"""
    status, metrics = run_score(tmp_path, predictions, references)
    assert status == 1
    counted = {"missing_predictions": 1, "extra_predictions": 1, "empty_predictions": 2, "predictions_not_text": 3}
    counted |= {"duplicate_predictions": 1, "empty_references": 1, "references_not_text": 1, "duplicate_references": 1}
    assert metrics["input_problems"] == counted
    assert metrics["missing_predictions"] == ["g"] and metrics["extra_predictions"] == ["zzz"]
    # a, f and the empty pair o of eight usable references are right; everything unusable scores 0.
    assert metrics["n"] == 8 and metrics["exact_match"] == pytest.approx(3 / 8)
    assert metrics["rouge_l"] == pytest.approx(2 / 8) and metrics["meteor"] < 0.26
    assert metrics["mistakes"]["by_kind"]["no report"] == 6
    assert metrics["baselines"] is None and "--train_json" in metrics["baselines_missing_because"]
    stderr = capsys.readouterr().err
    assert "1 references have no prediction" in stderr and "3 predictions are not text" in stderr and "zzz" in stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 predictions are not text" in page


def test_odd_files_of_reports_are_read(tmp_path: Path) -> None:
    path = tmp_path / "reports.json"
    path.write_text('\ufeff{"b": "second", "a": "first", "b": "again", "c": "half \\ud800"}', encoding="utf-8")
    reports = read_reports(path, part="test")
    assert reports.texts == {"b": "second", "a": "first", "c": ""} and list(reports.texts) == ["b", "a", "c"]
    assert reports.problems == {"duplicates": ["b"], "not_text": ["c"], "empty": []}
    with pytest.raises(FileNotFoundError, match="a folder; name the JSON file"):
        read_reports(tmp_path, part="test")
    assert shown(["a", "b\n", " c"]) == "a, 'b\\n', ' c'"


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ("[{", "not JSON"),
        ([], "no records"),
        ([{"id": "a"}], "record 0"),
        ([{"id": ["a"], "report": "x"}], "give a string"),
        ([{"id": "other", "report": "x"}], "not one id"),
        ([{"id": "other", "report": "x"}], r"\(other against a, b\)"),
        ({"train": [], "val": []}, "without a 'test' part"),
        ([{"id": " ", "report": "x"}], "give a string"),
        ('[{"id": "\\ud800", "report": "x"}]', "give a string"),
        ('[{"id": "a", "report": "x", "report": "y"}]', "'report' twice; keep one"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, predictions: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        run_score(tmp_path, predictions, REFERENCES)
    assert "predictions.json" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    flags = ["--predictions", "nowhere.json", "--references", str(tmp_path / "references.json")]
    command = [sys.executable, "evaluation/score.py", *flags, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere.json" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_text_metrics_miss_what_the_mistakes_show_first(tmp_path: Path) -> None:
    """Tumor volume 5 % instead of 90 %, another Gleason score, a cancer missed: each is in the list, gravest first."""
    references = [GLEASON.format("8 (4+4)", 4, 90)] * 3 + [GLEASON.format("6 (3+3)", 1, 10)]
    predictions = [GLEASON.format("8 (4+4)", 4, 5), GLEASON.format("6 (3+3)", 1, 90)]
    predictions += ["Prostate, biopsy;\n  No tumor present", references[3]]
    rows = [[{"id": str(i), "report": text} for i, text in enumerate(side)] for side in (predictions, references)]
    status, metrics = run_score(tmp_path, *rows)
    mistakes = json.loads((tmp_path / "out" / "mistakes.json").read_text())
    assert status == 0 and [mistake["kind"] for mistake in mistakes] == [
        "malignancy missed",
        "grade off by two",
        "wrong Gleason",
        "percentage off",
    ]
    assert mistakes[0]["id"] == "2" and mistakes[-1] == {
        "id": "0", "kind": "percentage off", "reference": "tumor volume 90 %", "predicted": "tumor volume 5 %",
    }  # fmt: skip
    fields = metrics["fields"]
    assert fields["tumor_volume"]["mean_absolute_error"] == pytest.approx(85 / 3)
    assert fields["tumor_volume"]["left_out"] == 1 and fields["organ"]["accuracy"] == 1
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        cases = list(csv.DictReader(file))
    assert float(cases[0]["rouge_l"]) > 0.9 and cases[0]["serious_mistakes"] == "percentage off"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("malignancy missed") < page.index("percentage off") < page.index('id="scores"')


def test_shuffled_predictions_and_retrieval(tmp_path: Path) -> None:
    from slide_features import write_slide_features

    rng = np.random.default_rng(0)
    kinds = {"a": 0, "1": 0, "b": 1, "4": 1, "2": 2}  # slide 3 has no features
    means = rng.normal(size=(3, 8)) * 3
    for name, kind in kinds.items():
        write_slide_features(
            tmp_path / "features" / f"{name}.h5",
            (means[kind] + 0.1 * rng.normal(size=(5, 8))).astype(np.float16),
            np.stack([np.arange(5), np.zeros(5, int)], axis=1) * 256,
            name=name, encoder="made-up", mpp=0.5, tile_size=256, overlap=0, min_tissue=0.1, patch_size_level0=256,
        )  # fmt: skip
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps([{"id": "a", "report": REFERENCES[0]["report"]}]))
    flags = ("--features_dir", tmp_path / "features", "--shuffled_predictions", shuffled)
    _, metrics = run_score(tmp_path, REFERENCES, REFERENCES, TRAIN, *flags)
    retrieval = metrics["baselines"]["retrieval"]
    assert retrieval["slides_without_features"] == 1
    assert retrieval["exact_match"] == 0.5 and retrieval["rouge_l"] > 0.8  # "Bladder" is not "Urinary bladder"
    assert metrics["shuffled_images"]["missing"] == 1 and metrics["shuffled_images"]["exact_match"] == 0.5
    with pytest.raises(ValueError, match="not one feature file"):
        run_score(tmp_path, REFERENCES, REFERENCES, TRAIN, "--features_dir", tmp_path)


def test_survival_and_calibration(tmp_path: Path) -> None:
    references = [
        {"id": f"TCGA-AA-{i:04d}-01", "report": GLEASON.format(*grade), "time": 90 - 10 * i, "event": i % 3 != 0}
        for i, grade in enumerate([("6 (3+3)", 1, 10), ("7 (3+4)", 2, 20), ("8 (4+4)", 4, 60)] * 3)
    ]
    predictions = [row | {"beam_score": -0.1 * i} for i, row in enumerate(references)]
    predictions[-1]["report"] = "Prostate, biopsy;\n  No tumor present"
    _, metrics = run_score(tmp_path, predictions, references)
    survival = metrics["survival"]
    assert survival["risk_source"] == "grade in the reports" and survival["n"] == 8 and survival["without_risk"] == 1
    assert set(survival["groups"]) == {"1", "2", "4"} and 0 <= survival["log_rank_p"] <= 1
    bins = metrics["calibration"]["bins"]
    assert [row["n"] for row in bins] == [1] * 9 and bins[0]["without_serious_mistake"] == 0
    assert (tmp_path / "out" / "pictures" / "survival.svg").read_text().count("<path") > 10
    risks = tmp_path / "risks.csv"
    risks.write_text("id,risk\n" + "".join(f"{row['id']},{-row['time']}\n" for row in references))
    _, metrics = run_score(tmp_path, predictions, references, None, "--risks", risks)
    assert metrics["survival"]["concordance_index"] == 1 and metrics["survival"]["n"] == 9
    risks.write_text("id,risk\nx,high\n")
    with pytest.raises(ValueError, match="row 0 has no id with a finite risk"):
        run_score(tmp_path, predictions, references, None, "--risks", risks)
    with pytest.raises(ValueError, match="no reference carries 'months'"):
        run_score(tmp_path, predictions, references, None, "--risks", risks, "--time_field", "months")


def test_the_page_is_self_contained_and_escapes(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "stage0" / "thumbnails").mkdir(parents=True)
    Image.new("RGB", (900, 600), "purple").save(tmp_path / "stage0" / "thumbnails" / "a.jpg")
    (tmp_path / "stage0" / "thumbnails" / "b.jpg").write_bytes(b"torn")
    predictions = [{"id": "a", "report": "<script>alert(1)</script>"}, REFERENCES[1]]
    run_score(tmp_path, predictions, REFERENCES, TRAIN, "--stage0_dir", tmp_path / "stage0")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "") and 'src="data:' in page and str(tmp_path) not in page
    thumbnail = b64decode(page.split('src="data:image/jpeg;base64,')[1].split('"')[0])
    assert thumbnail[:2] == b"\xff\xd8" and page.count("data:image/jpeg") == 1
    (tmp_path / "evidence" / "a").mkdir(parents=True)  # as generate.py --evidence writes it
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "evidence" / "a" / "report.png")
    flags = ["--stage0_dir", tmp_path / "stage0", "--evidence_dir", tmp_path / "evidence"]
    run_score(tmp_path, predictions, REFERENCES, None, *flags)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'alt="slide of a"' in page and 'alt="evidence of a"' in page and page.count("data:image/jpeg") == 2


def test_differences_are_marked_word_by_word() -> None:
    left, right = marked_differences("no tumor\n  in <lung>", "no carcinoma in <lung>")
    assert left == "no <del>tumor</del>\n  in &lt;lung&gt;" and right == "no <ins>carcinoma</ins> in &lt;lung&gt;"
    left, right = marked_differences("a chronic  gastritis here", "a small cell\n carcinoma here")
    assert left == "a <del>chronic  gastritis</del> here" and right == "a <ins>small cell\n carcinoma</ins> here"
    assert marked_differences("same", "same") == ("same", "same") and marked_differences("a", "") == (
        "<del>a</del>",
        "",
    )


def test_reg_baselines_on_a_patient_split(tmp_path: Path) -> None:
    path = SHARED / "reports" / "reg2025_train.json"
    if not path.is_file():
        pytest.skip("needs ../shared/data/reports, the REG 2025 reports")
    records = json.loads(path.read_text())
    patients = [crc32("_".join(record["id"].split("_")[:3]).encode()) for record in records]
    held_out = [record for record, patient in zip(records, patients, strict=True) if patient % 5 == 0]
    train = [record for record, patient in zip(records, patients, strict=True) if patient % 5 != 0]
    _, metrics = run_score(tmp_path, held_out, held_out, train)
    assert metrics["exact_match"] == 1 and metrics["mistakes"]["cases_affected"] == 0
    assert metrics["baselines"]["constant"]["rouge_l"] == pytest.approx(0.218, abs=0.02)
    assert metrics["baselines"]["organ_modal"]["rouge_l"] == pytest.approx(0.602, abs=0.02)
    assert metrics["references_parsed"] > 0.999
    assert 0.29 < metrics["reg"]["reg_ceiling"]["ceiling"] < 0.3  # some references have fewer than four words


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = [{"id": f"PIT_01_{i:05d}_01.tiff", "report": TRAIN[i % 4]["report"]} for i in range(24)]
    better = [row | {"report": row["report"] if i % 8 else "Colon"} for i, row in enumerate(references)]
    worse = [row | {"report": row["report"] if i % 2 else "Colon"} for i, row in enumerate(references)][:-1]
    paths = {}
    for name, rows in (("references", references), ("worse", worse), ("better", better)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(rows))
    out = tmp_path / "comparison.json"
    flags = ["--references", str(paths["references"]), "--num_resamples", "200", "--num_shuffles", "400"]
    status = compare.main([str(paths["worse"]), str(paths["better"]), *flags, "--output", str(out)])
    result = json.loads(out.read_text())
    row = result["metrics"]["exact_match"]
    assert status == 1 and result["problems"]["a"]["missing_predictions"] == 1 and result["n"] == 24
    assert (
        row["a"] == 11 / 24 and row["b"] == 21 / 24 and row["low"] < row["difference"] < row["high"] and row["low"] > 0
    )
    assert row["p"] < 0.02 <= row["p_holm"] * 20 and row["superiority"] == pytest.approx((10 + 14 / 2) / 24)
    assert "no_serious_mistake" in capsys.readouterr().out
    assert compare.main([str(paths["better"]), str(paths["better"]), *flags]) == 0
    assert "1.0000" in capsys.readouterr().out


def test_holm_by_hand() -> None:
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        run = tmp_path / "runs" / name / "stage1"
        run.mkdir(parents=True)
        lines = [{"step": step, "loss": 2 / step, "lr": 1e-3} for step in (1, 2, 3)] + [{"step": 3, "val_loss": 1.0}]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
        (tmp_path / name).mkdir()
        run_score(tmp_path / name, REFERENCES, REFERENCES, TRAIN)
    runs = [str(tmp_path / "runs" / name / "stage1") for name in ("one", "two")]
    flags = [
        "--scores",
        str(tmp_path / "one" / "out"),
        str(tmp_path / "two" / "out"),
        "--output_dir",
        str(tmp_path / "p"),
    ]
    assert plots.main(["--runs", *runs, *flags, "--names", "uni", "virchow"]) == 0
    for name in ("curves", "comparison", "distributions"):
        assert (tmp_path / "p" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert plots._names([Path(run) for run in runs]) == ["one/stage1", "two/stage1"]
    assert plots.main(["--runs", runs[0], str(tmp_path), "--output_dir", str(tmp_path / "p")]) == 1
    assert "no log.jsonl" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.main(["--output_dir", str(tmp_path)])
