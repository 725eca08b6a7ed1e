"""The decoder: shares that sum to one, and offsets that act on single genes."""

import math

import torch

from perturbprob.measurement.decoder import Decoder, Log1p


def test_shares_sum_to_one_for_every_cell_and_draw():
    log_share = Decoder(3, 8)(10 * torch.randn(2, 5, 3), torch.randn(2, 5, 8))
    assert log_share.shape == (2, 5, 8)
    torch.testing.assert_close(log_share.exp().sum(-1), torch.ones(2, 5))


def test_an_offset_that_all_genes_share_is_depth_and_changes_nothing():
    decoder, z, offset = Decoder(3, 8), torch.randn(5, 3), torch.randn(8)
    torch.testing.assert_close(decoder(z, offset), decoder(z, offset + 7.0))


def test_an_offset_between_two_genes_is_their_log_fold_change():
    decoder, z = Decoder(3, 8), torch.randn(5, 3)
    before, after = decoder(z, torch.zeros(8)), decoder(z, torch.tensor([1.5] + [0.0] * 7))
    torch.testing.assert_close((after - before)[:, 0] - (after - before)[:, 1], torch.full((5,), 1.5))


def test_the_output_layer_adds_no_bias_of_its_own():
    decoder, offset = Decoder(3, 8), torch.randn(8)
    with torch.no_grad():
        decoder.network[0].weight.zero_()
        decoder.network[0].bias.fill_(-1.0)
    torch.testing.assert_close(decoder(torch.randn(5, 3), offset), torch.log_softmax(offset, -1).expand(5, 8))


def test_log_shares_and_gradients_are_finite_at_extreme_offsets():
    decoder, z = Decoder(3, 8), torch.full((2, 3), 1e3, requires_grad=True)
    log_share = decoder(z, torch.tensor([500.0, -500.0] + [0.0] * 6))
    (gradient,) = torch.autograd.grad(log_share.sum(), z)
    assert torch.isfinite(log_share).all()
    assert torch.isfinite(gradient).all()


def test_counts_become_states_and_states_counts():
    decoder = Log1p(4, math.log(100.0))
    decoder.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 0.1]))
    counts, offset = torch.tensor([[0.5, 3.0, 20.0, 70.0]]), torch.tensor([0.01, 0.05, 0.2, 0.5]).log()
    state = decoder.state(counts, offset)
    torch.testing.assert_close(100 * decoder(state, offset).exp(), counts)
    torch.testing.assert_close(decoder(torch.zeros(4), offset), offset)
    assert float(100 * decoder(torch.full((4,), -1e3), offset).exp().amax()) < 1e-5
