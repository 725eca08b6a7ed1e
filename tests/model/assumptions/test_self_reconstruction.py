"""L(z) = z: as many pairs as cells, and only where nothing moves."""

import numpy as np
import pytest

import perturbprob as pb


def test_there_is_a_pair_for_each_cell_on_the_path_of_its_condition(screen):
    pairs = pb.SelfReconstruction().pairs(screen)
    assert len(pairs) == screen.n_cells
    assert [pair.start for pair in pairs[:3]] == [f"cell {cell}" for cell in screen.cells[:3]]
    assert all(pair.start == pair.end for pair in pairs)
    names = {(p.perturbation, p.media or screen.baseline): k for k, p in enumerate(screen.conditions)}
    for pair in pairs[::50]:
        perturbed, elsewhere = pair.perturbation != "control", pair.media != screen.baseline
        assert (pair.perturbation, pair.media) in names
        assert pair.path == {(True, True): 1, (True, False): 2, (False, True): 3, (False, False): 4}[perturbed, elsewhere]
    assert len(screen.layout.paths([pb.SelfReconstruction()])) == len(screen.layout.paths()) + screen.n_cells


def test_it_enters_the_identity_and_is_refused_elsewhere(screen, tmp_path):
    small = screen[::6]
    fit = pb.fit(pb.vae(small, 2, shift="identity", assumptions=[pb.SelfReconstruction()]), small, epochs=1, progress=False)
    assert np.isfinite(fit.losses["train"]).all()
    fit.save(tmp_path)
    assert pb.load(tmp_path).model.assumptions[0].assumption == pb.SelfReconstruction()
    stable = [pb.SelfReconstruction(), pb.UneditedStable()]
    assert len(pb.vae(small, 2, shift="identity", assumptions=stable).assumptions) == 2
    with pytest.raises(ValueError, match=r"SelfReconstruction maps each cell onto itself, and LatentShift moves it. Leave it out, or"):
        pb.vae(small, 2, assumptions=[pb.SelfReconstruction()])
    with pytest.raises(ValueError, match="SelfReconstruction maps each cell onto itself, and NeuralODE moves it"):
        pb.node(small, 2, assumptions=[pb.SelfReconstruction()])


def test_no_screen_tests_it_and_steady_states_need_waits_that_add_up(screen):
    assert "each cell is measured once" in repr(pb.SelfReconstruction().test(screen))
    with pytest.raises(ValueError, match=r"SteadyState needs W\(s\) then W\(t\) to be W\(s \+ t\), and LatentShift does not promise that"):
        pb.vae(screen, 2, assumptions=[pb.SteadyState()])
