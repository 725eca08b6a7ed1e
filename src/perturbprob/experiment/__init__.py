"""What was done to the cells, and what was seen: protocols, screens and their layout."""

from perturbprob.experiment import datasets, plate, pseudotime, split
from perturbprob.experiment.action import Activation, Interference, Knockout, Media, Protocol, Wait
from perturbprob.experiment.assays import Assay
from perturbprob.experiment.layout import Layout
from perturbprob.experiment.screen import Screen, ScreenWarning

__all__ = [
    "Activation",
    "Assay",
    "Interference",
    "Knockout",
    "Layout",
    "Media",
    "Protocol",
    "Screen",
    "ScreenWarning",
    "Wait",
    "datasets",
    "plate",
    "pseudotime",
    "split",
]
