"""All pictures of one run, from what its folder holds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qtjax.report.curves import draw_curves
from qtjax.report.plane import draw_plane


def draw_run(
    samples: pa.Table, metrics: Sequence[Mapping[str, Any]], folder: str | os.PathLike, *, title: str = ""
) -> list[Path]:
    """Draws curves.png, and the EU plane of the first and, if it is another one, the last epoch.

    Args:
      samples: EU records (`qtjax.records.samples.SCHEMA`); may be empty (full-data training scores nothing).
      metrics: one mapping a step; may be empty.
      folder: gets the PNGs; made if needed.
      title: what the pictures are headed with.
    Returns: the paths, the plane first. Raises QtjaxError if the disk refuses.
    """
    folder, paths = Path(folder), []
    head = f"{title}: " if title else ""
    scored = samples.filter(pc.and_(pc.is_finite(samples["perplexity"]), pc.is_finite(samples["entropy"])))
    if scored.num_rows:
        epochs = sorted(set(pc.unique(scored["epoch"]).to_pylist()))
        for name, epoch in {"eu_plane.png": epochs[0], "eu_plane_last.png": epochs[-1]}.items():
            if name == "eu_plane.png" or len(epochs) > 1:
                chosen = samples.filter(pc.field("epoch") == epoch)
                paths.append(
                    draw_plane(chosen, folder / name, title=f"{head}EU plane, epoch {epoch + 1} of {epochs[-1] + 1}")
                )
    if metrics:
        paths.append(draw_curves(metrics, folder / "curves.png", title=f"{head}training" if title else ""))
    return paths
