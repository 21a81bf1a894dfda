"""The programs of a run without a run: from a model's shape and a few settings to what the compiler says of each program.

Weights are shapes only, so that nothing is read, drawn or run. Used by benchmarks.guard and benchmarks.scaling.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from qtjax.config import Config, override, validate
from qtjax.models import ModelConfig
from qtjax.parallel import batch_size, round_up
from qtjax.planning import AbstractRun, abstract_run, collectives
from qtjax.training.ladder import ladder
from qtjax.training.programs import program_jobs


class Compilable(NamedTuple):
    """run: shapes and shardings of a run's arrays. jobs: {program: a call that compiles it}, all that the run would compile."""

    run: AbstractRun
    jobs: dict[str, Callable[[], Any]]


def compilable(shape: ModelConfig, settings: Mapping[str, Any], mesh: Mesh) -> Compilable:
    """What a run of this model would compile, by the names of `training.programs.program_jobs`.

    Args: settings: {"train.rows": 8, "overlay.method": "lora", ...}, as a config's flags; the rest are the config's defaults.
    Raises QtjaxError as a run would, for a setting that is none or a mesh that does not divide the model.
    """
    config = validate(override(Config(), dict(settings)))
    run = abstract_run(config, shape, mesh)
    jobs = program_jobs(
        run.subject, mesh, config.prune, config.train.loss, run.optimizer, run.state, run.frozen,
        shapes=ladder(config.train.rows, batch_size(mesh), config.train.shapes), row_length=config.row_length,
        samples=round_up(config.prune.batch_size, batch_size(mesh)), max_length=config.data.max_length,
    )  # fmt: skip
    return Compilable(run, jobs)


def figures(program: Any, mesh: Mesh) -> dict[str, int]:
    """What the compiler says of a compiled program, of each device.

    flops: of one launch, where the body of a loop counts ONCE, however often it turns: one layer of a scanned stack, one chunk of
    the fused head. arguments, outputs, temporaries: bytes; donated: bytes of outputs that take an argument's place. moved: bytes
    that a device receives by collectives in a launch, here with every turn of a loop whose number is known.
    """
    memory = program.memory_analysis()
    found = {
        "flops": int(program.cost_analysis().get("flops", 0)), "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes, "donated": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
    }  # fmt: skip
    return found | ({"moved": sum(each.bytes for each in collectives(program.as_text(), mesh.size))} if mesh.size > 1 else {})
