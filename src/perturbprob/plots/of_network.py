"""The figure of a network over genes."""

from typing import TYPE_CHECKING

import networkx as nx
import xarray as xr

from perturbprob.plots.axes import BLUE, RED, new_axes

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


def network(edges: xr.Dataset, *, least: float = 0.5, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw what `edges` returned: genes in a circle, and an arrow from regulator to gene for each edge of at least a probability.

    Blue arrows with a point raise a gene, orange ones with a bar lower it; the more probable the darker, the larger the weight the wider.
    Genes without such an edge are left out; perturbed ones are filled.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.causal_context(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> len(pb.plots.network(pb.edges(fit, n_draws=20), least=0).axes)
    1
    """
    if not isinstance(edges, xr.Dataset) or "probability" not in edges:
        raise TypeError(f"plots.network draws what edges returned; got {type(edges).__name__}. Draw pb.edges(fit).")
    if edges["probability"].isnull().all():
        raise ValueError(
            "These edges have weights and no probabilities, as those of stationary do. Say which to draw: "
            "edges.assign(probability=1.0 * (abs(edges.weight) > 0.2))."
        )
    if not 0 <= least <= 1:
        raise ValueError(f"least is a probability, from 0 to 1; got {least}.")
    graph, axes = _graph(edges, least), new_axes(ax, (7.0, 7.0))
    place = nx.circular_layout(graph)
    perturbed = {str(gene) for gene in edges["regulator"].values[edges["perturbed"].values]}
    filled = [gene in perturbed for gene in graph]
    nx.draw_networkx_nodes(
        graph, place, ax=axes, node_size=420, node_color=["#d9d9d9" if f else "white" for f in filled], edgecolors="black"
    )
    nx.draw_networkx_labels(graph, place, ax=axes, font_size=7)
    largest = max((abs(w) for *_, w in graph.edges(data="weight")), default=1.0) or 1.0
    for source, target, of in graph.edges(data=True):
        nx.draw_networkx_edges(
            graph, place, [(source, target)], ax=axes, edge_color=BLUE if of["weight"] > 0 else RED, alpha=0.15 + 0.85 * of["probability"],
            arrowstyle="-|>" if of["weight"] > 0 else "|-|,widthA=0,widthB=0.7", width=0.6 + 2.4 * abs(of["weight"]) / largest,
            node_size=520, arrowsize=13, connectionstyle="arc3,rad=0.12",
        )  # fmt: skip
    none = "" if graph else f"; the largest is {float(edges['probability'].max()):.2f}"
    axes.set(title=f"{graph.number_of_edges()} edges of probability {least:g} or more{none}")
    axes.set_axis_off()
    return axes.figure.figure


def _graph(edges: xr.Dataset, least: float) -> nx.DiGraph:
    """Return the edges that are probable enough, with weight and probability, in the order of the genes."""
    graph = nx.DiGraph()
    genes = [str(gene) for gene in edges["gene"].values]
    regulators = [str(gene) for gene in edges["regulator"].values]
    weight, probability = (edges[name].transpose("gene", "regulator").values for name in ("weight", "probability"))
    chosen = [(r, g) for g in range(len(genes)) for r in range(len(regulators)) if probability[g, r] >= least]
    used = {regulators[r] for r, _ in chosen} | {genes[g] for _, g in chosen}
    graph.add_nodes_from(gene for gene in dict.fromkeys([*genes, *regulators]) if gene in used)
    for r, g in chosen:
        graph.add_edge(regulators[r], genes[g], weight=float(weight[g, r]), probability=float(probability[g, r]))
    return graph
