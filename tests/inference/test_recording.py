"""A replay gives what the function gives, and what cannot be replayed is refused."""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import perturbprob as pb
from perturbprob.inference.elbo import Elbo
from perturbprob.inference.recording import NotRecordable, Recording
from perturbprob.measurement.counts import CountHead
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide, node_design


def parameters() -> list[Tensor]:
    """Three of them."""
    return [torch.linspace(-1, 1, n).requires_grad_() for n in (4, 3, 2)]


def both(function: Callable[[], list[Tensor]], recording: Recording, given: list[Tensor]) -> list[Any]:
    """Return results and gradients of function and replay at the same random numbers."""
    found = []
    for run in (function, recording):
        torch.manual_seed(7)
        values = run()
        total = sum((k + 1.0) * value.sum() for k, value in enumerate(values) if value.requires_grad)
        found.append([*values, *torch.autograd.grad(total, given, allow_unused=True)])
    return found


def test_at_other_values_and_random_numbers_it_gives_the_same_to_the_last_bit() -> None:
    x, w, _ = given = parameters()
    fixed = torch.ones(4)

    def function() -> list[Tensor]:
        noise = torch.randn(4)
        first, second = torch.cat([x.exp() * noise, w.clamp(min=0.2)]).split([4, 3])
        room = torch.zeros(4)
        return [first, (first.dot(fixed.log1p() + 1) + second.var()), w, room, first, torch.stack([w.sum(), noise.sum()])]

    recording = Recording(function, given)
    for _ in range(2):
        own, theirs = both(function, recording, given)
        for one, other in zip(own, theirs, strict=True):
            assert one is other is None or torch.equal(one, other)
        assert [value.requires_grad for value in own[:6]] == [value.requires_grad for value in theirs[:6]]
        with torch.no_grad():
            x += 1
            w *= -2
    assert theirs[-1] is None
    assert copy.deepcopy(recording) is recording


def test_a_parameter_that_is_held_gets_no_gradient() -> None:
    x, w, _ = given = parameters()
    recording = Recording(lambda: [x.square().sum() + w.square().sum()], given)
    w.requires_grad_(False)
    recording()[0].backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    assert w.grad is None


def test_a_parameter_that_is_frozen_stays_as_it_is() -> None:
    x, w, _ = given = parameters()
    w.requires_grad_(False)
    recording = Recording(lambda: [x.sum() * w.sum()], given)
    for one, other in zip(*both(lambda: [x.sum() * w.sum()], recording, [x]), strict=True):
        assert torch.equal(one, other)


def test_the_parameters_are_left_as_they_were() -> None:
    given = parameters()
    Recording(lambda: [value.square().sum() for value in given], given)
    assert all(torch.equal(one, other) for one, other in zip(given, parameters(), strict=True))


def test_what_it_returns_can_be_written_over() -> None:
    recording = Recording(lambda: [torch.zeros(2)], parameters())
    recording()[0].add_(1)
    assert torch.equal(recording()[0], torch.zeros(2))


def test_random_numbers_of_others_are_left_alone() -> None:
    x, *_ = given = parameters()
    before = torch.get_rng_state()
    recording = Recording(lambda: [x * torch.randn(4)], given)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(recording()[0], recording()[0])


class _Seen:
    """Something that a function remembers."""

    n = 0


STEPS = torch.zeros(4)


def _counting(x: Tensor) -> list[Tensor]:
    _Seen.n += 1
    return [_Seen.n * x]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * 2 if float(x.sum()) > 0 else x],  # decides by a value
        lambda x: [x * torch.from_numpy(x.detach().numpy() * torch.rand(4).numpy())],  # goes behind torch's back
        lambda x: [x * 2 if x.tolist()[0] == -1 else x],
        lambda x: [x * torch.from_numpy(x.detach().numpy().copy())],
        lambda x: [x[x > -1.0].mean()],  # a shape that depends on values
        lambda x: [x * torch.zeros(4).copy_(x)],  # writes over what was there before
        lambda x: [torch.mul(x.detach().exp(), 2, out=torch.empty(4)) * x],
        lambda x: [x * STEPS.add_(1)],
        _counting,
    ],
)
def test_what_cannot_be_replayed_is_refused(function: Callable[[Tensor], list[Tensor]]) -> None:
    x, *_ = given = parameters()
    with pytest.raises(NotRecordable):
        Recording(lambda: function(x), given)


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Two media, two times, four batches of two laboratories."""
    return pb.simulate(n_cells=150, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0, 2.0), n_batches=4, seed=4).screen


@pytest.mark.parametrize(
    "make",
    [
        partial(pb.node, n_latent=2),
        partial(pb.vae, n_latent=2, measurement="zero_inflated_negative_binomial"),
        partial(pb.vae, n_latent=2, shift="sparse", measurement="poisson"),
        partial(pb.neural_sde, n_latent=2, n_steps=3),
        partial(pb.causal_context, n_latent=2),
        partial(pb.node, n_latent=2, penetrance=True),
        partial(pb.node, n_latent=2, batch_effect="state", assumptions=[pb.UneditedStable(), pb.SteadyState()]),
    ],
)
def test_the_losses_of_every_structure_are_the_same_recorded_or_not(make: Callable[[pb.Screen], pb.CellModel], screen: pb.Screen) -> None:
    losses = []
    for recorded in (True, False):
        pyro.set_rng_seed(3)
        model = make(screen)
        elbo, table = Elbo(model, Guide(model, node_design(model, screen))), CellTable(model, screen)
        elbo.guide.start(model, screen)
        if recorded:
            elbo.record()
        assert (elbo._recording is not None) == recorded
        optimiser, cells = torch.optim.Adam(elbo.parameters(), lr=1e-2), table.unfolded(torch.arange(0, screen.n_cells, 3), screen.n_cells)
        for held in (True, True, False, False):
            elbo.guide.hold(held=held)
            optimiser.zero_grad()
            loss = elbo(cells)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        losses.append(float(elbo.between_cells(cells).detach()))
    assert losses[:5] == losses[5:]


def test_a_training_is_the_same_recorded_or_not(screen: pb.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses, made = pb.node(screen, n_latent=2), [], []
    record = Elbo.record
    monkeypatch.setattr(Elbo, "record", lambda self: (made.append(self), record(self)))
    for worth in (1, 1000):
        monkeypatch.setattr(import_module("perturbprob.inference.fit"), "WORTH_RECORDING", worth)
        losses.append(pb.fit(model, screen, epochs=4, minibatch=75, progress=False).losses)
    assert len(made) == 1
    assert losses[0] == losses[1]


def test_a_fit_is_fitted_further_and_what_is_frozen_stays(screen: pb.Screen) -> None:
    first = pb.fit(pb.vae(screen, n_latent=2), screen, epochs=2, minibatch=75, progress=False)
    again = pb.fit(first.model, screen, epochs=15, minibatch=75, progress=False)  # its parameters are frozen
    assert again.losses["train"][-1] < again.losses["train"][0]
    model = pb.vae(screen, n_latent=2)
    model.decoder.requires_grad_(False)
    fit = pb.fit(model, screen, epochs=15, minibatch=75, progress=False)
    for one, other in zip(fit.model.decoder.parameters(), model.decoder.parameters(), strict=True):
        assert torch.equal(one, other)


class ByValue(CountHead):
    """A head of a user's, whose prior depends on what was drawn."""

    sites = ()

    def globals(self) -> dict[str, Tensor]:
        """Sample a number that is used nowhere."""
        first = pyro.sample("first", pyro.distributions.Normal(self.zero[0], 1.0))
        pyro.sample("second", pyro.distributions.Normal(self.zero[0] + (1.0 if first > 0 else -1.0), 1.0))
        return {}


def test_a_model_that_cannot_be_recorded_is_run(screen: pb.Screen) -> None:
    model = pb.vae(screen, n_latent=2, measurement="poisson")
    model.measurement = ByValue(screen.n_genes)
    elbo = Elbo(model, Guide(model, node_design(model, screen)))
    elbo.record()
    assert elbo._recording is None
    assert torch.isfinite(elbo(CellTable(model, screen).cells(torch.arange(20), screen.n_cells)))
