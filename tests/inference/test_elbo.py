"""The ELBO, added up site by site, is Pyro's own."""

import math
from collections.abc import Callable
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import perturbprob as pb
from perturbprob.inference.elbo import Elbo
from perturbprob.measurement.counts import CountHead, Poisson
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide, node_design


@pytest.mark.parametrize(
    "make",
    [
        partial(pb.vae, n_latent=3, shift="sparse", measurement="zero_inflated_negative_binomial"),
        partial(pb.node, n_latent=2, batch_effect="state", assumptions=[pb.UneditedStable()]),
        partial(pb.causal_context, n_latent=2),
    ],
)
def test_it_and_its_gradients_are_those_of_pyro(make: Callable[[pb.Screen], pb.CellModel]) -> None:
    screen = pb.simulate(n_cells=150, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0, 2.0), n_batches=2, seed=4).screen
    model = make(screen)
    guide = Guide(model, node_design(model, screen))
    guide.start(model, screen)
    cells, results = CellTable(model, screen).cells(torch.arange(40), screen.n_cells, 0.7), []
    for loss in (Elbo(model, guide), Trace_ELBO()(model, guide)):
        pyro.set_rng_seed(3)
        guide.zero_grad()
        value = loss(cells)
        value.backward()
        results.append((float(value.detach()), {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}))
    (ours, own), (theirs, grads) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert own.keys() == grads.keys()
    for name, grad in own.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-4 * float(grads[name].abs().max()) + 1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:The screen has one")
def test_cells_that_share_nothing_that_is_sampled_can_be_fitted() -> None:
    """Means of control cells with known noise, in one batch: no site stands above the plate."""
    bulk = pb.simulate(n_cells=600, n_genes=6, n_perturbations=1, times=(1.0, 2.0, 3.0), n_batches=1, seed=1).screen.pseudobulk()
    control = bulk[bulk.cells_of("control")]
    fit = pb.fit(pb.node(control, measurement="known_noise"), control, epochs=2, validation=0.0, progress=False)
    assert all(map(math.isfinite, fit.losses["train"]))


class Weighed(CountHead):
    """A head of a user's, of which some sites count more than once, or not at all."""

    sites = ()

    def globals(self) -> dict[str, Tensor]:
        """Sample what is used nowhere."""
        with pyro.poutine.scale(scale=3.0):
            pyro.sample("weighed", pyro.distributions.Normal(self.zero[0], 1.0), obs=torch.tensor(2.0))
        with pyro.poutine.mask(mask=False):
            pyro.sample("masked", pyro.distributions.Normal(self.zero[0], 1.0), obs=torch.tensor(3.0))
        return {}


def test_global_sites_keep_their_scales_and_masks() -> None:
    screen = pb.simulate(n_cells=60, n_genes=6, n_perturbations=1, n_batches=2, seed=4).screen
    model, values = pb.vae(screen, n_latent=2, measurement="poisson"), []
    guide, cells = Guide(model, node_design(model, screen)), CellTable(model, screen).cells(torch.arange(20), screen.n_cells)
    for head in (Poisson(screen.n_genes), Weighed(screen.n_genes)):
        model.measurement = head
        torch.manual_seed(2)
        values.append(float(Elbo(model, guide)(cells).detach()))
    half = 0.5 * math.log(2 * math.pi)
    assert values[1] - values[0] == pytest.approx(3 * (2 + half), rel=1e-3)
