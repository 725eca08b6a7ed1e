"""Distances between sets of cells: laws, references by formula and scipy, gradients by finite differences, blocks, errors."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perturbprob.measurement import (
    DISTANCES,
    Distance,
    default_bandwidth,
    energy,
    mmd,
    moment,
    pairs,
    random_matching,
)

every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
every_function = pytest.mark.parametrize("distance", [*DISTANCES.values(), random_matching], ids=[*DISTANCES, "random_matching"])


def cells(n_cells: int, n_genes: int = 3, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal cells in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n_cells, n_genes, dtype=torch.float64, generator=generator) + shift


X, Y = cells(12), cells(17, seed=1, scale=1.5, shift=0.5)


def gradient(distance: Distance, x: Tensor, y: Tensor, **settings: float | Tensor) -> Tensor:
    """Gradient of a distance in its first set."""
    x = x.clone().requires_grad_()
    distance(x, y, **settings).backward()
    return x.grad


# laws


@every_distance
def test_identical_sets_are_at_distance_zero_in_any_order(distance: Distance) -> None:
    assert distance(X, X).item() == pytest.approx(0, abs=1e-12)
    assert distance(X, X.flip(0)).item() == pytest.approx(0, abs=1e-12)


@every_distance
def test_identical_sets_have_no_gradient(distance: Distance) -> None:
    torch.testing.assert_close(gradient(distance, X, X.clone()), torch.zeros_like(X), rtol=0, atol=1e-7)


@every_distance
def test_it_is_symmetric_and_positive(distance: Distance) -> None:
    assert distance(X, Y) > 0
    torch.testing.assert_close(distance(X, Y), distance(Y, X), rtol=1e-9, atol=0)


@every_distance
@pytest.mark.parametrize("seed", range(5))
def test_it_is_not_negative_for_sets_of_one_law(distance: Distance, seed: int) -> None:
    assert distance(cells(9, seed=seed), cells(14, seed=seed + 100)) >= 0


@every_distance
def test_order_and_copies_of_all_cells_do_not_count(distance: Distance) -> None:
    expected = distance(X, Y)
    torch.testing.assert_close(distance(X.flip(0), Y.roll(3, 0)), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(distance(X.repeat(2, 1), Y.repeat(3, 1)), expected, rtol=1e-9, atol=0)


@every_distance
def test_a_common_shift_does_not_count(distance: Distance) -> None:
    torch.testing.assert_close(distance(X + 1e3, Y + 1e3), distance(X, Y), rtol=1e-7, atol=0)


@every_distance
def test_it_keeps_the_precision_of_the_cells_and_is_accurate_in_float32(distance: Distance) -> None:
    single = distance(X.float() + 100, Y.float() + 100)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), distance(X, Y), rtol=1e-4, atol=0)


@every_distance
@pytest.mark.parametrize("n_cells", [1, 2])
def test_coinciding_cells_and_sets_of_one_have_a_finite_gradient(distance: Distance, n_cells: int) -> None:
    x = torch.full((n_cells, 3), 0.1)
    for y in (x.clone(), x[:1] + 1, torch.cat([x, x + 1])):
        assert distance(x, y).isfinite()
        assert gradient(distance, x, y).isfinite().all()


@every_distance
def test_descending_its_gradient_moves_one_set_onto_the_other(distance: Distance) -> None:
    x = X.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        distance(x, Y).backward()
        optimiser.step()
    assert distance(x.detach(), Y) < 0.2 * distance(X, Y)


# weights

COPIES, OTHER_COPIES = torch.arange(12) % 3, 1 + torch.arange(17) % 2


@every_distance
def test_a_weight_is_a_number_of_copies(distance: Distance) -> None:
    expected = distance(X.repeat_interleave(COPIES, 0), Y.repeat_interleave(OTHER_COPIES, 0))
    found = distance(X, Y, x_weights=0.1 * COPIES, y_weights=7.0 * OTHER_COPIES)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(distance(X, Y, x_weights=torch.ones(12)), distance(X, Y), rtol=1e-12, atol=0)


@every_distance
def test_gradient_in_cells_and_weights_is_that_of_finite_differences(distance: Distance) -> None:
    settings = {"sinkhorn": {"blur": 0.8, "tolerance": 1e-11, "n_iterations": 20_000}, "mmd": {"bandwidth": 1.3}}
    x, y = X[:3, :2].clone().requires_grad_(), Y[:4, :2].clone().requires_grad_()
    w, v = torch.tensor([0.2, 0.5, 0.4]).double().requires_grad_(), torch.tensor([1.0, 2.0, 3.0, 0.5]).double().requires_grad_()

    def weighted(*given: Tensor) -> Tensor:
        """All four as arguments."""
        return distance(*given[:2], x_weights=given[2], y_weights=given[3], **settings.get(distance.__name__, {}))

    assert torch.autograd.gradcheck(weighted, (x, y, w, v), rtol=1e-5, atol=1e-8)


@every_distance
def test_a_cell_of_weight_zero_counts_for_nothing_and_is_not_moved(distance: Distance) -> None:
    x, weights = torch.cat([X, X[:1] + 9]).requires_grad_(), torch.ones(13, dtype=torch.double)
    weights[-1] = 0
    weights.requires_grad_()
    found = distance(x, Y, x_weights=weights)
    found.backward()
    torch.testing.assert_close(found.detach(), distance(X, Y), rtol=1e-6, atol=0)
    assert (x.grad[-1] == 0).all()
    assert weights.grad.isfinite().all()


# blocks


@every_distance
def test_blocks_change_neither_value_nor_gradient_and_hold_few_pairs(distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = cells(150), cells(200, seed=1, scale=1.5)
    weights = 1 + torch.arange(150) / 150
    values, gradients, largest, kept = [], [], [], []
    for n_pairs in (10**6, 1000):
        monkeypatch.setattr(pairs, "HELD", n_pairs)
        monkeypatch.setattr(pairs, "BLOCK", n_pairs)
        given, share = x.clone().requires_grad_(), weights.clone().requires_grad_()
        saved: list[int] = []
        with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            value = distance(given, y, x_weights=share)
            largest.append(seen.n)
            kept.append(sum(saved))
            value.backward()
        values.append(value.detach())
        gradients.append(torch.cat([given.grad.ravel(), share.grad.double()]))
        largest[-1] = max(largest[-1], seen.n)
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    if distance not in (moment, mmd):  # the median of mmd looks at a bounded number of pairs at once
        assert largest[0] >= 150 * 150
        assert largest[1] <= 1000
    if distance is not moment:
        assert kept[1] < 20_000 < kept[0]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes; views that repeat values hold none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.n = max([self.n, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_contiguous())])
        return result


# moment


def test_moment_adds_squared_differences_of_means_and_variances() -> None:
    x, y = X.numpy(), Y.numpy()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + ((x.var(0) - y.var(0)) ** 2).sum()
    assert moment(X, Y).item() == pytest.approx(expected, rel=1e-12)


def test_moment_is_blind_to_covariance_and_energy_is_not() -> None:
    line = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    other = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    assert moment(line, other) == 0
    assert energy(line, other) > 0.5


# energy


def powers(x: np.ndarray, y: np.ndarray, exponent: float) -> np.ndarray:
    """Distances of all pairs to a power, by the formula."""
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)) ** exponent


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_energy_is_its_formula(exponent: float, unbiased: bool) -> None:
    x, y = X.numpy(), Y.numpy()
    n_x, n_y = len(x), len(y)
    within_x = powers(x, x, exponent).sum() / (n_x * (n_x - unbiased))
    within_y = powers(y, y, exponent).sum() / (n_y * (n_y - unbiased))
    expected = 2 * powers(x, y, exponent).mean() - within_x - within_y
    assert energy(X, Y, exponent=exponent, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-10)


def test_energy_in_one_gene_is_the_square_of_scipys() -> None:
    x, y = X[:, :1], Y[:, :1]
    # scipy returns √(2 ∫ (F − G)²), and 2 ∫ (F − G)² = 2 E|X − Y| − E|X − X'| − E|Y − Y'|
    expected = stats.energy_distance(x.ravel().numpy(), y.ravel().numpy()) ** 2
    assert energy(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_squared_energy_sees_means_only() -> None:
    wider = X.mean(0) + 3 * (X - X.mean(0))
    assert energy(X, wider, exponent=2.0).item() == pytest.approx(0, abs=1e-10)
    assert energy(X, wider) > 0.1
    twice = 2 * (X.mean(0) - Y.mean(0)).square().sum()
    torch.testing.assert_close(energy(X, Y, exponent=2.0), twice, rtol=1e-10, atol=0)


def test_unbiased_energy_is_zero_on_average_for_one_law() -> None:
    values = torch.stack([energy(cells(6, seed=i), cells(5, seed=i + 1000), unbiased=True) for i in range(400)])
    assert values.min() < 0
    assert abs(values.mean()) < 4 * values.std() / 20


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradient_of_energy_is_that_of_finite_differences(exponent: float, unbiased: bool) -> None:
    x, y = X[:4].clone().requires_grad_(), Y[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: energy(a, b, exponent=exponent, unbiased=unbiased), (x, y))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_gradient_of_energy_is_finite_and_exact_beside_coinciding_cells(exponent: float) -> None:
    # one cell of y lies on a cell of x: the pair itself pulls nowhere, all others as before
    y = torch.cat([Y, X[:1]])
    expected = np.zeros(3)
    for other, weight in [(Y, 2 / (12 * 18)), (X[1:], -2 / 144)]:
        away = (X[0] - other).numpy()
        expected += weight * exponent * (np.linalg.norm(away, axis=1, keepdims=True) ** (exponent - 2) * away).sum(0)
    np.testing.assert_allclose(gradient(energy, X, y, exponent=exponent)[0].numpy(), expected, rtol=1e-8)


def test_weighted_energy_in_one_gene_is_the_square_of_scipys() -> None:
    x, y, w, v = X[:, 0], Y[:, 0], torch.arange(1.0, 13), torch.arange(17.0) % 4
    expected = stats.energy_distance(x.numpy(), y.numpy(), w.numpy(), v.numpy()) ** 2
    assert energy(x[:, None], y[:, None], x_weights=w, y_weights=v).item() == pytest.approx(expected, rel=1e-10)


# mmd


@pytest.mark.parametrize("bandwidth", [0.4, 1.0, 5.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_and_its_gradient_are_their_formulas(bandwidth: float, unbiased: bool) -> None:
    x, y = X.numpy(), Y.numpy()
    own, other, between = (np.exp(-powers(a, b, 2.0) / (2 * bandwidth**2)) for a, b in ((x, x), (y, y), (x, y)))
    n_x, n_y = len(x), len(y)
    expected = (own.sum() - n_x * unbiased) / (n_x * (n_x - unbiased)) + (other.sum() - n_y * unbiased) / (n_y * (n_y - unbiased))
    assert mmd(X, Y, bandwidth=bandwidth, unbiased=unbiased).item() == pytest.approx(expected - 2 * between.mean(), rel=1e-10)
    by_own = -2 * (own[..., None] * (x[:, None] - x[None])).sum(1) / (n_x * (n_x - unbiased))
    slope = (by_own + 2 * (between[..., None] * (x[:, None] - y[None])).sum(1) / (n_x * n_y)) / bandwidth**2
    np.testing.assert_allclose(gradient(mmd, X, Y, bandwidth=bandwidth, unbiased=unbiased).numpy(), slope, rtol=1e-9, atol=1e-14)


def test_the_bandwidth_is_the_median_distance_between_the_sets() -> None:
    x, y = X[:11], Y
    expected = float(np.median(powers(x.numpy(), y.numpy(), 1.0)))
    assert default_bandwidth(x, y) == pytest.approx(expected)
    assert default_bandwidth(7 * x + 30, 7 * y + 30) == pytest.approx(7 * expected)
    assert mmd(x, y) == mmd(x, y, bandwidth=default_bandwidth(x, y))
    assert default_bandwidth(x.repeat(200, 1), y.repeat(200, 1)) == pytest.approx(expected, rel=0.05)
    assert default_bandwidth(x[:1], torch.cat([x[:1]] * 3 + [x[1:2]])) == pytest.approx(float((x[0] - x[1]).norm()))
    assert default_bandwidth(x[:1], x[:1]) == 1.0


def test_unbiased_mmd_is_zero_on_average_for_one_law() -> None:
    values = torch.stack([mmd(cells(6, seed=i), cells(5, seed=i + 1000), bandwidth=1.0, unbiased=True) for i in range(400)])
    assert values.min() < 0
    assert abs(values.mean()) < 4 * values.std() / 20


# random matching


def test_random_matching_is_the_cost_of_some_pairing() -> None:
    x = X[:4]
    costs = powers(x.numpy(), x.numpy(), 2.0)
    every = [np.mean(costs[range(4), order]) for order in itertools.permutations(range(4))]
    found = [random_matching(x, x, seed=seed).item() for seed in range(60)]
    assert all(np.isclose(one, every).any() for one in found)
    assert len({round(one, 9) for one in found}) > 10
    assert random_matching(x, x, seed=3).item() == found[3]


@pytest.mark.parametrize("weighted", [False, True])
def test_random_matching_is_right_on_average_and_never_below_optimal_transport(weighted: bool) -> None:
    ot = pytest.importorskip("ot")
    w, v = (torch.arange(1.0, 13), torch.arange(17.0)) if weighted else (torch.ones(12), torch.ones(17))
    values = torch.stack([random_matching(X, Y, x_weights=w, y_weights=v, seed=seed) for seed in range(800)])
    costs, a, b = powers(X.numpy(), Y.numpy(), 2.0), (w / w.sum()).double().numpy(), (v / v.sum()).double().numpy()
    assert values.mean().item() == pytest.approx(a @ costs @ b, abs=4 * float(values.std()) / 800**0.5)
    if not weighted:
        assert random_matching(X, X.flip(0)) >= ot.emd2(a, a, powers(X.numpy(), X.numpy(), 2.0))


@pytest.mark.parametrize(("n_x", "n_y"), [(5, 12), (12, 5), (7, 7), (1, 9)])
def test_random_matching_uses_the_cells_of_the_smaller_set_equally_often(n_x: int, n_y: int) -> None:
    # all differences are 1, so the gradient counts the pairs of each cell
    x, y = torch.ones(n_x, 1, dtype=torch.double, requires_grad=True), torch.zeros(n_y, 1, dtype=torch.double, requires_grad=True)
    random_matching(x, y, seed=1).backward()
    n_pairs = max(n_x, n_y)
    for grad, n_cells in ((x.grad, n_x), (-y.grad, n_y)):
        uses = (grad.ravel() * n_pairs / 2).round()
        assert uses.sum() == n_pairs
        assert uses.min() >= n_pairs // n_cells
        assert uses.max() <= -(-n_pairs // n_cells)


def test_random_matching_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    random_matching(X, Y)
    assert torch.equal(state, torch.get_rng_state())


# misuse


@every_distance
@pytest.mark.usefixtures("unchecked")
def test_sets_of_other_genes_are_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match="x has 3 genes and y has 2: give both the same genes"):
        distance(X, Y[:, :2])


@every_distance
def test_an_empty_set_is_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match=r"y is empty, with shape \(0, 3\): give at least one cell"):
        distance(X, Y[:0])


@every_distance
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted_and_placed(distance: Distance, value: float) -> None:
    x = X.clone()
    x[2, 1] = x[3, 0] = value
    with pytest.raises(ValueError, match="x holds NaN or infinity in 2 places, the first in cell 2, gene 1"):
        distance(x, Y)


@every_distance
@pytest.mark.usefixtures("unchecked")
def test_a_tensor_that_is_no_set_of_cells_is_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3,\): give a set of cells"):
        distance(X[0], Y)


@pytest.mark.parametrize("exponent", [0.0, -1.0, 2.5, float("nan")])
def test_an_exponent_that_gives_no_distance_is_named(exponent: float) -> None:
    with pytest.raises(ValueError, match=f"exponent must be above 0 and at most 2, and is {exponent}"):
        energy(X, Y, exponent=exponent)


@pytest.mark.parametrize("distance", [energy, mmd])
def test_an_unbiased_distance_needs_two_cells(distance: Distance) -> None:
    with pytest.raises(ValueError, match="x has 1 cell of positive weight, and unbiased=True needs two"):
        distance(X[:1], Y, unbiased=True)
    with pytest.raises(ValueError, match="y has 1 cell of positive weight, and unbiased=True needs two"):
        distance(X, Y[:2], y_weights=torch.tensor([0.0, 3.0]), unbiased=True)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_no_length_is_named(bandwidth: float) -> None:
    with pytest.raises(ValueError, match=f"bandwidth must be a positive length, and is {bandwidth}"):
        mmd(X, Y, bandwidth=bandwidth)


@every_function
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -2.0, 1.0], r"x_weights is -2 for cell 1 \(counted from 0\): give finite weights from 0"),
        ([1.0, 1.0, float("nan")], "x_weights is nan for cell 2"),
        ([0.0, 0.0, 0.0], "x_weights are all 0: give at least one cell a positive weight"),
    ],
)
def test_weights_that_weigh_nothing_are_named(distance: Distance, weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(X[:3], Y, x_weights=torch.tensor(weights))


@every_function
@pytest.mark.usefixtures("unchecked")
def test_weights_of_other_cells_are_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match=r"y_weights has shape \(12,\) and y has 17 cells: give one weight for each"):
        distance(X, Y, y_weights=torch.ones(12))
