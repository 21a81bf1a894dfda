"""python -m qtjax.plan --config ... --topology v5e:16x16: whether a run fits, how it lies, about how long it takes."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qtjax.config import Config, load_config
from qtjax.errors import QtjaxError, door

# Of a chip's published matrix rate, what well-tuned dense transformers reach on it; an assumption of the estimate.
REACHED = 0.6
GIB = 2**30


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> None:
    config, own = load_config(
        "python -m qtjax.plan",
        "Compiles a run's scoring and training for TPUs that are not here, and says whether it fits, how every array lies, what moves between"
        " the devices, and about how long a step takes. Needs the package libtpu, no TPU and no weights: only the model's config.json.",
        argv,
        {
            "topology": ("", "CHIP:SHAPE, for example v5e:4x4, v5p:4x4x4"),
            "tokens-per-sample": (0, "mean tokens of a sample, for the estimate of time; 0: data.max_length"),
            "leaves": (False, "list the sharding of every array"),
        },
    )
    if not own["topology"]:
        raise QtjaxError("--topology: is missing; give CHIP:SHAPE, for example v5e:4x4")
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs here, and libtpu must not look for a TPU
    from qtjax.parallel import batch_size, make_mesh, round_up
    from qtjax.planning import abstract_run, leaves_by_path, needs_of, on_device, open_topology, step_work
    from qtjax.training.ladder import ladder
    from qtjax.training.programs import program_jobs
    from qtjax.training.pruners import pruners

    console = console or Console()
    devices, chip = open_topology(own["topology"])
    mesh = make_mesh(config.mesh, devices)
    run = abstract_run(config, mesh)
    rows = ladder(config.train.rows, batch_size(mesh), 1)[0]
    length = config.train.row_length or config.data.max_length
    jobs = program_jobs(
        run.subject, mesh, config.prune, config.train.loss, run.optimizer, run.state, run.frozen, shapes=(rows,), row_length=length,
        samples=round_up(config.prune.batch_size, batch_size(mesh)), max_length=config.data.max_length,
    )  # fmt: skip
    weights, moments, frozen = (on_device(tree) for tree in (run.state.trainable, (run.state.optimizer, run.state.method), run.frozen))
    gradients = on_device(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), run.state.trainable))
    given = {f"score {rows}": weights + frozen, f"accumulate {rows}": weights + frozen + gradients, "update": weights + moments + gradients}
    beside = {f"score {rows}": moments, f"accumulate {rows}": moments, "update": frozen}
    with console.status(f"compiling for {own['topology']}"):
        needs = needs_of({name: jobs[name] for name in beside if name in jobs}, mesh, given, beside)
    shape = " x ".join(f"{name} {ways}" for name, ways in mesh.shape.items())
    console.print(f"{config.model.path} on {own['topology']}: {len(devices)} devices, mesh {shape}; {rows} rows x {length} a launch", highlight=False)
    if own["leaves"]:
        console.print(leaves_table(leaves_by_path(run.state.trainable) + leaves_by_path(run.frozen)))
    console.print(memory_table(needs, chip.memory))
    worst = max(need.total for need in needs.values()) / GIB
    if worst > chip.memory:
        console.print(
            f"does not fit: {worst - chip.memory:.1f} GiB are lacking on each device of {chip.memory:g} GiB", style="bold", highlight=False
        )
        for line in suggestions(config, mesh):
            console.print(f"  try {line}", highlight=False)
    else:
        console.print(f"fits: {chip.memory - worst:.1f} of {chip.memory} GiB stay free on each device", style="bold", highlight=False)
    needed = pruners(config.prune)
    tokens = own["tokens-per-sample"] or config.data.max_length
    work = step_work(config, run.subject.config, tokens, length, needed.scores, needed.decides)
    console.print(estimate_table(work, needs, chip, len(devices), rows * length))


def memory_table(needs: dict[str, Any], memory: float) -> Table:
    """GiB on each device, program by program, and what a launch of it moves."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("GiB on each device")
    for name in ("arguments", "temporaries", "beside", "total", f"of {memory:g}", "moved a launch"):
        table.add_column(name, justify="right")
    for name, need in needs.items():
        moved = "unreadable" if need.moved is None else f"{sum(each.bytes for each in need.moved) / GIB:.2f}"
        numbers = [f"{x / GIB:.2f}" for x in (need.arguments, need.temporaries, need.beside, need.total)]
        table.add_row(name, *numbers, f"{need.total / GIB / memory:.0%}", moved)
    for name, need in needs.items():
        if need.moved:
            said = ", ".join(f"{each.count} {each.kind} ({each.bytes / GIB:.2f} GiB)" for each in need.moved)
            table.caption = f"{table.caption or ''}{name}: {said}\n"
            table.caption_justify = "left"
    return table


def leaves_table(rows: Sequence[tuple[str, tuple[int, ...], str, int]]) -> Table:
    """Every array: its shape, the mesh axes that cut it, MiB of it on each device."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, justify in (("array", "left"), ("shape", "right"), ("cut along", "left"), ("MiB on each device", "right")):
        table.add_column(name, justify=justify, overflow="fold")
    for path, shape, spec, size in rows:
        table.add_row(path, " x ".join(map(str, shape)), spec, f"{size / 2**20:.2f}")
    return table


def estimate_table(work: Any, needs: dict[str, Any], chip: Any, devices: int, slots: int) -> Table:
    """Seconds of a step: FLOPs at REACHED of the published rate, and beside them, not hidden, what moves over the links."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("estimate for a step", "tokens", "1e12 FLOP", "compute s", "links s", "MFU at most"):
        table.add_column(name, justify="left" if name.startswith("estimate") else "right")
    total = [0.0, 0.0, 0.0]
    for name, tokens, flops in (("scoring", work.scored, work.score_flops), ("training", work.trained, work.train_flops)):
        need = next((n for key, n in needs.items() if key.startswith("score" if name == "scoring" else "accumulate")), None)
        if not tokens or need is None:
            continue
        compute = flops / devices / (chip.peak * 1e12 * REACHED)
        moved = sum(each.bytes for each in need.moved or ()) * tokens / slots / (chip.links * 1e9)
        total = [total[0] + flops, total[1] + compute, total[2] + moved]
        table.add_row(name, f"{tokens:,.0f}", f"{flops / 1e12:,.1f}", f"{compute:.3f}", "-" if need.moved is None else f"{moved:.3f}", _mfu(flops, compute, moved, chip, devices))
    table.add_row("both", "", f"{total[0] / 1e12:,.1f}", f"{total[1]:.3f}", f"{total[2]:.3f}", _mfu(*total, chip, devices))
    table.caption = f"An estimate: {REACHED:.0%} of the chip's published {chip.peak:g} TFLOP/s, links {chip.links:g} GB/s, from hidden to not hidden at all."
    table.caption_justify = "left"
    return table


def _mfu(flops: float, compute: float, moved: float, chip: Any, devices: int) -> str:
    if not flops:
        return "-"
    ideal = flops / devices / (chip.peak * 1e12)
    return f"{ideal / (compute + moved):.0%}-{ideal / max(compute, moved):.0%}"


def suggestions(config: Config, mesh: Any) -> list[str]:
    """What to change, the cheapest first."""
    out = []
    if config.model.remat != "full":
        out.append("--model.remat full (activations are computed again in the backward pass)")
    ways = mesh.shape["fsdp"]
    if ways * mesh.shape["tensor"] < mesh.size:
        out.append(f"--mesh.fsdp {mesh.size // mesh.shape['tensor']} (parameters and moments are cut {mesh.size // mesh.shape['tensor'] // ways} times finer)")
    if config.train.rows > mesh.shape["data"] * ways:
        out.append(f"--train.rows {max(config.train.rows // 2, mesh.shape['data'] * ways)} (smaller launches, more of them)")
    if config.overlay.method != "none" and config.model.param_dtype == "float32":
        out.append("--model.param-dtype bfloat16 (the frozen weights take half)")
    if config.overlay.method == "none":
        out.append("--overlay.method lora (no moments for the frozen weights)")
    return out or ["a larger topology: everything else is as small as it gets"]


if __name__ == "__main__":
    door(main)
