"""What every figure shares: axes that pyplot does not keep, and names that are not read as mathematics."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7f7f7f"
MANY = 250  # more rows or columns have no names: none could be read


def new_figure(size: tuple[float, float]) -> "matplotlib.figure.Figure":
    """Return a new figure that pyplot has forgotten: it would show it a second time in a notebook, and keep it for ever."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install perturbprob[plots]") from error
    figure = pyplot.figure(figsize=size, layout="constrained")
    pyplot.close(figure)
    return figure


def new_axes(ax: "matplotlib.axes.Axes | None", size: tuple[float, float]) -> "matplotlib.axes.Axes":
    """Return the axes given, or those of a new figure."""
    return new_figure(size).subplots() if ax is None else ax


def plain(name: object) -> str:
    """Return a name as text in which matplotlib finds no mathematics."""
    return str(name).replace("$", r"\$")


def name_axis(axis: Any, names: Iterable[object], **style: Any) -> None:
    """Label the ticks of an axis by names."""
    labels = [plain(n) for n in names]
    axis.set_ticks(range(len(labels)), labels if len(labels) <= MANY else [""] * len(labels), fontsize=8, **style)


def moment(time: float, unit: str | None) -> str:
    """Return a time with its unit."""
    return f"{unit} {time:g}" if unit else f"time {time:g}"


def known_names(names: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """Return names that are all known; refuse none at all, and say what is nearest to one that is not."""
    wanted, there = list(names), set(map(str, known))
    if not wanted:
        raise ValueError(f"No {what} to draw: name at least one.")
    for name in wanted:
        if name not in there:
            raise ValueError(f"There is no {what} {name!r} here. {nearest(name, there)}")
    return wanted


def write(axes: "matplotlib.axes.Axes", x: float, y: float, text: str, **style: Any) -> None:
    """Write a text that is not read as mathematics, centred unless said otherwise."""
    axes.text(x, y, plain(text), ha=style.pop("ha", "center"), va="center", fontsize=9, **style)
