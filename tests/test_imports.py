"""`import perturbprob` is quick and quiet: heavy packages load when they are first needed."""

import subprocess
import sys

HEAVY = ["scanpy", "arviz", "matplotlib", "numba", "joblib", "lightning", "typer", "sklearn", "ot", "networkx"]


def test_import_loads_no_heavy_package_and_warns_of_nothing() -> None:
    code = f"import sys, perturbprob; print(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr, run.stdout.split()) == (0, "", [])


def test_import_makes_pyro_parameters_local_to_their_module() -> None:
    code = "import pyro, perturbprob; print(pyro.settings.get('module_local_params'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
