"""Moments over groups of cells: against plain loops over dense values."""

import numpy as np
from scipy.sparse import csr_array

from perturbprob.experiment.moments import Moments, relative_counts


def test_moments_are_those_of_each_group_taken_by_itself():
    rng = np.random.default_rng(0)
    counts, group = rng.poisson(1.0, (60, 5)).astype(np.float32), rng.choice([0, 1, 3], 60)
    group[0] = 4
    found = Moments.of(csr_array(counts), group, 5)
    assert found.n_cells.tolist() == [int((group == k).sum()) for k in range(5)]
    for k in (0, 1, 3):
        own = counts[group == k].astype(float)
        np.testing.assert_allclose(found.mean[k], own.mean(0))
        np.testing.assert_allclose(found.variance[k], own.var(0))
        np.testing.assert_allclose(found.unbiased_variance[k], own.var(0, ddof=1))
    assert np.isnan(found.mean[2]).all()
    assert (found.squares[4] == 0).all()
    assert np.isnan(found.unbiased_variance[4]).all()


def test_without_groups_all_cells_are_one():
    counts = csr_array(np.array([[1.0, 2.0], [3.0, 0.0]]))
    np.testing.assert_allclose(Moments.of(counts).mean, [[2.0, 1.0]])


def test_relative_counts_leave_the_counts_alone():
    counts = csr_array(np.array([[1, 2], [3, 0]], dtype=np.float32))
    np.testing.assert_allclose(relative_counts(counts, np.array([2.0, 0.5])).toarray(), [[0.5, 1.0], [6.0, 0.0]])
    np.testing.assert_allclose(counts.toarray(), [[1, 2], [3, 0]])
