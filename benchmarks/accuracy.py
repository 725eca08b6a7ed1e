"""Predict means of held-out conditions of the embedded screen, beside every baseline; and of two more screens.

    python benchmarks/accuracy.py --json
    python benchmarks/accuracy.py --ablation
    python benchmarks/accuracy.py --others ../data

Errors are mean squares over conditions and genes of predicted minus observed mean of log(1 + count). S1 hides day 5 of the eleven
perturbations that the paper hides; S2, the primary one, day 5 of every second perturbation, twice, so that all 23 are scored; S3 day 5 of
all, control's visible; S5 all days of one perturbation at a time. ``coverage90`` is the share of observed means inside the model's
central 90 % interval, the noise of the sampled cells included, ``crps`` the continuous ranked probability score of the same normal.
``floor`` is the variance between cells over their number. The model's structures are listed in `perturbprob.response.STRUCTURES`.
``validation`` holds, for S1 and each fold of S2, the error of each of them and of their average on four folds of the knock-outs whose day
5 its training part shows, and ``chosen`` the error on S2 where each fold takes whatever is best there by itself.

``--ablation`` takes each ingredient out in turn and pairs the errors over the 23 conditions of S2. ``--others`` names the folder that
holds papalexi2021_thp1_eccite.h5ad (one replicate left out, but for control) and datlinger2017_jurkat_summary.h5ad (a quarter of the
stimulated knock-outs left out at a time). ``--nodes`` also trains neural ODEs, on the means (eq 5, alone, with decay, with known errors)
and on counts, ``--renge 10`` RENGE (``pip install renge==0.0.5``) with so many trials of its own search, on S2
(``--renge-cells 0.1``: on a tenth of the training cells).
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
import xarray as xr
from joblib import Parallel, delayed
from scipy.stats import norm

import perturbprob as pb
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.response import STRUCTURES
from perturbprob.response import gaussian as response
from perturbprob.studies.evaluation import interval
from perturbprob.studies.proof_of_principle import MOVING

Predictor = Callable[[pb.Screen, list[pb.Protocol]], xr.DataArray | xr.Dataset]
LAST = 5.0


def gaussian(train: pb.Screen, conditions: list[pb.Protocol], structures: tuple[str, ...] = tuple(STRUCTURES)) -> xr.Dataset:
    """Predict by the shipped model."""
    return pb.gaussian_response(train, structures, progress=False).predict(conditions)


def splits(screen: pb.Screen) -> dict[str, list[pb.split.Split]]:
    """Return the splits by name."""
    names = screen.perturbations
    last = partial(pb.split.hold_out_time, screen, LAST)
    return {
        "S1": [last(list(MOVING))],
        "S2": list(pb.split.folds(last, names, 2)),
        "S3": [last(names)],
        "S5": list(pb.split.folds(partial(pb.split.hold_out_perturbations, screen), names, len(names))),
    }


def scores(split: pb.split.Split, predictor: Predictor) -> pd.DataFrame:
    """Return error, coverage and continuous ranked probability score of each held-out condition."""
    test = split.test[np.array([bool(p.perturbations) for p in split.test.conditions])[split.test.condition]]
    bulk, known = pseudobulk(test), pseudobulk(split.train)
    found = predictor(split.train, list(test.conditions))
    mean = (found["mean"] if isinstance(found, xr.Dataset) else found).values
    sd = found["sd"].values if "sd" in found.coords or isinstance(found, xr.Dataset) else np.zeros(mean.shape)
    freedom = (known["n_cells"] - 1).clip(0)
    between = ((known["variance"].fillna(0) * freedom).sum("condition") / freedom.sum()).values
    off, wide = bulk["mean"].values - mean, np.sqrt(sd**2 + between / bulk["n_cells"].values[:, None])
    z = off / np.maximum(wide, 1e-12)
    crps = wide * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    floor = (bulk["variance"] / bulk["n_cells"]).values
    data = {"mse": off**2, "floor": floor, "coverage90": np.abs(z) < norm.ppf(0.95), "crps": crps}
    return pd.DataFrame({name: value.mean(1) for name, value in data.items()}, index=bulk["condition"].values)


def all_scores(parts: list[pb.split.Split], predictor: Predictor) -> pd.DataFrame:
    """Return the scores over all folds."""
    return pd.concat([scores(part, predictor) for part in parts])


def able(parts: list[pb.split.Split], predictor: Predictor) -> pd.DataFrame | None:
    """Return the scores of a baseline; None where it says that it cannot answer."""
    try:
        return all_scores(parts, predictor)
    except ValueError as error:
        print(f"{getattr(predictor, '__name__', predictor)}: {error}", file=sys.stderr)
        return None


def table(parts: list[pb.split.Split]) -> dict[str, object]:
    """Return one object of a split: the model, and all baselines that can answer."""
    ours = all_scores(parts, gaussian)
    found = {name: able(parts, baseline) for name, baseline in pb.baselines.MEAN_BASELINES.items()}
    kept = {name: one for name, one in found.items() if one is not None}
    said = {name: {k: round(float(kept[name][k].mean()), 5) for k in ("coverage90", "crps")} for name in kept}
    return {k: round(float(v), 5) for k, v in ours.mean().items()} | {
        "baselines": {name: round(float(one["mse"].mean()), 5) for name, one in kept.items()},
        "intervals": {name: said[name] for name in ("shrunk offset", "hierarchical Gaussian") if name in said},
    }


def validation(part: pb.split.Split) -> dict[str, float]:
    """Return the error of single structures and of all on four folds of the perturbations whose last day training shows."""
    shown = [p.perturbation for p in part.train.conditions if p.perturbations and p.time == LAST]
    found: dict[str, list[float]] = {}
    for inner in pb.split.folds(partial(pb.split.hold_out_time, part.train, LAST), shown, 4, seed=0):
        whole = pb.gaussian_response(inner.train, progress=False)
        truth = pseudobulk(inner.test)["mean"].values
        alone = {name: pb.GaussianResponse(whole.rows, {name: prior}) for name, prior in whole.priors.items()}
        for name, one in (alone | {"all": whole}).items():
            error = np.square(one.predict(inner.test.conditions)["mean"].values - truth)
            found.setdefault(name, []).extend(error.mean(1))
    return {name: round(float(np.mean(errors)), 5) for name, errors in found.items()}


def chosen(parts: list[pb.split.Split], found: list[dict[str, float]]) -> dict[str, object]:
    """Return what validation inside each fold's training part chooses, and its error over all folds."""
    names = [min(one, key=one.get) for one in found]
    of = [tuple(STRUCTURES) if name == "all" else (name,) for name in names]
    errors = [scores(part, partial(gaussian, structures=s))["mse"] for part, s in zip(parts, of, strict=True)]
    return {"structures": names, "mse": round(float(pd.concat(errors).mean()), 5)}


def tied(prior: torch.nn.Module, name: str) -> None:
    """Let one parameter move by its mean gradient only, so that all that is one at the start stays one."""
    getattr(prior, name).register_hook(lambda gradient: gradient.mean(-1, keepdim=True).expand_as(gradient))


def without(ingredient: str, train: pb.Screen, conditions: list[pb.Protocol]) -> xr.Dataset:
    """Predict by the model without one ingredient."""
    rows = response.Rows.of(train)
    if ingredient == "known noise":
        rows.noise[:] = rows.noise.mean()
    kept = response.GROUP_VARIANCE
    response.GROUP_VARIANCE = 1e-6 if ingredient == "what a day does to all" else kept
    try:
        data, priors = response.Table.of(rows), {}
        for structure in STRUCTURES:
            prior = response.prior_of(rows, structure)
            change(prior, ingredient)
            priors[structure] = response.fitted(data, prior)
        return response.GaussianResponse(rows, priors).predict(conditions)
    finally:
        response.GROUP_VARIANCE = kept


def change(prior: torch.nn.Module, ingredient: str) -> None:
    """Take an ingredient out of a prior."""
    if ingredient == "a size for each perturbation":
        tied(prior, "log_spread")
    if ingredient == "a scale for each gene":
        tied(prior, "log_scale")
    if ingredient == "resemblance":
        prior.components = tuple(c._replace(alike=False) for c in prior.components)
    if ingredient == "a way through time":
        prior.components = tuple(c._replace(time="constant") for c in prior.components)
    if ingredient == "what does not persist":
        prior.log_nugget.requires_grad_(requires_grad=False).fill_(-30.0)


INGREDIENTS = (
    "what a day does to all",
    "known noise",
    "a size for each perturbation",
    "a scale for each gene",
    "resemblance",
    "a way through time",
    "what does not persist",
)


def ablation(parts: list[pb.split.Split]) -> Iterator[dict[str, object]]:
    """Yield what the error becomes without each ingredient, paired over conditions."""
    whole = all_scores(parts, gaussian)["mse"]
    choices: dict[str, Predictor] = {f"without {name}": partial(without, name) for name in INGREDIENTS}
    choices |= {f"only {name}": partial(gaussian, structures=(name,)) for name in STRUCTURES}
    yield {"model": "whole", "mse": round(float(whole.mean()), 5)}
    for name, predictor in choices.items():
        yield {"model": name} | paired(all_scores(parts, predictor)["mse"], whole)


def paired(errors: pd.Series, whole: pd.Series) -> dict[str, object]:
    """Return the mean of errors, and of their difference from those of the whole model with its 95 % interval over conditions."""
    more = (errors - whole).to_numpy()
    low, high = interval(more)
    worse = round(float((more > 0).mean()), 2)
    return {
        "mse": round(float(errors.mean()), 5),
        "more": round(float(more.mean()), 5),
        "interval": [round(low, 5), round(high, 5)],
        "worse": worse,
    }


def nodes(screen: pb.Screen, seeds: int = 2, steps: int = 600) -> dict[str, float]:
    """Return the errors of neural ODEs on the means, S1 and S2, at steps that validation conditions choose."""
    names, found = screen.perturbations, dict[str, list[float]]()
    for split, hidden in [("S1", list(MOVING)), ("S2", names[::2]), ("S2", names[1::2])]:
        study = pb.proof_of_principle(
            screen,
            perturbations=hidden,
            starts=("control",),
            losses=("eq5", "eq5, decay", "eq5, known errors"),
            seeds=seeds,
            steps=steps,
            progress=False,
        )
        for row in study.chosen.itertuples():
            found.setdefault(f"{split} {row.loss}", []).extend([row.mse_mean] * len(hidden))
    return {name: round(float(np.mean(values)), 5) for name, values in found.items()}


def count_node(part: pb.split.Split) -> pd.DataFrame:
    """Score the neural ODE on counts, its memory and epochs chosen by a third of the perturbations whose last day training shows."""
    shown = [p.perturbation for p in part.train.conditions if p.perturbations and p.time == LAST]
    inner = pb.split.hold_out_time(part.train, LAST, shown[::3])
    makers = {"learnt": pb.node} | {f"memory {m:g}": partial(pb.node, memory=m) for m in (5.0, 20.0)}
    choice = pb.select(makers, inner, epochs=20, every=3, learning_rate=1e-2, progress=False)
    fit = choice.fit(part.train, progress=False)[0]
    return pb.evaluate(fit, part, baselines=(), progress=False).conditions.loc["model", ["error", "coverage90", "crps"]]


def renge(trials: int, share: float, train: pb.Screen, conditions: list[pb.Protocol]) -> xr.DataArray:
    """Predict by RENGE, its settings found by its own cross-validation in so many trials, as its README calls it.

    It is given a share of the training cells of each condition, at least 10: with all of them a trial of its search takes hours.
    """
    from renge import Renge

    rng, cells_of = np.random.default_rng(0), [np.flatnonzero(train.condition == k) for k in range(len(train.conditions))]
    train = train[np.sort(np.concatenate([rng.permutation(own)[: max(10, int(share * len(own)))] for own in cells_of]))]
    genes, cells = list(train.genes), list(train.cells)
    expression = pd.DataFrame(np.log1p(train.counts.toarray().astype(float)), cells, genes)

    def design(protocols: list[pb.Protocol], index: list[str]) -> pd.DataFrame:
        lost = np.array([[float(any(p.gene == g for p in protocol.perturbations)) for g in genes] for protocol in protocols])
        return pd.DataFrame(lost, index, genes).assign(t=[protocol.time for protocol in protocols])

    np.random.seed(0)  # noqa: NPY002  # the generator that RENGE draws from
    model = Renge()
    model.estimate_hyperparams_and_fit(design([train.conditions[c] for c in train.condition], cells), expression, n_trials=trials)
    asked = [*conditions, *train.conditions]  # it fails where one of its times is not asked for
    predicted = np.asarray(model.predict(design(asked, list(map(str, asked)))))[: len(conditions)]
    return xr.DataArray(predicted, {"condition": list(map(str, conditions)), "gene": genes}, ("condition", "gene"), "mean")


def papalexi(file: Path) -> dict[str, object]:
    """Leave out one replicate at a time, but for control."""
    screen = pb.Screen.from_anndata(anndata.read_h5ad(file), batch="replicate")
    parts = [pb.split.hold_out_batches(screen, name) for name in screen.batches]

    def ours(part: pb.split.Split) -> pd.DataFrame:
        return scores(part, lambda train, asked: pb.gaussian_response(train, progress=False).predict(asked, batch=part.batches[0]))

    found: dict[str, pd.DataFrame] = {"model": pd.concat(map(ours, parts))}
    for name in ("control", "mean of perturbations", "own mean elsewhere", "control + own change elsewhere"):
        found[name] = pd.concat([scores(part, partial(elsewhere, name, part.batches[0])) for part in parts])
    whole, rest = found["model"], {name: one["mse"] for name, one in found.items() if name != "model"}
    return {k: round(float(v), 5) for k, v in whole.mean().items()} | {"baselines": {k: paired(v, whole["mse"]) for k, v in rest.items()}}


def elsewhere(name: str, batch: str, train: pb.Screen, conditions: list[pb.Protocol]) -> xr.DataArray:
    """Predict a replicate from its control cells and the other replicates."""
    here, there = (pseudobulk(train[(train.batch == train.batches.index(batch)) == inside])["mean"] for inside in (True, False))
    control = str(conditions[0].unperturbed())
    own = there.sel(condition=list(map(str, conditions)))
    change = there.sel(condition=[c for c in there["condition"].values if c != control]).mean("condition") - there.sel(condition=control)
    start = here.sel(condition=control)
    moved = own - there.sel(condition=control)
    values = {"control": 0 * moved, "mean of perturbations": 0 * moved + change, "control + own change elsewhere": moved}
    return own if name == "own mean elsewhere" else values[name] + start


def datlinger(file: Path) -> dict[str, object]:
    """Leave out a quarter of the stimulated knock-outs at a time."""
    screen = pb.Screen.from_anndata(
        anndata.read_h5ad(file), values="continuous", standard_error="uncertainty_se", cells_behind="n_cells", media="media",
        baseline="unstimulated",
    )  # fmt: skip
    both = [p for p in screen.perturbations if len({c.media for c in screen.conditions if c.perturbation == p}) == 2]
    rows = []
    for part in pb.split.folds(partial(pb.split.hold_out_media, screen, "stimulated"), both, 4):
        rows.append(of_summary(part))
    found = pd.concat(rows)
    whole = found.pop("model")
    said = {"mse": round(float(whole.mean()), 5), "coverage90": round(float(found.pop("coverage90").mean()), 3)}
    return said | {"floor": round(float(found.pop("floor").mean()), 5), "baselines": {k: paired(found[k], whole) for k in found}}


def of_summary(part: pb.split.Split) -> pd.DataFrame:
    """Return the errors of the model and of simple predictors on one fold of the summary."""
    train, test = part
    asked = [test.conditions[c] for c in test.condition]
    truth, error = test.counts.toarray(), test.standard_error
    mean = {train.conditions[c]: row for c, row in zip(train.condition, train.counts.toarray(), strict=True)}
    rest = pb.Protocol([pb.Wait(asked[0].time)]) if asked[0].time else pb.Protocol([])
    control, before = mean[asked[0].unperturbed()], mean[rest]
    own = np.stack([mean[pb.Protocol([*p.perturbations, *rest.actions])] - before for p in asked])
    seen = np.stack([row for p, row in mean.items() if p.perturbations and p.media])
    found = pb.gaussian_response(train, progress=False).predict(asked)
    wide = np.sqrt(found["sd"].values ** 2 + error**2)
    predicted = {"model": found["mean"].values, "control": control + 0 * own, "mean of perturbations": seen.mean(0) + 0 * own}
    predicted |= {
        "control + own change unstimulated": control + own,
        "mean + half of own deviation": seen.mean(0) + 0.5 * (own - own.mean(0)),
    }
    errors = {name: np.square(values - truth).mean(1) for name, values in predicted.items()}
    covered = (np.abs(predicted["model"] - truth) < norm.ppf(0.95) * wide).mean(1)
    return pd.DataFrame(errors | {"coverage90": covered, "floor": np.square(error).mean(1)}, index=list(map(str, asked)))


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("json", "ablation", "nodes"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--others", type=Path)
    parser.add_argument("--renge", type=int, default=0)
    parser.add_argument("--renge-cells", type=float, default=1.0, help="the share of the training cells that RENGE is given")
    options, clock = parser.parse_args(), time.perf_counter()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    screen = pb.datasets.ishikawa2023()
    parts = splits(screen)
    if options.ablation:
        for row in ablation(parts["S2"]):
            print(json.dumps(row), flush=True)
        return
    if options.others:
        for name, study in (("papalexi2021_thp1_eccite", papalexi), ("datlinger2017_jurkat_summary", datlinger)):
            print(json.dumps({name: study(options.others / f"{name}.h5ad")}), flush=True)
        return
    found = dict(zip(parts, Parallel(n_jobs=2)(delayed(table)(part) for part in parts.values()), strict=True))
    found["validation"] = Parallel(n_jobs=2)(delayed(validation)(part) for part in (*parts["S1"], *parts["S2"]))
    found["chosen"] = chosen(parts["S2"], found["validation"][1:])
    if options.nodes:
        found["nodes"] = nodes(screen)
        found["node on counts"] = {k: round(float(v), 5) for k, v in pd.concat(map(count_node, parts["S2"])).mean().items()}
    if options.renge:
        found["renge"] = round(float(all_scores(parts["S2"], partial(renge, options.renge, options.renge_cells))["mse"].mean()), 5)
    print(json.dumps(found | {"seconds": round(time.perf_counter() - clock)}, indent=None if options.json else 1), flush=True)


if __name__ == "__main__":
    main()
