"""A disconnected V: refused, or told apart by a declared prior alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from jaxtyping import Float

import perturbprob as pb

LEVEL = np.log(np.linspace(4.0, 12.0, 10))


def screen_of(rows: list[tuple[str, str, str, float]], eta: Float[np.ndarray, "batch gene"] | None = None, n: int = 60) -> pb.Screen:
    """A screen of n cells for each (perturbation, media, batch, time), with batch effects; perturbation A halves gene 1."""
    rng, batches = np.random.default_rng(0), sorted({b for _, _, b, _ in rows})
    parts = []
    for p, _, b, _ in rows:
        log_rate = LEVEL + (0 if eta is None else eta[batches.index(b)])
        log_rate = log_rate - np.log(2) * (p == "A") * (np.arange(10) == 1)
        parts.append(rng.poisson(np.exp(log_rate), (n, 10)))
    obs = pd.DataFrame(np.repeat(np.array(rows, object), n, 0), columns=["perturbation", "media", "batch", "time"])
    obs.index = [f"c{k}" for k in range(len(obs))]
    adata = AnnData(np.concatenate(parts).astype(np.float32), obs=obs.astype({"time": float}))
    adata.var_names = [*"AB", *(f"g{k}" for k in range(8))]
    kwargs = {"perturbation_type": "knockout", "media": "media", "baseline": "rest", "time": "time", "batch": "batch"}
    return pb.Screen.from_anndata(adata, **kwargs)


APART = [("control", "rest", "l1", 1.0), ("A", "rest", "l1", 1.0), ("control", "drug", "l2", 1.0), ("A", "drug", "l2", 1.0)]


def test_batches_that_share_no_condition_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"2 parts that share no condition .*: \[l1\], \[l2\]\..*Fit each part.*ExchangeableBatches\(\)"):
        pb.node(screen_of(APART, n=3), 2)


@pytest.mark.parametrize(
    "rows",
    [
        [*APART[:3], ("control", "rest", "l2", 1.0)],  # control of the baseline in both
        [*APART[:3], ("control", "rest", "l2", 2.0)],  # the same, at another time only: as where each day is a library
        [*APART, ("A", "rest", "l3", 1.0), ("A", "drug", "l3", 1.0)],  # joined by a third batch, without control
        APART[:2],  # one batch
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_joined_by_any_shared_condition_at_whatever_time_are_not(rows: list[tuple[str, str, str, float]]) -> None:
    pb.node(screen_of(rows, n=3), 2)


def test_the_embedded_screen_is_connected_though_each_day_is_a_library() -> None:
    pb.node(pb.datasets.ishikawa2023(), 2)


@pytest.mark.slow
def test_declared_exchangeable_batch_effects_are_found_within_parts(tmp_path: Path) -> None:
    rows = [(p, m, b, 1.0) for m, pair in (("rest", ("l1", "l2")), ("drug", ("l3", "l4"))) for b in pair for p in ("control", "A")]
    eta = np.random.default_rng(1).normal(0, 0.3, (4, 10))
    screen = screen_of(rows, eta)
    model = pb.node(screen, 1, n_hidden=8, assumptions=[pb.ExchangeableBatches(), pb.UneditedStable()])
    fit = pb.fit(model, screen, epochs=80, learning_rate=0.05, minibatch=500, validation=0.0, progress=False)
    found = pb.posterior(fit, 200).posterior["batch_effect"].squeeze("chain").values
    share = np.exp(LEVEL) / np.exp(LEVEL).sum()
    truth = eta - (eta * share).sum(1, keepdims=True)
    for a, b in ((0, 1), (2, 3)):
        low, high = np.quantile(found[:, b] - found[:, a], [0.05, 0.95], axis=0)
        assert ((low <= truth[b] - truth[a]) & (truth[b] - truth[a] <= high)).mean() >= 0.7
        assert np.corrcoef((found[:, b] - found[:, a]).mean(0), truth[b] - truth[a])[0, 1] > 0.9
    fit.save(tmp_path)
    assert pb.load(tmp_path).model.assumptions[0].assumption == pb.ExchangeableBatches()


def test_it_says_what_rests_on_it_and_cannot_be_left_out() -> None:
    screen = screen_of(APART, n=5)
    found = pb.ExchangeableBatches().test(screen)
    assert not found.testable
    assert "parts that share no condition ([l1], [l2]), so how their batch effects differ was never seen" in repr(found)
    fit = pb.fit(pb.node(screen, 2, assumptions=[pb.ExchangeableBatches()]), screen, epochs=1, progress=False)
    with pytest.raises(ValueError, match="declares no assumption that it can do without"):
        pb.sensitivity(fit, progress=False)


def test_a_prediction_across_parts_says_that_priors_alone_carry_it() -> None:
    screen = screen_of(APART, n=5)
    fit = pb.fit(pb.node(screen, 2, assumptions=[pb.ExchangeableBatches(), pb.UneditedStable()]), screen, epochs=1, progress=False)
    condition = pb.Knockout("A") >> pb.Wait(1)
    pb.predict(fit, condition, batch="l1", n_draws=2, progress=False)
    with pytest.warns(pb.AliasedWarning, match="share no condition with others, so batch 'l2' differs from them by what priors alone say"):
        pb.predict(fit, condition, batch="l2", n_draws=2, progress=False)
