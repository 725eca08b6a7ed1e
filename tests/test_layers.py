"""The rooms depend on each other in one direction only: a package imports only packages to its left."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LEFT_OF = {
    "compiled": set(),
    "experiment": set(),
    "dynamics": {"experiment", "compiled"},
    "measurement": {"experiment", "compiled"},
    "response": {"experiment"},
    "model": {"experiment", "dynamics", "measurement", "compiled"},
}
for room, left in [
    ("inference", "model"),
    ("studies", "inference"),
    ("plots", "studies"),
    ("report", "plots"),
    ("demo", "report"),
    ("cli", "demo"),
    ("__main__", "cli"),
]:
    LEFT_OF[room] = LEFT_OF[left] | {left} | ({"response"} if room == "studies" else set())

# A fit hands over its own report: `fit.report("report.html")` is what a user looks for, and the report draws with plots.
EXCEPTIONS = {("inference/fit.py", "Fit.report", "report")}


def imports(source: str, package: str) -> Iterator[tuple[str, str]]:
    """Yield each import in a module of the named package as (the function or class that it stands in, the absolute name)."""

    def walk(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((".".join(scope), alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*parents, *filter(None, [child.module])])
                yield from ((".".join(scope), f"{base}.{alias.name}") for alias in child.names)
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, (*scope, child.name) if named else scope)

    return walk(ast.parse(source), ())


def breaches(source: str, file: str) -> list[str]:
    """Say which imports of a file below src/perturbprob go to the right, or to the package as a whole."""
    room = Path(file).parts[0].removesuffix(".py")
    package = ".".join(["perturbprob", *Path(file).parts[:-1]])
    found = []
    for scope, name in imports(source, package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "perturbprob" and target not in LEFT_OF[room] | {room} and (file, scope, target) not in EXCEPTIONS:
            found.append(f"{file} ({scope or 'module'}) imports {name}")
    return found


def test_each_room_imports_only_rooms_to_its_left(root: Path) -> None:
    source = root / "src" / "perturbprob"
    files = [path for path in source.rglob("*.py") if path != source / "__init__.py"]
    assert {path.relative_to(source).parts[0].removesuffix(".py") for path in files} <= set(LEFT_OF)
    assert [breach for path in files for breach in breaches(path.read_text(encoding="utf-8"), path.relative_to(source).as_posix())] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dynamics/solve.py", "from perturbprob.measurement.counts import Poisson"),
        ("dynamics/solve.py", "from ..measurement import counts"),
        ("measurement/counts.py", "import perturbprob.dynamics.solve"),
        ("experiment/screen.py", "def f():\n    from perturbprob import plots"),
        ("model/guide.py", "import perturbprob as pb"),
        ("inference/fit.py", "from perturbprob.report import write"),
        ("inference/posterior.py", "class Fit:\n    def report(self):\n        import perturbprob.report"),
    ],
)
def test_an_import_to_the_right_is_found_however_it_is_written(file: str, source: str) -> None:
    assert len(breaches(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/guide.py", "from ..dynamics.solve import Solver\nfrom .cell_model import CellModel\nimport perturbprob.experiment"),
        ("inference/fit.py", "class Fit:\n    def report(self):\n        from perturbprob.report import write"),
        ("cli.py", "from perturbprob import plots, report\nfrom perturbprob.inference.fit import fit"),
    ],
)
def test_an_import_to_the_left_is_allowed(file: str, source: str) -> None:
    assert breaches(source, file) == []
