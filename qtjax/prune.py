"""python -m qtjax.prune --config ... --out FOLDER: curate a dataset offline with any model and any pair of pruners."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qtjax.config import load_config
from qtjax.errors import QtjaxError, door
from qtjax.pages import with_own_pages

# Seconds between parts on disk: what a stop may cost.
_EVERY = 30.0


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> None:
    config, own = load_config(
        "python -m qtjax.prune",
        "Decides once, under one model, which training samples and tokens to keep, and writes the kept rows with scores,"
        " quadrant and token mask. Stopped and started again it goes on. The data are the config's, or without --config those"
        " of the run given as --checkpoint.",
        argv,
        {
            "out": ("", "folder to write"),
            "checkpoint": ("", "run folder, PEFT adapter, HF folder or hub name; empty: model.path"),
            "format": ("jsonl", "kept rows as jsonl or parquet"),
        },
        run_flag="checkpoint",
    )
    from qtjax.data.prepare import data_line, training_data, training_rows
    from qtjax.data.progress import LateProgress
    from qtjax.data.tokenizer import check_vocabulary
    from qtjax.evals.curate import FORMATS, Parts, write_results
    from qtjax.evals.decisions import check_offline, decisions, left_out
    from qtjax.report.plane import draw_plane
    from qtjax.training.open_model import open_mesh, open_model
    from qtjax.training.reference import check_other_model, other_model_scores

    if not own["out"]:
        raise QtjaxError("--out: is missing; give a folder for the kept rows")
    if own["format"] not in FORMATS:
        raise QtjaxError(f"--format {own['format']!r}: must be one of {', '.join(FORMATS)}")
    needs, console, out = check_offline(config.prune), console or Console(), Path(own["out"])
    if not needs.decides:
        raise QtjaxError("prune.sample_pruner and prune.token_pruner are both 'none': nothing would be pruned; name a pruner")
    mesh = open_mesh(config.mesh, own["checkpoint"])
    model = open_model(config.model, own["checkpoint"], mesh=mesh)
    rows, dataset = training_rows(config.data), training_data(config.data, model.tokenizer)
    check_vocabulary(model.tokenizer, model.config.vocab_size, dataset.input_ids)
    if said := left_out(config.prune):
        console.print(said, highlight=False, soft_wrap=True)
    parts = Parts(out, config, own["checkpoint"], dataset)
    reference = None
    if needs.reference:
        check_other_model(config, "prune.reference_model", model.tokenizer)
        reference = other_model_scores(config, "prune.reference_model", dataset, mesh, out).scores[0]
    if parts.done:
        console.print(f"goes on after batch {parts.done}", highlight=False)
    begin = time.monotonic()
    with LateProgress("pruning", len(dataset)) as bar:
        bar.advance(min(parts.done * config.prune.batch_size, len(dataset)))
        decided = decisions(
            config, model.config, model.params, dataset, overlay=model.overlay, mesh=mesh, reference=reference, first=parts.done,
            progress=bar.advance,
        )  # fmt: skip
        try:
            for one in decided:
                parts.append(one)
                if time.monotonic() - begin > _EVERY:
                    parts.flush()
                    begin = time.monotonic()
        finally:
            parts.flush()
    scores = write_results(parts, out, own["format"], rows, dataset)
    written = [out / f"kept.{own['format']}", out / "scores.parquet"]
    if needs.scores:
        draw_plane(scores, out / "eu_plane.png", title=f"EU plane: {Path(model.name).name}")
        written.append(out / "eu_plane.png")
    console.print(summary(scores, config, model.name))
    console.print(data_line(config.data, held_out=False), highlight=False, soft_wrap=True, markup=False)
    console.print(f"{dataset.stats.line()}\nwritten: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def summary(scores, config, name: str) -> Table:
    """Samples and target tokens, before and after."""
    from qtjax.training.story import describe

    keep, count, kept = (scores[column].to_numpy() for column in ("keep", "count", "kept_tokens"))
    out = Table("", "all", "kept", "share", title=f"{name}: {describe(config.prune)}", title_justify="left")
    for column in out.columns[1:]:
        column.justify = "right"
    for what, all_, some in (("samples", len(keep), keep.sum()), ("target tokens", count.sum(), kept.sum())):
        out.add_row(what, f"{all_:,}", f"{some:,}", f"{some / max(all_, 1):.1%}")
    return out


if __name__ == "__main__":
    with_own_pages(keep=False)
    door(main)
