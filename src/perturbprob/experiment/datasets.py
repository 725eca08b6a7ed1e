"""The embedded screen, and readers of screens from files."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import anndata
from anndata import AnnData

from perturbprob.experiment.screen import Screen
from perturbprob.experiment.vocabulary import nearest

Group: TypeAlias = Any  # h5py.Group or zarr.Group


def ishikawa2023() -> Screen:
    """Return the knock-out screen of Ishikawa et al. 2023 (doi:10.1038/s42003-023-05594-4), part of this package.

    14,945 human iPS cells, 103 genes, 23 knock-outs and control, 2 to 5 days after perturbation. Counts are corrected for
    depth; each day is one library, so time and batch are fully confounded. MIT licence, copyright (c) 2022 masastat.

    >>> ishikawa2023().times
    (2.0, 3.0, 4.0, 5.0)
    """
    with resources.as_file(resources.files("perturbprob.experiment") / "data" / "ishikawa2023_hipsc.h5ad") as path:
        adata = anndata.read_h5ad(path)
    return Screen.from_anndata(adata, media="media", time="time", time_unit="day", batch="batch")


def load(path: str | Path, *, modality: str = "rna", **columns: Any) -> Screen:
    """Read a screen from a .h5ad, .h5mu or .zarr file; ``columns`` are the keyword arguments of `Screen.from_anndata`.

    Of a MuData file one ``modality`` is read, with the obs columns of the whole beside its own.

        screen = load("screen.h5mu", modality="rna", perturbation="gene", perturbation_type="CRISPRi", batch="lane")

    Raises FileNotFoundError, ValueError for another kind of file or an unknown modality, and what `Screen.from_anndata` raises.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str], AnnData]] = {".h5ad": _read_h5ad, ".h5mu": _read_h5mu, ".zarr": _read_zarr}
    if path.suffix not in readers:
        raise ValueError(f"{str(path)!r} is no .h5ad, .h5mu or .zarr. Read it with anndata or scanpy, then Screen.from_anndata(adata).")
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.glob("*") if p.suffix in readers]) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"There is no file {str(path)!r}. {near}".strip())
    return Screen.from_anndata(readers[path.suffix](path, modality), **columns)


def _read_h5ad(path: Path, modality: str) -> AnnData:
    """Read an AnnData file."""
    return anndata.read_h5ad(path)


def _read_h5mu(path: Path, modality: str) -> AnnData:
    """Read one modality of a MuData file."""
    import h5py

    with h5py.File(path) as file:
        return _read_modality(file, modality)


def _read_zarr(path: Path, modality: str) -> AnnData:
    """Read an AnnData, or one modality of a MuData, from a zarr folder."""
    import zarr

    group = zarr.open_group(path, mode="r")
    return _read_modality(group, modality) if "mod" in group else anndata.io.read_zarr(path)


def _read_modality(file: Group, modality: str) -> AnnData:
    """Read one modality and give its cells the obs columns of the whole."""
    if modality not in file["mod"]:
        raise ValueError(f"modality={modality!r} is not in the file. {nearest(modality, file['mod'])}")
    adata, obs = (anndata.io.read_elem(file[name]) for name in (f"mod/{modality}", "obs"))
    adata.obs = adata.obs.join(obs[obs.columns.difference(adata.obs.columns)])
    return adata
