"""The valid set of a layout, its graph and its parts, and what its additive design cannot tell apart."""

from itertools import combinations, product

import anndata
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbprob.experiment import Screen, datasets
from perturbprob.experiment.aliasing import Alias, Design
from perturbprob.experiment.layout import Layout
from perturbprob.experiment.reading import Levels

pytestmark = pytest.mark.filterwarnings("ignore::perturbprob.experiment.screen.ScreenWarning")

FACTORS = ("perturbation", "media", "time", "batch")
PERTURBATIONS = ("control", "A", "B")


def screen_of(rows: list[tuple[str, str, float, str]]) -> Screen:
    """A screen with one cell for each (perturbation, media, time, batch)."""
    obs = pd.DataFrame(rows, columns=list(FACTORS), index=[f"cell{i}" for i in range(len(rows))])
    adata = anndata.AnnData(np.ones((len(rows), 1), dtype=np.float32), obs=obs, var=pd.DataFrame(index=["G"]))
    return Screen.from_anndata(adata, perturbation_type="knockout", media="media", baseline="rest", time="time", batch="batch")


def layout_of(*places: tuple[str, str], perturbations: tuple[str, ...] = PERTURBATIONS) -> Layout:
    """The layout in which every perturbation is in each of these (media, batch)."""
    return screen_of([(p, media, 1.0, batch) for p in perturbations for media, batch in places]).layout


def dummies(columns: list[tuple[str, ...]]) -> np.ndarray:
    """The mean and an indicator of every level of every factor: the additive design without a reference."""
    return np.stack([np.ones(len(columns[0])), *(np.array(c) == level for c in columns for level in sorted(set(c)))], 1).astype(float)


def estimable(design: np.ndarray, contrast: np.ndarray) -> bool:
    """Whether a contrast of effects is in the row space of the design."""
    return bool(np.linalg.matrix_rank(np.vstack([design, contrast])) == np.linalg.matrix_rank(design))


rows_of_cells = st.lists(
    st.tuples(
        st.sampled_from(PERTURBATIONS), st.sampled_from(["rest", "dox", "stim"]), st.sampled_from([1.0, 2.0]), st.sampled_from("wxyz")
    ),
    min_size=1,
    max_size=14,
)


@given(rows_of_cells)
def test_rank_and_comparable_levels_are_those_of_the_dense_design(rows):
    rows = [("control", "rest", 1.0, "w"), *rows]
    design = screen_of(rows).layout.design()
    columns = [tuple(map(str, column)) for column in zip(*rows, strict=True)]
    dense = dummies(columns)
    assert design.rank == np.linalg.matrix_rank(dense)
    assert design.n_effects == 1 + sum(len(set(c)) - 1 for c in columns)
    names = [level for c in columns for level in sorted(set(c))]
    start = 1
    for factor, column in zip(FACTORS, columns, strict=True):
        levels = sorted(set(column))
        if len(levels) > 1:
            group = {name.removeprefix("time "): k for k, part in enumerate(design.comparable(factor)) for name in part}
            group = {f"{float(n):.1f}" if factor == "time" else n: k for n, k in group.items()}
            for a, b in combinations(range(len(levels)), 2):
                contrast = np.zeros(1 + len(names))
                contrast[[start + a, start + b]] = 1.0, -1.0
                assert estimable(dense, contrast) == (group[levels[a]] == group[levels[b]])
        start += len(levels)


@given(rows_of_cells)
def test_exact_aliases_name_the_same_cells_twice(rows):
    rows = [("control", "rest", 1.0, "w"), *rows]
    layout = screen_of(rows).layout
    values = {f: [f"time {v:g}" if f == "time" else v for v in c] for f, c in zip(FACTORS, zip(*rows, strict=True), strict=True)}
    assert len(layout.aliases()) == layout.deficiency
    for alias in layout.aliases():
        assert len(alias.levels) > 1
        assert all(0 < len(levels) < len(set(values[f])) for f, levels in alias.levels.items())
        if alias.exact:
            first, second = ([v in levels for v in values[f]] for f, levels in alias.levels.items())
            assert first == second


@given(rows_of_cells, st.sampled_from(["perturbation:media", "media:batch", "perturbation:media:time"]))
def test_the_null_space_is_that_of_the_columns(rows, interaction):
    design = screen_of([("control", "rest", 1.0, "w"), *rows]).layout.design([interaction])
    columns = np.concatenate([block.toarray() for block in design._blocks], 1)
    assert design.rank == np.linalg.matrix_rank(columns)
    np.testing.assert_allclose(columns @ design.null_space, 0, atol=1e-9)
    np.testing.assert_allclose(columns @ design._relations.T, 0, atol=1e-9)
    assert np.linalg.matrix_rank(design._relations) == design.deficiency if design.deficiency else True


@given(rows_of_cells)
def test_parts_are_those_of_the_graph(rows):
    layout = screen_of([("control", "rest", 1.0, "w"), *rows]).layout
    graph = layout.graph()
    batches = {node for node, kind in graph.nodes(data="bipartite") if kind == 1}
    assert nx.is_bipartite(graph)
    assert {frozenset(part & batches) for part in nx.connected_components(graph)} == set(map(frozenset, layout.components()))
    assert layout.connected == nx.is_connected(graph)
    assert {(p, m, b) for (p, m), b in graph.edges} == layout.valid_set
    assert sum(cells for *_, cells in graph.edges(data="cells")) == len(rows) + 1


@pytest.mark.parametrize("dox", ["lane1", "lane2", "lane3"])
def test_a_media_in_a_lane_of_its_own_is_named_wherever_the_lane_stands(dox):
    others = [lane for lane in ("lane1", "lane2", "lane3") if lane != dox]
    layout = layout_of(("dox", dox), *product(["rest", "stim"], others))
    said = f"media dox appears only in batch {dox}, which holds no other media: its effect cannot be told from that of batch {dox}."
    assert [str(alias) for alias in layout.aliases()] == [said]
    assert said in layout.report()
    assert layout.design().comparable("media") == (("rest", "stim"), ("dox",))
    assert layout.design().comparable("perturbation") == (PERTURBATIONS,)
    assert (layout.rank, layout.deficiency) == (6, 1)
    assert layout.batches_with_control == tuple(others)


def test_what_is_fully_confounded_is_said_once():
    layout = layout_of(("rest", "lane1"), ("dox", "lane2"), ("stim", "lane3"))
    assert [alias.levels for alias in layout.aliases()] == [
        {"media": ("dox",), "batch": ("lane2",)},
        {"media": ("stim",), "batch": ("lane3",)},
    ]
    assert "media and batch are fully confounded" in layout.report()
    assert "appears only" not in layout.report()


def test_media_nested_in_batches_are_named():
    layout = layout_of(("rest", "lane1"), ("stim", "lane1"), ("dox", "lane2"), ("pma", "lane2"))
    assert layout.nested() == [("media", "batch")]
    assert "media dox, pma appear only in batch lane2, which holds no other media: what they share cannot be told" in layout.report()


def test_batches_that_share_no_condition_are_visible():
    rows = [("control", "l1"), ("A", "l1"), ("A", "l2"), ("B", "l3"), ("C", "l3"), ("C", "l4"), ("C", "l5")]
    layout = screen_of([(p, "rest", 1.0, b) for p, b in rows]).layout
    assert not layout.connected
    assert layout.components() == (("l3", "l4", "l5"), ("l1", "l2"))
    report = layout.report()
    assert "batches fall into 2 parts ([l3, l4, l5], [l1, l2]) that share no condition: how the parts differ cannot be told" in report
    assert (
        "perturbations B, C appear only in batches l3, l4, l5, which hold no other perturbation: what they share cannot be told" in report
    )
    assert "4 batches (l2, l3, l4, l5)" not in report
    assert "3 batches (l2, l4, l5) with one cell: there, a batch effect cannot be told from how that cell differs." in report


def test_a_shared_condition_at_other_times_joins_batches_in_v_and_the_design_says_what_it_costs():
    layout = datasets.ishikawa2023().layout
    assert layout.connected
    assert len(layout.batches_with_control) == 4
    assert (layout.rank, layout.deficiency) == (1 + 23 + 3, 3)
    assert layout.design(["perturbation:time"]).rank == 96
    assert all(set(alias.levels) == {"time", "batch"} for alias in layout.aliases())


def test_a_declared_interaction_that_goes_with_a_batch_is_an_alias():
    places = [(p, m, b) for p in PERTURBATIONS for m in ("rest", "dox") for b in ("l1", "l2") if (p, m) != ("A", "dox")]
    layout = screen_of([(p, m, 1.0, b) for p, m, b in [*places, ("A", "dox", "l3")]]).layout
    assert layout.deficiency == 0
    (alias,) = layout.aliases(["perturbation:media"])
    assert alias.levels == {"batch": ("l3",), "perturbation:media": ("A:dox",)}
    assert "batch l3 and perturbation:media A:dox cannot be told apart: together they can change without a trace" in str(alias)


def test_long_lists_are_cut_and_counted():
    rows = [(f"g{k:02d}" if k else "control", "rest", 1.0, f"{k:02d}{well}") for k in range(20) for well in "abcdefg"]
    report = screen_of(rows).layout.report()
    assert "perturbation g01 appears only in 7 batches (01a, 01b, 01c, 01d, 01e, ...), which hold no other" in report
    assert report.count("appears only in") == 5
    assert report.endswith("and 14 more that cannot be told apart: layout.aliases() has them all.")
    assert "batches without control cells: 01a, 01b, 01c, 01d, 01e, 01f, 01g, 02a and 125 more" in report


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "citefuse_citeseq_pbmc.h5ad",
            "one condition only (control, unspecified, time 1): nothing can be learnt of the effects of perturbations, media and time; "
            "only how cells of this condition differ and how batches differ.",
        ),
        (
            "signac_atac_small.h5ad",
            "one condition only (control, ex_vivo, time 1): nothing can be learnt of the effects of perturbations, media and time, "
            "nor of batch effects, with one batch; only how cells of this condition differ.",
        ),
    ],
)
def test_a_file_of_one_condition_is_a_screen_that_says_what_it_cannot_teach(data_path, name, said):
    screen = Screen.from_anndata(anndata.read_h5ad(data_path(name)), media="media", time="time", batch="batch")
    assert said in screen.layout.report()
    assert (screen.layout.deficiency, screen.layout.connected) == (0, True)


def test_papalexi_and_zhao_alias_nothing(data_path):
    papalexi = datasets.load(data_path("papalexi2021_thp1_eccite.h5ad"), batch="replicate")
    zhao = datasets.load(data_path("zhao2021_gbm_panobinostat.h5ad"), batch="donor", media="treatment", baseline="vehicle (DMSO)")
    for screen, rank in ((papalexi, 1 + 25 + 2), (zhao, 1 + 1 + 4)):
        assert (screen.layout.rank, screen.layout.aliases(), screen.layout.connected) == (rank, (), True)
        assert screen.layout.batches_with_control == screen.batches


def test_a_large_layout_of_two_factors_has_the_rank_of_its_graph():
    random = np.random.default_rng(0)
    part = random.integers(0, 4, 1000)  # perturbations and batches in four parts that share nothing
    perturbation, batch = np.repeat(np.arange(1000), 5), random.integers(0, 12, 5000) + 12 * np.repeat(part, 5)
    levels = {"perturbation": Levels(perturbation, [f"p{k}" for k in range(1000)]), "batch": Levels(batch, [f"b{k}" for k in range(48)])}
    design = Design(levels)
    assert (design.n_effects, design.deficiency) == (1 + 999 + 47, 3)
    assert sorted(map(len, design.comparable("batch"))) == [12] * 4
    assert sorted(map(len, design.comparable("perturbation"))) == sorted(np.bincount(part))
    assert all(alias.exact for alias in design.aliases)


def test_an_alias_of_more_than_two_factors_is_said():
    said = str(Alias({"media": ("dox",), "time": ("2 h", "3 h"), "batch": ("l3",)}, exact=False))
    assert said == "the effects of media dox, times 2 h, 3 h and batch l3 cannot be told apart: together they can change without a trace."


def test_misuse():
    layout = layout_of(("rest", "lane1"), ("dox", "lane2"))
    with pytest.raises(ValueError, match=r"names 'meda', which is not a factor\. Did you mean 'media'"):
        layout.design(["perturbation:meda"])
    with pytest.raises(ValueError, match="joins two different factors or more, such as 'perturbation:media'; got 'media'"):
        layout.aliases(["media"])
    with pytest.raises(ValueError, match=r"'tine' is not a factor of the layout\. Did you mean 'time'"):
        layout.design().comparable("tine")


def test_a_design_without_a_varied_factor_has_a_mean_only():
    design = Design({"batch": Levels(np.zeros(2, dtype=int), ["b"])})
    assert (design.n_effects, design.rank, design.aliases, design.comparable("batch")) == (1, 1, (), (("b",),))
