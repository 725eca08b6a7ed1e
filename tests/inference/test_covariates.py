"""Batch effects that depend on what is known of the batches: where a well lies on its plate, and what it holds (eq 19, C.2)."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from jaxtyping import Float

import perturbprob as pb
from perturbprob.experiment.plate import read_wells

N_GENES, N_CELLS = 10, 20
WELLS = [f"{row}{column}" for row in "ABCD" for column in range(1, 7)]
LEVEL = np.log(np.linspace(3, 15, N_GENES))


def table_of(edge: str, rng: np.random.Generator) -> pd.DataFrame:
    """An edge term of every well of a plate, and a composition summary."""
    composition = pd.Series(rng.uniform(0, 1, len(WELLS)), index=WELLS)
    return read_wells(WELLS, plate=24).covariates(edge).assign(composition=composition)


def screen_of(table: pd.DataFrame, slope: Float[np.ndarray, "covariate gene"], rng: np.random.Generator) -> pb.Screen:
    """Control and a knock-out of gene A, which halves it, in every well; wells move genes by their covariates, and by themselves."""
    known = ((table - table.mean()) / table.std()).to_numpy()
    log_rate = LEVEL + known @ slope + rng.normal(0, 0.1, (len(table), N_GENES))
    names = ["well", "perturbation", "cell"]
    obs = pd.MultiIndex.from_product([table.index, ["control", "A"], range(N_CELLS)], names=names).to_frame(index=False)
    well, knocked = table.index.get_indexer(obs["well"]), (obs["perturbation"] == "A").to_numpy()
    log_rate = log_rate[well] - np.log(2) * np.outer(knocked, np.arange(N_GENES) == 0)
    counts = rng.poisson(np.exp(log_rate) * rng.gamma(20, 1 / 20, (len(obs), 1))).astype(np.float32)
    adata = AnnData(counts, obs=obs[["well", "perturbation"]].set_index(obs.index.astype(str)))
    adata.var_names = ["A", *(f"g{k}" for k in range(1, N_GENES))]
    return pb.Screen.from_anndata(adata, perturbation_type="knockout", batch="well")


@pytest.mark.slow
@pytest.mark.parametrize("edge", ["indicator", "radial"])
def test_an_edge_effect_and_a_regression_on_composition_are_found_over_24_wells(edge: str) -> None:
    rng = np.random.default_rng(0)
    table, slope = table_of(edge, rng), rng.normal(0, 0.2, (2, N_GENES))
    slope -= (slope * np.exp(LEVEL)).sum(1, keepdims=True) / np.exp(LEVEL).sum()  # depth, which size factors hold
    screen = screen_of(table, slope, rng)
    model = pb.node(screen, 1, n_hidden=8, batch_effect=table, assumptions=[pb.UneditedStable()])
    fit = pb.fit(model, screen, epochs=150, learning_rate=0.05, minibatch=1000, validation=0.0, progress=False)
    found = pb.posterior(fit, 200).posterior["batch_covariate_effect"].squeeze("chain")
    assert list(found["batch_covariate"].values) == list(table.columns)
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    assert ((low <= slope) & (slope <= high)).mean() >= 0.75  # 90 % intervals of 20 coefficients
    for k in range(2):
        assert np.corrcoef(found.mean("draw")[k], slope[k])[0, 1] > 0.95
    hits = pb.effects(fit, n_draws=50, progress=False)["log_fold_change"].squeeze("condition")
    assert float(hits.sel(gene="A")) == pytest.approx(-np.log(2), abs=0.15)


def test_tables_that_are_not_one_row_for_each_batch_are_refused(screen_of_batches: pb.Screen) -> None:
    screen = screen_of_batches
    table = pd.DataFrame({"age": np.arange(float(len(screen.batches)))}, index=list(screen.batches))
    cases = [
        (pd.concat([table, table]), r"has 2 rows named 'batch1': give one row for each batch"),
        (pd.concat([table, table], axis=1), "has 2 columns named 'age'"),
        (table[[]], "has no column"),
        (table.replace(0.0, np.nan), "The covariates of batch 'batch1' are not all finite"),
        (table.iloc[1:], "has no row for 'batch1'"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            pb.node(screen, 2, batch_effect=wrong)


@pytest.fixture(scope="module")
def screen_of_batches() -> pb.Screen:
    """Eight batches."""
    return pb.simulate(n_cells=200, n_genes=8, n_perturbations=2, n_batches=8, times=(1.0,), seed=3).screen
