"""Silence in baseline media (eqs 13-14): a difference from control that is held at 0, and tested at matched numbers of cells."""

import anndata
import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.model.assumptions.terms import rest_points


def test_silence_holds_the_condition_effect_in_baseline_media(screen, still):
    """The term is that of the predicted difference from control: measured nodes as they are, in log shares."""
    model, sites = still(screen, pb.SilentInBaseline())
    bound, effect = model.assumptions[0], model.condition_effect
    sites["condition_effect"] = torch.randn(len(effect.nodes), screen.n_genes, requires_grad=True)
    rows = effect.rows([effect.parts(p, model.vocabulary.time_scale) for p in bound.protocols])
    z = model.moved(sites, torch.as_tensor(rest_points(model, len(rows))), model.vocabulary.encode(bound.protocols)).z
    shares = [model.decoder(z, sites["gene_bias"] + extra).mean(0) for extra in (effect.total(sites["condition_effect"], rows), 0.0)]
    term = bound.term(model, sites)
    torch.testing.assert_close(term, bound.log_density(shares[0] - shares[1]).sum())
    assert torch.autograd.grad(term, sites["condition_effect"])[0].abs().max() > 1
    silent = sites | {"condition_effect": torch.zeros_like(sites["condition_effect"])}
    assert bool(term < bound.term(model, silent))


def test_silence_is_tested_at_matched_cell_numbers():
    """Effects in the other media only: many more changed genes there; the same in both: a ratio near 1."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for p in ("control", "A", "B", "C", "D"):
        for m in ("rest", "BMP4"):
            n = 300 if m == "rest" else 80
            rate = np.full(60, 5.0)
            if p != "control" and m == "BMP4":
                rate[rng.choice(60, 12, replace=False)] *= 3
            rows.append(rng.poisson(rate, (n, 60)))
            labels += [(p, m)] * n
    adata = anndata.AnnData(
        np.concatenate(rows).astype(float), obs={"perturbation": [p for p, _ in labels], "media": [m for _, m in labels]}
    )
    with pytest.warns(pb.ScreenWarning):
        screen = pb.Screen.from_anndata(
            adata, perturbation_type="knockout", media="media", baseline="rest", size_factor=np.ones(len(adata))
        )
    found = pb.SilentInBaseline().test(screen)
    assert found.interval[0] > 2
    assert found.power > 0.9


def test_few_pairs_do_not_seem_sure(screen):
    found = pb.SilentInBaseline(screen.perturbations[0]).test(screen)
    assert not found.testable
    assert "too few to know how far they differ" in repr(found)


def test_a_screen_without_perturbations_is_refused():
    screen = pb.simulate(n_cells=100, n_genes=6, n_perturbations=2, times=(1.0,), seed=1).screen
    with pytest.raises(ValueError, match="about perturbations, and this screen has none"):
        pb.node(screen[screen.cells_of("control")], 2, assumptions=[pb.SilentInBaseline()])


def test_one_media_alone_is_pointed_out():
    screen = pb.simulate(n_cells=100, n_genes=6, n_perturbations=2, times=(1.0,), seed=1).screen
    with pytest.warns(UserWarning, match="on a screen of one media, .* says that these perturbations do nothing at all"):
        pb.node(screen, 2, assumptions=[pb.SilentInBaseline()])
