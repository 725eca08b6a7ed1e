"""The report of a fit: one file with everything in it, in which names are text."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest

import perturbprob as pb
from perturbprob import report
from perturbprob.report import _CONFOUNDED, write_report

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def screen():
    """Two knock-outs and control; one of the perturbed genes has a name that looks like HTML."""
    adata = pb.simulate(n_cells=150, n_genes=8, n_perturbations=2, n_batches=2, seed=1).adata
    target = sorted(set(adata.obs["perturbation"]) - {"control"})[0]
    adata.var_names = ["<b>" if gene == target else gene for gene in adata.var_names]
    adata.obs["perturbation"] = ["<b>" if name == target else name for name in adata.obs["perturbation"]]
    return pb.Screen.from_anndata(adata, time="time", time_unit="day", batch="batch")


@pytest.fixture(scope="module")
def fit(screen):
    return pb.fit(pb.node(screen, n_latent=2, n_hidden=8), screen, epochs=3, minibatch=64, seed=11, progress=False)


@pytest.fixture(scope="module")
def hits(fit):
    """The effects of the fit, of which the first perturbation is made a hit that changes one gene surely."""
    result = pb.effects(fit, n_draws=3)
    for name, value in (("log_fold_change", -0.7), ("lower", -0.9), ("upper", -0.5)):
        result[name][:] = {"lower": -1.0, "upper": 1.0}.get(name, 0.0)
        result[name][1, 2] = value
    result["log_evidence"][:], result["hit"][:] = [9.0, -3.0], [True, False]
    return result


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr(report, "N_DRAWS", 5)


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.fixture
def page(tmp_path):
    """Write a report and read it back."""

    def read(fit, **arguments):
        return Page(write_report(fit, tmp_path / "report.html", **arguments).read_text(encoding="utf-8"))

    return read


def test_report_is_one_file_that_fetches_nothing(fit, hits, tmp_path):
    path = write_report(fit, tmp_path / "new" / "report.html", hits=hits)
    assert path == tmp_path / "new" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", source))
    page = Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2
    assert all(value.startswith("data:image/png;base64,iVBORw0KGgo") for value in sources)
    assert all(value for name, value in page.attributes if name == "alt")


def test_report_says_what_was_fitted_and_how_it_went(fit, screen, hits, page):
    text = page(fit, hits=hits).text
    first, second = screen.summary().sum()
    for words in (
        "cells\n150\n",
        f"batch1 ({first} cells), batch2 ({second} cells)",
        "n_latent 2",
        "epochs 3",
        "seed\n11",
        f"torch {fit.versions['torch']}",
    ):
        assert words in text
    assert fit.report() in text
    for condition in fit.trained_on["conditions"]:
        assert condition in text


def test_report_names_hits_with_their_surest_changes(fit, hits, page):
    text = page(fit, hits=hits).text
    hit, other = hits.tested_perturbation.values
    assert "1 of 2 perturbations are hits" in text
    assert f"{hits.gene.values[2]} −0.70 (−0.90 to −0.50) at day 2" in text
    assert f"Not told from doing nothing: {other}." in text
    assert f"\n{hit}\n" in text


def test_names_are_text_and_never_tags(fit, hits, page):
    read = page(fit, hits=hits)
    assert "b" not in read.tags
    assert "Knockout('<b>') >> Wait(1)" in read.text


def test_report_asks_for_effects_when_none_are_given(fit, page):
    text = page(fit).text
    assert "of 2 perturbations are hits" in text
    assert all(p.gene in text for p in fit.model.vocabulary.perturbations)


def test_report_of_effects_against_a_perturbation_has_no_hits(fit, hits, page):
    against = hits.drop_vars(["hit", "log_evidence"]).assign_attrs(against="<b>")
    assert "Compared with <b>: hits are only told against control." in page(fit, hits=against).text


def test_report_of_a_training_that_broke_off_says_so(fit, page):
    read = page(replace(fit, losses={"train": [], "validation": []}))
    assert "Nothing was compared with control: the training broke off." in read.text
    assert read.tags.count("img") == 1


def test_report_shows_the_size_of_every_batch_effect(fit, screen, hits, page):
    text = page(fit, hits=hits).text
    size = pb.posterior(fit, report.N_DRAWS).posterior["batch_effect"].std("gene").mean(("chain", "draw"))
    for batch, cells in screen.summary().sum().items():
        assert re.search(rf"{batch}\n{cells}\n{float(size.sel(batch=batch)):.3f} \(", text)


def test_report_of_one_batch_without_perturbations_says_so(page):
    screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=0, times=(1.0, 2.0), n_batches=1, seed=1).screen
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(screen, n_latent=2, n_hidden=8)
    read = page(pb.fit(model, screen, epochs=1, progress=False))
    assert "There is one batch: its effect is fixed to 0." in read.text
    assert "Nothing was compared with control: the fit has no perturbation." in read.text
    assert "NOT TRAINED" in read.text


def test_report_says_what_is_confounded(fit, hits, page):
    assert "No two of perturbation, media, time and batch are fully confounded." in page(fit, hits=hits).text
    pairs = [sorted(pair) for pair in _CONFOUNDED]
    text = page(replace(fit, trained_on=fit.trained_on | {"confounded": pairs}), hits=hits).text
    for (first, second), meaning in zip(pairs, _CONFOUNDED.values(), strict=True):
        assert f"{first} and {second} are fully confounded: each {first} goes with one {second}. {meaning}" in text


def test_report_shows_a_predictive_check(fit, screen, hits, page):
    check = pb.predictive_check(fit, screen, n_draws=2, progress=False)
    read = page(fit, hits=hits, check=check)
    assert check.summary() in read.text
    assert read.tags.count("img") == 3


def test_fit_report_writes_the_file_and_returns_the_verdict(fit, tmp_path):
    assert "Verdict" in fit.report(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_a_folder_in_place_of_a_file_is_refused(fit, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder\. Name a file, such as .*report\.html"):
        write_report(fit, tmp_path)


def test_a_fit_without_a_posterior_is_reported_without_effects(tmp_path):
    bulk = pb.simulate(n_cells=300, n_genes=8, n_perturbations=2, n_batches=2, seed=1).screen.pseudobulk()
    fit = pb.fit(pb.node(bulk), bulk, objective="paths", epochs=2, validation=0.0, progress=False)
    fit.report(tmp_path / "report.html")
    assert "objective=&#x27;paths&#x27; fits no posterior" in (tmp_path / "report.html").read_text()
