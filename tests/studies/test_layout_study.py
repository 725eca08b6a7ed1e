"""The study of errors over layouts, benchmarks/batch_error.py: its laws, and its conclusions on a few layouts without a fit."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import perturbprob as pb


@pytest.fixture(scope="module")
def study(root: Path) -> ModuleType:
    """The study, a script beside the package."""
    spec = importlib.util.spec_from_file_location("batch_error_study", root / "benchmarks/batch_error.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eta_of(simulation, n_batches, scale, seed=0):
    """Draw batch effects."""
    rows = simulation.screen.summary().index
    return simulation.remeasured(pd.DataFrame(1, rows, range(n_batches)), batch_scale=scale, seed=seed).truth["batch_effect"].values


def test_one_batch_for_everything_leaves_nothing_where_the_gradient_is_the_identity_and_something_elsewhere(study):
    for coupling in (0.0, 1.0):
        simulation = pb.simulate(**study.SCREEN, coupling=coupling, effect_scale=2.0, seed=1)
        eta, slope = eta_of(simulation, 1, 0.3), study.gradient(simulation)
        found = study.known_map(simulation, slope, eta, [0])
        assert (found["true"] > 1e-5) == bool(coupling)
        assert (found["from_identity"] > 1e-4) == bool(coupling)
        nothing = study.known_map(simulation, slope, eta, [0], shrink=0.0)  # a map that forgets the cell keeps all of η
        assert nothing["true"] == pytest.approx(np.square(eta).mean(), rel=0.05)


def test_eq_22_is_the_limit_of_small_batch_effects_and_smooth_maps(study):
    simulation = pb.simulate(**study.SCREEN, coupling=1.0, effect_scale=2.0, seed=1)
    slope = study.gradient(simulation)
    for sources in ([0], [0, 1, 2]):
        apart = []
        for scale in (0.4, 0.04, 0.004):
            every = [study.known_map(simulation, slope, eta_of(simulation, 3, scale, seed), sources) for seed in range(4)]
            apart.append(np.mean([abs(found["true"] / found["predicted"] - 1) for found in every]))  # one draw may be right by chance
        assert apart[2] < 0.02
        assert apart[2] < apart[0]
        eta = eta_of(simulation, 3, 0.4)
        smooth = study.known_map(simulation, slope, eta, sources, smooth=1e-3)
        assert smooth["true"] == pytest.approx(smooth["predicted"], rel=0.02)


@pytest.mark.filterwarnings("ignore:.* without control cells")
def test_controls_in_every_batch_lower_the_error_found_in_counts_as_a_prior_predicts(study):
    rows = []
    for seed in range(4):
        simulation = pb.simulate(**study.SCREEN, coupling=1.0, effect_scale=2.0, seed=seed)
        layouts = study.layouts_of(simulation, (2, 3, 4, 6)[seed], seed)
        plan = pb.plan_batches(study.PRIOR, layouts).error.mean("draw")
        for name, table in layouts.items():
            found = study.two_way(simulation.remeasured(table, batch_scale=study.TAU, seed=seed))
            rows.append({"seed": seed, "layout": name, "predicted": float(plan.sel(layout=name))} | found)
    table = pd.DataFrame(rows)
    one, every = (table[table["layout"] == f"controls in {n} batch"]["change"].to_numpy() for n in ("one", "every"))
    assert (every < one).all()
    assert 0.1 < np.exp(np.log(every / one).mean()) < 0.8
    assert table[["predicted", "change"]].corr("spearman").iloc[0, 1] > 0.6  # twelve layouts; the study has sixty
    assert table["change"].max() < 0.1  # changes have a mean square of 0.2
