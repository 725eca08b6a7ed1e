"""The law of depth: each batch as deep, and as uneven, as its cells are."""

import numpy as np
import pytest

import perturbprob as pb
from perturbprob.inference.depth import DepthLaw


def test_the_mean_depth_of_each_batch_is_that_of_its_cells_however_uneven_it_is() -> None:
    screen = pb.simulate(n_cells=3000, n_genes=6, n_perturbations=2, n_batches=3, times=(1.0,), seed=1).screen
    rng = np.random.default_rng(0)
    log_size = rng.normal(0, np.array([0.2, 0.6, 1.2])[screen.batch])
    law = DepthLaw.of(screen, log_size)
    for b, batch in enumerate(screen.batches):
        expected = np.mean([law.quantiles(p, batch).exp().mean().item() for p in screen.conditions])
        assert expected == pytest.approx(np.exp(log_size[screen.batch == b]).mean(), rel=0.1)
    assert list(law.spread) == list(screen.batches)
    assert law.spread["batch1"] < 0.4 < 1.4 < law.spread["batch3"]


def test_a_batch_of_few_cells_is_as_uneven_as_all() -> None:
    screen = pb.simulate(n_cells=200, n_genes=6, n_perturbations=1, n_batches=2, times=(1.0,), seed=1).screen
    keep = np.flatnonzero(screen.batch == 0)[:3].tolist() + np.flatnonzero(screen.batch == 1).tolist()
    law = DepthLaw.of(screen[keep], np.random.default_rng(0).normal(0, 0.5, len(keep)))
    assert law.spread["batch1"] == pytest.approx(1, abs=0.15)
