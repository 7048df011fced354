"""Effective, stable and energy rank of spectra whose values are known."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.analysis.measures import effective_rank, energy_rank, stable_rank
from lora_kernels.analysis.truncate import kept_rank


@pytest.mark.parametrize("k", [1, 2, 7])
def test_equal_directions_count_as_many_as_they_are(k):
    s = torch.cat([torch.full((k,), 0.3), torch.zeros(3)])
    assert effective_rank(s) == pytest.approx(k, rel=1e-6)
    assert stable_rank(s) == pytest.approx(k, rel=1e-6)
    assert energy_rank(s, 1.0) == energy_rank(s, 0.999) == k


def test_they_follow_their_formulas():
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert effective_rank(s) == pytest.approx(math.exp(math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6), rel=1e-14)
    assert stable_rank(s) == pytest.approx(14 / 9, rel=1e-14)
    # Energies are 9/14 = 0.643 and 13/14 = 0.929.
    assert [energy_rank(s, e) for e in (0.1, 0.64, 0.65, 0.92, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]
    exactly = torch.tensor([3.0, 1.0])  # the first has 0.9 of the energy, which is enough
    assert energy_rank(exactly, 0.9) == kept_rank([exactly], None, 0.9) == 1


def test_the_energy_rank_is_exact_at_its_bounds():
    assert energy_rank(torch.tensor([1.0, 1e-9, 1e-12], dtype=torch.float64), 1.0) == 3
    assert energy_rank(torch.ones(10), 0.9) == energy_rank(torch.ones(20), 0.45) == 9
    assert kept_rank([torch.ones(10)], None, 0.9) == 9


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_the_scale_of_the_spectrum_does_not_matter(scale):
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    for measure in (effective_rank, stable_rank, lambda t: energy_rank(t, 0.9)):
        assert measure(s * scale) == pytest.approx(measure(s), rel=1e-12)


@pytest.mark.parametrize("s", [torch.zeros(4), torch.zeros(0)])
def test_an_update_of_zero_has_rank_zero(s):
    assert effective_rank(s) == stable_rank(s) == energy_rank(s, 0.9) == 0


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1, math.nan])
def test_an_energy_that_is_no_part_is_refused(energy):
    with pytest.raises(ValueError, match="energy="):
        energy_rank(torch.ones(2), energy)
