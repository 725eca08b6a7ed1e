"""What else was measured in the cells of a screen: surface proteins, chromatin windows (eq 10)."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Float64, Int64, Shaped
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from perturbprob.experiment.fields import text
from perturbprob.experiment.raw_counts import read_counts
from perturbprob.experiment.reading import check_names, read_size_factor, some
from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

KINDS = ("protein", "chromatin")


@final
@dataclass(frozen=True, eq=False, repr=False)
class Assay:
    """A second or third assay of cells: raw counts of its features, x_G or x_P of eq 10.

    - ``counts``: csr_array (cell, feature), float32, whole numbers; ``cells`` and ``features`` name its axes.
    - ``kind``: "protein" (surface proteins by tagged antibodies) or "chromatin" (windows of the genome, n_w for each gene or any).
    - ``genes``: the gene of each feature, or None. Within a screen these are genes whose RNA is measured: such a feature shares their
      coordinate system (D.1). A feature of no measured gene is tied to the RNA through the latent state alone.
    - ``present``: whether a cell has this assay; where not, its counts are empty and say nothing.
    - ``size_factor``: the relative depth of each cell in this assay, 1 where it is not present.
    - ``binary``: windows are open (1) or closed (0).
    """

    counts: csr_array
    cells: Shaped[np.ndarray, " cell"]
    features: tuple[str, ...]
    kind: str
    genes: tuple[str | None, ...]
    present: Bool[np.ndarray, " cell"]
    size_factor: Float64[np.ndarray, " cell"]
    binary: bool = False

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        kind: str,
        obsm: str | None = None,
        features: ArrayLike | None = None,
        layer: str | None = None,
        size_factor: str | ArrayLike | None = None,
        present: ArrayLike | None = None,
        binary: bool = False,
    ) -> Self:
        """Read an assay from X, a layer, or a matrix in ``obsm`` whose columns ``features`` names (a DataFrame names its own).

        ``adata.var["gene"]`` says which gene each feature belongs to, NaN for none; without that column, and in obsm, it is the gene of the
        feature's own name. ``present`` is a mask of the cells that have the assay (default: all). ``size_factor`` is by default the
        total of a cell over the median total; with few features a total is not depth but what they show, so give ``np.ones`` then, as is
        done for a single one. ``binary`` takes chromatin windows as open or closed.

        Raises ValueError for a kind that does not exist, no feature, names that occur twice, and values that are not counts.

        >>> adata = AnnData(np.array([[3.0, 1.0], [0.0, 2.0]]), obsm={"surface": np.array([[7, 1], [2, 2]])})
        >>> Assay.from_anndata(adata, kind="protein", obsm="surface", features=["CD4", "CD71"])
        Assay(protein: 2 features, 2 of a gene, in 2 of 2 cells)
        """
        _check_kind(kind, binary)
        name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        if obsm is not None and layer is not None:
            raise ValueError("layer= and obsm= name two places for one matrix: give one of them.")
        if obsm is None and features is not None:
            raise ValueError("features= names the columns of a matrix in obsm=; the features of X and layers are adata.var_names.")
        if obsm is not None:
            adata, name, layer = _from_obsm(adata, obsm, features), f"adata.obsm[{obsm!r}]", None
        _check_features(adata.var_names, name)
        check_names(adata)
        mask = np.ones(adata.n_obs, bool) if present is None else np.asarray(present)
        if mask.dtype != bool:
            raise ValueError(f"present= is a mask of True and False; got values of type {mask.dtype}.")
        if mask.shape != (adata.n_obs,) or not mask.any():
            raise ValueError(f"present= needs one value for each of the {adata.n_obs:,} cells, True in at least one; got {mask.shape}.")
        counts = read_counts(adata, layer, mask, name=name, what="feature", may_be_empty=size_factor is not None)
        counts = csr_array(counts.multiply(mask[:, None]))
        counts.eliminate_zeros()
        if binary:
            counts.data[:] = 1.0
        alone = size_factor is None and adata.n_vars == 1
        depth = counts.sum(axis=1, dtype=np.float64)
        return cls(
            counts=counts.astype(np.float32),
            cells=text(adata.obs_names),
            features=tuple(map(str, adata.var_names)),
            kind=kind,
            genes=tuple(None if pd.isna(gene) else str(gene) for gene in adata.var.get("gene", adata.var_names)),
            present=mask,
            size_factor=np.ones(adata.n_obs) if alone else read_size_factor(adata, size_factor, depth, mask),
            binary=binary,
        )

    @property
    def level(self) -> Float64[np.ndarray, " feature"]:
        """The expected count of each feature in a cell of size factor 1; of open or closed windows, the rate behind them."""
        total = np.asarray(self.counts[self.present].sum(axis=0, dtype=np.float64)).ravel() + 0.5
        cells = self.size_factor[self.present].sum()
        return -np.log1p(-total / (self.present.sum() + 1)) if self.binary else total / cells

    def __getitem__(self, index: Int64[np.ndarray, " chosen"]) -> Self:
        """Return the assay of some cells."""
        parts = {name: getattr(self, name)[index] for name in ("counts", "cells", "present", "size_factor")}
        return replace(self, **parts)

    def __repr__(self) -> str:
        """Return its size in a line."""
        size = f"{len(self.features):,} feature{'s' if len(self.features) > 1 else ''}"
        of_gene = sum(gene is not None for gene in self.genes)
        kind = f"{self.kind}, open or closed" if self.binary else self.kind
        return f"Assay({kind}: {size}, {of_gene:,} of a gene, in {self.present.sum():,} of {len(self.cells):,} cells)"


def _check_kind(kind: str, binary: bool) -> None:
    """Refuse kinds that do not exist."""
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of assay {kind!r}. Use one of {', '.join(map(repr, KINDS))}; RNA is the screen's own counts.")
    if binary and kind != "chromatin":
        raise ValueError("binary=True reads chromatin windows as open or closed; proteins are counted.")


def _from_obsm(adata: AnnData, key: str, features: ArrayLike | None) -> AnnData:
    """Return a matrix in obsm as an AnnData of its own."""
    if key not in adata.obsm:
        raise ValueError(f"obsm={key!r} is not in adata.obsm. {nearest(key, adata.obsm)}")
    values = adata.obsm[key]
    if isinstance(values, pd.DataFrame):
        features, values = list(values.columns) if features is None else features, values.to_numpy()
    names = [f"{key}{k + 1}" for k in range(values.shape[1])] if features is None else np.asarray(features).astype(str)
    if len(names) != values.shape[1]:
        raise ValueError(f"features= names {len(names)} columns; adata.obsm[{key!r}] has {values.shape[1]}.")
    index = pd.Index(names, dtype=object)
    _check_features(index, f"adata.obsm[{key!r}]")  # before anndata warns of them
    return AnnData(values, obs=adata.obs.copy(), var=pd.DataFrame(index=index))


def _check_features(names: pd.Index, name: str) -> None:
    """Refuse an assay that has no feature, or two of one name."""
    if not len(names):
        raise ValueError(f"{name} has no feature (column): there is nothing to learn from this assay. Leave it out.")
    if not names.is_unique:
        twice = some(names[names.duplicated()].unique(), "feature")
        raise ValueError(f"The features of {name} must have different names; {twice} occur more than once.")


def aligned(screen: "Screen", assays: Mapping[str, Assay], missing: str) -> dict[str, Assay]:
    """Return assays with one row for each cell of a screen, matched by name; `Screen.with_assays` says what is refused."""
    _check_missing(missing)
    if assays and screen.values != "counts":
        raise ValueError("Assays go with a screen of counts, cell by cell; this one holds continuous values.")
    found = {name: _aligned(screen, name, assay, missing) for name, assay in assays.items()}
    measured = np.ones(screen.n_cells, bool) if screen.present is None else screen.present.copy()
    for assay in found.values():
        measured |= assay.present
    if not measured.all():
        raise ValueError(f"{some(screen.cells[~measured], 'cell')} without any assay: nothing was seen of them. Leave them out.")
    return found


def _aligned(screen: "Screen", name: str, assay: Assay, missing: str) -> Assay:
    """Return one assay in the order of a screen's cells; its genes are those that the screen measures."""
    if not isinstance(assay, Assay):
        raise TypeError(f"Assay {name!r} is of type {type(assay).__name__}. Read it with pb.Assay.from_anndata(adata, kind=...) first.")
    if not name.isidentifier():
        raise ValueError(f"An assay's name begins those of its sites, so it is one word such as 'protein'; got {name!r}.")
    unknown = ~np.isin(assay.cells, screen.cells)
    if unknown.any():
        raise ValueError(
            f"Assay {name!r} has {some(assay.cells[unknown], 'cell')} that the screen does not: what was done to them is not known. Leave "
            "them out, or read all assays together with Screen.from_mudata(..., missing='mask')."
        )
    row = pd.Index(assay.cells).get_indexer(screen.cells)
    there = row >= 0
    if missing == "error" and not there.all():
        raise ValueError(
            f"Assay {name!r} lacks {some(screen.cells[~there], 'cell')} of the screen. Pass missing='mask' to keep them and learn nothing "
            "of this assay from them, or leave them out."
        )
    place = csr_array((np.ones(there.sum(), np.float32), (np.flatnonzero(there), row[there])), shape=(len(row), len(assay.cells)))
    genes = set(screen.genes)
    return replace(
        assay,
        counts=csr_array(place @ assay.counts),
        cells=screen.cells,
        genes=tuple(gene if gene in genes else None for gene in assay.genes),
        present=there & assay.present[row],
        size_factor=np.where(there, assay.size_factor[row], 1.0),
    )


def _check_missing(missing: str) -> None:
    """Refuse what cannot be done about missing cells."""
    if missing not in ("error", "mask"):
        raise ValueError(f"missing={missing!r} is neither 'error' nor 'mask'.")


def read_mudata(
    mdata: Any, names: Mapping[str, str | None], columns: Mapping[str, Any], missing: str, *, binary: bool
) -> tuple[AnnData, Bool[np.ndarray, " cell"] | None, dict[str, Assay]]:
    """Return the RNA of every cell of a MuData, which cells have it (None: all), and the other assays; see `Screen.from_mudata`."""
    _check_missing(missing)
    if not hasattr(mdata, "mod"):
        raise TypeError(f"Screen.from_mudata reads a MuData; got {type(mdata).__name__}. An AnnData is read by Screen.from_anndata.")
    if columns.get("values", "counts") != "counts" or not isinstance(columns.get("size_factor"), str | None):
        raise ValueError("Screen.from_mudata reads counts, with size factors in a column of obs or none.")
    parts = {key: _modality(mdata, key, name) for key, name in names.items() if name is not None}
    cells = _cells(mdata, parts, missing)
    rna = parts.pop("rna")
    check_names(rna)
    present = cells.isin(rna.obs_names)
    counts = read_counts(rna, layer := columns.get("layer"), name="" if layer else "mdata['rna'].X")
    place = csr_array((np.ones(len(rna), np.float32), (cells.get_indexer(rna.obs_names), np.arange(len(rna)))), (len(cells), len(rna)))
    joint = AnnData(csr_array(place @ counts), obs=_obs(mdata, [rna, *parts.values()], cells, columns), var=rna.var[[]])
    kinds = {"protein": "protein", "atac": "chromatin"}
    assays = {key: Assay.from_anndata(part, kind=kinds[key], binary=binary and key == "atac") for key, part in parts.items()}
    return joint, None if present.all() else present, assays


def _modality(mdata: Any, key: str, name: str | None) -> AnnData:
    """Return a modality of a MuData."""
    if name not in mdata.mod:
        raise ValueError(f"{key}={name!r} is not a modality of mdata. {nearest(str(name), mdata.mod)}")
    return mdata.mod[name]


def _cells(mdata: Any, parts: Mapping[str, AnnData], missing: str) -> pd.Index:
    """Return the names of all cells, those with RNA first; refuse cells without any assay, and those that one lacks unless masked."""
    cells = pd.Index(dict.fromkeys(cell for part in parts.values() for cell in part.obs_names))
    nothing = mdata.obs_names.difference(cells)
    if len(nothing):
        raise ValueError(f"{some(nothing, 'cell')} of mdata without any of the assays {', '.join(parts)}: nothing was seen of them.")
    if len(parts) > 1 and len(cells) == sum(map(len, parts.values())):
        from perturbprob.experiment.screen import ScreenWarning

        shown = ", ".join(f"{part.obs_names[0]!r} in {key}" for key, part in parts.items())
        message = f"No cell has two of the assays; cells are called {shown}. If these are the same cells, write their names alike."
        warnings.warn(message, ScreenWarning, stacklevel=4)
    lacking = {key: cells.difference(part.obs_names) for key, part in parts.items()}
    if missing == "error" and any(len(found) for found in lacking.values()):
        found = "; ".join(f"{key} lacks {some(found, 'cell')}" for key, found in lacking.items() if len(found))
        raise ValueError(
            f"The assays hold different cells: {found}. Pass missing='mask' to keep all, each telling what it can, or keep those in common."
        )
    return cells


def _obs(mdata: Any, parts: list[AnnData], cells: pd.Index, columns: Mapping[str, Any]) -> pd.DataFrame:
    """Return the columns asked for, from the whole and then from each modality; refuse modalities that disagree."""
    wanted = {value for value in columns.values() if isinstance(value, str)} | {"perturbation", "perturbation_type"}
    table = pd.DataFrame(index=cells)
    for obs in [mdata.obs, *(part.obs for part in parts)]:
        for name in wanted.intersection(obs.columns):
            new = obs[name].astype(object).reindex(cells)
            old = table.get(name, new)
            clash = old.notna() & new.notna() & (old != new)
            if clash.any():
                raise ValueError(
                    f"The assays disagree on {name} of {some(cells[clash], 'cell')}. Correct obs, or keep it in mdata.obs alone."
                )
            table[name] = old.where(old.notna(), new)
    return table.infer_objects()


def arguments_of(reader: Callable[..., Any], given: Mapping[str, Any], name: str = "from_mudata") -> dict[str, Any]:
    """Return all keyword arguments of a reader, those given and its defaults; refuse one that it does not have, in the name asked for."""
    known = {parameter: p.default for parameter, p in inspect.signature(reader).parameters.items() if p.kind is p.KEYWORD_ONLY}
    wrong = [parameter for parameter in given if parameter not in known]
    if wrong:
        raise TypeError(f"Screen.{name} has no argument {wrong[0]!r}. {nearest(wrong[0], known)}")
    return known | dict(given)
