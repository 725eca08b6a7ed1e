"""The training loop: reproducible, careful of the user's things, and clear when it fails."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.dynamics import SolverError
from perturbprob.inference.fit import _Training
from perturbprob.inference.verdict import verdict

SETTINGS = {"epochs": 2, "warmup": 1, "progress": False}


@pytest.fixture(scope="module")
def small(screen: pb.Screen) -> pb.Screen:
    """Two hundred cells."""
    return screen[:200]


def parameters(fit: pb.Fit) -> torch.Tensor:
    """All parameters of a fit in one vector."""
    return torch.cat([p.flatten() for module in (fit.model, fit.guide) for p in module.parameters()])


def test_same_seed_same_fit_and_other_seed_another(small: pb.Screen) -> None:
    first, second, other = (pb.fit(pb.node(small, 2), small, seed=seed, **SETTINGS) for seed in (1, 1, 2))
    assert first.losses == second.losses
    assert torch.equal(parameters(first), parameters(second))
    assert not torch.equal(parameters(first), parameters(other))


def test_the_users_random_state_and_model_are_left_alone(small: pb.Screen) -> None:
    model = pb.node(small, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit = pb.fit(model, small, **SETTINGS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(before["decoder.network.0.weight"], fit.model.decoder.network[0].weight)


FRESH = """
import warnings; warnings.simplefilter("ignore")
import torch, perturbprob as pb
torch.set_num_threads({threads})
one, two = (pb.simulate(n_cells=200, n_genes=12, n_perturbations=3, n_batches=2, seed=s).screen for s in (1, 2))
if {both}:
    pb.fit(pb.node(one, 2), one, epochs=2, progress=False)
fit = pb.fit(pb.node(two, 3), two, epochs=2, progress=False)
print(fit.losses, float(sum(p.double().abs().sum() for m in (fit.model, fit.guide) for p in m.parameters())))
"""


def test_a_second_model_in_one_process_fits_as_in_a_fresh_one() -> None:
    runs = [[sys.executable, "-c", FRESH.format(both=both, threads=1)] for both in (True, False)]
    second, fresh = (subprocess.run(r, capture_output=True, text=True, check=True).stdout for r in runs)
    assert second == fresh
    assert "nan" not in fresh


def test_the_loss_falls_and_the_report_says_so(fit: pb.Fit) -> None:
    assert fit.losses["validation"][-1] < fit.losses["validation"][0]
    assert "Verdict:" in fit.report()
    assert "Validation cells:" in fit.report()
    assert "600 cells × 12 genes" in repr(fit)


def test_a_short_training_is_called_short() -> None:
    losses = {"train": [2.0, 1.0, *[0.9] * 20], "validation": []}
    settings = {"epochs": 22, "best_epoch": 21}
    assert "TOO SHORT: 220 steps" in verdict(losses, settings | {"steps_per_epoch": 10})
    assert "CONVERGED" in verdict(losses, settings | {"steps_per_epoch": 100})


def test_one_time_cannot_teach_the_decay(fit: pb.Fit, small: pb.Screen) -> None:
    assert "decay" not in fit.report()
    once = small[small.cells_of(small.conditions[0])]
    with pytest.warns(UserWarning, match="one condition"):
        assert "equally long: the decay γ of the latent state keeps the value" in pb.fit(pb.node(once, 2), once, **SETTINGS).report()


def test_a_wide_encoder_survives_saving(small: pb.Screen, tmp_path: Path) -> None:
    fit = pb.fit(pb.node(small, 2, n_hidden=16), small, **SETTINGS)
    assert fit.guide.encoder.network[0].out_features == 16
    fit.save(tmp_path / "fit")
    torch.testing.assert_close(parameters(pb.load(tmp_path / "fit")), parameters(fit))


def test_the_best_epoch_is_kept(small: pb.Screen) -> None:
    fit = pb.fit(pb.node(small, 2), small, epochs=6, warmup=1, learning_rate=0.05, progress=False)
    assert fit.settings["best_epoch"] == int(np.argmin(fit.losses["validation"]))


def test_patience_ends_the_training(small: pb.Screen) -> None:
    fit = pb.fit(pb.node(small, 2), small, epochs=60, warmup=1, learning_rate=0.05, patience=2, progress=False)
    assert len(fit.losses["train"]) < 60
    assert len(fit.losses["train"]) - 1 - fit.settings["best_epoch"] == 2


def test_each_epoch_is_shown_as_it_is_and_the_training_goes_on_undisturbed(small: pb.Screen) -> None:
    shown: list[pb.Fit] = []

    def look(fit: pb.Fit) -> None:
        torch.rand(3)
        shown.append(fit)

    plain = pb.fit(pb.node(small, 2), small, epochs=3, validation=0.0, progress=False)
    watched = pb.fit(pb.node(small, 2), small, epochs=3, validation=0.0, each_epoch=look, progress=False)
    torch.testing.assert_close(parameters(watched), parameters(plain), rtol=0, atol=0)
    assert [len(fit.losses["train"]) for fit in shown] == [1, 2, 3]
    torch.testing.assert_close(parameters(shown[-1]), parameters(plain), rtol=0, atol=0)
    assert not torch.equal(shown[0].guide.block_loc, shown[1].guide.block_loc)


def test_the_training_ends_where_it_is_told_to(small: pb.Screen) -> None:
    fit = pb.fit(pb.node(small, 2), small, epochs=5, each_epoch=lambda fit: len(fit.losses["train"]) >= 2, progress=False)
    assert len(fit.losses["train"]) == 2


def test_no_validation_cells_keeps_the_last_epoch(small: pb.Screen) -> None:
    fit = pb.fit(pb.node(small, 2), small, validation=0.0, **SETTINGS)
    assert fit.losses["validation"] == []
    assert fit.settings["best_epoch"] == 1


def test_it_knows_what_it_was_trained_on(fit: pb.Fit, screen: pb.Screen) -> None:
    assert fit.trained_on["cells"] == list(screen.cells)
    assert set(fit.trained_on["conditions"]) == set(map(repr, screen.conditions))
    total = sum(n for row in fit.trained_on["conditions"].values() for n in row.values())
    assert total == screen.n_cells


def test_a_loss_that_is_not_finite_names_step_site_batch_and_cells(small: pb.Screen) -> None:
    spoilt = small.counts.copy()
    spoilt.data[spoilt.indptr[7]] = 1e38
    gene = small.genes[spoilt.indices[spoilt.indptr[7]]]
    message = rf"not finite at step \d+ \(site .*counts.*; batch batch\d; worst cells {small.cells[7]}; genes {gene}\)"
    with pytest.raises(pb.NonFiniteLoss, match=message) as caught:
        pb.fit(pb.node(small, 2), replace(small, counts=spoilt), validation=0.0, **SETTINGS)
    assert torch.isfinite(parameters(caught.value.fit)).all()
    sent = pickle.loads(pickle.dumps(caught.value))  # as from a process that fits one of several
    assert str(sent) == str(caught.value)
    assert torch.equal(parameters(sent.fit), parameters(caught.value.fit))


def test_a_model_in_double_precision_is_refused(small: pb.Screen) -> None:
    with pytest.raises(ValueError, match=r"trained in single precision; this one is in torch\.float64\. Take model\.float\(\)"):
        pb.fit(pb.node(small, 2).double(), small, **SETTINGS)


def test_one_condition_is_a_screen_and_fit_says_what_it_cannot_teach(small: pb.Screen) -> None:
    one = small[small.cells_of(small.conditions[0])]
    with pytest.warns(UserWarning, match="no effect of a perturbation, media or time"):
        fit = pb.fit(pb.node(one, 2), one, **SETTINGS)
    assert np.isfinite(fit.losses["train"]).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be between 1"),
        ({"epochs": 1.5}, r"epochs must be a whole number; got 1\.5"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, r"seed must be a whole number from 0 .*got 1\.5"),
        ({"minibatch": 0}, "minibatch must be between 1"),
        ({"learning_rate": -1.0}, "learning_rate must be between 1e-08"),
        ({"learning_rate": "x"}, "learning_rate must be a number; got 'x'"),
        ({"learning_rate": float("nan")}, "learning_rate must be between 1e-08 and 1; got nan"),
        ({"warmup": "a"}, "warmup must be a whole number; got 'a'"),
        ({"warmup": -1}, "warmup must be between 0"),
        ({"epochs": True}, "epochs must be a whole number; got True"),
        ({"validation": 1.0}, r"validation must be between 0 and 0\.9"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_work(small: pb.Screen, setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.fit(pb.node(small, 2), small, **(SETTINGS | setting))


@pytest.mark.filterwarnings("ignore::perturbprob.UndeclaredWarning")
def test_absent_factors(small: pb.Screen) -> None:
    """A media-only and a time-only screen fit and predict."""
    adata = pb.simulate(n_cells=300, n_genes=8, n_perturbations=2, media=("rest", "drug"), seed=2).adata
    adata = adata[adata.obs.perturbation == "control"].copy()
    for columns in ({"media": "media", "baseline": "rest"}, {"time": "time"}):
        screen = pb.Screen.from_anndata(adata, perturbation=None, batch="batch", **columns)
        fit = pb.fit(pb.node(screen, 2), screen, **SETTINGS)
        assert np.isfinite(pb.predict(fit, n_draws=2, batch="average")["mean"]).all()


class Explosive(torch.nn.Module):
    """A field that no number of steps solves."""

    def forward(self, z: torch.Tensor, perturbation: torch.Tensor, media: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return 1e3 * z + 1e4 * (z - z.detach() + 1) * torch.sin(1e3 * clock)


def test_a_wait_that_cannot_be_solved_names_condition_and_span(small: pb.Screen) -> None:
    with pytest.raises(SolverError, match=r"could not be solved with \d+ steps.*Worst: .*Wait\(.*lower learning_rate") as caught:
        pb.fit(pb.node(small, 2, field=Explosive()), small, **SETTINGS)
    assert "Trace Shapes" not in str(caught.value)


def test_the_dispersion_stays_at_the_moments_until_the_warm_up_is_over(small: pb.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    at, epoch = [], _Training._epoch

    def recorded(self: _Training, optimiser: torch.optim.Optimizer) -> float:
        """Keep the dispersion as it is after each epoch."""
        loss = epoch(self, optimiser)
        at.append(self.guide.dispersion_loc.detach().clone())
        return loss

    monkeypatch.setattr(_Training, "_epoch", recorded)
    pb.fit(pb.node(small, 2), small, epochs=6, warmup=3, progress=False)
    assert [torch.equal(now, at[0]) for now in at] == [True, True, False, False, False, False]
