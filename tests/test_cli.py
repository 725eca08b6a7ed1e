"""The shell's verbs on a small screen: what is printed, what is written, and what is said when something is wrong."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import perturbprob as pb
from perturbprob import demo as demonstration
from perturbprob.cli import app
from perturbprob.studies.proof_of_principle import LOSSES

COLUMNS = ["--perturbation", "gene", "--control", "scrambled", "--perturbation-type", "CRISPRi", "--time", "day", "--time-unit", "day"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def said(*arguments: object) -> str:
    """Run to the end and return stdout."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object) -> str:
    """Return the one line that is printed when a run is refused."""
    result = run(*arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    *_, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose columns have names of their own."""
    adata = pb.simulate(n_cells=240, n_genes=10, n_perturbations=2, n_batches=2, seed=1).adata
    adata.obs = adata.obs.rename(columns={"perturbation": "gene", "time": "day", "batch": "lane"}).drop(columns="perturbation_type")
    adata.obs["gene"] = adata.obs["gene"].astype(str).replace("control", "scrambled")
    adata.obs["depth"] = np.asarray(adata.X.sum(1)).ravel() / 100
    adata.layers["log"] = adata.X.log1p()
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def node(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fits") / "node"
    text = said("fit", screen, *COLUMNS, "--batch", "lane", "--latent", 2, "--epochs", 2, "--seed", 3, "--out", out)
    for promised in ("240 cells × 10 genes, 6 conditions", "batches without control cells: none", "Verdict: ", f"Wrote {out}"):
        assert promised in text
    return out


def test_fit_saves_what_python_loads(node: Path) -> None:
    fit = pb.load(node)
    assert (fit.model.n_latent, fit.seed, fit.settings["epochs"], len(fit.trained_on["cells"])) == (2, 3, 2, 240)
    assert fit.model.vocabulary.time_unit == "day"
    assert all(isinstance(p, pb.Interference) for p in fit.model.vocabulary.perturbations)
    assert json.loads((node / "screen.json").read_text(encoding="utf-8")) == {
        "perturbation": "gene",
        "control": ["scrambled"],
        "perturbation_type": "CRISPRi",
        "time": "day",
        "time_unit": "day",
        "batch": "lane",
    }


@pytest.mark.slow
def test_evaluate_scores_a_fit_beside_the_baselines(tmp_path: Path) -> None:
    adata = pb.simulate(n_cells=400, n_genes=8, n_perturbations=3, times=(1.0, 2.0), n_batches=2, seed=1).adata
    hidden = (adata.obs["perturbation"] == adata.obs["perturbation"].unique()[-1]) & (adata.obs["time"] == 2)
    apart = hidden | (np.arange(400) % 2 == 0) & (adata.obs["perturbation"] == "control")
    files = {"all": adata, "train": adata[~hidden].copy(), "test": adata[apart].copy(), "rest": adata[~apart].copy()}
    for name, cells in files.items():
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    whole, train, test, rest = (tmp_path / f"{name}.h5ad" for name in files)
    out, node, other = tmp_path / "scores.csv", tmp_path / "node", tmp_path / "other"
    said("fit", train, "--latent", 2, "--epochs", 1, "--out", node, "--time", "time", "--batch", "batch")
    said("fit", rest, "--latent", 2, "--epochs", 1, "--out", other, "--time", "time", "--batch", "batch")
    assert "The model" in said("evaluate", node, whole, "--draws", 19, "--out", out)
    assert set(pd.read_csv(out)["predictor"]) >= {"model", "noise floor", "control mean"}
    facts = json.loads(said("evaluate", other, test, "--train", rest, "--draws", 19, "--json"))
    assert facts["overall"]["model"]["error"] > 0
    assert "was trained on" in refused("evaluate", node, rest, "--train", test)
    assert "give --train" in refused("evaluate", other, test)
    (other / "screen.json").unlink()  # as where the fit was saved from Python
    assert "name the column with --batch" in refused("evaluate", other, test, "--train", rest)
    assert "none is left to test on" in refused("evaluate", node, train)


def test_fit_reads_size_factors_and_prints_one_object(screen: Path, tmp_path: Path) -> None:
    facts = json.loads(
        said(
            "fit", screen, *COLUMNS, "--batch", "lane", "--size-factor", "depth", "--epochs", 1, "--latent", 2, "--out", tmp_path, "--json"
        )
    )
    assert list(facts) == ["cells", "genes", "conditions", "epochs", "elbo_first", "elbo_last", "report", "seconds", "files"]
    assert (facts["cells"], facts["genes"], facts["conditions"], facts["epochs"]) == (240, 10, 6, 1)
    assert facts["elbo_first"] == facts["elbo_last"] == -pb.load(tmp_path).losses["validation"][0]
    assert all(Path(file).is_file() for file in facts["files"])


def test_a_screen_without_perturbations_is_fitted(screen: Path, tmp_path: Path) -> None:
    options = ["--perturbation", "None", "--time", "day", "--batch", "lane", "--epochs", 1, "--latent", 2]
    said("fit", screen, *options, "--out", tmp_path)
    assert pb.load(tmp_path).model.vocabulary.perturbations == ()
    assert json.loads(said("check", tmp_path, screen, "--draws", 1, "--json"))["cells"] == 240


def test_a_loss_that_is_not_finite_is_one_line_and_the_last_good_fit_is_kept(
    screen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def fail(*arguments: object) -> torch.Tensor:
        steps.append(1)
        return clip(*arguments) if len(steps) < 2 else torch.tensor(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
    line = refused("fit", screen, *COLUMNS, "--batch", "lane", "--epochs", 3, "--latent", 2, "--out", tmp_path)
    assert "The loss is not finite at step 1" in line
    assert f"kept in {tmp_path / 'last_good'}." in line
    assert pb.load(tmp_path / "last_good").model.n_latent == 2


def test_check_remembers_the_columns_of_the_fit(node: Path, screen: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "check.csv"
    text = said("check", node, screen, "--draws", 2, "--out", out)
    assert "2 replicated screens" in text
    assert f"Wrote {out}." in text
    table = pd.read_csv(out)
    assert list(table) == ["level", "group", "statistic", "gene", "observed", "replicated", "replicated_sd", "tail_probability"]
    assert len(table) == 3 * 10 * (1 + 6 + 2)
    counts = pb.datasets.load(screen, perturbation="gene", control="scrambled", perturbation_type="CRISPRi").counts.toarray()
    everyone = table[(table.level == "all") & (table.statistic == "mean")]
    assert everyone.observed.to_numpy() == pytest.approx(counts.mean(0))


def test_check_prints_one_object(node: Path, screen: Path) -> None:
    facts = json.loads(said("check", node, screen, "--draws", 2, "--json"))
    sides = [f"{name}_{side}" for name in ("mean", "variance", "zero") for side in ("observed", "replicated")]
    assert list(facts) == ["cells", "genes", "n_draws", *sides, "files"]
    assert facts["files"] == []
    assert 0 < facts["zero_replicated"] < 1


def test_an_option_that_is_given_beats_the_remembered_one(node: Path, screen: Path) -> None:
    assert "batch='lan' is not a column of adata.obs. Did you mean 'lane'?" in refused("check", node, screen, "--batch", "lan")


def test_predict_is_what_python_predicts(node: Path, tmp_path: Path) -> None:
    fit, out = pb.load(node), tmp_path / "made" / "prediction.csv"
    gene = fit.model.vocabulary.perturbations[0].gene
    expected = pb.predict(fit, pb.Interference(gene) >> pb.Wait(2), n_draws=4, scale="log1p", batch="batch1")
    asked = ["predict", node, f"Interference('{gene}') >> Wait(2)", "--scale", "log1p", "--batch", "batch1", "--draws", 4]
    facts = json.loads(said(*asked, "--json", "--out", out))
    assert list(facts) == ["protocol", "batch", "scale", "units", "level", "n_draws", "genes", "files"]
    assert (facts["protocol"], facts["units"], facts["files"]) == (
        f"Interference('{gene}') >> Wait(2)",
        "mean of log(1 + count)",
        [str(out)],
    )
    table = pd.read_csv(out)
    for side in ("mean", "lower", "upper"):
        assert [value[side] for value in facts["genes"].values()] == pytest.approx(expected[side].values[0])
        assert table[side].to_numpy() == pytest.approx(expected[side].values[0])
    lines = said(*asked).splitlines()
    assert lines[0] == f"Interference('{gene}') >> Wait(2): mean of log(1 + count), mean and central 90 % interval"
    assert [line.split()[0] for line in lines[-10:]] == list(fit.model.vocabulary.genes)


def test_a_warning_is_one_line_beside_the_answer(screen: Path, tmp_path: Path) -> None:
    result = run("fit", screen, *COLUMNS, "--epochs", 1, "--latent", 2, "--out", tmp_path, "--json")
    assert json.loads(result.stdout)["cells"] == 240
    assert [line[:33] for line in result.stderr.splitlines() if "Warning" in line] == ["Warning: The screen has one batch"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--perturbation", "genes"], "perturbation='genes' is not a column of adata.obs. Did you mean 'gene'"),
        (["--control", "NTX"], "control='NTX' does not occur"),
        (["--perturbation-type", "CRISPRx"], "neither a column of adata.obs nor a known type"),
        (["--layer", "log"], "non-integer values"),
        (["--size-factor", "size"], "size_factor='size' is not a column"),
        (["--epochs", 0], "epochs must be"),
        (["--latent", 0], "n_latent"),
    ],
)
def test_fit_refuses_in_one_line(screen: Path, tmp_path: Path, options: list[object], line: str) -> None:
    assert line in refused("fit", screen, *COLUMNS, "--batch", "lane", "--out", tmp_path, *options)


def test_files_that_cannot_be_read_or_written_are_named(screen: Path, tmp_path: Path) -> None:
    assert "There is no file" in refused("fit", tmp_path / "screen.h5ad", "--out", tmp_path)
    (cut := tmp_path / "cut.h5ad").write_bytes(screen.read_bytes()[:4000])
    assert f"Cannot read {cut}: it is damaged" in refused("fit", cut, "--out", tmp_path)
    (other := tmp_path / "other.h5mu").write_bytes(screen.read_bytes())
    assert f"Cannot read {other}: it is damaged, cut off, or not what its name says" in refused("fit", other, "--out", tmp_path)
    assert f"File exists: {cut}" in refused("fit", screen, *COLUMNS, "--out", cut)


@pytest.mark.parametrize(
    ("protocol", "options", "line"),
    [
        ("NANOG", [], "Cannot read 'NANOG' as a protocol. Write it like Knockout('NANOG')"),
        ("Interference('NANOG') >> Wait(2)", [], "Interference('NANOG') was never seen by this model"),
        ("Wait(-1)", [], "Wait needs a finite time of at least 0; got -1"),
        ("Wait(2)", ["--draws", 0], "n_draws must be a whole number of at least 1; got 0."),
        ("Wait(2)", ["--batch", "lane7"], "Batch 'lane7' was never seen by this model"),
        ("Wait(2)", ["--scale", "rates"], "Unknown scale 'rates'"),
    ],
)
def test_predict_refuses_in_one_line(node: Path, protocol: str, options: list[object], line: str) -> None:
    assert line in refused("predict", node, protocol, *options)


def test_check_refuses_in_one_line(node: Path, screen: Path, tmp_path: Path) -> None:
    assert "There is no fit in" in refused("check", tmp_path, screen)
    assert "There is no file" in refused("check", node, tmp_path / "screen.h5ad")
    assert "n_draws must be a whole number of at least 1; got 0." in refused("check", node, screen, "--draws", 0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lacking(*arguments: object, **options: object) -> None:
        raise ImportError("Figures need matplotlib: pip install perturbprob[plots]")

    monkeypatch.setattr("perturbprob.cli.run_demo", lacking)
    assert refused("demo", "--out", tmp_path).endswith("pip install perturbprob[plots]")


def test_help_is_printed_without_a_verb() -> None:
    assert all(verb in run().output for verb in ("demo", "fit", "check", "evaluate", "predict"))


def test_held_out_cells_are_kept_from_the_fit_and_the_same_in_every_demonstration() -> None:
    screen, train, test = demonstration.held_out()
    chosen = np.random.default_rng(0).random(14945) < 0.1
    assert list(test.cells) == list(screen.cells[chosen])
    assert list(train.cells) == list(screen.cells[~chosen])
    assert set(demonstration.held_out(5)[2].cells) < set(test.cells)


@pytest.mark.slow
def test_the_demonstration_says_and_writes_all_that_it_promises(tmp_path: Path) -> None:
    result = run("demo", "--quick", "--epochs", 2, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert set(facts) == {
        *("cells", "genes", "elbo_first", "elbo_last", "heldout_logp", "baseline_condition_nb", "baseline_nb"),
        *("zero_observed", "zero_replicated", "seconds", "files"),
    }
    assert (facts["cells"], facts["genes"]) == (2989, 103)
    assert facts["elbo_last"] > facts["elbo_first"]
    assert facts["baseline_condition_nb"] > facts["baseline_nb"]
    for promised in (
        "2,989 cells × 103 genes, 96 conditions",
        "time and batch are fully confounded",
        f"{facts['elbo_first']:.4f} after the first epoch, {facts['elbo_last']:.4f} in the end",
        f"this fit                             {facts['heldout_logp']:.4f}",
        f"observed {facts['zero_observed']:.4f}, replicated {facts['zero_replicated']:.4f}",
        "Verdict: ",
        "Wrote, after ",
    ):
        assert promised in result.stderr
    written = {path.relative_to(tmp_path).as_posix() for path in map(Path, facts["files"]) if path.stat().st_size}
    assert written == {
        *("posterior.nc", "report.html", "fit/fit.json", "fit/tensors.pt"),
        *("losses.png", "predictive_check.png", "effects.png"),
    }
    fit = pb.load(tmp_path / "fit")
    assert not set(fit.trained_on["cells"]) & set(demonstration.held_out()[2].cells)


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == version("perturbprob")


def test_the_study_prints_rows_baselines_and_floor():
    found = json.loads(said("study", "proof-of-principle", "--seeds", 2, "--steps", 20, "--json"))
    assert {"start", "loss", "step", "mse_mean", "mse_sd", "win_rate"} <= set(found["rows"][0])
    assert {row["loss"] for row in found["chosen"]} == {"eq5", "eq5+eq9"}
    assert found["noise_floor"] < min(found["baselines"].values())


def test_the_study_prints_its_controls():
    found = json.loads(said("study", "proof-of-principle", "--seeds", 2, "--steps", 4, "--controls", "--json"))
    assert {row["loss"] for row in found["rows"]} == set(LOSSES)


def test_the_package_is_a_command():
    import subprocess
    import sys

    run = subprocess.run([sys.executable, "-m", "perturbprob", "--version"], capture_output=True, text=True, check=True)
    assert version("perturbprob") in run.stdout
