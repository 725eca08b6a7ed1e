"""The processes of a training: one, or several that each take a part of every minibatch and stay alike to the last bit."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, final

import pyro
import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.experiment.settings import check_whole

Result = TypeVar("Result")

SCRIPT, FORK = "ddp", "ddp_notebook"
STRATEGIES = ("auto", SCRIPT, FORK)
TIMEOUT = timedelta(minutes=10)
"""So long a process waits for an answer of the others. Of one that died it hears at once; of a machine that was lost, never."""
LOST = (
    "Another process of the training ended, or gave no answer for {minutes:g} minutes. If it could say why, it did so above or in its own "
    "log; if it was killed, look for too little memory. With checkpoint= the same command goes on after the last epoch."
)


@final
@dataclass(frozen=True)
class Processes:
    """The processes of one training as one of them sees them: its ``rank`` among ``n``. Of a single process every method does nothing.

    Gradients are summed here rather than by hooks on parameters (torch's DistributedDataParallel), which would have to be set anew
    where the warm-up ends, as parameters that were held are let go, and which weigh all processes alike, whatever their cells.

    >>> Processes(rank=1, n=2).part(torch.arange(5)), Processes().part(torch.arange(5))
    (tensor([1, 3]), tensor([0, 1, 2, 3, 4]))
    """

    rank: int = 0
    n: int = 1
    device: torch.device | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the one that shows, decides and writes."""
        return self.rank == 0

    def part(self, items: Any) -> Any:
        """Return this process's part: every n-th."""
        return items if self.n == 1 else items[self.rank :: self.n]

    def agreed(self, value: Result) -> Result:
        """Return the value that the first process has."""
        if self.n == 1:
            return value
        box = [value if self.leads else None]
        with _heard():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def gathered(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank."""
        if self.n == 1:
            return [value]
        values: list[Any] = [None] * self.n
        with _heard():
            torch.distributed.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], Result]) -> Result:
        """Let the first process work something out and tell the others, its errors too."""
        if self.n == 1:
            return work()
        result, error = None, None
        if self.leads:
            try:
                result = work()
            except Exception as raised:
                error = raised
        result, said = self.agreed((result, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if said is not None:
            raise RuntimeError(f"The first process of the training failed: {said}")
        return result  # type: ignore[return-value]

    def alike(self, about: dict[str, str]) -> None:
        """Refuse to train together what is not the same everywhere."""
        for name in about:
            if len(set(self.gathered(about[name]))) > 1:
                raise ValueError(
                    f"The processes of this training hold different values of the {name}. Each runs the whole script: read the same data "
                    "in each, and seed what the script draws."
                )

    def same(self, module: nn.Module) -> None:
        """Put a module on this process's device, with the numbers that it has in the first process."""
        if self.n > 1:
            module.to(self.device)
            module.load_state_dict(self.agreed({name: value.cpu() for name, value in module.state_dict().items()}))

    def part_ways(self, seed: int) -> None:
        """Draw from here on what no other process draws; the first goes on as a single one would."""
        if self.rank:
            pyro.set_rng_seed((seed + self.rank) % 2**32)

    def averaged(self, module: nn.Module, loss: Float[Tensor, ""], n_cells: int) -> Float[Tensor, ""]:
        """Turn the gradients into their average over all processes, and return that of the loss, each as heavy as its cells are many.

        A loss that counts what all cells share once, and scales its b cells to all N, by N/b, so comes out as that of one process with
        all the cells. A process may have none. A parameter that no process has a gradient of is left without.
        """
        if self.n == 1:
            return loss
        parameters = [p for p in module.parameters() if p.requires_grad]
        own = [torch.zeros_like(p) if p.grad is None else n_cells * p.grad for p in parameters]
        facts = loss.new_tensor([n_cells, *(p.grad is not None for p in parameters)])
        total = torch.cat([facts, n_cells * loss.detach()[None], *(part.flatten() for part in own)])
        with _heard():
            torch.distributed.all_reduce(total)
        has, rest = total[: len(facts)], total[len(facts) :] / total[0]
        for p, there, part in zip(parameters, has[1:].tolist(), rest[1:].split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p) if there else None
        return rest[0]


ALONE = Processes()
"""A training in one process."""


def launched(
    work: Callable[[Processes], Result], device: torch.device, *, devices: int = 1, strategy: str = "auto", num_nodes: int = 1
) -> Result:
    """Run the work in so many processes, and return what the first, or this one, returned; see `perturbprob.fit`.

    >>> launched(lambda processes: processes.n, torch.device("cpu"))
    1
    """
    check_whole(1, devices=devices, num_nodes=num_nodes)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"Unknown strategy {strategy!r}. Use one of {', '.join(map(repr, STRATEGIES))}: every process holds the whole model."
        )
    devices, num_nodes = _found(devices, num_nodes)
    if devices * num_nodes == 1:
        return work(Processes())
    if strategy == "auto":
        strategy = SCRIPT if hasattr(sys.modules["__main__"], "__file__") or _is_external() else FORK
    _check_devices(devices, device)
    if strategy == FORK and device.type == "cuda" and not _is_external():
        raise ValueError(
            f"The model is on {device}, and a process that has used a GPU cannot be split: run the training as a script, with "
            "strategy='ddp', or on the CPU, model.to('cpu')."
        )
    fabric = _fabric(device, devices, strategy, num_nodes)
    if strategy != FORK or _is_external():
        return fabric.launch(partial(_within, work))
    with TemporaryDirectory() as folder:
        return _forked(fabric, work, Path(folder) / "result")


def _found(devices: int, num_nodes: int) -> tuple[int, int]:
    """Return the processes that torchrun started, where it did, else those asked for."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" not in os.environ or n == 1:
        return devices, num_nodes
    if devices * num_nodes not in (1, n):
        raise ValueError(
            f"torchrun started {n} processes, and devices={devices} with num_nodes={num_nodes} asks for {devices * num_nodes}. "
            "Leave both out: torchrun says how many."
        )
    own = int(os.environ.get("LOCAL_WORLD_SIZE", n))
    return own, n // own


def _is_external() -> bool:
    """Say whether torchrun or SLURM starts the processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ


def _check_devices(devices: int, device: torch.device) -> None:
    """Refuse more processes than there are devices for."""
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if devices > cores and not _is_external():
            raise ValueError(
                f"devices={devices} asks for {devices} processes, and there are {cores} cores: they would wait for each other. Ask for at "
                f"most {cores}; for processes on several machines set num_nodes=."
            )
        return
    n = torch.cuda.device_count() if device.type == "cuda" else 1
    if devices > n:
        raise ValueError(
            f"devices={devices} asks for {devices} {device.type} devices, where the model is, and there are {n}. Ask for at most {n}, or "
            "move the model: model.to('cpu')."
        )


def _fabric(device: torch.device, devices: int, strategy: str, num_nodes: int) -> Any:
    """Return Lightning's Fabric, which starts the processes or finds those that torchrun or SLURM started."""
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy
    except ImportError as error:
        raise ImportError(
            f"{devices * num_nodes} processes (devices=, num_nodes= or torchrun) need lightning: pip install 'perturbprob[distributed]'."
        ) from error
    ddp = DDPStrategy(timeout=TIMEOUT, start_method="fork" if strategy == FORK else "popen")
    return Fabric(accelerator=device.type, devices=devices, strategy=ddp, num_nodes=num_nodes)


def _within(work: Callable[[Processes], Result], fabric: Any) -> Result:
    """Work as one of several processes; one that fails leaves, and the others hear of it at once, even where its script lives on."""
    try:
        return work(Processes(fabric.global_rank, fabric.world_size, fabric.device))
    except BaseException:
        torch.distributed.destroy_process_group()
        raise


def _forked(fabric: Any, work: Callable[[Processes], Result], file: Path) -> Result:
    """Work in processes that are split off this one, as a notebook can; the first leaves its result in a file."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    def left(fabric: Any) -> None:
        torch.set_num_threads(1)  # the threads of a pool do not come along, and it would wait for them forever
        try:
            result: Any = _within(work, fabric)
        except Exception as error:
            if fabric.global_rank == 0 and type(error) is not RuntimeError:  # that says no more than that another was lost
                with suppress(Exception):  # of some errors there is no copy
                    file.write_bytes(pickle.dumps(error))
            raise
        if fabric.global_rank == 0:
            file.write_bytes(pickle.dumps(result))

    try:
        fabric.launch(left)
    except ProcessRaisedException as error:
        if file.exists():
            raise pickle.loads(file.read_bytes()) from error
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        raise RuntimeError(f"A process of the training failed: {last}") from error
    except ProcessExitedException as error:
        raise RuntimeError(f"A process of the training was killed: {error}. Look for too little memory.") from error
    return pickle.loads(file.read_bytes())


@contextmanager
def _heard() -> Iterator[None]:
    """Say what it means when the others are not heard."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(LOST.format(minutes=TIMEOUT.total_seconds() / 60)) from error
