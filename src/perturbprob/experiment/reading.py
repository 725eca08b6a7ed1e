"""The border: the obs columns that users have -> the levels of what was done to every cell, or an error that says the fix."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike

from perturbprob.experiment.action import Activation, Interference, Knockout, Media, Perturbation, Protocol, Wait
from perturbprob.experiment.vocabulary import nearest

_NONTARGETING = frozenset({"nontargeting", "nt", "ntc"})  # in the spelling of `_plain`
_CONTROL = frozenset({"", "control", "ctrl", "negctrl"}) | _NONTARGETING
_KINDS: dict[type[Perturbation], str] = {
    Knockout: "knockout, CRISPR_knockout, CRISPRko, KO, CRISPR-cas9, cas9, CRISPRn, nuclease",
    Interference: "interference, CRISPR_interference, CRISPRi, knockdown, KD, repression",
    Activation: "activation, CRISPR_activation, CRISPRa, overexpression, OE",
}
_KIND_WORDS = {word: kind for kind, words in _KINDS.items() for word in words.split(", ")}
_KNOWN_KINDS = "; ".join(f"{kind.__name__}: {words}" for kind, words in _KINDS.items())
_NAN_TEXT = ["nan", "NaN", "<NA>"]  # what astype(str) makes of a gap


def _plain(word: object) -> str:
    """Return a word without case, blanks, hyphens and underscores."""
    return str(word).casefold().translate(dict.fromkeys(map(ord, " \t-_")))


_KIND_OF = {_plain(word): kind for word, kind in _KIND_WORDS.items()}


class Levels(NamedTuple):
    """One factor of the design: its levels, and each cell's level as an index into them."""

    codes: np.ndarray
    values: Sequence[Any]

    @classmethod
    def constant(cls, n_cells: int, value: object) -> Self:
        """Return a factor with one level."""
        return cls(np.zeros(n_cells, dtype=np.int64), (value,))

    @classmethod
    def of(cls, column: pd.Series) -> Self:
        """Return the levels of a column as text, in the order of their values."""
        values = np.asarray(column)
        codes, names = pd.factorize(values if values.dtype.kind in "iuf" else np.char.strip(values.astype(str)), sort=True)
        return cls(codes.astype(np.int64), tuple(map(str, names)))


def some(names: Collection[object], what: str, plural: str = "") -> str:
    """Count things and name the first few.

    >>> some(["A", "B"], "cell")
    '2 cells (A, B)'
    """
    shown = ", ".join(map(str, islice(names, 5))) + (", ..." if len(names) > 5 else "")
    return f"{len(names):,} {what if len(names) == 1 else plural or what + 's'} ({shown})"


def check_names(adata: AnnData) -> None:
    """Refuse what is not an AnnData, one without cells or genes, and names that occur twice."""
    if not isinstance(adata, AnnData):
        hint = " Pass one modality, such as mdata['rna']." if hasattr(adata, "mod") else ""
        raise TypeError(f"Screen.from_anndata reads an AnnData; got {type(adata).__name__}.{hint}")
    if 0 in adata.shape:
        raise ValueError(f"adata is empty: {adata.n_obs} cells × {adata.n_vars} genes. A screen needs at least one of each.")
    for axis, what, names in (("obs", "cell name", adata.obs_names), ("var", "gene name", adata.var_names)):
        if not names.is_unique:
            twice = some(names[names.duplicated()].unique(), what)
            raise ValueError(f"adata.{axis}_names must be unique; {twice} occur more than once. Run adata.{axis}_names_make_unique().")


def read_column(obs: pd.DataFrame, role: str, name: str | None, *, hint: str = "") -> pd.Series | None:
    """Return a column of obs, or None if none is named or it holds nothing but NaN; refuse one that is absent or has gaps."""
    if name is None:
        return None
    if name not in obs.columns:
        raise ValueError(f"{role}={name!r} is not a column of adata.obs. {nearest(str(name), map(str, obs.columns))}{hint}")
    column = obs[name]
    if column.isna().all():
        return None
    _check_gaps(column, role)
    return column


def _check_gaps(column: pd.Series, role: str) -> None:
    """Refuse a column in which some cells have no value."""
    gaps = (column.isna() | column.isin(_NAN_TEXT)).to_numpy()
    if gaps.any():
        name = f"adata.obs[{column.name!r}]"
        keep = f"{name}.notna()" if column.isna().any() else f"~{name}.isin({_NAN_TEXT})"
        cells = some(column.index[gaps], "cell")
        raise ValueError(f"{cells} without a {role}: {name} is NaN. Fill it in, or drop them: adata = adata[{keep}].")


def words_for_control(control: Iterable[str] = (), nontargeting: str = "control") -> frozenset[str]:
    """Return all words that mean control: the usual ones, with or without those for non-targeting sgRNAs, and the user's."""
    if nontargeting not in ("control", "perturbation"):
        raise ValueError(f"nontargeting={nontargeting!r}: cells with a non-targeting sgRNA are read as 'control' or as a 'perturbation'.")
    usual = _CONTROL if nontargeting == "control" else _CONTROL - _NONTARGETING
    return usual | set(map(_plain, control))


def genes_of(label: str, words: frozenset[str] = _CONTROL) -> tuple[str, ...]:
    """Return the genes that a perturbation label names, joined by ``+``; control words name none.

    >>> genes_of("KLF1+ctrl"), genes_of("CEBPA+SPI1"), genes_of("Non-Targeting")
    (('KLF1',), ('CEBPA', 'SPI1'), ())
    """
    return () if _plain(label) in words else tuple(part.strip() for part in label.split("+") if _plain(part) not in words)


def perturbation_of(label: str, known: Collection[str], control: str) -> str:
    """Return the name that a screen gives what a user calls a perturbation, or "control"; a ``known`` name is itself, never control.

    >>> perturbation_of("SPI1+CEBPA", (), "control"), perturbation_of("KLF1+ctrl", (), "control"), perturbation_of("NT", (), "control")
    ('CEBPA+SPI1', 'KLF1', 'control')
    """
    words = words_for_control([control]) if label not in known else frozenset()
    return "+".join(sorted(set(genes_of(label, words)))) or "control"


def control_words(control: object) -> tuple[str, ...]:
    """Return the user's words for control as a tuple; refuse anything but text."""
    words = (control,) if isinstance(control, str) else tuple(control) if isinstance(control, Iterable) else (control,)
    if not all(isinstance(word, str) for word in words):
        found = f"got {control!r}. Write control={'control' if control is None else str(control)!r}"
        raise ValueError(f"control= is the label of control cells, or a list of labels, as text; {found}.")
    return words


def read_perturbations(
    obs: pd.DataFrame, name: str | None, *, control: Sequence[str], kind: str | None, nontargeting: str = "control"
) -> Levels:
    """Read the perturbations of every cell, as tuples of actions; ``control`` holds words for control beside the usual ones."""
    words = words_for_control(control, nontargeting)
    column = read_column(obs, "perturbation", name, hint=" For a screen without perturbations pass perturbation=None.")
    if column is None:
        return Levels.constant(len(obs), ())
    labels = Levels.of(column)
    _check_control(labels.values, control, words, str(name))
    perturbed = np.array([bool(genes_of(label, words)) for label in labels.values])
    kinds = _read_kinds(obs, kind, perturbed[labels.codes], other=column.name)
    pairs, codes = np.unique(labels.codes * len(kinds.values) + kinds.codes, return_inverse=True)
    at = (divmod(pair, len(kinds.values)) for pair in pairs)
    return Levels(codes, [_perturb(labels.values[i], kinds.values[j], words) for i, j in at])


def _check_control(labels: Sequence[str], control: Sequence[str], words: frozenset[str], name: str) -> None:
    """Refuse a control word that does not occur, and labels none of which is control."""
    seen = {_plain(part) for label in labels for part in (label, *label.split("+"))}
    for word in control:
        if word != "control" and _plain(word) not in seen:
            raise ValueError(f"control={word!r} does not occur in adata.obs[{name!r}]. {nearest(word, labels)}")
    if all(genes_of(label, words) for label in labels):
        raise ValueError(
            f"No control cell: adata.obs[{name!r}] holds {some(labels, 'label')}; none is control, ctrl, non-targeting or NT. "
            "Name the label (or a list of labels) of control cells: control='...'."
        )


def _read_kinds(obs: pd.DataFrame, kind: str | None, perturbed: np.ndarray, *, other: Hashable) -> Levels:
    """Read how genes were perturbed: one word for all cells, or a column, where control cells may hold anything."""
    if not perturbed.any():
        return Levels.constant(len(obs), "")
    if kind in obs.columns and not obs[kind][perturbed].isna().all():
        column = obs[kind].astype(object).where(perturbed, "")
        _check_gaps(column, "perturbation_type")
        return Levels.of(column)
    if kind is not None and all(_plain(word) in _KIND_OF for word in kind.split("+")):
        return Levels.constant(len(obs), kind)
    state = "holds nothing but NaN" if kind in obs.columns else "is neither a column of adata.obs nor a known type"
    close = "" if kind == "perturbation_type" else nearest(str(kind), [*_KIND_WORDS, *map(str, obs.columns.drop(other))])  # the default
    raise ValueError(
        f"How were the genes perturbed? perturbation_type={kind!r} {state}. {close} "
        f"Pass perturbation_type='knockout' for all cells, or a column. Known types, in any case: {_KNOWN_KINDS}."
    )


def _perturb(label: str, kind: str, control: frozenset[str]) -> tuple[Perturbation, ...]:
    """Return the perturbations that a label and its type mean; a type holds for every gene of the label, or lists one for each."""
    genes = genes_of(label, control)
    if not genes:
        return ()
    words = [word for word in kind.split("+") if "+" not in kind or _plain(word) not in _CONTROL]
    words = words * len(genes) if len(words) == 1 else words
    if len(words) != len(genes):
        raise ValueError(f"Perturbation {label!r} names {len(genes)} genes, but its perturbation_type {kind!r} lists {len(words)}.")
    try:
        return Protocol(_perturbation(gene, word) for gene, word in zip(genes, words, strict=True)).perturbations
    except ValueError as error:
        raise ValueError(f"Perturbation {label!r}: {error}") from error


def _perturbation(gene: str, word: str) -> Perturbation:
    """Return the action that a perturbation type means for a gene."""
    if _plain(word) not in _KIND_OF:
        drug = "A drug or a cytokine is a media: name its column in media=."
        raise ValueError(f"unknown perturbation_type {word!r}. Known types, in any case: {_KNOWN_KINDS}. {drug}")
    return _KIND_OF[_plain(word)](gene)


def read_media(obs: pd.DataFrame, name: str | None, baseline: str | None) -> tuple[Levels, str | None]:
    """Read the media of every cell, as actions, and the baseline media; a single media is the baseline unless another is named."""
    if name is None and baseline is not None:
        raise ValueError(f"baseline={baseline!r} needs the column that it is in: pass media=.")
    column = read_column(obs, "media", name)
    if column is None:
        return Levels.constant(len(obs), Media()), None
    codes, levels = Levels.of(column)
    if len(levels) > 1 and baseline not in levels:
        wrong = "Several media need a baseline" if baseline is None else f"baseline={baseline!r} is not among the media"
        close = nearest(baseline, levels) if baseline else ""
        found = f"adata.obs[{name!r}] holds {some(levels, 'media', 'media')}. {close}".strip()
        raise ValueError(f"{wrong}: {found} Pass baseline= with the media in which all cells started.")
    baseline = levels[0] if baseline is None else baseline
    return Levels(codes, [Media(None if level == baseline else level) for level in levels]), baseline


def read_times(obs: pd.DataFrame, name: str | None, time_unit: str | None) -> tuple[Levels, str | None]:
    """Read how long every cell waited, as actions, and the unit; without times every cell waits one unit."""
    if name is None and time_unit is not None:
        raise ValueError(f"time_unit={time_unit!r} needs the column that it measures: pass time=.")
    column = read_column(obs, "time", name)
    if column is None:
        return Levels.constant(len(obs), Wait(1)), None
    codes, levels = Levels.of(column)
    times = pd.to_numeric(pd.Series(levels), errors="coerce").to_numpy(np.float64)
    if np.isnan(times).any() or column.dtype.kind == "m":
        raise ValueError(_not_numeric(column))
    wrong = ~(np.isfinite(times) & (times >= 0))
    if wrong.any():
        raise ValueError(
            f"adata.obs[{name!r}] holds {some(times[wrong], 'time')} below 0 or infinite, in {wrong[codes].sum():,} cells. Time runs "
            "forward from the start of the screen: drop these cells, or count from the first time: "
            f"adata.obs[{name!r}] -= adata.obs[{name!r}].min()."
        )
    return Levels(codes, [Wait(float(time)) for time in times]), time_unit


def _not_numeric(column: pd.Series) -> str:
    """Say that times are no numbers, and the line that makes them numbers."""
    name = f"adata.obs[{column.name!r}]"
    number = f"{name}.astype(str).str.extract(r'([0-9.]+)', expand=False).astype(float)"
    if column.dtype.kind in "mM":
        number = f"({name} - {name}.min()) / pd.Timedelta('1D')" if column.dtype.kind == "M" else f"{name} / pd.Timedelta('1D')"
    return f"{name} holds values such as {str(column.iloc[0])!r}, not numbers of time units. Make them numbers: {name} = {number}."


def combine(perturbations: Levels, media: Levels, times: Levels) -> tuple[tuple[Protocol, ...], np.ndarray]:
    """Join P, M and W (eq 4): the distinct protocols in order, control first, and each cell's index into them."""
    n_media, n_times = len(media.values), len(times.values)
    keys, cell = np.unique((perturbations.codes * n_media + media.codes) * n_times + times.codes, return_inverse=True)
    at = ((k // n_times // n_media, k // n_times % n_media, k % n_times) for k in keys)
    found = [Protocol((*perturbations.values[p], media.values[m], times.values[t])) for p, m, t in at]
    conditions = tuple(sorted(set(found), key=order))
    place = {protocol: i for i, protocol in enumerate(conditions)}
    return conditions, np.array([place[protocol] for protocol in found], dtype=np.int64)[cell]


def order(protocol: Protocol) -> tuple[bool, str, str, float, str]:
    """Return the sort key: control first, then by perturbation, media (baseline first), time."""
    return bool(protocol.perturbations), protocol.perturbation, protocol.media or "", protocol.time, repr(protocol)


def read_size_factor(
    adata: AnnData, size_factor: str | ArrayLike | None, depth: np.ndarray, present: np.ndarray | None = None
) -> np.ndarray:
    """Read the size factor of every cell from a column or an array; by default its depth over the median depth.

    Cells that are not ``present``, whose counts were not measured, have 1.
    """
    if present is not None:
        factor = np.ones(len(depth))
        given = np.asarray(size_factor)[present] if not isinstance(size_factor, str | None) else size_factor
        factor[present] = read_size_factor(adata[present], given, depth[present])
        return factor
    values = read_column(adata.obs, "size_factor", size_factor) if isinstance(size_factor, str) else size_factor
    if values is None:
        return depth / np.median(depth)
    if isinstance(values, pd.Series):
        values = values.reindex(adata.obs_names)
    if np.shape(values) != depth.shape:
        raise ValueError(f"size_factor has shape {np.shape(values)}; it needs one number for each of the {len(depth):,} cells.")
    factor = np.array(pd.to_numeric(np.asarray(values), errors="coerce"), dtype=np.float64)
    wrong = ~(np.isfinite(factor) & (factor > 0))
    if wrong.any():
        example = f"{some(adata.obs_names[wrong], 'cell')} with another, such as {factor[wrong][0]:g}"
        raise ValueError(f"size_factor must be positive and finite: {example}. Leave it out for the default, depth over median depth.")
    return factor


def places(chosen: slice | ArrayLike, cells: np.ndarray) -> np.ndarray:
    """Return the indices of cells that a mask, indices, a slice or names mean."""
    if isinstance(chosen, slice):
        return np.arange(len(cells))[chosen]
    wanted = np.atleast_1d(np.asarray(_in_order(chosen, cells)))
    if wanted.dtype.kind in "OUT":
        return _places_of(wanted, cells)
    if wanted.dtype.kind not in "biu" and wanted.size:
        raise TypeError(f"Choose cells by a mask, indices, a slice or names; got values of type {wanted.dtype}.")
    if wanted.dtype.kind == "b" and wanted.shape != (len(cells),):
        raise ValueError(f"The mask has shape {wanted.shape}; it needs one value for each of the {len(cells):,} cells.")
    return np.arange(len(cells))[wanted if wanted.size else []]


def _in_order(chosen: ArrayLike, cells: np.ndarray) -> ArrayLike:
    """Return a mask that comes with the names of its cells in the order of the cells; everything else as it is."""
    if not isinstance(chosen, pd.Series) or chosen.dtype != bool or isinstance(chosen.index, pd.RangeIndex) or not len(chosen):
        return chosen
    return named_values(chosen, cells, "mask")


def named_values(values: pd.Series, cells: np.ndarray, what: str) -> pd.Series:
    """Return a value for each cell, by name; refuse a series that lacks one, or has two."""
    index = values.index.astype(str)
    if not index.is_unique or (lost := ~np.isin(cells.astype(str), index)).any():
        missing = f"{int(lost.sum()):,} cells have none, such as {cells[lost][0]!r}" if index.is_unique else "some cells have two"
        raise ValueError(f"The {what} is a Series with names of cells, and needs one value for each cell of the screen; {missing}.")
    return values.set_axis(index).loc[cells.astype(str)]


def _places_of(names: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the indices of cells by name."""
    index = pd.Index(cells).get_indexer(names)
    if (index < 0).any():
        wrong = names[index < 0]
        raise ValueError(f"{some(wrong, 'name')} of no cell of this screen. {nearest(str(wrong[0]), cells)}")
    return index
