"""Contrastive losses against their plain definitions, over processes, and in chunks."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from stage0_encoder.contrastive_loss import KINDS, SIGMOID, contrastive_loss, gather_rows, positive_pairs
from stage0_encoder.grad_cache import Embedded, backward_in_chunks, backward_whole, split_batch

CASES = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7])
TEXTS = torch.tensor([0, 1, 2, 3, 1, 1, 6, 7])


def embeddings(num_items: int = 8, width: int = 6, seed: int = 0, dtype=torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(num_items, width, generator=generator, dtype=dtype) for _ in range(2))
    return (
        *(F.normalize(rows, dim=-1) for rows in draw),
        torch.tensor(1.7, dtype=dtype),
        torch.tensor(-2.0, dtype=dtype),
    )


def plain(images, texts, log_scale, bias, positives, kind) -> float:
    """The published formulas, a number at a time."""
    size = len(images)
    score = [[math.exp(log_scale) * float(images[i] @ texts[j]) for j in range(size)] for i in range(size)]
    if kind in SIGMOID:
        belong = [[positives[i][j] if kind == "multi_siglip" else i == j for j in range(size)] for i in range(size)]
        terms = [
            -math.log(1 / (1 + math.exp(-(1 if belong[i][j] else -1) * (score[i][j] + float(bias)))))
            for i in range(size)
            for j in range(size)
        ]
        return sum(terms) / size
    total = 0.0
    for rows in (score, [list(column) for column in zip(*score, strict=True)]):
        for i, row in enumerate(rows):
            shares = [math.exp(value) / sum(map(math.exp, row)) for value in row]
            mine = [j for j in range(size) if (positives[i][j] if kind != "clip" else i == j)]
            if kind == "mil_nce":
                total -= math.log(sum(shares[j] for j in mine))
            else:
                total -= sum(math.log(shares[j]) for j in mine) / len(mine)
    return total / size / 2


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_published_formulas(kind):
    inputs, positives = embeddings(), positive_pairs(CASES, TEXTS)
    found = contrastive_loss(*inputs, positives, kind=kind)
    assert float(found) == pytest.approx(plain(*inputs, positives.tolist(), kind), rel=1e-12)


def test_same_case_and_same_text_are_positives():
    positives = positive_pairs(CASES, TEXTS)
    pairs = {(i, j) for i, j in positives.nonzero().tolist() if i < j}
    assert pairs == {(0, 3), (1, 4), (1, 5), (4, 5)}
    assert positives.diagonal().all() and torch.equal(positives, positives.T)


@pytest.mark.parametrize(("several", "one"), [("unicl", "clip"), ("mil_nce", "clip"), ("multi_siglip", "siglip")])
def test_with_one_positive_each_the_losses_meet(several, one):
    inputs, alone = embeddings(), torch.eye(8, dtype=torch.bool)
    both = [float(contrastive_loss(*inputs, alone, kind=kind)) for kind in (several, one)]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


def test_clip_is_the_cross_entropy_of_both_directions():
    images, texts, log_scale, bias = embeddings()
    logits, own = log_scale.exp() * images @ texts.T, torch.arange(8)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    found = contrastive_loss(images, texts, log_scale, bias, positive_pairs(CASES, TEXTS), kind="clip")
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_a_duplicated_report_is_no_negative():
    """Two items of one text that are embedded alike cost the multi-positive losses no more than they must."""
    one = F.normalize(torch.eye(4, dtype=torch.float64), dim=-1)
    rows = one[[0, 0, 1, 2]]
    scale, bias = torch.tensor(math.log(100.0)), torch.tensor(0.0)
    positives = positive_pairs(torch.arange(4), torch.tensor([0, 0, 1, 2]))
    loss = {kind: float(contrastive_loss(rows, rows, scale, bias, positives, kind=kind)) for kind in KINDS}
    assert loss["mil_nce"] == pytest.approx(0, abs=1e-12)
    assert loss["clip"] == loss["unicl"] == pytest.approx(math.log(2) / 2)  # unicl wants each positive to have a share


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    inputs = [value.requires_grad_() for value in embeddings(num_items=5, width=3)]
    positives = positive_pairs(CASES[:5], TEXTS[:5])
    assert torch.autograd.gradcheck(lambda *given: contrastive_loss(*given, positives, kind=kind), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_the_loss(kind):
    inputs, positives = embeddings(dtype=torch.float32), positive_pairs(CASES, TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(*inputs, positives, kind=kind)
    assert found.dtype == torch.float32 and torch.equal(found, contrastive_loss(*inputs, positives, kind=kind))


def test_no_items_cost_nothing():
    for kind in KINDS:
        nothing = torch.zeros(0, 4), torch.zeros(0, 4), torch.tensor(1.0), torch.tensor(0.0)
        assert float(contrastive_loss(*nothing, torch.zeros(0, 0, dtype=torch.bool), kind=kind)) == 0


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="expected one of clip"):
        contrastive_loss(*embeddings(), positive_pairs(CASES, TEXTS), kind="triplet")


# A process holds 5 items and another 3.
SIZES = (5, 3)


def of_rank(rank: int, rendezvous: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    start = sum(SIZES[:rank])
    found = {}
    for kind in KINDS:
        images, texts, log_scale, bias = embeddings()
        weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
        own = [(rows[start : start + SIZES[rank]] @ weight) for rows in (images, texts)]
        numbers = [gather_rows(column[start : start + SIZES[rank]]) for column in (CASES, TEXTS)]
        log_scale.requires_grad_()
        gathered = [gather_rows(rows) for rows in own]
        loss = contrastive_loss(*gathered, log_scale, bias, positive_pairs(*numbers), kind=kind)
        loss.backward()
        for gradient in (weight.grad, log_scale.grad):  # as DDP does
            dist.all_reduce(gradient)
            gradient /= 2
        found[kind] = loss.detach(), weight.grad, log_scale.grad
    torch.save(found, f"{results}_{rank}")
    dist.destroy_process_group()


def test_two_processes_have_loss_and_gradients_of_one(tmp_path):
    mp.start_processes(of_rank, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=2, start_method="forkserver")
    of_ranks = [torch.load(tmp_path / f"found_{rank}", weights_only=True) for rank in (0, 1)]
    for kind in KINDS:
        images, texts, log_scale, bias = embeddings()
        weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
        log_scale.requires_grad_()
        positives = positive_pairs(CASES, TEXTS)
        loss = contrastive_loss(images @ weight, texts @ weight, log_scale, bias, positives, kind=kind)
        loss.backward()
        assert weight.grad.abs().max() > 1e-3
        for found in of_ranks:
            for theirs, ours in zip(found[kind], (loss.detach(), weight.grad, log_scale.grad), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


class Pair(nn.Module):
    """Two small towers with dropout."""

    def __init__(self, dropout: float):
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(6, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
        self.image = nn.Sequential(*layers)
        self.text = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 8))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, batch):
        rows = F.normalize(self.image(batch["x"]), dim=-1), F.normalize(self.text(batch["y"]), dim=-1)
        return Embedded(*rows, self.log_scale.clone(), self.bias.clone())


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return Accelerator(cpu=True)


def make_batch(num_items: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(num_items, 6, generator=generator) for name in ("x", "y")}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_step_in_chunks_is_the_plain_step(accelerator, kind, dropout):
    batch, positives = make_batch(8), positive_pairs(CASES, TEXTS)

    def loss_of(embedded: Embedded) -> torch.Tensor:
        return contrastive_loss(*embedded, positives, kind=kind)

    model = Pair(dropout)
    torch.manual_seed(5)
    if dropout:  # the plain step draws dropout for all items together, so that of the chunks is its reference
        parts = [model(chunk) for chunk in split_batch(batch, 3)]
        rows = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "texts"))
        loss = loss_of(Embedded(*rows, parts[0].log_scale, parts[0].bias))
        loss.backward()
    else:
        loss = backward_whole(accelerator, model, batch, loss_of)
    expected, drawn = gradients(model), torch.rand(3)
    model.zero_grad()
    torch.manual_seed(5)
    found = backward_in_chunks(accelerator, model, batch, loss_of, chunk_size=3)
    assert torch.equal(torch.rand(3), drawn)  # and what is drawn afterwards is the same
    torch.testing.assert_close(found, loss.detach(), rtol=0, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5, msg=name)


class Held:
    """A tensor that autograd keeps for the backward pass, counted while it lives."""

    now = peak = 0

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.num_bytes = tensor.numel() * tensor.element_size()
        Held.now += self.num_bytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.num_bytes


def peak_of(step) -> int:
    Held.now = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        step()
    return Held.peak


def test_sixteen_times_the_batch_fits_the_memory_of_one_chunk(accelerator):
    """What the towers keep for the backward pass is that of a chunk; the loss's own is there before them."""
    model, size = Pair(0.1), 64

    def loss_of(embedded: Embedded) -> torch.Tensor:
        return (embedded.images * embedded.texts).sum() * embedded.log_scale  # keeps next to nothing itself

    plain_peak = peak_of(lambda: backward_whole(accelerator, model, make_batch(size), loss_of))
    large_peak = peak_of(lambda: backward_whole(accelerator, model, make_batch(16 * size), loss_of))
    chunks_peak = peak_of(lambda: backward_in_chunks(accelerator, model, make_batch(16 * size), loss_of, size))
    assert large_peak > 10 * plain_peak
    assert chunks_peak < 1.3 * plain_peak
