"""Shares of branches: a perturbation that blocks one is found, and an SDE can branch from one place where an ODE cannot."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import perturbprob as pb

N = 350


def branching(blocked: str = "KO", seed: int = 0) -> tuple[pb.Screen, np.ndarray]:
    """Cells that rest alike and end in branch A or B, even odds; one perturbation sends all to B. Returns the screen and the branches."""
    rng = np.random.default_rng(seed)
    rows = [(p, t) for p in ("control", blocked, "NONE") for t in (0.2, 2.0) for _ in range(N)]
    obs = pd.DataFrame(rows, columns=["perturbation", "time"])
    to_a = rng.random(len(obs)) < np.where(obs["perturbation"] == blocked, 0.0, 0.5)
    late = (obs["time"] > 1).to_numpy()
    log_rate = np.full((len(obs), 14), np.log(6.0))
    log_rate[:, :4] += 1.2 * np.where(late & to_a, 1, np.where(late, -0.5, 0))[:, None]
    log_rate[:, 4:8] += 1.2 * np.where(late & ~to_a, 1, np.where(late, -0.5, 0))[:, None]
    obs.index = [f"c{k}" for k in range(len(obs))]
    adata = AnnData(rng.poisson(np.exp(log_rate)).astype(np.float32), obs=obs)
    adata.var_names = [*(f"g{k}" for k in range(12)), "KO", "NONE"]
    screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", time="time")
    return screen, np.where(late, np.where(to_a, "A", "B"), None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_a_perturbation_that_blocks_a_branch_is_found() -> None:
    screen, branch = branching()
    fit = pb.fit(pb.neural_sde(screen, 2, n_steps=4), screen, epochs=40, warmup=5, learning_rate=1e-2, progress=False)
    late = [p for p in screen.conditions if p.time == 2.0]
    found = pb.branch_shares(fit, screen, branch, late, n_draws=10, progress=False)
    share = found["mean"].sel(branch="A").values
    by_name = {p.perturbation: s for p, s in zip(late, share, strict=True)}
    np.testing.assert_allclose(found["mean"].sum("branch"), 1, rtol=1e-6)
    assert by_name["KO"] < 0.2
    assert 0.3 < by_name["control"] < 0.7
    assert 0.3 < by_name["NONE"] < 0.7


@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_misuse() -> None:
    screen, branch = branching()
    fit = pb.fit(pb.neural_sde(screen, 2, n_steps=2), screen, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"of each of the 2,100 cells of the screen, or None; got values of shape \(3,\)"):
        pb.branch_shares(fit, screen, ["A", "B", None], n_draws=2)
    with pytest.raises(ValueError, match=r"or None; got 'cell_type'\. Give a column of obs"):
        pb.branch_shares(fit, screen, "cell_type", n_draws=2)
    with pytest.raises(ValueError, match=r"level must be between 0 and 1; got 90\."):
        pb.branch_shares(fit, screen, branch, n_draws=2, level=90.0)
    by_name = pd.Series(branch, screen.cells)
    with pytest.raises(ValueError, match=r"branches= is a Series with names of cells.*1 cells have none, such as 'c0'"):
        pb.branch_shares(fit, screen, by_name.iloc[1:], n_draws=2)
    numbers = np.where(branch == "A", 1.0, np.where(branch == "B", 2.0, np.nan))
    shares = [pb.branch_shares(fit, screen, b, n_draws=2, progress=False)["mean"].values for b in (branch, by_name.iloc[::-1], numbers)]
    for other in shares[1:]:
        np.testing.assert_array_equal(other, shares[0])
    with pytest.raises(ValueError, match="Shares of branches need at least two; branches= names A"):
        pb.branch_shares(fit, screen, np.where(branch == "A", "A", None), n_draws=2)
    few = np.full(screen.n_cells, None, object)
    few[:50], few[50:52] = "A", "B"
    with pytest.raises(ValueError, match=r"more cells than the 2 latent axes; found \{'B': 2\}"):
        pb.branch_shares(fit, screen, few, n_draws=2)


@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_what_a_neural_sde_cannot_be_made_of() -> None:
    screen, _ = branching()
    with pytest.raises(ValueError, match="n_steps must be a whole number of at least 1, and without noise it is node; got 0"):
        pb.neural_sde(screen, 2, n_steps=0)
    with pytest.raises(ValueError, match="the noise of neural_sde moves them"):
        pb.neural_sde(screen, 2, assumptions=[pb.UneditedStable()])
    with pytest.raises(ValueError, match="SteadyState follows one path on from a state, and NeuralSDE has noise on the way"):
        pb.neural_sde(screen, 2, assumptions=[pb.SteadyState()])
    with pytest.raises(ValueError, match="a row of continuous values is a mean of cells: use node"):
        pb.neural_sde(screen.pseudobulk(), 2)
