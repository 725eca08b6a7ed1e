"""What a fit owes to its assumptions: refit without each, and see what moves."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
import xarray as xr

from perturbprob.experiment.screen import require_screen
from perturbprob.inference.draws import require_fit
from perturbprob.inference.fit import Fit
from perturbprob.inference.fit import fit as refit
from perturbprob.inference.predict import predict
from perturbprob.model.filling import again

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.assumptions import Assumption

_TRAINING = ("epochs", "minibatch", "learning_rate", "validation", "patience", "warmup", "objective", "distance")


@final
@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What moves without each assumption.

    ``table`` is a Dataset over (assumption, condition): ``change``, the root-mean-square change over genes of the log of the predicted
    mean (of continuous values, of the value); ``in_deviations``, the same in posterior standard deviations of the full fit; ``gene``, the
    one that moves most; and over (assumption,) ``validation``, by how much the loss of the validation cells rises without it, NaN
    where no cell was held out. ``noise`` is the change between two fits that differ in their seed alone: less than that says nothing.
    """

    table: xr.Dataset

    def report(self) -> str:
        """Say it in words."""
        noise = f"another seed alone moves predictions by {float(self.table['noise'].mean()):.2f} {self._unit}."
        return "\n".join([*(self._line(str(name)) for name in self.table["assumption"].values), noise])

    @property
    def _unit(self) -> str:
        """The unit of movements: a fit by objective="paths" has no deviations."""
        return "posterior deviations" if self.table["in_deviations"].notnull().all() else "in log mean"

    def _line(self, name: str) -> str:
        """Say what one assumption does."""
        part = self.table.sel(assumption=name)
        moved = part["change" if self._unit == "in log mean" else "in_deviations"]
        worst = part.isel(condition=int(moved.values.argmax()))
        words = (
            f"without {name}: predictions move by {float(moved.mean()):.2f} {self._unit}, most in "
            f"{worst['condition'].item()} ({float(moved.max()):.2f}, {worst['gene'].item()})"
        )
        loss = float(part["validation"])
        return f"{words}; validation loss {loss:+.5f} per cell and gene." if np.isfinite(loss) else f"{words}; no cell was held out."

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


def sensitivity(fit: "Fit", screen: "Screen | None" = None, *, n_draws: int = 50, seed: int = 0, progress: bool = True) -> Sensitivity:
    """Refit without each assumption of a fit, on the screen it was trained on, and say what moved.

    Settings, seeds and all other assumptions stay; one more refit changes the seeds alone, to show what that moves. ``screen`` is needed
    for a loaded fit, which does not hold its cells. Raises ValueError for a fit without assumptions, or with a field of the user's own,
    which cannot be started afresh.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=8, n_perturbations=2, times=(1.0, 2.0), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, epochs=2, progress=False)
    >>> pb.sensitivity(fit, n_draws=4, progress=False).table.sizes["assumption"]
    1
    """
    require_fit(fit)
    screen = fit.screen if screen is None else screen
    if screen is None:
        raise ValueError("A loaded fit does not hold its cells: pass the screen it was trained on, sensitivity(fit, screen).")
    require_screen(screen)
    assumptions = [bound.assumption for bound in fit.model.assumptions]
    optional = [a for a in assumptions if a.optional]
    if not optional:
        raise ValueError("This fit declares no assumption that it can do without. Give them to node(screen, assumptions=[...]).")
    if fit.model.recipe["field"] is not None:
        raise ValueError("This fit has a field of your own, which cannot be started afresh. Refit without the assumption by hand.")
    if list(map(str, screen.cells)) != fit.trained_on["cells"]:
        raise ValueError("sensitivity refits, so it needs the screen that the fit was trained on; these are other cells.")
    here, spread = _answers(fit, n_draws, seed)
    other_fit = partial(_again, fit, screen, progress=progress)
    rows = []
    for left_out in optional:
        other = other_fit([a for a in assumptions if a is not left_out])
        rows.append(_row(here, spread, _answers(other, n_draws, seed)[0], _validation(other) - _validation(fit)))
    by_seed = _row(here, spread, _answers(other_fit(assumptions, shift=1), n_draws, seed)[0], 0.0)
    noise = by_seed["in_deviations" if spread.notnull().all() else "change"]
    names = pd.Index([type(a).__name__ for a in optional], name="assumption")
    return Sensitivity(xr.concat(rows, names).assign(noise=noise))


def _again(fit: "Fit", screen: "Screen", assumptions: "list[Assumption]", *, shift: int = 0, progress: bool) -> "Fit":
    """Fit once more with these assumptions; the seeds of networks and training are moved by ``shift``."""
    recipe, training = fit.model.recipe, {name: fit.settings[name] for name in _TRAINING}
    model = again(fit.model, screen, assumptions, seed=recipe.get("seed", 0) + shift)
    return refit(model, screen, seed=fit.seed + shift, progress=progress, **training)


def _answers(fit: "Fit", n_draws: int, seed: int) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the predicted level of every fitted condition, and about its posterior deviation."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both sides of the difference are at η = 0
        answer = predict(fit, n_draws=n_draws, seed=seed, progress=False)
    if fit.model.start is None:
        answer = answer.assign({name: np.log(answer[name]) for name in ("mean", "lower", "upper")})
    return answer["mean"], (answer["upper"] - answer["lower"]) / (2 * 1.645)


def _row(here: xr.DataArray, spread: xr.DataArray, there: xr.DataArray, validation: float) -> xr.Dataset:
    """Return how far the predictions moved."""
    change = there - here
    scaled = change / np.maximum(spread, 1e-9)
    data: dict[str, Any] = {"change": np.sqrt((change**2).mean("gene")), "in_deviations": np.sqrt((scaled**2).mean("gene"))}
    most = here["gene"].values[np.abs(change.values).argmax(axis=1)]
    return xr.Dataset(data).assign(gene=("condition", most), validation=validation)


def _validation(fit: "Fit") -> float:
    """Return the loss of the validation cells at the epoch that was kept; NaN without them, as training losses hold other terms."""
    losses = fit.losses["validation"]
    return losses[fit.settings["best_epoch"]] if losses else float("nan")
