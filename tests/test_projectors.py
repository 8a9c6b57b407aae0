"""Reducers and projectors: masks, order, few and many patches, gradients, each against its plain definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projector_parts.merging import NEIGHBOURS, PruMerge, cluster, count_outliers
from projector_parts.rows import mean_of_groups
from projectors import PROMPT_TOPK, REDUCERS, build_projector, build_reducer, choose_parts, closeness

WIDTH = 6
ALL_REDUCERS = (*REDUCERS, PROMPT_TOPK, "pixel_shuffle")
PROJECTORS = ("linear", "identity", "mlp2x_gelu", "ln_mlp2x_gelu", "mlp2x_gelu_gamma")


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


def guide_of(name: str, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `prompt_topk` takes besides: some closeness to a question, here a token's first element."""
    return {"closeness": tokens[..., 0].detach().float()} if name == PROMPT_TOPK else {}


def test_a_learned_scale_begins_at_one_and_stays_within_its_bounds():
    torch.manual_seed(0)
    projector, tokens = build_projector("mlp2x_gelu_gamma", WIDTH, 10, output_rms=0.25), torch.randn(5, WIDTH)
    assert [type(module).__name__ for module in projector] == (
        ["Linear", "LayerNorm", "GELU", "Linear", "FixedRMSNorm", "BoundedScale"]
    )
    for logit, scale in ((0.0, 1.0), (-99.0, 0.5), (99.0, 1.5)):
        with torch.no_grad():
            projector[-1].logit.fill_(logit)
        rms = projector(tokens).pow(2).mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.full((5,), 0.25 * scale), atol=1e-4, rtol=0)


def test_identity_only_norms_and_only_fits_its_width():
    tokens = torch.randn(5, WIDTH)
    out = build_projector("identity", WIDTH, WIDTH)(tokens)
    torch.testing.assert_close(out, tokens / tokens.pow(2).mean(-1, keepdim=True).sqrt(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="--projector identity needs tokens as wide as the language model, 10, not 6"):
        build_projector("identity", WIDTH, 10)


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_pass_gradcheck(name):
    torch.manual_seed(0)
    projector = build_projector(name, WIDTH, WIDTH, output_rms=0.3).double()
    check_gradients(projector, torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True))


def check_gradients(module: torch.nn.Module, tokens: torch.Tensor, *others, **guide) -> None:
    """Gradients of the module's inputs and of each of its weights against finite differences."""
    names, weights = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def run(tokens, *weights):
        state = dict(zip(names, weights, strict=True))
        out = torch.func.functional_call(module, state, (tokens, *others), guide)
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(run, (tokens, *weights), fast_mode=True)
    assert torch.autograd.gradcheck(lambda tokens: run(tokens, *weights), (tokens,))


@pytest.mark.parametrize(
    "flags, grid, parts",
    [
        (("mlp2x_gelu", "sample"), None, ("mlp2x_gelu", "none")),
        (("mlp3x_gelu", "perceiver"), None, ("mlp3x_gelu", "perceiver")),
        (("perceiver", "none"), None, ("linear", "perceiver")),
        (("qformer", "qformer"), None, ("linear", "qformer")),
        (("pixel_shuffle", "none"), (16, 16), ("ln_mlp2x_gelu", "pixel_shuffle")),
    ],
)
def test_projectors_that_reduce_are_a_reducer_and_a_projector(flags, grid, parts):
    assert choose_parts(*flags, grid) == parts
    reducer = build_reducer(parts[1], WIDTH, 4)
    build_projector(parts[0], reducer.output_width, 10)


def test_two_ways_to_reduce_and_a_shuffle_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="--projector qformer reduces .* drop --token_reducer grid_pool"):
        choose_parts("qformer", "grid_pool", None)
    for flags in (("pixel_shuffle", "none"), ("linear", "pixel_shuffle")):
        with pytest.raises(ValueError, match="patch grid of an image, which slides"):
            choose_parts(*flags, None)


@pytest.mark.parametrize("name", ["mlp", "mlp0x_gelu", "mlp2x_relu", "q_former", "mlp2x_gelu_ln"])
def test_unknown_projector_is_refused(name):
    with pytest.raises(ValueError, match="--projector"):
        build_projector(name, WIDTH, 10)


@pytest.mark.parametrize("name, budget, match", [("mean", 4, "--token_reducer"), ("none", 0, "--num_visual_tokens")])
def test_unknown_reducer_and_empty_budget_are_refused(name, budget, match):
    with pytest.raises(ValueError, match=match):
        build_reducer(name, WIDTH, budget)


@settings(max_examples=60, deadline=None)
@given(
    reducer=st.sampled_from(ALL_REDUCERS),
    budget=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
def test_padding_never_matters(reducer, budget, sizes, data):
    torch.manual_seed(budget)
    module = build_reducer(reducer, WIDTH, budget).eval()
    shares = torch.tensor(data.draw(st.lists(st.integers(1, budget), min_size=len(sizes), max_size=len(sizes))))
    longest = max(sizes)
    tokens = torch.randn(len(sizes), longest, WIDTH)
    coords = torch.randint(0, data.draw(st.integers(1, 10**6)), (len(sizes), longest, 2))
    mask = torch.arange(longest) < torch.tensor(sizes).unsqueeze(1)
    with torch.no_grad():
        out, out_mask = module(tokens, coords, mask, shares, **guide_of(reducer, tokens))
        assert out.shape == (*out_mask.shape, module.output_width)
        with_junk = torch.where(mask.unsqueeze(-1), tokens, 1e4)
        junk_coords = coords + ~mask.unsqueeze(-1) * 10**6
        poisoned, _ = module(with_junk, junk_coords, mask, shares, **guide_of(reducer, with_junk))
        for i, size in enumerate(sizes):
            row = tokens[i : i + 1, :size]
            of_row = coords[i : i + 1, :size], mask[i : i + 1, :size], shares[i : i + 1]
            alone, alone_mask = module(row, *of_row, **guide_of(reducer, row))
            again, _ = module(row, *of_row, **guide_of(reducer, row))
            assert torch.equal(alone, again)
            count = int(out_mask[i].sum())
            assert count == int(alone_mask.sum())
            assert 1 <= count <= shares[i]
            assert out_mask[i, :count].all()  # real tokens first
            torch.testing.assert_close(out[i, :count], alone[0, :count], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out[i, :count], poisoned[i, :count], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reducer", ["none", "grid_pool", "adaptive_pool", "kmeans", "prumerge", PROMPT_TOPK])
def test_few_patches_pass_unchanged(reducer):
    tokens, coords, mask = grid_patches(3, 2)
    out, out_mask = build_reducer(reducer, WIDTH, 6)(tokens, coords, mask, **guide_of(reducer, tokens))
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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_means_of_groups_are_means_of_groups(batch, num_tokens, num_groups, dtype):
    torch.manual_seed(num_tokens)
    tokens = torch.randn(batch, num_tokens, WIDTH).to(dtype)
    groups = torch.randint(0, num_groups + 1, (batch, num_tokens))
    means, counts = mean_of_groups(tokens, groups, num_groups)
    assert means.dtype == dtype
    for b in range(batch):
        for g in range(num_groups):
            members = tokens[b, groups[b] == g].float()
            assert counts[b, g] == len(members)
            expected = members.mean(0) if len(members) else torch.zeros(WIDTH)
            torch.testing.assert_close(means[b, g].float(), expected, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("num_tokens, budget", [(11, 4), (100, 7), (8, 8), (5, 1)])
def test_adaptive_pool_is_the_mean_of_equal_stretches(num_tokens, budget):
    tokens, coords, mask = grid_patches(num_tokens, 1)
    out, _ = build_reducer("adaptive_pool", WIDTH, budget)(tokens, coords, mask)
    ends = [(i * num_tokens // budget, -(-(i + 1) * num_tokens // budget)) for i in range(budget)]
    torch.testing.assert_close(out[0], torch.stack([tokens[0, a:b].mean(0) for a, b in ends]))


def test_kmeans_finds_kinds_of_tissue_wherever_they_lie():
    torch.manual_seed(0)
    kinds = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0, 2, 0, 0, 1])
    centres = 10 * torch.eye(3, WIDTH)
    tokens = centres[kinds] + 0.1 * torch.randn(12, WIDTH)
    out, mask = build_reducer("kmeans", WIDTH, 3)(tokens[None], torch.zeros(1, 12, 2), torch.ones(1, 12).bool())
    # In the order of each cluster's first patch.
    torch.testing.assert_close(out[0], torch.stack([tokens[kinds == kind].mean(0) for kind in (2, 0, 1)]))
    assert mask.all()


def test_kmeans_is_lloyds_algorithm():
    torch.manual_seed(1)
    tokens, num_clusters = torch.randn(50, WIDTH), 6
    centres = tokens[[4, 12, 20, 29, 37, 45]]
    for _ in range(3):
        expected = torch.stack([((token - centres) ** 2).sum(1).argmin() for token in tokens])
        centres = torch.stack([tokens[expected == c].mean(0) for c in range(num_clusters)])
    assert torch.equal(cluster(tokens, num_clusters, max_rounds=3), expected)
    assert torch.equal(cluster(tokens, num_clusters, 100), cluster(tokens, num_clusters, 200))  # settled


def test_kmeans_of_equal_tokens_gives_one():
    out, mask = build_reducer("kmeans", WIDTH, 4)(torch.ones(1, 9, WIDTH), torch.zeros(1, 9, 2), torch.ones(1, 9) > 0)
    assert mask.sum() == 1
    torch.testing.assert_close(out[0, 0], torch.ones(WIDTH))


@pytest.mark.parametrize("num_tokens, budget", [(200, 64), (200, 4), (30, 2), (9, 1), (70, 60)])
def test_prumerge_is_its_plain_definition(num_tokens, budget):
    torch.manual_seed(num_tokens)
    tokens = torch.randn(num_tokens, WIDTH).pow(3).double()
    scores = (tokens - tokens.mean(0)).norm(dim=1)
    low, high = scores.quantile(0.25), scores.quantile(0.75)
    outliers = int((scores > high + 1.5 * (high - low)).sum())
    assert outliers == count_outliers(scores)
    best_first = sorted(range(num_tokens), key=lambda i: -scores[i])
    kept = sorted(best_first[: min(budget - 1, max(outliers, 1))])
    pruned = [i for i in range(num_tokens) if i not in kept]
    mean = lambda rows: (scores[rows].unsqueeze(1) * tokens[rows]).sum(0) / scores[rows].sum()  # noqa: E731
    expected = []
    for i in kept:
        likes = sorted(pruned, key=lambda j: -torch.cosine_similarity(tokens[i], tokens[j], dim=0))[:NEIGHBOURS]
        expected.append(mean([i, *likes]))
    expected.append(mean(pruned))
    out, mask = build_reducer("prumerge", WIDTH, budget)(
        tokens[None], torch.zeros(1, num_tokens, 2), torch.ones(1, num_tokens).bool()
    )
    torch.testing.assert_close(out[0], torch.stack(expected))
    assert mask.all() and len(out[0]) <= budget


def test_prumerge_takes_another_scorer():
    tokens, coords, mask = grid_patches(10, 5)
    scores = torch.ones(50)
    scores[[7, 30]] = 50
    out, _ = PruMerge(WIDTH, 10, scorer=lambda _: scores)(tokens, coords, mask)
    assert out.shape == (1, 3, WIDTH)  # two that stand out, and the rest
    rest = torch.cat([tokens[0, :7], tokens[0, 8:30], tokens[0, 31:]])
    torch.testing.assert_close(out[0, 2], rest.mean(0))


def test_prumerge_of_equal_tokens_is_finite():
    tokens = torch.ones(1, 9, WIDTH, requires_grad=True)
    out, _ = build_reducer("prumerge", WIDTH, 4)(tokens, torch.zeros(1, 9, 2), torch.ones(1, 9).bool())
    out.sum().backward()
    torch.testing.assert_close(out, torch.ones_like(out))
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("rows, columns", [(4, 6), (2, 2), (16, 16)])
def test_pixel_shuffle_of_a_whole_grid_is_space_to_depth(rows, columns):
    tokens, coords, mask = grid_patches(columns, rows, step=1)
    out, out_mask = build_reducer("pixel_shuffle", WIDTH, rows * columns)(tokens, coords, mask)
    squares = tokens.reshape(rows // 2, 2, columns // 2, 2, WIDTH).permute(0, 2, 1, 3, 4)
    assert torch.equal(out[0], squares.reshape(-1, 4 * WIDTH)) and out_mask.all()


def test_pixel_shuffle_pads_odd_grids_and_missing_patches_with_zeros():
    tokens, coords, mask = grid_patches(3, 3, step=1)
    mask[0, 4] = False
    out, _ = build_reducer("pixel_shuffle", WIDTH, 9)(tokens, coords, mask)
    squares = out[0].unflatten(1, (2, 2, WIDTH))
    nothing = torch.zeros(WIDTH)
    assert torch.equal(squares[0].flatten(0, 1), torch.stack([tokens[0, 0], tokens[0, 1], tokens[0, 3], nothing]))
    assert torch.equal(squares[3].flatten(0, 1), torch.stack([tokens[0, 8], nothing, nothing, nothing]))
    fewer, few_mask = build_reducer("pixel_shuffle", WIDTH, 2)(tokens, coords, mask)
    assert torch.equal(fewer[0], out[0, [1, 3]]) and few_mask.all()


def test_prompt_topk_keeps_the_closest_in_their_own_order():
    tokens, coords, mask = grid_patches(4, 2)
    mask[0, 6:] = False
    close = torch.tensor([[0.1, 0.9, -0.3, 0.5, 0.5, 0.7, 1.0, 1.0]])  # the last two are padding
    out, out_mask = build_reducer(PROMPT_TOPK, WIDTH, 3)(tokens, coords, mask, closeness=close)
    assert torch.equal(out[0], tokens[0, [1, 3, 5]]) and out_mask.all()  # of equals the first


def test_closeness_is_a_cosine_of_projected_tokens_whatever_their_magnitude(monkeypatch):
    monkeypatch.setattr("projector_parts.selection.PATCHES_AT_ONCE", 3)
    torch.manual_seed(0)
    projector = build_projector("mlp2x_gelu_gamma", WIDTH, 10, output_rms=0.02)
    tokens, questions = torch.randn(2, 8, WIDTH, requires_grad=True), torch.randn(2, 10)
    close = closeness(projector, tokens, questions)
    assert not close.requires_grad
    for b in range(2):
        for n in range(8):
            a, q = projector(tokens[b, n]), questions[b]
            torch.testing.assert_close(close[b, n], (a @ q / (a.norm() * q.norm())).detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(closeness(projector, tokens, 1000 * questions), close)


@pytest.mark.parametrize("name", ALL_REDUCERS)
@pytest.mark.parametrize("budget", [1, 3, 9])
def test_reducers_pass_gradcheck_and_read_no_padding(name, budget):
    torch.manual_seed(1)
    module = build_reducer(name, 4, budget).double()
    tokens = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 7, [True, True, False, True, False, False, False]])
    coords = torch.stack([torch.arange(7) % 3, torch.arange(7) // 3], dim=-1).expand(2, -1, -1)
    guide = guide_of(name, tokens)
    check_gradients(module, tokens, coords, mask, **guide)
    out, out_mask = module(tokens, coords, mask, **guide)
    out[out_mask].pow(3).sum().backward()
    assert tokens.grad[~mask].abs().max() == 0
    assert tokens.grad[mask].abs().max() > 0


@pytest.mark.parametrize("name, queries", [("perceiver", "latents"), ("qformer", "queries")])
def test_a_share_of_learned_queries_is_a_reducer_of_so_many(name, queries):
    torch.manual_seed(0)
    large, small = build_reducer(name, WIDTH, 5), build_reducer(name, WIDTH, 2)
    state = large.state_dict()
    small.load_state_dict(state | {queries: state[queries][:2]})
    tokens, coords, mask = grid_patches(4, 3)
    out, out_mask = large(tokens, coords, mask, torch.tensor([2]))
    assert out_mask.sum() == 2
    torch.testing.assert_close(out[:, :2], small(tokens, coords, mask)[0])
