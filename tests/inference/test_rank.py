"""Which perturbation leads to a desired state: fits of any structure, targets of any kind, and what is refused."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation


def cells_of(screen: pb.Screen, gene: str, time: float) -> pb.Screen:
    """Cells that lost a gene, in baseline media, at a time."""
    return screen[screen.cells_of(pb.Knockout(gene) >> pb.Wait(time))]


@pytest.fixture(scope="module")
def strongest(simulation: Simulation) -> str:
    """The knock-out that changes most."""
    truth = simulation.truth
    size = pd.Series((truth["log_fold_change"].values ** 2).mean(1), truth["perturbation"].values)
    return str(size.groupby(level=0).max().drop("control").idxmax())


@pytest.mark.slow
def test_the_first_is_what_the_target_cells_had(fit: pb.Fit, screen: pb.Screen, strongest: str) -> None:
    ranked = pb.rank_perturbations(fit, cells_of(screen, strongest, 2.0), n_draws=20)
    assert ranked["perturbation"].values[0] == strongest
    assert set(ranked["time"].values) == {2.0}
    assert float(ranked["distance"][0]) < 0.5 * float(ranked["nothing"])
    assert float(ranked["better"][0]) > 0.9 < float(ranked["best"][0])
    assert (np.diff(ranked["distance"]) >= 0).all()
    assert ((ranked["lower"] <= ranked["distance"]) & (ranked["distance"] <= ranked["upper"])).all()
    assert float(ranked["best"].sum()) == pytest.approx(1)


def test_changes_of_some_genes_are_a_target_too(fit: pb.Fit, simulation: Simulation, strongest: str) -> None:
    truth = simulation.truth
    row = int(np.flatnonzero((truth["perturbation"] == strongest) & (truth["time"] == 2.0) & (truth["media"] == "rest"))[0])
    change = pd.Series(truth["log_fold_change"].values[row], truth["gene"].values)
    for wanted in (change, change[change.abs().nlargest(4).index].to_dict()):
        ranked = pb.rank_perturbations(fit, wanted, n_draws=20)
        assert ranked["perturbation"].values[0] == strongest
        assert float(ranked["nothing"]) == pytest.approx(np.square(list(dict(wanted).values())).mean(), rel=1e-4)


def test_no_change_is_wanted_of_doing_nothing(fit: pb.Fit, screen: pb.Screen) -> None:
    ranked = pb.rank_perturbations(fit, dict.fromkeys(screen.genes, 0.0), [pb.Wait(2), pb.Media("drug") >> pb.Wait(2)], n_draws=5)
    assert float(ranked["nothing"]) == pytest.approx(0)
    assert list(ranked["media"].values) == ["rest", "drug"]
    assert float(ranked["distance"][0]) == pytest.approx(0)


def test_given_cells_go_on_from_where_they_are(fit: pb.Fit, screen: pb.Screen, strongest: str) -> None:
    """What has been knocked out stays so: a second knock-out of the gene is nothing; the way back from a drug is baseline media."""
    sick = cells_of(screen, strongest, 1.0)
    ranked = pb.rank_perturbations(fit, cells_of(screen, strongest, 2.0), pb.Knockout(strongest) >> pb.Wait(1), start=sick, n_draws=5)
    assert float(ranked["distance"][0]) == pytest.approx(float(ranked["nothing"]), rel=1e-5)
    drugged = screen[screen.cells_of(pb.Media("drug") >> pb.Wait(1))]
    healthy = screen[screen.cells_of(pb.Protocol([pb.Wait(2)]))]
    back = pb.rank_perturbations(fit, healthy, [pb.Media() >> pb.Wait(1), pb.Wait(1)], start=drugged, n_draws=20)
    assert str(back["condition"].values[0]) == "Media() >> Wait(1)"
    assert float(back["better"][0]) > 0.9


def test_candidates_share_their_draws(fit: pb.Fit, screen: pb.Screen) -> None:
    """Two ways to write the same candidate are as far in every draw, so neither is ever better; one written twice is taken once."""
    knockout = pb.Knockout(screen.perturbations[0])
    same = [knockout >> pb.Wait(2), knockout >> pb.Wait(1) >> pb.Wait(1)]
    ranked = pb.rank_perturbations(fit, {screen.genes[0]: 1.0}, [*same, same[0]], n_draws=5, start=screen[:20])
    assert ranked.sizes["condition"] == 2
    assert set(ranked["best"].values) == {0.0, 1.0}
    np.testing.assert_allclose(ranked["distance"][0], ranked["distance"][1], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_means_of_conditions_are_targets_as_measured() -> None:
    bulk = pb.simulate(n_cells=2000, n_genes=10, n_perturbations=3, times=(1.0, 2.0), n_batches=1, inactive=0, seed=5).screen.pseudobulk()
    fit = pb.fit(pb.causal_context(bulk), bulk, epochs=150, learning_rate=1e-2, validation=0.0, progress=False)
    gene = max(bulk.perturbations, key=lambda g: float(np.square(bulk.counts[bulk.cells_of(pb.Knockout(g) >> pb.Wait(2))]).sum()))
    target = bulk[bulk.cells_of(pb.Knockout(gene) >> pb.Wait(2))]
    ranked = pb.rank_perturbations(fit, target, n_draws=500)  # of 20 draws chance would choose
    assert ranked["perturbation"].values[0] == gene
    assert ranked.attrs["units"] == "squared value"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda fit, g: pb.rank_perturbations(fit, {"G99": 1.0}), ValueError, "target_state names 'G99', which is no gene of the fit"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: np.nan}), ValueError, "one finite change in log rate for each gene"),
        (lambda fit, g: pb.rank_perturbations(fit, pd.Series([1.0, 2.0], [g, g])), ValueError, "one finite change in log rate for each"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: "up"}), ValueError, "one finite change in log rate for each.*got up for 'G"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: [1, 2]}), ValueError, "one finite change in log rate for each"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: 1.0}, seed=1.5), ValueError, "seed must be a whole number from 0 .*got 1.5"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: 1.0}, level="0.9"), ValueError, "level must be between 0 and 1; got '0.9'"),
        (lambda fit, g: pb.rank_perturbations(fit, {}), TypeError, "got dict without a gene"),
        (lambda fit, g: pb.rank_perturbations(fit, "healthy"), TypeError, "is a Screen of cells in the desired state.*got str"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: 1.0}, pb.Knockout(g)), ValueError, "never seen by this model|waits for no time"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: 1.0}, pb.Media("drug")), ValueError, r"waits for no time.*>> Wait\(t\) behind\.$"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: 1.0}, settled=True), ValueError, "Only a network over genes tells where cells"),
        (lambda fit, g: pb.rank_perturbations(fit, {g: 1.0}, level=0.0), ValueError, "level must be between 0 and 1"),
    ],
)
def test_what_cannot_be_ranked(fit: pb.Fit, screen: pb.Screen, ask: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask(fit, next(g for g in screen.genes if g not in screen.perturbations))
