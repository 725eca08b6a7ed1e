"""Neural ODEs of many seeds at once: one `CellModel` in gene space whose field has a set of weights for each seed."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perturbprob.dynamics.hidden_layer import HiddenLayer
from perturbprob.dynamics.neural_ode import NeuralODE
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import CellState
from perturbprob.experiment.action import Protocol, Wait
from perturbprob.experiment.screen import Screen
from perturbprob.model.assumptions import SteadyState
from perturbprob.model.structures import node
from perturbprob.studies.time_course import TimeCourse


@final
class PushOfSeeds(nn.Module):
    """The field `Push` of a screen in one media, one set of weights for each seed: the first axis of every state is the seed."""

    def __init__(self, n_seeds: int, n_latent: int, n_hidden: int = 64) -> None:
        """Start every seed's weights as torch starts a linear layer's."""
        super().__init__()
        layers = [[nn.Linear(2 * n_latent, n_hidden), nn.Linear(n_hidden, n_latent)] for _ in range(n_seeds)]
        self.weight = nn.ParameterList([torch.stack([pair[k].weight.detach().T for pair in layers]) for k in range(2)])
        self.bias = nn.ParameterList([torch.stack([pair[k].bias.detach()[None] for pair in layers]) for k in range(2)])

    def forward(
        self,
        z: Float[Tensor, "seed cell latent"],
        perturbation: Float[Tensor, "seed cell latent"],
        media: Float[Tensor, "seed cell latent"],
        clock: Float[Tensor, "seed cell 1"],
    ) -> Float[Tensor, "seed cell latent"]:
        """Return the push of each seed; media, of which there is one, add nothing to it."""
        hidden = torch.tanh(torch.baddbmm(self.bias[0], torch.cat([z, perturbation], -1), self.weight[0]))
        return torch.baddbmm(self.bias[1], hidden, self.weight[1])

    def given(
        self,
        z0: Float[Tensor, "seed cell latent"],
        perturbation: Float[Tensor, "seed cell latent"],
        media: Float[Tensor, "seed cell latent"],
    ) -> HiddenLayer:
        """Return the push of each seed over one wait."""
        shift = torch.baddbmm(self.bias[0], torch.cat([z0, perturbation], -1), self.weight[0])
        return HiddenLayer(self.weight[0][:, : z0.shape[-1]], shift, self.weight[1], self.bias[1])


@final
@dataclass(frozen=True)
class Arm:
    """What networks are trained by: eq 5, and what is added to it or done otherwise.

    ``reading`` is that of eq 9 (`SteadyState`), None without it; ``wrong_set`` puts it on the hidden perturbations at their last visible
    time; ``known_errors`` measures errors in standard errors; ``decays`` lets the deviation decay; ``weight_decay`` is AdamW's.
    ``against`` names the arm that it is compared with, seed by seed.
    """

    reading: str | None = None
    wrong_set: bool = False
    known_errors: bool = False
    decays: bool = False
    weight_decay: float = 0.0
    against: str = "eq5"


@final
@dataclass(frozen=True, eq=False)
class Course:
    """The means of all perturbations and times: which are visible, which choose the step, and what is hidden.

    ``bulk`` holds the visible ones as a screen; ``visible`` and ``validation`` have a 1 where a mean is for that use; ``error`` holds
    standard errors, ``hidden`` are the means of the rows ``scored`` at the last time.
    """

    bulk: Screen
    perturbations: tuple[Protocol, ...]
    times: tuple[float, ...]
    mean: Float[Tensor, "perturbation time gene"]
    error: Float[Tensor, "perturbation time gene"]
    visible: Float[Tensor, "perturbation time"]
    validation: Float[Tensor, "perturbation time"]
    scored: Int[Tensor, " row"]
    hidden: Float[Tensor, "row gene"]

    @classmethod
    def of(cls, train: Screen, test: Screen, seed: int) -> "Course":
        """Read the visible means; a quarter of the perturbations that are seen to the end choose the step.

        Raises ValueError where one was not seen at a time before the last, or fewer than two are left to the end.
        """
        course, ends = TimeCourse.of(train, None), TimeCourse.of(test, None)
        for row in range(len(course.perturbations)):
            course.check_history(Protocol([*course.perturbations[row], Wait(course.times[-1])]))
        visible = torch.as_tensor(course.seen).float()
        last = np.flatnonzero(course.seen[:, -1] & (np.arange(len(course.perturbations)) > 0))
        if len(last) < 2:
            raise ValueError(f"{len(last)} perturbations are left to be seen at time {course.times[-1]:g}; two are needed. Hide fewer.")
        chosen = np.random.default_rng(seed).permutation(last)[: max(1, len(last) // 4)]
        validation = torch.zeros_like(visible)
        validation[chosen, -1] = 1
        rows = np.flatnonzero(ends.seen[:, ends.times.index(course.times[-1])])
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(course.variance / course.cells[..., None])
        return cls(
            train.pseudobulk(),
            tuple(map(Protocol, course.perturbations)),
            course.times,
            torch.as_tensor(np.nan_to_num(course.mean), dtype=torch.float32),
            torch.as_tensor(np.where(error > 0, error, np.nanmedian(error)), dtype=torch.float32),
            visible - validation,
            validation,
            torch.tensor([course.perturbations.index(ends.perturbations[k]) for k in rows]),
            torch.as_tensor(ends.mean[rows, -1], dtype=torch.float32),
        )


@final
class Networks(nn.Module):
    """The networks of one arm: a `CellModel` of the visible means, its sites points, with weights and marks for each seed."""

    def __init__(self, course: Course, n_seeds: int, start: str, arm: Arm) -> None:
        """Fill the model's slots; ``start`` is "control", or "own" for each perturbation's own first mean."""
        super().__init__()
        self.course, self.own, self.arm, n_genes = course, start == "own", arm, course.mean.shape[-1]
        model = node(course.bulk)
        solver = Solver(n_steps=1, check_every=100)
        model.transition = NeuralODE(n_genes, field=PushOfSeeds(n_seeds, n_genes), solver=solver, decays=arm.decays)
        if arm.decays:
            model.transition.decay_unconstrained = nn.Parameter(torch.zeros(n_seeds, 1, n_genes))
        self.model = model
        self.marks = nn.Parameter(0.1 * torch.randn(n_seeds, len(model.vocabulary.perturbations), n_genes))

    @property
    def sites(self) -> dict[str, Tensor]:
        """The global sites of the model: there is no media, bias, condition effect or learnt noise."""
        n_genes = self.marks.shape[-1]
        nothing = {"media_effect": self.marks[:, :0], "gene_bias": torch.zeros(n_genes), "condition_effect": torch.zeros(0, n_genes)}
        return {"perturbation_effect": self.marks, **nothing}

    @cached_property
    def start(self) -> Float[Tensor, "perturbation gene"]:
        """Where each perturbation starts."""
        return self.course.mean[:, 0] if self.own else self.model.start.expand(len(self.course.mean), -1)

    def path(self) -> Float[Tensor, "seed perturbation time gene"]:
        """Carry every perturbation once through all times."""
        times = self.course.times
        first = self.model.vocabulary.encode([p >> Wait(times[0]) for p in self.course.perturbations])[0]
        waits = (np.diff(times) / self.model.vocabulary.time_scale).tolist()
        later = [first.waiting(wait) for wait in waits]
        if self.own:  # the first time is where they start from
            later[0] = replace(first, wait=later[0].wait)
        z0 = self.start.expand(len(self.marks), -1, -1)
        states = [state.z for state in self.model.course(self.sites, z0, later if self.own else [first, *later])]
        return torch.stack([z0, *states] if self.own else states, 2)

    def loss(self, path: Float[Tensor, "seed perturbation time gene"]) -> Float[Tensor, " seed"]:
        """Return the loss of each seed."""
        visible = self.course.visible.clone()
        visible[:, 0] *= not self.own  # the first time is given
        if self.arm.known_errors:
            mean, error = (part.flatten(0, 1) for part in (self.course.mean, self.course.error))
            misfit = -self.model.law(self.sites, path.flatten(1, 2), error).log_prob(mean).reshape(path.shape)
        else:
            misfit = (path - self.course.mean).square()
        return _mean(misfit, visible) + (0.0 if self.arm.reading is None else self.rest(self.arm.reading))

    def rest(self, reading: str) -> Float[Tensor, " seed"]:
        """Return the mean squared error of the pairs of eq 9, from measured states."""
        course, wrong = self.course, self.arm.wrong_set
        rows = course.scored if wrong else torch.where(course.visible[:, -1] > 0)[0]
        at = -2 if wrong else -1
        steady = SteadyState(wait=course.times[-1] - course.times[-2], reading=reading)
        protocols = [course.perturbations[k] >> Wait(course.times[at]) for k in rows.tolist()]
        segment, origin = self.model.vocabulary.encode(protocols)[0], self.start[rows].expand(len(self.marks), -1, -1)
        state = replace(CellState.at_rest(origin, segment).marked(segment), delta=course.mean[rows, at] - origin)
        later, before = steady.ends(self.model, self.sites, protocols, state)
        return (later - before).square().mean((1, 2))

    def scores(self, path: Float[Tensor, "seed perturbation time gene"]) -> tuple[Float[Tensor, " seed"], Float[Tensor, " seed"]]:
        """Return the mean squared error of each seed on the hidden time, and on the validation conditions."""
        course = self.course
        hidden = (path[:, course.scored, -1] - course.hidden).square().mean((1, 2))
        return hidden, _mean((path - course.mean).square(), course.validation)


def _mean(misfit: Float[Tensor, "seed perturbation time gene"], weight: Float[Tensor, "perturbation time"]) -> Float[Tensor, " seed"]:
    """Return the mean over the entries of weight 1."""
    return (misfit.mean(-1) * weight).sum((1, 2)) / weight.sum()
