"""Effects: fold changes with intervals, hits with a stated share of false discoveries."""

import numpy as np
import pytest
import torch
from scipy import stats

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.inference.effects import log_evidence


@pytest.fixture(scope="module")
def hits(fit: pb.Fit) -> object:
    """Effects against control."""
    return pb.effects(fit, n_draws=60)


def test_answers_are_labelled(hits: object, screen: pb.Screen) -> None:
    assert hits["log_fold_change"].dims == ("condition", "gene")
    assert "control" not in hits["perturbation"].values
    assert list(hits["tested_perturbation"].values) == list(screen.perturbations)
    assert (hits["lower"] <= hits["log_fold_change"]).mean() > 0.95
    assert float(hits["local_false_sign_rate"].min()) >= 0
    assert float(hits["local_false_sign_rate"].max()) <= 1


def test_fold_changes_are_those_of_the_simulation(hits: object, simulation: Simulation) -> None:
    truth = simulation.truth["log_fold_change"].sel(condition=hits["condition"].values).values
    assert np.corrcoef(truth.ravel(), hits["log_fold_change"].values.ravel())[0, 1] > 0.6


def test_active_perturbations_are_hits_and_idle_ones_are_not(hits: object, simulation: Simulation) -> None:
    for name in hits["tested_perturbation"].values:
        assert bool(hits["hit"].sel(tested_perturbation=name)) == bool(simulation.truth["active"].sel(target=name))


def test_false_discovery_share_is_the_mean_doubt_down_the_list(hits: object) -> None:
    order = np.argsort(-hits["log_evidence"].values)
    doubt = 1 - hits["probability"].values[order]
    assert np.allclose(hits["false_discovery_share"].values[order], np.cumsum(doubt) / np.arange(1, 4))


def test_against_another_perturbation_is_the_difference(fit: pb.Fit, hits: object, screen: pb.Screen) -> None:
    first, second = screen.perturbations[:2]
    between = pb.effects(fit, against=second, n_draws=60)
    condition = next(str(p) for p in screen.conditions if p.perturbation == first)
    partner = condition.replace(first, second)
    difference = hits["log_fold_change"].sel(condition=condition) - hits["log_fold_change"].sel(condition=partner).values
    assert np.allclose(between["log_fold_change"].sel(condition=condition), difference, atol=1e-5)
    assert "hit" not in between


def test_an_unknown_partner_is_refused(fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match="No fitted condition has the perturbation 'nothing'"):
        pb.effects(fit, against="nothing")


def test_probabilities_are_probabilities(fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match="probabilities between 0 and 1"):
        pb.effects(fit, level=2.0)


def test_evidence_is_the_bayes_factor_of_its_formula() -> None:
    """Against scipy's normal densities: each gene's mean has covariance C, or (1 + κ) C where it is changed."""
    chance = np.random.default_rng(0)
    root = np.array([[0.1, 0.0], [0.08, 0.05]])
    draws = chance.standard_normal((40_000, 3, 2)) @ root.T + np.array([[0.0, 0.1], [0.3, 0.4], [0.0, -0.2]])
    expected, covariance = 0.0, root @ root.T
    for gene in range(3):
        mean = draws[:, gene].mean(0)
        null = stats.multivariate_normal.logpdf(mean, np.zeros(2), covariance)
        slab = [stats.multivariate_normal.logpdf(mean, np.zeros(2), (1 + k) * covariance) - null for k in (1, 4, 16)]
        expected += np.log(0.95 + 0.05 * np.exp(slab).mean())
    assert log_evidence(torch.tensor(draws).mT.float()) == pytest.approx(expected, rel=0.05)


def test_draws_around_nothing_speak_for_nothing() -> None:
    chance = np.random.default_rng(1)
    found = [log_evidence(torch.tensor(chance.standard_normal((200, 4, 50)) + chance.standard_normal((4, 50))).float()) for _ in range(50)]
    assert np.mean(np.array(found) > 0) < 0.1


@pytest.mark.parametrize("n_genes", [100, 2000])
def test_genes_that_move_together_count_once(n_genes: int) -> None:
    """Nothing is done; half of each gene's uncertainty is one direction that all share."""
    chance = np.random.default_rng(2)

    found = []
    for _ in range(40):
        loading = chance.standard_normal(n_genes)
        both = [chance.standard_normal((n, 2, 1)) * loading + chance.standard_normal((n, 2, n_genes)) for n in (1, 200)]
        found.append(log_evidence(torch.tensor(both[0] + both[1]).float()))
    assert np.mean(np.array(found) > np.log(19)) <= 0.05


def test_without_perturbed_cells_there_is_no_effect(screen: pb.Screen) -> None:
    controls = screen[screen.cells_of("control")]
    idle = pb.fit(pb.node(controls, 2), controls, epochs=2, progress=False)
    with pytest.raises(ValueError, match="no perturbed cells"):
        pb.effects(idle, n_draws=2)


def test_two_draws_are_needed(fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match="at least 2 draws"):
        pb.effects(fit, n_draws=1)


def test_a_perturbation_without_control_in_its_batches_is_not_called(screen: pb.Screen) -> None:
    name = screen.perturbations[1]
    keep = np.ones(screen.n_cells, bool)
    keep[screen.cells_of(name)] = screen.batch[screen.cells_of(name)] == 1
    keep[screen.cells_of("control")] = screen.batch[screen.cells_of("control")] == 0
    apart = screen[keep]
    idle = pb.fit(pb.node(apart, 2), apart, epochs=2, progress=False)
    with pytest.warns(pb.AliasedWarning, match=f"No cell of {name} is in a batch with control cells"):
        hits = pb.effects(idle, n_draws=4)
    assert not bool(hits["hit"].sel(tested_perturbation=name))
