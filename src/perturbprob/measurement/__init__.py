"""V: what the assay sees."""

from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountHead, CountLaw, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.measurement.decoder import Decoder, Identity
from perturbprob.measurement.distances import (
    DISTANCES,
    Distance,
    default_bandwidth,
    default_blur,
    energy,
    mmd,
    moment,
    random_matching,
    sinkhorn,
)
from perturbprob.measurement.normal import Normal

__all__ = [
    "DISTANCES",
    "BatchEffect",
    "CountHead",
    "CountLaw",
    "Decoder",
    "Distance",
    "Identity",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
    "default_bandwidth",
    "default_blur",
    "energy",
    "mmd",
    "moment",
    "random_matching",
    "sinkhorn",
]
