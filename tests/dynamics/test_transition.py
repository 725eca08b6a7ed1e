"""Carrying cells through protocols: the laws of P, M and W on the state."""

from dataclasses import replace
from functools import partial

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perturbprob.dynamics.neural_ode import NeuralODE, Push, Stable
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import CellState, Effects, Transition
from perturbprob.experiment.action import Knockout, Media, Protocol, Wait
from perturbprob.experiment.vocabulary import Segment, Vocabulary

N_LATENT = 3
A, B, M, N = Knockout("A"), Knockout("B"), Media("M"), Media("N")
VOCABULARY = Vocabulary(genes=("A", "B"), perturbations=(A, B), media=("M", "N"), batches=("batch",))
RANDOM = torch.Generator().manual_seed(0)
EFFECTS = Effects(*(torch.randn(2, N_LATENT, generator=RANDOM, dtype=torch.float64) for _ in range(2)))


def double(segment):
    """The segment in float64."""
    return Segment(segment.perturbation.double(), segment.media.double(), segment.changed, segment.wait.double())


def encode(*protocols):
    """Protocols as segments in float64."""
    return [double(segment) for segment in VOCABULARY.encode([Protocol() >> protocol for protocol in protocols])]


def transition(n_steps=4, field=None, **how):
    """A neural ODE in float64 with a field that matters, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NeuralODE(N_LATENT, field=field and field(), solver=Solver(n_steps=n_steps, **how)).double()


TRANSITIONS = {
    "push": partial(transition, 8, partial(Push, N_LATENT), tolerance=1e-6),
    "stable": partial(transition, 8, lambda: Stable(Push(N_LATENT)), tolerance=1e-6),
    "adaptive": partial(transition, field=partial(Push, N_LATENT), method="dopri5", tolerance=1e-6),
}
"""Every way of waiting, solved to about 1e-6. What stands here obeys the laws below; a new structure adds its own."""
each_transition = pytest.mark.parametrize("make", TRANSITIONS.values(), ids=TRANSITIONS)


def rest(n_cells):
    """Cells at rest, always the same ones."""
    return torch.randn(n_cells, N_LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def end(*protocols, move=None):
    """The state of one cell after each of the protocols, the same cell every time."""
    with torch.no_grad():
        return (move or transition())(rest(1).expand(len(protocols), -1), encode(*protocols), EFFECTS)


def assert_same(state, other, **tolerance):
    """Check that two states agree in everything."""
    for part in ("z0", "delta", "clock", "perturbation", "media"):
        torch.testing.assert_close(getattr(state, part), getattr(other, part), **tolerance)


steps = st.lists(st.sampled_from([A, B, M, N, Media(), Wait(0.3), Wait(1.0)]), max_size=6)  # a Protocol is made in the test itself


# Laws.


def test_perturbations_at_one_instant_commute_and_a_knockout_is_idempotent():
    segment = encode(A >> B)[0]
    state = CellState.at_rest(rest(1), segment)
    a, b = (replace(segment, perturbation=torch.tensor([mark], dtype=torch.float64)) for mark in ([1.0, 0.0], [0.0, 1.0]))
    assert_same(state.marked(a).marked(b), state.marked(b).marked(a))
    assert_same(state.marked(a).marked(a), state.marked(a))
    assert_same(state.marked(a).marked(b), state.marked(segment))
    assert not torch.equal(end(A >> Wait(1)).z, end(A >> B >> Wait(1)).z)


def test_a_perturbation_and_a_media_at_one_instant_commute():
    assert A >> M != M >> A
    assert_same(end(A >> M >> Wait(2)), end(M >> A >> Wait(2)), rtol=0, atol=0)


def test_order_matters_once_a_wait_stands_between():
    first, second = end(A >> Wait(1) >> M), end(M >> Wait(1) >> A)
    assert torch.equal(first.perturbation, second.perturbation)
    assert torch.equal(first.media, second.media)
    assert (first.z - second.z).abs().max() > 0.05


waits = st.sampled_from([0.1, 0.4, 1.0, 2.5])
laws = settings(deadline=None, max_examples=8, derandomize=True)
SOLVED = {"rtol": 1e-5, "atol": 1e-5}


def same_end(move, *protocols, **tolerance):
    """Carry one cell through each of two protocols, one at a time, and check that it ends in the same state."""
    assert_same(*(end(protocol, move=move) for protocol in protocols), **tolerance)


@each_transition
@laws
@given(st.lists(st.tuples(st.permutations([A, B, M]), waits), min_size=1, max_size=3))
def test_equal_protocols_give_equal_states(make, instants):
    """The normal form, and the actions of each instant in another order with waits of no time between."""
    plain = Protocol(action for actions, wait in instants for action in [*actions, Wait(wait)])
    wordy = Protocol(x for actions, wait in instants for action in [*sorted(actions, key=str), Wait(wait)] for x in (action, Wait(0)))
    assert Protocol([B, A, Wait(1)]) == Protocol([A, B, Wait(1)])
    same_end(make(), plain, plain.simplify(), rtol=0, atol=0)
    same_end(make(), plain, wordy, **SOLVED)


@each_transition
@laws
@given(steps, waits)
def test_a_knockout_done_twice_is_one(make, actions, wait):
    same_end(make(), Protocol([A, *actions, A, Wait(wait)]), Protocol([A, *actions, Wait(wait)]), **SOLVED)


@each_transition
@laws
@given(steps, waits, waits)
def test_two_waits_are_one_of_their_sum(make, actions, s, t):
    """Of protocols, which add waits up, and of states: a knock-out done again between the waits keeps them apart."""
    move, begun = make(), Protocol([A, *actions])
    assert move.semigroup
    same_end(move, begun >> Wait(s) >> Wait(t), begun >> Wait(s + t), **SOLVED)
    still, first = encode(Protocol())[0], encode(begun >> Wait(s))
    with torch.no_grad():
        apart = move(rest(1), [*first, replace(still, wait=torch.tensor([t], dtype=torch.float64))], EFFECTS)
    assert_same(apart, end(begun >> Wait(s + t), move=move), **SOLVED)


@each_transition
@laws
@given(steps, waits)
def test_what_means_nothing_leaves_the_state(make, actions, wait):
    """Wait(0) anywhere, baseline media for cells in it, and control, which is no action."""
    move, protocol = make(), Protocol([*actions, Wait(wait)])
    same_end(move, protocol >> Wait(0), protocol, **SOLVED)
    same_end(move, Protocol([Media(), *actions, Wait(wait)]), protocol, **SOLVED)
    same_end(move, Protocol() >> protocol, protocol, rtol=0, atol=0)


@each_transition
@laws
@given(steps, waits)
def test_a_perturbation_and_a_media_at_one_instant_give_one_state(make, actions, wait):
    before = Protocol([*actions, Wait(wait)])
    first, second = before >> B >> N >> Wait(wait), before >> N >> B >> Wait(wait)
    same_end(make(), first, second, rtol=0, atol=0)


@each_transition
@laws
@given(waits)
def test_control_in_baseline_media_stays_only_where_it_is_declared_stable(make, wait):
    move = make()
    moved = float(end(Protocol([Wait(wait)]), move=move).delta.abs().max())
    assert (moved < 1e-12) == isinstance(move.field, Stable)


def test_marks_alone_do_not_move_the_state():
    assert torch.equal(end(A >> M).delta, torch.zeros(1, N_LATENT, dtype=torch.float64))


def test_the_last_media_of_two_holds_and_baseline_takes_the_mark_away():
    assert end(M >> Wait(1) >> N).media.tolist() == [[0.0, 1.0]]
    assert end(M >> Wait(1) >> Media()).media.tolist() == [[0.0, 0.0]]
    assert end(M >> Wait(1) >> A).media.tolist() == [[1.0, 0.0]]


@settings(deadline=None, max_examples=20)
@given(steps)
def test_waiting_no_time_changes_nothing(actions):
    move, segments = transition(), encode(Protocol(actions))
    still = replace(
        segments[0], perturbation=0 * segments[0].perturbation, changed=torch.tensor([False]), wait=torch.zeros(1, dtype=torch.float64)
    )
    with torch.no_grad():
        assert_same(move(rest(1), [*segments, still], EFFECTS), move(rest(1), segments, EFFECTS), rtol=0, atol=0)


@pytest.mark.parametrize(("s", "t"), [(0.2, 0.2), (1.0, 2.0), (0.0, 1.5), (3.0, 0.1)])
def test_waits_compose(s, t):
    move, begin = transition(64), encode(A >> M)[0]
    assert move.semigroup
    still = replace(begin, perturbation=0 * begin.perturbation, changed=torch.tensor([False]))

    def wait(segment, time):
        return replace(segment, wait=torch.tensor([time], dtype=torch.float64))

    with torch.no_grad():
        apart = move(rest(1), [wait(begin, s), wait(still, t)], EFFECTS)
        together = move(rest(1), [wait(begin, s + t)], EFFECTS)
    assert together.delta.abs().max() > 0.05
    assert_same(apart, together, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(steps, min_size=1, max_size=5))
def test_cells_of_different_protocols_share_a_solve_and_do_not_see_each_other(lists):
    several = [Protocol(actions) for actions in lists]
    move, cells = transition(), rest(len(several))
    with torch.no_grad():
        together = move(cells, encode(*several), EFFECTS)
        for row, protocol in enumerate(several):
            alone = move(cells[[row]], encode(protocol), EFFECTS)
            one = CellState(*(getattr(together, part)[[row]] for part in ("z0", "delta", "clock", "perturbation", "media")))
            assert_same(one, alone, rtol=1e-9, atol=1e-9)


def test_draws_stand_before_cells_and_share_their_protocols():
    move, cells, segments = transition(), rest(6).reshape(3, 2, N_LATENT), encode(A >> Wait(1), M >> Wait(2))
    with torch.no_grad():
        together = move(cells, segments, EFFECTS)
        for draw in range(3):
            torch.testing.assert_close(together.z[draw], move(cells[draw], segments, EFFECTS).z)


class Pull(nn.Module):
    """A field that pushes by exactly what the marks add, ``clock`` times if it reads the clock."""

    def __init__(self, timed=False):
        super().__init__()
        self.timed = timed

    def forward(self, z, perturbation, media, clock):
        return (perturbation + media) * (clock if self.timed else 1) + 0 * z


def test_a_mark_stays_and_keeps_pushing_after_the_wait():
    move = transition(64, field=Pull)
    state, later = end(A >> Wait(1), move=move), end(A >> Wait(1) >> M >> Wait(1.5), move=move)
    assert later.perturbation.tolist() == state.perturbation.tolist() == [[1.0, 0.0]]
    gain = -torch.expm1(-move.decay)
    torch.testing.assert_close(state.delta[0], EFFECTS.perturbation[0] / move.decay * gain, rtol=1e-6, atol=0)
    target = (EFFECTS.perturbation[0] + EFFECTS.media[0]) / move.decay
    torch.testing.assert_close(later.delta[0], target + (state.delta[0] - target) * torch.exp(-1.5 * move.decay), rtol=1e-6, atol=0)


def test_a_field_that_reads_the_clock_finds_the_time_since_the_start():
    move = transition(64, field=partial(Pull, timed=True))
    later = end(A >> Wait(1) >> Media("M") >> Media() >> Wait(0.5) >> M >> Wait(1), move=move)
    assert later.clock.tolist() == [2.5]
    g, push = move.decay, EFFECTS.perturbation[0]
    # dδ/dt = p t − γ δ from 0 has δ(t) = p (t/γ − (1 − e^(−γ t)) / γ²)
    first = push * (1.5 / g + torch.expm1(-1.5 * g) / g**2)
    both = push + EFFECTS.media[0]
    begin, finish = (both * (t / g - 1 / g**2) for t in (1.5, 2.5))
    torch.testing.assert_close(later.delta[0], finish + (first - begin) * torch.exp(-g), rtol=1e-5, atol=1e-6)


class Wide(nn.Module):
    """A deep field of no special kind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(N_LATENT, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, N_LATENT), nn.Tanh())

    def forward(self, z, perturbation, media, clock):
        return self.layers(z + perturbation) + media * torch.sin(clock)


def test_any_module_is_a_field_and_learns():
    move = NeuralODE(N_LATENT, field=Wide()).double()
    move(rest(2), encode(A >> Wait(1), M >> Wait(2)), EFFECTS).z.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in move.parameters())


def test_a_transition_draws_no_random_values():
    trace = pyro.poutine.trace(transition()).get_trace(rest(3), encode(A >> Wait(1), M >> Wait(2) >> B, Protocol()), EFFECTS)
    assert [name for name, site in trace.nodes.items() if site["type"] in ("sample", "param")] == []
    before = torch.get_rng_state()
    end(A >> M >> Wait(3))
    assert torch.equal(torch.get_rng_state(), before)


class Leap(Transition):
    """Another way of waiting: jump by what the marks add, whatever the wait."""

    def wait(self, state, time, effects):
        return replace(state, delta=state.delta + state.perturbation @ effects.perturbation, clock=state.clock + time)


def test_a_transition_gives_its_wait_only():
    state = Leap()(rest(1), encode(A >> Wait(1) >> B >> Wait(2)), EFFECTS)
    torch.testing.assert_close(state.delta[0], 2 * EFFECTS.perturbation[0] + EFFECTS.perturbation[1])
    assert state.clock.tolist() == [3.0]


# Misuse.


def test_a_transition_without_a_wait_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Transition()
