"""Edited cells that escape: the ways that a cell may have gone, what each is worth, and what is refused."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import torch

import perturbprob as pb
from perturbprob.inference.draws import centre
from perturbprob.inference.elbo import Elbo
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide, TiedNormal, node_design
from perturbprob.model.penetrance import fold, ways


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Two knock-outs, two times, two batches, and two sgRNAs for each gene."""
    simulation = pb.simulate(n_cells=150, n_genes=8, n_perturbations=2, n_batches=2, seed=4)
    adata = simulation.adata.copy()
    gene = adata.obs["perturbation"].astype(str)
    adata.obs["sgrna"] = [f"{g}_{k % 2}" for k, g in enumerate(gene)]
    return pb.Screen.from_anndata(adata, media="media", time="time", batch="batch", sgrna="sgrna")


def test_a_cell_of_two_edits_may_have_gone_four_ways() -> None:
    found = ways(pb.Knockout("A") >> pb.Interference("B") >> pb.Wait(2))
    assert [hit for _, hit in found] == [(True, True), (True, False), (False, True), (False, False)]
    assert [p for p, _ in found] == [
        pb.Knockout("A") >> pb.Interference("B") >> pb.Wait(2),
        pb.Knockout("A") >> pb.Wait(2),
        pb.Interference("B") >> pb.Wait(2),
        pb.Protocol([pb.Wait(2)]),
    ]
    assert ways(pb.Protocol([pb.Wait(1)])) == [(pb.Protocol([pb.Wait(1)]), ())]


def test_folding_is_logsumexp_over_the_rows_of_each_cell() -> None:
    of = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    value = torch.tensor([[1000.0, 999.0, -5.0, 0.0, 1.0, -torch.inf, 2.0]] * 3).double()
    expected = [scipy.special.logsumexp(value[0, of == k]) for k in range(3)]
    np.testing.assert_allclose(fold(value, of), [expected] * 3, rtol=1e-12)


def test_unfolded_rows_are_the_cells_by_every_way(screen: pb.Screen) -> None:
    model = pb.node(screen, n_latent=2, penetrance=True)
    table = CellTable(model, screen)
    cells, rows = table.cells(torch.arange(40), total=400), table.unfolded(torch.arange(40), total=400)
    edited = torch.stack([s.perturbation for s in cells.protocol]).amax(0).any(-1)
    assert len(rows) == 40 + int(edited.sum())
    assert rows.total / len(rows) == pytest.approx(10, abs=0.2)  # each row stands for as many as each cell
    torch.testing.assert_close(rows.counts, cells.counts[rows.hits.of])
    marked = torch.stack([s.perturbation for s in rows.protocol]).amax(0).any(-1)
    torch.testing.assert_close(marked, rows.hits.hit.any(-1))
    law = model.penetrance.law({"penetrance": torch.tensor([0.9, 0.6])}, rows.hits)
    share = torch.zeros(40).index_add_(0, rows.hits.of, law.log_prob(rows.hits.hit).exp())
    torch.testing.assert_close(share, torch.ones(40))
    assert CellTable(pb.node(screen, n_latent=2), screen).unfolded(torch.arange(40)).hits is None


def test_the_loss_bounds_the_density_from_above_and_has_a_gradient_for_every_pi(screen: pb.Screen) -> None:
    model = pb.node(screen, n_latent=1, penetrance="sgrna")
    guide = Guide(model, node_design(model, screen))
    guide.start(model, screen)
    loss, rows = Elbo(model, guide), CellTable(model, screen).unfolded(torch.arange(screen.n_cells))
    loss(rows).backward()
    for name in ("penetrance", "sgrna_penetrance", "penetrance_concentration"):
        assert (guide.get_parameter(f"{name}_loc").grad.abs() > 0).all()
    assert guide.get_parameter("sgrna_penetrance_loc").shape == (4,)
    guide.sharpen()
    with torch.no_grad():
        from perturbprob.inference.density import importance

        many = fold(importance(model, guide, centre(model, guide), rows, 300), rows.hits.of).sum()
        bound = np.mean([-float(loss.between_cells(rows)) for _ in range(10)])
    assert bound < float(many)
    assert bound == pytest.approx(float(many), rel=0.1)


def test_pi_starts_at_its_prior_is_held_there_and_then_moves_fast(screen: pb.Screen) -> None:
    model = pb.node(screen, n_latent=1, penetrance=True)
    guide = Guide(model, node_design(model, screen))
    draws = torch.sigmoid(guide.penetrance_loc + guide.penetrance_log_scale.exp() * torch.randn(20_000, 2))
    assert draws.mean().item() == pytest.approx(2 / 3, abs=0.02)  # Beta(2, 1)
    assert draws.std().item() == pytest.approx(18**-0.5, abs=0.02)
    guide.hold(held=True)
    Elbo(model, guide)(CellTable(model, screen).unfolded(torch.arange(screen.n_cells))).backward()
    assert guide.penetrance_loc.grad is None
    assert guide.perturbation_effect_loc.grad is not None
    guide.hold(held=False)
    assert all(p.requires_grad for p in guide.parameters())
    fit = pb.fit(model, screen, epochs=2, warmup=1, validation=0.0, progress=False)
    steps = 2 * fit.settings["steps_per_epoch"]
    assert (fit.guide.penetrance_loc - 1).abs().max().item() > steps * fit.settings["learning_rate"]  # further than others can


def test_rows_of_one_cell_are_drawn_with_one_noise() -> None:
    of, loc = torch.tensor([0, 0, 1]), torch.tensor([[0.0, 1.0], [5.0, 1.0], [0.0, 0.0]])
    law = TiedNormal(dist.Normal(loc, torch.tensor([[1.0, 2.0], [1.0, 4.0], [1.0, 1.0]])), of)
    z = law.rsample((20_000,))
    torch.testing.assert_close((z[:, 0] - loc[0]) * torch.tensor([1.0, 2.0]), z[:, 1] - loc[1], rtol=1e-4, atol=1e-4)
    assert abs(float(torch.corrcoef(z[:, 1:, 0].T)[0, 1])) < 0.03
    torch.testing.assert_close(z.mean(0), loc, rtol=0, atol=0.1)
    torch.testing.assert_close(z.std(0), law.scale, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("gene", r"penetrance= is True, .* got 'gene'"), (1.0, "got 1.0"), (None, "got None")],
)
@pytest.mark.usefixtures("unchecked")
def test_other_kinds_are_refused(screen: pb.Screen, kind: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.node(screen, penetrance=kind)


def test_screens_in_which_nothing_can_escape_are_refused(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="single cells that escape, and a row of continuous values is a mean"):
        pb.node(screen.pseudobulk(), penetrance=True)
    with pytest.raises(ValueError, match="No cell of this screen is perturbed, so none can escape"):
        pb.node(screen[screen.cells_of("control")], penetrance=True)
    with pytest.raises(ValueError, match="edits 5 genes, and penetrance sums over each being hit or not, for at most 4"):
        ways(pb.Protocol([*(pb.Knockout(g) for g in "ABCDE"), pb.Wait(1)]))


def test_sgrnas_that_say_nothing_are_refused(screen: pb.Screen) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="needs to know the sgRNA of each cell: read the screen with sgrna="):
        pb.node(replace(screen, sgrna=None), penetrance="sgrna")
    with pytest.raises(ValueError, match=r"The sgRNA 'same' stands beside Knockout\('.*'\) and Knockout\('.*'\)"):
        pb.node(replace(screen, sgrna=np.full(screen.n_cells, "same", object)), penetrance="sgrna")


def test_distances_have_no_probabilities(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="objective='paths' has no probabilities, and penetrance is one"):
        pb.fit(pb.node(screen, 2, penetrance=True), screen, objective="paths", epochs=1, progress=False)
