"""L(z, p, m, t) in place of waiting: what it reads, and which laws it does not keep."""

import pytest
import torch

from perturbprob.dynamics.latent_shift import Additive, LatentShift, Network, Unmoved
from perturbprob.dynamics.transition import Effects
from perturbprob.experiment.vocabulary import Segment

EFFECTS = Effects(torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[3.0, 0.0]]))


def segment(perturbation, media, wait):
    marks = torch.tensor([perturbation], dtype=torch.float32), torch.tensor([media], dtype=torch.float32)
    return Segment(*marks, torch.tensor([any(media)]), torch.tensor([wait]))


def test_an_additive_shift_is_the_sum_of_its_marks_and_the_same_for_every_cell():
    transition, z = LatentShift(2), torch.randn(6, 1, 2)
    both = transition(z, [segment([1, 1], [1], 1e3)], EFFECTS)
    torch.testing.assert_close(both.delta, torch.tensor([4.5, 1.0]).expand(6, 1, 2))
    half = transition(z, [segment([1, 0], [0], 1.0)], EFFECTS).delta
    torch.testing.assert_close(half, -torch.expm1(-transition.rate) * torch.tensor([1.0, 2.0]).expand(6, 1, 2))


@pytest.mark.parametrize("field", [Additive, Network])
def test_it_reads_what_was_done_and_the_time_since_the_start_but_not_when(field):
    torch.manual_seed(0)
    transition, z = LatentShift(2, field=field(2)), torch.randn(1, 2)
    late = transition(z, [segment([1, 0], [0], 1.0), segment([0, 0], [1], 0.5)], EFFECTS)
    early = transition(z, [segment([1, 0], [1], 1.5)], EFFECTS)
    torch.testing.assert_close(late.z, early.z)
    assert not transition.semigroup


def test_identity_moves_nothing():
    z = torch.randn(3, 1, 2)
    torch.testing.assert_close(LatentShift(2, field=Unmoved())(z, [segment([1, 1], [1], 2.0)], EFFECTS).z, z)
