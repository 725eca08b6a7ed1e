"""The order in which a training sees its cells."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import perturbprob as pb
from perturbprob.experiment.store import StoreError
from perturbprob.inference import loader
from perturbprob.inference.loader import shuffled

HOW = {"media": "media", "time": "time", "batch": "batch"}


@pytest.fixture(scope="module")
def adata():
    return pb.simulate(n_cells=1000, n_genes=10, n_perturbations=2, n_batches=2, seed=0).adata


@pytest.fixture
def path(adata, tmp_path):
    adata.write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(loader, "BLOCK", 16)
    monkeypatch.setattr(loader, "BUFFER", 5)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(("minibatch", "n"), [(64, 900), (100, 1000), (7, 33), (5000, 300), (64, 1)])
def test_every_cell_comes_once_with_its_counts(adata, path, on_disk, minibatch, n):
    whole = csr_array(adata.X)
    counts = pb.Screen.from_store(path, **HOW).counts if on_disk else whole
    index = torch.randperm(1000)[:n]
    batches = list(shuffled(counts, index, minibatch))
    places = torch.cat([part for part, _ in batches])
    assert sorted(places.tolist()) == sorted(index.tolist())
    assert [len(part) for part, _ in batches] == [len(part) for part in torch.arange(n).split(minibatch)]
    for part, read in batches:
        np.testing.assert_array_equal(read.toarray(), whole[part.numpy()].toarray())


@pytest.mark.usefixtures("_small")
def test_neighbours_on_disk_are_mixed_and_the_order_follows_the_seed(path):
    counts = pb.Screen.from_store(path, **HOW).counts

    def order():
        return torch.cat([part for part, _ in shuffled(counts, torch.arange(1000), 50)])

    first, second = order(), order()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    third = order()
    torch.manual_seed(1)
    assert torch.equal(third, order())
    blocks = first[:50] // 16
    assert len(blocks.unique()) == 5  # a buffer of five blocks
    assert (first.diff() == 1).float().mean() < 0.1


@pytest.mark.slow
def test_a_fit_from_disk_learns_what_one_from_memory_does(adata, path):
    stored, in_memory = pb.Screen.from_store(path, **HOW), pb.Screen.from_anndata(adata, **HOW)

    def fitted(screen):
        return pb.fit(pb.node(screen, n_latent=2), screen, epochs=6, seed=0, progress=False)

    on_disk, whole = fitted(stored), fitted(in_memory)
    assert on_disk.losses["validation"][-1] == pytest.approx(whole.losses["validation"][-1], rel=2e-3)
    test = in_memory[:100]
    assert float(pb.log_density(on_disk, test).mean()) == pytest.approx(float(pb.log_density(on_disk, stored[:100]).mean()), rel=1e-3)


@pytest.mark.slow
def test_a_store_that_changes_during_a_fit_ends_it_with_one_error(path):
    stored = pb.Screen.from_store(path, **HOW)
    model = pb.node(stored, n_latent=1)

    def change(_fit):
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(StoreError, match=r"changed while it was in use"):
        pb.fit(model, stored, epochs=3, each_epoch=change, progress=False)
