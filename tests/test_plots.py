"""The figures: what they draw is what they were given, and every name can be read from them."""

import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib import pyplot
from matplotlib.figure import Figure

import perturbprob as pb
from perturbprob import plots
from perturbprob.inference.predict import labelled
from perturbprob.plots import of_fit, of_screen
from perturbprob.plots.of_network import _graph
from perturbprob.studies.proof_of_principle import ProofOfPrinciple

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def screen():
    """Two knock-outs and control in two media at two times, in two batches; one gene has a name that looks like mathematics."""
    adata = pb.simulate(n_cells=180, n_genes=8, n_perturbations=2, media=("rest", "BMP4"), n_batches=2, seed=1).adata
    adata.var_names = [*adata.var_names[:-1], r"$\frac"]
    return pb.Screen.from_anndata(adata, media="media", baseline="rest", time="time", batch="batch", time_unit="day")


@pytest.fixture(scope="module")
def fit(screen):
    return pb.fit(pb.node(screen, n_latent=2, n_hidden=8), screen, epochs=3, warmup=2, minibatch=64, progress=False)


@pytest.fixture(scope="module")
def check(fit, screen):
    return pb.predictive_check(fit, screen, n_draws=4, progress=False)


@pytest.fixture
def hits(fit):
    """What effects() returns, with numbers of our own."""
    rng = np.random.default_rng(0)
    protocols = [p for p in map(pb.Protocol.parse, fit.trained_on["conditions"]) if p.perturbations]
    mean = torch.as_tensor(rng.normal(size=(len(protocols), 8)))
    values = {"log_fold_change": mean, "lower": mean - 0.8, "upper": mean + 0.8}
    result = labelled(fit, protocols, values, {"against": "control", "level": 0.9, "n_draws": 4})
    names = list(dict.fromkeys(result.perturbation.values))
    tested = {"log_evidence": [-3.0, 7.0], "hit": [False, True]}
    return result.merge(xr.Dataset({k: ("tested_perturbation", v) for k, v in tested.items()}, {"tested_perturbation": names}))


@pytest.fixture(autouse=True)
def _nothing_kept():
    """No figure stays with pyplot, and no setting of matplotlib is changed."""
    before = dict(matplotlib.rcParams)
    yield
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def texts(labels):
    return [label.get_text() for label in labels]


def names_of(axes, axis="y"):
    return texts(getattr(axes, f"get_{axis}ticklabels")())


def points(axes):
    """All points drawn without a line, sorted."""
    found = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "None"]
    return np.array(sorted(np.concatenate(found).tolist()))


def test_losses_are_drawn_over_the_epochs_and_the_kept_one_is_marked(fit):
    fit = replace(fit, settings=fit.settings | {"warmup": 2})
    figure = plots.losses(fit)
    (axes,) = figure.axes
    train, held, best = axes.lines
    np.testing.assert_array_equal(train.get_xydata(), np.stack([[1, 2, 3], fit.losses["train"]], 1))
    np.testing.assert_array_equal(held.get_ydata(), fit.losses["validation"])
    kept = fit.settings["best_epoch"]
    assert best.get_xydata().tolist() == [[kept + 1, fit.losses["validation"][kept]]]
    assert texts(axes.get_legend().get_texts()) == ["warm-up", "training cells", "held-out cells", f"kept: epoch {kept + 1}"]
    assert (axes.patches[0].get_x(), axes.patches[0].get_width()) == (0.5, 2.0)
    assert "nat" in axes.get_ylabel()
    assert isinstance(figure, Figure)


def test_losses_without_held_out_cells_or_warm_up(fit):
    settings = fit.settings | {"warmup": 0, "best_epoch": 1}
    (axes,) = plots.losses(replace(fit, losses={"train": [3.0, 2.0], "validation": []}, settings=settings)).axes
    assert texts(axes.get_legend().get_texts()) == ["training cells", "kept: epoch 2"]
    assert axes.lines[-1].get_xydata().tolist() == [[2.0, 2.0]]


def test_losses_of_a_training_that_broke_in_its_first_epoch_are_an_empty_figure(fit):
    (axes,) = plots.losses(replace(fit, losses={"train": [], "validation": []}, settings=fit.settings | {"best_epoch": -1})).axes
    assert len(axes.lines) == 0


def test_figures_can_be_drawn_into_axes_of_the_user(fit, screen):
    figure = Figure(figsize=(8, 4))
    left, right = figure.subfigures(1, 2)[0].subplots(1, 2)
    assert plots.losses(fit, ax=left) is figure
    assert plots.layout(screen, kind="table", ax=right) is figure
    assert (left.get_xlabel(), right.get_ylabel()) == ("epoch", "perturbation")


def test_predictive_check_draws_every_gene(check):
    figure = plots.predictive_check(check)
    assert len(figure.axes) == 6
    for axes, statistic in zip(figure.axes, of_fit._STATISTIC, strict=False):
        part = check.gene.sel(statistic=statistic)
        expected = np.stack([part.observed.values, part.replicated.values], 1)
        np.testing.assert_allclose(points(axes), sorted(expected.tolist()))
        assert axes.get_xlabel().startswith("observed")
    assert [axes.get_xscale() for axes in figure.axes[:3]] == ["log", "log", "linear"]


def test_predictive_check_parts_genes_inside_and_outside_the_replicates(check):
    gene = check.gene.copy(deep=True)
    gene["tail_probability"][0] = [0.0, 0.02, 0.03, 0.5, 0.5, 0.5, 0.97, 1.0]
    axes = plots.predictive_check(replace(check, gene=gene)).axes[0]
    assert texts(axes.get_legend().get_texts()) == ["inside: 5 genes", "outside: 3 genes"]
    named = axes.texts[0].get_text().splitlines()
    assert named[0] == "furthest off:"
    assert set(named[1:]) == {"G1", "G2", r"\$\frac"}


def test_predictive_check_draws_depth_relative_to_the_data(check):
    conditions, batches = plots.predictive_check(check).axes[3:5]
    for axes, table, place in ((conditions, check.condition, None), (batches, check.batch, [0, 1])):
        mean = table.sel(depth_statistic="mean")
        x = mean.observed_depth.values if place is None else place
        drawn = axes.containers[0].lines[0].get_xydata()
        np.testing.assert_allclose(drawn, np.stack([x, (mean.replicated_depth / mean.observed_depth).values], 1))
    assert names_of(batches, "x") == ["batch1", "batch2"]
    assert "counts per cell" in conditions.get_xlabel()


def test_predictive_check_leaves_out_the_spread_of_conditions_with_one_cell(check):
    condition = check.condition.copy(deep=True)
    condition["observed_depth"][1, 0] = 0.0
    drawn = plots.predictive_check(replace(check, condition=condition)).axes[3].containers[1].lines[0].get_ydata()
    assert np.isnan(drawn).tolist() == [True] + [False] * (len(drawn) - 1)


def test_predictive_check_tail_probabilities_are_shares_of_all(check):
    tails = plots.predictive_check(check).axes[5]
    assert len(tails.patches) == 3
    for steps, statistic in zip(tails.patches, of_fit._STATISTIC, strict=True):
        values, edges, _ = steps.get_data()
        expected, _ = np.histogram(check.condition.tail_probability.sel(statistic=statistic), bins=10, range=(0, 1))
        np.testing.assert_allclose(values, 100 * expected / expected.sum())
        assert (edges[0], edges[-1]) == (0, 1)


def test_effects_draws_perturbations_by_genes_the_most_probable_on_top(hits):
    heatmap, intervals = plots.effects(hits, hits.gene.values.tolist()).axes[:2]
    at = hits.isel(condition=(hits.time.values == 2.0) & (hits.media.values == "rest"))
    first, second = hits.tested_perturbation.values
    np.testing.assert_array_equal(heatmap.images[0].get_array(), at.log_fold_change.values[::-1])
    assert names_of(heatmap) == [f"● {second}", first]
    assert [label.get_fontweight() for label in heatmap.get_yticklabels()] == ["bold", "normal"]
    assert names_of(heatmap, "x") == [*hits.gene.values[:-1], r"\$\frac"]
    assert heatmap.get_title() == "Change of each gene at day 2, rest"
    low, high = heatmap.images[0].get_clim()
    assert low == -high
    sure = np.argwhere((at.lower.values[::-1] > 0) | (at.upper.values[::-1] < 0))
    np.testing.assert_array_equal(heatmap.collections[0].get_offsets()[:, ::-1], sure)
    assert "90 %" in intervals.get_xlabel()


def test_effects_intervals_are_those_of_the_data_the_surest_first(hits):
    intervals = plots.effects(hits, time=1, media="BMP4").axes[1]
    at = hits.isel(condition=(hits.time.values == 1.0) & (hits.media.values == "BMP4")).swap_dims(condition="perturbation")
    away = []
    drawn = zip(names_of(intervals), intervals.collections[0].get_segments(), intervals.lines[0].get_xdata(), strict=True)
    for name, segment, middle in drawn:
        perturbation, gene = name.replace("\\$", "$").split(": ")
        one = at.sel(perturbation=perturbation, gene=gene)
        assert (segment[0, 0], segment[1, 0], middle) == (one.lower, one.upper, one.log_fold_change)
        away.append(max(float(one.lower), -float(one.upper)))
    assert len(away) == 16
    assert away == sorted(away, reverse=True)
    assert intervals.get_ylim() == (15.5, -0.5)


def test_effects_of_one_perturbation_are_named_by_gene(hits):
    name = str(hits.perturbation.values[0])
    intervals = plots.effects(hits, hits.gene.values[:3].tolist(), perturbation=name).axes[1]
    assert sorted(names_of(intervals)) == sorted(hits.gene.values[:3])
    assert intervals.get_title() == f"Surest changes after {name}"


def test_effects_chooses_the_genes_that_change_most_surely(hits):
    shown = names_of(plots.effects(hits, n_genes=3).axes[0], "x")
    at = hits.isel(condition=(hits.time.values == 2.0) & (hits.media.values == "rest"))
    surest = np.argsort(-np.maximum(at.lower, -at.upper).max("condition").values)[:3]
    assert {name.replace("\\$", "$") for name in shown} == set(hits.gene.values[surest])
    assert names_of(plots.effects(hits, "G3").axes[0], "x") == ["G3"]


def test_effects_against_a_perturbation_has_no_hits(hits):
    other = hits.drop_vars(["hit", "log_evidence"]).assign_attrs(against="G1$")
    heatmap, _, colours = plots.effects(other).axes
    assert not any("●" in name for name in [*names_of(heatmap), heatmap.get_xlabel()])
    assert colours.get_ylabel() == r"log fold change against G1\$ [natural log]"


def test_effects_names_rows_by_condition_where_a_perturbation_occurs_twice(hits):
    twice = hits.assign_coords(perturbation=("condition", np.repeat(hits.perturbation.values[:1], hits.sizes["condition"])))
    rows = names_of(plots.effects(twice).axes[0])
    at = (hits.time.values == 2.0) & (hits.media.values == "rest")
    assert sorted(row.removeprefix("● ") for row in rows) == sorted(hits.condition.values[at])


def test_effects_of_a_fit_are_drawn(fit):
    figure = plots.effects(pb.effects(fit, n_draws=3))
    figure.canvas.draw()
    assert figure.axes[0].images[0].get_array().shape == (2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"genes": ["G1", "G33"]}, "no gene 'G33' here. Did you mean 'G3'"),
        ({"genes": []}, "No gene to draw"),
        ({"perturbation": "nobody"}, "no perturbation 'nobody' here. Known: G"),
        ({"media": "BMP"}, "no media 'BMP' here. Did you mean 'BMP4'"),
        ({"time": 7.0}, "No effect was fitted at day 7 in media 'rest'. Known times: 1, 2"),
        ({"n_genes": 0}, "n_genes must be at least 1; got 0"),
    ],
)
def test_effects_refuses_what_is_not_there(hits, arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.effects(hits, **arguments)


def test_effects_refuses_a_screen_without_perturbations(hits):
    with pytest.raises(ValueError, match="no perturbed condition"):
        plots.effects(hits.isel(condition=[]))


def test_layout_counts_cells_with_control_on_top(screen):
    (axes, _) = plots.layout(screen, kind="table").axes
    counts = axes.images[0].get_array()
    rows, columns = names_of(axes), names_of(axes, "x")
    assert rows == ["control", *screen.perturbations]
    assert columns[0] == "rest · day 1 · batch1"
    assert columns[-1] == "BMP4 · day 2 · batch2"
    assert counts.sum() == screen.n_cells
    for row, name in enumerate(rows):
        for column, label in enumerate(columns):
            media, time, batch = label.split(" · ")
            summary = screen.summary().loc[(name, media, float(time.removeprefix("day "))), batch]
            assert counts[row, column] == summary
    assert sorted(int(text.get_text()) for text in axes.texts) == sorted(counts.ravel().tolist())
    assert [line.get_ydata()[0] for line in axes.lines] == [0.5]


def nodes_of(axes):
    """The heights of the nodes on each side."""
    points = np.concatenate([collection.get_offsets() for collection in axes.collections])
    return [np.sort(points[points[:, 0] == side, 1]) for side in (0, 1)]


def test_layout_joins_each_condition_to_its_batches(screen):
    part = screen[(screen.batch > 0) | (np.arange(screen.n_cells) % 2 == 0)]
    part = part[~np.isin(part.condition, part.layout._is_control.nonzero()[0]) | (part.batch == 0)]  # one batch holds control
    (axes,) = plots.layout(part).axes
    conditions, batches = nodes_of(axes)
    names = [text.get_text() for text in axes.texts]
    named = dict(zip([name.split(": ")[0] for name in names], [text.get_position()[1] for text in axes.texts], strict=True))
    cells = part.summary().groupby(level=["perturbation", "media"]).sum()
    assert (len(conditions), len(batches)) == cells.shape
    ends = {tuple(line.get_ydata()): line for line in axes.lines}
    assert len(ends) == len(axes.lines) == len(part.layout.valid_set)
    for perturbation, media, batch in part.layout.valid_set:
        line = ends[named[f"{perturbation} · {media}"], named[batch]]
        assert (line.get_color() == "#0072B2") == ((perturbation, media) == ("control", "rest"))
    widths = {n: ends[named[f"{p} · {m}"], named[b]].get_linewidth() for (p, m), row in cells.iterrows() for b, n in row.items() if n}
    assert [widths[n] for n in sorted(widths)] == sorted(widths.values())
    assert "batch with control in baseline media: 1" in texts(axes.get_legend().get_texts())
    assert f"{part.batches[0]}: {(part.batch == 0).sum()} cells" in names


def test_layout_is_a_graph_while_it_can_be_read(screen, monkeypatch):
    assert not plots.layout(screen).axes[0].images
    monkeypatch.setattr(of_screen, "_GRAPH", (2, 2))
    assert plots.layout(screen).axes[0].images
    assert not plots.layout(screen, kind="graph").axes[0].images
    with pytest.raises(ValueError, match=r"kind='grap' is neither 'graph' nor 'table'\. Did you mean 'graph'"):
        plots.layout(screen, kind="grap")


def test_layout_leaves_empty_fields_blank_and_drops_empty_columns(screen):
    part = screen[[p.perturbation == "control" or p.time == 1.0 for p in np.array(screen.conditions, dtype=object)[screen.condition]]]
    late_control = np.array([p.perturbation == "control" and p.time == 2.0 for p in part.conditions])[part.condition]
    part = part[~late_control | (part.batch == 0)]
    axes = plots.layout(part, kind="table").axes[0]
    counts = axes.images[0].get_array()
    assert [name.split(" · ", 1)[1] for name in names_of(axes, "x")] == ["day 1 · batch1", "day 1 · batch2", "day 2 · batch1"] * 2
    assert np.ma.getmaskarray(counts).tolist() == [[False] * 6, *[[False, False, True] * 2] * 2]
    assert len(axes.texts) == counts.count()


def test_layout_of_one_media_names_time_and_batch_only(screen):
    rest = screen[[p.media is None for p in np.array(screen.conditions, dtype=object)[screen.condition]]]
    axes = plots.layout(rest, kind="table").axes[0]
    assert axes.get_xlabel() == "time · batch"
    assert names_of(axes, "x")[0] == "day 1 · batch1"


def test_a_missing_matplotlib_is_named_with_what_to_install(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install perturbprob\[plots\]"):
        plots.losses(fit)


def test_steady_states_draws_every_step_and_marks_what_moves(screen):
    result = pb.steady_states(screen, n_splits=40)
    media = "BMP4"
    above, below = plots.steady_states(result, media=media).axes
    part = result.table.sel(media=media)
    for axes, name, rule in ((above, "lfc", "steady_by_control"), (below, "lfc_beyond_drift", "steady_by_matched")):
        np.testing.assert_allclose(np.sort(points(axes)[:, 1]), np.sort(part[name].values.ravel()))
        moving = [line for line in axes.lines if line.get_label() == "moving"]
        assert len(moving[0].get_xdata()) == int((~part[rule]).sum())
    assert above.patches[0].get_height() == float(part["control_bound"])
    np.testing.assert_allclose(sorted(bar.get_height() for bar in below.patches), np.sort(part["matched_bound"].values.ravel()))
    assert sorted(names_of(below, "x")) == sorted(part["perturbation"].values)
    assert "1 → 2 day" in below.get_xlabel()
    with pytest.raises(ValueError, match="There is no media 'BMP5' here"):
        plots.steady_states(result, media="BMP5")


def test_the_study_is_drawn_with_bands_the_best_baselines_and_the_floor():
    coords = {"start": ["control", "own"], "loss": ["eq5", "eq5+eq9"], "step": [0, 20, 40], "seed": [0, 1, 2]}
    values = 0.01 + 0.002 * np.random.default_rng(0).random((2, 2, 3, 3))
    curve = xr.DataArray(values, coords, tuple(coords))
    found = ProofOfPrinciple(curve, curve, {"a": 0.005, "b": 0.006, "c": 0.007, "worse": 0.02}, 0.003, 1.0)
    panels = plots.proof_of_principle(found).axes
    assert [axes.get_title() for axes in panels] == ["start: control", "start: own"]
    lines = {line.get_label(): line for line in panels[0].lines}
    assert set(lines) == {"eq5", "eq5+eq9", "a", "b", "c", "noise floor"}
    np.testing.assert_allclose(lines["eq5"].get_ydata(), curve.sel(start="control", loss="eq5").mean("seed"))
    assert lines["noise floor"].get_ydata()[0] == 0.003
    assert len(panels[0].collections) == 2


def test_a_score_sheet_is_drawn_with_its_errors_the_best_on_top_and_without_fits_that_have_no_likelihood():
    sheet = pd.DataFrame(
        {"difference": [0.0, -0.02, np.nan], "standard_error": [0.0, 0.01, np.nan]}, index=["node", r"$\frac", "stationary"]
    )
    figure = plots.compare(sheet)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["node", r"\$\frac"]
    assert axes.yaxis_inverted()
    (bars,) = axes.containers
    assert bars[0].get_xdata().tolist() == [0.0, -0.02]
    assert [part[:, 0].tolist() for part in bars[2][0].get_segments()] == [[0.0, 0.0], pytest.approx([-0.03, -0.01])]
    with pytest.raises(ValueError, match="draws what compare returned; this table has the columns error"):
        plots.compare(pd.DataFrame({"error": [0.0]}))


@pytest.mark.usefixtures("unchecked")
def test_only_a_score_sheet_is_drawn_as_one(screen):
    with pytest.raises(TypeError, match=r"plots.compare draws what compare returned; got Screen\. Draw pb.compare"):
        plots.compare(screen)


def test_branches_name_every_state_and_what_is_missing(screen):
    texts = " ".join(text.get_text() for text in plots.branches(screen).axes[0].texts)
    for name in (*screen.perturbations, *screen.media, "X"):
        assert name in texts
    kept = np.array([p.media is None or not p.perturbations for p in screen.conditions])[screen.condition]
    dashed = [line for line in plots.branches(screen[kept]).axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == len(screen.perturbations)


def test_the_decomposition_shows_shares_genes_and_batches(fit):
    parts = pb.decompose_batches(fit, n_draws=3, n_states=4, progress=False)
    figure = plots.batch_decomposition(parts, n_genes=4)
    left, middle, right = figure.axes[:3]
    assert left.get_yticklabels()[0].get_text() == "batch"
    assert len(middle.get_yticklabels()) == 5
    assert right.images[0].get_array().shape == (4, 2)
    widths = np.zeros(5)
    for container in middle.containers:
        widths += [bar.get_width() for bar in container]
    assert (widths > 99).all()
    with pytest.raises(ValueError, match="n_genes must be at least 1"):
        plots.batch_decomposition(parts, n_genes=0)


@pytest.fixture(scope="module")
def ordered():
    """A screen of three knock-outs, ordered by the pseudotime of its control cells, of which one has two lineages by name."""
    screen = pb.simulate(n_cells=400, n_genes=12, n_perturbations=3, times=(1.0,), seed=2).screen
    first, second = (str(screen.cells[k]) for k in screen.cells_of("control")[[5, 40]])
    return pb.pseudotime.order(screen, str(screen.cells[screen.cells_of("control")[0]]), ends={"$A": first, "B": second}, n_bootstraps=0)


def test_pseudotime_shows_every_perturbation_over_control(ordered):
    table = pb.pseudotime.along(ordered)
    figure = plots.pseudotime(ordered)
    left, right = figure.axes
    earliest_first = table["perturbation"].values[1:][np.argsort(table["pseudotime_change"].values[1:])]
    assert [name.removeprefix("● ") for name in names_of(left)] == earliest_first.tolist()
    assert len(left.patches) == 2 * 3
    for row, name in enumerate(earliest_first):
        heights = row - left.patches[2 * row].get_data().values
        mean = (heights * (np.arange(20) + 0.5) / 20).sum() / heights.sum()
        assert mean == pytest.approx(float(table["pseudotime"].sel(perturbation=name)), abs=0.025)
    drawn = [tuple(scatter.get_offsets()[:, 0]) for scatter in right.collections if len(scatter.get_offsets())]
    expected = [tuple(table["share_change"].sel(lineage=k, perturbation=earliest_first).values) for k in ("$A", "B")]
    np.testing.assert_allclose(drawn, expected)
    assert texts(right.get_legend().get_texts()) == [r"\$A", "B"]
    figure.canvas.draw()


def test_pseudotime_of_chosen_perturbations_in_a_figure_of_ones_own(ordered):
    name = ordered.ordered_screen.perturbations[1]
    figure = Figure()
    assert plots.pseudotime(ordered, name, figure=figure) is figure
    assert [label.removeprefix("● ") for label in names_of(figure.axes[0])] == [name]
    with pytest.raises(ValueError, match="no perturbation 'nobody'"):
        plots.pseudotime(ordered, ["nobody"])


@pytest.mark.usefixtures("unchecked")
def test_only_an_order_is_drawn_along_pseudotime(screen, ordered):
    with pytest.raises(TypeError, match=r"An order is needed here; got Screen\. Give what pseudotime.order"):
        plots.pseudotime(screen)
    with pytest.raises(ValueError, match=r"level is a share of false discoveries.*got 'a'"):
        plots.pseudotime(ordered, level="a")


def test_a_network_is_drawn_with_its_probable_edges_alone():
    weight = np.array([[np.nan, 1.0, 0.0], [-0.5, np.nan, 0.2], [0.0, 0.0, np.nan]])
    probability = np.array([[np.nan, 0.9, 0.1], [0.7, np.nan, 0.3], [0.0, 0.2, np.nan]])
    genes = ["A", "B", "C"]
    edges = xr.Dataset(
        {name: (("gene", "regulator"), value) for name, value in (("weight", weight), ("probability", probability))},
        {"gene": genes, "regulator": genes, "perturbed": ("regulator", [True, False, True])},
    )
    figure = pb.plots.network(edges)
    assert {text.get_text() for text in figure.axes[0].texts} == {"A", "B"}
    assert figure.axes[0].get_title() == "2 edges of probability 0.5 or more"
    assert len(figure.axes[0].patches) == 2
    assert pb.plots.network(edges, least=0.95).axes[0].get_title() == "0 edges of probability 0.95 or more; the largest is 0.90"
    for other in (edges.transpose("regulator", "gene"), edges.sortby("gene", ascending=False), edges.sel(regulator=["C", "A", "B"])):
        assert set(_graph(other, 0.5).edges) == set(_graph(edges, 0.5).edges) == {("B", "A"), ("A", "B")}
    assert set(_graph(edges.sel(regulator=edges["perturbed"]), 0.5).edges) == {("A", "B")}
    with pytest.raises(ValueError, match="least is a probability, from 0 to 1"):
        pb.plots.network(edges, least=2)
