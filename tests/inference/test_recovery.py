"""Find nothing where there is nothing. Coverage of simulated truth takes longer: benchmarks/recovery.py."""

import numpy as np
import pytest

import perturbprob as pb


@pytest.mark.slow
def test_no_fake_perturbation_is_a_hit() -> None:
    """Control cells of one real screen, half of them dealt out to ten perturbations that were never done."""
    controls = pb.datasets.ishikawa2023()
    controls = controls[controls.cells_of("control")]
    chance = np.random.default_rng(0)
    fake = np.where(chance.random(controls.n_cells) < 0.5, 0, chance.integers(1, 11, controls.n_cells))
    protocols = [(pb.Protocol([pb.Knockout(f"fake{k}")]) if k else pb.Protocol()) >> p for k in range(11) for p in controls.conditions]
    screen = pb.Screen(
        counts=controls.counts,
        genes=controls.genes,
        cells=controls.cells,
        conditions=tuple(protocols),
        condition=fake * len(controls.conditions) + controls.condition,
        batches=controls.batches,
        batch=controls.batch,
        size_factor=controls.size_factor,
        baseline=controls.baseline,
        time_unit=controls.time_unit,
    )
    found = pb.effects(pb.fit(pb.node(screen, 5), screen, epochs=30, progress=False), n_draws=50)
    assert int(found["hit"].sum()) <= 0.05 * 10
    assert float((found["local_false_sign_rate"] < 0.05).mean()) < 0.05
    assert float(((found["lower"] > 0) | (found["upper"] < 0)).mean()) < 0.1
