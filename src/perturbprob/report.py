"""The report of a fit: one HTML file that needs nothing beside it."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob import plots
from perturbprob.inference.effects import effects
from perturbprob.inference.fit import Fit
from perturbprob.inference.posterior import posterior
from perturbprob.studies.predictive_check import PredictiveCheck

if TYPE_CHECKING:
    import matplotlib.figure

N_DRAWS = 100
"""How many posterior draws the numbers of a report rest on."""

_CONFOUNDED = {
    frozenset(
        {"time", "batch"}
    ): "What all cells share at one time may sit in the batch effect instead. Comparisons with control at the same "
    "time are free of it; changes over time are not.",
    frozenset(
        {"media", "batch"}
    ): "What all cells share in one media may sit in the batch effect instead. Comparisons with control in the same "
    "media are free of it; comparisons between media are not.",
    frozenset(
        {"perturbation", "batch"}
    ): "A perturbation and its batch were never seen apart: a fold change against control may be a batch effect, "
    "and only the priors part them.",
    frozenset(
        {"perturbation", "time"}
    ): "A perturbation has no control of its own time: a fold change rests on what the model expects of control then.",
    frozenset(
        {"perturbation", "media"}
    ): "A perturbation has no control in its own media: a fold change rests on what the model expects of control there.",
    frozenset({"media", "time"}): "What a media does and what changes over time were never seen apart: only the priors part them.",
}
_READING = (
    "A fold change is a natural logarithm: 0.69 means twice, −0.69 means half the share of a cell's counts, averaged over cells and "
    "without batch effects.",
    "An interval holds the true value with the stated probability, given the model and these data. It is about the mean of all cells of a "
    "condition, not about one cell or the next experiment.",
    "First read whether a perturbation is a hit, then which genes change: among very many intervals around nothing, one in ten of 90 % "
    "intervals leaves out 0 by chance.",
    "The expected share of false discoveries is that among a perturbation and all that are more probable.",
    "No interval knows whether the model is right. A predictive check does: where replicates differ from data, doubt the intervals of "
    "those genes. The posterior is variational, which may make intervals somewhat narrow.",
)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1,h2{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #ccc}img{max-width:100%}
pre{background:#f4f4f4;padding:.8rem;white-space:pre-wrap}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.2rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}"""


def write_report(fit: Fit, path: str | Path, *, check: PredictiveCheck | None = None, hits: xr.Dataset | None = None) -> Path:
    """Write all about a fit into one HTML file and return its path: figures and style are inside, and nothing is fetched.

    The report says what was fitted, whether the training converged, what each perturbation does, what is confounded, how large the
    batch effects are, and how to read the intervals. ``check`` adds a predictive check; ``hits`` is what `effects` returned, by default
    that of 100 draws. Missing folders are made; a file in the way is replaced.

    >>> import tempfile
    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=1, progress=False)
    >>> hits = pb.effects(fit, n_draws=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(fit, f"{folder}/report.html", hits=hits).name
    'report.html'
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file, such as {path / 'report.html'}.")
    has_posterior = fit.losses["train"] and fit.settings["objective"] == "elbo"
    if hits is None and has_posterior and fit.model.vocabulary.perturbations:
        hits = effects(fit, n_draws=N_DRAWS, progress=False)
    parts = [_fitted(fit), _training(fit), _effects(fit, hits), _confounded(fit), _batches(fit)]
    parts += [] if check is None else [_checked(check)]
    page = _page("Report of a fit", [*parts, _section("How to read the intervals", *map(_paragraph, _READING))])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _fitted(fit: Fit) -> str:
    """Say what was fitted, to what, and how."""
    names, cells = fit.model.vocabulary, _cells_of_batches(fit)
    conditions = fit.trained_on["conditions"]
    recipe = {"structure": fit.model.recipe["structure"], **fit.model.recipe["arguments"]}
    rows = [
        ("cells", f"{len(fit.trained_on['cells']):,}"),
        ("genes", f"{len(names.genes):,}"),
        ("conditions", f"{len(conditions):,}"),
        ("perturbations", ", ".join(dict.fromkeys(p.gene for p in names.perturbations)) or "none"),
        ("batches", ", ".join(f"{batch} ({n:,} cells)" for batch, n in cells.items())),
        ("model", _pairs(recipe)),
        ("settings", _pairs(fit.settings)),
        ("seed", fit.seed),
        ("versions", _pairs(fit.versions)),
    ]
    table = _table(("condition", *cells), [(c, *(n.get(b, 0) for b in cells)) for c, n in conditions.items()])
    return _section("What was fitted", _table((), rows), f"<details><summary>Cells per condition and batch</summary>{table}</details>")


def _training(fit: Fit) -> str:
    """Give the verdict on the training, and the losses."""
    return _section(
        "Did the training converge?", f"<pre>{_text(fit.report())}</pre>", _image(plots.losses(fit), "losses over the training")
    )


def _effects(fit: Fit, hits: xr.Dataset | None) -> str:
    """Say which perturbations do something, and what."""
    title = "What do the perturbations do?"
    if hits is None:
        why = "the training broke off" if fit.model.vocabulary.perturbations else "the fit has no perturbation"
        why = why if fit.settings["objective"] == "elbo" else f"objective={fit.settings['objective']!r} fits no posterior"
        return _section(title, _paragraph(f"Nothing was compared with control: {why}."))
    table = _hits(hits) if "hit" in hits else _paragraph(f"Compared with {hits.attrs['against']}: hits are only told against control.")
    return _section(title, table, _image(plots.effects(hits), "log fold changes of perturbations and genes, and the surest with intervals"))


def _hits(hits: xr.Dataset) -> str:
    """Put the tested perturbations into a table, the most probable first; those that are no hits by name only."""
    tested = hits[["hit", "probability", "log_evidence", "false_discovery_share"]]
    order = np.argsort(-tested["log_evidence"].values, kind="stable")
    found = [tested.isel(tested_perturbation=k) for k in order if tested["hit"].values[k]]
    others = [str(tested["tested_perturbation"].values[k]) for k in order if not tested["hit"].values[k]]
    head = ("hit", "probability of any effect", "log Bayes factor", "expected share of false discoveries", "surest changes")
    rows = [_hit(hits, one) for one in found]
    level = f"{100 * hits.attrs['level']:g} % intervals"
    count = f"{len(found)} of {len(order)} perturbations are hits. Changes are log fold changes against control with {level}."
    rest = [_paragraph(f"Not told from doing nothing: {', '.join(others)}.")] if others else []
    return "".join([_paragraph(count), _table(head, rows) if rows else "", *rest])


def _hit(hits: xr.Dataset, one: xr.Dataset) -> tuple[object, ...]:
    """Return the row of one hit."""
    name, share = str(one["tested_perturbation"].values), 100 * float(one["false_discovery_share"])
    said = f"{share:.2g} %" if share > 0.01 else "at most 0.01 %"
    changes = "; ".join(_surest(hits, name)) or "none whose interval leaves out 0"
    return name, f"{float(one['probability']):.3f}", f"{float(one['log_evidence']):.1f}", said, changes


def _surest(hits: xr.Dataset, name: str, n: int = 5) -> list[str]:
    """Return in words the changes of a perturbation whose intervals lie furthest from 0, one per gene."""
    part = hits.isel(condition=hits["perturbation"].values == name)
    distance = np.maximum(part["lower"].values, -part["upper"].values)
    row, furthest = distance.argmax(axis=0), distance.max(axis=0)
    genes = [g for g in np.argsort(-furthest, kind="stable")[:n] if furthest[g] > 0]
    several = len(np.unique(hits["media"].values)) > 1
    return [_change(part.isel(condition=row[g], gene=g), several) for g in genes]


def _change(one: xr.Dataset, several_media: bool) -> str:
    """Return one change in words."""
    value, lower, upper = (_signed(float(one[k])) for k in ("log_fold_change", "lower", "upper"))
    when = f"{one['time'].attrs.get('units', 'time')} {float(one['time']):g}"
    where = f" in {one['media'].values}" if several_media else ""
    return f"{one['gene'].values} {value} ({lower} to {upper}) at {when}{where}"


def _signed(value: float) -> str:
    """Return a number with its sign."""
    return f"{value:+.2f}".replace("-", "−")


def _confounded(fit: Fit) -> str:
    """Say what cannot be told apart, and what that touches."""
    pairs = fit.trained_on["confounded"]
    if not pairs:
        return _section("What cannot be told apart?", _paragraph("No two of perturbation, media, time and batch are fully confounded."))
    words = [f"{a} and {b} are fully confounded: each {a} goes with one {b}. {_CONFOUNDED[frozenset((a, b))]}" for a, b in pairs]
    return _section("What cannot be told apart?", *map(_paragraph, words))


def _batches(fit: Fit) -> str:
    """Say how large the batch effects are."""
    title, cells = "How large are the batch effects?", _cells_of_batches(fit)
    if len(cells) < 2:
        return _section(title, _paragraph("There is one batch: its effect is fixed to 0."))
    if fit.settings["objective"] == "kds":
        return _section(title, _paragraph("They were taken out by a regression of the means of conditions, without a posterior."))
    draws = posterior(fit, N_DRAWS).posterior["batch_effect"].squeeze("chain")
    size = draws.std("gene")
    spread = zip(size.mean("draw").values, *size.quantile([0.05, 0.95], "draw").values, strict=True)
    sizes = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in spread]
    rows = [
        (b, f"{cells[str(b)]:,}", s, _furthest(draws.sel(batch=b).mean("draw"))) for b, s in zip(draws["batch"].values, sizes, strict=True)
    ]
    says = "The effect of a batch on the log rate of each gene sums to 0 over batches: 0.1 is a change of about 10 %."
    head = ("batch", "cells", "standard deviation over genes (90 % interval)", "largest effects")
    return _section(title, _paragraph(says), _table(head, rows))


def _furthest(effect: xr.DataArray) -> str:
    """Name the genes that a batch changes most."""
    order = np.argsort(-np.abs(effect.values))[:3]
    return ", ".join(f"{effect['gene'].values[g]} {_signed(float(effect.values[g]))}" for g in order)


def _checked(check: PredictiveCheck) -> str:
    """Show a predictive check."""
    figure = _image(plots.predictive_check(check), "observed against replicated statistics")
    return _section("Does the model make data like the data?", f"<pre>{_text(check.summary())}</pre>", figure)


def _cells_of_batches(fit: Fit) -> Counter[str]:
    """Count the cells of each batch, in the order of the model's batches."""
    cells = Counter(dict.fromkeys(fit.model.vocabulary.batches, 0))
    for batches in fit.trained_on["conditions"].values():
        cells.update(batches)
    return cells


def _pairs(values: Mapping[str, object]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _text(value: object) -> str:
    """Return a value as HTML text."""
    return html.escape(str(value))


def _paragraph(words: str) -> str:
    """Return a paragraph."""
    return f"<p>{_text(words)}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; without a head, the first column is one."""
    first = "td" if head else "th"
    lines = ["".join(f"<th>{_text(v)}</th>" for v in head)] if head else []
    lines += ["".join([f"<{first}>{_text(row[0])}</{first}>", *(f"<td>{_text(v)}</td>" for v in row[1:])]) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _image(figure: "matplotlib.figure.Figure", alt: str) -> str:
    """Return a figure as an image that lies inside the page."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _section(title: str, *parts: str) -> str:
    """Return a section of the page."""
    return "\n".join([f"<h2>{_text(title)}</h2>", *parts])


def _page(title: str, sections: Iterable[str]) -> str:
    """Return the page."""
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{_text(title)}</h1>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
