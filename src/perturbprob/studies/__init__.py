"""Questions asked of a screen or a fit; they return data."""

from perturbprob.studies import baselines
from perturbprob.studies.batch_decomposition import decompose_batches
from perturbprob.studies.batch_error import batch_error
from perturbprob.studies.batch_plan import improve_layout, plan_batches, propose_layouts
from perturbprob.studies.branches import branch_shares
from perturbprob.studies.cell_eval import to_cell_eval
from perturbprob.studies.comparison import compare
from perturbprob.studies.depth_effects import depth_effects
from perturbprob.studies.evaluation import Evaluation, evaluate
from perturbprob.studies.identification import prior_screen
from perturbprob.studies.layout_error import BatchPrior
from perturbprob.studies.mean_decomposition import decompose_means
from perturbprob.studies.predictive_check import predictive_check
from perturbprob.studies.proof_of_principle import proof_of_principle
from perturbprob.studies.selection import select
from perturbprob.studies.sensitivity import sensitivity
from perturbprob.studies.steady_state import steady_states

__all__ = [
    "BatchPrior",
    "Evaluation",
    "baselines",
    "batch_error",
    "branch_shares",
    "compare",
    "decompose_batches",
    "decompose_means",
    "depth_effects",
    "evaluate",
    "improve_layout",
    "plan_batches",
    "predictive_check",
    "prior_screen",
    "proof_of_principle",
    "propose_layouts",
    "select",
    "sensitivity",
    "steady_states",
    "to_cell_eval",
]
