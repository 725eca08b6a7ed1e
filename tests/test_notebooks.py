"""Every notebook runs from top to bottom, here at a small size, and is committed with the outputs of its own code."""

import re
import shutil
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode

from perturbprob.measurement import CountLaw

SMALL = {
    "01_first_fit.ipynb": {"epochs": 2, "n_draws": 8, "stride": 15},
    "02_steady_states.ipynb": {"seeds": 2, "steps": 20, "n_splits": 200},
    "03_batch_decomposition.ipynb": {"n_cells": 600, "epochs": 3, "n_draws": 8},
    "04_structures_side_by_side.ipynb": {"epochs": 1, "stride": 15, "n_cells": 200, "simulated_epochs": 1, "n_draws": 2},
    "05_do_predictions_beat_baselines.ipynb": {"epochs": 1, "n_structures": 1, "n_draws": 20},
}
# the warnings that a cell shows on purpose
SAID = {
    "01_first_fit.ipynb": {"unseen": "AliasedWarning: time and batch are aliased"},
    "02_steady_states.ipynb": {},
    "03_batch_decomposition.ipynb": {},
    "04_structures_side_by_side.ipynb": {},
    "05_do_predictions_beat_baselines.ipynb": {},
}
NOTEBOOKS = sorted(path.name for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# what dependencies say when they are first imported: tqdm where ipywidgets is not installed, arviz 0.23 once a day
IMPORTS = re.compile("IProgress not found|ArviZ is undergoing a major refactor")


def code_cells(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """The code cells by their names."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def said(cell: NotebookNode, stream: str) -> str:
    """What a cell printed on a stream, without what dependencies say on import."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == stream]
    return "".join(text for text in texts if not IMPORTS.search(text))


def with_parameters(source: str, values: dict[str, int]) -> str:
    """Replace the values in the parameters cell; each must be there."""
    for name, value in values.items():
        source, found = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value}  ", source)
        assert found == 1, name
    return source


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile the count model first, which says so once, on the standard error that no notebook is to have."""
    CountLaw(torch.zeros(1, 1)).to_event(1).log_prob(torch.zeros(1, 1))


@pytest.fixture(scope="module", params=NOTEBOOKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def committed(root: Path, name: str) -> NotebookNode:
    return nbformat.read(root / "notebooks" / name, as_version=4)


@pytest.fixture(scope="module")
def executed(root: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The notebook after a run of a copy with other parameters; an error in a cell is raised here."""
    folder = tmp_path_factory.mktemp("notebook")
    copy = Path(shutil.copy(root / "notebooks" / name, folder))
    notebook = nbformat.read(copy, as_version=4)
    first = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    first.source = with_parameters(first.source, SMALL[name])
    return NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
def test_a_notebook_runs_and_warns_only_on_purpose(executed: NotebookNode, name: str) -> None:
    cells = code_cells(executed)
    assert {cell_id: text for cell_id, cell in cells.items() if (text := said(cell, "stderr"))} == {}
    warned = {cell_id for cell_id, cell in cells.items() if "Warning" in said(cell, "stdout")}
    assert warned == set(SAID[name])
    assert all(text in said(cells[cell_id], "stdout") for cell_id, text in SAID[name].items())


@pytest.mark.slow
def test_the_committed_outputs_are_those_of_the_committed_code(executed: NotebookNode, committed: NotebookNode) -> None:
    def kinds(notebook: NotebookNode) -> dict[str, list[tuple[str, ...]]]:
        return {
            # a stream that is flushed in between is two outputs, or one
            cell_id: [k for k, _ in groupby(tuple(sorted(o.get("data", {}))) for o in cell.outputs if o.get("name") != "stderr")]
            for cell_id, cell in code_cells(notebook).items()
        }

    assert kinds(committed) == kinds(executed)


def test_the_committed_notebook_was_run_once_from_top_to_bottom(committed: NotebookNode) -> None:
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert {output.output_type for cell in cells.values() for output in cell.outputs} <= {"stream", "display_data", "execute_result"}
    assert [cell_id for cell_id, cell in cells.items() if any(output.get("name") == "stderr" for output in cell.outputs)] == []


def test_prose_comes_before_code_and_the_last_cell_answers(committed: NotebookNode) -> None:
    assert committed.cells[0].cell_type == "markdown"
    assert said(committed.cells[-1], "stdout").strip().endswith(".")


def test_a_committed_notebook_stays_small(root: Path, name: str) -> None:
    assert (root / "notebooks" / name).stat().st_size < 2_000_000
