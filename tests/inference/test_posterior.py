"""Posterior and prior as InferenceData."""

from pathlib import Path

import arviz
import numpy as np
import pytest
import xarray as xr

import perturbprob as pb


def test_posterior_has_named_dims_and_coordinates(fit: pb.Fit, screen: pb.Screen) -> None:
    found = pb.posterior(fit, n_draws=6)
    draws = found.posterior
    assert draws.sizes["chain"] == 1
    assert draws.sizes["draw"] == 6
    assert draws["batch_effect"].dims == ("chain", "draw", "batch", "gene")
    assert tuple(draws["gene"].values) == screen.genes
    assert tuple(draws["batch"].values) == screen.batches
    assert list(draws["perturbation"].values) == list(screen.perturbations)
    assert draws["condition_effect"].dims == ("chain", "draw", "node", "gene")
    beside = draws if "node_time" in draws.coords else found.constant_data  # before and from ArviZ 1
    assert set(beside["node_time"].values) == set(screen.times)
    assert not any(np.isinf(values).any() for values in draws.data_vars.values())


def test_batch_effects_sum_to_zero_in_every_draw(fit: pb.Fit) -> None:
    eta = pb.posterior(fit, n_draws=20).posterior["batch_effect"]
    assert float(abs(eta.sum("batch")).max()) < 1e-5
    share = xr.DataArray(fit.model.batch_effect.share.numpy(), dims="gene")
    assert float(abs((eta * share).sum("gene")).max()) < 1e-5


def test_arviz_reads_it_and_netcdf_keeps_it(fit: pb.Fit, tmp_path: Path) -> None:
    draws = pb.posterior(fit, n_draws=20)
    table = arviz.summary(draws, var_names=["dispersion"], kind="stats")
    assert len(table) == 12
    every = arviz.summary(draws, kind="stats")
    assert len(every) == sum(values[0, 0].size for values in draws.posterior.data_vars.values())
    draws.to_netcdf(str(tmp_path / "posterior.nc"))
    back = xr.load_dataset(tmp_path / "posterior.nc", group="posterior")
    assert np.array_equal(back["dispersion"].values, draws.posterior["dispersion"].values)


def test_prior_is_wider_than_the_posterior(fit: pb.Fit, screen: pb.Screen) -> None:
    before = pb.prior(pb.node(screen, 3), screen, n_draws=50)
    after = pb.posterior(fit, n_draws=50)
    assert (before.prior["gene_bias"].std("draw") > after.posterior["gene_bias"].std("draw")).all()


def test_prior_gate_is_near_one_percent(screen: pb.Screen) -> None:
    gate = pb.prior(pb.node(screen, 3), screen, n_draws=400).prior["gate"]
    assert float(gate.median()) == pytest.approx(0.01, rel=0.1)


def test_prior_of_another_screen_is_refused(fit: pb.Fit, screen: pb.Screen) -> None:
    other = pb.simulate(n_cells=100, n_genes=8, n_perturbations=2, seed=0).screen
    with pytest.raises(ValueError, match="build the model from this screen"):
        pb.prior(fit.model, other)
