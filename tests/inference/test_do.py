"""Do-queries of a network that is known: against the simulator's steady states, scipy, and the other questions to a fit."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.inference.expectation import ended

SHORT = {"n_draws": 8, "progress": False}
LONG = 40.0


@pytest.fixture(scope="module")
def all_lost() -> Simulation:
    """Eight genes, each knocked out and come to rest; cells alike, and weights that hardly saturate."""
    return pb.simulate(
        n_cells=900, n_genes=8, n_perturbations=8, times=(LONG,), n_batches=2, effect_scale=0.25, inactive=0, heterogeneity=0, seed=4
    )


@pytest.fixture(scope="module")
def part(all_lost: Simulation) -> pb.Screen:
    """The same screen as if only two genes had been knocked out."""
    kept = [k for k, p in enumerate(all_lost.screen.conditions) if p.perturbation in ("control", "G2", "G5")]
    return all_lost.screen[np.flatnonzero(np.isin(all_lost.screen.condition, kept))]


def with_truth(fit: pb.Fit, weights: np.ndarray) -> pb.Fit:
    """Put a known network in the posterior's place: every law a point, every gate open, cells alike."""
    known = replace(fit, model=copy.deepcopy(fit.model), guide=copy.deepcopy(fit.guide))
    with torch.no_grad():
        for name, value in known.guide.named_parameters():
            if name.endswith("log_scale"):
                value.fill_(-20)
        known.guide.edge_gate_logit_loc.fill_(20)
        known.guide.edge_slab_loc.copy_(torch.as_tensor(weights))
        known.guide.perturbation_own_loc.zero_()
        known.model.programmes.weight.zero_()
    return known


@pytest.fixture(scope="module")
def rough(part: pb.Screen) -> pb.Fit:
    """A fit that has hardly begun."""
    return pb.fit(pb.causal_context(part, n_latent=2, assumptions=[pb.UneditedStable()]), part, epochs=1, progress=False)


@pytest.fixture(scope="module")
def fit(rough: pb.Fit, all_lost: Simulation) -> pb.Fit:
    """The truth as a fit."""
    return with_truth(rough, all_lost.truth["network"].values)


def contrasts(values: np.ndarray, own: list[int]) -> np.ndarray:
    """Changes relative to the mean of the genes that are not perturbed, as shares add to 1."""
    others = np.delete(values, own, axis=-1)
    return others - others.mean(-1, keepdims=True)


def test_steady_states_of_knock_outs_never_seen_are_those_of_the_simulator(fit: pb.Fit, all_lost: Simulation) -> None:
    genes = list(fit.model.vocabulary.genes)
    found = pb.do(fit, [pb.Knockout(g) for g in genes], settled=True, **SHORT)
    assert np.isinf(found["time"]).all()
    rate = all_lost.truth["median_log_rate"].values
    where = dict(zip(all_lost.truth["perturbation"].values, rate - rate[0], strict=True))
    size = 0.0
    for k, gene in enumerate(genes):
        wanted = contrasts(where[gene], [k])
        np.testing.assert_allclose(contrasts(found["log_fold_change"].values[k], [k]), wanted, atol=0.02)
        size = max(size, np.abs(wanted).max())
    assert size > 0.3


def test_a_pair_never_seen_follows_the_equation_in_time(fit: pb.Fit, all_lost: Simulation) -> None:
    """Against scipy, the equation written out for the median cell."""
    weights, gamma = all_lost.truth["network"].values, fit.model.transition.decay.detach().numpy()
    genes, scale = list(fit.model.vocabulary.genes), fit.model.vocabulary.time_scale
    own = [genes.index("G1"), genes.index("G5")]

    def slope(_: float, delta: np.ndarray) -> np.ndarray:
        product = 2 / (1 + np.exp(-delta))
        product[own] = 0
        return gamma * (weights @ (product - 1) - delta)

    asked = pb.Knockout("G1") >> pb.Knockout("G5") >> pb.Wait(20)
    wanted = solve_ivp(slope, (0, 20 / scale), np.zeros(8), rtol=1e-9, atol=1e-11).y[:, -1]
    found = pb.do(fit, asked, **SHORT)["log_fold_change"].values[0]
    np.testing.assert_allclose(contrasts(found, own), contrasts(wanted, own), atol=2e-3)


def test_a_knock_out_that_was_seen_is_what_predict_and_effects_say(rough: pb.Fit, fit: pb.Fit) -> None:
    protocol = pb.Knockout("G2") >> pb.Wait(LONG)
    ends = pb.predict(fit, [protocol, pb.Wait(LONG)], batch="average", **SHORT)["mean"].values
    np.testing.assert_allclose(pb.do(fit, protocol, **SHORT)["log_fold_change"].values[0], np.log(ends[0] / ends[1]), atol=1e-4)
    both = pb.do(rough, protocol, **SHORT), pb.effects(rough, **SHORT).sel(condition=[str(protocol)])
    for name in ("log_fold_change", "lower", "upper", "local_false_sign_rate"):
        np.testing.assert_allclose(*(answer[name].values for answer in both), rtol=1e-4, atol=1e-5)


def test_one_query_does_not_change_another_and_nothing_of_the_fit(fit: pb.Fit) -> None:
    """A knock-out needs no parameter that was not learnt: where all is known, its interval has no width."""
    seen, new = pb.Knockout("G2") >> pb.Wait(LONG), pb.Knockout("G1") >> pb.Wait(LONG)
    alone, beside = pb.do(fit, seen, **SHORT), pb.do(fit, [new, seen], **SHORT)
    np.testing.assert_allclose(alone["log_fold_change"].values[0], beside["log_fold_change"].values[1], atol=1e-6)
    assert [p.gene for p in fit.model.vocabulary.perturbations] == ["G2", "G5"]
    np.testing.assert_allclose(beside["upper"] - beside["lower"], 0, atol=1e-4)


def test_strengths_never_seen_come_from_their_priors(fit: pb.Fit) -> None:
    """A share Beta(2, 2) of the product is lost, LogNormal(0, 0.7) of it is gained; the knock-out loses all."""
    lost, down, up = (pb.do(fit, kind("G1"), settled=True, **SHORT) for kind in (pb.Knockout, pb.Interference, pb.Activation))
    size = contrasts(lost["log_fold_change"].values[0], [0])
    target = int(np.abs(size).argmax())
    for weaker, sign in ((down, 1), (up, -1)):
        change = contrasts(weaker["log_fold_change"].values[0], [0])[target] / size[target]
        assert 0.1 < sign * change < 3
        assert float((weaker["upper"] - weaker["lower"]).max()) > 0.1 * np.abs(size).max()


def test_settled_says_no_more_than_a_long_wait(fit: pb.Fit) -> None:
    for_good, long = pb.do(fit, pb.Knockout("G5"), settled=True, **SHORT), pb.do(fit, pb.Knockout("G5") >> pb.Wait(2 * LONG), **SHORT)
    gamma = float(fit.model.transition.decay.detach().min())
    np.testing.assert_allclose(for_good["log_fold_change"], long["log_fold_change"], atol=2 * np.exp(-2 * gamma))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda fit: pb.do(fit, pb.Knockout("G9") >> pb.Wait(1)), r"Knockout\('G9'\) is of no gene in the state of this fit. Did you mean"),
        (lambda fit: pb.do(fit, pb.Knockout("G1")), r"waits for no time.* >> Wait\(t\) behind. Or leave them alone for good: settled=True"),
        (lambda fit: pb.do(fit, pb.Media("BMP4"), settled=True), "Media 'BMP4' was never seen"),
        (lambda fit: pb.do(fit, pb.Knockout("G1"), settled=True, level=1.5), "level must be between 0 and 1"),
        (lambda fit: pb.do(fit, []), "No condition to predict"),
    ],
)
def test_what_cannot_be_asked(fit: pb.Fit, ask: Callable[[pb.Fit], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(fit)


@pytest.mark.usefixtures("unchecked")
def test_a_flag_is_true_or_false_and_a_protocol_is_one(fit: pb.Fit) -> None:
    with pytest.raises(TypeError, match="settled is True or False; got 'no'"):
        pb.do(fit, pb.Knockout("G1") >> pb.Wait(1), settled="no")
    with pytest.raises(TypeError, match=r"A condition is a protocol such as .*; got None"):
        pb.do(fit, None)


def test_a_network_that_never_rests_and_a_fit_without_one(fit: pb.Fit, part: pb.Screen) -> None:
    weights = np.zeros((8, 8))
    weights[1, 0] = weights[2, 1] = weights[0, 2] = -12.0
    with pytest.raises(ValueError, match=r"cells move away from the only point of rest found\. Ask for a finite wait"):
        pb.do(with_truth(fit, weights), pb.Activation("G1"), settled=True, **SHORT)
    node = pb.fit(pb.node(part, 2), part, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"This fit has no network over genes\. Fit a causal_context for do"):
        pb.do(node, pb.Knockout("G2") >> pb.Wait(1))


def test_a_known_network_ranks_the_knock_out_first_that_leads_to_the_target(fit: pb.Fit, part: pb.Screen, all_lost: Simulation) -> None:
    """Of those seen, by cells in the target state; of any, by the changes at the fixed point of the equation."""
    for gene in ("G2", "G5"):
        cells = part[np.flatnonzero([part.conditions[c].perturbation == gene for c in part.condition])]
        ranked = pb.rank_perturbations(fit, cells, n_draws=4)
        assert ranked["perturbation"].values[0] == gene
        assert (float(ranked["best"][0]), float(ranked["better"][0])) == (1, 1)
        assert float(ranked["distance"][0]) < 1e-3 * min(float(ranked["distance"][1]), float(ranked["nothing"]))
    genes, weights = list(fit.model.vocabulary.genes), 4 * all_lost.truth["network"].values
    strong, share = with_truth(fit, weights), pb.predict(fit, pb.Wait(LONG), **SHORT)["mean"].values[0]
    for k, gene in enumerate(genes):
        delta, kept = np.zeros(8), np.arange(8) != k
        for _ in range(200):
            delta = 0.5 * delta + 0.5 * weights @ (kept * 2 / (1 + np.exp(-delta)) - 1)
        wanted = dict(zip(genes, delta - np.log(share @ np.exp(delta)), strict=True))
        ranked = pb.rank_perturbations(strong, wanted, [pb.Knockout(g) for g in genes], settled=True, n_draws=20)
        assert ranked["perturbation"].values[0] == gene
        assert np.isinf(ranked["time"]).all()


def test_ended_is_moved_where_nothing_settles(fit: pb.Fit, part: pb.Screen) -> None:
    from perturbprob.inference.draws import centre
    from perturbprob.model.cells import CellTable

    cells = CellTable(fit.model, part[:5]).cells(torch.arange(5))
    sites, z = centre(fit.model, fit.guide), torch.zeros(5, fit.model.rest_size)
    plain = ended(fit.model, sites, z, cells.protocol, settled=False)
    torch.testing.assert_close(plain.z, fit.model.moved(sites, z, cells.protocol).z)
