"""Uncertainty over patients against plain loops and scipy, and survival against by-hand figures and scipy."""

import numpy as np
import pytest

from evaluation.field_scores import confusion, macro_f1, score_fields, weighted_kappa
from evaluation.fields import parse_report
from evaluation.mistakes import contradictions, find_mistakes
from evaluation.resampling import effect_sizes, intervals, paired_differences, randomization_test, sums_by_patient
from evaluation.survival import FollowUp, as_event, choose_risks, groups_of, read_risks, stated_risk, survival_scores


def mean_of(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"mean": sums[..., 0] / sums[..., 1]}


def table(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_intervals_agree_with_a_plain_cluster_bootstrap() -> None:
    rng = np.random.default_rng(1)
    patients = [f"p{i // 3}" for i in range(90)]
    values = rng.normal(size=90) + np.repeat(rng.normal(size=30), 3)
    low, high = intervals(sums_by_patient(table(values), patients), mean_of, num_resamples=4000)["mean"]
    by_patient = values.reshape(30, 3)
    plain = [by_patient[rng.integers(0, 30, 30)].mean() for _ in range(4000)]
    assert [low, high] == pytest.approx(np.percentile(plain, (2.5, 97.5)), abs=0.03)
    # Taking slides for patients would claim too much certainty.
    alone = intervals(sums_by_patient(table(values), list(map(str, range(90)))), mean_of, num_resamples=2000)["mean"]
    assert alone[1] - alone[0] < 0.85 * (high - low)
    assert intervals(table(values)[:1], mean_of, num_resamples=10) == {}


def test_randomization_test_agrees_with_all_exchanges() -> None:
    a, b = np.array([0.1, 0.4, 0.2, 0.9, 0.3]), np.array([0.3, 0.5, 0.6, 0.8, 0.7])
    gaps = b - a
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1).T
    exact = (np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-12).mean()
    found = randomization_test(table(a), table(b), mean_of, num_shuffles=20_000)["mean"]
    assert found == pytest.approx(exact, abs=0.01)
    assert randomization_test(table(a), table(a), mean_of, num_shuffles=50)["mean"] == 1


def test_paired_differences_use_the_same_patients() -> None:
    values = np.random.default_rng(0).normal(size=40)
    drawn = paired_differences(table(values), table(values + 0.5), mean_of, num_resamples=100)["mean"]
    assert drawn == pytest.approx(np.full(100, 0.5))


def test_effect_sizes_by_hand() -> None:
    assert effect_sizes(np.array([0, 0, 0.0]), np.array([1, 2, 0.0])) == {
        "cohens_dz": pytest.approx(1.0),
        "superiority": pytest.approx(2.5 / 3),
    }
    assert effect_sizes(np.zeros(3), np.ones(3))["cohens_dz"] is None


def test_weighted_kappa_by_its_definition() -> None:
    ranks = [(0, 0), (1, 1), (2, 2), (0, 2), (1, 2), (2, 1), (0, 0)]
    observed = np.zeros((3, 3))
    for ours, theirs in ranks:
        observed[ours, theirs] += 1
    weights = np.array([[(i - j) ** 2 for j in range(3)] for i in range(3)])
    expected = np.outer(observed.sum(1), observed.sum(0)) / len(ranks)
    assert weighted_kappa(ranks) == pytest.approx(1 - (weights * observed).sum() / (weights * expected).sum())
    assert weighted_kappa([]) is None and weighted_kappa([(1, 1)]) is None


def test_macro_f1_by_hand() -> None:
    # "low": 1 of 1 predicted, 1 of 2 expected: F1 2/3; "high": 1 of 2, 1 of 1: 2/3; silence on both sides is left out.
    assert macro_f1(["low", "high", "high", None], ["low", "low", "high", None]) == pytest.approx(2 / 3)


def test_field_scores_count_silence_and_invention() -> None:
    graded = parse_report("Colon, biopsy;\n  Adenocarcinoma, well differentiated")
    plain = parse_report("Colon, biopsy;\n  Adenocarcinoma")
    scores = score_fields([graded, plain, graded], [graded, graded, plain])["differentiation"]
    assert (scores["n"], scores["accuracy"], scores["left_out"], scores["invented"]) == (2, 0.5, 1, 1)
    rows, columns, counts = confusion("differentiation", [graded, plain, graded], [graded, graded, plain])
    assert rows == ["well"] and columns == ["well", "not stated"] and counts.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("reference", "prediction", "kinds"),
    [
        ("Colon, biopsy;\n  Adenocarcinoma", "Colon, biopsy;\n  Hyperplastic polyp", ["malignancy missed"]),
        ("Colon, biopsy;\n  Hyperplastic polyp", "Colon, biopsy;\n  Adenocarcinoma", ["malignancy invented"]),
        ("Colon, biopsy;\n  Adenocarcinoma", "Lung, biopsy;\n  Adenocarcinoma", ["wrong organ"]),
        ("Breast, biopsy;\n  Ductal carcinoma in situ", "Breast, biopsy;\n  Invasive lobular carcinoma",
         ["in situ or invasive"]),
        ("Colon, biopsy;\n  Adenocarcinoma, well differentiated", "Colon, biopsy;\n  Adenocarcinoma, poorly "
            "differentiated",
         ["grade off by two"]),
        ("Colon, biopsy;\n  Adenocarcinoma, well differentiated",
         "Colon, biopsy;\n  Adenocarcinoma, moderately differentiated", []),
        ("Colon, biopsy;\n  Adenocarcinoma, well "
            "differentiated", "Colon, biopsy;\n  Adenocarcinoma", ["grade left out"]),
        ("Lung, biopsy;\n  Adenocarcinoma", "Lung, biopsy;\n  Small cell carcinoma", ["wrong tumor type"]),
        ("Lung, biopsy;\n  Adenocarcinoma", " ", ["no report"]),
        ("Colon, biopsy;\n  Tubular adenoma with low grade dysplasia", "Colon, biopsy;\n  Chronic active colitis", []),
    ],
)  # fmt: skip
def test_kinds_of_mistakes(reference: str, prediction: str, kinds: list[str]) -> None:
    found = find_mistakes(["a"], [prediction], [parse_report(prediction)], [parse_report(reference)])
    assert [mistake.kind for mistake in found] == kinds
    assert find_mistakes(["a"], [reference], [parse_report(reference)], [parse_report(reference)]) == []


def test_contradictions() -> None:
    gleason = "Prostate, biopsy;\n  Acinar adenocarcinoma, Gleason's score 8 (3+4), grade group 2, tumor volume: 140%"
    assert contradictions(parse_report(gleason)) == [
        "Gleason 8 is not 3+4",
        "Gleason 8 is grade group 4, not 2",
        "tumor volume of 140 %",
    ]
    breast = (
        "Breast, biopsy;\n  Invasive carcinoma of no special type, grade I (Tubule formation: 3, "
        "Nuclear grade: 3, Mitoses: 3)"
    )
    assert contradictions(parse_report(breast)) == ["3+3+3 is not Nottingham grade 1"]


def test_risks_of_a_spreadsheet(tmp_path) -> None:
    (tmp_path / "risks.csv").write_text("id;risk\na, b;0.5\n", encoding="utf-8-sig")
    assert read_risks(tmp_path / "risks.csv") == {"a, b": 0.5}


def test_risks_and_events_are_read() -> None:
    assert stated_risk("High-risk disease") == stated_risk("risk group: high") == 3
    assert stated_risk("Risk score: 0.71 (of 1)") == 0.71 and stated_risk("risk of 5% at most") is None
    assert [as_event(value) for value in (1, "0", True, "Dead", "alive", 1.0, None, "maybe", float("nan"))] == [
        True, False, True, True, False, True, None, None, None,
    ]  # fmt: skip
    graded = parse_report("Lung, biopsy;\n  Adenocarcinoma, poorly differentiated")
    assert choose_risks(["a"], ["Lung"], [graded], None) == ({"a": 3.0}, "grade in the reports")
    assert choose_risks(["a"], ["low risk"], [graded], None) == ({"a": 1.0}, "stated in the reports")
    assert choose_risks(["a"], ["low risk"], [graded], {"a": 0.2, "b": 1})[0] == {"a": 0.2}
    assert groups_of([1, 2, 1]) == ["1", "2", "1"] and len({*groups_of(range(20))}) == 2


def test_survival_against_plain_definitions() -> None:
    rng = np.random.default_rng(2)
    risks = {f"c{i}": float(rng.integers(0, 2)) for i in range(60)}
    follow_up = {
        key: FollowUp(float(rng.exponential(20 - 12 * risk)), bool(rng.random() < 0.7)) for key, risk in risks.items()
    }
    scores = survival_scores(follow_up, risks, "a test")
    keys = list(risks)
    won = pairs = 0.0
    for a in keys:
        for b in keys:
            if follow_up[a].event and follow_up[a].time < follow_up[b].time:
                pairs += 1
                won += 1.0 if risks[a] > risks[b] else 0.5 if risks[a] == risks[b] else 0.0
    assert scores["concordance_index"] == pytest.approx(won / pairs)
    from scipy.stats import CensoredData, logrank

    sides = []
    for value in (0, 1):
        members = [follow_up[key] for key in keys if risks[key] == value]
        sides.append(
            CensoredData(
                uncensored=[one.time for one in members if one.event],
                right=[one.time for one in members if not one.event],
            )
        )
    assert scores["log_rank_p"] == pytest.approx(logrank(*sides).pvalue, rel=1e-6)
    assert sum(group["n"] for group in scores["groups"].values()) == 60
    nothing = survival_scores({"a": FollowUp(3, False)}, {"a": 1.0}, "a test")
    assert nothing["concordance_index"] is None and nothing["log_rank_p"] is None


def test_a_picture_is_the_same_each_time() -> None:
    from evaluation.figures import mistakes_figure, picture

    first, second = (picture(mistakes_figure({"wrong organ": 2, "wrong Gleason": 1}, 3)) for _ in range(2))
    assert first == second and b"<svg" in first


def test_processes_and_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation import parallel, rows
    from evaluation.fields import parse as parsing
    from evaluation.fields import parse_all
    from evaluation.text_metrics import TextModels, score_pairs

    texts = [f"Lung, biopsy;\n  {i}. Adenocarcinoma, tumor volume: {i}%" for i in range(23)]
    guesses = texts[5:] + texts[:5]
    whole = score_pairs(guesses, texts, TextModels()).corpus()
    monkeypatch.setattr(parallel, "FEWEST_ITEMS", 10)
    monkeypatch.setattr(rows, "PAIRS_AT_A_TIME", 7)
    monkeypatch.setattr(parsing, "TEXTS_AT_A_TIME", 5)
    sliced = rows._score_all({"predictions": rows.Row(guesses, texts, {})}, TextModels())["predictions"].corpus()
    assert sliced == pytest.approx(whole, abs=1e-12)
    assert parse_all([*texts, *texts]) == {text: parse_report(text) for text in texts}
