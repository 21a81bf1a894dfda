"""What benchmarks.guard measures: the main programs of a small and of a middling model, and two Loops that are really run.

Its own process, for the number of devices is fixed when JAX starts:  python -m benchmarks.guarded DEVICES [NAME]  prints JSON.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

DEVICES = (1, 8)  # a process for each
Measured = dict[str, dict[str, int]]  # {"15M full, 1 device: accumulate 8": {"flops": ...}}

SHAPES = {
    "small": dict(
        vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True, max_position_embeddings=512,
    ),
    # 15 million parameters, rows of 8 x 512: attention and the head are what takes memory
    "15M": dict(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, head_dim=48,
        tie_word_embeddings=True, max_position_embeddings=2048,
    ),
}  # fmt: skip
SETTINGS = {
    "small": {"data.max_length": 64, "prune.batch_size": 16},
    "15M": {"data.max_length": 512, "prune.batch_size": 64},
}
METHODS = {
    "full": {"overlay.method": "none"}, "LoRA": {"overlay.method": "lora"}, "full, remat": {"overlay.method": "none", "model.remat": "full"},
    "full, kept": {"overlay.method": "none", "prune.reuse_forward": True},
}  # fmt: skip
STEPS = ("score 8", "accumulate 8", "update")


class Case(NamedTuple):
    """One run's programs: of those that it would compile, the ones that are measured."""

    shape: str
    method: str
    devices: int
    programs: tuple[str, ...] = STEPS

    @property
    def name(self) -> str:
        return f"{self.shape} {self.method}, {self.devices} device{'s' * (self.devices > 1)}"


class LoopCase(NamedTuple):
    """A Loop that is really run."""

    method: str
    mode: str
    devices: int

    @property
    def name(self) -> str:
        return f"loop {self.method} {self.mode}, {self.devices} device{'s' * (self.devices > 1)}"


CASES = [
    LoopCase("full", "mask", 1),  # first: what others compile would hide what these do
    LoopCase("LoRA", "drop", 8),
    *(Case("15M", "full", devices, (*STEPS, "decide", "place 8")) for devices in DEVICES),
    *(Case("15M", "LoRA", devices) for devices in DEVICES),
    Case("15M", "full, remat", 1, ("accumulate 8",)),
    Case("15M", "full, kept", 1, ("score 8", "backward 8", "carry 8 8")),
    *(Case("small", method, devices) for method in ("full", "LoRA") for devices in DEVICES),
]  # fmt: skip


def selected(only: str, devices: int) -> list[Case | LoopCase]:
    """The cases whose name begins with `only`, of so many devices."""
    return [case for case in CASES if case.name.startswith(only) and case.devices == devices]


def measure_here(devices: int, only: str) -> Measured:
    """The cases of so many devices, which this process must have."""
    import jax  # here and below: the guard itself need not wait for these

    from benchmarks.compiled import compilable, figures
    from qtjax.config import MeshSection
    from qtjax.models import ModelConfig
    from qtjax.parallel import make_mesh

    mesh = make_mesh(MeshSection(*((2, 2, 2) if devices == 8 else (devices, 1, 1))))
    out: Measured = {}
    for case in selected(only, devices):
        if isinstance(case, LoopCase):
            out |= run_loop(case)
            continue
        jobs = compilable(ModelConfig(**SHAPES[case.shape]), SETTINGS[case.shape] | METHODS[case.method], mesh).jobs
        out[f"{case.name}: a run"] = {"programs": len(jobs)}
        for program in [program for program in case.programs if program in jobs]:  # of one that is missing the guard tells
            with jax.set_mesh(mesh):
                out[f"{case.name}: {program}"] = figures(jobs[program](), mesh)
    return out


def run_loop(case: LoopCase) -> Measured:
    """How much is compiled by opening a run of random weights, by its first step (small operations on the host's side) and by later ones."""
    import jax
    from rich.console import Console

    from qtjax.config import Config, override, validate
    from qtjax.models import ModelConfig
    from qtjax.smol import model_folder
    from qtjax.training.run import open_session
    from qtjax.training.run_folder import RunFolder

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        shape = ModelConfig(**SHAPES["small"] | {"vocab_size": 2048})
        (model / "config.json").write_text(json.dumps(shape.to_hf()))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((Path(model_folder()) / name).read_bytes())
        mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2} if case.devices == 8 else {}
        settings = METHODS[case.method] | mesh | {
            "model.path": str(model), "model.random_init": True, "data.max_samples": 64, "data.max_length": 128, "data.eval_fraction": 0.0,
            "prune.batch_size": 16, "prune.sample_keep": 0.5, "prune.mode": case.mode, "train.max_steps": 4, "train.rows": 4, "train.shapes": 2,
            "run.folder": str(Path(folder) / "run"), "run.tensorboard": False,
        }  # fmt: skip
        config = validate(override(Config(), settings))
        with RunFolder.open(config) as run:
            session = open_session(config, run, Console(quiet=True))
            counts = [len(compiled)]
            for step in range(config.train.max_steps):
                session.loop.step(step, session.total_steps)
                counts.append(len(compiled))
            programs = session.loop.programs.count
            session.close()
    return {
        f"{case.name}: start": {"programs": programs, "compilations": counts[0]},
        f"{case.name}: first step": {"compilations": counts[1] - counts[0]},
        f"{case.name}: later steps": {"compilations": counts[-1] - counts[1]},
    }


if __name__ == "__main__":
    print(json.dumps(measure_here(int(sys.argv[1]), "".join(sys.argv[2:]))))
