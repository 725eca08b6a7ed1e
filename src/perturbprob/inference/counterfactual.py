"""What would these cells have shown under another protocol (eq 6): abduction, action, prediction."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import xarray as xr
from torch import Tensor

from perturbprob.dynamics.inverse import invert
from perturbprob.experiment.action import Action, Protocol
from perturbprob.experiment.screen import require_screen
from perturbprob.experiment.settings import is_within
from perturbprob.inference.caveats import say_apart
from perturbprob.inference.draws import GIVEN_CELLS, Sites, check_draws, global_draws, require_likelihood, seeded
from perturbprob.inference.escape import gone
from perturbprob.inference.predict import known_protocol
from perturbprob.model.cells import Cells, CellTable

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel

ROUTES = ("encoder", "inverse")


class IllConditioned(ValueError):
    """The flow cannot be run backward from what was measured: small errors in z(t) become large ones in z₀."""


@torch.no_grad()
def counterfactual(
    fit: "Fit",
    cells: "Screen",
    protocol: Protocol | Action,
    *,
    route: str = "encoder",
    n_draws: int = 50,
    level: float = 0.9,
    condition_bound: float = 100.0,
    minibatch: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return the log of the expected count of each cell and gene had these very cells gone through another protocol (eq 6).

    Of continuous values, the expected value itself.

    C(X_t, p, m) = F(F⁻¹(X_t, ·), p, m, t) in three steps: abduction of the rest state z₀ of each cell, action, prediction. Batch effect and
    size factor stay the cell's own. A Dataset over (cell, gene): ``mean``, ``sd``, and ``lower`` and ``upper``, the central interval of
    probability ``level`` of a normal law; ``n_draws`` draws of globals and z₀ are averaged as they come.

    ``route`` says how z₀ is found. "encoder": z₀ from q(z₀ | x, the cell's own protocol); it works for every structure but `stationary`.
    "inverse", for `node` and `causal_context` alone: the state z(t) is run backward to z₀ along the cell's own protocol. In gene space z(t)
    is measured, x − η^b with the noise of x, so this route alone tells rows apart: the other one starts all from the same known z₀. Of
    counts z(t) is what q(z₀ | x) leads to. Where the flow contracts, running backward is ill-conditioned, though back and forth again looks
    perfect; so the Dataset also holds, per cell, the ``condition_number`` of ∂z(t)/∂z₀ and ``round_trip``, the error of z₀ after forward
    and backward, and cells beyond ``condition_bound`` are refused with `IllConditioned`. Where no cell is, the two routes agree. Of a fit
    with ``penetrance`` a cell was hit or not as p(h | x) says, draw by draw, and under the other protocol it is hit.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> what = pb.counterfactual(fit, screen[screen.cells_of("control")], screen.conditions[-1], n_draws=4, progress=False)
    >>> what["mean"].dims
    ('cell', 'gene')
    """
    require_likelihood(fit, GIVEN_CELLS)
    check_draws(n_draws)
    if route not in ROUTES:
        raise ValueError(f"Unknown route {route!r}. Use one of {', '.join(map(repr, ROUTES))}.")
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")
    if route == "inverse" and not fit.model.transition.invertible:
        raise ValueError(f"{type(fit.model.transition).__name__} cannot run backward, so eq 6 has no inverse here. Use route='encoder'.")
    new = known_protocol(fit, protocol)
    own, other = CellTable(fit.model, cells), CellTable(fit.model, cells, [new] * len(cells.conditions))
    running = _running(fit, own, lambda index, _: other.cells(index), other.sites, route, n_draws, minibatch, seed, progress=progress)
    if route == "inverse":
        running.check(condition_bound)
    return running.dataset(cells, level, {"protocol": str(new), "route": route, "level": level, "n_draws": n_draws, "units": _units(fit)})


@torch.no_grad()
def translate(
    fit: "Fit",
    cells: "Screen",
    *,
    batch_to: str,
    batch_from: str | None = None,
    protocol: Protocol | Action | None = None,
    n_draws: int = 50,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return the log of the expected count of each cell and gene had these very cells been measured in another batch (eq 18).

    F_L(x^b', p, m, t, b' → b) = x^b_{m,t}: the rest state of each cell is found from what was seen in its own batch, carried through
    ``protocol`` (default: the cell's own), and measured in ``batch_to``: the name of a fitted batch, or "average", where η = 0: the mean
    over the fitted batches in log rate (eq 17). ``batch_from`` names the batch of the cells where their own label is not a fitted batch.
    The size factor stays the cell's own. A Dataset as that of `counterfactual`.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> pb.translate(fit, screen[:5], batch_to="batch2", n_draws=4, progress=False)["mean"].shape
    (5, 10)
    """
    require_likelihood(fit, GIVEN_CELLS)
    check_draws(n_draws)
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")
    names = fit.model.vocabulary
    code = -1 if batch_to == "average" else names.batch_code(batch_to)
    require_screen(cells)
    done = cells.conditions if protocol is None else [names.protocol(protocol)] * len(cells.conditions)
    say_apart(fit, done, [batch_to] * len(done))
    own = CellTable(fit.model, cells, batch=None if batch_from is None else names.batch_code(batch_from))
    other = CellTable(fit.model, cells, done, batch=code)

    def there(index: Tensor, here: Cells) -> Cells:
        """The cells in the other batch; under their own protocol, what they escaped they escape there too."""
        return other.cells(index) if protocol is not None else replace(here, batch=torch.full_like(here.batch, code))

    running = _running(fit, own, there, other.sites, "encoder", n_draws, 512, seed, progress=progress)
    attrs = {"batch_to": batch_to, "protocol": "own" if protocol is None else str(done[0]), "level": level, "n_draws": n_draws}
    return running.dataset(cells, level, attrs | {"units": _units(fit)})


def _units(fit: "Fit") -> str:
    """Say what the answers are."""
    return "log of the expected count of a cell" if fit.model.start is None else "as measured"


def _running(
    fit: "Fit",
    own: CellTable,
    there: Callable[[Tensor, Cells], Cells],
    completed: Callable[[Sites], Sites],
    route: str,
    n_draws: int,
    minibatch: int,
    seed: int,
    *,
    progress: bool,
) -> "_Running":
    """Carry every cell from what it is to what it might be, ``there``, draw by draw; ``completed`` adds the effects that happen there."""
    cells = own.screen
    running = _Running(cells.n_cells, cells.n_genes, cells.n_cells if route == "inverse" else 0)
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="cells" if progress else None)):
        with seeded(seed, k, 5):
            pair, parts = (own.sites(draw), completed(draw)), []
            for index in torch.arange(cells.n_cells).split(minibatch):
                here = gone(fit, own, pair[0], index)
                parts.append(_answer(fit, *pair, here, there(index, here), route))
            running.add(parts)
    return running


def _answer(fit: "Fit", own_sites: Sites, sites: Sites, own: Cells, other: Cells, route: str) -> tuple[Tensor, ...]:
    """Return one draw of the log rate of a minibatch under the other protocol, and how well its flow can be inverted."""
    model = fit.model
    z0 = fit.guide.rest(own).sample()
    checks: tuple[Tensor, ...] = ()
    if route == "inverse":
        z0, checks = _run_back(model, own_sites, own, z0)
    law = model.measured(sites, model.moved(sites, z0, other.protocol), other)
    return (law.mean if model.start is not None else law.log_rate, *checks)


def _run_back(model: "CellModel", sites: Sites, cells: Cells, z0: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the rest states that the cells' own flow came from, their condition numbers, and their error after forward and backward."""
    forward = lambda z: model.moved(sites, z, cells.protocol).z  # noqa: E731
    start = torch.zeros_like(z0) if model.start is None else z0
    if model.start is not None:
        z0 = invert(forward, model.seen_state(sites, cells).sample(), start=start).z0
    back = invert(forward, forward(z0), start=start)
    return back.z0, (back.condition_number, (back.z0 - z0).norm(dim=-1))


class _Running:
    """Mean and variance of log rates, draw by draw (Welford), and the worst condition of each cell."""

    def __init__(self, n_cells: int, n_genes: int, n_checked: int) -> None:
        """Start from nothing."""
        self.n, self.mean, self.squares = 0, torch.zeros(n_cells, n_genes), torch.zeros(n_cells, n_genes)
        self.condition, self.error = torch.zeros(n_checked), torch.zeros(n_checked)

    def add(self, parts: list[tuple[Tensor, ...]]) -> None:
        """Take in one draw of all cells."""
        value, *checks = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        self.n += 1
        step = value - self.mean
        self.mean += step / self.n
        self.squares += step * (value - self.mean)
        if checks:
            self.condition, self.error = (torch.maximum(old, new) for old, new in zip((self.condition, self.error), checks, strict=True))

    def check(self, bound: float) -> None:
        """Refuse cells whose flow cannot be run backward."""
        beyond = ~(self.condition <= bound)
        if beyond.any():
            raise IllConditioned(
                f"{int(beyond.sum())} of {len(beyond)} cells have a condition number of ∂z(t)/∂z₀ above {bound:g} (largest "
                f"{float(self.condition.max()):.3g}): an error of 0.01 in z(t) may move z₀ by {0.01 * float(self.condition.max()):.2g}, "
                "so running back says nothing. Use route='encoder', or cells measured earlier."
            )

    def dataset(self, cells: "Screen", level: float, attrs: dict[str, object]) -> xr.Dataset:
        """Name the result."""
        sd = (self.squares / (self.n - 1)).sqrt() if self.n > 1 else torch.full_like(self.squares, torch.nan)
        half = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))) * sd
        data = {"mean": self.mean, "sd": sd, "lower": self.mean - half, "upper": self.mean + half}
        arrays = {name: (("cell", "gene"), value.numpy()) for name, value in data.items()}
        checks = {"condition_number": self.condition, "round_trip": self.error}
        arrays |= {name: (("cell",), value.numpy()) for name, value in checks.items() if len(value)}
        return xr.Dataset(arrays, {"cell": list(cells.cells), "gene": list(cells.genes)}, attrs)
