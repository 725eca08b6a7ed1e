"""V: what the assay sees."""

from perturbprob.measurement.assays import AssayHead, BackgroundLaw, OpenLaw, OpenWindowHead, ProteinHead, WindowHead
from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountHead, CountLaw, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.measurement.decoder import Decoder, Identity, Log1p
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
from perturbprob.measurement.exact import Exact, ExactLaw
from perturbprob.measurement.fused import FusedCountLaw
from perturbprob.measurement.normal import Normal
from perturbprob.measurement.rate import Rate
from perturbprob.measurement.stationarity import stationarity_deviation

__all__ = [
    "DISTANCES",
    "AssayHead",
    "BackgroundLaw",
    "BatchEffect",
    "CountHead",
    "CountLaw",
    "Decoder",
    "Distance",
    "Exact",
    "ExactLaw",
    "FusedCountLaw",
    "Identity",
    "Log1p",
    "NegativeBinomial",
    "Normal",
    "OpenLaw",
    "OpenWindowHead",
    "Poisson",
    "ProteinHead",
    "Rate",
    "WindowHead",
    "ZeroInflatedNegativeBinomial",
    "default_bandwidth",
    "default_blur",
    "energy",
    "mmd",
    "moment",
    "random_matching",
    "sinkhorn",
    "stationarity_deviation",
]
