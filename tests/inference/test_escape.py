"""Which cells were hit: found where hit cells differ, and left open where they do not."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation


def with_escapers(simulation: Simulation, share: float, seed: int = 0) -> tuple[pb.Screen, np.ndarray]:
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
def simulation() -> Simulation:
    """Two knock-outs that do much."""
    return pb.simulate(n_cells=500, n_genes=25, n_perturbations=2, inactive=0.0, effect_scale=2.0, n_batches=2, depth=500, seed=2)


@pytest.fixture(scope="module")
def fitted(simulation: Simulation) -> tuple[pb.Fit, pb.Screen, np.ndarray]:
    """A fit of a screen in which cells with the first sgRNA of a gene seldom escape, and with the second often."""
    seldom, often = (with_escapers(simulation, share) for share in (0.15, 0.6))
    poor = np.array([name.endswith("_1") for name in seldom[0].sgrna])
    counts = np.where(poor[:, None], *(part[0].counts.toarray() for part in (often, seldom)))
    screen, escaped = replace(seldom[0], counts=csr_array(counts)), np.where(poor, often[1], seldom[1])
    return (
        pb.fit(pb.node(screen, 3, penetrance="sgrna"), screen, epochs=30, minibatch=16, learning_rate=1e-2, progress=False),
        screen,
        escaped,
    )


def strong(simulation: Simulation) -> str:
    """The knock-out that does most."""
    change = np.abs(simulation.truth["log_fold_change"]).max("gene")
    return str(change.perturbation.values[int(np.argmax(change.values))])


@pytest.mark.slow
def test_it_finds_how_many_were_hit_and_which(fitted: tuple[pb.Fit, pb.Screen, np.ndarray], simulation: Simulation) -> None:
    fit, screen, escaped = fitted
    hit = pb.hit_probability(fit, screen, n_draws=5, progress=False)
    assert hit.dims == ("cell", "perturbation")
    gene = strong(simulation)  # a knock-out that does little is shrunken, and who was hit by it hardly told
    cells = screen.cells_of(gene)
    own = hit.sel(perturbation=gene)[cells]
    assert float(own.mean()) == pytest.approx(1 - escaped[cells].mean(), abs=0.1)
    told = LogisticRegression(max_iter=1000)  # which learns from the truth
    values = np.log1p(screen.counts.toarray()[cells] / screen.size_factor[cells, None])
    best = roc_auc_score(~escaped[cells], cross_val_predict(told, values, ~escaped[cells], method="predict_proba")[:, 1])
    assert roc_auc_score(~escaped[cells], own) > best - 0.1
    assert np.isnan(hit[screen.cells_of("control")]).all()
    false = pb.false_hits(fit, screen, n_draws=5, progress=False).sel(perturbation=gene)
    assert false["edited"] > false["control"] + 0.3


@pytest.mark.slow
def test_it_stays_unsure_where_hit_cells_look_like_others(simulation: Simulation) -> None:
    """Every edited cell has the counts of a control: nothing tells π, and no cell is told from another."""
    screen, _ = with_escapers(simulation, 1.0)
    fit = pb.fit(pb.node(screen, 3, penetrance=True), screen, epochs=15, minibatch=16, learning_rate=1e-2, progress=False)
    share = pb.posterior(fit, 400).posterior["penetrance"].isel(chain=0)
    known = np.sqrt(0.25 / len(screen.cells_of(screen.perturbations[0])))  # the width, were hits seen
    assert (share.std("draw") > 2 * known).all()
    hit = pb.hit_probability(fit, screen, n_draws=5, progress=False)
    assert float(hit.std("cell").max()) < 0.15
    false = pb.false_hits(fit, screen, n_draws=5, progress=False)
    np.testing.assert_allclose(false["edited"], hit.mean("cell"), rtol=1e-6)  # means of single-precision numbers
    np.testing.assert_allclose(false["control"], false["edited"], atol=0.05)  # as many as of cells that nothing was done to


def test_a_prediction_mixes_hit_and_escaped_cells(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    fit, screen, _ = fitted
    done = next(p for p in screen.conditions if p.perturbations)
    mixed, hit, escaped = (pb.predict(fit, done, n_draws=1, edited=e, progress=False)["mean"].values for e in (None, True, False))
    own = pb.posterior(fit, 1).posterior["sgrna_penetrance"].squeeze()
    cells = np.array([(screen.sgrna[screen.cells_of(done)] == name).sum() for name in own.sgrna.values])
    share = float((own * cells).sum() / cells.sum())
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
    place = [fit.model.sgrnas.index(name) for name in cells.sgrna]
    share = sites["sgrna_penetrance"][place].numpy()
    with torch.no_grad():
        hit, escaped = (importance(fit.model, fit.guide, sites, t.cells(index), 1000) for t in (table, other))
        both = importance(fit.model, fit.guide, sites, (rows := table.unfolded(index)), 1000, seed=(1,))
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


def with_columns(simulation: Simulation, screen: pb.Screen):
    """The AnnData that the screen was read from, a few cells of it."""
    adata = simulation.adata[:50].copy()
    adata.obs["sgrna"] = screen.sgrna[:50]
    return adata


@pytest.mark.slow
def test_every_sgrna_has_its_own(fitted: tuple[pb.Fit, pb.Screen, np.ndarray], simulation: Simulation) -> None:
    fit, screen, escaped = fitted
    draws = pb.posterior(fit, 100).posterior["sgrna_penetrance"].isel(chain=0)
    good, poor = (draws.sel(sgrna=f"{strong(simulation)}_{k}") for k in (0, 1))
    for own in (good, poor):
        true = 1 - escaped[screen.sgrna == own.sgrna.item()].mean()
        assert float(own.mean()) == pytest.approx(true, abs=0.2)
    assert float((good > poor).mean()) > 0.95


def test_cells_without_an_sgrna_of_the_model_are_not_trained_on(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    fit, screen, _ = fitted
    edited = sum(len(screen.cells_of(p)) for p in screen.perturbations)
    told = rf"^{edited:,} edited cells of the screen have no sgRNA that the model knows.*\(read with sgrna=\)"
    for sgrna in (None, np.full(screen.n_cells, "new", object)):
        with pytest.raises(ValueError, match=told):
            pb.fit(fit.model, replace(screen, sgrna=sgrna), epochs=1, progress=False)


def test_an_unknown_sgrna_is_told_once_and_an_unknown_perturbation_by_its_name(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    fit, screen, _ = fitted
    few = replace(screen, sgrna=None)[::8]
    with pytest.warns(UserWarning, match="no sgRNA that the fit knows") as told:
        pb.false_hits(fit, few, n_draws=1, particles=2, progress=False)
    assert len(told) == 1
    model = pb.node(screen[np.r_[screen.cells_of("control"), screen.cells_of(screen.perturbations[0])]], 2, penetrance="sgrna")
    with pytest.raises(ValueError, match=screen.perturbations[1]):
        pb.fit(model, screen, epochs=1, progress=False)


def test_an_sgrna_of_another_gene_is_refused(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    fit, screen, _ = fitted
    first, second = screen.perturbations
    cells = screen[screen.cells_of(first)]
    wrong = replace(cells, sgrna=np.full(cells.n_cells, f"{second}_0", object))
    with pytest.raises(ValueError, match=rf"has the sgRNA '{second}_0', which the model knows of another perturbation"):
        pb.hit_probability(fit, wrong, progress=False)
    with pytest.warns(UserWarning, match=rf"^{cells.n_cells} edited cells have no sgRNA that the fit knows: for them its gene"):
        pb.hit_probability(fit, replace(cells, sgrna=np.full(cells.n_cells, "new", object)), n_draws=1, particles=2, progress=False)


def test_what_asks_of_conditions_takes_them_as_they_are_mixed(fitted: tuple[pb.Fit, pb.Screen, np.ndarray], simulation: Simulation) -> None:
    """Depths are those of the condition, hit and escaped; one cell is hit or not; states are mixed."""
    fit, screen, _ = fitted
    ask = partial(pb.predict, fit, next(p for p in screen.conditions if p.perturbation == strong(simulation)), progress=False)
    counts = [float(ask(scale="counts", edited=e, n_draws=20)["mean"].sum()) for e in (None, True, False)]
    np.testing.assert_allclose(counts, counts[0], rtol=0.1)
    mixed, hit = (ask(scale="log1p", interval="observed", n_cells=1, edited=e, n_draws=200) for e in (None, True))
    moved = int(np.argmax(np.abs((hit["mean"] - ask(scale="log1p", edited=False, n_draws=5)["mean"]).values)))
    width = [float((p["upper"] - p["lower"]).isel(gene=moved).item()) for p in (mixed, hit)]
    assert width[0] > width[1]
    with pytest.raises(ValueError, match=r"adapt cannot tell a batch effect from a smaller share of hits: give control cells"):
        pb.adapt(fit, replace(screen, batches=("new1", "new2")), "new1", progress=False)


def test_given_cells_begin_as_what_they_are(fitted: tuple[pb.Fit, pb.Screen, np.ndarray], simulation: Simulation) -> None:
    """Cells that escaped are control cells: doing nothing to them leaves them where control is."""
    fit, screen, escaped = fitted
    gene = strong(simulation)
    done = next(p for p in screen.conditions if p.perturbation == gene and p.time == max(screen.times))
    control, edited = screen[screen.cells_of(done.unperturbed())], screen.cells_of(done)
    missed, hit = (screen[edited[escaped[edited] == e]] for e in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a wait behind the last time
        away = [float(pb.rank_perturbations(fit, control, pb.Wait(0.01), start=cells, n_draws=5)["nothing"]) for cells in (missed, hit)]
    assert away[0] < 0.3 * away[1]


def test_a_fit_without_penetrance_is_told_so(simulation: Simulation) -> None:
    fit = pb.fit(pb.node(simulation.screen, 2), simulation.screen, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"takes every edited cell to be hit. Make its model with penetrance=True"):
        pb.hit_probability(fit, simulation.screen)
    with pytest.raises(ValueError, match="edited= tells hit cells from escaped ones, and this fit takes all to be hit"):
        pb.predict(fit, edited=True)
    with pytest.raises(ValueError, match=r"takes every edited cell to be hit. Make its model with penetrance=True"):
        pb.false_hits(fit, simulation.screen)


def test_false_hits_want_control_cells_of_the_same_time_and_batch(fitted: tuple[pb.Fit, pb.Screen, np.ndarray]) -> None:
    fit, screen, _ = fitted
    first, second = screen.perturbations
    edited = screen[np.concatenate([screen.cells_of(first), screen.cells_of(second)])]
    assert all(part.isnull().all() for part in pb.false_hits(fit, edited, n_draws=1, particles=2, progress=False).values())
    batch = screen.batches.index(screen.batches[0])
    lone = screen[
        np.concatenate([np.flatnonzero(screen.batch == batch), np.setdiff1d(screen.cells_of(first), np.flatnonzero(screen.batch == batch))])
    ]
    found = pb.false_hits(fit, lone, n_draws=1, particles=2, progress=False).sel(perturbation=first)
    hit = pb.hit_probability(fit, lone, n_draws=1, particles=2, progress=False).sel(perturbation=first)
    assert float(found["edited"]) == pytest.approx(float(hit[lone.batch == lone.batches.index(screen.batches[0])].mean()))


@pytest.mark.usefixtures("unchecked")
def test_cells_are_a_screen(simulation: Simulation) -> None:
    fit = pb.fit(pb.node(simulation.screen, 2), simulation.screen, epochs=1, progress=False)
    with pytest.raises(TypeError, match="Screen"):
        pb.hit_probability(fit, "cells")
    with pytest.raises(TypeError, match="Screen"):
        pb.rank_perturbations(fit, {simulation.screen.genes[0]: 1.0}, start=5)
