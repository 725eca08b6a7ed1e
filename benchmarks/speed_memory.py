"""The row of `speed.py` on memory: 200,000 × 2,000 on disk, read, checked and trained on by a process of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = """
import json, resource, sys, time, warnings
import perturbprob as pb
warnings.simplefilter("ignore")
start = time.perf_counter()
screen = pb.Screen.from_store(sys.argv[1], perturbation_type="knockout")
read, ends = time.perf_counter() - start, []
model = pb.vae(screen, n_latent=10)
pb.fit(model, screen, epochs=2, minibatch=512, progress=False, each_epoch=lambda _: ends.append(time.perf_counter()))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"rss_gb": round(peak, 2), "read_seconds": round(read, 1), "epoch_seconds": round(ends[1] - ends[0], 1)}))
"""


def write_large(path: Path, n_cells: int, n_genes: int, seed: int = 0) -> None:
    """Write a large screen block by block."""
    import anndata
    import h5py
    from anndata.io import sparse_dataset, write_elem
    from speed_vae import simulated

    parts = [simulated(min(20_000, n_cells - k), n_genes, depth=300.0, seed=seed) for k in range(0, n_cells, 20_000)]
    for k, part in enumerate(parts):
        part.obs_names = [f"{k}_{name}" for name in part.obs_names]
    parts[0].write_h5ad(path, compression="gzip")
    with h5py.File(path, "a") as file:
        matrix = sparse_dataset(file["X"])
        for part in parts[1:]:
            matrix.append(part.X)
        del file["obs"]
        write_elem(file, "obs", anndata.concat([part[:, :0] for part in parts]).obs)


def rss_gb(repeats: int, n_cells: int = 200_000, n_genes: int = 2_000) -> dict[str, Any]:
    """Return the peak memory of a process that reads a screen on disk and trains on it for two epochs. One run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.h5ad"
        write_large(path, n_cells, n_genes)
        run = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1]) | {"file_gb": round(path.stat().st_size / 1e9, 2)}
