"""Questions asked of a screen or a fit; they return data."""

from perturbprob.studies import baselines
from perturbprob.studies.predictive_check import predictive_check

__all__ = ["baselines", "predictive_check"]
