"""Philox gives its published vectors, and dropout masks have the right probability and are independent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.philox_vectors import KNOWN_ANSWERS

from lora_kernels.core import dropout


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_its_published_vectors(counter, key, output):
    words = dropout.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == output


def test_the_lanes_of_a_mask_are_the_words_low_half_first():
    seed = torch.tensor((7 << 32) | 9)
    mask = dropout.keep_mask(seed, 3, 16, 0.5)
    words = dropout.philox(
        (torch.tensor(1), torch.tensor(2), torch.tensor(0), torch.tensor(0)), (torch.tensor(9), torch.tensor(7))
    )
    lanes = [int(half) for word in words for half in (word & 0xFFFF, word >> 16)]
    assert mask[2, 8:].tolist() == [lane >= 0x8000 for lane in lanes]


@given(m=st.integers(1, 9), k=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), p=st.floats(0, 0.99))
def test_a_mask_is_a_function_of_seed_row_and_column(m, k, seed, p):
    seed = torch.tensor(seed)
    mask = dropout.keep_mask(seed, m, k, p)
    assert torch.equal(mask, dropout.keep_mask(seed, m + 3, k + 11, p)[:m, :k])


def test_a_mask_made_in_blocks_is_the_whole_mask(monkeypatch):
    seed, (M, K), p = torch.tensor((1 << 40) | 5), (100, 37), 0.4
    whole = dropout.keep_mask(seed, M, K, p)
    monkeypatch.setattr(dropout, "_GROUPS", 35)  # blocks of seven rows, and two rows in the last block
    assert torch.equal(dropout.keep_mask(seed, M, K, p), whole)
    x = torch.randn(K, M).t()
    assert torch.equal(dropout.masked(x, p, seed), x * whole)
    x[0, 0] = x[99, 36] = float("nan")  # what is dropped is zero, whatever it was
    assert torch.equal(dropout.masked(x, p, seed).isnan(), whole & x.isnan())
    assert dropout.masked(x[:0], p, seed).shape == (0, K)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_kept_fraction_and_its_factor_are_exact(p):
    mask = dropout.keep_mask(torch.tensor(3), 512, 1024, p).double()
    exact = 1 - dropout.threshold(p) / 65536
    assert abs(mask.mean().item() - exact) < 5 * (exact * (1 - exact) / mask.numel()) ** 0.5
    assert dropout.rescale(p) * exact == pytest.approx(1, rel=1e-12)
    for axis in (0, 1):  # neighbours are uncorrelated
        a, b = mask.narrow(axis, 0, mask.shape[axis] - 1), mask.narrow(axis, 1, mask.shape[axis] - 1)
        covariance = ((a - exact) * (b - exact)).mean().item()
        assert abs(covariance) < 5 * exact * (1 - exact) / mask.numel() ** 0.5


def test_masks_of_two_seeds_are_independent():
    a, b = (dropout.keep_mask(torch.tensor(seed), 256, 512, 0.5).double() for seed in (1, 2))
    assert abs(((a - 0.5) * (b - 0.5)).mean().item()) < 5 * 0.25 / a.numel() ** 0.5


@pytest.mark.parametrize(("p", "want"), [(0.0, 0), (1e-6, 0), (0.1, 6554), (0.5, 32768), (0.9999999, 65535)])
def test_something_is_kept_even_for_p_near_one(p, want):
    assert dropout.threshold(p) == want


def test_a_drawn_seed_follows_torchs_generator():
    torch.manual_seed(11)
    first, second = dropout.draw_seed(torch.device("cpu")), dropout.draw_seed(torch.device("cpu"))
    torch.manual_seed(11)
    assert torch.equal(first, dropout.draw_seed(torch.device("cpu"))) and first != second
    assert first.dtype == torch.int64 and first.shape == () and first >= 0
