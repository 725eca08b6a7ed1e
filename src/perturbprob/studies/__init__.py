"""Questions asked of a screen or a fit; they return data."""

from perturbprob.studies import baselines
from perturbprob.studies.predictive_check import predictive_check
from perturbprob.studies.sensitivity import sensitivity
from perturbprob.studies.steady_state import steady_states

__all__ = ["baselines", "predictive_check", "sensitivity", "steady_states"]
