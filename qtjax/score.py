"""python -m qtjax.score --config ... --out FOLDER: EU scores of the training data as Parquet, and a picture of the plane."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from qtjax.atomic import disk_errors, write_atomic
from qtjax.config import load_config
from qtjax.errors import QtjaxError, door
from qtjax.pages import with_own_pages

_MEANING = {1: "noise: drop", 2: "misconception: prune tokens", 3: "redundant: drop", 4: "calibration: keep whole"}


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> None:
    config, own = load_config(
        "python -m qtjax.score",
        "Scores every training sample under one model and shows which of them the config's pruners would keep. Writes eu.parquet and eu_plane.png."
        " The data are the config's, or without --config those of the run given as --checkpoint.",
        argv,
        {
            "out": ("", "folder to write"),
            "checkpoint": ("", "run folder, PEFT adapter, HF folder or hub name; empty: model.path"),
            "held-out": (False, "score the held-out data instead of the training data"),
        },
        run_flag="checkpoint",
    )
    if not own["out"]:
        raise QtjaxError("--out: is missing; give a folder for eu.parquet and eu_plane.png")

    import pyarrow.parquet as pq

    from qtjax.data.prepare import data_line, held_out_data, training_data
    from qtjax.data.progress import LateProgress
    from qtjax.data.tokenizer import check_vocabulary
    from qtjax.report.plane import draw_plane
    from qtjax.training.open_model import open_mesh, open_model
    from qtjax.evals.decisions import check_offline, left_out
    from qtjax.evals.survey import survey
    from qtjax.training.reference import check_other_model, other_model_scores

    needs = check_offline(config.prune)
    console, out = console or Console(), Path(own["out"])
    if said := left_out(config.prune):
        console.print(said, highlight=False, soft_wrap=True)
    with disk_errors(out, "making the folder"):
        out.mkdir(parents=True, exist_ok=True)
    mesh = open_mesh(config.mesh, own["checkpoint"])
    model = open_model(config.model, own["checkpoint"], mesh=mesh)
    dataset = (held_out_data if own["held-out"] else training_data)(config.data, model.tokenizer)
    check_vocabulary(model.tokenizer, model.config.vocab_size, dataset.input_ids)
    reference = None
    if needs.reference:
        check_other_model(config, "prune.reference_model", model.tokenizer)
        reference = other_model_scores(config, "prune.reference_model", dataset, mesh, out).scores[0]
    with LateProgress("scoring", len(dataset)) as bar:
        table, correlation = survey(
            config, model.config, model.params, dataset, overlay=model.overlay, mesh=mesh, reference=reference, progress=bar.advance
        )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomic(out / "eu.parquet", buffer.getvalue())
    draw_plane(table, out / "eu_plane.png", title=f"EU plane: {Path(model.name).name}")
    console.print(summary_table(table, correlation, model.name))
    console.print(data_line(config.data, held_out=own["held-out"]), highlight=False, soft_wrap=True, markup=False)
    console.print(f"{dataset.stats.line()}\nwritten: {out / 'eu.parquet'}, {out / 'eu_plane.png'}", highlight=False, soft_wrap=True)


def summary_table(table, correlation: float, name: str) -> Table:
    """Samples by median quadrant: how many, how many kept, their mean scores."""
    columns = {n: table[n].to_numpy() for n in ("median_quadrant", "keep", "supplement", "perplexity", "entropy")}
    out = Table("quadrant", "samples", "kept", "PPL", "entropy", title=name, title_justify="left")
    for column in out.columns[1:]:
        column.justify = "right"
    for quadrant in (1, 2, 3, 4, 0):
        chosen = columns["median_quadrant"] == quadrant
        if not quadrant and not chosen.any():
            continue
        label = f"Q{quadrant} {_MEANING[quadrant]}" if quadrant else "not scored (no targets)"
        means = [f"{np.median(columns[c][chosen]):.2f}" if quadrant and chosen.any() else "" for c in ("perplexity", "entropy")]
        out.add_row(label, f"{chosen.sum():,}", f"{(chosen & columns['keep']).sum():,}", *means)
    kept, supplement = columns["keep"].sum(), (columns["keep"] & columns["supplement"]).sum()
    out.add_row("all", f"{table.num_rows:,}", f"{kept:,}", "", "", style="bold")
    of_supplement = f" {supplement:,} of the kept are supplement." if supplement else ""
    out.caption = f"PPL, entropy: medians.{of_supplement} Spearman {correlation:.2f}."
    return out


if __name__ == "__main__":
    with_own_pages(keep=False)
    door(main)
