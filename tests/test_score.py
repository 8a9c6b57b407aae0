"""The score command and its metrics against plain definitions and recorded scores."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.fields import organ
from evaluation.metrics.coco_bleu import coco_bleu
from evaluation.metrics.coco_rouge import coco_rouge_l, lcs_length
from evaluation.metrics.exact_match import exact_match
from evaluation.metrics.meteor import WITH_SYNONYMS, WITHOUT_SYNONYMS, meteor, open_wordnet

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
TEXTS = st.lists(st.sampled_from(["lung", "Lung", "biopsy;", "no", "tumor", "grade", "II"]), max_size=9).map(" ".join)

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


def score(folder: Path, predictions: object, references: object, train: object = None) -> tuple[int, str, dict | None]:
    """Launch the command on JSON contents; returns exit status, stderr and metrics.json."""
    flags = []
    for name, content in (("predictions", predictions), ("references", references), ("train_json", train)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.json").write_text(text)
            flags += [f"--{name}", str(folder / f"{name}.json")]
    command = [sys.executable, "evaluation/score.py", *flags, "--output_dir", str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    written = folder / "out" / "metrics.json"
    return done.returncode, done.stderr, json.loads(written.read_text()) if written.exists() else None


def plain_lcs(a: list[str], b: list[str]) -> int:
    """The textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plain_bleu(hypotheses: list[str], references: list[str], max_order: int) -> float:
    """Corpus BLEU written out from its definition."""
    product = 1.0
    for order in range(1, max_order + 1):
        matched = total = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            grams = [
                Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
                for words in (hypothesis.split(), reference.split())
            ]
            matched += (grams[0] & grams[1]).total()
            total += grams[0].total()
        product *= (matched + 1e-15) / (total + 1e-9)
    lengths = [sum(len(text.split()) for text in texts) for texts in (hypotheses, references)]
    ratio = (lengths[0] + 1e-15) / (lengths[1] + 1e-9)
    return product ** (1 / max_order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


@given(a=st.lists(st.sampled_from("abcd"), max_size=20), b=st.lists(st.sampled_from("abcd"), max_size=20))
@settings(derandomize=True, deadline=None)
def test_lcs_equals_the_plain_table(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == plain_lcs(a, b)


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=5))
@settings(derandomize=True, deadline=None)
def test_bleu_equals_its_plain_definition(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = map(list, zip(*pairs, strict=True))
    scores = coco_bleu(hypotheses, references)
    for order in range(1, 5):
        assert scores[f"bleu_{order}"] == pytest.approx(plain_bleu(hypotheses, references, order), rel=1e-9)


def test_rouge_l_by_hand() -> None:
    # 2 of 3 hypothesis words, 2 of 4 reference words: P = 2/3, R = 1/2.
    expected = (1 + 1.44) * (2 / 3) * 0.5 / (0.5 + 1.44 * (2 / 3))
    assert coco_rouge_l(["no tumor seen"], ["no evidence of tumor"]) == pytest.approx(expected)
    assert coco_rouge_l(["", "no tumor"], ["no tumor", "no tumor"]) == 0.5
    # A line break and its indentation are one blank; a double blank inside a line is an empty word, as upstream.
    assert coco_rouge_l(["Lung, biopsy; Adenocarcinoma"], ["Lung, biopsy;\n  Adenocarcinoma "]) == 1
    assert coco_rouge_l(["no tumor"], ["no  tumor"]) < 1


def test_exact_match_ignores_only_whitespace() -> None:
    assert exact_match(["Lung,  biopsy;\nno tumor ", "lung"], ["Lung, biopsy; no tumor", "Lung"]) == 0.5


def test_meteor_steps() -> None:
    # nltk's own documentation gives 0.6944 for this pair with WordNet; exact and stem matches alone give the same.
    hypothesis = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor([hypothesis], [reference]) == pytest.approx(0.6944, abs=5e-5)
    assert meteor(["tumors"], ["tumor"]) == meteor(["tumor"], ["tumor"]) == 0.5  # stem, and one chunk of one word
    assert meteor(["", "x"], ["tumor", "tumor"]) == 0


def test_meteor_reads_a_bare_wordnet(tmp_path: Path) -> None:
    """A dictionary as Debian installs it: no lexnames, no index.sense."""
    for name in ("index", "data"):
        for part in ("noun", "verb", "adj", "adv"):
            (tmp_path / f"{name}.{part}").write_text("")
    for name in ("noun.exc", "verb.exc", "adj.exc", "adv.exc", "cntlist.rev"):
        (tmp_path / name).write_text("")
    (tmp_path / "data.noun").write_text("00000000 26 n 02 tumor 0 neoplasm 0 000 | an abnormal growth\n")
    (tmp_path / "index.noun").write_text("neoplasm n 1 0 1 0 00000000\ntumor n 1 0 1 0 00000000\n")
    wordnet = open_wordnet(tmp_path)
    assert wordnet is not None
    assert meteor(["neoplasm"], ["tumor"], wordnet) == 0.5
    assert meteor(["neoplasm"], ["tumor"]) == 0


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Breast, core-needle biopsy;\n  Papillary neoplasm", "breast"),
        ("Bladder, transurethral resection;\n  No tumor", "urinary bladder"),
        ("Cervix , punch biopsy;\n  CIN 1", "uterine cervix"),
        ("Uterine  cervix, punch biopsy;", "uterine cervix"),
        ("Lung;\n No tumor, see note", "lung"),
        ("", ""),
    ],
)
def test_organ(report: str, expected: str) -> None:
    assert organ(report) == expected


def test_perfect_predictions_and_baselines(tmp_path: Path) -> None:
    status, _, metrics = score(tmp_path, REFERENCES, REFERENCES, TRAIN)
    assert status == 0 and metrics is not None
    assert metrics["n"] == 2 and metrics["missing_predictions"] == []
    for name in ("bleu_1", "bleu_2", "bleu_3", "rouge_l", "exact_match"):
        assert metrics[name] == pytest.approx(1, abs=1e-6)
    assert metrics["meteor_variant"] == (WITH_SYNONYMS if open_wordnet() else WITHOUT_SYNONYMS)
    constant, modal = metrics["baselines"]["constant"], metrics["baselines"]["organ_modal"]
    assert constant["report"] == TRAIN[1]["report"]
    assert modal["reports"] == {"lung": TRAIN[1]["report"], "urinary bladder": TRAIN[3]["report"]}
    assert constant["exact_match"] == modal["exact_match"] == 0
    assert modal["rouge_l"] > constant["rouge_l"]
    assert metrics["references_seen_in_training"] == 1


def test_missing_and_extra_predictions_are_counted(tmp_path: Path) -> None:
    predictions = [REFERENCES[0], {"id": "zzz", "report": "text"}]
    status, stderr, metrics = score(tmp_path, predictions, REFERENCES)
    assert status == 1 and metrics is not None
    assert metrics["missing_predictions"] == ["b"] and metrics["extra_predictions"] == ["zzz"]
    assert metrics["exact_match"] == 0.5 and metrics["n"] == 2
    assert metrics["baselines"] is None and "--train_json" in metrics["baselines_missing_because"]
    assert "no prediction" in stderr and "zzz" in stderr


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ("[{", "not JSON"),
        ([], "no records"),
        ([{"id": "a"}], "record 0"),
        ([{"id": "a", "report": None}], "report is None"),
        ('[{"id": "a", "report": NaN}]', "report is nan"),
        ([{"id": ["a"], "report": "x"}], "give a string"),
        ([REFERENCES[0], REFERENCES[0]], "second time"),
        ([{"id": "other", "report": "x"}], "not one id"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, predictions: object, message: str) -> None:
    status, stderr, metrics = score(tmp_path, predictions, REFERENCES)
    assert status == 2 and metrics is None
    assert message in stderr and "predictions.json" in stderr and len(stderr.strip().splitlines()) == 1


def test_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    flags = ["--predictions", "nowhere.json", "--references", str(tmp_path / "references.json")]
    command = [sys.executable, "evaluation/score.py", *flags, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere.json" in done.stderr


def test_agrees_with_recorded_scores(tmp_path: Path) -> None:
    folder = SHARED / "scores"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/scores, the recorded scores of a published run")
    contents = [(folder / f"iu_xray_{name}.json").read_text() for name in ("predictions", "references")]
    status, _, metrics = score(tmp_path, *contents)
    recorded = json.loads((folder / "iu_xray_metrics.json").read_text())
    assert status == 0 and metrics is not None and metrics["n"] == 382
    for order in range(1, 5):
        assert metrics[f"bleu_{order}"] == pytest.approx(recorded[f"Bleu_{order}"], abs=1e-6)
    assert metrics["rouge_l"] == pytest.approx(recorded["ROUGE_L"], abs=1e-6)


def test_reg_baselines_on_a_patient_split(tmp_path: Path) -> None:
    path = SHARED / "reports" / "reg2025_train.json"
    if not path.is_file():
        pytest.skip("needs ../shared/data/reports, the REG 2025 reports")
    records = json.loads(path.read_text())
    patients = [crc32("_".join(record["id"].split("_")[:3]).encode()) for record in records]
    held_out = [record for record, patient in zip(records, patients, strict=True) if patient % 5 == 0]
    train = [record for record, patient in zip(records, patients, strict=True) if patient % 5 != 0]
    _, _, metrics = score(tmp_path, held_out, held_out, train)
    assert metrics is not None and metrics["exact_match"] == 1
    assert metrics["baselines"]["constant"]["rouge_l"] == pytest.approx(0.218, abs=0.02)
    assert metrics["baselines"]["organ_modal"]["rouge_l"] == pytest.approx(0.602, abs=0.02)


def test_ten_thousand_pairs_are_all_scored(tmp_path: Path) -> None:
    words = "lung biopsy no tumor present invasive carcinoma of special type grade II with necrosis and".split()
    references = [
        {"id": str(i), "report": " ".join(words[(i * step) % len(words)] for step in range(1, 30))}
        for i in range(10_000)
    ]
    status, _, metrics = score(tmp_path, references, references, references)
    assert status == 0 and metrics is not None and metrics["n"] == 10_000
