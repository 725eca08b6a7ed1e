"""Replicates that a Dask cluster works out are those worked out one after the other."""

import os
from importlib.util import find_spec

import joblib
import pytest
import torch

import perturbprob as pb
from perturbprob.experiment.split import Split, folds, hold_out_perturbations, map_splits

pytestmark = [
    pytest.mark.skipif(find_spec("distributed") is None, reason="needs dask.distributed: pip install distributed"),
    pytest.mark.filterwarnings("ignore"),  # of processes that start and of sockets that close; not ours
]


def test_splits_give_on_a_cluster_what_they_give_in_turn() -> None:
    from distributed import Client, LocalCluster

    def losses(split: Split) -> tuple[int, dict[str, list[float]]]:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        return os.getpid(), pb.fit(pb.vae(split.train, 2), split.train, epochs=2, warmup=1, progress=False).losses

    screen = pb.simulate(n_cells=240, n_genes=8, n_perturbations=4, n_batches=2, seed=1).screen
    parts = list(folds(lambda names: hold_out_perturbations(screen, names), screen.perturbations, 4))
    in_turn = map_splits(losses, parts)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        on_cluster = map_splits(losses, parts)
    assert [found for _, found in on_cluster] == [found for _, found in in_turn]
    assert len({tuple(found["train"]) for _, found in in_turn}) == 4
    assert os.getpid() not in {process for process, _ in on_cluster}
