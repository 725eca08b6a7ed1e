"""The decoder: shares that sum to one, and offsets that act on single genes."""

import numpy as np
import scipy.stats
import torch

from perturbprob.measurement.decoder import TAIL, Decoder, log_prior, normal_points


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


def test_how_far_genes_vary_has_a_t_law_around_the_scale_of_all():
    decoder, z = Decoder(3, 8).double(), normal_points(3).double()
    with torch.no_grad():
        sd, value = decoder.network(z).numpy().std(0), float(log_prior(decoder.network, z))
    scale = np.sqrt(np.mean(sd**2))
    law = scipy.stats.t(df=TAIL, scale=scale)
    assert np.isclose(value, (law.logpdf(sd) - law.logpdf(0)).sum())


def test_points_of_the_prior_are_normal_and_the_same_each_time():
    z = normal_points(4)
    assert torch.equal(z, normal_points(4))
    assert z.mean(0).abs().max() < 0.1
    assert (z.T.cov() - torch.eye(4)).abs().max() < 0.2


def test_the_prior_draws_the_network_to_0():
    decoder, z = Decoder(3, 8), normal_points(3)
    before = decoder.network(z).var(0).detach()
    log_prior(decoder.network, z).backward()
    with torch.no_grad():
        for parameter in decoder.network.parameters():
            parameter += 1e-3 * parameter.grad
    assert (decoder.network(z).var(0) < before).all()


def test_the_prior_of_a_network_that_moves_nothing_is_finite():
    decoder = Decoder(3, 8)
    with torch.no_grad():
        decoder.network[2].weight.zero_()
    value = log_prior(decoder.network, torch.randn(1, 3))
    value.backward()
    assert value == 0
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())
