"""What was done to cells and what was seen: a validated view of an AnnData."""

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from perturbprob.experiment import reading
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.assays import Assay, aligned, arguments_of, read_mudata
from perturbprob.experiment.fields import read_fields, text
from perturbprob.experiment.joining import concat
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.experiment.remarks import remarks
from perturbprob.experiment.store import StoredCounts, read_names
from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    import perturbprob.experiment.layout


class ScreenWarning(UserWarning):
    """Something that the owner of a screen should know; the screen is valid."""


@final
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Screen:
    """A perturbation screen: raw counts, and for every cell its protocol (p, m, t), its batch and its size factor.

    Made by `Screen.from_anndata`, which checks everything; nothing is written into the AnnData, and the counts are a copy.

    - ``counts``: csr_array (cell, gene), float32, whole numbers, canonical; `StoredCounts` where they stay on disk (`from_store`).
    - ``genes``, ``cells``: names; ``cells`` is a numpy array of str objects.
    - ``conditions``: the distinct protocols, control first, then by perturbation, media (baseline first) and time;
      ``condition``: each cell's index into them.
    - ``batches``: names, sorted, or ``("batch",)`` without a batch column; ``batch``: each cell's index into them.
    - ``size_factor``: the relative depth of each cell, by default depth over median depth.
    - ``control``: the user's word for control; in protocols and answers it is always ``"control"``.
    - ``baseline``: the media in which every cell starts, or None without media; ``time_unit``: the unit of every wait.
    - ``sgrna``: the sgRNA of each cell (str objects), or None.
    - ``depth``: the expected number of counts of a cell with size factor 1; by default all counts over all size factors.
    - ``values``: "counts", or "continuous" for means and intensities, which ``counts`` then holds; ``standard_error`` of each,
      (cell, gene), NaN where it is not known, or None. Size factors are then 1.
    - ``screen_of_batch``: of a joint screen (`concat`), the name of the screen that each batch comes from; otherwise empty.
    - ``cells_behind``: how many cells each row of continuous values is the mean of, NaN for control where it is not known; or None.
    - ``assays``: what else was measured in these cells, by name (`Assay`); ``present``: whether a cell's RNA was measured at all, where it
      was not its counts are empty; None: in every cell.
    - ``columns``: the arguments of `from_anndata` that read this screen, so that a fit can read more cells the same way; empty where
      size factors were an array, and for a joint screen.

    >>> from perturbprob.experiment import datasets
    >>> screen = datasets.ishikawa2023()
    >>> screen.n_cells, screen.n_genes, len(screen.conditions), screen.batches
    (14945, 103, 96, ('d2_1', 'd3_2', 'd4_3', 'd5_4'))
    >>> screen.conditions[-1]
    Knockout('ZNF90') >> Wait(5)
    >>> screen[screen.cells_of("NANOG")]
    Screen: 813 cells × 103 genes, 4 conditions
      perturbations: NANOG, no control
      media: hiPSC_maintenance
      times: 2, 3, 4, 5 day
      batches: d2_1, d3_2, d4_3, d5_4
    """

    counts: csr_array | StoredCounts
    genes: tuple[str, ...]
    cells: Shaped[np.ndarray, " cell"]
    conditions: tuple[Protocol, ...]
    condition: Int64[np.ndarray, " cell"]
    batches: tuple[str, ...]
    batch: Int64[np.ndarray, " cell"]
    size_factor: Float64[np.ndarray, " cell"]
    control: str = "control"
    baseline: str | None = None
    time_unit: str | None = None
    sgrna: Shaped[np.ndarray, " cell"] | None = None
    depth: float = 0.0
    values: str = "counts"
    standard_error: Float32[np.ndarray, "cell gene"] | None = None
    cells_behind: Float64[np.ndarray, " cell"] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    screen_of_batch: tuple[str, ...] = ()
    present: Bool[np.ndarray, " cell"] | None = None
    assays: dict[str, Assay] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Work out the depth at size factor 1 where it is not given; a part of a screen keeps that of the whole."""
        if not self.depth:
            factor = self.size_factor if self.present is None else self.size_factor[self.present]
            object.__setattr__(self, "depth", float(self.counts.sum(dtype=np.float64) / factor.sum()))

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        perturbation: str | None = "perturbation",
        control: str | Sequence[str] = "control",
        perturbation_type: str | None = "perturbation_type",
        nontargeting: str = "control",
        media: str | None = None,
        baseline: str | None = None,
        time: str | None = None,
        time_unit: str | None = None,
        batch: str | None = None,
        sgrna: str | None = None,
        size_factor: str | ArrayLike | None = None,
        values: str = "counts",
        standard_error: str | None = None,
        cells_behind: str | None = None,
    ) -> Self:
        """Read a screen from an AnnData; any of perturbation, media, time and batch may be absent (None, or a column of NaN).

        Main arguments, names of obs columns unless said otherwise:

        - ``perturbation``: genes joined with ``+``. Control is the label (or list of labels) ``control``, and in any case
          control, ctrl, non-targeting, NT, NTC and the empty label; ``A+ctrl`` is ``A``. None: a screen without perturbations.
        - ``perturbation_type``: a column, or one word for all cells: knockout, interference, activation, or a usual synonym
          (CRISPR_knockout, CRISPRi, CRISPRa, ...). One word holds for all genes of a label; ``CRISPRi+CRISPRa`` lists them.
        - ``nontargeting``: "control", or "perturbation" where cut and infected cells may themselves be stressed (2.2): cells labelled
          non-targeting, NT or NTC are then a perturbation of that name, and ``control`` names the unedited cells.
        - ``media``, and ``baseline``, the media in which all cells started: needed where there is more than one.
        - ``time``: numbers ≥ 0 since perturbation; ``time_unit`` is kept beside them. Without times every cell waits 1.
        - ``batch``: one sequencing reaction.

        Other arguments: ``layer`` with raw counts (default X); ``sgrna``; ``size_factor``, a column or an array (cell,);
        ``values="continuous"`` for pseudobulk means or intensities instead of counts, with the layer of their ``standard_error`` and
        the column ``cells_behind`` of the number of cells behind each row.

        A cell's protocol is P >> M >> W. Raises ValueError that says the fix for whatever is not a screen, and warns
        (`ScreenWarning`) of genes without counts, perturbed genes that are not measured, and batches without control.

        >>> adata = AnnData(np.array([[3, 1], [0, 2], [5, 1]]), obs={"gene": ["NT", "KLF1", "KLF1+CEBPA"]})
        >>> adata.var_names = ["KLF1", "CEBPA"]
        >>> Screen.from_anndata(adata, perturbation="gene", perturbation_type="CRISPRa").conditions[1:]
        (Activation('CEBPA') >> Activation('KLF1') >> Wait(1), Activation('KLF1') >> Wait(1))
        """
        columns = {name: value for name, value in locals().items() if name not in ("cls", "adata")}
        return cls._of(read_fields(adata, columns))

    @classmethod
    def from_store(cls, path: str | Path, *, layer: str | None = None, **columns: Any) -> Self:
        """Read a screen from an h5ad file or a zarr store whose counts stay on disk, for more cells than memory holds.

        ``columns`` are the other arguments of `from_anndata`. All counts are read once, block by block, and checked. `fit` and
        `log_density` then read minibatches of them; ``screen[cells]`` stays on disk too. What needs all counts at once asks for
        `in_memory`; `evaluate` and `compare` read training cells into memory by themselves, `concat` what it joins. Counts are to be
        stored by rows (CSR, or dense). Raises StoreError for a file that cannot be read, or that changes while it is in use.

        >>> import tempfile
        >>> adata = AnnData(csr_array(np.array([[3.0, 1.0], [0.0, 2.0]])), obs=pd.DataFrame({"gene": ["NT", "KLF1"]}, index=["a", "b"]))
        >>> adata.var_names = ["KLF1", "CEBPA"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adata.write_h5ad(f"{folder}/screen.h5ad")
        ...     screen = Screen.from_store(f"{folder}/screen.h5ad", perturbation="gene", perturbation_type="CRISPRi")
        >>> screen.counts
        StoredCounts(2 cells × 2 genes, X of screen.h5ad)
        """
        return cls._of(read_fields(read_names(path), arguments_of(cls.from_anndata, columns | {"layer": layer}, "from_store"), stored=path))

    def in_memory(self) -> Self:
        """Return this screen with its counts in memory; itself, where they are."""
        return replace(self, counts=self.counts.in_memory()) if isinstance(self.counts, StoredCounts) else self

    @classmethod
    def from_mudata(
        cls,
        mdata: Any,
        *,
        rna: str = "rna",
        protein: str | None = None,
        atac: str | None = None,
        binary: bool = False,
        missing: str = "error",
        **columns: Any,
    ) -> Self:
        """Read a screen of several assays from a MuData; ``rna``, ``protein`` and ``atac`` name its modalities (eq 10).

        ``columns`` are the arguments of `from_anndata`; their columns are looked for in ``mdata.obs``, then in each modality's obs. The
        assays are called "protein" and "atac" in the screen; ``binary`` reads chromatin windows as open or closed. See
        `Assay.from_anndata` for what a feature's gene is. Cells are matched by name. Those that one assay lacks are refused, or, with
        ``missing="mask"``, kept and left out of what that assay tells; they are never imputed.

        >>> import mudata, warnings
        >>> obs = pd.DataFrame({"gene": ["NT", "KLF1", "KLF1"]}, index=["a", "b", "c"])
        >>> rna = AnnData(np.array([[3, 1], [0, 2], [5, 1]]), obs=obs, var=pd.DataFrame(index=["KLF1", "CD4"]))
        >>> names = pd.DataFrame({"gene": ["CD4"]}, index=["anti-CD4"])
        >>> surface = AnnData(np.array([[9.0], [4.0]]), obs=pd.DataFrame(index=["b", "c"]), var=names)
        >>> with warnings.catch_warnings(action="ignore"):  # mudata before 0.4 says what it will do
        ...     mdata = mudata.MuData({"rna": rna, "adt": surface})
        >>> screen = Screen.from_mudata(mdata, protein="adt", missing="mask", perturbation="gene", perturbation_type="knockout")
        >>> screen.assays["protein"]
        Assay(protein: 1 feature, 1 of a gene, in 2 of 3 cells)
        """
        joint, present, assays = read_mudata(mdata, {"rna": rna, "protein": protein, "atac": atac}, columns, missing, binary=binary)
        screen = cls._of(read_fields(joint, arguments_of(cls.from_anndata, columns) | {"layer": None}, present))
        return replace(screen.with_assays(assays, missing=missing), columns={})

    def with_assays(self, assays: Mapping[str, Assay], *, missing: str = "error") -> Self:
        """Return this screen with other assays of the same cells, matched by name, instead of those it has; none with ``{}``.

        ``missing="mask"`` keeps cells that an assay lacks, and masks them there. Raises ValueError for cells of which the screen does not
        know what was done to them, and for cells that are left without any assay.

        >>> adata = AnnData(np.array([[3, 1], [2, 2]]), obs={"gene": ["NT", "KLF1"]}, obsm={"surface": np.array([[7], [2]])})
        >>> adata.var_names = ["KLF1", "CEBPA"]
        >>> screen = Screen.from_anndata(adata, perturbation="gene", perturbation_type="CRISPRi")
        >>> screen.with_assays({"protein": Assay.from_anndata(adata, kind="protein", obsm="surface", features=["CD71"])}).assays
        {'protein': Assay(protein: 1 feature, 0 of a gene, in 2 of 2 cells)}
        """
        return replace(self, assays=aligned(self, assays, missing), columns={} if assays else self.columns)

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> Self:
        """Make a screen of fields that were read, and say what its owner should know."""
        screen = cls(**fields)
        for remark in remarks(screen):
            warnings.warn(remark, ScreenWarning, stacklevel=3)
        return screen

    @classmethod
    def concat(cls, screens: Mapping[str, Self]) -> Self:
        """Join the screens of several laboratories, by name, into one.

        It has the genes that all measure, in the order of the first; batches named ``"lab1/rep1"``, with `batch_groups`; and every
        condition once. Cells are named ``"lab1/cell"`` if a name occurs twice. ``depth`` is the median expected count of all cells and
        size factors are relative to it, so each cell keeps its own; dropped genes take their share of the counts with them.

        Raises ValueError for fewer than two screens, no common gene, or other values, time unit, baseline media or meaning of control;
        warns (`ScreenWarning`) of genes that are dropped.

        >>> from perturbprob.experiment import datasets
        >>> screen = datasets.ishikawa2023()
        >>> both = Screen.concat({"lab1": screen[screen.batch < 2], "lab2": screen[screen.batch >= 2]})
        >>> both.batches, both.batch_groups
        (('lab1/d2_1', 'lab1/d3_2', 'lab2/d4_3', 'lab2/d5_4'), array([0, 0, 1, 1]))
        """
        return cls(**concat(screens))

    @cached_property
    def batch_groups(self) -> Int64[np.ndarray, " batch"]:
        """The number of each batch's screen among those that were joined and still have cells, in their order; 0 in any other screen."""
        number = {name: k for k, name in enumerate(dict.fromkeys(self.screen_of_batch))}
        return np.array([number[name] for name in self.screen_of_batch] or [0] * len(self.batches), dtype=np.int64)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.cells)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.genes)

    @cached_property
    def with_rna(self) -> Self:
        """The cells whose RNA was measured."""
        return self if self.present is None else self[self.present]

    @cached_property
    def perturbations(self) -> tuple[str, ...]:
        """Names of the perturbations, without control, sorted."""
        return tuple(sorted({p.perturbation for p in self.conditions if p.perturbations}))

    @cached_property
    def media(self) -> tuple[str, ...]:
        """Names of the media in which cells ended, baseline first; ``("baseline",)`` without a media column."""
        return tuple(self._media_name(m) for m in sorted({p.media for p in self.conditions}, key=lambda m: (m is not None, m or "")))

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The times waited, sorted, in ``time_unit``; ``(1.0,)`` without a time column."""
        return tuple(sorted({p.time for p in self.conditions}))

    @cached_property
    def layout(self) -> "perturbprob.experiment.layout.Layout":
        """How cells are spread over conditions and batches, and what that leaves unknowable."""
        from perturbprob.experiment.layout import Layout

        return Layout(self)

    def __getitem__(self, cells: slice | ArrayLike) -> Self:
        """Return the screen of some cells: a boolean mask, indices, a slice, or a list of cell names.

        Conditions and batches that no longer occur are dropped; size factors stay as they are.
        """
        if isinstance(cells, tuple) and not all(map(np.isscalar, cells)):
            raise TypeError(
                f"A screen is indexed by cells alone, screen[cells]; got a tuple of {len(cells)}. "
                "Select genes in the AnnData first, adata[:, genes], and read the screen from that."
            )
        index = reading.places(cells, self.cells)
        if not len(index):
            raise ValueError("No cell is left: a screen needs at least one.")
        conditions, condition = np.unique(self.condition[index], return_inverse=True)
        batches, batch = np.unique(self.batch[index], return_inverse=True)
        return replace(
            self,
            counts=self.counts.take(index) if isinstance(self.counts, StoredCounts) else self.counts[index],
            cells=self.cells[index],
            conditions=tuple(self.conditions[i] for i in conditions),
            condition=condition.astype(np.int64),
            batches=tuple(self.batches[i] for i in batches),
            batch=batch.astype(np.int64),
            screen_of_batch=tuple(self.screen_of_batch[i] for i in batches) if self.screen_of_batch else (),
            size_factor=self.size_factor[index],
            sgrna=None if self.sgrna is None else self.sgrna[index],
            standard_error=None if self.standard_error is None else self.standard_error[index],
            cells_behind=None if self.cells_behind is None else self.cells_behind[index],
            present=None if self.present is None or self.present[index].all() else self.present[index],
            assays={name: assay[index] for name, assay in self.assays.items()},
        )

    def cells_of(self, condition: Protocol | str) -> Int64[np.ndarray, " chosen"]:
        """Return the indices of the cells of a condition, or of all conditions of a perturbation's name (also ``"control"``).

        >>> from perturbprob.experiment import Knockout, Wait, datasets
        >>> screen = datasets.ishikawa2023()
        >>> len(screen.cells_of("control")), len(screen.cells_of(Knockout("NANOG") >> Wait(5)))
        (1182, 284)
        """
        if isinstance(condition, str):
            name = reading.perturbation_of(condition, self.perturbations, self.control)
            wanted, known = [p.perturbation == name for p in self.conditions], ["control", *self.perturbations]
        else:
            protocol = condition.with_baseline(self.baseline)
            wanted, known = [p == protocol for p in self.conditions], [*map(str, self.conditions)]
        if not any(wanted):
            what = "perturbation" if isinstance(condition, str) else "condition"
            raise ValueError(f"No cell of this screen has the {what} {str(condition)!r}. {nearest(str(condition), known)}")
        return np.flatnonzero(np.array(wanted)[self.condition])

    def pseudobulk(self, *, normalise: bool = False) -> Self:
        """Return the means of log(1 + count) as a screen of continuous values: one row for each condition in each batch.

        ``standard_error`` is that of the mean over the ``cells_behind`` the row, NaN for a single cell. With ``normalise`` counts are
        divided by size factors.

        >>> from perturbprob.experiment import datasets
        >>> datasets.ishikawa2023().pseudobulk().counts.shape
        (96, 103)
        """
        if self.values == "continuous":
            raise ValueError("This screen holds continuous values; pseudobulk() takes means of counts.")
        parts = [(b, pseudobulk(self[self.batch == b], normalise=normalise)) for b in range(len(self.batches))]
        number = {str(protocol): k for k, protocol in enumerate(self.conditions)}
        means = np.concatenate([part["mean"].values for _, part in parts]).astype(np.float32)
        error = np.concatenate([np.sqrt((part["variance"] / part["n_cells"]).values) for _, part in parts]).astype(np.float32)
        names = [f"{c} in {self.batches[b]}" for b, part in parts for c in part["condition"].values]
        return replace(
            self,
            counts=csr_array(means),
            standard_error=error,
            cells_behind=np.concatenate([part["n_cells"].values for _, part in parts]).astype(np.float64),
            values="continuous",
            cells=text(names),
            condition=np.array([number[c] for _, part in parts for c in part["condition"].values], dtype=np.int64),
            batch=np.repeat(np.arange(len(parts)), [part.sizes["condition"] for _, part in parts]).astype(np.int64),
            size_factor=np.ones(len(names)),
            depth=1.0,
            sgrna=None,
            columns={},
            assays={},
        )

    def summary(self) -> pd.DataFrame:
        """Return the number of cells per condition (rows: perturbation, media, time) and batch (columns)."""
        shape = len(self.conditions), len(self.batches)
        cells = np.bincount(self.condition * shape[1] + self.batch, minlength=shape[0] * shape[1]).reshape(shape)
        rows = [(p.perturbation, self._media_name(p.media), p.time) for p in self.conditions]
        index = pd.MultiIndex.from_tuples(rows, names=["perturbation", "media", "time"])
        return pd.DataFrame(cells, index=index, columns=pd.Index(self.batches, name="batch"))

    def __repr__(self) -> str:
        """Return the size of the screen and the levels of its factors, in five lines."""
        control = "control" if any(not p.perturbations for p in self.conditions) else "no control"
        names = ", ".join([*self.perturbations[:8], "..."] if len(self.perturbations) > 8 else self.perturbations)
        count = f"{len(self.perturbations)} ({names})" if len(self.perturbations) > 8 else names
        times = ", ".join(f"{time:g}" for time in self.times[:12]) + (", ..." if len(self.times) > 12 else "")
        return (
            f"Screen: {self.n_cells:,} cells × {self.n_genes:,} genes, {len(self.conditions)} conditions\n"
            f"  perturbations: {count + ', ' if count else ''}{control}\n"
            f"  media: {', '.join(self.media)}\n"
            f"  times: {times} {self.time_unit or '(no unit)'}\n"
            f"  batches: {', '.join(self.batches)}" + "".join(f"\n  {name}: {assay!r}" for name, assay in self.assays.items())
        )

    def _repr_html_(self) -> str:
        """Return the same for a notebook, with the cell table below."""
        return f"<pre>{html.escape(repr(self))}</pre>{self.summary().to_html(max_rows=30)}"

    def _media_name(self, media: str | None) -> str:
        """Return the name of a media, None being the baseline."""
        return media if media is not None else self.baseline or "baseline"


def require_screen(screen: object, *, partial: bool = False) -> None:
    """Refuse anything but a screen, such as the AnnData it should be read from; and cells without RNA, unless ``partial``."""
    if not isinstance(screen, Screen):
        raise TypeError(
            f"A Screen is needed here; got {type(screen).__name__}. Read an AnnData with pb.Screen.from_anndata(adata, ...) first."
        )
    if screen.present is not None and not partial:
        raise ValueError(
            f"{(~screen.present).sum():,} of {screen.n_cells:,} cells have no RNA, which is asked about here. Take screen.with_rna first."
        )
