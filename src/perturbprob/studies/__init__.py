"""Questions asked of a screen or a fit; they return data."""

from perturbprob.studies import baselines
from perturbprob.studies.batch_decomposition import decompose_batches
from perturbprob.studies.mean_decomposition import decompose_means
from perturbprob.studies.predictive_check import predictive_check
from perturbprob.studies.proof_of_principle import proof_of_principle
from perturbprob.studies.sensitivity import sensitivity
from perturbprob.studies.steady_state import steady_states

__all__ = ["baselines", "decompose_batches", "decompose_means", "predictive_check", "proof_of_principle", "sensitivity", "steady_states"]
