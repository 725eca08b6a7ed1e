"""Which effects a layout can tell apart: the rank of its additive design, and in words what is aliased with what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from jaxtyping import Float64, Int64
from scipy.linalg import eigh
from scipy.sparse import coo_array, csr_array, hstack

from perturbprob.experiment.reading import Levels, some
from perturbprob.experiment.vocabulary import nearest

_PLURAL = {"media": "media", "batch": "batches"}
_ZERO = 1e-7  # entries of the null space are ratios of small whole numbers


@final
@dataclass(frozen=True)
class Alias:
    """Effects that no cell tells apart: some change of the effects of these levels leaves every expectation as it is.

    ``levels``: for each factor that takes part, the levels that do. With ``exact``, the levels of the first factor and those of the
    second hold the very same cells. `str` says it in words.

    >>> print(Alias({"media": ("dox",), "batch": ("lane3",)}, exact=True))
    media dox appears only in batch lane3, which holds no other media: its effect cannot be told from that of batch lane3.
    """

    levels: dict[str, tuple[str, ...]]
    exact: bool

    def __str__(self) -> str:
        """Say which effects cannot be told from which."""
        *most, last = [_named(factor, names) for factor, names in self.levels.items()]
        if not self.exact:
            return f"the effects of {', '.join(most)} and {last} cannot be told apart: together they can change without a trace."
        (first, one), (second, other) = self.levels.items()
        appear, its = ("appears", "its effect") if len(one) == 1 else ("appear", "what they share")
        holds, that = ("holds", f"that of {last}") if len(other) == 1 else ("hold", f"what these {_plural(second)} share")
        return f"{most[0]} {appear} only in {last}, which {holds} no other {first}: {its} cannot be told from {that}."


@final
class Design:
    """The additive design of a layout: a mean, the factors' effects against their first level, and declared interactions.

    ``factors``: for each factor its levels in the rows of the layout; a factor with one level has no effect. ``interactions`` such as
    ``"perturbation:media"`` add one effect for each combination that occurs without the first level of any of its factors;
    with a factor of one level they add nothing.

    - ``n_effects``: how many effects the design has, the mean included; ``rank``: how many can be told apart;
      ``deficiency``: the difference.

    >>> import numpy as np
    >>> factors = {"media": Levels(np.array([0, 0, 1]), ["rest", "dox"]), "batch": Levels(np.array([0, 1, 2]), ["L1", "L2", "L3"])}
    >>> design = Design(factors)
    >>> design.n_effects, design.rank, design.comparable("media")
    (4, 3, (('rest',), ('dox',)))
    >>> print(*design.aliases)
    media dox appears only in batch L3, which holds no other media: its effect cannot be told from that of batch L3.
    """

    def __init__(self, factors: Mapping[str, Levels], interactions: Sequence[str] = ()) -> None:
        """Take the levels of the rows; raises ValueError for an interaction of factors that do not exist."""
        self._known = dict(factors)
        self.factors = {name: levels for name, levels in factors.items() if len(levels.values) > 1}
        self.terms: list[tuple[str, ...]] = [(name,) for name in self.factors]
        for interaction in interactions:
            names = _factors_of(interaction, factors)
            self.terms += [names] if set(names) <= set(self.factors) else []
        blocks = [self._block(term) for term in self.terms]
        self.combinations = [combinations for combinations, _ in blocks]
        n_rows = len(next(iter(factors.values())).codes)
        self._blocks = [csr_array(np.ones((n_rows, 1))), *(columns for _, columns in blocks)]
        self.n_effects = sum(block.shape[1] for block in self._blocks)

    @property
    def deficiency(self) -> int:
        """How many effects cannot be told from the others."""
        return self.null_space.shape[1]

    @property
    def rank(self) -> int:
        """How many effects can be told apart."""
        return self.n_effects - self.deficiency

    @cached_property
    def null_space(self) -> Float64[np.ndarray, "effect alias"]:
        """A basis of the changes of effects that leave every row as it is."""
        return _null_space(self._blocks)

    def comparable(self, factor: str) -> tuple[tuple[str, ...], ...]:
        """Return the levels of a factor in groups: only within one are the differences of effects estimable. The first level's is first."""
        if factor not in self._known:
            raise ValueError(f"{factor!r} is not a factor of the layout. {nearest(factor, self._known)}")
        if factor not in self.factors:
            return (tuple(self._known[factor].values),)
        changes = self._parts(self._relations.T)[1 + self.terms.index((factor,))]
        values = np.round(np.concatenate([np.zeros((1, self.deficiency)), changes]), 6) + 0.0
        groups: dict[bytes, list[str]] = {}
        for name, row in zip(self.factors[factor].values, values, strict=True):
            groups.setdefault(row.tobytes(), []).append(name)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def _relations(self) -> Float64[np.ndarray, "alias effect"]:
        """A basis of the null space in which each redundant effect is written by earlier ones."""
        return _reduce(self.null_space)

    @cached_property
    def aliases(self) -> tuple[Alias, ...]:
        """One alias for each effect that is missing: it, in terms of as early effects as can be, batches being last."""
        return tuple(self._alias(relation) for relation in self._relations)

    def _block(self, term: tuple[str, ...]) -> tuple[Int64[np.ndarray, "column factor"], csr_array]:
        """Return the combinations of levels that a term has effects of, and its columns: in each row at most one 1."""
        codes = np.stack([self.factors[name].codes for name in term], 1)
        active = np.flatnonzero((codes > 0).all(1))
        combinations, column = np.unique(codes[active], axis=0, return_inverse=True)
        shape = len(codes), len(combinations)
        return combinations, coo_array((np.ones(len(active)), (active, column.ravel())), shape=shape).tocsr()

    def _parts(self, changes: Float64[np.ndarray, "effect *alias"]) -> list[Float64[np.ndarray, "column *alias"]]:
        """Cut changes of effects into those of the mean and of each term."""
        return np.split(changes, np.cumsum([block.shape[1] for block in self._blocks])[:-1])

    def _alias(self, relation: Float64[np.ndarray, " effect"]) -> Alias:
        """Read a relation: of each factor, the levels that differ from what most of its levels have."""
        mixed: dict[str, tuple[str, ...]] = {}
        values: dict[str, Float64[np.ndarray, " level"]] = {}
        for term, combinations, part in zip(self.terms, self.combinations, self._parts(relation)[1:], strict=True):
            found = np.flatnonzero(np.abs(part) > _ZERO)
            if len(term) == 1 and found.size:
                values[term[0]] = np.round(np.concatenate([[0.0], part]), 6) + 0.0
            elif found.size:
                mixed[":".join(term)] = tuple(self._combination(term, combinations[k]) for k in found)
        changed = {name: v != _usual(v) for name, v in values.items()}
        exact = not mixed and len(values) == 2 and all(len(np.unique(v)) == 2 for v in values.values())
        if exact:  # the second factor's levels are those of the same cells, were they most of all
            first, second = values
            row = int(np.argmin(changed[first][self.factors[first].codes]))
            changed[second] = values[second] != values[second][self.factors[second].codes[row]]
        names = {name: tuple(np.array(self.factors[name].values, object)[mask]) for name, mask in changed.items()}
        return Alias(names | mixed, exact)

    def _combination(self, term: tuple[str, ...], codes: Int64[np.ndarray, " factor"]) -> str:
        """Name a combination of levels."""
        return ":".join(self.factors[factor].values[code] for factor, code in zip(term, codes, strict=True))


def _null_space(blocks: Sequence[csr_array]) -> Float64[np.ndarray, "effect alias"]:
    """Return the null space of columns in blocks, within which no two columns share a row.

    The largest block A has a diagonal Gram matrix, so it is eliminated exactly: with the other columns B, null vectors of
    BᵀB − BᵀA (AᵀA)⁻¹ AᵀB are completed by −(AᵀA)⁻¹ AᵀB. What is decomposed has the size of B alone.
    """
    sizes = [block.shape[1] for block in blocks]
    large = int(np.argmax(sizes))
    a, b = blocks[large], hstack([block for k, block in enumerate(blocks) if k != large] or [csr_array((blocks[0].shape[0], 0))])
    if not b.shape[1]:
        return np.zeros((a.shape[1], 0))
    b = b.tocsr() / np.sqrt(b.sum(axis=0))  # to unit length, so that one bound on eigenvalues serves all layouts
    shared = (a.T @ b).toarray()
    solved = shared / a.sum(axis=0)[:, None]
    eigenvalues, vectors = eigh((b.T @ b).toarray() - shared.T @ solved)
    null = vectors[:, eigenvalues < 1e-9]
    rest = null / np.sqrt(np.concatenate([block.sum(axis=0) for k, block in enumerate(blocks) if k != large]))[:, None]
    before = sum(sizes[:large])
    return np.concatenate([rest[:before], -solved @ null, rest[before:]])


def _reduce(null_space: Float64[np.ndarray, "effect alias"]) -> Float64[np.ndarray, "alias effect"]:
    """Return the reduced row echelon form of the basis, from the last column back."""
    rows = null_space.T[:, ::-1].copy()
    done = 0
    for column in range(rows.shape[1]):
        if done == len(rows):
            break
        pivot = done + int(np.argmax(np.abs(rows[done:, column])))
        if abs(rows[pivot, column]) < _ZERO:
            continue
        rows[[done, pivot]] = rows[[pivot, done]]
        rows[done] /= rows[done, column]
        others = np.delete(np.arange(len(rows)), done)
        rows[others] -= np.outer(rows[others, column], rows[done])
        done += 1
    return rows[::-1, ::-1]


def _usual(values: Float64[np.ndarray, " level"]) -> float:
    """Return the value that most levels have, that of the first level if it is among them."""
    found, counts = np.unique(values, return_counts=True)
    return float(values[0] if counts[found == values[0]][0] == counts.max() else found[np.argmax(counts)])


def _factors_of(interaction: str, factors: Mapping[str, Levels]) -> tuple[str, ...]:
    """Return the factors of an interaction such as perturbation:media."""
    names = tuple(name.strip() for name in interaction.split(":"))
    for name in names:
        if name not in factors:
            raise ValueError(f"The interaction {interaction!r} names {name!r}, which is not a factor. {nearest(name, factors)}")
    if len(set(names)) < 2:
        raise ValueError(f"An interaction joins two different factors or more, such as 'perturbation:media'; got {interaction!r}.")
    return names


def _named(factor: str, names: Sequence[str]) -> str:
    """Name levels of a factor, the first few where there are many."""
    if len(names) > 5:
        return some(names, factor, _plural(factor))
    return f"{factor if len(names) == 1 else _plural(factor)} {', '.join(names)}"


def _plural(factor: str) -> str:
    """Return the word for several levels of a factor; an interaction stays as it is."""
    return factor if ":" in factor else _PLURAL.get(factor, f"{factor}s")
