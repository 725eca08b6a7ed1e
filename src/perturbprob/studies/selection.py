"""Which model, and how many epochs: chosen by held-out conditions inside the training data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd

from perturbprob.experiment.held_out import Split
from perturbprob.experiment.screen import require_screen
from perturbprob.experiment.settings import check_whole
from perturbprob.inference.fit import Fit, fit
from perturbprob.model.cell_model import CellModel
from perturbprob.studies.held_out_means import FEW, Means
from perturbprob.studies.metrics import mean_square_error
from perturbprob.studies.predictors import predicted

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

Make = Callable[["Screen"], CellModel]


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Which of several models foretells held-out conditions best, and after how many epochs.

    ``errors`` is a table (epoch, model) of the mean square error of predicted means of log(1 + count), mean over the splits; ``model`` is
    the name of the best column and ``epochs`` its best row. `fit` trains that one on all training data.
    """

    errors: pd.DataFrame
    model: str
    epochs: int
    candidates: Mapping[str, Make]
    training: Mapping[str, Any]

    def fit(self, screen: "Screen", n_fits: int = 1, *, seed: int = 0, progress: bool = True) -> list[Fit]:
        """Train the chosen model on a screen, as long as was chosen, once for each of ``n_fits`` seeds: an ensemble that `predict` takes.

        The learning rate falls as it did in the runs that were scored, so the training ends before it has fallen all the way.
        """
        require_screen(screen)
        check_whole(1, n_fits=n_fits)
        make = partial(self.candidates[self.model], screen)
        ends: dict[str, Any] = {"each_epoch": lambda one: len(one.losses["train"]) >= self.epochs}
        return [fit(make(), screen, **self.training, **ends, seed=seed + k, progress=progress) for k in range(n_fits)]

    def report(self) -> str:
        """Say in words what was chosen, and by how much."""
        best = self.errors.min()
        lines = [f"{name}: error {best[name]:.5f} after {self.errors[name].idxmin()} epochs" for name in best.sort_values().index]
        return "\n".join([f"Chosen: {self.model}, {self.epochs} epochs.", *lines, *self._late()])

    def _late(self) -> list[str]:
        """Say that the choice is at the end of what was tried."""
        at_end = self.epochs == self.errors.index[-1]
        return ["The error was still falling at the last epoch: more epochs may do better."] if at_end else []

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


def select(
    candidates: Mapping[str, Make],
    splits: Split | Iterable[Split],
    *,
    epochs: int = 20,
    every: int = 1,
    n_draws: int = 10,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> Selection:
    """Choose a model and a number of epochs by conditions that are held out of the training data.

    The validation cells of `fit` come from conditions that it trains on, and cannot tell when it begins to do worse on others. Here
    each candidate is trained once on the training part of each split, for ``epochs`` epochs, and every so many epochs (``every``)
    scored by the mean square error of its predicted means of log(1 + count) on the test part, cells in their own batch, from
    ``n_draws`` draws. The least mean error over splits chooses. The splits are to be made of the *training* part of whatever is tested
    in the end, and to ask what will be asked there: times if it is times, perturbations if it is perturbations.

    ``candidates`` are functions of a screen that return a model, by name; ``training`` are arguments of `fit`, for all. No validation cells
    are held out.

    Raises ValueError for screens of continuous values, whose means have no such error yet.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=8, n_perturbations=4, times=(1.0, 2.0), seed=1).screen
    >>> inner = pb.split.hold_out_time(screen, 2, screen.perturbations[:1])
    >>> models = {"learnt": lambda s: pb.node(s, 2), "lasting": lambda s: pb.node(s, 2, memory=5.0)}
    >>> choice = pb.select(models, inner, epochs=2, progress=False)
    >>> fits = choice.fit(screen, 2, progress=False)
    >>> pb.predict(fits, screen.conditions[-1], n_draws=4, batch="average").sizes
    Frozen({'condition': 1, 'gene': 8})
    """
    check_whole(1, epochs=epochs, every=every)
    parts = _checked(candidates, splits, training)
    training = {"epochs": epochs, "validation": 0.0} | training
    how = {"n_draws": n_draws, "seed": seed, "progress": False}
    errors = pd.DataFrame(
        {
            name: np.mean([_course(make, part, every, how, {"seed": seed, "progress": progress} | training) for part in parts], 0)
            for name, make in candidates.items()
        },
        index=pd.Index(_epochs(epochs, every), name="epoch"),
    )
    epoch, model = divmod(int(errors.to_numpy().argmin()), errors.shape[1])
    return Selection(errors, str(errors.columns[model]), int(errors.index[epoch]), dict(candidates), training)


def _epochs(epochs: int, every: int) -> list[int]:
    """Return the epochs after which a fit is scored, the last one always."""
    return sorted({*range(every, epochs + 1, every), epochs})


def _course(make: Make, part: Split, every: int, how: dict[str, Any], training: dict[str, Any]) -> list[float]:
    """Return the errors of one run on the way."""
    means, scored, errors = Means.of(part.test, [part.train]), set(_epochs(training["epochs"], every)), list[float]()
    scored_rows = means.perturbed & (means.n >= FEW)

    def score(one: Fit) -> None:
        if len(one.losses["train"]) in scored:
            errors.append(float(mean_square_error(predicted("", one, means, **how).mean, means.observed)[scored_rows].mean()))

    model = make(part.train)
    if not isinstance(model, CellModel):
        raise TypeError(f"A candidate must return a model, as pb.node does; got {type(model).__name__}.")
    fit(model, part.train, **training, each_epoch=score)
    return errors + [np.inf] * (len(scored) - len(errors))  # where patience ran out


def _checked(candidates: Mapping[str, Make], splits: Split | Iterable[Split], training: dict[str, Any]) -> list[Split]:
    """Return the splits; refuse what is no split, no candidate, and values that have no error."""
    if not isinstance(candidates, Mapping):
        raise TypeError(f"select takes named candidates, as in {{'node': pb.node, 'vae': pb.vae}}; got {type(candidates).__name__}.")
    if wrong := sorted({"each_epoch", "validation", "objective"} & set(training)):
        raise ValueError(f"select decides {wrong[0]!r} itself, by held-out conditions: leave it out.")
    if wrong := sorted({"checkpoint", "devices", "strategy", "num_nodes"} & set(training)):
        raise ValueError(f"select fits many models, each in this process, and takes no {wrong[0]!r}: leave it out.")
    if not candidates:
        raise ValueError("No candidate to choose from: give at least one, as in {'node': pb.node}.")
    for name, make in candidates.items():
        if not callable(make):
            raise TypeError(f"The candidate {name!r} must be a function of a screen, such as pb.node; got {type(make).__name__}.")
    parts = [splits] if isinstance(splits, Split) else list(splits) if isinstance(splits, Iterable) else [splits]
    if not parts or not all(isinstance(part, Split) for part in parts):
        raise TypeError("select needs a Split of the training screen, or several, as split.hold_out_time and split.folds make them.")
    if any(part.test.values != "counts" for part in parts):
        raise ValueError("select scores means of log(1 + count), and this screen holds continuous values: score predictions with evaluate.")
    return parts
