"""python -m qtjax.plan --config ... --topology v5e:16x16: whether a run fits, how it lies, about how long it takes."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qtjax.config import Config, load_config
from qtjax.errors import QtjaxError, door

GIB = 2**30


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> None:
    config, own = load_config(
        "python -m qtjax.plan",
        "Compiles a run's scoring and training for TPUs or GPUs that are not here, and says whether it fits, how every array lies, what moves"
        " between the devices, and about how long a step takes. Needs their compiler (the extra plan, or plan-gpu), no device and no weights:"
        " only the model's config.json.",
        argv,
        {
            "topology": ("", "CHIP:SHAPE or GPU:COUNT, for example v5e:4x4, v5p:4x4x4, h100:8"),
            "tokens-per-sample": (0, "mean tokens of a sample, for the estimate of time; 0: data.max_length"),
            "leaves": (False, "list the sharding of every array"),
        },
    )
    if not own["topology"]:
        raise QtjaxError("--topology: is missing; give CHIP:SHAPE or GPU:COUNT, for example v5e:4x4 or h100:8")
    tokens = own["tokens-per-sample"] or config.data.max_length
    if not 0 < tokens <= config.data.max_length:
        raise QtjaxError(f"--tokens-per-sample {tokens}: must be from 1 to data.max_length = {config.data.max_length}, where samples are cut")
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs here, and no compiler must look for its device
    from qtjax.models import kernel_of
    from qtjax.parallel import batch_size, of_one_process
    from qtjax.planning import GPU_NAMES, SHARE_VARIABLE, leaves_by_path, model_shape, open_topology, step_parts, weigh
    from qtjax.training.ladder import ladder
    from qtjax.training.run import check_fit

    console = console or Console()
    devices, chip = open_topology(own["topology"])
    shape, found = model_shape(config.model.path)
    check_fit(config, shape)
    with console.status(f"compiling for {own['topology']}"):
        plan = weigh(config, shape, devices)
    mesh = plan.mesh
    say(console, f"{config.model.path} on {own['topology']}" + (f" ({found})" if found else ""))
    ways = " x ".join(f"{name} {ways}" for name, ways in mesh.shape.items())
    say(console, f"{len(devices)} device{'s' * (len(devices) > 1)}, mesh {ways}; launches of {plan.rows} rows x {plan.length} slots")
    if own["leaves"]:
        console.print(leaves_table(leaves_by_path(plan.run.state.trainable) + leaves_by_path(plan.run.frozen)))
    console.print(memory_table(plan.needs, chip.usable))
    free = chip.usable - plan.worst / GIB
    if free < 0:
        say(console, f"does not fit: {-free:.1f} GiB are lacking on each device of {chip.usable:.4g} GiB", style="bold")
    else:
        say(console, f"fits: {free:.1f} of {chip.usable:.4g} GiB stay free on each device", style="bold")
    if own["topology"] in GPU_NAMES:
        say(console, f"JAX takes {chip.share:.0%} of a GPU's {chip.memory:g} GiB, as {SHARE_VARIABLE} says or by itself. No kernel was tried out,"
            " and attention is XLA's, not cuDNN's: temporaries are approximate.")  # fmt: skip
    if free < 0:
        return advise(console, config, shape, devices, chip, plan)
    shapes = ladder(config.train.rows, batch_size(mesh), config.train.shapes)
    touched = 2 * (plan.held.trained + plan.held.moments) + plan.held.gradients
    model = plan.run.subject.config.replace(attention=kernel_of(devices[0].platform, config.model.dtype))
    parts = step_parts(config, model, chip, len(devices), plan.needs, shapes, plan.length, tokens, touched)
    console.print(estimate_table(parts, chip, len(devices)))
    low, high = (sum(part.seconds[i] for part in parts) for i in (0, 1))
    mfu = _mfu(sum(part.flops for part in parts), low, high, chip, len(devices))
    unit, scale = ("s", 1) if high > 1 else ("ms", 1000)
    say(console, f"a step: about {_range(_number(low * scale), _number(high * scale))} {unit}, MFU {mfu}", style="bold")
    for line in assumptions(parts, chip, shapes[-1] * plan.length, config.prune.batch_size):
        say(console, line)
    if (own := of_one_process(devices)) % config.mesh.tensor:
        say(console, f"mesh.tensor = {config.mesh.tensor} needs hosts of as many devices, since a process reads whole rows; here they have {own}.")
    if shape.num_key_value_heads % config.mesh.tensor:
        heads = shape.num_key_value_heads
        say(console, f"mesh.tensor = {config.mesh.tensor} cuts through the {heads} key heads: devices then share heads, and move more.")


def say(console: Console, text: str, **options: Any) -> None:
    """A line of prose, in one colour."""
    console.print(text, highlight=False, **options)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for name in columns:
        table.add_column(name.removesuffix("<"), justify="left" if name.endswith("<") else "right", overflow="fold")
    return table


def memory_table(needs: dict[str, Any], memory: float) -> Table:
    """What lies on each device, program by program, and what a launch of it moves."""
    unit, size = ("GiB", GIB) if max(need.total for need in needs.values()) > GIB / 10 else ("MiB", 2**20)
    table = _table(f"{unit} a device<", "arguments", "temporaries", "beside", "total", f"of {memory:.4g}", "moved")
    for name, need in needs.items():
        moved = "refused" if need.refused else "unreadable" if need.moved is None else f"{sum(each.bytes for each in need.moved) / size:.2f}"
        numbers = [f"{x / size:.2f}" for x in (need.arguments, need.temporaries, need.beside, need.total)]
        table.add_row(name, *numbers, f"{need.total / GIB / memory:.0%}", moved)
    large = {name: [each for each in need.moved or () if each.bytes > size / 200] for name, need in needs.items()}
    said = {name: ", ".join(f"{each.bytes / size:.2f} by {each.count} {each.kind}" for each in moves) for name, moves in large.items()}
    table.caption, table.caption_justify = "\n".join(f"{name} moves {unit}: {text}" for name, text in said.items() if text), "left"
    return table


def leaves_table(rows: Sequence[tuple[str, str, int]]) -> Table:
    """Every array: its shape, the mesh axes that cut it, MiB of it on each device."""
    table = _table("array<", "shape<", "MiB")
    for path, shape, size in rows:
        table.add_row(path, shape, f"{size / 2**20:.2f}")
    table.caption, table.caption_justify = "512/f8: cut 8 ways along fsdp; t: along tensor. MiB on each device, with all layers.", "left"
    return table


def estimate_table(parts: Sequence[Any], chip: Any, devices: int) -> Table:
    """Seconds of a step's parts, and the MFU from all at once to one after the other."""
    unit, scale = ("s", 1) if sum(part.seconds[1] for part in parts) > 1 else ("ms", 1000)
    table = _table("estimate<", "tokens", "slots", "TFLOP", *(f"{what} {unit}" for what in ("compute", "memory", "links")), "MFU")
    for part in parts:
        links = "unknown" if part.links is None else _number(part.links * scale)
        counts = (f"{part.tokens:,.0f}", f"{part.slots:,}", _number(part.flops / 1e12)) if part.tokens else ("", "", "")
        busy = (_number(part.compute * scale), _number(part.memory * scale), links)
        table.add_row(part.name, *counts, *busy, _mfu(part.flops, *part.seconds, chip, devices))
    return table


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}" if x >= 0.001 else "0"


def _mfu(flops: float, low: float, high: float, chip: Any, devices: int) -> str:
    if not flops:
        return ""
    ideal = flops / devices / (chip.peak * 1e12)
    return _range(f"{ideal / high:.0%}", f"{ideal / low:.0%}")


def _range(least: str, most: str) -> str:
    return most if most == least else f"{least}-{most}"


def assumptions(parts: Sequence[Any], chip: Any, smallest: int, batch: int) -> list[str]:
    """What the estimate takes for granted, and where the launches are far from full."""
    from qtjax.planning import REACHED

    unknown = any(part.links is None for part in parts)
    lines = [
        f"An estimate: {REACHED:.0%} of the published {chip.peak:g} TFLOP/s, {chip.bandwidth:g} GB/s of memory, links of {chip.links:g} GB/s;"
        " from all at once to one after the other." + (" What moves is not in it: of a program it could not be read." if unknown else "")
    ]
    training = next(part for part in parts if part.name == "training")
    if training.tokens < 0.8 * smallest:
        wanted = -(-smallest * batch // int(training.tokens))
        lines.append(
            f"Training fills {training.tokens / training.slots:.0%} of its slots: a launch has at least {smallest:,}, one row for each device of"
            f" data x fsdp. --prune.batch-size {wanted} fills one; so does a wider --mesh.tensor, which needs fewer rows."
        )
    return lines


def advise(console: Console, config: Config, shape: Any, devices: Sequence[Any], chip: Any, plan: Any) -> None:
    """What would fit instead: tried, or counted."""
    from qtjax.planning import SHARE_VARIABLE, SHARED, attempts, kept_instead

    tried = 0
    with console.status("compiling what might fit"):
        for attempt in attempts(config, shape, devices, chip, plan):
            flags = " and ".join(filter(None, (f"{SHARE_VARIABLE}={SHARED} before the command" if attempt.share else "", attempt.flags)))
            if attempt.free >= 0:
                return say(console, f"fits with {flags}: {attempt.free:.1f} GiB stay free")
            say(console, f"still too large with {flags}: {-attempt.free:.1f} GiB are lacking")
            tried += 1
    say(console, "take a larger topology" + ("" if tried else ": however these devices cut them, weights, moments and gradients alone are too large"))
    for flags, held in kept_instead(config, shape, devices):
        kept, now = held.total / GIB, plan.held.total / GIB
        say(console, f"or train otherwise: {flags} keeps {kept:.2f} GiB on each device beside activations, not {now:.2f}")


if __name__ == "__main__":
    door(main)
