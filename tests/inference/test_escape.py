"""Which cells were hit: found where hit cells differ, and the prior where they do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

import perturbprob as pb


def with_escapers(simulation: "pb.experiment.simulate.Simulation", share: float, seed: int = 0) -> tuple[pb.Screen, np.ndarray]:
    """A screen in which a share of the edited cells has the counts of a control cell of its time and batch, and which these are."""
    chance, adata = np.random.default_rng(seed), simulation.adata.copy()
    obs = adata.obs.astype({"perturbation": str, "batch": str})
    escaped = (obs["perturbation"] != "control").to_numpy() & (chance.random(len(obs)) < share)
    counts, source = adata.X.copy(), np.arange(len(obs))
    for cell in np.flatnonzero(escaped):
        alike = (obs["perturbation"] == "control") & (obs["time"] == obs["time"].iloc[cell]) & (obs["batch"] == obs["batch"].iloc[cell])
        source[cell] = chance.choice(np.flatnonzero(alike))
    adata.X = counts[source]
    adata.obs["sgrna"] = obs["perturbation"] + "_" + (np.arange(len(obs)) % 2).astype(str)
    return pb.Screen.from_anndata(adata, media="media", time="time", batch="batch", sgrna="sgrna"), escaped


@pytest.fixture(scope="module")
def simulation() -> "pb.experiment.simulate.Simulation":
    """Two knock-outs that do much."""
    return pb.simulate(n_cells=500, n_genes=25, n_perturbations=2, inactive=0.0, effect_scale=2.0, n_batches=2, depth=500, seed=2)


@pytest.fixture(scope="module")
def fitted(simulation: "pb.experiment.simulate.Simulation") -> tuple[pb.Fit, pb.Screen, np.ndarray]:
    """A fit of a screen of which 40 % of the edited cells escaped."""
    screen, escaped = with_escapers(simulation, 0.4)
    return pb.fit(pb.node(screen, 3, penetrance=True), screen, epochs=40, minibatch=16, progress=False), screen, escaped


def strong(simulation: "pb.experiment.simulate.Simulation") -> str:
    """The knock-out that does most."""
    change = np.abs(simulation.truth["log_fold_change"]).max("gene")
    return str(change.perturbation.values[int(np.argmax(change.values))])


@pytest.mark.slow
def test_it_finds_how_many_were_hit_and_which(
    fitted: tuple[pb.Fit, pb.Screen, np.ndarray], simulation: "pb.experiment.simulate.Simulation"
) -> None:
    fit, screen, escaped = fitted
    share = pb.posterior(fit, 200).posterior["penetrance"].isel(chain=0)
    hit = pb.hit_probability(fit, screen, n_draws=5, progress=False)
    assert hit.dims == ("cell", "perturbation")
    for gene in share.perturbation.values:
        cells = screen.cells_of(gene)
        true = 1 - escaped[cells].mean()
        low, high = np.quantile(share.sel(perturbation=gene), [0.005, 0.995])
        assert low < true < high
        told = LogisticRegression(max_iter=1000)  # which learns from the truth
        values = np.log1p(screen.counts.toarray()[cells] / screen.size_factor[cells, None])
        best = roc_auc_score(~escaped[cells], cross_val_predict(told, values, ~escaped[cells], method="predict_proba")[:, 1])
        # a knock-out that does little is shrunken, and who was hit by it hardly told
        least = best - 0.1 if gene == strong(simulation) else 0.5
        assert roc_auc_score(~escaped[cells], hit.sel(perturbation=gene)[cells]) > least
        assert float(hit.sel(perturbation=gene)[cells].mean()) == pytest.approx(true, abs=0.1)
    assert np.isnan(hit[screen.cells_of("control")]).all()


@pytest.mark.slow
def test_it_stays_unsure_where_hit_cells_look_like_others(simulation: "pb.experiment.simulate.Simulation") -> None:
    """Every edited cell has the counts of a control: nothing tells π, and no cell is told from another."""
    screen, _ = with_escapers(simulation, 1.0)
    fit = pb.fit(pb.node(screen, 3, penetrance=True), screen, epochs=40, minibatch=16, progress=False)
    share = pb.posterior(fit, 400).posterior["penetrance"].isel(chain=0)
    known = np.sqrt(0.25 / screen.cells_of(screen.perturbations[0]).sum())  # the width, were hits seen
    assert (share.std("draw") > 2 * known).all()
    hit = pb.hit_probability(fit, screen, n_draws=5, progress=False)
    assert float(hit.std("cell").max()) < 0.15


def test_a_prediction_mixes_hit_and_escaped_cells(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    fit, screen, _ = fitted
    done = next(p for p in screen.conditions if p.perturbations)
    mixed, hit, escaped = (pb.predict(fit, done, n_draws=1, edited=e, progress=False)["mean"].values for e in (None, True, False))
    share = pb.posterior(fit, 1).posterior["penetrance"].sel(perturbation=done.perturbation).item()
    np.testing.assert_allclose(mixed, share * hit + (1 - share) * escaped, rtol=1e-4)
    control = pb.predict(fit, done.unperturbed(), n_draws=1, progress=False)["mean"].values
    np.testing.assert_allclose(escaped, control, rtol=1e-5)
    assert np.abs(np.log(hit / escaped)).max() > 0.3


def test_the_density_is_that_of_the_mixture(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    """A cell that escaped is an untouched one: told so, its density is the larger by its share alone."""
    fit, screen, _ = fitted
    gene = screen.perturbations[0]
    cells = screen[screen.cells_of(gene)][:60]
    from perturbprob.inference.density import importance
    from perturbprob.inference.draws import centre
    from perturbprob.model.cells import CellTable

    sites, index = centre(fit.model, fit.guide), torch.arange(cells.n_cells)
    table, other = CellTable(fit.model, cells), CellTable(fit.model, cells, [p.unperturbed() for p in cells.conditions])
    share = float(sites["penetrance"][fit.model.vocabulary.perturbations.index(cells.conditions[0].perturbations[0])])
    with torch.no_grad():
        hit, escaped = (importance(fit.model, fit.guide, sites, t.cells(index), 2000) for t in (table, other))
        both = importance(fit.model, fit.guide, sites, (rows := table.unfolded(index)), 2000, seed=(1,))
    from perturbprob.model.penetrance import fold

    expected = np.logaddexp(np.log(share) + hit.numpy(), np.log1p(-share) + escaped.numpy())
    error = fold(both, rows.hits.of).numpy() - expected  # of two importance averages, which for a few cells converge slowly
    assert np.quantile(np.abs(error), 0.9) < 0.1
    assert np.abs(error.mean()) < 0.03


def test_all_questions_about_cells_are_answered(fitted: tuple[pb.Fit, pb.Screen, np.ndarray], simulation, tmp_path: Path) -> None:
    fit, screen, _ = fitted
    part = screen[:60]
    assert np.isfinite(pb.log_density(fit, part, particles=5, n_draws=2, progress=False)).all()
    assert np.isfinite(pb.predictive_check(fit, screen, n_draws=3, progress=False).gene["replicated"]).all()
    assert np.isfinite(pb.counterfactual(fit, part, screen.conditions[-1], n_draws=2, progress=False)["mean"]).all()
    assert np.isfinite(pb.translate(fit, part, batch_to="average", n_draws=2, progress=False)["mean"]).all()
    states = fit.to_anndata(with_columns(simulation, screen))
    assert np.isfinite(states.obsm["X_perturbprob"]).all()
    fit.save(tmp_path)
    again = pb.load(tmp_path)
    np.testing.assert_array_equal(*(pb.hit_probability(f, part, n_draws=2, particles=3, progress=False).values for f in (fit, again)))


def with_columns(simulation: "pb.experiment.simulate.Simulation", screen: pb.Screen):
    """The AnnData that the screen was read from, a few cells of it."""
    adata = simulation.adata[:50].copy()
    adata.obs["sgrna"] = screen.sgrna[:50]
    return adata


@pytest.mark.slow
def test_every_sgrna_has_its_own(simulation: "pb.experiment.simulate.Simulation") -> None:
    """sgRNAs that end in 0 always hit, those that end in 1 in a third of the cells."""
    screen, escaped = with_escapers(simulation, 0.65)
    whole, _ = with_escapers(simulation, 0.0)
    poor = np.array([name.endswith("_1") for name in screen.sgrna])
    counts = whole.counts.toarray()
    counts[poor] = screen.counts.toarray()[poor]
    from dataclasses import replace

    from scipy.sparse import csr_array

    mixed = replace(screen, counts=csr_array(counts))
    fit = pb.fit(pb.node(mixed, 3, penetrance="sgrna"), mixed, epochs=40, minibatch=16, progress=False)
    share = pb.posterior(fit, 100).posterior["sgrna_penetrance"].mean(("chain", "draw"))
    for name, value in zip(share.sgrna.values, share.values, strict=True):
        if not name.startswith(strong(simulation)):  # of the other gene hit cells look too much like others
            continue
        true = 1.0 if name.endswith("_0") else 1 - escaped[poor & screen.cells_of(name.split("_")[0])].mean()
        assert value == pytest.approx(true, abs=0.2)


def test_a_fit_without_penetrance_is_told_so(simulation: "pb.experiment.simulate.Simulation") -> None:
    fit = pb.fit(pb.node(simulation.screen, 2), simulation.screen, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"takes every edited cell to be hit. Make its model with penetrance=True"):
        pb.hit_probability(fit, simulation.screen)
    with pytest.raises(ValueError, match="edited= tells hit cells from escaped ones, and this fit takes all to be hit"):
        pb.predict(fit, edited=True)
