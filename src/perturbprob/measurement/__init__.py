"""V: what the assay sees."""

from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountHead, CountLaw, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.measurement.decoder import Decoder, Identity
from perturbprob.measurement.normal import Normal

__all__ = [
    "BatchEffect",
    "CountHead",
    "CountLaw",
    "Decoder",
    "Identity",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
]
