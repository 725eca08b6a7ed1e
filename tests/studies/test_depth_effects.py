"""Log totals as an observation of their own: exact, covering, and the known shifts of the embedded screen."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from jaxtyping import Float
from scipy import stats

import perturbprob as pb
from perturbprob.studies.depth_effects import EDITED, FLAT, _asked, _Depth

NAMES = ("control", *"ABCDEF")


def screen_of(log_total: Float[np.ndarray, " cell"], obs: pd.DataFrame) -> pb.Screen:
    """A screen of seven genes whose cells have these totals, up to rounding."""
    share = np.linspace(0.1, 0.2, 7)
    counts = np.rint(np.exp(log_total)[:, None] * share / share.sum())
    adata = AnnData(counts.astype(np.float32), obs=obs.set_index(pd.Index([f"c{k}" for k in range(len(obs))])))
    adata.var_names = [*"ABCDEF", "G"]
    return pb.Screen.from_anndata(adata, perturbation_type="knockout", time="time", batch="batch")


def simulated(seed: int, n: int = 25) -> tuple[pb.Screen, Float[np.ndarray, "perturbation time"]]:
    """Six knock-outs at two times in two batches of unequal composition; all edited cells are 3 % shallower."""
    rng = np.random.default_rng(seed)
    rows = [(p, t, b) for p in NAMES for t in (1.0, 2.0) for b in ("b1", "b2") for _ in range(rng.integers(n // 2, 2 * n))]
    obs = pd.DataFrame(rows, columns=["perturbation", "time", "batch"])
    change = np.concatenate([np.zeros((1, 2)), -0.03 + rng.normal(0, 0.08, (6, 2))])
    p, t, b = (pd.factorize(obs[name])[0] for name in ("perturbation", "time", "batch"))
    mean = 8.0 + np.array([0.0, 0.1])[t] + np.array([0.0, -0.2])[b] + change[p, t]
    return screen_of(rng.normal(mean, 0.2), obs), change[1:]


def test_the_posterior_is_that_of_the_joint_normal_law() -> None:
    """Written out densely over cells: log totals, a, b, e and v together, at one τ and the pooled σ."""
    screen, _ = simulated(0, n=4)
    logs, tau = np.log(np.asarray(screen.counts.sum(1), float).ravel()), 0.05
    depth, asked = _Depth(screen, logs), _asked(screen)
    evidence, mean, variance = depth.posterior(tau, asked)
    n_conditions = len(screen.conditions)
    edited = np.array([bool(p.perturbations) for p in screen.conditions])
    time = np.array([int(p.time) - 1 for p in screen.conditions])
    v = np.eye(n_conditions)[screen.condition] * edited[screen.condition, None]
    e = np.eye(2)[time[screen.condition]] * edited[screen.condition, None]
    design = np.concatenate([v, e, np.eye(2)[time[screen.condition]], np.eye(2)[screen.batch]], 1)
    prior = np.diag(np.repeat([tau**2, EDITED**2, 1 / FLAT], [n_conditions, 2, 4]))
    marginal = design @ prior @ design.T + depth.noise * np.eye(len(logs))
    answer = asked @ np.concatenate([np.eye(n_conditions), np.eye(2)[time] * edited[:, None], np.zeros((n_conditions, 4))], 1)
    gain = answer @ prior @ design.T @ np.linalg.inv(marginal)
    centred = logs - logs.mean()
    np.testing.assert_allclose(mean, gain @ centred, atol=1e-6)
    np.testing.assert_allclose(variance, np.diag(answer @ prior @ answer.T - gain @ design @ prior @ answer.T), rtol=1e-5)
    other = depth.posterior(0.2, asked)[0]
    wider = marginal + (0.2**2 - tau**2) * v @ v.T
    exact = [stats.multivariate_normal.logpdf(centred, cov=c) for c in (marginal, wider)]
    assert evidence - other == pytest.approx(exact[0] - exact[1], abs=1e-4)


def test_intervals_hold_the_truth_nine_times_in_ten() -> None:
    inside, whole = [], []
    for seed in range(30):
        screen, change = simulated(seed)
        found = pb.depth_effects(screen)
        truth = change.ravel()  # conditions are sorted by perturbation, then time
        inside.append((found["lower"].values <= truth) & (truth <= found["upper"].values))
        mean = change.mean(1)
        whole.append((found["overall_lower"].values <= mean) & (mean <= found["overall_upper"].values))
    assert 0.85 <= np.mean(inside) <= 0.95
    assert 0.85 <= np.mean(whole) <= 0.96
    assert found.attrs["residual_deviation"] == pytest.approx(0.2, abs=0.01)


def test_the_embedded_screen_shows_its_known_shifts() -> None:
    """Of the last two days: POU5F1 holds about 4 % more, PRDM14 by day 5 about 6 % less."""
    found = pb.depth_effects(pb.datasets.ishikawa2023())
    pou, prdm = (found.sel(condition=f"Knockout('{gene}') >> Wait({day})") for gene, day in (("POU5F1", 4), ("PRDM14", 5)))
    assert float(pou["lower"]) <= 0.04 <= float(pou["upper"])
    assert float(pou["lower"]) > 0
    assert float(prdm["lower"]) <= -0.06 <= float(prdm["upper"])
    assert float(prdm["upper"]) < 0
    assert float(prdm["local_false_sign_rate"]) < 0.001
    assert found.sizes == {"condition": 92, "tested_perturbation": 23}


def test_where_control_is_missing_the_interval_says_so() -> None:
    """At time 2 no control: how edited cells differ there is known by the prior of what they share alone."""
    screen, _ = simulated(1)
    late = np.array([not p.perturbations and p.time == 2.0 for p in screen.conditions])[screen.condition]
    found = pb.depth_effects(screen[~late])
    width = (found["upper"] - found["lower"]).groupby("time").mean()
    assert float(width.sel(time=2.0)) > 1.0 > 10 * float(width.sel(time=1.0)) / 2


def test_totals_may_be_given() -> None:
    screen, _ = simulated(2)
    total = np.asarray(screen.counts.sum(1)).ravel()
    assert pb.depth_effects(screen).identical(pb.depth_effects(screen, total=total))


def test_misuse() -> None:
    screen, _ = simulated(3, n=4)
    perturbed = np.array([bool(p.perturbations) for p in screen.conditions])[screen.condition]
    for part in (perturbed, ~perturbed):
        with pytest.raises(ValueError, match="compares perturbed cells with control cells, and this screen lacks one"):
            pb.depth_effects(screen[part])
    with pytest.raises(ValueError, match="continuous values, which have no depth"):
        pb.depth_effects(screen.pseudobulk())
    for total in (np.zeros(screen.n_cells), np.ones(3)):
        with pytest.raises(ValueError, match="Totals are one number above 0 for each of the"):
            pb.depth_effects(screen, total=total)
    with pytest.raises(ValueError, match="all cells have one total"):
        pb.depth_effects(screen, total=np.full(screen.n_cells, 5.0))
    with pytest.raises(ValueError, match="between 0 and 1; got 90"):
        pb.depth_effects(screen, level=90.0)
