"""Find what is there, with honest intervals, and nothing where there is nothing. More screens: benchmarks/recovery.py."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import perturbprob as pb


@pytest.fixture(scope="module")
def recovery(root: Path) -> ModuleType:
    """The coverage study, a script beside the package."""
    spec = importlib.util.spec_from_file_location("recovery", root / "benchmarks/recovery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("unequal", "seed"), [(0.0, 0), (0.5, 1)])
def test_truth_lies_in_its_intervals(recovery: ModuleType, unequal: float, seed: int) -> None:
    """One small screen: 1,000 cells, 20 genes, 4 knock-outs, 3 batches. The 90 % band over ten larger ones is the benchmark's."""
    simulation = pb.simulate(n_cells=1000, n_genes=20, n_perturbations=4, n_batches=3, unequal=unequal, seed=seed)
    found = recovery.recover(simulation, epochs=50, n_latent=4, n_draws=100, seed=seed, minibatch=64, learning_rate=6e-3)
    assert 0.8 <= found["batch_effect"] <= 0.98
    assert 0.8 <= found["log_fold_change"] <= 0.98
    assert found["dispersion"] >= 0.5  # few cells, and three programmes behind a point decoder: the benchmark says how it grows
    assert found["hits_found"] >= 0.5
    assert found["false_hits"] == 0


@pytest.mark.slow
def test_genes_with_hardly_a_count_have_the_dispersion_of_the_others() -> None:
    """With a prior for each gene alone, and moments of relative counts to start from, half were off by a factor of 1.9, one by 13."""
    simulation = pb.simulate(n_cells=2000, n_genes=30, n_perturbations=2, n_batches=2, times=(1.0,), dispersion=2.0, depth=60, seed=3)
    screen, truth = simulation.screen, simulation.truth["dispersion"].values
    fit = pb.fit(pb.node(screen, 4), screen, epochs=40, minibatch=80, learning_rate=6e-3, progress=False)
    ratio = np.abs(np.log(pb.posterior(fit, 50).posterior["dispersion"].mean(("chain", "draw")).values / truth))
    rare = np.asarray(screen.counts.mean(0)).ravel() < 0.5
    assert np.median(ratio[rare]) < 0.5
    assert ratio[rare].max() < np.log(10)
    assert np.median(ratio[~rare]) < 0.2


@pytest.mark.slow
def test_no_fake_perturbation_is_a_hit() -> None:
    """Control cells of one real screen, half of them dealt out to ten perturbations that were never done."""
    controls = pb.datasets.ishikawa2023()
    controls = controls[controls.cells_of("control")]
    chance = np.random.default_rng(0)
    fake = np.where(chance.random(controls.n_cells) < 0.5, 0, chance.integers(1, 11, controls.n_cells))
    protocols = [(pb.Protocol([pb.Knockout(f"fake{k}")]) if k else pb.Protocol()) >> p for k in range(11) for p in controls.conditions]
    screen = pb.Screen(
        counts=controls.counts,
        genes=controls.genes,
        cells=controls.cells,
        conditions=tuple(protocols),
        condition=fake * len(controls.conditions) + controls.condition,
        batches=controls.batches,
        batch=controls.batch,
        size_factor=controls.size_factor,
        baseline=controls.baseline,
        time_unit=controls.time_unit,
    )
    found = pb.effects(pb.fit(pb.node(screen, 5), screen, epochs=30, minibatch=128, learning_rate=6e-3, progress=False), n_draws=50)
    assert int(found["hit"].sum()) <= 0.05 * 10
    assert float((found["local_false_sign_rate"] < 0.05).mean()) < 0.05
    assert float(((found["lower"] > 0) | (found["upper"] < 0)).mean()) < 0.1
