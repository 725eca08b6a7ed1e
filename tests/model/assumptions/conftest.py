"""A small screen, and models of it in which something moves, or nothing does."""

from collections.abc import Callable

import pytest
import torch

import perturbprob as pb
from perturbprob.inference.draws import centre
from perturbprob.model.guide import Guide, node_design


@pytest.fixture(scope="package")
def screen() -> pb.Screen:
    """Three knock-outs, three media, three times."""
    return pb.simulate(
        n_cells=720, n_genes=8, n_perturbations=3, media=("rest", "BMP4", "TGFB1"), times=(1.0, 2.0, 3.0), n_batches=2, seed=2
    ).screen


@pytest.fixture
def make() -> Callable[..., tuple]:
    """Return what makes a model with assumptions, its global sites at their centre, and the terms."""

    def made(screen: pb.Screen, *assumptions: object, **how: object) -> tuple:
        model = pb.node(screen, 2 if screen.values == "counts" else None, n_hidden=8, assumptions=assumptions, **how)
        with torch.no_grad():
            model.transition.field.get_parameter(
                "field.network.2.weight" if any(isinstance(a, pb.UneditedStable) for a in assumptions) else "network.2.weight"
            ).normal_()
        sites = centre(model, Guide(model, node_design(model, screen)))
        sites["perturbation_effect"] = torch.randn_like(sites["perturbation_effect"])
        return model, sites

    return made


@pytest.fixture
def still(make: Callable[..., tuple]) -> Callable[..., tuple]:
    """Return what makes a model in which the latent state never moves, and its sites: what is left are the condition effects."""

    def made(screen: pb.Screen, assumption: object) -> tuple:
        model, sites = make(screen, assumption)
        with torch.no_grad():
            for parameter in model.transition.field.parameters():
                parameter.zero_()
        return model, sites | {name: torch.zeros_like(sites[name]) for name in ("perturbation_effect", "media_effect")}

    return made
