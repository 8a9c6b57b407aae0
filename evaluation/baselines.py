"""Predictions that look at no image, or only at its nearest neighbor; every result is shown beside them."""

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.fields import organ

FEATURE_SUFFIXES = (".h5", ".zarr.zip", ".pt")

MOST_SHUFFLED = 2000


def constant_report(train: Sequence[str]) -> str:
    """The most frequent training report."""
    return Counter(train).most_common(1)[0][0]


def organ_modal_reports(train: Sequence[str]) -> dict[str, str]:
    """Most frequent training report of each organ."""
    by_organ: dict[str, Counter[str]] = {}
    for report in train:
        by_organ.setdefault(organ(report), Counter())[report] += 1
    return {name: reports.most_common(1)[0][0] for name, reports in by_organ.items()}


def organ_modal_guesses(train: Sequence[str], references: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """For each reference the most frequent training report of its organ, and those reports by organ.

    The organ is taken from the reference, so this baseline knows more than a model does. An organ that no training
    report names takes the constant report.
    """
    modal, constant = organ_modal_reports(train), constant_report(train)
    names = [organ(reference) for reference in references]
    used = {name: modal[name] for name in sorted({*names} & modal.keys())}
    return [modal.get(name, constant) for name in names], used


def shuffled_guesses(
    ids: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], *, seed: int = 0
) -> tuple[list[str], list[int]]:
    """Each reference with the prediction of another slide drawn at random: (predictions, places of the references).

    Decoding is deterministic, so what a model writes from another slide's features is that slide's prediction. Small
    sets are drawn several times over (about 1,000 pairs, at most 20 times), of large ones 2,000 slides. Empty for a
    single case.
    """
    num_cases = len(ids)
    if num_cases < 2:
        return [], []
    rng, guesses, places = random.Random(seed), [], []
    drawn = sorted(rng.sample(range(num_cases), min(num_cases, MOST_SHUFFLED)))
    for _ in range(max(1, min(20, 1000 // num_cases))):
        for place in drawn:
            other = rng.randrange(num_cases - 1)
            guesses.append(hypotheses[other + (other >= place)])
            places.append(place)
    return guesses, places


def mean_features(ids: Sequence[str], features_dir: Path, progress: str) -> tuple[np.ndarray, list[str]]:
    """Mean patch token of each slide, (N, D) float32, NaN for those without a readable feature file, and their ids."""
    from tqdm import tqdm

    from slide_features import read_slide_features
    from slide_reports.record import slide_id_of

    rows: dict[int, np.ndarray] = {}
    missing = []
    for place, key in enumerate(tqdm(ids, desc=progress, unit="slide", file=sys.stderr, disable=None)):
        paths = [features_dir / f"{slide_id_of(key)}{suffix}" for suffix in FEATURE_SUFFIXES]
        path = next((path for path in paths if path.is_file()), paths[0])
        try:
            if not path.resolve().is_relative_to(features_dir.resolve()):
                raise ValueError(f"{path} leaves {features_dir}")
            rows[place] = read_slide_features(path).features.mean(axis=0, dtype=np.float32)
        except (OSError, ValueError, KeyError):
            missing.append(key)
    if not rows:
        raise ValueError(f"--features_dir {features_dir}: not one feature file of the reports, such as {ids[0]!r}")
    widths = Counter(row.shape[0] for row in rows.values())
    width = widths.most_common(1)[0][0]
    means = np.full((len(ids), width), np.nan, dtype=np.float32)
    for place, row in rows.items():
        if row.shape[0] == width:
            means[place] = row
        else:
            missing.append(ids[place])
    return means, missing


def retrieval_guesses(
    train: Mapping[str, str],
    test_ids: Sequence[str],
    features_dir: Path,
    patients: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """For each test slide the report of the training slide with the nearest mean feature (cosine), and ids without one.

    Features are centered on the training mean first. A slide of the same patient is never the neighbor. Slides without
    features take the constant report and are named.
    """
    train_ids = list(train)
    train_rows, no_train = mean_features(train_ids, features_dir, "training slides")
    test_rows, no_test = mean_features(test_ids, features_dir, "test slides")
    if train_rows.shape[1] != test_rows.shape[1]:
        raise ValueError(
            f"--features_dir {features_dir}: training slides have {train_rows.shape[1]} features, test slides "
            f"{test_rows.shape[1]}; encode both with one encoder"
        )
    center = np.nanmean(train_rows, axis=0)
    train_rows, test_rows = _unit(train_rows - center), _unit(test_rows - center)
    owners = np.array([patients[key] for key in train_ids])
    usable, fallback = ~np.isnan(train_rows[:, 0]), constant_report(list(train.values()))
    guesses = []
    for key, row in zip(test_ids, test_rows, strict=True):
        candidates = usable & (owners != patients[key])
        if np.isnan(row[0]) or not candidates.any():
            guesses.append(fallback)
            continue
        similarity = np.where(candidates, np.nan_to_num(train_rows) @ row, -np.inf)
        guesses.append(train[train_ids[int(similarity.argmax())]])
    return guesses, [*no_train, *no_test]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
