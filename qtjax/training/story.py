"""The story of a run from its first line to its closing table: what `python -m qtjax.train` does."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from qtjax import evals
from qtjax.atomic import write_atomic, write_json
from qtjax.checkpoints import base_name, save_adapter, save_pretrained
from qtjax.config import Config, PruneSection
from qtjax.data.prepare import training_rows
from qtjax.errors import QtjaxError
from qtjax.overlays import Overlay, method_named
from qtjax.parallel import check_shared, first_alone
from qtjax.report.pictures import draw_run
from qtjax.report.table import summary_table
from qtjax.report.totals import totals
from qtjax.training.calibration import calibrate
from qtjax.training.experts import missing_experts, train_experts
from qtjax.training.full_data import time_full_data
from qtjax.training.memory import memory_errors
from qtjax.training.run import Session, open_session, train_steps
from qtjax.training.run_folder import RunFolder
from qtjax.training.state import count_parameters
from qtjax.tree import Tree


def run(config: Config, console: Console, *, quiet: bool = False) -> dict[str, Any]:
    """Runs or resumes the experiment of `config` and prints its closing table on standard output.

    Returns: the summary (schema: qtjax.report.table). Raises QtjaxError for bad input, a diverged loss, too little memory or a disk
    that refuses; Interrupted after Ctrl-C or SIGTERM, with a checkpoint of the last finished step.
    """
    begin = time.perf_counter()
    with _opened(config) as folder:
        if folder.finished:
            summary = folder.summary()
            console.print(f"{folder.path}: finished already; this is its table", highlight=False, soft_wrap=True)
        else:
            with memory_errors(config):
                summary = _train(config, folder, console, begin, quiet)
    if jax.process_index() == 0:
        Console().print(summary_table(summary))
    return summary


def _opened(config: Config) -> RunFolder:
    """The run folder; of several processes the first makes it, and the others find it on a disk that all of them share."""
    mine: list[RunFolder] = []

    def make() -> str:
        mine.append(RunFolder.open(config))
        return ""

    first_alone("open the run folder", make)
    check_shared("run.folder", Path(config.run.folder))
    return mine[0] if mine else RunFolder.open(config, writes=False)


def _train(config: Config, folder: RunFolder, console: Console, begin: float, quiet: bool) -> dict[str, Any]:
    if missing_experts(config):
        train_experts(config, console, lambda expert: _finish(expert, console, quiet))
    session = open_session(config, folder, console)
    base = _base_evaluation(session, folder)
    train_steps(session, folder, quiet=quiet)
    after = _evaluate(session)
    params, overlay = session.subject.join(session.loop.state.trainable, session.loop.frozen)
    calibration = None
    if overlay is not None and method_named(overlay.method).posterior:
        held_out = None if session.held_out is None else session.held_out.dataset
        overlay, calibration = calibrate(session.subject.config, params, overlay, session.dataset, held_out)
    if config.run.export:
        export(session, folder, params, overlay)
    steps = folder.read_metrics()
    summary = {"title": _title(config), "policy": config.prune.policy, **totals(steps)}
    summary["seconds"]["scoring"] += session.seconds["other_models"]  # a pass before the first step is a pass
    summary["evaluation"] = _evaluation(session.held_out, base, after)
    summary["speed_up"] = _speed_up(session, summary["seconds"])
    summary["data"] = {
        "samples": len(session.dataset), "cut": session.dataset.stats.cut, "skipped": dict(session.dataset.stats.skipped)
    }  # fmt: skip
    summary["calibration"] = calibration
    summary["trained_values"] = count_parameters(params) if overlay is None else overlay.trainable_count
    summary["provenance"] = provenance(session, folder)
    summary["model_folder"] = str(folder.model) if config.run.export else None
    summary["seconds"]["total"] = _wall_clock(folder, begin)
    if folder.writes:
        folder.flush()
        draw_run(folder.read_samples(), steps, folder.pictures, title=_title(config))
    session.close()
    folder.write_summary(summary)
    console.print(f"data    {session.dataset.stats.line()}", highlight=False, soft_wrap=True)
    return summary


def _finish(config: Config, console: Console, quiet: bool) -> None:
    """A run inside another one, to its end."""
    with _opened(config) as folder:
        if not folder.finished:
            _train(config, folder, console, time.perf_counter(), quiet)


def export(session: Session, folder: RunFolder, params: Tree, overlay: Overlay | None) -> None:
    """The trained model as an HF folder, or the adapter as a PEFT folder, in <run folder>/model."""
    if overlay is None:
        save_pretrained(folder.model, session.subject.config, params, tokenizer_from=session.config.model.path)
        save_template(folder.model, session.config)
    else:
        save_adapter(folder.model, overlay, base_name(session.config.model.path))


def save_template(folder: Path, config: Config) -> None:
    """A chat template that the config names goes along, so that the model is asked as it was trained."""
    if config.data.chat_template not in ("auto", "none"):
        write_atomic(folder / "chat_template.jinja", Path(config.data.chat_template).expanduser().read_text(encoding="utf-8"))


def _evaluate(session: Session) -> dict[str, Any]:
    if session.held_out is None:
        return {}
    params, overlay = session.subject.join(session.loop.state.trainable, session.loop.frozen)
    results = evals.evaluate(
        session.config, session.subject.config, params, session.tokenizer, session.held_out, overlay=overlay, mesh=session.mesh
    )
    return {name: result.summary() for name, result in results.items()}


def _base_evaluation(session: Session, folder: RunFolder) -> dict[str, Any]:
    """The untrained model's results; measured at step 0 and read back by a resumed run. QtjaxError if its loss is NaN."""
    file = folder.path / "base.json"
    if found := first_alone("look for the base's results", lambda: file.read_text(encoding="utf-8") if file.exists() else ""):
        return json.loads(found)
    base = _evaluate(session) if session.step == 0 else {}
    if base and not math.isfinite(base["loss"]["loss"]):
        raise QtjaxError(
            f"model.path = {session.config.model.path!r}: its held-out loss is {base['loss']['loss']} before any training; the"
            " weights hold NaN, or overflow model.dtype: try float32"
        )
    if folder.writes:
        write_json(file, base)
    return base


def _evaluation(held_out: evals.HeldOut | None, base: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    if held_out is None:
        return None

    def short(results: Mapping[str, Any]) -> dict[str, Any] | None:
        if not results:
            return None
        return {"loss": results["loss"]["loss"], "exact_match": results.get("exact_match", {}).get("accuracy")}

    generated = len(held_out.prompts) if held_out.prompts is not None else 0
    by_task = after.get("exact_match", {}).get("by_task", {})
    return {
        "samples": len(held_out.dataset), "generated": generated, "base": short(base), "after": short(after), "by_task": by_task,
        "skipped": held_out.skipped,
    }  # fmt: skip


def _speed_up(session: Session, seconds: Mapping[str, float]) -> dict[str, Any] | None:
    """Seconds of full-data training on the same samples and steps, measured now, over the run's own."""
    timed = session.config.train.compare_full_data
    if not timed or not session.loop.pruners.decides:
        return None
    full = time_full_data(session.loop, timed, session.total_steps)
    own = sum(seconds[name] for name in ("scoring", "packing", "training"))
    return {
        "value": full.seconds / own,
        "full_data_seconds": full.seconds,
        "pruned_seconds": own,
        "how": f"full data: median of {full.steps} timed steps x {full.total}; pruned: scoring, packing and training included",
    }


def provenance(session: Session, folder: RunFolder) -> dict[str, dict[str, int]] | None:
    """Rows seen and kept by what the data say of how each came about; None if the first one says nothing, and where nothing is written."""
    if not folder.writes or not session.loop.pruners.decides:
        return None
    rows = training_rows(session.config.data, folder.tokens)
    if not len(rows) or "provenance" not in rows[0]:
        return None
    said = [rows[i].get("provenance") for i in range(len(rows))]
    origin = {int(index): "unknown" if own is None else str(own) for index, own in zip(rows.index, said, strict=True)}
    folder.flush()
    records = folder.read_samples()
    counts: dict[str, dict[str, int]] = {}
    for row, keep in zip(records["row"].to_pylist(), records["keep"].to_pylist()):
        count = counts.setdefault(origin[row], {"seen": 0, "kept": 0})
        count["seen"] += 1
        count["kept"] += bool(keep)
    return dict(sorted(counts.items()))


def _wall_clock(folder: RunFolder, begin: float) -> float:
    """Seconds since this process began the run, plus the steps that earlier processes of it did."""
    now = time.perf_counter()
    here = time.time() - (now - begin)
    earlier = sum(
        m["seconds_score"] + m["seconds_pack"] + m["seconds_train"] for m in folder.read_metrics() if m["time"] < here
    )
    return now - begin + earlier


def describe(prune: PruneSection) -> str:
    """The two pruners in a few words: "Q-Tuning 25 % x 50 %", "random 25 % x perplexity 50 %", "full data"."""
    names = prune.sample_pruner, prune.token_pruner
    if names == ("none", "none"):
        return "full data"
    sample, token = (f"{100 * keep:g} %" for keep in (prune.sample_keep, prune.token_keep))
    if names == ("q-tuning", "q-tuning"):
        return f"Q-Tuning {sample} x {token}"
    of_samples = names[0] if names[0] in ("none", "infobatch") else f"{names[0]} {sample}"
    return f"{of_samples} x {names[1]}" + ("" if names[1] == "none" else f" {token}")


def _title(config: Config) -> str:
    name = config.model.path.rstrip("/").split("/")[-1]
    data = config.data.path.rstrip("/").split("/")[-1]
    how = describe(config.prune)
    method = "" if config.overlay.method == "none" else f", {config.overlay.method}"
    return f"{name} on {data}, {how}{method}"


__all__ = ["describe", "export", "provenance", "run"]
