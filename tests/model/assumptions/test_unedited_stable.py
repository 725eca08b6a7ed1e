"""Unedited cells that stay as they are: nothing moves them, and control cells say whether that holds."""

import anndata
import pytest
import torch

import perturbprob as pb
from perturbprob.dynamics.neural_ode import Stable


def test_unmarked_cells_do_not_move_where_they_are_declared_stable(screen, make):
    for assumptions, moves in (((pb.UneditedStable(),), False), ((), True)):
        model, sites = make(screen, *assumptions)
        z0 = torch.randn(4, 2)
        end = model.moved(sites, z0, model.vocabulary.encode([pb.Protocol([pb.Wait(3)])] * 4))
        assert bool((end.delta.abs() > 1e-4).any()) == moves
    edited = model.moved(sites, z0, model.vocabulary.encode([next(p for p in screen.conditions if p.perturbations)] * 4))
    assert (edited.delta.abs() > 1e-4).any()


def test_declared_stable_cells_wrap_any_field(screen):
    model = pb.node(screen, 2, assumptions=[pb.UneditedStable()])
    assert isinstance(model.transition.field, Stable)
    assert pb.node(screen, 2).transition.field.__class__.__name__ == "Push"


def test_control_cells_that_drift_are_found_and_those_that_do_not_are_not():
    still = pb.simulate(n_cells=1500, n_genes=20, n_perturbations=2, times=(1.0, 2.0), n_batches=2, seed=4)
    found = pb.UneditedStable().test(still.screen)
    assert found.testable
    assert found.interval[0] <= 0.03
    assert found.effect < 2 * found.smallest
    control = still.adata[still.adata.obs.perturbation == "control"].copy()
    late = (control.obs.time == 2.0).to_numpy()
    moved = control.X.toarray()
    moved[late, :5] *= 3
    control.X = moved
    other = still.adata[still.adata.obs.perturbation != "control"].copy()
    other.X = other.X.toarray()
    drifting = pb.Screen.from_anndata(anndata.concat([control, other]), time="time", batch="batch")
    found = pb.UneditedStable().test(drifting)
    assert found.interval[0] > found.smallest
    assert found.power > 0.99


def test_predict_warns_where_stability_is_neither_declared_nor_testable():
    screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    short = {"epochs": 1, "progress": False}
    with pytest.warns(pb.UndeclaredWarning, match="there is one time only"):
        pb.predict(pb.fit(pb.node(screen, 2), screen, **short), n_draws=2, batch="average", progress=False)
    declared = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, **short)
    pb.predict(declared, n_draws=2, batch="average", progress=False)
