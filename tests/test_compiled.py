"""Compiled functions: said once, kept where a folder can be written, and their absence is no error."""

import os
import subprocess
import sys

import pytest

from perturbprob import compiled

numba = pytest.importorskip("numba")
KERNELS = {"perturbprob.measurement.kernel": "fused", "perturbprob.dynamics.layer_kernel": "backward"}


@pytest.fixture(autouse=True)
def _forget():
    compiled.load.cache_clear()
    yield
    compiled.load.cache_clear()


@pytest.mark.parametrize(("module", "entry"), KERNELS.items())
@pytest.mark.parametrize(("kept", "said"), [(False, 1), (True, 0)])
def test_it_says_once_that_it_compiles(monkeypatch, capsys, module, entry, kept, said):
    monkeypatch.setattr(compiled, "is_kept", lambda _: kept)
    found = [compiled.load(module, entry, "its model") for _ in range(2)]
    assert found[0] is found[1]
    assert found[0].__name__ == module
    assert capsys.readouterr().err.count("compiles its model, once") == said


def test_importing_the_package_neither_compiles_nor_imports_numba_kernels():
    code = "import sys, perturbprob; print([name for name in sys.modules if name.endswith('kernel') and 'perturbprob' in name])"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert "compiles" not in run.stderr


def test_without_numba_there_is_no_kernel(monkeypatch):
    module = "perturbprob.measurement.kernel"
    monkeypatch.setitem(sys.modules, module, None)
    assert compiled.load(module, "fused", "its model") is None


def test_a_folder_that_cannot_be_written_to_only_costs_the_cache(monkeypatch):
    njit = numba.njit

    def unwritable(*args, **options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", unwritable)
    assert compiled.compiled(lambda x: x + 1)(1) == 2


def test_a_function_is_kept_until_its_file_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "adds_one.py"
    source.write_text("from perturbprob.compiled import compiled\n\n\n@compiled\ndef run(x):\n    return x + 1\n")
    import adds_one

    assert not compiled.is_kept(adds_one.run)
    assert adds_one.run(1) == 2
    assert compiled.is_kept(adds_one.run)
    later = source.stat().st_mtime + 100
    os.utime(source, (later, later))
    assert not compiled.is_kept(adds_one.run)
