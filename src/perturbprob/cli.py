"""The same verbs from a shell: perturbprob demo, fit, check, evaluate and predict."""

import functools
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TextIO

import pandas as pd
import torch
import typer

from perturbprob import inference, studies
from perturbprob.demo import QUICK, Effort, elbo
from perturbprob.demo import demo as run_demo
from perturbprob.dynamics import SolverError
from perturbprob.experiment import datasets
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.screen import Screen
from perturbprob.inference import Fit, NonFiniteLoss
from perturbprob.model import node
from perturbprob.studies.predictive_check import PredictiveCheck
from perturbprob.studies.proof_of_principle import LOSSES as _LOSSES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Posteriors for perturbation screens with single-cell readouts.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else; text goes to stderr.")]
Seed = Annotated[int, typer.Option(help="Fixes everything random.")]
Folder = Annotated[Path, typer.Argument(metavar="FIT", help="Folder that `perturbprob fit` wrote.", show_default=False)]
File = Annotated[Path, typer.Argument(metavar="SCREEN", help=".h5ad, .h5mu or .zarr with raw counts.", show_default=False)]
Table = Annotated[Path | None, typer.Option(help="Write the table as CSV.", show_default=False)]

_COLUMNS: dict[str, tuple[Any, str, str]] = {
    "perturbation": (str, "COLUMN", "Perturbations: A, A+B, control, ... (default: the column perturbation; none: a screen without)."),
    "control": (list[str], "LABEL", "Label of control cells; may be given several times."),
    "perturbation_type": (
        str,
        "COLUMN|WORD",
        "knockout, interference or activation, or a column of these (default: the column perturbation_type).",
    ),
    "nontargeting": (
        str,
        "WORD",
        "control, or perturbation: what cells with a non-targeting sgRNA are (default: control).",
    ),
    "media": (str, "COLUMN", "The media in which cells ended."),
    "baseline": (str, "MEDIA", "The media in which all cells started."),
    "time": (str, "COLUMN", "Times since perturbation."),
    "time_unit": (str, "WORD", "Unit of the times, such as day."),
    "batch": (str, "COLUMN", "Batches: one sequencing reaction each."),
    "sgrna": (str, "COLUMN", "sgRNAs."),
    "layer": (str, "LAYER", "Layer with raw counts (default: X)."),
    "size_factor": (str, "COLUMN", "Size factors (default: depth over median depth)."),
}


def _command(verb: Callable[..., None], *, into: typer.Typer = app, name: str | None = None) -> Callable[..., None]:
    """Make a verb a command: warnings are a line each on stderr, errors that the user can act on one line and exit code 1."""

    @functools.wraps(verb)
    def run(**options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what a dependency plans is of no use here
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            try:
                verb(**options)
            except (ValueError, OSError, ImportError, NonFiniteLoss, SolverError) as error:
                _tell(f"Error: {_in_words(error)}")
                raise typer.Exit(1) from error

    into.command(name)(run)
    return run


def _with_columns(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that say how a screen is read; those that were used arrive as one dict, ``columns``."""

    @functools.wraps(verb)
    def run(**options: Any) -> None:
        given = {name: options.pop(name) for name in _COLUMNS}
        verb(columns={name: value for name, value in given.items() if value}, **options)

    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p.replace(kind=kind) for p in inspect.signature(verb).parameters.values() if p.name != "columns"]
    added = {
        name: Annotated[of | None, typer.Option(metavar=metavar, help=words, show_default=False)]
        for name, (of, metavar, words) in _COLUMNS.items()
    }
    columns = [inspect.Parameter(name, kind, default=None, annotation=annotation) for name, annotation in added.items()]
    run.__signature__ = inspect.Signature([*own, *columns])
    return run


def _version(wanted: bool) -> bool:
    """Print the version and leave."""
    if wanted:
        _say(version("perturbprob"))
        raise typer.Exit
    return wanted


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Posteriors for perturbation screens with single-cell readouts."""


@_command
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for posterior, report, figures and fit.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(help="Passes over the cells (default: 160).", show_default=False)] = None,
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the cells and few epochs: only to see that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Fit the embedded screen of Ishikawa et al. (2023) and judge the fit on held-out cells."""
    torch.set_num_threads(1)  # 256 cells of 103 genes are too little work to share: a second thread slows every step down
    effort = QUICK if quick else Effort()
    effort = effort if epochs is None else replace(effort, epochs=epochs)
    facts = run_demo(out, effort, seed=seed, say=_tell if as_json else _say, progress=sys.stderr.isatty())
    if as_json:
        _say(json.dumps(facts))


@_command
@_with_columns
def fit(
    screen: File,
    *,
    columns: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder for the fit.", show_default=False)],
    latent: Annotated[int, typer.Option(help="Dimensions of the cell state.")] = 10,
    epochs: Annotated[int, typer.Option(help="Passes over the cells.")] = 100,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit a screen of your own and save the fit, with the column options, for check and predict."""
    start, say = time.perf_counter(), _tell if as_json else _say
    cells = _read(screen, columns)
    say(f"{cells!r}\n\n{cells.layout.report()}\n")
    out.mkdir(parents=True, exist_ok=True)
    try:
        fitted = inference.fit(node(cells, n_latent=latent), cells, epochs=epochs, seed=seed, progress=sys.stderr.isatty())
    except NonFiniteLoss as error:
        error.fit.save(kept := out / "last_good")
        raise NonFiniteLoss(str(error).replace("error.fit", str(kept)), error.fit) from error
    fitted.save(out)
    (out / "screen.json").write_text(json.dumps(columns, ensure_ascii=False), encoding="utf-8")
    say(f"{fitted.report()}\n\nWrote {out}. Next: perturbprob check {out} {screen}")
    if as_json:
        files = [str(out / name) for name in ("fit.json", "tensors.pt", "screen.json")]
        _say(json.dumps(_facts(fitted, cells) | {"seconds": round(time.perf_counter() - start, 1), "files": files}))


@_command
@_with_columns
def check(
    folder: Folder,
    screen: File,
    *,
    columns: dict[str, Any],
    draws: Annotated[int, typer.Option(help="Number of replicated screens.")] = 50,
    seed: Seed = 0,
    out: Table = None,
    as_json: Json = False,
) -> None:
    """Compare a screen with replicates from a fit. Column options that are not given are those of the fit."""
    fitted = inference.load(folder)
    cells = _read(screen, _remembered(folder) | columns)
    result = studies.predictive_check(fitted, cells, n_draws=draws, seed=seed, progress=sys.stderr.isatty())
    files = [] if out is None else _write(_long(result), out)
    say = _tell if as_json else _say
    say("\n".join([result.summary(), *(f"Wrote {name}." for name in files)]))
    if as_json:
        _say(json.dumps({"cells": cells.n_cells, "genes": cells.n_genes, "n_draws": draws} | _means(result) | {"files": files}))


@_command
@_with_columns
def evaluate(
    folder: Folder,
    screen: File,
    *,
    columns: dict[str, Any],
    train: Annotated[
        Path | None,
        typer.Option(metavar="SCREEN", help="The cells that were trained on (default: those in the first file).", show_default=False),
    ] = None,
    draws: Annotated[int, typer.Option(help="Number of posterior draws.")] = 100,
    seed: Seed = 0,
    out: Table = None,
    as_json: Json = False,
) -> None:
    """Score a fit on conditions that it never saw, beside every simple baseline and the noise floor.

    Control cells and baselines are of the cells that it was trained on. These may be in the same file: the others are tested.
    """
    fitted, named = inference.load(folder), _remembered(folder) | columns
    trained, tested = _parts(fitted, _read(screen, named)) if train is None else (_read(train, named), _read(screen, named))
    _check_levels(fitted, trained)
    found = studies.evaluate(fitted, tested, trained, n_draws=draws, seed=seed, progress=sys.stderr.isatty())
    files = [] if out is None else _write(found.conditions.reset_index(), out)
    if as_json:
        _say(json.dumps(found.to_dict() | {"files": files}, allow_nan=False))
    else:
        scores = found.overall[["error", "error_over_floor", "direction_control", "discrimination", "coverage90", "crps"]]
        _say("\n".join([scores.to_string(float_format="{:.4g}".format), "", found.report(), *(f"Wrote {name}." for name in files)]))


def _check_levels(fitted: Fit, screen: Screen) -> None:
    """Refuse a file read without the columns that the fit was made with."""
    for what, known, read in (
        ("batch", set(fitted.model.vocabulary.batches), set(screen.batches)),
        ("time", {Protocol.parse(text).time for text in fitted.trained_on["conditions"]}, set(screen.times)),
    ):
        if not known & read:
            words = [", ".join(sorted(map(str, one)))[:80] for one in (known, read)]
            raise ValueError(f"The fit knows the {what} {words[0]}, the file shows {words[1]}: name the column with --{what}.")


@_command
def predict(
    folder: Folder,
    protocol: Annotated[
        str,
        typer.Argument(metavar="PROTOCOL", help="What is done to the cells, such as \"Knockout('NANOG') >> Wait(5)\".", show_default=False),
    ],
    *,
    scale: Annotated[str | None, typer.Option(help="rate (share of all counts, the default), counts (per cell) or log1p; value.")] = None,
    batch: Annotated[str | None, typer.Option(help="A batch, average, or new (default: no batch effect).", show_default=False)] = None,
    draws: Annotated[int, typer.Option(help="Number of posterior draws.")] = 200,
    seed: Seed = 0,
    out: Table = None,
    as_json: Json = False,
) -> None:
    """Predict the mean of each gene under a protocol, with intervals."""
    fitted = inference.load(folder)
    answer = inference.predict(fitted, Protocol.parse(protocol), n_draws=draws, scale=scale, batch=batch, seed=seed)
    table = answer.isel(condition=0).to_dataframe()[["mean", "lower", "upper"]]
    files = [] if out is None else _write(answer.to_dataframe().reset_index(), out)
    if as_json:
        asked = {"protocol": str(answer.condition.values[0]), "batch": batch}
        facts = asked | {name: answer.attrs[name] for name in ("scale", "units", "level", "n_draws")}
        _say(json.dumps(facts | {"genes": table.to_dict("index"), "files": files}))
    else:
        words = f"{protocol}: {answer.attrs['units']}, mean and central {100 * answer.attrs['level']:g} % interval"
        _say(f"{words}\n{table.to_string(float_format='{:.4g}'.format)}" if out is None else f"{words}\nWrote {out}.")


study = typer.Typer(no_args_is_help=True, help="Studies of the embedded screen.")
app.add_typer(study, name="study")


@functools.partial(_command, into=study, name="proof-of-principle")
def proof_of_principle(
    *,
    seeds: Annotated[int, typer.Option(help="Networks trained at once.")] = 100,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also the other losses: the wrong set, weight decay and others."),
    ] = False,
    seed: Seed = 0,
    out: Table = None,
    as_json: Json = False,
) -> None:
    """Does the steady-state term of eq 9 help a neural ODE to predict a hidden day? Section 4 and Figure 4 of the paper."""
    how: dict[str, Any] = {"seeds": seeds, "steps": steps, "losses": _LOSSES if controls else _LOSSES[:2], "seed": seed}
    found = studies.proof_of_principle(datasets.ishikawa2023(), progress=sys.stderr.isatty(), **how)
    files = [] if out is None else _write(found.table, out)
    if as_json:
        rows = {"rows": found.table.to_dict("records"), "chosen": found.chosen.to_dict("records")}
        _say(json.dumps(rows | {"baselines": found.baselines, "noise_floor": found.floor, "seconds": found.seconds, "files": files}))
    else:
        _say(f"{found.report()}" + (f"\nWrote {out}." if out else ""))


def _read(path: Path, columns: dict[str, Any]) -> Screen:
    """Read a screen from a file."""
    named: dict[str, Any] = {
        name: None if (name, str(value).lower()) == ("perturbation", "none") else value for name, value in columns.items()
    }
    try:
        return datasets.load(path, **named)
    except (OSError, KeyError) as error:
        if not path.exists():
            raise
        raise ValueError(f"Cannot read {path}: it is damaged, cut off, or not what its name says.") from error


def _parts(fitted: Fit, cells: Screen) -> tuple[Screen, Screen]:
    """Return the cells that a fit was trained on, and the others; refuse a file that holds one of the two only."""
    known = set(fitted.trained_on["cells"])
    seen = pd.Index(map(str, cells.cells)).isin(known)
    if not seen.any():
        raise ValueError("No cell of this file was trained on, and control cells and baselines are of those that were: give --train.")
    if seen.all():
        raise ValueError(f"The fit was trained on all {cells.n_cells:,} cells of this file: none is left to test on.")
    return cells[seen], cells[~seen]


def _facts(fitted: Fit, cells: Screen) -> dict[str, Any]:
    """Return what was fitted and how the training went."""
    first, last = elbo(fitted)
    size = {"cells": cells.n_cells, "genes": cells.n_genes, "conditions": len(cells.conditions)}
    return size | {"epochs": len(fitted.losses["train"]), "elbo_first": first, "elbo_last": last, "report": fitted.report()}


def _remembered(folder: Path) -> dict[str, Any]:
    """Return the column options of a fit; none where it was saved from Python."""
    file = folder / "screen.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _means(result: PredictiveCheck) -> dict[str, float]:
    """Return the mean over genes of each statistic, observed and replicated."""
    means = result.gene[["observed", "replicated"]].mean("gene")
    statistics = {"mean": "mean", "variance": "variance", "zero": "zero_fraction"}
    return {
        f"{name}_{side}": float(means[side].sel(statistic=statistic))
        for name, statistic in statistics.items()
        for side in ("observed", "replicated")
    }


def _long(result: PredictiveCheck) -> pd.DataFrame:
    """Return the statistics of every gene, over all cells, per condition and per batch, one a row."""
    parts = {"all": result.gene.expand_dims(group=["all"]), "condition": result.condition, "batch": result.batch}
    tables = [part.rename({level: "group"} if level in part.dims else {}).assign_coords(level=level) for level, part in parts.items()]
    columns = ["level", "group", "statistic", "gene", "observed", "replicated", "replicated_sd", "tail_probability"]
    return pd.concat([table.drop_dims("depth_statistic").to_dataframe().reset_index()[columns] for table in tables])


def _write(table: pd.DataFrame, out: Path) -> list[str]:
    """Write a table as CSV; return the names of the files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    return [str(out)]


def _say(text: str) -> None:
    """Print on stdout."""
    typer.echo(text)


def _tell(text: str) -> None:
    """Print on stderr."""
    typer.echo(text, err=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Print a warning without the line of code that gave it."""
    _tell(f"Warning: {' '.join(str(message).split())}")


def _in_words(error: Exception) -> str:
    """Return the message of an error on one line."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
