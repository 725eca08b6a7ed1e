"""What test_distributed.py runs in two processes of which one ends: ``python lost.py RANK``, the rank that is killed in the end."""

import os
import signal
import sys
import time
import warnings

import torch

from perturbprob.inference.distributed import Processes, launched


def failing(processes: Processes) -> None:
    """Raise an error in the second process, which the others do not share."""
    if processes.rank == 1:
        raise ZeroDivisionError("in one process")
    processes.agreed(processes.gathered(0))


def killed(processes: Processes) -> None:
    """Kill one process while the others wait for it."""
    if processes.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    processes.averaged(torch.nn.Linear(2, 2), torch.ones(()), 1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for work in (failing, killed):
        try:
            launched(work, torch.device("cpu"), devices=2)
        except Exception as error:
            print(f"{work.__name__} {os.environ['LOCAL_RANK']}: {type(error).__name__}: {error}", flush=True)
            if work is killed:
                sys.exit(3)
            time.sleep(2 * int(os.environ["LOCAL_RANK"]))  # one that failed may live on
