"""Text metrics against plain definitions, the libraries they rest on, published examples and recorded scores."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics import ngram_statistics
from evaluation.metrics.bert_score_f1.formula import bert_score_pairs
from evaluation.metrics.chrf.formula import chrf, chrf_counts
from evaluation.metrics.cider_d.formula import cider_d, cider_pairs, document_frequency
from evaluation.metrics.coco_bleu.formula import bleu_counts, coco_bleu
from evaluation.metrics.coco_rouge.formula import coco_rouge_l, lcs_length
from evaluation.metrics.embedding_cosine.formula import embedding_cosine
from evaluation.metrics.exact_match.formula import exact_match
from evaluation.metrics.levenshtein.formula import levenshtein_ratio
from evaluation.metrics.meteor.formula import meteor, open_wordnet
from evaluation.metrics.reg_score.formula import case_rouge, four_gram_precision, reg_score, spacy_entities
from evaluation.metrics.rouge_score_f1.formula import rouge_pairs
from evaluation.metrics.sacre_bleu.formula import sacre_bleu, sacre_bleu_counts, sacre_bleu_of
from evaluation.metrics.text_encoder import TextEncoder
from evaluation.text_metrics import TextModels, score_pairs

ROOT = Path(__file__).resolve().parent.parent
SCORES = ROOT.parent / "shared" / "data" / "scores"
WORDS = ["lung", "Lung", "biopsy;", "no", "tumor", "grade", "II", "3+4=7", "(5%)"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=5)
METRICS = ("bert_score_f1 chrf cider_d coco_bleu coco_rouge embedding_cosine exact_match levenshtein meteor reg_score "
           "rouge_score_f1 sacre_bleu").split()  # fmt: skip


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


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, saved as a published one is."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,;.()%+="]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=40, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recorded() -> tuple[list[str], list[str], dict[str, float]]:
    """Predictions, references and recorded scores of a published run."""
    if not SCORES.is_dir():
        pytest.skip("needs ../shared/data/scores, the recorded scores of a published run")
    names = ("predictions", "references", "metrics")
    ours, theirs, metrics = (json.loads((SCORES / f"iu_xray_{name}.json").read_text()) for name in names)
    return [ours[key][0] for key in theirs], [theirs[key][0] for key in theirs], metrics


def test_agrees_with_recorded_scores(recorded: tuple[list[str], list[str], dict[str, float]]) -> None:
    hypotheses, references, metrics = recorded
    bleu = coco_bleu(hypotheses, references)
    for order in range(1, 5):
        assert bleu[f"bleu_{order}"] == pytest.approx(metrics[f"Bleu_{order}"], abs=1e-6)
    assert coco_rouge_l(hypotheses, references) == pytest.approx(metrics["ROUGE_L"], abs=1e-6)
    assert cider_d(hypotheses, references) == pytest.approx(metrics["CIDEr"], abs=1e-6)


def test_equals_sacrebleu_and_rouge_score(recorded: tuple[list[str], list[str], dict[str, float]]) -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = recorded[0][:100], recorded[1][:100]
    assert sacre_bleu(hypotheses, references) * 100 == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, [references], force=True).score, abs=1e-9
    )
    assert chrf(hypotheses, references) * 100 == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-9
    )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for row, hypothesis, reference in zip(rouge_pairs(hypotheses, references), hypotheses, references, strict=True):
        expected = [part.fmeasure for part in scorer.score(reference, hypothesis).values()]
        assert row == pytest.approx(expected, abs=1e-12)


@given(pairs=PAIRS)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_equals_the_libraries_on_odd_texts(pairs: list[tuple[str, str]]) -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = map(list, zip(*pairs, strict=True))
    expected = sacrebleu.corpus_bleu(hypotheses, [references], force=True).score
    assert sacre_bleu(hypotheses, references) * 100 == pytest.approx(expected, abs=1e-9)
    assert chrf(hypotheses, references) * 100 == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-9
    )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for row, (hypothesis, reference) in zip(rouge_pairs(hypotheses, references), pairs, strict=True):
        assert row == pytest.approx([part.fmeasure for part in scorer.score(reference, hypothesis).values()], abs=1e-12)


@given(pairs=PAIRS, largest_id=st.sampled_from([100, 2**62]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_counts_equal_those_of_sacrebleu(pairs: list[tuple[str, str]], largest_id: int) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    hypotheses, references = map(list, zip(*pairs, ("a b c d e", ""), ("", "é a"), ("a", "\ud800 a"), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram_statistics, "LARGEST_ID", largest_id)  # small: numbers are packed anew at each order
        patch.setattr(ngram_statistics, "PAIRS_AT_A_TIME", 3)
        for counts, metric in [
            (chrf_counts(hypotheses, references), CHRF()),
            (bleu_counts(hypotheses, references), BLEU(tokenize="none", force=True)),
            (sacre_bleu_counts(hypotheses, references), BLEU(force=True)),
        ]:
            assert counts.tolist() == metric._extract_corpus_statistics(hypotheses, [references])
    alone = bleu_counts(["a b c d e"], [""])
    assert alone.tolist() == BLEU(tokenize="none", force=True)._extract_corpus_statistics(["a b c d e"], [[""]])


def test_published_examples() -> None:
    # README of sacrebleu: BLEU = 48.53 82.4/50.0/45.5/37.5 (BP = 0.943 ratio = 0.944 hyp_len = 17 ref_len = 18).
    counts = np.array([17, 18, 14, 7, 5, 3, 17, 14, 11, 8])
    assert sacre_bleu_of(counts) * 100 == pytest.approx(48.53, abs=5e-3)
    # README of rouge-score.
    ours, theirs = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    assert rouge_pairs([ours], [theirs])[0] == pytest.approx([0.705882, 0.266667, 0.588235], abs=1e-6)
    # Documentation of rapidfuzz: three edits in eleven letters.
    assert levenshtein_ratio(["lewenstein"], ["levenshtein"]) == pytest.approx(1 - 2 / 11)
    # Documentation of nltk gives 0.6944 with WordNet; exact and stem matches alone give the same.
    hypothesis = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor([hypothesis], [reference]) == pytest.approx(0.6944, abs=5e-5)


@given(a=st.lists(st.sampled_from("abcd"), max_size=20), b=st.lists(st.sampled_from("abcd"), max_size=20))
@settings(derandomize=True, deadline=None)
def test_lcs_equals_the_plain_table(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == plain_lcs(a, b)


@given(pairs=PAIRS)
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


def test_cider_by_hand() -> None:
    references = ["lung adenocarcinoma", "lung biopsy", "colon polyp"]
    # The reference itself: unigrams and the bigram agree fully, there are no longer n-grams.
    assert cider_pairs(references, references) == pytest.approx([5, 5, 5])
    # "lung" is in two of three references, "biopsy" in one: idf ln(3/2) and ln 3.
    common, rare = math.log(1.5), math.log(3)
    cosine = common**2 / (common**2 + rare**2)
    assert cider_pairs(["lung biopsy"], references[:1], document_frequency(references)) == pytest.approx(
        [10 * cosine / 4]
    )
    assert cider_d([""], ["lung"]) == 0 == cider_d(["lung"], ["lung"])


def test_exact_match_ignores_only_whitespace() -> None:
    assert exact_match(["Lung,  biopsy;\nno tumor ", "lung"], ["Lung, biopsy; no tumor", "Lung"]) == 0.5


def test_meteor_steps() -> None:
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


def test_reg_components_by_hand() -> None:
    ours, theirs = "Lung, biopsy; no Tumor present", "lung, biopsy; no tumor present"
    assert case_rouge(ours, theirs) == 1  # lower case
    assert four_gram_precision(ours, theirs) == 0 and four_gram_precision(theirs, theirs) == 1  # case counts
    assert four_gram_precision("a b c d e f", "a b c d") == pytest.approx(1 / 3)
    assert four_gram_precision("a b c d", "a b c d e f g h") == 1  # no brevity penalty
    assert four_gram_precision("a b c", "a b c d") == four_gram_precision("a b c d", "a b c") == 0


def test_reg_score_is_partial_without_models() -> None:
    scores = reg_score(["a b c d"], ["a b c d"])
    assert scores["reg_score"] is None and scores["reg_key"] is None and scores["reg_emb"] is None
    assert scores["reg_status"] == "partial: KEY and EMB not computed"
    assert scores["reg_ceiling"] == {"weight_computed": 0.3, "ceiling": pytest.approx(0.3)}


def test_reg_score_whole(text_model: Path) -> None:
    spacy = pytest.importorskip("spacy", reason="KEY needs spaCy, the extra [keywords]")
    pipeline = spacy.blank("en")
    terms = [{"label": "TERM", "pattern": [{"LOWER": word}]} for word in ("tumor", "biopsy", "lung", "ii")]
    pipeline.add_pipe("entity_ruler").add_patterns(terms)
    entities, embed = spacy_entities(pipeline), TextEncoder(text_model).mean_pooled
    assert entities("Lung BIOPSY of grade II") == {"lung", "biopsy"}  # lower case, three characters or more
    references = ["Lung biopsy shows a tumor", "no tumor"]
    scores = reg_score(references, references, entities=entities, embed=embed)
    # The second reference has fewer than four words: it cannot exceed 0.85.
    assert scores["reg_score"] == pytest.approx((1 + 0.85) / 2) == scores["reg_ceiling"]["ceiling"]
    assert scores["reg_status"] == "whole" and scores["reg_bleu"] == 0.5 and scores["reg_key"] == 1
    scores = reg_score(["Lung biopsy", "nothing seen"], references, entities=entities, embed=embed)
    assert scores["reg_key"] == pytest.approx((2 / 3 + 0) / 2)
    rows = embed(["Lung biopsy", references[0]])
    cosine = float(rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1]))
    single = reg_score(["Lung biopsy"], references[:1], entities=entities, embed=embed)
    assert single["reg_emb"] == pytest.approx(max(0.0, (cosine - 0.5) / 0.5), abs=1e-5)


def test_embeddings_against_plain_definitions(text_model: Path) -> None:
    import torch

    encoder = TextEncoder(text_model, batch_size=2)
    texts = ["lung biopsy", "a", "no tumor " * 30, ""]  # the third is cut at the model's 40 tokens
    rows = encoder.mean_pooled(texts)
    states = []
    for text, row in zip(texts, rows, strict=True):  # one by one: neither padding nor order matters
        tokens = encoder.tokenizer(text, truncation=True, max_length=40, return_tensors="pt")
        with torch.inference_mode():
            hidden = encoder.model(**tokens).last_hidden_state[0]
        states.append(hidden)
        np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-5)
    a, b = (torch.nn.functional.normalize(states[place], dim=-1) for place in (0, 1))
    precision = max_similarity(a[1:-1], b)  # special tokens may be matched, and do not count
    recall = max_similarity(b[1:-1], a)
    expected = [precision, recall, 2 * precision * recall / (precision + recall)]
    assert bert_score_pairs(texts[:1], texts[1:2], encoder)[0] == pytest.approx(expected, abs=1e-5)
    assert bert_score_pairs(["lung", ""], ["lung", "lung"], encoder)[:, 2] == pytest.approx([1, 0], abs=1e-5)
    assert embedding_cosine(["lung", ""], ["lung", "lung"], encoder) == pytest.approx(0.5, abs=1e-5)


def max_similarity(tokens, others) -> float:
    return float(np.mean([max(float(token @ other) for other in others) for token in tokens]))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--embedding_model .*nowhere"):
        TextEncoder(tmp_path / "nowhere")


@given(pairs=PAIRS)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_pair_scores_add_up_to_the_corpus_metrics(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = map(list, zip(*pairs, strict=True))
    corpus = score_pairs(hypotheses, references, TextModels()).corpus()
    expected = {
        **coco_bleu(hypotheses, references),
        "rouge_l": coco_rouge_l(hypotheses, references),
        "sacre_bleu": sacre_bleu(hypotheses, references),
        "chrf": chrf(hypotheses, references),
        "cider_d": cider_d(hypotheses, references),
        "meteor": meteor(hypotheses, references),
        "exact_match": exact_match(hypotheses, references),
        "levenshtein_ratio": levenshtein_ratio(hypotheses, references),
    }
    assert {name: corpus[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def metric_cache(tmp_path_factory: pytest.TempPathFactory):
    """A folder of its own for what evaluate writes; it can be set once, because modules stay imported."""
    import evaluate

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.chdir(ROOT)
        yield folder / "results"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_loads_by_path(name: str, text_model: Path, metric_cache: Path) -> None:
    import evaluate

    more = {"model": str(text_model)} if name in ("bert_score_f1", "embedding_cosine") else {}
    metric = evaluate.load(f"evaluation/metrics/{name}", cache_dir=str(metric_cache))
    perfect = metric.compute(predictions=["no tumor in the lung"] * 2, references=["no tumor in the lung"] * 2, **more)
    numbers = [value for key, value in perfect.items() if isinstance(value, float) and key != "meteor"]
    assert all(value == pytest.approx(0 if name == "cider_d" else 1, abs=1e-6) for value in numbers)
    assert numbers or perfect["meteor"] > 0.99
    assert set(METRICS) == {path.parent.name for path in (ROOT / "evaluation" / "metrics").glob("*/formula.py")}


def test_one_side_too_few_is_refused() -> None:
    for metric in (coco_bleu, coco_rouge_l, exact_match, meteor, sacre_bleu, chrf, cider_d, levenshtein_ratio):
        with pytest.raises(ValueError, match="1 hypotheses, 2 references"):
            metric(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="at least one"):
            metric([], [])
