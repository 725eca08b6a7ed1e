"""Several processes: alike to the last bit, together what one would be, and none waits for one that ended."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from scipy.sparse import csr_array

import perturbprob as pb
from perturbprob.dynamics import hidden_layer
from perturbprob.inference import distributed
from perturbprob.inference.distributed import Processes, launched
from perturbprob.inference.elbo import Elbo
from perturbprob.inference.fit import _Training
from perturbprob.inference.loader import shuffled
from perturbprob.measurement import fused
from perturbprob.model.sparse_input import stays_sparse

HERE = Path(__file__).parent
SETTINGS = {"epochs": 2, "warmup": 1, "progress": False}
together = pytest.mark.skipif(
    find_spec("lightning") is None or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="two processes need Linux, two cores and lightning: pip install 'perturbprob[distributed]'",
)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a script; one that hangs fails."""
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK")}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, timeout=300, env=env)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process found, and each of two."""
    folder = tmp_path_factory.mktemp("together")
    pb.simulate(n_cells=203, n_genes=8, n_perturbations=2, n_batches=2, seed=1).adata.write_h5ad(folder / "screen.h5ad")
    for n in (1, 2):
        done = run(HERE / "together.py", folder, n)
        assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"result{which}", weights_only=False) | {"folder": folder} for which in ("10", "20", "21")]


@together
def test_without_noise_the_average_gradient_is_that_of_one_process(results: list[dict[str, Any]]) -> None:
    alone, first, second = (result["means"] for result in results)
    assert [part["n"] for part in (alone, first, second)] == [1, 2, 2]
    assert len(alone["steps"]) == 5
    for expected, found, other in zip(alone["steps"], first["steps"], second["steps"], strict=True):
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
            assert torch.equal(found[name], other[name])
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert first["validation"] == second["validation"] == pytest.approx(alone["validation"], rel=1e-5)


@together
@pytest.mark.parametrize("where", ["memory", "disk", "again"])
def test_all_processes_end_alike_to_the_last_bit_though_they_draw_differently(results: list[dict[str, Any]], where: str) -> None:
    first, second = (result[where] for result in results[1:])
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["losses"] == second["losses"]
    assert not torch.equal(first["random"], second["random"])


@together
@pytest.mark.parametrize(("where", "n_epochs"), [("memory", 3), ("disk", 2)])
def test_the_processes_share_each_minibatch_and_see_every_cell_once_an_epoch(
    results: list[dict[str, Any]], where: str, n_epochs: int
) -> None:
    alone, first, second = (result[where]["cells"] for result in results)
    steps = [a + b for a, b in zip(first, second, strict=True)]
    for epoch in range(n_epochs):
        seen, expected = (part[epoch * len(part) // n_epochs : (epoch + 1) * len(part) // n_epochs] for part in (steps, alone))
        assert sorted(chain(*seen)) == sorted(chain(*expected))
        assert max(map(len, seen)) <= 31
    assert max(abs(len(a) - len(b)) for a, b in zip(first, second, strict=True)) <= (1 if where == "memory" else 3)


@together
def test_a_training_goes_on_in_another_number_of_processes(results: list[dict[str, Any]]) -> None:
    alone, first, _ = results
    assert first["again"]["losses"]["train"][0] == alone["memory"]["losses"]["train"][0]
    assert len(first["again"]["losses"]["train"]) == 4
    screen = pb.simulate(n_cells=203, n_genes=8, n_perturbations=2, n_batches=2, seed=1).screen
    fit = pb.fit(pb.node(screen, 2), screen, epochs=4, warmup=1, minibatch=30, progress=False, checkpoint=first["folder"] / "2.pt")
    assert fit.losses["train"][0] == first["memory"]["losses"]["train"][0]
    assert len(fit.losses["train"]) == 4


@together
def test_an_error_of_the_first_process_is_told_in_all(results: list[dict[str, Any]]) -> None:
    assert results[1]["error"] == "ZeroDivisionError: stopped here"
    assert results[2]["error"] == "RuntimeError: The first process of the training failed: ZeroDivisionError: stopped here"


@together
def test_a_loss_that_is_not_finite_is_blamed_by_the_process_that_has_the_cells(results: list[dict[str, Any]]) -> None:
    alone, *both = (result["spoilt"] for result in results)
    step, cell = re.search(r"at step \d+", alone)[0], re.search(r"worst cells \w+", alone)[0]
    assert sorted(cell in said for said in both) == [False, True]
    assert sorted(f"{step}, in the part of another process, which says more" in said for said in both) == [False, True]


@together
@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_waits_for_one_that_failed_or_was_killed(rank: int) -> None:
    done = run(HERE / "lost.py", rank)
    assert done.returncode == (3 if rank else -9)
    assert "failing 0: RuntimeError: Another process of the training ended" in done.stdout
    assert "failing 1: ZeroDivisionError: in one process" in done.stdout
    assert f"killed {1 - rank}: RuntimeError: Another process of the training ended" in done.stdout


FORKED = """
import sys, torch, perturbprob as pb
from perturbprob.inference.distributed import launched
def failing(processes):
    if processes.rank:
        raise ZeroDivisionError("in one process")
    return processes.agreed(1)
if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.rand(400, 400).exp() @ torch.rand(400, 400)
    screen = pb.simulate(n_cells=60, n_genes=6, n_perturbations=2, n_batches=2, seed=1).screen
    fit = pb.fit(pb.node(screen, 2), screen, epochs=2, warmup=1, minibatch=20, progress=False, devices=2)
    print(len(fit.losses["train"]), fit.screen is screen, fit.trained_on["cells"] == list(screen.cells))
    try:
        launched(failing, torch.device("cpu"), devices=2)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    screen.counts.data[screen.counts.indptr[7]] = 1e38
    try:
        pb.fit(pb.node(screen, 2), screen, epochs=2, warmup=1, minibatch=60, validation=0.0, progress=False, devices=2)
    except pb.NonFiniteLoss as error:
        print(str(error)[:8], type(error.fit).__name__)
"""


@together
def test_where_there_is_no_script_the_processes_are_split_off() -> None:
    done = run("-W", "ignore", "-c", FORKED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == "2 True True"
    assert "A process of the training failed: " in done.stdout.splitlines()[1]
    assert done.stdout.splitlines()[2] == "The loss Fit"


FOUND = """
import sys, torch
from perturbprob.inference.distributed import launched
n = launched(lambda processes: sum(processes.gathered(processes.rank + 1)), torch.device("cpu"))
try:
    launched(lambda processes: processes, torch.device("cpu"), devices=3)
except ValueError as error:
    sys.stdout.write(f"sum {n}: {error}\\n")
"""


@together
def test_processes_that_torchrun_started_are_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FOUND)
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script)
    said = "sum 3: torchrun started 2 processes, and devices=3 with num_nodes=1 asks for 3"
    assert done.stdout.count(said) == 2, done.stderr[-2000:]


def test_one_process_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    alone, loss, module = Processes(), torch.ones(()), torch.nn.Linear(2, 2)
    assert launched(lambda processes: processes, torch.device("cpu")) == alone
    assert alone.averaged(module, loss, 3) is loss
    assert alone.agreed(module) is alone.first(lambda: module) is alone.gathered(module)[0] is alone.part(module) is module
    state = torch.get_rng_state()
    alone.part_ways(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_in_one_process_the_order_of_the_cells_is_one_permutation() -> None:
    counts, index = csr_array(torch.arange(70.0).reshape(35, 2).numpy()), torch.arange(5, 35)
    torch.manual_seed(3)
    batches = list(shuffled(counts, index, 8))
    torch.manual_seed(3)
    assert torch.equal(torch.cat([places for places, _ in batches]), index[torch.randperm(30)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 10_000}, r"devices=10000 asks for 10000 processes, and there are \d+ cores"),
        ({"devices": 0}, "devices must be a whole number of at least 1; got 0"),
        ({"num_nodes": 1.5}, r"num_nodes must be a whole number of at least 1; got 1\.5"),
        ({"strategy": "fsdp", "devices": 2}, "Unknown strategy 'fsdp'. Use one of 'auto', 'ddp', 'ddp_notebook'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_processes_that_cannot_be(screen: pb.Screen, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.fit(pb.node(screen, 2), screen, **SETTINGS, **settings)


def test_more_gpus_than_there_are() -> None:
    n = 2 + torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"devices={n} asks for {n} cuda devices, where the model is, and there are {n - 2}"):
        launched(lambda processes: processes, torch.device("cuda"), devices=n)


def test_what_has_used_a_gpu_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"The model is on cuda, and a process that has used a GPU cannot be split"):
        launched(lambda processes: processes, torch.device("cuda"), devices=2, strategy="ddp_notebook")


def test_away_from_the_cpu_a_step_is_torch_all_through(screen: pb.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta" computes shapes only: whatever is left on the CPU, or goes to a compiled pass, raises here."""
    settings = {"objective": "elbo", "distance": "mse", "epochs": 2, "minibatch": 64, "learning_rate": 4e-3, "validation": 0.1}
    training = _Training(pb.node(screen, 2), screen, settings | {"patience": 20, "warmup": 1}, 0)
    index = training.training[:64]
    for module in (fused, hidden_layer):
        monkeypatch.setattr(module, "load", lambda *_: pytest.fail("a compiled pass was taken"))
    true = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "unique", lambda self, **_: (self, torch.arange(len(self), device=self.device)))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: self.is_meta or true(self))  # where numbers decide what is computed
    training.elbo.to("meta")
    training.table.segments = [segment.to(torch.device("meta")) for segment in training.table.segments]
    with pyro.validation_enabled(False):
        loss = Elbo(training.model, training.guide)(training.cells(index, screen.counts[index.numpy()]))  # Pyro's asks for a number
    loss.backward()
    assert loss.device.type == "meta"
    assert not stays_sparse(csr_array((64, 12), dtype="float32"), loss.device)
    assert {p.grad.device.type for p in training.elbo.parameters() if p.grad is not None} == {"meta"}


def test_lightning_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    monkeypatch.setattr(distributed, "_check_devices", lambda *_: None)
    with pytest.raises(ImportError, match=r"2 processes .* need lightning: pip install 'perturbprob\[distributed\]'"):
        launched(lambda processes: processes, torch.device("cpu"), devices=2)
