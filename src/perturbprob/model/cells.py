"""Cells as a model sees them: a screen in the words of a vocabulary, minibatch by minibatch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.sparse import csr_array
from torch import Tensor

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.assays import Assay
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.vocabulary import Segment
from perturbprob.measurement.assays import Seen
from perturbprob.measurement.normal import Normal
from perturbprob.model.penetrance import Hits, padded, ways
from perturbprob.model.sparse_input import as_tensor

if TYPE_CHECKING:
    from perturbprob.model.cell_model import CellModel


@dataclass(frozen=True)
class Cells:
    """A minibatch of cells as tensors. ``total`` is the size of the plate they stand for, ``index`` their places in it.

    ``counts`` may be a sparse tensor (CSR). ``rows`` names the condition-effect nodes that add up in each cell, ``batch`` the batch, or −1
    where η is taken as 0. ``condition`` is each cell's place in the screen's conditions. ``standard_error`` is that of each value where
    values are continuous and it is known. ``warmth`` is the weight of the cells' own KL term while a training warms up. ``present`` says
    which cells have counts of RNA (None: all), ``assays`` what the model's other assays saw.

    Where edited cells may have escaped, `CellTable.unfolded` gives a row for each way that a cell may have gone, which ``hits`` tells.
    """

    total: int
    index: Int[Tensor, " cell"]
    protocol: Sequence[Segment]
    rows: Int[Tensor, "cell part"]
    batch: Int[Tensor, " cell"]
    log_size_factor: Float[Tensor, " cell"]
    counts: Float[Tensor, "cell gene"]
    warmth: float = 1.0
    condition: Int[Tensor, " cell"] | None = None
    standard_error: Float[Tensor, "cell gene"] | None = None
    present: Bool[Tensor, " cell"] | None = None
    assays: dict[str, Seen] = field(default_factory=dict)
    hits: Hits | None = None

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.index)

    def __getitem__(self, row: Int[Tensor, " row"]) -> "Cells":
        """Return some of the cells, one as often as it is named; the plate stands for as many more or fewer."""

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor | Hits):
                return value[row]
            if isinstance(value, Seen):
                return Seen(value.counts[row], value.log_size_factor[row], value.present[row])
            if isinstance(value, dict):
                return {name: taken(part) for name, part in value.items()}
            return [part[row] for part in value] if isinstance(value, list) else value

        changed = {part.name: taken(getattr(self, part.name)) for part in fields(self)}
        return Cells(**changed | {"total": self.total * len(row) // max(1, len(self))})


def _known(screen: Screen) -> bool:
    """Tell whether every value has a standard error above 0."""
    return screen.standard_error is not None and bool((screen.standard_error > 0).all())


def _filled(error: Float32[np.ndarray, "cell gene"]) -> Float32[np.ndarray, "cell gene"]:
    """Return standard errors, one that is not known as large as the largest known of its gene; 0, all noise learnt, where none is."""
    known = np.where(np.isnan(error), -np.inf, error).max(axis=0)
    return np.where(np.isnan(error), np.maximum(known, 0), error).astype(np.float32)


def require_genes(model: "CellModel", screen: Screen) -> None:
    """Refuse a screen of other genes than the model's."""
    known = model.vocabulary.genes
    if tuple(screen.genes) == known:
        return
    missing = sorted(set(known) - set(screen.genes))
    same = "the same genes are in another order or beside others"
    found = f"{len(missing)} of its genes are missing, such as {missing[:3]}" if missing else same
    raise ValueError(f"The model knows {len(known)} genes and the screen holds {screen.n_genes}; {found}. Take adata[:, genes] first.")


@final
class CellTable:
    """The cells of a screen in the names of a model; refuses names that the model has never seen.

    Conditions at times or in combinations that the model has not seen are allowed: their condition effects are ``extra`` nodes,
    which `sites` draws given one draw of the others.
    """

    def __init__(
        self, model: "CellModel", screen: Screen, protocols: Sequence[Protocol] | None = None, *, batch: int | None = None
    ) -> None:
        """Encode each condition once; ``protocols``, one for each condition of the screen, stand in for what was really done.

        ``batch`` is the code of the batch that all cells are taken to be in (−1: none), instead of their own.
        """
        require_screen(screen, partial=True)
        names = model.vocabulary
        require_genes(model, screen)
        if (screen.values == "continuous") != (model.start is not None):
            raise ValueError(f"The model was made for other values than this screen's {screen.values}. Make the model from this screen.")
        if isinstance(model.measurement, Normal) and not model.measurement.learnt and not _known(screen):
            raise ValueError(
                "The model takes standard errors for all the noise there is, and this screen lacks some: read standard_error=."
            )
        if screen.time_unit != names.time_unit:
            raise ValueError(
                f"The model counts time in {names.time_unit!r} and the screen in {screen.time_unit!r}. Convert the time column first."
            )
        self.model, self.screen, self.assays = model, screen, _assays(model, screen)
        own = protocols is None
        protocols = [names.protocol(p) for p in (screen.conditions if protocols is None else protocols)]
        self.first, self.hit, self.edits, self.protocols = _ways(model, screen, protocols, own=own)
        parts = [model.condition_effect.parts(p, names.time_scale) for p in self.protocols]
        self.extra = model.condition_effect.unknown(parts)
        self.rows = model.condition_effect.rows(parts, self.extra)
        device = model.log_share.device
        self.segments = [s.to(device) for s in names.encode(self.protocols)]
        self.condition = torch.as_tensor(screen.condition)
        codes = [names.batch_code(b) if batch is None else batch for b in screen.batches]
        self.batch = torch.tensor(codes)[torch.as_tensor(screen.batch)]
        # size factors count in the depth of their own screen, which is not that of the screen the model was made for
        relative = np.log(screen.size_factor) + np.log(screen.depth) - float(model.log_depth)
        self.log_size_factor = torch.as_tensor(relative, dtype=torch.float32)
        self.standard_error = None if screen.standard_error is None else torch.from_numpy(_filled(screen.standard_error))

    def sites(self, draw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one draw of the global sites with the condition effects of this screen's own conditions added."""
        return self.model.completed(draw, self.extra)

    def cells(
        self,
        index: Int[Tensor, " cell"],
        total: int | None = None,
        warmth: float = 1.0,
        counts: csr_array | None = None,
        *,
        sparse: bool = False,
    ) -> Cells:
        """Return these cells as tensors on the model's device, standing for a plate of ``total`` cells.

        ``counts`` are theirs, where they have been read already; with ``sparse`` they stay sparse.
        """
        counts = self.screen.counts[index.numpy()] if counts is None else counts
        condition, device = self.condition[index], self.model.log_share.device
        return Cells(
            total=self.screen.n_cells if total is None else total,
            index=torch.arange(len(index), device=device),
            protocol=[s[self.first[condition].to(device)] for s in self.segments],
            rows=self.rows[self.first[condition]].to(device),
            batch=self.batch[index].to(device),
            log_size_factor=self.log_size_factor[index].to(device),
            counts=as_tensor(counts) if sparse else torch.from_numpy(counts.toarray()).to(device=device, dtype=torch.float32),
            warmth=warmth,
            condition=condition.to(device),
            standard_error=None if self.standard_error is None else self.standard_error[index].to(device),
            present=None if self.screen.present is None else torch.from_numpy(self.screen.present[index.numpy()]).to(device),
            assays={name: self._seen(name, index) for name in self.assays},
        )

    def unfolded(
        self,
        index: Int[Tensor, " cell"],
        total: int | None = None,
        warmth: float = 1.0,
        counts: csr_array | None = None,
        *,
        sparse: bool = False,
    ) -> Cells:
        """Return a row for each way that each of these cells may have gone; the cells themselves, where none escapes (`cells`)."""
        cells = self.cells(index, total, warmth, counts, sparse=sparse)
        if self.edits is None:
            return cells
        device, condition = cells.rows.device, self.condition[index]
        count = self.first.diff(append=torch.tensor([len(self.hit)]))[condition]
        of = torch.repeat_interleave(torch.arange(len(index)), count)
        way = self.first[condition][of] + torch.arange(len(of)) - (count.cumsum(0) - count)[of]
        return replace(
            cells[of.to(device)],
            index=torch.arange(len(of), device=device),
            protocol=[s[way.to(device)] for s in self.segments],
            rows=self.rows[way].to(device),
            hits=Hits(of.to(device), way.to(device), self.edits[index[of]].to(device), self.hit[way].to(device)),
        )

    def _seen(self, name: str, index: Int[Tensor, " cell"]) -> Seen:
        """Return what an assay saw of these cells; nothing, where the screen does not have it."""
        assay, device = self.assays[name], self.model.log_share.device
        if assay is None:
            n = len(index)
            nothing = torch.zeros(n, len(self.model.assays[name].features), device=device)
            return Seen(nothing, torch.zeros(n, device=device), torch.zeros(n, dtype=torch.bool, device=device))
        part = assay[index.numpy()]
        return Seen(
            torch.from_numpy(part.counts.toarray()).to(device),
            torch.from_numpy(np.log(part.size_factor).astype(np.float32)).to(device),
            torch.from_numpy(part.present).to(device),
        )

    def minibatches(self, minibatch: int, *, unfolded: bool = False) -> Iterator[Cells]:
        """Iterate over all cells in their order, or over the ways that they may have gone."""
        for index in torch.arange(self.screen.n_cells).split(minibatch):
            yield self.unfolded(index) if unfolded else self.cells(index)


def _ways(
    model: "CellModel", screen: Screen, protocols: list[Protocol], *, own: bool
) -> tuple[Int[Tensor, " condition"], Float[Tensor, "way edit"], Int[Tensor, "cell edit"] | None, list[Protocol]]:
    """Return the first way of each condition, the hits of each way, the edits of each cell by the number of their π, and all ways.

    Without penetrance there is one way, the protocol itself. An sgRNA that the model has not seen has the π of its perturbation, and so
    has a perturbation that stands in for the ``own`` one of the cell.
    """
    if model.penetrance is None:
        return torch.arange(len(protocols)), torch.zeros(len(protocols), 0), None, protocols
    names, several = model.vocabulary, [ways(p) for p in protocols]
    first = torch.tensor([0, *map(len, several)]).cumsum(0)[:-1]
    hit = padded([list(map(int, hits)) for ways_ in several for _, hits in ways_], 0).float()
    n_sgrnas = len(model.sgrnas)
    of = {p: n_sgrnas + k for k, p in enumerate(names.perturbations)}
    edits = padded([[of[p] for p in protocol.perturbations] for protocol in protocols], model.penetrance.n)[
        torch.as_tensor(screen.condition)
    ]
    if n_sgrnas and screen.sgrna is not None:
        known = {name: k for k, name in enumerate(model.sgrnas)}
        number = torch.tensor([known.get(str(name), -1) for name in screen.sgrna])[:, None]
        told, behind = (number >= 0) & (edits < model.penetrance.n), model.penetrance.behind.cpu()[number.clamp(min=0)] + n_sgrnas
        if own and (wrong := told & (behind != edits)).any():
            cell = int(wrong.any(1).nonzero()[0])
            raise ValueError(
                f"Cell {screen.cells[cell]!r} has the sgRNA {str(screen.sgrna[cell])!r}, which the model knows of another perturbation "
                f"than those of {screen.conditions[screen.condition[cell]]}. Check the column of sgRNAs."
            )
        edits = torch.where(told & (behind == edits), number, edits)
    return first, hit, edits, [p for ways_ in several for p, _ in ways_]


def _assays(model: "CellModel", screen: Screen) -> dict[str, Assay | None]:
    """Return the screen's assay behind each head of a model, None where it has none; refuse assays that the model does not know."""
    if unknown := [name for name in screen.assays if name not in model.assays]:
        raise ValueError(
            f"The screen holds the assay {unknown[0]!r}, of which the model knows nothing. Make the model from this screen, or leave its "
            "assays out: screen.with_assays({})."
        )
    for name, assay in screen.assays.items():
        features = model.assays[name].features
        if assay.features != features or assay.binary != model.assays[name].binary:
            lacking = sorted(set(features) - set(assay.features))[:3]
            found = f"features such as {lacking} are missing" if lacking else "features are others or in another order, or binary differs"
            raise ValueError(f"The assay {name!r} is not as the model knows it: {found}. Read it like the one the model was made from.")
    return {name: screen.assays.get(name) for name in model.assays}
