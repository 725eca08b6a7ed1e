"""Pseudotime from control cells (C.1): laws, a known branching truth, slingshot's labels, and bad input."""

import importlib.util
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pytest
import scanpy
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, mannwhitneyu, spearmanr

import perturbprob as pb
from perturbprob.experiment.along import stratified_test
from perturbprob.experiment.diffusion import Diffusion, components
from perturbprob.experiment.lineages import find_ends, lineage_weights


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The simulator and counts of benchmarks/pseudotime.py: two lineages, of which BLOCK closes A."""
    spec = importlib.util.spec_from_file_location("pseudotime_study", Path(__file__).parents[2] / "benchmarks/pseudotime.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adata(study):
    return study.branching(0)


@pytest.fixture(scope="module")
def screen(adata):
    return pb.Screen.from_anndata(adata)


@pytest.fixture(scope="module")
def first(adata):
    """The control cells of least progress."""
    return ((adata.obs["perturbation"] == "control") & (adata.obs["progress"] < 0.05)).to_numpy()


@pytest.fixture(scope="module")
def ordered(screen, first):
    return pb.pseudotime.order(screen, first, n_bootstraps=5)


@pytest.fixture(scope="module")
def paul(data_path):
    return anndata.read_h5ad(data_path("paul2015_hsc_pseudotime.h5ad"))


# laws


def test_perturbed_cells_have_no_part_in_the_order_of_control(screen, ordered):
    control = screen.cells_of("control")
    root = ordered.cells.attrs["root"]
    alone = pb.pseudotime.order(screen[control], root, n_bootstraps=0).cells
    for name in ("pseudotime", "lineage_weight", "commitment"):
        np.testing.assert_allclose(ordered.cells[name].isel(cell=control), alone[name], atol=1e-8)


def test_perturbed_cells_have_the_labels_of_the_nearest_control_cell(screen, ordered):
    control, edited = screen.cells_of("control"), screen.cells_of("BLOCK")
    place, beside = components(screen, control, 50)
    values = np.log1p(screen.counts.toarray() / (screen.size_factor / np.median(screen.size_factor[control]))[:, None])
    np.testing.assert_allclose(((values - values[control].mean(axis=0)) ** 2).sum(axis=1), (place**2).sum(axis=1) + beside, rtol=1e-6)
    near = ((place[edited][:, None] - place[control]) ** 2).sum(axis=2).argmin(axis=1)
    assert (ordered.cells["nearest_control"].values[edited] == screen.cells[control[near]]).all()
    for name in ("pseudotime", "lineage_weight"):
        np.testing.assert_array_equal(ordered.cells[name].values[edited], ordered.cells[name].values[control[near]])


def test_pseudotime_is_the_share_of_control_before_and_weights_sum_to_one(screen, ordered):
    control = screen.cells_of("control")
    np.testing.assert_allclose(np.sort(ordered.cells["pseudotime"].values[control]), (np.arange(800) + 0.5) / 800)
    np.testing.assert_allclose(ordered.cells["lineage_weight"].sum("lineage"), 1)
    assert ordered.cells["pseudotime"].sel(cell=ordered.cells.attrs["root"]) == 0.5 / 800
    assert (ordered.cells["commitment"].sel(cell=ordered.cells.attrs["root"]) == 0).all()
    assert not set(ordered.cells["nearest_control"].values) - set(screen.cells[control])
    assert (ordered.cells["nearest_control"].values != screen.cells).all()


def test_one_seed_is_one_answer_and_nothing_is_changed(adata, screen, first, ordered):
    before = adata.copy(), screen.counts.copy(), screen.conditions, np.random.get_state()[1].copy()  # noqa: NPY002
    again = pb.pseudotime.order(screen, first, n_bootstraps=5)
    again.screen()
    assert again.cells.identical(ordered.cells)
    assert (before[1] != screen.counts).nnz == 0
    assert before[2] is screen.conditions
    assert (before[0].X == adata.X).all()
    assert before[0].obs.equals(adata.obs)
    assert (np.random.get_state()[1] == before[3]).all()  # noqa: NPY002


def test_the_wait_of_each_cell_is_its_pseudotime(screen, ordered):
    timed = ordered.screen(n_times=4)
    assert (timed.times, timed.time_unit, timed.n_cells) == ((0.125, 0.375, 0.625, 0.875), "pseudotime", screen.n_cells)
    for cell in (0, 900, 1200):
        before, now = screen.conditions[screen.condition[cell]], timed.conditions[timed.condition[cell]]
        assert now.perturbations == before.perturbations
        assert abs(now.time - ordered.cells["pseudotime"].values[cell]) <= 0.125
    assert timed.conditions[0] == pb.Protocol([pb.Wait(0.125)])
    assert timed.summary().loc["control"].to_numpy().tolist() == [[200]] * 4
    assert (timed.counts != screen.counts).nnz == 0


def test_other_waits_and_media_of_a_protocol(study, first):
    adata = study.branching(0)
    adata.obs["media"], adata.obs["day"] = np.where(np.arange(adata.n_obs) % 2, "rich", "poor"), np.arange(adata.n_obs) % 3 + 1
    screen = pb.Screen.from_anndata(adata, media="media", baseline="poor", time="day", time_unit="day")
    timed = pb.pseudotime.order(screen, first, n_bootstraps=0).screen(n_times=2)
    assert timed.times == (0.25, 0.75)
    assert timed.media == ("poor", "rich")
    assert pb.Knockout("BLOCK") >> pb.Media("rich") >> pb.Wait(0.25) in timed.conditions
    assert len(timed.conditions) == 4 * 2 * 2


def test_one_lineage_leaves_out_cells_committed_to_the_other(ordered, adata):
    part = ordered.screen(lineage="lineage 1")
    elsewhere = ordered.cells["commitment"].sel(lineage="lineage 2", cell=part.cells)
    assert float(elsewhere.max()) <= 0.5
    side = adata.obs["leads_to_a"][list(ordered.ends["lineage 1"])].iloc[0]
    late = adata.obs.loc[list(part.cells)].query("progress > 0.7")
    assert (late["leads_to_a"] == side).mean() > 0.95


@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_a_model_can_be_fitted_to_pseudotime(ordered):
    timed = ordered.screen(n_times=3)
    fit = pb.fit(pb.node(timed, n_latent=2, n_hidden=8), timed, epochs=1, progress=False)
    assert pb.predict(fit, pb.Knockout("BLOCK") >> pb.Wait(0.5), n_draws=2).sizes["gene"] == timed.n_genes


# references


def test_pseudotime_is_that_of_scanpy(adata, ordered):
    control = adata[adata.obs["perturbation"] == "control"].copy()
    scanpy.pp.normalize_total(control)
    scanpy.pp.log1p(control)
    scanpy.pp.pca(control, n_comps=30)
    scanpy.pp.neighbors(control, method="gauss")
    control.uns["iroot"] = control.obs_names.get_loc(ordered.cells.attrs["root"])
    scanpy.tl.diffmap(control)
    scanpy.tl.dpt(control)
    found = ordered.cells["diffusion_pseudotime"].sel(cell=control.obs_names.to_numpy())
    assert spearmanr(found, control.obs["dpt_pseudotime"])[0] > 0.999


def test_lineage_weights_are_the_probabilities_of_arrival():
    rng = np.random.default_rng(0)
    weight = np.triu(rng.random((40, 40)) * (rng.random((40, 40)) < 0.3), 1) + np.diag(np.full(39, 0.5), 1)
    weight, time, ends = weight + weight.T, rng.random(40), [np.array([3, 4]), np.array([20]), np.array([39])]
    walk = weight * np.where(time >= time[:, None], 1.0, 0.1)
    walk /= walk.sum(axis=1, keepdims=True)
    absorbed = np.concatenate(ends)
    rest = np.setdiff1d(np.arange(40), absorbed)
    inward = np.stack([walk[np.ix_(rest, end)].sum(axis=1) for end in ends], axis=1)
    exact = np.linalg.solve(np.eye(len(rest)) - walk[np.ix_(rest, rest)], inward)
    found = lineage_weights(csr_array(weight), time, ends)
    np.testing.assert_allclose(found[rest], exact, atol=1e-7)
    np.testing.assert_array_equal(found[[3, 20, 39]], np.eye(3))


@pytest.mark.parametrize(("arms", "stem"), [(1, 0), (2, 0), (3, 0), (2, 60)])
def test_every_end_of_a_star_is_found(arms, stem):
    """Arms of 50 cells leave a centre, or a stem; the second arm starts where half of the first is past."""
    edges, time = [(k, k + 1) for k in range(stem)], [k / 50 for k in range(stem + 1)]
    for arm in range(arms):
        before = stem
        for k in range(50 + 10 * arm):
            edges.append((before, len(time)))
            before = len(time)
            time.append((stem + k + 1) / 50)
    row, column = np.array(edges).T
    one_way = csr_array((np.ones(len(edges)), (row, column)), shape=(len(time), len(time)))
    ends = find_ends(one_way + one_way.T, np.array(time))
    assert len(ends) == arms
    assert {int(end.max()) for end in ends} == set(np.cumsum([stem, *(50 + 10 * arm for arm in range(arms))])[1:].tolist())


def test_one_stratum_is_mann_and_whitney_and_fisher_s_moments(adata, ordered):
    table = pb.pseudotime.along(ordered)
    labels = ordered.cells[["pseudotime", "commitment"]].sel(cell=ordered.cells["nearest_control"].values)
    value, name = labels["pseudotime"].values, adata.obs["perturbation"].to_numpy()
    for p in ("BLOCK", "NONE", "SLOW"):
        exact = mannwhitneyu(value[name == p], value[name == "control"], method="asymptotic", use_continuity=False)
        assert float(table["pseudotime_p_value"].sel(perturbation=p)) == pytest.approx(exact.pvalue, rel=1e-6)
    p_values = table["pseudotime_p_value"].values[1:]
    np.testing.assert_allclose(table["pseudotime_q_value"].values[1:], false_discovery_control(p_values))
    rng, score = np.random.default_rng(0), labels["commitment"].values[:, :1]
    chosen = (name == "NONE") | (name == "control")
    score, edited = score[chosen], name[chosen] == "NONE"
    drawn = [score[rng.permutation(edited)].mean() - score.mean() for _ in range(4000)]
    observed = score[edited].mean() - score.mean()
    p = stratified_test(score, edited, np.zeros(len(edited), int))[1][0]
    assert p == pytest.approx(np.mean(np.abs(drawn) >= abs(observed)), abs=0.03)


def test_what_batches_do_is_no_change():
    rng = np.random.default_rng(1)
    batch = rng.random(600) < 0.5
    edited = rng.random(600) < np.where(batch, 0.8, 0.1)
    score = rng.normal(size=(600, 1)) + 3 * batch[:, None]
    assert stratified_test(score, edited, np.zeros(600, int))[1][0] < 1e-20
    change, p = stratified_test(score, edited, batch.astype(int))
    assert p[0] > 0.05
    assert abs(change[0]) < 0.3


def test_a_perturbation_in_batches_of_its_own_is_not_compared(study, first):
    adata = study.branching(0)
    adata.obs["batch"] = np.where(adata.obs["perturbation"] == "BLOCK", "lane2", "lane1")
    with pytest.warns(pb.ScreenWarning):
        screen = pb.Screen.from_anndata(adata, batch="batch")
    table = pb.pseudotime.along(pb.pseudotime.order(screen, first, n_bootstraps=0))
    assert np.isnan(table["share_p_value"].sel(perturbation="BLOCK")).all()
    assert not table["fewer"].sel(perturbation="BLOCK").any()
    assert np.isfinite(table["share_q_value"].sel(perturbation="SLOW")).all()


# recovery


@pytest.mark.parametrize("seed", range(3))
def test_the_blocked_lineage_and_what_blocks_it_are_found(study, seed):
    found = study.blocked(study.branching(seed))
    assert found["two_pure_ends"]
    assert found["rank_correlation"] > 0.9
    assert {name for name in ("BLOCK A", "BLOCK B", "NONE A", "NONE B") if found[name]} == {"BLOCK A"}


def test_ends_can_be_named_by_single_cells_and_the_root_by_a_marker(adata, screen):
    control = adata.obs[adata.obs["perturbation"] == "control"]
    a, b = (control[control["leads_to_a"] == side]["progress"].idxmax() for side in (True, False))
    stem = adata.X[control["progress"].to_numpy().argsort()[:80]].mean(axis=0) / adata.X[:800].mean(axis=0)
    found = pb.pseudotime.order(screen, str(adata.var_names[stem.argmax()]), ends={"A": a, "B": b}, n_bootstraps=2)
    assert list(found.ends) == ["A", "B"]
    assert adata.obs["progress"][found.cells.attrs["root"]] < 0.3
    late = control.index[control["progress"] > 0.7]
    leads = found.cells["lineage_weight"].sel(lineage="A", cell=list(late)).values > 0.5
    assert (leads == control["leads_to_a"][late]).mean() > 0.97


def test_standard_deviations_are_those_between_independent_control_cells(study):
    z = study.spreads(0)
    assert 0.75 < (np.abs(z) < 1.645).mean() < 0.98
    assert 0.7 < z.std() < 1.4


def test_cells_unlike_control_are_said_to_be_far(study, first):
    adata = study.branching(0)
    adata.X[adata.obs["perturbation"] == "NONE", 30:45] = 40
    found = pb.pseudotime.order(pb.Screen.from_anndata(adata), first, n_bootstraps=0)
    table = pb.pseudotime.along(found)["far"]
    assert table.sel(perturbation="NONE") > 0.5
    assert table.sel(perturbation="SLOW") < 0.1
    assert "farther from control" in found.report()


def test_slingshot_s_pseudotime_in_both_lineages_of_bone_marrow(paul):
    found = pb.pseudotime.order(pb.Screen.from_anndata(paul), paul.obs["cell_type"] == "Multipotent progenitors", n_bootstraps=0)
    assert len(found.ends) == 2
    for k in (1, 2):
        on = (paul.obs[f"weight_lineage{k}"] > 0).to_numpy()
        assert spearmanr(found.cells["pseudotime"].values[on], paul.obs[f"pseudotime_lineage{k}"][on])[0] >= 0.85
    erythroid = found.cells["lineage_weight"].sel(lineage="lineage 1").values > 0.5  # the latest end
    apart = (paul.obs["lineage"] != "shared").to_numpy()
    assert (erythroid == (paul.obs["lineage"] == "lineage2"))[apart].mean() > 0.95


def test_a_lineage_taken_from_bone_marrow_is_missed_and_nothing_else(paul):
    """Half of the cells are called perturbed at random; of one such perturbation the erythroid cells are taken away."""
    rng = np.random.default_rng(0)
    name = rng.permutation(np.repeat(["control", "BLOCK", "NONE"], [1660, 500, 500]))
    kept = (name != "BLOCK") | (paul.obs["lineage"] != "lineage2").to_numpy()
    obs = paul.obs.assign(perturbation=name, perturbation_type="knockout")
    part = anndata.AnnData(paul.X, obs=obs, var=paul.var)[kept].copy()
    with pytest.warns(pb.ScreenWarning, match="2 perturbed genes"):
        screen = pb.Screen.from_anndata(part)
    table = pb.pseudotime.along(
        pb.pseudotime.order(screen, (part.obs["cell_type"] == "Multipotent progenitors").to_numpy(), n_bootstraps=0)
    )
    fewer = table["fewer"].to_series()
    assert fewer[fewer].index.tolist() == [("BLOCK", "lineage 1")]
    assert table["pseudotime_p_value"].sel(perturbation="NONE") > 0.01


@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_nothing_is_found_where_nothing_was_done(study, paul):
    first = (paul.obs["cell_type"] == "Multipotent progenitors").to_numpy()
    rates = study.rates([study.nothing_done(paul, first, seed) for seed in range(8)])
    assert max(rates.values()) < 0.26  # with labels of their own for control cells: 0.8


@pytest.mark.parametrize("n_cells", [200, 800])
@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_there_are_as_many_ends_as_lineages(study, n_cells):
    assert study.ends(7, n_cells) == {"two": 2, "one": 1, "cloud": 1}


def test_more_cells_than_scanpy_holds_exact_by_default():
    ring = np.linspace(0, 2 * np.pi, 8300)[:, None]
    assert not Diffusion.of(np.hstack([np.cos(ring), np.sin(ring)]), 5).parts.any()


# misuse


def test_a_screen_without_control(screen):
    with pytest.raises(ValueError, match="no control cells, of which the trajectory is made"):
        pb.pseudotime.order(screen[screen.cells_of("BLOCK")], "SLOW")


def test_too_few_control_cells_and_one_cell(screen):
    with pytest.raises(ValueError, match="Only 1 control cells: at least 60 are needed"):
        pb.pseudotime.order(screen[[0]], "cell0")
    few = screen[[*range(40), *screen.cells_of("BLOCK")]]
    with pytest.raises(ValueError, match=r"Only 40 control cells.*Lower n_neighbours"):
        pb.pseudotime.order(few, "cell0")
    assert pb.pseudotime.order(few, "cell0", n_neighbours=10, n_bootstraps=2).cells.sizes["cell"] == 190


def test_a_disconnected_graph(study):
    adata = study.branching(0)
    apart = np.arange(800) < 300
    adata.X[:800, 3:] *= np.where(apart[:, None], np.arange(57) < 28, np.arange(57) >= 28)
    with pytest.raises(ValueError, match=r"falls into 2 parts, of 500, 300 cells.*Raise n_neighbours \(now 15\).*screen\[cells\]"):
        pb.pseudotime.order(pb.Screen.from_anndata(adata), "cell0")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("SLOWW", "root 'SLOWW' is neither a cell nor a gene of this screen. Did you mean 'SLOW'"),
        (["cell0", "nobody"], "1 name .nobody. of no cell"),
        ("cell900", "No control cell is among those named as root"),
        (np.zeros(1250, bool), "No control cell is among those named as root"),
        (np.ones(3, bool), "mask has shape"),
    ],
)
def test_an_unknown_root(screen, root, message):
    with pytest.raises(ValueError, match=message):
        pb.pseudotime.order(screen, root)


def test_ends_that_cannot_be(screen, first, ordered):
    with pytest.raises(ValueError, match="end 'A' 'nothing' is neither"):
        pb.pseudotime.order(screen, first, ends={"A": "nothing"})
    with pytest.raises(ValueError, match="The ends 'A' and 'B' share 41 control cells"):
        pb.pseudotime.order(screen, first, ends={name: list(ordered.ends["lineage 1"]) for name in "AB"})
    with pytest.raises(ValueError, match="The root is among the cells of the end 'A'"):
        pb.pseudotime.order(screen, first, ends={"A": first})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ends": ["a"]}, r"ends= gives the end of each lineage by name.*; got list"),
        ({"root": None}, "The root is None: name a control cell"),
        ({"ends": {"e": None}}, "The end 'e' is None: name a control cell"),
        ({"ends": {"e": 0.5}}, "The end 'e' is not understood. Choose cells by"),
    ],
)
def test_roots_and_ends_of_a_wrong_kind_are_named(screen, first, asked, message):
    with pytest.raises(TypeError, match=message):
        pb.pseudotime.order(screen, **({"root": first} | asked))


@pytest.mark.usefixtures("unchecked")
def test_only_an_order_is_compared_along(screen, ordered):
    for wrong in (screen, None):
        with pytest.raises(TypeError, match=rf"An order is needed here; got {type(wrong).__name__}\. Give what pseudotime.order"):
            pb.pseudotime.along(wrong)
    with pytest.raises(ValueError, match=r"level is a share of false discoveries.*got 'a'"):
        pb.pseudotime.along(ordered, level="a")


def test_values_and_settings_that_cannot_be(screen, first, ordered, unchecked):
    with pytest.raises(ValueError, match="continuous values"):
        pb.pseudotime.order(screen.pseudobulk(), "SLOW")
    with pytest.raises(TypeError, match="A Screen is needed"):
        pb.pseudotime.order(screen.counts, "SLOW")
    for settings in ({"n_neighbours": 1}, {"n_bootstraps": -1}, {"n_components": 2.5}, {"seed": True}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a whole number"):
            pb.pseudotime.order(screen, first, **settings)
    with pytest.raises(ValueError, match="n_times must be a whole number"):
        ordered.screen(n_times=0)
    with pytest.raises(ValueError, match=r"no lineage 'lineage 3'. Did you mean"):
        ordered.screen(lineage="lineage 3")
    with pytest.raises(ValueError, match="level is a share"):
        pb.pseudotime.along(ordered, level=5)


def test_control_alone_cannot_be_compared(screen):
    alone = pb.pseudotime.order(screen[screen.cells_of("control")], "SLOW", n_bootstraps=0)
    assert "perturbed" not in alone.report()
    with pytest.raises(ValueError, match="control cells only"):
        pb.pseudotime.along(alone)
