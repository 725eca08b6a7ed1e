"""What holds for the repository as a whole: it can be moved, its pages name what exists, its tests check shapes."""

import json
import re
from pathlib import Path

import jaxtyping
import pytest

import perturbprob as pb


@pytest.mark.parametrize("folder", ["src", "notebooks", "docs", "benchmarks"])
def test_nothing_names_a_path_of_one_machine(root: Path, folder: str) -> None:
    absolute = re.compile(rf"(?<![\w.:/])/(?:home|root|tmp|mnt|Users)/|{re.escape(str(root))}|PERTURBPROB_DATA")
    files = [path for kind in ("py", "ipynb", "md") for path in (root / folder).rglob(f"*.{kind}") if "_build" not in path.parts]
    assert [f"{path.name}: {found[0]}" for path in files for found in absolute.finditer(path.read_text(encoding="utf-8"))] == []


def test_every_public_name_is_on_the_api_page(root: Path) -> None:
    page = set(re.findall(r"perturbprob[\w.]*\.(\w+)", (root / "docs" / "api.md").read_text(encoding="utf-8")))
    assert sorted(set(pb.__all__) - page - {"__version__"}) == []


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/concepts.md", "docs/api.md", "docs/scale.md", "docs/speed.md"])
def test_every_name_that_a_page_shows_exists(root: Path, page: str) -> None:
    named = set(re.findall(r"\bpb\.([A-Za-z]\w*)", (root / page).read_text(encoding="utf-8"))) - {"name"}
    assert sorted(name for name in named if not hasattr(pb, name)) == []


def test_annotations_are_checked_in_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        pb.Wait("five")


def test_users_run_without_the_checker(unchecked: None) -> None:
    with pytest.raises(TypeError, match="Wait needs a number"):
        pb.Wait("five")


def test_every_notebook_has_parameters_and_is_committed_with_outputs(root: Path) -> None:
    for path in (root / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert any(cell["outputs"] for cell in cells), path.name
        assert "parameters" in cells[0]["metadata"].get("tags", []), path.name
