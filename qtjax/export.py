"""python -m qtjax.export --run RUN_FOLDER --out FOLDER: the trained model as an HF folder, or its adapter."""

from collections.abc import Sequence
from pathlib import Path

from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags
from qtjax.sections import DTYPES

SPARSE = "sparse_delta.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    own = parse_flags(
        "python -m qtjax.export",
        "Writes a run's newest checkpoint: an HF folder that transformers loads, or for overlay runs an adapter that peft"
        " loads, as the run itself writes it.",
        argv,
        {
            "run": ("", "run folder"),
            "out": ("", "folder to write; must not hold files of another kind"),
            "merge": (False, "fold the adapter into the weights and write a whole model"),
            "sparse": (False, "for diffprune: write only the values that differ from the base, as sparse_delta.safetensors"),
            "task-id": (0, "with --merge: which task's model, for an adapter that tells tasks apart"),
            "dtype": ("", "dtype of the written weights: float32, bfloat16 or float16; empty: the run's param_dtype"),
        },
    )
    for name in ("run", "out"):
        if not own[name]:
            raise QtjaxError(f"--{name}: is missing; give a folder")
    if own["dtype"] and own["dtype"] not in DTYPES:
        raise QtjaxError(f"--dtype {own['dtype']!r}: must be one of {', '.join(DTYPES)}")

    import jax

    from qtjax.checkpoints import base_name, save_adapter, save_pretrained, save_sparse_delta
    from qtjax.overlays import merge
    from qtjax.training.restore import load_run
    from qtjax.training.story import save_template

    if own["merge"] and own["sparse"]:
        raise QtjaxError("--sparse: beside --merge; give one of them, a whole model or its difference from the base")
    run, config, params, overlay = load_run(own["run"], posterior=not own["merge"])
    adapter = overlay is not None and not own["merge"]
    for flag, what in (("merge", "adapter to merge"), ("sparse", "difference from a base")):
        if overlay is None and own[flag]:
            raise QtjaxError(f"--{flag}: {own['run']} trained all parameters, there is no {what}; leave the flag out")
    if adapter and own["dtype"]:
        raise QtjaxError("--dtype: adapters are written in float32, as peft does; give --merge too, or leave it out")
    _refuse_other_kind(Path(own["out"]), "config.json" if adapter else "adapter_config.json")
    if own["task-id"] and not (overlay is not None and overlay.tasks and own["merge"]):
        raise QtjaxError(f"--task-id {own['task-id']}: is for --merge of an adapter that tells tasks apart; leave it out")
    if own["sparse"]:
        save_sparse_delta(Path(own["out"]) / SPARSE, overlay)
        print(f"difference from {run.model.path} written to {Path(own['out']) / SPARSE}")
        return
    if adapter:
        save_adapter(own["out"], overlay, base_name(run.model.path))
        print(f"adapter over {run.model.path} written to {own['out']}")
        return
    if overlay is not None:
        config, params = merge(config, params, overlay, own["task-id"] if overlay.tasks else None)
    if own["dtype"]:
        params = jax.tree.map(lambda leaf: leaf.astype(own["dtype"]), params)
    save_pretrained(own["out"], config, params, tokenizer_from=run.model.path)
    save_template(Path(own["out"]), run)
    print(f"model written to {own['out']}")


def _refuse_other_kind(out: Path, marker: str) -> None:
    # Readers tell models from adapters by these files; a folder with both would be read as either.
    if (out / marker).exists():
        raise QtjaxError(f"--out {out}: holds another kind of export ({marker}); choose another folder")


if __name__ == "__main__":
    door(main)
