"""One optimizer step: the same however its records are laid out over micro-batches, batches and rows."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from language_model import add_lora
from report_loss import optimizer_step
from slide_reports import Record, RecordBatches, ReportDataset, make_loader
from tests.tiny_models import REPORTS, make_model

ANSWERS = [*REPORTS, "Benign", "Tubular adenoma with low grade dysplasia; " * 2]


class Trace(torch.optim.SGD):
    """Keeps the gradient of the last step."""

    def step(self, closure=None):
        self.gradient = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])


@pytest.fixture(scope="module")
def trained(corpus):
    """A model in double precision and a data set whose answers and slides differ in length."""
    model, tokenizer = make_model(num_visual_tokens=12)
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.llm = add_lora(model.llm, rank=2, alpha=4, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.projector.requires_grad_(True)
    model.double()
    paths = sorted(corpus.features.iterdir())
    records = [Record(str(i), (paths[i % 9],), f"Question {i}?", ANSWERS[i % 6], str(i)) for i in range(24)]
    yield model, {packing: ReportDataset.for_model(model, tokenizer, records, packing=packing) for packing in (0, 1)}
    AcceleratorState._reset_state(reset_partial_state=True)


def first_step(trained, batch_size: int, accumulation: int, **order) -> tuple[float, torch.Tensor]:
    model, data = trained
    dataset = data["cases" in order]
    batches = RecordBatches(24, batch_size, gradient_accumulation_steps=accumulation, shuffle=True, seed=3, **order)
    micro_batches = [batch for _, batch in zip(range(accumulation), make_loader(dataset, batches), strict=False)]
    accelerator = Accelerator(cpu=True)
    optimizer = Trace([p for p in model.parameters() if p.requires_grad], lr=0.1)
    result = optimizer_step(accelerator, model.train(), optimizer, micro_batches, max_grad_norm=1e9)
    return result.loss, optimizer.gradient


@pytest.mark.parametrize("order", ["random", "bucketed", "packed"])
def test_accumulation_equals_one_large_batch(trained, order):
    data = trained[1]
    order = {
        "random": {},
        "bucketed": {"lengths": data[0].lengths("none")},
        "packed": {"cases": data[1].cases},
    }[order]
    loss, gradient = first_step(trained, 12, 1, **order)
    for batch_size, accumulation in ((4, 3), (1, 12)):
        other_loss, other = first_step(trained, batch_size, accumulation, **order)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))


def test_lengths_are_those_of_what_the_model_reads(trained):
    model, data = trained
    lengths = data[0].lengths("none")
    batches = RecordBatches(24, 1)
    for length, batch in zip(lengths, make_loader(data[0], batches), strict=True):
        assert model.embed(batch)["attention_mask"].sum() == length
    assert len(set(lengths.tolist())) > 5


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=90), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_bucketed_batches_drop_and_repeat_nothing(lengths, batch_size, processes, accumulation):
    n = len(lengths)
    given_lengths = {"shuffle": True, "seed": 1, "lengths": lengths}
    batches = RecordBatches(
        n, batch_size, num_processes=processes, gradient_accumulation_steps=accumulation, **given_lengths
    )
    batches.start_at(2)
    listed = list(batches)
    window = processes * accumulation
    assert len(listed) == len(batches) == batches.steps_per_epoch * window
    assert sorted(key.index for batch in listed for key in batch if key.supervised) == list(range(n))
    assert all(1 <= len(batch) <= batch_size for batch in listed)
    alone = RecordBatches(n, batch_size * window, **given_lengths)
    alone.start_at(2)
    for step, together in enumerate(alone):
        shared = [key for batch in listed[step * window : (step + 1) * window] for key in batch if key.supervised]
        assert shared == together
    batches.start_at(2, first_step=1)
    assert list(batches) == listed[window:]
    again = RecordBatches(n, batch_size * window, **given_lengths)
    again.start_at(2)
    assert list(again) == list(alone)
    # Accelerate gives each process its own micro-batches, equally many, and all of them.
    batches.start_at(2)
    loader = torch.utils.data.DataLoader(range(10**6), batch_sampler=batches)
    prepared = [
        prepare_data_loader(loader, num_processes=processes, process_index=p, put_on_device=False, even_batches=False)
        for p in range(processes)
    ]
    own = [list(p.batch_sampler) for p in prepared]
    assert {len(of_process) for of_process in own} == {len(listed) // processes}
    assert [batch for turn in zip(*own, strict=True) for batch in turn] == listed


def test_padding_of_bucketed_batches_is_below_five_percent():
    """Reports of 10 to 100 tokens, most of them short, behind 256 visual tokens and behind none."""
    generator = torch.Generator().manual_seed(0)
    texts = (10 + 90 * torch.rand(3000, generator=generator) ** 3).long()
    for num_visual in (0, 256):
        lengths = (texts + num_visual).numpy()
        slots, tokens = {True: 0, False: 0}, int(lengths.sum())
        for bucketed in (True, False):
            batches = RecordBatches(3000, 8, shuffle=True, lengths=lengths if bucketed else None)
            for batch in batches:
                found = lengths[[key.index for key in batch]]
                slots[bucketed] += len(found) * int(found.max())
        assert 1 - tokens / slots[True] < 0.05
        assert 1 - tokens / slots[False] > (0.3 if num_visual == 0 else 0.05)


def test_steps_of_an_epoch_are_mixed_and_differ_between_epochs():
    lengths = torch.arange(4000) % 97
    batches = RecordBatches(4000, 8, shuffle=True, lengths=lengths.numpy())
    means, partners = [], []
    for epoch in (0, 1):
        batches.start_at(epoch)
        steps = [[key.index for key in batch] for batch in batches]
        means.append([float(lengths[step].float().mean()) for step in steps])
        partners.append({index: frozenset(step) for step in steps for index in step})
    halves = [sum(values[:250]) / 250 for values in means], [sum(values[250:]) / 250 for values in means]
    assert all(abs(value - 48) < 8 for half in halves for value in half)
    in_order = sum(a <= b for a, b in zip(means[0], means[0][1:], strict=False)) / len(means[0])
    assert 0.4 < in_order < 0.6
    assert sum(partners[0][index] == partners[1][index] for index in range(4000)) < 40
