"""Position codes: the same tissue has the same codes, from every scanner and anywhere on the glass."""

import math

import pytest
import torch

from projectors import UNKNOWN_UM_PER_PX, build_position_codes
from tests.test_projectors import check_gradients

WIDTH = 6


@pytest.fixture
def codes():
    torch.manual_seed(0)
    codes = build_position_codes("sincos", WIDTH)
    torch.nn.init.normal_(codes.mixing.weight, std=0.1)
    return codes


def tissue(num_rows: int = 2, num_patches: int = 9):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_rows, num_patches, WIDTH, generator=generator)
    coords = 256 * torch.randint(0, 200, (num_rows, num_patches, 2), generator=generator)
    return tokens, coords, torch.ones(num_rows, num_patches, dtype=torch.bool)


def test_a_model_begins_as_without_codes_and_learns_them():
    codes = build_position_codes("sincos", WIDTH)
    tokens, coords, mask = tissue()
    out = codes(tokens, coords, mask, 0.5)
    assert torch.equal(out, tokens)
    out.pow(3).sum().backward()
    assert (codes.mixing.weight.grad.abs().amax(0) > 0).float().mean() > 0.9
    assert build_position_codes("none", WIDTH)(tokens, coords, mask, 0.5) is tokens


def test_scanner_and_place_on_the_glass_do_not_matter_but_distance_does(codes):
    tokens, coords, mask = tissue()
    at_20x = codes(tokens, coords, mask, torch.tensor([0.5, 0.5]))
    at_40x = codes(tokens, 2 * coords, mask, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(at_20x, at_40x)
    torch.testing.assert_close(at_20x, codes(tokens, coords + torch.tensor([12_345, 678]), mask, 0.5))
    assert (at_20x - codes(tokens, coords, mask, 0.25)).abs().amax((1, 2)).min() > 0.01
    swapped = codes(tokens, coords.flip(-1), mask, UNKNOWN_UM_PER_PX)
    assert (at_20x - swapped).abs().max() > 0.01


def test_codes_are_sines_and_cosines_of_micrometres(codes):
    tokens, coords, mask = tissue(1, 3)
    um = (coords[0] - coords[0].amin(0)) * 0.5
    features = [[], [], []]
    for i in range(3):
        for axis in (0, 1):
            angles = [2 * math.pi * float(um[i, axis]) / (256 * 512 ** (k / 15)) for k in range(16)]
            features[i] += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    expected = tokens[0] + torch.tensor(features) @ codes.mixing.weight.T
    torch.testing.assert_close(codes(tokens, coords, mask, 0.5)[0], expected, atol=1e-3, rtol=0)


def test_neighbouring_tiles_anywhere_on_a_slide_are_told_apart(codes):
    across = torch.arange(0, 75_000, 128).unsqueeze(1) * torch.tensor([1, 0])
    out = codes(torch.zeros(1, len(across), WIDTH), across[None], torch.ones(1, len(across), dtype=torch.bool), 1.0)[0]
    assert torch.pdist(out).min() > 1e-3


def test_padding_never_matters(codes):
    tokens, coords, mask = tissue()
    mask[1, 4:] = False
    junk = coords - ~mask.unsqueeze(-1) * 10**6
    together = codes(tokens, junk, mask, torch.tensor([0.5, 0.3]))
    alone = codes(tokens[1:, :4], coords[1:, :4], mask[1:, :4], torch.tensor([0.3]))
    torch.testing.assert_close(together[1:, :4], alone)


def test_gradcheck(codes):
    tokens, coords, mask = tissue(2, 3)
    mask[0, 1] = False
    check_gradients(codes.double(), tokens.double().requires_grad_(True), coords, mask, 0.5)


def test_unknown_codes_are_refused():
    with pytest.raises(ValueError, match="--position_codes 'rope' is unknown"):
        build_position_codes("rope", WIDTH)
