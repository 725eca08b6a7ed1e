"""The Gaussian response model: its algebra against dense normals, what it must get right, and what it refuses."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.response.gaussian import Table, prior_of
from perturbprob.response.prior import STRUCTURES, ResponsePrior
from perturbprob.response.rows import Place, Rows

ONE = ["lasting, alike + changing"]


@pytest.fixture(scope="module")
def small() -> pb.Screen:
    """Two media, three times, two batches, seven knock-outs and control."""
    simulation = pb.simulate(n_cells=4000, n_genes=9, n_perturbations=7, media=("rest", "drug"), times=(1.0, 2.0, 4.0), n_batches=2, seed=2)
    return simulation.screen


@pytest.fixture(scope="module")
def response(small: pb.Screen) -> pb.GaussianResponse:
    return pb.gaussian_response(small, ONE, progress=False)


def somewhere(rows: Rows, name: str) -> ResponsePrior:
    """Return a prior somewhere on its way."""
    prior = prior_of(rows, name)
    with torch.no_grad():
        for k, parameter in enumerate(prior.parameters()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return prior


def dense(rows: Rows, table: Table, prior: ResponsePrior) -> torch.Tensor:
    """Return the covariance of every gene's means, written out."""
    noise = torch.tensor(rows.noise).diag() + table.group_covariance(table.place, table.place)
    return prior.log_scale.exp()[:, None, None] * prior(table.place, table.place) + noise


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_likelihood_and_its_gradient_are_those_of_dense_normals(name: str, small: pb.Screen) -> None:
    rows = Rows.of(small)
    table, prior = Table.of(rows), somewhere(rows, name)
    parameters = list(prior.parameters())

    def reference() -> torch.Tensor:
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(rows.noise), dtype=torch.float64), dense(rows, table, prior))
        return prior.penalty() - normal.log_prob(table.residual.T).sum()

    start = table.loss(prior).item() - reference().item()
    for ours, theirs in zip(
        *(torch.autograd.grad(f(), parameters, allow_unused=True) for f in (lambda: table.loss(prior), reference)), strict=True
    ):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        parameters[0] += 0.1
    assert table.loss(prior).item() - reference().item() == pytest.approx(start, rel=1e-9)


def test_predictions_are_conditional_moments_of_dense_normals(small: pb.Screen) -> None:
    rows = Rows.of(small)
    table, prior = Table.of(rows), somewhere(rows, "free, alike + changing")
    asked = rows.at([p for p in small.conditions if p.perturbations][:3], [small.batches[0]] * 3)
    with torch.no_grad():
        across = prior.log_scale.exp()[:, None, None] * prior(asked, table.place) + table.group_covariance(asked, table.place)
        whole = prior.log_scale.exp()[:, None, None] * prior(asked, asked) + table.group_covariance(asked, asked)
        solved = torch.linalg.solve(dense(rows, table, prior), torch.cat([table.residual.T[..., None], across.mT], 2))
        mean = table.centre + (across @ solved[..., :1])[..., 0].T
        left = whole - across @ solved[..., 1:]
    found = table.posterior(prior, asked, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(found.mean, mean, rtol=1e-8, atol=1e-9)
    assert torch.allclose(found.variance, left.diagonal(dim1=1, dim2=2).T, rtol=1e-7, atol=1e-9)
    half = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    averaged = table.posterior(prior, asked, half)
    assert torch.allclose(averaged.variance[0], left.mean((1, 2)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", STRUCTURES)
def test_control_has_no_effect_and_effects_on_several_genes_add_up(name: str, small: pb.Screen) -> None:
    rows = Rows.of(small)
    prior, t, b = somewhere(rows, name), small.times[1], small.batches[0]
    first, second = (pb.Knockout(gene) for gene in small.perturbations[:2])
    asked = rows.at([pb.Protocol([pb.Wait(t)]), first >> pb.Wait(t), second >> pb.Wait(t), first >> second >> pb.Wait(t)], [b] * 4)
    with torch.no_grad():
        covariance = prior(asked, asked)
        parts = prior(asked, rows.place)
    assert (covariance[0] == 0).all()
    elsewhere = ~(asked.same(rows.place).any(0))  # what does not persist belongs to one condition
    assert torch.allclose(parts[3, elsewhere], (parts[1] + parts[2])[elsewhere])


def test_covariances_are_positive(small: pb.Screen) -> None:
    rows = Rows.of(small)
    for name in STRUCTURES:
        with torch.no_grad():
            assert torch.linalg.eigvalsh(somewhere(rows, name)(rows.place, rows.place)).min() > -1e-9


@pytest.mark.parametrize("structures", [[name] for name in STRUCTURES])
def test_a_screen_that_stands_still_is_predicted_as_it_stands(structures: list[str], small: pb.Screen) -> None:
    hidden = small.perturbations[:2]
    split = pb.split.hold_out_time(small, 4, hidden)
    answer = pb.gaussian_response(split.train, structures, progress=False).predict(split.test.conditions)
    truth = pseudobulk(split.test)["mean"].values
    control = pb.baselines.control_mean(split.train, split.test.conditions).values
    assert ((answer["mean"].values - truth) ** 2).mean() < ((control - truth) ** 2).mean()


def test_intervals_hold_simulated_means_as_often_as_they_say() -> None:
    """The last time of five of twelve simulated knock-outs, from a generator that is not the model."""
    held, said = [], []
    for seed in range(4):
        simulation = pb.simulate(n_cells=6000, n_genes=12, n_perturbations=12, times=(1.0, 2.0, 3.0), n_batches=1, seed=seed)
        split = pb.split.hold_out_time(simulation.screen, 3, simulation.screen.perturbations[:5])
        bulk, response = pseudobulk(split.test), pb.gaussian_response(split.train, ONE, progress=False)
        answer = response.predict(split.test.conditions)
        noise = response.rows.scale**2 / bulk["n_cells"].values[:, None]
        off = np.abs(answer["mean"].values - bulk["mean"].values) / np.sqrt(answer["sd"].values ** 2 + noise)
        held.append(off < 1.645)
        said.append(answer["sd"].values)
    assert 0.8 < np.mean(held) < 0.98
    assert (np.array(said) > 0).all()


def test_the_embedded_screen_is_predicted_better_than_by_one_structure() -> None:
    """On one fold; the whole is in benchmarks/accuracy.py."""
    screen = pb.datasets.ishikawa2023()
    split = pb.split.hold_out_time(screen, 5, screen.perturbations[::2])
    truth = pseudobulk(split.test)["mean"].values
    error = {}
    for name, structures in {"one": ["free, alike"], "all": list(STRUCTURES)}.items():
        mean = pb.gaussian_response(split.train, structures, progress=False).predict(split.test.conditions)["mean"].values
        error[name] = ((mean - truth) ** 2).mean()
    assert error["all"] < error["one"]


def test_predictions_are_the_same_twice_and_leave_torch_alone(small: pb.Screen, response: pb.GaussianResponse) -> None:
    torch.manual_seed(1)
    again = pb.gaussian_response(small, ONE, progress=False)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    assert again.predict(small.conditions).identical(response.predict(small.conditions))


def test_answers_are_labelled_and_wider_for_fewer_cells(small: pb.Screen, response: pb.GaussianResponse) -> None:
    asked = small.conditions[::-1][:4]
    mean, few, many = (response.predict(asked, n_cells=n) for n in (None, 5, 50))
    assert list(mean["condition"].values) == list(map(str, asked))
    assert tuple(mean["gene"].values) == small.genes
    assert (mean["sd"] < many["sd"]).all()
    assert (many["sd"] < few["sd"]).all()
    np.testing.assert_allclose(few["sd"] ** 2 - mean["sd"] ** 2, np.broadcast_to(response.rows.scale**2 / 5, few["sd"].shape))
    assert ((mean["lower"] < mean["mean"]) & (mean["mean"] < mean["upper"])).all()
    wide = response.predict(asked, level=0.99)
    assert (wide["upper"] > mean["upper"]).all()


def test_a_batch_moves_all_conditions_alike(small: pb.Screen, response: pb.GaussianResponse) -> None:
    t = small.times[0]
    asked = [pb.Protocol([pb.Wait(t)]), pb.Knockout(small.perturbations[0]) >> pb.Wait(t)]
    first, second = (response.predict(asked, batch=b)["mean"].values for b in small.batches)
    np.testing.assert_allclose((second - first)[0], (second - first)[1])
    np.testing.assert_allclose(response.predict(asked)["mean"].values, (first + second) / 2)
    half = response.predict(asked, batch=[None, small.batches[0]])["mean"].values
    np.testing.assert_allclose(half, [(first + second)[0] / 2, first[1]])
    each = response.predict(asked, batch=list(small.batches))["mean"].values
    np.testing.assert_allclose(each, [first[0], second[1]])


def test_a_perturbation_never_seen_is_less_sure(small: pb.Screen, response: pb.GaussianResponse) -> None:
    seen, never = pb.Knockout(small.perturbations[0]) >> pb.Wait(2), pb.Knockout("NANOG") >> pb.Wait(2)
    with pytest.warns(UserWarning, match=r"Never trained on.*Knockout\('NANOG'\)"):
        answer = response.predict([seen, never])
    assert np.isfinite(answer["mean"]).all()
    assert (answer["sd"].values[1] > answer["sd"].values[0]).all()


def test_other_media_say_something_of_a_media(small: pb.Screen) -> None:
    """A pair of perturbation and media never seen is told by the same perturbation in the other media."""
    first = small[small.batch == 0]
    split = pb.split.hold_out_media(first, "drug", first.perturbations[:3])
    truth = pseudobulk(split.test)["mean"].values
    answer = pb.gaussian_response(split.train, ONE, progress=False).predict(split.test.conditions)["mean"].values
    control = pb.baselines.control_mean(split.train, split.test.conditions).values
    assert ((answer - truth) ** 2).mean() < ((control - truth) ** 2).mean()


def test_means_with_standard_errors_are_fitted_as_the_counts_they_come_from(small: pb.Screen, response: pb.GaussianResponse) -> None:
    again = pb.gaussian_response(small.pseudobulk(), ONE, progress=False)
    assert again.predict(small.conditions).identical(response.predict(small.conditions))
    bulk = small.pseudobulk()
    known = Rows.of(bulk)
    unknown = Rows.of(replace(bulk, cells_behind=None))
    ratio = unknown.noise / known.noise * (unknown.scale**2 / known.scale**2).mean()
    np.testing.assert_allclose(ratio, 1, atol=0.35)  # what standard errors say of the number of cells


def test_summaries_without_cells_behind_control_are_read(data_path: object) -> None:
    adata = anndata.read_h5ad(data_path("datlinger2017_jurkat_summary.h5ad"))[:, :40].copy()
    adata.var_names = [*sorted(set(adata.obs["perturbation"]) - {"control"}), *map(str, range(40))][:40]  # a screen warns of genes it lacks
    screen = pb.Screen.from_anndata(
        adata, values="continuous", standard_error="uncertainty_se", cells_behind="n_cells", media="media", baseline="unstimulated"
    )
    rows = Rows.of(screen)
    assert np.isfinite(rows.noise).all()
    assert (rows.noise > 0).all()
    assert np.isfinite(pb.gaussian_response(screen, ONE, progress=False).predict(screen.conditions)["mean"]).all()


def test_what_it_refuses(small: pb.Screen, response: pb.GaussianResponse) -> None:
    one = small.conditions[0]
    with pytest.raises(ValueError, match=r"Unknown structure 'fre'.*free"):
        pb.gaussian_response(small, ["fre"])
    for none in ("free", []):
        with pytest.raises(ValueError, match="structures= is a list of names"):
            pb.gaussian_response(small, none)
    with pytest.raises(ValueError, match=r"Nothing was seen in media 'rest' at time 9.* Seen: drug at 1, .*rest at 4"):
        response.predict(pb.Wait(9))
    with pytest.raises(ValueError, match="Nothing was seen in media 'drgu'"):
        response.predict(pb.Media("drgu") >> pb.Wait(2))
    with pytest.raises(ValueError, match="Batch 'btach0' has no training cell"):
        response.predict(one, batch="btach0")
    with pytest.raises(ValueError, match="names 2 batches for 1 conditions"):
        response.predict(one, batch=[small.batches[0]] * 2)
    with pytest.raises(ValueError, match="No condition to predict"):
        response.predict([])
    with pytest.raises(ValueError, match="acts at more than one instant"):
        response.predict(pb.Wait(1) >> pb.Knockout(small.perturbations[0]) >> pb.Wait(1))
    with pytest.raises(ValueError, match="n_cells must be a whole number of at least 1"):
        response.predict(one, n_cells=0)
    with pytest.raises(ValueError, match="level is a probability"):
        response.predict(one, level=1.0)
    for bare in (replace(small.pseudobulk(), cells_behind=None, standard_error=None), replace(small.pseudobulk(), standard_error=None)):
        with pytest.raises(ValueError, match="does not say how well they are known"):
            pb.gaussian_response(bare)
    control = pb.gaussian_response(small[small.cells_of("control")], ONE, progress=False)
    with pytest.raises(ValueError, match="no perturbed condition was trained on"):
        control.predict(pb.Knockout(small.perturbations[0]) >> pb.Wait(2))


@pytest.mark.usefixtures("unchecked")
def test_a_condition_is_no_name(response: pb.GaussianResponse) -> None:
    with pytest.raises(TypeError, match="A condition is a protocol"):
        response.predict("NANOG")
    with pytest.raises(TypeError, match="A Screen is needed here"):
        pb.gaussian_response("screen")


def test_places_know_what_was_done_alike() -> None:
    members = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    index = torch.zeros(3, dtype=torch.int64)
    place = Place(members, index, index, index)
    assert place.same(place).tolist() == [[False, False, False], [False, True, False], [False, False, True]]
