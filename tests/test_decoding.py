"""Decoding behind the visual prefix, against brute force over the plain forward pass."""

import dataclasses
import itertools
import re

import pytest
import torch
from transformers import GenerationConfig

from inference.choice import GumbelNoise
from inference.constraints import AllowedReports, Grammar, nearest
from inference.cpu_products import product, use_onednn
from inference.decoding import Decoding, decode, decode_samples, text_of
from inference.prefixes import extend_prefix, read_prefixes
from language_model import add_lora
from slide_reports import collate
from tests.tiny_models import REPORTS, generate_answers, make_batch, make_model, make_sample


def plain_log_probs(model, batch, answer: list[int]) -> torch.Tensor:
    """Log-probabilities (V,) of the token after ``answer``, by a full forward pass without cache."""
    inputs = model.embed(batch)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
    conditioning = model.embed_text(ids)
    embeds = inputs["conditioning"]["inputs_embeds"]
    conditioning["inputs_embeds"] = torch.cat([embeds, conditioning["inputs_embeds"][:, embeds.shape[1] :]], dim=1)
    hidden = model.base_llm.get_decoder()(**conditioning, use_cache=False).last_hidden_state
    return model.logits(hidden[0, -1]).float().log_softmax(-1)


@torch.no_grad()
def plain_beam_search(model, batch, num_beams: int, length: int) -> list[int]:
    beams = [([], 0.0)]
    for _ in range(length):
        candidates = []
        for answer, score in beams:
            log_probs = plain_log_probs(model, batch, answer)
            best = zip(*log_probs.topk(num_beams), strict=True)
            candidates += [([*answer, int(token)], score + float(value)) for value, token in best]
        beams = sorted(candidates, key=lambda beam: -beam[1])[:num_beams]
    return beams[0][0]


def question_batch(tokenizer, sizes):
    batch = make_batch(tokenizer, sizes, answers=[""])
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("family", ["gemma3n", "gemma3", "llama", "qwen3", "biogpt"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_equals_plain_beam_search(family, num_beams):
    model, tokenizer = make_model(family, num_visual_tokens=24)
    sizes = (20, 5)  # the longer prompt reaches past the sliding window of 16
    never = [model.llm.config.vocab_size - 1]
    batch = question_batch(tokenizer, sizes)
    decoded = generate_answers(model, batch, stop_ids=never, num_beams=num_beams, max_new_tokens=6)
    for i, size in enumerate(sizes):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        one |= {name: one[name][:, :size] for name in ("patch_tokens", "coords", "patch_mask")}
        assert decoded[i].token_ids == plain_beam_search(model, one, num_beams, 6)


def test_equals_exhaustive_search_over_all_answers():
    model, tokenizer = make_model("gemma3n")
    batch = question_batch(tokenizer, (5,))
    vocabulary = model.llm.config.vocab_size
    with torch.no_grad():
        first = plain_log_probs(model, batch, [])
        second = torch.stack([plain_log_probs(model, batch, [token]) for token in range(vocabulary)])
    best = divmod(int((first.unsqueeze(1) + second).argmax()), vocabulary)
    (decoded,) = generate_answers(model, batch, stop_ids=[10**6], num_beams=vocabulary, max_new_tokens=2)
    assert decoded.token_ids == list(best)
    assert decoded.score == pytest.approx(float((first.unsqueeze(1) + second).max()) / 2, abs=1e-4)


def test_stops_at_any_stop_id_and_leaves_it_out():
    model, tokenizer = make_model("gemma3n")
    batch = question_batch(tokenizer, (5, 9))
    free = generate_answers(model, batch, stop_ids=[10**6], num_beams=1, max_new_tokens=8)
    stop = free[0].token_ids[3]
    stopped = generate_answers(model, batch, stop_ids=[stop, 10**6], num_beams=1, max_new_tokens=8)
    assert stopped[0].token_ids == list(itertools.takewhile(lambda token: token != stop, free[0].token_ids))


def test_generation_settings_of_the_checkpoint_are_set_aside():
    model, tokenizer = make_model("gemma3n")
    batch = question_batch(tokenizer, (5,))
    before = generate_answers(model, batch, stop_ids=[10**6], num_beams=2, max_new_tokens=8)
    shipped = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_return_sequences": 2, "max_length": 3}
    for name, value in shipped.items():
        setattr(model.llm.generation_config, name, value)
    after = generate_answers(model, batch, stop_ids=[10**6], num_beams=2, max_new_tokens=8)
    assert after == before
    assert model.llm.generation_config.repetition_penalty == 3.0


def test_adapter_takes_part():
    model, tokenizer = make_model("gemma3n")
    batch = question_batch(tokenizer, (5,))
    before = generate_answers(model, batch, stop_ids=[10**6], num_beams=2, max_new_tokens=8)
    model.llm = add_lora(model.llm, rank=4, alpha=64, dropout=0.0)
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    (after,) = generate_answers(model, batch, stop_ids=[10**6], num_beams=2, max_new_tokens=8)
    assert after.token_ids != before[0].token_ids
    assert after.token_ids == plain_beam_search(model, batch, 2, 8)


# Sharing a prefix


def samples_about(tokenizer, sizes, questions):
    """Samples of several slides, each asked all questions; those of a slide share what was read of it."""
    found = []
    for seed, size in enumerate(sizes):
        slide = make_sample(tokenizer, "", size, seed=seed)
        for question in questions:
            asked = make_sample(tokenizer, "", size, question=question)
            found.append(slide | {name: asked[name] for name in ("input_ids", "labels", "question_ids")})
    return found


QUESTIONS = ["Write the report.", "Which organ?", "Is there any carcinoma in this tissue, and of which grade is it?"]


@pytest.mark.parametrize("family", ["gemma3n", "gemma3", "llama"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("num_beams", [1, 5])
def test_shared_prefix_equals_stock_generate_one_by_one(family, with_lora, num_beams):
    model, tokenizer = make_model(family, num_visual_tokens=24)
    if with_lora:
        model.llm = add_lora(model.llm, rank=4, alpha=64, dropout=0.0)
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.eval()
    samples = samples_about(tokenizer, (20, 5), QUESTIONS[:2])  # four rows that share two prefixes
    never = [10**6]
    decoding = Decoding(num_beams=num_beams, max_new_tokens=8)
    questions = [sample["input_ids"][sample["input_ids"].index(-200) + 1 :] for sample in samples]
    prefixes = read_prefixes(model, samples)
    assert len({id(prefix) for prefix in prefixes}) == 2
    found = decode(model, prefixes, questions, stop_ids=never, decoding=decoding)
    pairs = zip(prefixes, questions, strict=True)
    alone = [decode(model, [p], [q], stop_ids=never, decoding=decoding) for p, q in pairs]
    for (answer,), ((single,),), sample in zip(found, alone, samples, strict=True):
        assert answer.token_ids == single.token_ids == stock_answer(model, sample, num_beams, 8, never)
        assert answer.score == (pytest.approx(single.score, abs=1e-5) if num_beams > 1 else None)


@torch.no_grad()
def stock_answer(model, sample, num_beams, length, stop_ids):
    """The plain path: `generate` over a prompt that was read whole, without any cache of ours, for each beam anew."""
    inputs = model.embed(collate([sample]))
    llm, ids = model.base_llm, inputs["input_ids"]
    embeds = inputs["conditioning"]["inputs_embeds"]
    count = ids.shape[1]
    original = llm.get_decoder().forward

    def with_visual_tokens(input_ids=None, inputs_embeds=None, **kwargs):
        conditioning = model.embed_text(input_ids)
        conditioning["inputs_embeds"] = torch.cat(
            [embeds.expand(len(input_ids), -1, -1), conditioning["inputs_embeds"][:, count:]], dim=1
        )
        return original(**kwargs, **conditioning)

    llm.get_decoder().forward = with_visual_tokens
    try:
        settings = GenerationConfig(
            num_beams=num_beams, max_new_tokens=length, do_sample=False, use_cache=False, eos_token_id=stop_ids
        )
        output = llm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    finally:
        del llm.get_decoder().forward
    return output[0, count:].tolist()


def test_order_of_rows_does_not_matter_and_best_come_first():
    model, tokenizer = make_model("gemma3n", num_visual_tokens=24)
    samples = samples_about(tokenizer, (20, 5), QUESTIONS)
    decoding = Decoding(num_beams=4, max_new_tokens=6, num_return=3)
    found = decode_samples(model, tokenizer, samples, decoding=decoding)
    order = [3, 0, 5, 1, 4, 2]
    mixed = decode_samples(model, tokenizer, [samples[i] for i in order], decoding=decoding, rows_at_once=4)
    for answers, i in zip(mixed, order, strict=True):
        assert [a.token_ids for a in answers] == [a.token_ids for a in found[i]]
        assert [a.score for a in answers] == pytest.approx([a.score for a in found[i]], abs=1e-5)
    for answers in found:
        assert len(answers) == 3 and len({tuple(a.token_ids) for a in answers}) == 3
        assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)


@pytest.mark.parametrize("family", ["gemma3n", "llama"])
def test_probabilities_of_tokens_are_those_of_a_plain_forward(family):
    model, tokenizer = make_model(family, num_visual_tokens=24)
    batch = question_batch(tokenizer, (20,))
    (answer,) = generate_answers(model, batch, stop_ids=[10**6], num_beams=3, max_new_tokens=5, length_penalty=0.5)
    with torch.no_grad():
        plain = [
            float(plain_log_probs(model, batch, answer.token_ids[:n])[token])
            for n, token in enumerate(answer.token_ids)
        ]
    assert answer.log_probs == pytest.approx(plain, abs=1e-4)
    assert answer.score == pytest.approx(sum(plain) / 5**0.5, abs=1e-4)


def test_reducer_that_heeds_the_question_shares_nothing():
    model, tokenizer = make_model("llama", "prompt_topk", num_visual_tokens=4)
    samples = samples_about(tokenizer, (20,), QUESTIONS[:2])
    for sample, question in zip(samples, QUESTIONS, strict=False):
        sample["question_ids"] = tokenizer(question, add_special_tokens=False)["input_ids"]
    prefixes = read_prefixes(model, samples)
    assert prefixes[0] is not prefixes[1]
    greedy = Decoding(num_beams=1, max_new_tokens=6)
    both = decode_samples(model, tokenizer, samples, decoding=greedy)
    alone = [decode_samples(model, tokenizer, [sample], decoding=greedy)[0] for sample in samples]
    assert [a.token_ids for (a,) in both] == [a.token_ids for (a,) in alone]


@pytest.mark.parametrize("family", ["gemma3n", "llama"])
def test_prefix_that_was_extended_equals_one_read_whole(family):
    model, tokenizer = make_model(family, num_visual_tokens=24)
    (sample,) = samples_about(tokenizer, (20,), QUESTIONS[:1])
    cut = sample["input_ids"].index(-200) + 1
    rest = sample["input_ids"][cut:]
    (prefix,) = read_prefixes(model, [sample])
    decoding = Decoding(num_beams=3, max_new_tokens=6)
    whole = decode(model, [prefix], [rest], stop_ids=[10**6], decoding=decoding)
    longer = extend_prefix(model, extend_prefix(model, prefix, rest[:2]), rest[2:-3])
    assert decode(model, [longer], [rest[-3:]], stop_ids=[10**6], decoding=decoding)[0][0].token_ids == (
        whole[0][0].token_ids
    )


def test_model_whose_attention_is_not_pytorchs_reads_whole_prompts():
    model, tokenizer = make_model("llama", num_visual_tokens=24)
    samples = samples_about(tokenizer, (20, 5), QUESTIONS)
    shared = decode_samples(model, tokenizer, samples, decoding=Decoding(num_beams=3, max_new_tokens=6))
    model.llm.config._attn_implementation = "eager"
    assert read_prefixes(model, samples)[0].layers is None
    plain = decode_samples(model, tokenizer, samples, decoding=Decoding(num_beams=3, max_new_tokens=6))
    assert [a.token_ids for (a,) in plain] == [a.token_ids for (a,) in shared]
    assert [a.log_probs for (a,) in plain] == [pytest.approx(a.log_probs, abs=1e-4) for (a,) in shared]


# Products on a CPU


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_onednn_are_those_of_plain_layers(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 7, bias=bias)
    rows = torch.randn(2, 5, 24)
    expected = layer(rows)
    use_onednn(layer)
    assert torch.allclose(layer(rows), expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(layer(rows), expected, atol=1e-5)
        assert layer(rows[:0]).shape == (0, 5, 7)
        matrices = torch.randn(1, 1, 24, 9)
        found = product(rows[None, :1], matrices.transpose(2, 3))
        assert torch.allclose(found, rows[None, :1] @ matrices, atol=1e-5), "a transposed matrix"
        assert layer.bfloat16()(rows.bfloat16()).dtype == torch.bfloat16
    layer.float()(rows.requires_grad_()).sum().backward()
    assert rows.grad.abs().sum() > 0, "gradients go through, as evidence needs them"


def test_compiled_layers_are_left_to_the_compiler():
    """It refuses this operation of oneDNN where weights may change."""
    layer, called = torch.nn.Linear(8, 8), []
    use_onednn(layer)

    def look(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        torch.compile(layer, backend=look)(torch.ones(2, 8))
    assert called and not any("mkldnn" in name for name in called)


def test_answers_by_onednn_are_those_of_plain_layers():
    model, tokenizer = make_model("gemma3n", num_visual_tokens=24)
    model.llm = add_lora(model.llm, rank=4, alpha=64, dropout=0.0).eval()
    samples = samples_about(tokenizer, (20, 5), QUESTIONS[:2])
    plain = decode_samples(model, tokenizer, samples, decoding=Decoding(num_beams=3, max_new_tokens=6))
    use_onednn(model.llm)
    found = decode_samples(model, tokenizer, samples, decoding=Decoding(num_beams=3, max_new_tokens=6))
    assert [a.token_ids for (a,) in found] == [a.token_ids for (a,) in plain]
    assert [a.log_probs for (a,) in found] == [pytest.approx(a.log_probs, abs=1e-4) for (a,) in plain]


# Draws


def test_draws_depend_on_seed_and_sample_and_not_on_the_batch():
    model, tokenizer = make_model("llama", num_visual_tokens=8)
    samples = samples_about(tokenizer, (8, 5), QUESTIONS[:2])
    decoding = Decoding(num_beams=1, max_new_tokens=8, do_sample=True, temperature=2.0, seed=1, num_return=2)
    together = decode_samples(model, tokenizer, samples, decoding=decoding)
    third = decode_samples(model, tokenizer, samples[2:3], decoding=decoding, numbers=[2])
    assert third == together[2:3]
    assert together[0][0] != together[0][1]
    other = dataclasses.replace(decoding, seed=2)
    assert decode_samples(model, tokenizer, samples, decoding=other) != together


def test_noise_draws_from_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    noise = GumbelNoise([(0, 0)])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[noise(None, logits).argmax()] += 1
    assert torch.allclose(counts / 4000, logits[0].softmax(0), atol=0.03)


def test_top_p_leaves_only_the_likeliest():
    model, tokenizer = make_model("llama", num_visual_tokens=8)
    samples = samples_about(tokenizer, (8,), QUESTIONS[:1])
    draw = Decoding(num_beams=1, max_new_tokens=6, do_sample=True, top_p=1e-6, seed=5)
    assert decode_samples(model, tokenizer, samples, decoding=draw) == decode_samples(
        model, tokenizer, samples, decoding=Decoding(num_beams=1, max_new_tokens=6)
    )


@pytest.mark.parametrize(
    "flags", [{"do_sample": True, "num_beams": 2}, {"num_return": 4}, {"top_p": 0.0}, {"temperature": 0.0}]
)
def test_flags_that_do_not_go_together_are_refused(flags):
    with pytest.raises(ValueError, match="--"):
        Decoding(**flags)


# Constraints


@pytest.mark.parametrize("num_beams", [1, 4])
def test_answers_are_among_the_allowed_reports(num_beams):
    model, tokenizer = make_model("gemma3n")
    allowed = AllowedReports(tokenizer, REPORTS, model.settings.prompt["after_answer"])
    samples = samples_about(tokenizer, (8, 5), QUESTIONS)
    decoding = Decoding(num_beams=num_beams, max_new_tokens=60, num_return=num_beams)
    found = decode_samples(model, tokenizer, samples, decoding=decoding, constraint=allowed)
    assert all(text_of(tokenizer, answer) in REPORTS for answers in found for answer in answers)
    free = decode_samples(model, tokenizer, samples, decoding=Decoding(num_beams=1, max_new_tokens=60))
    assert not any(text_of(tokenizer, answer) in REPORTS for (answer,) in free)


def test_best_allowed_report_is_the_likeliest():
    model, tokenizer = make_model("llama")
    texts = ["Benign", "Carcinoma", "Chronic gastritis"]
    batch = question_batch(tokenizer, (5,))
    stop_ids = [1]
    (sample,) = samples_about(tokenizer, (5,), QUESTIONS[:1])
    scores = {}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + stop_ids
        with torch.no_grad():
            logs = [float(plain_log_probs(model, batch, ids[:n])[token]) for n, token in enumerate(ids)]
        scores[text] = sum(logs) / len(logs)
    decoding = Decoding(num_beams=3, max_new_tokens=40, num_return=3)
    (prefix,) = read_prefixes(model, [sample])
    cut = sample["input_ids"].index(-200) + 1
    (found,) = decode(
        model,
        [prefix],
        [sample["input_ids"][cut:]],
        stop_ids=stop_ids,
        decoding=decoding,
        constraint=AllowedReports(tokenizer, texts),
    )
    assert {text_of(tokenizer, a): pytest.approx(a.score, abs=1e-4) for a in found} == scores
    assert text_of(tokenizer, found[0]) == max(scores, key=scores.get)


@pytest.mark.parametrize(
    "name, grammar, pattern",
    [
        ("g.txt", r"(Breast|Lung), biopsy; grade (I|II|III)", r"(Breast|Lung), biopsy; grade (I|II|III)"),
        ("g.lark", 'start: organ ", biopsy"\norgan: "Breast" | "Lung"\n', r"(Breast|Lung), biopsy"),
    ],
)
def test_answers_follow_a_grammar(tmp_path, name, grammar, pattern):
    pytest.importorskip("llguidance")
    (tmp_path / name).write_text(grammar)
    model, tokenizer = make_model("llama")
    samples = samples_about(tokenizer, (8, 5), QUESTIONS[:2])
    constraint = Grammar(tokenizer, str(tmp_path / name))
    decoding = Decoding(num_beams=2, max_new_tokens=40)
    found = decode_samples(model, tokenizer, samples, decoding=decoding, constraint=constraint)
    assert all(re.fullmatch(pattern, text_of(tokenizer, answer)) for (answer,) in found)


def test_broken_grammar_is_refused_in_one_line(tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "g.lark").write_text("start: (")
    with pytest.raises(ValueError, match="--grammar .*g.lark") as refused:
        Grammar(make_model("llama")[1], str(tmp_path / "g.lark"))
    assert "\n" not in str(refused.value)


def test_nearest_text_has_the_fewest_edits():
    assert nearest("Stomach, biopsy; Chronic gastritis", REPORTS)[0] == REPORTS[2]
    assert nearest(REPORTS[1], REPORTS) == (REPORTS[1], 1.0)
