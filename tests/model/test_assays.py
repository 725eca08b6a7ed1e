"""Several assays over one state: any subset of them in each cell, and nothing learnt from what is not there."""

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.sparse import csr_array

from perturbprob.experiment.assays import Assay
from perturbprob.experiment.screen import Screen
from perturbprob.experiment.simulate import Simulation, simulate
from perturbprob.inference.density import importance
from perturbprob.inference.draws import global_draws
from perturbprob.model.cell_model import CellModel
from perturbprob.model.cells import Cells, CellTable
from perturbprob.model.guide import Guide, node_design
from perturbprob.model.structures import node

N_CELLS = 60


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    """A small screen of RNA."""
    return simulate(n_cells=N_CELLS, n_genes=8, n_perturbations=2, n_batches=2, seed=2)


def read(simulation: Simulation, kind: str, n: int, seed: int, **arguments: object) -> Assay:
    """An assay of noise, in half of the cells."""
    adata, rng = simulation.adata.copy(), np.random.default_rng(seed)
    adata.obsm["x"] = 1 + rng.poisson(2, (N_CELLS, n))
    names = [adata.var_names[0], *(f"f{k}" for k in range(1, n))]
    return Assay.from_anndata(adata, kind=kind, obsm="x", features=names, present=rng.random(N_CELLS) < 0.5, **arguments)


@pytest.fixture(scope="module")
def screen(simulation: Simulation) -> Screen:
    """RNA, proteins and windows, all but the first in half of the cells; RNA is missing where both others are there."""
    both = {"protein": read(simulation, "protein", 4, 1), "atac": read(simulation, "chromatin", 6, 2, binary=True)}
    whole = simulation.screen.with_assays(both)
    present = ~(both["protein"].present & both["atac"].present)
    counts = csr_array(whole.counts.multiply(present[:, None]))
    counts.eliminate_zeros()
    return replace(whole, counts=counts, present=present)


@pytest.fixture(scope="module")
def model(screen: Screen) -> CellModel:
    """A model of the screen."""
    return node(screen, 3, n_hidden=16)


def every(model: CellModel, screen: Screen) -> Cells:
    """All cells."""
    return CellTable(model, screen).cells(torch.arange(screen.n_cells))


def noisy(screen: Screen) -> Screen:
    """The same screen with noise wherever a cell lacks an assay."""
    rng = np.random.default_rng(7)

    def filled(counts: csr_array, present: np.ndarray) -> csr_array:
        dense = counts.toarray()
        dense[~present] = rng.poisson(30, dense[~present].shape)
        return csr_array(dense)

    assays = {
        name: replace(a, counts=filled(a.counts, a.present), size_factor=np.where(a.present, a.size_factor, 7.0))
        for name, a in screen.assays.items()
    }
    assert screen.present is not None
    size_factor = np.where(screen.present, screen.size_factor, 9.0)
    return replace(screen, counts=filled(screen.counts, screen.present), size_factor=size_factor, assays=assays)


def loss(model: CellModel, screen: Screen) -> tuple[float, dict[str, torch.Tensor]]:
    """The ELBO of a guide started from the screen, and its gradient."""
    pyro.set_rng_seed(0)
    guide = Guide(model, node_design(model, screen))
    guide.start(model, screen)
    elbo = Trace_ELBO()(model, guide)
    value = elbo(every(model, screen))
    value.backward()
    return float(value.detach()), {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}


# Laws.


def test_noise_where_an_assay_is_missing_moves_nothing(screen: Screen) -> None:
    first, second = node(screen, 3, n_hidden=16), node(noisy(screen), 3, n_hidden=16)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    (one, gradient), (other, same) = loss(first, screen), loss(second, noisy(screen))
    assert one == other
    assert gradient.keys() == same.keys()
    assert all(torch.equal(gradient[name], same[name]) for name in gradient)
    assert all(torch.isfinite(value).all() for value in gradient.values())


def test_a_cell_without_an_assay_counts_as_if_there_were_none(screen: Screen, model: CellModel) -> None:
    sites = next(iter(global_draws(model, None, 1)))
    z = torch.randn(N_CELLS, 3)
    cells = every(model, screen)
    state = model.moved(sites, z, cells.protocol)
    found = {name: law.log_prob(counts).sum(-1) for name, law, counts in model.seen(sites, state, cells)}
    present = {"counts": screen.present, **{f"{name}_counts": assay.present for name, assay in screen.assays.items()}}
    assert found.keys() == present.keys()
    for name, value in found.items():
        assert (value[~torch.from_numpy(present[name])] == 0).all()
        assert (value[torch.from_numpy(present[name])] < 0).all()
    rna = model.measured(sites, state, cells).log_prob(cells.counts).sum(-1)
    none = ~(screen.assays["protein"].present | screen.assays["atac"].present)
    torch.testing.assert_close(sum(found.values())[torch.from_numpy(none)], rna[torch.from_numpy(none)])


def test_a_screen_without_the_assays_of_a_model_is_one_where_all_cells_lack_them(screen: Screen, model: CellModel) -> None:
    bare = screen.with_rna.with_assays({})
    masked = replace(screen.with_rna, assays={n: replace(a, present=np.zeros_like(a.present)) for n, a in screen.with_rna.assays.items()})
    guide = Guide(model, node_design(model, screen))
    sites = next(iter(global_draws(model, None, 1)))
    values = [importance(model, guide, sites, every(model, s), 4) for s in (bare, masked)]
    assert torch.equal(*values)
    assert torch.isfinite(values[0]).all()


def test_the_encoder_reads_what_is_there_and_whether_it_is(screen: Screen, model: CellModel) -> None:
    guide, cells = Guide(model, node_design(model, screen)), every(model, screen)
    mean = guide.rest(cells).mean
    seen = cells.assays["protein"]
    more = replace(cells, assays=cells.assays | {"protein": replace(seen, counts=seen.counts + 1)})
    moved = (guide.rest(more).mean != mean).any(-1)
    assert torch.equal(moved, seen.present)
    absent = replace(
        cells, assays=cells.assays | {"protein": replace(seen, counts=0 * seen.counts, present=torch.zeros_like(seen.present))}
    )
    empty = replace(cells, assays=cells.assays | {"protein": replace(seen, counts=0 * seen.counts)})
    assert torch.equal((guide.rest(absent).mean != guide.rest(empty).mean).any(-1), seen.present)


def test_the_sites_of_an_assay_stand_beside_those_of_rna(simulation: Simulation, screen: Screen, model: CellModel) -> None:
    def names(model: CellModel, screen: Screen) -> list[str]:
        trace = pyro.poutine.trace(model).get_trace(every(model, screen))
        return [name for name, site in trace.nodes.items() if site["type"] == "sample"]

    alone, several = names(node(simulation.screen, 3), simulation.screen), names(model, screen)
    assert [n for n in several if not n.startswith(("protein_", "atac_"))] == alone
    assert {"protein_counts", "protein_background", "protein_batch_effect", "atac_counts", "atac_coupling"} <= set(several)
    assert not any(n.startswith("assays") for n in node(simulation.screen, 3).state_dict())


def test_a_perturbation_of_one_gene_reaches_its_protein_alone(screen: Screen, model: CellModel) -> None:
    sites = dict(next(iter(global_draws(model, None, 1))))
    cells = every(model, screen)
    state = model.moved(sites, torch.randn(N_CELLS, 3), cells.protocol)
    before = [law for _, law, _ in model.seen(sites, state, cells)][1].base_dist.log_signal
    sites["gene_bias"] = sites["gene_bias"] + torch.tensor([2.0] + [0.0] * 7)
    after = [law for _, law, _ in model.seen(sites, state, cells)][1].base_dist.log_signal
    assert ((after - before)[:, 0] > 0).all()
    assert torch.equal(after[:, 1:], before[:, 1:])


# Misuse.


def test_screens_of_other_assays_are_refused(simulation: Simulation, screen: Screen, model: CellModel) -> None:
    with pytest.raises(ValueError, match=r"the assay 'protein', of which the model knows nothing.*with_assays"):
        CellTable(node(simulation.screen, 3), screen)
    other = simulation.screen.with_assays({"protein": read(simulation, "protein", 3, 1)})
    with pytest.raises(ValueError, match=r"not as the model knows it: features such as \['f3'\] are missing"):
        CellTable(model, other)
    counted = simulation.screen.with_assays({"atac": read(simulation, "chromatin", 6, 2)})
    with pytest.raises(ValueError, match="or binary differs"):
        CellTable(model, counted)
