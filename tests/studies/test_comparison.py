"""One score sheet: every column from its definition, in the order of densities, and no fit that saw the answer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import perturbprob as pb
from perturbprob.studies.comparison import _standard_error
from perturbprob.studies.held_out_means import Means

pytestmark = pytest.mark.slow

SHORT = {"particles": 10, "n_draws": 20, "progress": False}


@pytest.fixture(scope="module")
def split() -> pb.split.Split:
    """A screen without a fifth of its cells."""
    screen = pb.simulate(n_cells=600, n_genes=10, n_perturbations=3, times=(1.0, 2.0), n_batches=2, seed=3).screen
    return pb.split.hold_out_cells(screen, 0.2)


@pytest.fixture(scope="module")
def fits(split: pb.split.Split) -> dict[str, pb.Fit]:
    """A fit of ten epochs, one of none to speak of, and one that cannot hold overdispersion."""
    made = {"trained": (pb.node(split.train, 2), 10), "raw": (pb.vae(split.train, 2), 1)}
    made["poisson"] = (pb.node(split.train, 2, measurement="poisson"), 10)
    return {name: pb.fit(model, split.train, epochs=epochs, progress=False) for name, (model, epochs) in made.items()}


@pytest.fixture(scope="module")
def table(fits: dict[str, pb.Fit], split: pb.split.Split) -> pd.DataFrame:
    return pb.compare(fits, split.test, **SHORT)


def test_each_column_is_what_it_says(fits: dict[str, pb.Fit], split: pb.split.Split, table: pd.DataFrame) -> None:
    test = split.test
    density = {name: pb.log_density(fit, test, 10, n_draws=20, progress=False).values / 10 for name, fit in fits.items()}
    best = max(density, key=lambda name: density[name].mean())
    assert table.index.tolist() == sorted(density, key=lambda name: -density[name].mean())
    for name, row in table.iterrows():
        behind = density[str(name)] - density[best]
        assert row["log_density"] == pytest.approx(density[str(name)].mean())
        assert row["difference"] == pytest.approx(behind.mean())
        wins = [behind[test.condition == c].sum() > 0 for c in range(len(test.conditions))]
        assert row["conditions_better"] == pytest.approx(np.mean(wins))
        assert row["parameters"] == sum(p.numel() for m in (fits[str(name)].model, fits[str(name)].guide) for p in m.parameters())
        assert row["seconds"] == fits[str(name)].seconds > 0
        assert 0 < row["coverage"] <= 1
        assert np.isfinite(row[["weighted_error", "direction_mean", "energy", "mmd", "sinkhorn", "crps"]].to_numpy(float)).all()
        assert row[["coverage50", "coverage80"]].between(0, 1).all()
    assert table.loc[best, "standard_error"] == 0


def test_the_error_is_that_of_the_means_of_log_counts_cells_in_their_own_batch(
    fits: dict[str, pb.Fit], split: pb.split.Split, table: pd.DataFrame
) -> None:
    test, fit = split.test, fits["trained"]
    error = []
    for c, condition in enumerate(test.conditions):
        predicted = 0.0
        for b, batch in enumerate(test.batches):
            n = ((test.condition == c) & (test.batch == b)).sum()
            if n:
                found = pb.predict(fit, condition, batch=batch, scale="log1p", n_draws=20, progress=False)
                predicted = predicted + n * found["mean"].values[0]
        here = np.log1p(test.counts[test.condition == c].toarray())
        error.append(np.square(predicted / len(here) - here.mean(0)).mean())
    assert table.loc["trained", "error"] == pytest.approx(np.mean(error), rel=0.02)


def test_changes_are_from_control_cells_that_were_observed(fits: dict[str, pb.Fit], split: pb.split.Split) -> None:
    """Control comes from the test screen and from those trained on, whichever fits still have theirs; without any there is no direction."""
    edited = split.test[np.concatenate([split.test.cells_of(p) for p in split.test.perturbations])]
    forgotten = {name: replace(fits[name], screen=None) for name in ("trained", "raw")}
    whole, alone = (pb.compare(some, edited, **SHORT) for some in (forgotten | {"raw": fits["raw"]}, forgotten))
    assert whole["direction"].between(-1, 1).all()
    assert whole.loc["trained", "direction"] > 0.1
    assert alone["direction"].isna().all()
    assert alone["discrimination"].between(0, 1).all()


def test_control_is_weighted_over_batches_as_the_condition_is(split: pb.split.Split) -> None:
    means = Means.of(split.test, [split.train])
    k = next(k for k, c in enumerate(split.test.conditions) if c.perturbations)
    beside, here = split.test.conditions[k].unperturbed(), split.test.condition == k
    expected = 0.0
    for b, batch in enumerate(split.test.batches):
        rows = []
        for screen in (split.test, split.train):
            own = (screen.condition == screen.conditions.index(beside)) & (screen.batch == screen.batches.index(batch))
            rows.append(np.log1p(screen.counts[np.flatnonzero(own)].toarray()))
        expected = expected + (here & (split.test.batch == b)).sum() / here.sum() * np.concatenate(rows).mean(0)
    np.testing.assert_allclose(means.control[k], expected, rtol=1e-5)


def test_the_standard_error_is_that_of_drawing_conditions() -> None:
    """Against the bootstrap over conditions of a mean over cells."""
    rng = np.random.default_rng(0)
    condition = np.repeat(np.arange(40), rng.integers(5, 30, 40))
    values = rng.normal(0, 1, 40)[condition] + rng.normal(0, 0.5, len(condition))
    sums, cells = np.bincount(condition, values), np.bincount(condition)
    draws = [(lambda k: sums[k].sum() / cells[k].sum())(rng.integers(0, 40, 40)) for _ in range(4000)]
    assert _standard_error(values, condition) == pytest.approx(np.std(draws), rel=0.08)
    alone = np.zeros(len(values), int)
    assert _standard_error(values, alone) == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)


def test_misuse(fits: dict[str, pb.Fit], split: pb.split.Split) -> None:
    with pytest.raises(
        ValueError, match=r"'trained' was trained on 480 of the 480 test cells, such as .*: give cells that no fit has seen"
    ):
        pb.compare(fits, split.train, **SHORT) if split.train.n_cells == 480 else pb.compare(fits, split.train[:480], **SHORT)
    with pytest.raises(ValueError, match="compare needs two fits or more; got 1"):
        pb.compare({"a": fits["raw"]}, split.test)
    paths = pb.fit(pb.node(split.train, 2), split.train, epochs=1, objective="paths", progress=False)
    with pytest.raises(ValueError, match="'b' was fitted by objective='paths' and has no density"):
        pb.compare({"a": fits["raw"], "b": paths}, split.test)
    strange = replace(fits["raw"], trained_on=fits["raw"].trained_on | {"cells": []})
    assert len(pb.compare({"a": strange, "b": fits["trained"]}, split.test, **SHORT)) == 2
