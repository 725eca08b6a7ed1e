"""fit(): one training loop, and what it returns."""

import copy
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import pyro
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from perturbprob.dynamics.solve import SolverError
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_seed
from perturbprob.inference.arguments import check_arguments, check_callers, default_minibatch
from perturbprob.inference.at_rest import AtRestLoss
from perturbprob.inference.blame import blame
from perturbprob.inference.checkpoint import Checkpoint, about
from perturbprob.inference.depth import DepthLaw
from perturbprob.inference.distributed import ALONE, Processes, launched
from perturbprob.inference.draws import bar
from perturbprob.inference.elbo import Elbo
from perturbprob.inference.loader import shuffled
from perturbprob.inference.objective import PathLoss, chosen_objective
from perturbprob.inference.seen import trained_on
from perturbprob.inference.verdict import verdict
from perturbprob.measurement.counts import CountHead
from perturbprob.measurement.fused import NoCount
from perturbprob.model.cell_model import CellModel
from perturbprob.model.cells import Cells, CellTable
from perturbprob.model.guide import Guide, node_design
from perturbprob.model.sparse_input import stays_sparse

if TYPE_CHECKING:
    from anndata import AnnData


WORTH_RECORDING = 30
"""From so many steps on a recording of what all cells share saves the time that it takes."""
SWIFT = 10.0
"""How much faster than other parameters π moves: it is one number that many cells tell, and is held at first."""


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model: what every later question takes.

    ``losses`` holds, per epoch, the negative ELBO per cell and gene: "train" of the whole objective, "validation" of the validation cells
    given the global sites. ``trained_on`` names cells, conditions and batches; ``depth`` is the law of the size factor. ``screen`` is the
    training screen as long as the fit lives: it is not saved, and None after `load`. ``seconds`` is how long the training took.
    """

    model: CellModel
    guide: Guide
    losses: dict[str, list[float]]
    seed: int
    settings: dict[str, Any]
    trained_on: dict[str, Any]
    depth: DepthLaw
    versions: dict[str, str]
    screen: Screen | None = None
    seconds: float = float("nan")

    def __repr__(self) -> str:
        """Say in one line what was fitted."""
        names = self.model.vocabulary
        done = f"{len(self.losses['train'])} epochs, {self._loss()}" if self.losses["train"] else "untrained"
        cells, conditions = len(self.trained_on["cells"]), len(self.trained_on["conditions"])
        return f"Fit({cells} cells × {len(names.genes)} genes, {conditions} conditions, {done})"

    def _loss(self) -> str:
        """Name the last loss."""
        last, words = self.losses["train"][-1], {"paths": self.settings["distance"], "kds": "deviation from stationarity, and penalty,"}
        objective = self.settings["objective"]
        return f"{words[objective]} {last:.4g}" if objective in words else f"-ELBO {last:.4f} per cell and gene"

    def report(self, path: str | Path | None = None) -> str:
        """Return how the training went and a verdict on convergence, in words; with a path, also write the HTML report there."""
        if path is not None:
            from perturbprob.report import write_report

            write_report(self, path)
        return "\n".join([verdict(self.losses, self.settings), *self._unlearnt()])

    def _unlearnt(self) -> list[str]:
        """Say what this screen cannot teach about waiting."""
        waits = {Protocol.parse(text).time for text in self.trained_on["conditions"]}
        if len(waits) > 1 or self.settings["objective"] == "kds":
            return []
        kept = "the decay γ of the latent state keeps the value it started from"
        return [f"All cells waited equally long: {kept}, and predictions at other times rest on it."]

    def save(self, path: str | Path) -> None:
        """Write the fit into a folder that `load` reads."""
        from perturbprob.inference.storage import save

        save(self, path)

    def to_anndata(self, adata: "AnnData", *, corrected: bool = False) -> "AnnData":
        """Return a copy of an AnnData with each cell's latent state in obsm: ``X_perturbprob`` now, ``X_perturbprob_rest`` at rest.

        Reads the AnnData by the columns that the training screen was read by; its cells may be new, controls among them.
        Nothing is written into it. With ``corrected`` the layer ``perturbprob_corrected`` holds what each cell would be expected to show
        at the average over batches: E[log(1 + count)] at η = 0 and size factor 1, its state from q(z₀ | x) and its protocol its own; NaN
        in genes that the fit does not know. Where a factor is aliased with batch an `AliasedWarning` says what is lost.
        """
        from perturbprob.inference.latent import to_anndata

        return to_anndata(self, adata, corrected=corrected)


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message says where. ``fit`` holds the last good parameters."""

    def __init__(self, message: str, fit: Fit) -> None:
        """Keep the fit beside the message."""
        super().__init__(message)
        self.fit = fit

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how another process makes it again."""
        return type(self), (str(self), self.fit)


def fit(
    model: CellModel,
    screen: Screen,
    *,
    epochs: int = 100,
    minibatch: int | None = None,
    learning_rate: float = 4e-3,
    validation: float = 0.1,
    patience: int = 20,
    warmup: int = 20,
    objective: str | None = None,
    distance: str = "mse",
    each_epoch: Callable[[Fit], object] | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    devices: int = 1,
    strategy: str = "auto",
    num_nodes: int = 1,
) -> Fit:
    """Fit the posterior of a model by stochastic variational inference.

    Main arguments: ``epochs`` passes over the cells in minibatches of ``minibatch`` cells (default: a fiftieth of them, at least
    32 and at most 256; for "kds" at least 8 for each condition), Adam with a learning rate that falls
    linearly from ``learning_rate`` to a twentieth of it. A share ``validation`` of the cells is held out of the training; their
    ELBO decides which epoch is kept, and ``patience`` epochs without a better one end the training (0 held-out cells: the last epoch
    is kept). Over the first ``warmup`` epochs (at most half of all) the weight of each cell's KL term rises to 1, the dispersion of
    counts stays where their moments put it, and π of ``penetrance`` at its prior; then π moves with ten times the learning rate.
    ``seed`` fixes the start of the guide, the order of the cells and all draws; the user's own random state is left alone.
    ``objective`` is "elbo", by default, and "kds" for `stationary`, which has no likelihood: the kernel deviation from
    stationarity, between cells of one condition in a minibatch (`stationarity_deviation`), and a penalty; deterministic too.
    ``objective="paths"`` fits no posterior but the deterministic F on the pairs of eq 5, by the ``distance`` between predicted and
    measured ends: "mse" of pseudobulk rows, or "moment", "energy", "sinkhorn", "mmd" between sets of cells (eq 23). Counts are compared
    as log1p, cells of a condition in its minibatch as a set; "mse" compares their means. Its draws are all alike, and of counts it learns
    no law of a single cell's rest state, so nothing that starts from given cells can be asked of it.
    ``each_epoch`` is called after every epoch with a copy of the fit as it then is, such as to score it on conditions that it has not seen
    (`select`); if it returns True the training ends there. It does not change the training otherwise.
    The model passed in is not changed. A loss that is not finite stops with `NonFiniteLoss`.

    Other arguments: after every epoch the file ``checkpoint`` is written, and the same call goes on from it where it exists, as if it had
    never stopped, or in another number of processes; that of another model, screen or settings is refused. ``devices`` processes on each
    of ``num_nodes`` machines share the work (extra ``distributed``), on CPUs or the GPUs of the model's kind: each takes its part of every
    minibatch, and draws noise of its own (``seed`` + rank), and all end with the same parameters. Without SLURM or torchrun,
    whose number of processes is taken over, ``strategy`` "ddp" runs the script once for each, and "ddp_notebook" splits them off; "auto"
    chooses. Each returns the fit, and ``each_epoch`` and progress are those of the first. "paths" and "kds" compare cells within each part.
    """
    require_screen(screen, partial=True)
    check_seed(seed)
    check_callers(each_epoch, checkpoint)
    objective = chosen_objective(objective, distance, model)
    minibatch = default_minibatch(screen, objective) if minibatch is None else minibatch
    numbers = {"epochs": epochs, "minibatch": minibatch, "patience": patience, "warmup": warmup}
    check_arguments(model, screen, **numbers, learning_rate=learning_rate, validation=validation)
    if objective == "kds" and minibatch < min(screen.n_cells, 2 * len(screen.conditions)):
        raise ValueError(
            f"objective='kds' compares cells of one condition, and a minibatch of {minibatch} holds hardly two of each of the "
            f"{len(screen.conditions)} conditions: leave minibatch= out, or give several times as many."
        )
    settings: dict[str, Any] = {"objective": objective, "distance": distance, "epochs": epochs, "minibatch": minibatch}
    settings |= {"learning_rate": learning_rate, "validation": validation}
    settings |= {"patience": patience, "warmup": min(warmup, epochs // 2)}
    with torch.random.fork_rng():
        pyro_state = pyro.util.get_rng_state()
        try:

            def work(processes: Processes) -> Fit:
                training = _Training(copy.deepcopy(model), screen, settings, seed, processes)
                return replace(training.run(progress, each_epoch, checkpoint), screen=None)

            fitted = launched(work, model.log_share.device, devices=devices, strategy=strategy, num_nodes=num_nodes)
            return replace(fitted, screen=screen)
        except SolverError as error:
            # Pyro raises errors again with its own trace behind the message
            raise SolverError(str(error).split("\n")[0], error.cell, error.error) from None
        finally:
            pyro.util.set_rng_state(pyro_state)


class _Training:
    """The state of one training run."""

    def __init__(self, model: CellModel, screen: Screen, settings: dict[str, Any], seed: int, processes: Processes = ALONE) -> None:
        """Seed, split the cells, and warm up the ELBO before the optimiser is made."""
        self.start = time.perf_counter()
        pyro.set_rng_seed(seed)
        self.model, self.screen, self.settings, self.seed, self.processes = model, screen, settings, seed, processes
        processes.same(model)
        self.table = CellTable(model, screen)
        order = torch.randperm(screen.n_cells)
        n_held = min(int(settings["validation"] * screen.n_cells), screen.n_cells - 1)
        self.held, self.training = order[:n_held], order[n_held:]
        self.settings["steps_per_epoch"] = -(-len(self.training) // settings["minibatch"])
        self.guide = Guide(model, node_design(model, screen), encodes=settings["objective"] == "elbo")
        if screen.values == "counts":
            self.guide.start(model, screen)
        self.guide.to(model.log_share.device)
        self.elbo = self._loss()
        self.losses: dict[str, list[float]] = {"train": [], "validation": []}
        plain = model.penetrance is None and not model.assays and screen.present is None and screen.values == "counts"
        self.reads_sparse = plain and settings["objective"] == "elbo" and isinstance(model.measurement, CountHead)
        self.best, self.best_epoch, self.step = copy.deepcopy(self.elbo.state_dict()), 0, 0

    def _loss(self) -> Any:
        """Return what is minimised."""
        if self.settings["objective"] == "paths":
            return PathLoss(self.model, self.guide, self.settings["distance"])
        if self.settings["objective"] == "kds":
            return AtRestLoss(self.model, self.guide, self.table, self.training)
        return Elbo(self.model, self.guide)

    def run(self, progress: bool, each_epoch: Callable[[Fit], object] | None = None, path: str | Path | None = None) -> Fit:
        """Train epoch by epoch, keep the best, and return the fit."""
        checkpoint = self._checkpoint(self.processes.agreed(None if path is None else str(path)))
        asks = self.processes.agreed(each_epoch is not None)
        self.elbo(self.table.unfolded(self.training[:2], len(self.training)))
        self.processes.same(self.elbo)
        optimiser = torch.optim.Adam(self._groups(), lr=self.settings["learning_rate"], fused=True)
        fall = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, self.settings["epochs"])
        self.processes.part_ways(self.seed)
        ended = checkpoint.resume(self, optimiser, fall)
        if self.settings["objective"] == "elbo" and self.settings["epochs"] * self.settings["steps_per_epoch"] >= WORTH_RECORDING:
            self.elbo.record()
        left = range(0 if ended else self.settings["epochs"])[len(self.losses["train"]) :]
        epochs = bar(left, "fit", "epoch", progress=progress and self.processes.leads)
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # NonFiniteLoss says more
            for epoch in epochs:
                self.losses["train"].append(self._epoch(optimiser))
                fall.step()
                epochs.set_postfix(loss=f"{self.losses['train'][-1]:.4f}")
                stop = self._stop(epoch)
                stop = (asks and self._asked(each_epoch)) or stop
                checkpoint.keep(self, optimiser, fall, ended=stop)
                if stop:
                    break
            epochs.close()
        self.elbo.load_state_dict(self.best)
        return self._fit(self.elbo)

    def _checkpoint(self, path: str | Path | None) -> Checkpoint:
        """Return the file that this training is written to; see that all processes are in the same training."""
        if path is None and self.processes.n == 1:
            return Checkpoint(None, {})
        marks = about(self.model, self.screen, self.settings | {"seed": self.seed})
        self.processes.alike(marks)
        return Checkpoint(path, marks)

    def _asked(self, each_epoch: Callable[[Fit], object] | None) -> bool:
        """Show the fit as it is to whoever wants to see it; say whether the training is to end."""
        with torch.random.fork_rng(), pyro.validation_enabled():
            return self.processes.first(lambda: each_epoch is not None and each_epoch(self._fit(copy.deepcopy(self.elbo))) is True)

    def _groups(self) -> list[dict[str, Any]]:
        """Return all parameters, those of π with a learning rate of their own."""
        swift = {f"guide.{name}" for name in self.guide.held if "penetrance_lo" in name}
        parts = [[p for name, p in self.elbo.named_parameters() if (name in swift) == own] for own in (False, True)]
        rates = (1.0, SWIFT)
        return [{"params": part, "lr": k * self.settings["learning_rate"]} for part, k in zip(parts, rates, strict=True) if part]

    def _epoch(self, optimiser: torch.optim.Optimizer) -> float:
        """Take one pass over the training cells; return the mean loss per cell and gene."""
        total, n_steps, parameters = 0.0, 0, list(self.elbo.parameters())
        self.guide.hold(held=self._warmth() < 1)
        for index, counts in shuffled(self.screen.counts, self.training, self.settings["minibatch"], self.processes):
            optimiser.zero_grad()
            own = self._backward(index, counts)
            loss = self.processes.averaged(self.elbo, own, len(index))
            norm = torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            if not torch.isfinite(loss) or not torch.isfinite(norm):
                elsewhere = not len(index) or bool(own.isfinite() and not loss.isfinite())
                raise NonFiniteLoss(blame(self, index, counts, elsewhere=elsewhere), self._fit(self.elbo))
            optimiser.step()
            self.step, total, n_steps = self.step + 1, total + float(loss.detach()), n_steps + 1
        self._agree_on_steps()
        return total / n_steps

    def _backward(self, index: Int[Tensor, " cell"], counts: csr_array) -> Float[Tensor, ""]:
        """Return the loss of a minibatch per cell and gene, NaN where a law has no density, with its gradients left at the parameters."""
        if not len(index):
            return self.model.log_share.new_zeros(())
        scale = len(self.training) * self.screen.n_genes if self.settings["objective"] == "elbo" else 1
        try:
            loss = self.elbo(self.cells(index, counts)) / scale
        except NoCount:
            return self.model.log_share.new_tensor(torch.nan)
        loss.backward()
        return loss

    def cells(self, index: Int[Tensor, " cell"], counts: csr_array) -> Cells:
        """Return the cells of a minibatch."""
        sparse = self.reads_sparse and stays_sparse(counts, self.model.log_share.device)
        return self.table.unfolded(index, len(self.training), self._warmth(), counts, sparse=sparse)

    def _agree_on_steps(self) -> None:
        """Let all processes solve their waits with as many steps as the one that needs most."""
        solver = self.model.transition.solver
        if solver is not None:
            solver.n_steps = max(self.processes.gathered(solver.n_steps))

    def _warmth(self) -> float:
        """Return the weight of the cells' KL term, which rises over the warm-up: else latent dimensions die before they are of use."""
        return min(1.0, (len(self.losses["train"]) + 1) / max(1, self.settings["warmup"]))

    def _stop(self, epoch: int) -> bool:
        """Keep the parameters if the held-out cells say they are the best so far; say whether patience has run out."""
        if not len(self.held):
            self.best = copy.deepcopy(self.elbo.state_dict())
            return False
        losses, warmup = self.losses["validation"], self.settings["warmup"]
        losses.append(self._validation())
        if epoch < warmup or losses[-1] <= min(losses[warmup:]):
            self.best, self.best_epoch = copy.deepcopy(self.elbo.state_dict()), epoch
        return bool(epoch - self.best_epoch >= self.settings["patience"])

    @torch.no_grad()
    def _validation(self) -> float:
        """Return the held-out cells' negative ELBO, per cell and gene, given a draw of the globals for each minibatch, of one seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if self.settings["objective"] != "elbo":
                return self.processes.agreed(float(self.elbo.between_cells(self.table.cells(self.held, len(self.held)))))
            held = self.processes.part(self.held.split(self.settings["minibatch"]))
            total = sum(float(self.elbo.between_cells(self.table.unfolded(index, len(index)))) for index in held)
            total = sum(self.processes.gathered(total))
        return total / (len(self.held) * self.screen.n_genes)

    @cached_property
    def depth(self) -> DepthLaw:
        """The law of the size factor, of the cells whose RNA was measured."""
        every, present = self.table.log_size_factor.double().numpy(), self.screen.present
        return DepthLaw.of(self.screen.with_rna, every if present is None else every[present])

    def _fit(self, elbo: Any) -> Fit:
        """Put the result together from what was trained, which is trained no further."""
        elbo.eval().requires_grad_(False)
        if self.settings["objective"] != "elbo":
            elbo.guide.sharpen()
        return Fit(
            model=elbo.model,
            guide=elbo.guide,
            losses={name: list(values) for name, values in self.losses.items()},
            seed=self.seed,
            settings=self.settings | {"best_epoch": self.best_epoch if len(self.held) else len(self.losses["train"]) - 1},
            trained_on=trained_on(self.screen),
            depth=self.depth,
            versions={name: version(name) for name in ("perturbprob", "torch", "pyro-ppl", "numpy")}
            | {"python": platform.python_version()},
            screen=self.screen,
            seconds=time.perf_counter() - self.start,
        )
