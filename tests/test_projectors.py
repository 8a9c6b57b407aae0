"""Reducers and projectors: masks, order, few and many patches, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projectors import REDUCERS, build_projector, build_reducer

WIDTH = 6


def grid_patches(columns: int, rows: int, step: int = 256, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(columns * rows)
    coords = torch.stack([index % columns, index // columns], dim=-1) * step
    tokens = torch.randn(1, len(index), WIDTH, generator=generator)
    return tokens, coords[None], torch.ones(1, len(index), dtype=torch.bool)


@pytest.mark.parametrize("name, num_linear", [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projector_depth_and_output_scale(name, num_linear):
    projector = build_projector(name, WIDTH, 10, output_rms=0.25)
    assert sum(isinstance(module, torch.nn.Linear) for module in projector) == num_linear
    out = projector(torch.randn(3, 5, WIDTH))
    assert out.shape == (3, 5, 10)
    torch.testing.assert_close(out.pow(2).mean(-1).sqrt(), torch.full((3, 5), 0.25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mlp", "mlp0x_gelu", "mlp2x_relu", "q_former"])
def test_unknown_projector_is_refused(name):
    with pytest.raises(ValueError, match="--projector"):
        build_projector(name, WIDTH, 10)


@pytest.mark.parametrize("name, budget, match", [("mean", 4, "--token_reducer"), ("none", 0, "--num_visual_tokens")])
def test_unknown_reducer_and_empty_budget_are_refused(name, budget, match):
    with pytest.raises(ValueError, match=match):
        build_reducer(name, WIDTH, budget)


@settings(max_examples=60, deadline=None)
@given(
    reducer=st.sampled_from(REDUCERS),
    budget=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
def test_padding_never_matters(reducer, budget, sizes, data):
    torch.manual_seed(budget)
    module = build_reducer(reducer, WIDTH, budget).eval()
    longest = max(sizes)
    tokens = torch.randn(len(sizes), longest, WIDTH)
    coords = torch.randint(0, data.draw(st.integers(1, 10**6)), (len(sizes), longest, 2))
    mask = torch.arange(longest) < torch.tensor(sizes).unsqueeze(1)
    with torch.no_grad():
        out, out_mask = module(tokens, coords, mask)
        poisoned, _ = module(torch.where(mask.unsqueeze(-1), tokens, 1e4), coords + ~mask.unsqueeze(-1) * 10**6, mask)
        for i, size in enumerate(sizes):
            alone, alone_mask = module(tokens[i : i + 1, :size], coords[i : i + 1, :size], mask[i : i + 1, :size])
            count = int(out_mask[i].sum())
            assert count == int(alone_mask.sum())
            assert 1 <= count <= budget
            assert out_mask[i, :count].all()  # real tokens first
            torch.testing.assert_close(out[i, :count], alone[0, :count], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out[i, :count], poisoned[i, :count], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reducer", ["none", "grid_pool"])
def test_few_patches_pass_unchanged(reducer):
    tokens, coords, mask = grid_patches(3, 2)
    out, out_mask = build_reducer(reducer, WIDTH, 6)(tokens, coords, mask)
    torch.testing.assert_close(out, tokens)
    assert out_mask.all()


def test_none_spreads_evenly_over_many_patches():
    tokens = torch.arange(100.0).reshape(1, 100, 1)
    out, mask = build_reducer("none", 1, 4)(tokens, torch.zeros(1, 100, 2), torch.ones(1, 100, dtype=torch.bool))
    assert out.flatten().tolist() == [12, 37, 62, 87]
    assert mask.all()


def test_grid_pool_is_the_mean_of_each_cell_in_raster_order():
    tokens, coords, mask = grid_patches(4, 4)
    out, out_mask = build_reducer("grid_pool", WIDTH, 4)(tokens, coords, mask)
    square = tokens.reshape(4, 4, WIDTH)
    expected = torch.stack([square[r : r + 2, c : c + 2].mean((0, 1)) for r in (0, 2) for c in (0, 2)])
    torch.testing.assert_close(out[0], expected)
    assert out_mask.sum() == 4


def test_grid_pool_follows_the_shape_of_the_tissue():
    tokens, coords, mask = grid_patches(32, 2)
    out, out_mask = build_reducer("grid_pool", WIDTH, 16)(tokens, coords, mask)
    assert out_mask.sum() == 16
    expected = tokens.reshape(2, 16, 2, WIDTH).mean((0, 2))  # one row of sixteen near-square cells
    torch.testing.assert_close(out[0], expected)


def test_grid_pool_leaves_empty_cells_out():
    tokens, coords, mask = grid_patches(8, 8)
    corner = (coords[0, :, 0] < 512) & (coords[0, :, 1] < 512) | (coords[0, :, 0] > 1400) & (coords[0, :, 1] > 1400)
    out, out_mask = build_reducer("grid_pool", WIDTH, 4)(tokens[:, corner], coords[:, corner], mask[:, corner])
    assert out_mask.sum() == 2


def test_perceiver_passes_gradcheck_and_reads_no_padding():
    torch.manual_seed(0)
    module = build_reducer("perceiver", WIDTH, 3).double()
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    coords = torch.zeros(2, 5, 2)
    assert torch.autograd.gradcheck(lambda t: module(t, coords, mask)[0], (tokens,))
    module(tokens, coords, mask)[0].sum().backward()
    assert tokens.grad[1, 2:].abs().max() == 0


@pytest.mark.parametrize("reducer", ["none", "grid_pool"])
def test_parameter_free_reducers_pass_gradcheck(reducer):
    tokens, coords, mask = grid_patches(4, 3)
    tokens = tokens.float().requires_grad_(True)
    module = build_reducer(reducer, WIDTH, 4)
    module(tokens, coords, mask)[0].sum().backward()
    # Every output sums to one unit of gradient over the patches that it is made of.
    torch.testing.assert_close(tokens.grad.sum(1), torch.full((1, WIDTH), 4.0))
