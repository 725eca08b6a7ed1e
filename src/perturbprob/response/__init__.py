"""How the means of a screen respond to what was done: a model without cells, fitted in closed form."""

from perturbprob.response.gaussian import GaussianResponse, gaussian_response
from perturbprob.response.prior import STRUCTURES

__all__ = ["STRUCTURES", "GaussianResponse", "gaussian_response"]
