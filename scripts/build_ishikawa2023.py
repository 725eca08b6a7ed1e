"""Rebuild the embedded Ishikawa 2023 screen from the source distribution of renge 0.0.5.

    python scripts/build_ishikawa2023.py [renge-0.0.5.tar.gz] [ishikawa2023_hipsc.h5ad]

Without the first argument the distribution is downloaded by pip; without the second the package's own file is written.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

EMBEDDED = Path(__file__).parents[1] / "src" / "perturbprob" / "experiment" / "data" / "ishikawa2023_hipsc.h5ad"
LIBRARY = {2: "d2_1", 3: "d3_2", 4: "d4_3", 5: "d5_4"}  # day_10x library: each cell name starts with the number of its library
SOURCE = (
    "Ishikawa et al. 2023, Communications Biology 6:1290, doi:10.1038/s42003-023-05594-4 (GEO GSE213069); counts rebuilt from "
    "examples/data of the renge 0.0.5 source distribution (MIT licence, copyright masastat) as rint(expm1(E)); "
    "sctransform-corrected counts, one 10x library per day."
)


def download(folder: Path) -> Path:
    """Download the source distribution and return its path."""
    request = ["download", "renge==0.0.5", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *request], check=True)
    return next(folder.glob("renge-0.0.5.tar.gz"))


def read_tables(distribution: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return expression E (cell × gene, log1p) and design X (cell × gene, one-hot, and the day t)."""
    with tarfile.open(distribution) as archive:
        files = [archive.extractfile(f"renge-0.0.5/examples/data/{table}_renge_d2_80.csv") for table in "EX"]
        expression, design = (pd.read_csv(file, index_col=0) for file in files if file is not None)
    return expression, design


def build(expression: pd.DataFrame, design: pd.DataFrame) -> AnnData:
    """Return counts with the obs columns perturbation, perturbation_type, media, time and batch."""
    if not expression.index.equals(design.index):
        raise ValueError("E and X do not list the same cells.")
    counts = np.expm1(expression.to_numpy())
    if np.abs(counts - np.rint(counts)).max() > 1e-6:
        raise ValueError("E is not log1p of whole numbers.")
    hit, day = design.drop(columns="t"), design["t"]
    perturbation = hit.idxmax(axis=1).where(hit.any(axis=1), "control")
    kind = np.where(perturbation == "control", "control", "CRISPR_knockout")
    obs = pd.DataFrame({"perturbation": perturbation, "perturbation_type": kind, "media": "hiPSC_maintenance"}, index=expression.index)
    obs = obs.assign(time=day, batch=day.map(LIBRARY)).rename_axis(None)
    obs = obs.astype(dict.fromkeys(["perturbation", "perturbation_type", "media", "batch"], "category"))
    matrix = csr_matrix(np.rint(counts).astype(np.float32))
    return AnnData(matrix, obs=obs, var=pd.DataFrame(index=expression.columns), uns={"source": SOURCE})


def main(distribution: str | None = None, out: str | None = None) -> None:
    """Write the screen and say what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        adata = build(*read_tables(Path(distribution) if distribution else download(Path(folder))))
    path = Path(out) if out else EMBEDDED
    adata.write_h5ad(path, compression="gzip", compression_opts=9)
    print(f"{path}: {adata.n_obs:,} cells × {adata.n_vars} genes, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
