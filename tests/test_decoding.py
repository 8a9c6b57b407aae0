"""Decoding behind the visual prefix, against brute force over the plain forward pass."""

import itertools

import pytest
import torch

from inference.decoding import generate_answers
from language_model import add_lora
from tests.tiny_models import make_batch, make_model


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
