"""Batch effects that depend on the media: what was put into the counts comes back, with its uncertainty."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import perturbprob as pb

BATCHES, GENES, LEVEL = 4, 12, np.log(20.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_what_a_media_does_otherwise_in_each_batch_comes_back() -> None:
    """Five screens: one has 48 effects, and intervals that are somewhat narrow."""
    inside = [_inside(seed) for seed in range(2, 7)]
    assert (np.mean(inside, 0) > 0.75).all()


def _inside(seed: int) -> list[float]:
    """Return the shares of effects by media, and of the others, that lie in their intervals."""
    rng, inside = np.random.default_rng(seed), []
    share = np.full(GENES, 1 / GENES)
    zero_sum = lambda x: (x := x - x.mean(0)) - (x @ share)[:, None]  # noqa: E731
    eta, alpha = zero_sum(rng.normal(0, 0.3, (BATCHES, GENES))), zero_sum(rng.normal(0, 0.4, (BATCHES, GENES)))
    obs = pd.DataFrame({"batch": np.arange(1600) % BATCHES, "drug": np.arange(1600) // BATCHES % 2})
    rate = np.exp(LEVEL + eta[obs["batch"]] + alpha[obs["batch"]] * obs["drug"].to_numpy()[:, None])
    obs = pd.DataFrame({"media": np.where(obs["drug"] == 1, "drug", "rest"), "batch": [f"b{b}" for b in obs["batch"]]})
    obs.index = [f"c{k}" for k in range(len(obs))]
    adata = AnnData(rng.poisson(rate).astype(np.float32), obs=obs)
    adata.var_names = [f"g{k}" for k in range(GENES)]
    screen = pb.Screen.from_anndata(adata, perturbation=None, media="media", baseline="rest", batch="batch")
    model = pb.node(screen, 1, n_hidden=8, batch_effect="state", assumptions=[pb.UneditedStable()])
    fit = pb.fit(model, screen, epochs=30, warmup=5, learning_rate=2e-2, minibatch=200, validation=0.0, progress=False)
    draws = pb.posterior(fit, 200).posterior.squeeze("chain")
    for name, truth in (("batch_media_effect", alpha), ("batch_effect", eta)):
        found = draws[name].squeeze("media") if name == "batch_media_effect" else draws[name]
        low, high = found.quantile([0.05, 0.95], "draw").values
        assert np.corrcoef(found.mean("draw").values.ravel(), truth.ravel())[0, 1] > 0.95
        inside.append(((low <= truth) & (truth <= high)).mean())
    return inside
