"""What terms are measured in: the standard errors of conditions."""

import anndata
import numpy as np
import pytest

import perturbprob as pb
from perturbprob.model.assumptions.terms import standard_error


def test_what_was_never_measured_has_the_median_error_of_what_was(screen):
    gene = screen.perturbations[0]
    hidden = np.array([p.perturbation == gene and p.media is None for p in screen.conditions])
    train = screen[~hidden[screen.condition]]
    never, measured = pb.Protocol([pb.Knockout(gene), pb.Wait(2)]), list(train.conditions)
    np.testing.assert_allclose(standard_error(train, [never])[0], np.median(standard_error(train, measured), axis=0))


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_an_unknown_error_is_in_the_unit_of_the_values(unit):
    """The spread between rows of a condition where there are several, over all rows where there is one each."""
    rng, names = np.random.default_rng(0), np.repeat(["control", "A", "B"], 200)
    values = unit * (rng.normal(0, [0.1, 2.0], (600, 2)) + np.repeat([0.0, 5.0, 9.0], 200)[:, None])
    adata = anndata.AnnData(values, obs={"perturbation": names})
    adata.var_names = ["A", "B"]
    screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", values="continuous")
    np.testing.assert_allclose(standard_error(screen, screen.conditions), unit * np.array([[0.1, 2.0]] * 3) / 200**0.5, rtol=0.05)
    single = screen[[0, 200, 400]]
    np.testing.assert_allclose(standard_error(single, single.conditions), np.tile(values[::200].std(0, ddof=1), (3, 1)), rtol=1e-5)
