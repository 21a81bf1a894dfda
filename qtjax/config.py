"""The experiment: frozen dataclasses, one field one knob, each with its unit and rule; overrides typed by field.

`load_config("configs/smol.py", ["--train.learning-rate", "1e-4"])` is what every door calls. Defaults live here only.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qtjax.errors import QtjaxError, near_names
from qtjax.flags import KINDS, Flags, dashed, flag_parser, refuse_unknown, typed, typed_flags

_DEFAULT_FILE = "configs/smol.py"
DTYPES = ("float32", "bfloat16", "float16")
# Also the keys of pruning.SAMPLE_PRUNERS and TOKEN_PRUNERS, and scoring.LOSSES, which lie above this room.
SAMPLE_PRUNERS = (
    "none", "random", "longest", "shortest", "entropy", "perplexity-low", "perplexity-middle", "perplexity-high", "infobatch",
    "infobatch-budget", "q-tuning",
)  # fmt: skip
TOKEN_PRUNERS = ("none", "random", "perplexity", "fastv", "sparsevlm", "rho-1", "token-cleaning", "q-tuning")
LOSSES = ("plain", "dft", "eaft")


def knob(default: Any, doc: str, *, rule: str = "", choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its help text, and a rule checked at the door: ">0", ">=0", "(0,1]", "[0,1]"."""
    return field(default=default, metadata={"doc": doc, "rule": rule, "choices": tuple(choices)})


@dataclass(frozen=True)
class ModelSection:
    path: str = knob("smol", "HF folder (safetensors or Flax msgpack), hub name, or 'smol' (the embedded model)")
    random_init: bool = knob(False, "start from random weights of the folder's config.json (pretraining)")
    dtype: str = knob("float32", "compute dtype of matrix products and activations", choices=DTYPES)
    param_dtype: str = knob("float32", "dtype in which parameters are stored and updated", choices=DTYPES)
    remat: str = knob("none", "what the backward pass recomputes per layer; offload: all, inputs wait on the host", choices=("none", "dots", "full", "offload"))
    unroll_layers: bool = knob(False, "unroll the loop over layers, as small models always do: faster steps, slower compilation")
    quantization: str = knob(
        "none", "the layers' kernels packed while loading, a frozen base for overlays (QLoRA)", choices=("none", "nf4", "int8", "int4")
    )


@dataclass(frozen=True)
class DataSection:
    path: str = knob("smol-instruct", "file, saved datasets folder, hub name, or 'smol-instruct' (the embedded generator)")
    split: str = knob("train", "split of a hub name or of a saved DatasetDict")
    eval_path: str = knob("", "held-out data; empty: eval_fraction of `path` is held out")
    eval_split: str = knob("test", "split of eval_path when it is a hub name or a saved DatasetDict")
    eval_fraction: float = knob(0.05, "fraction (0-1) of `path` held out when eval_path is empty", rule="[0,1)")
    format: str = knob(
        "auto",
        "shape of a row",
        choices=("auto", "prompt_completion", "instruction", "messages", "sharegpt", "text"),
    )
    prompt_column: str = knob("", "column that holds the prompt; empty: by format")
    completion_column: str = knob("", "column that holds the answer (or the text); empty: by format")
    chat_template: str = knob("auto", "'auto': the tokenizer's own if it has one; 'none'; or a .jinja file")
    system_prompt: str = knob("", "system message put before conversations that have none; empty: none")
    task_column: str = knob("", "column that says a row's task, for overlays that tell tasks apart (poly, mpt); empty: one task")
    task_names: str = knob("", "the tasks' names in the order of their ids, comma-separated; empty: the column holds ids 0, 1, ...")
    max_length: int = knob(512, "tokens a sample may have; longer answers are cut and counted", rule=">1")
    part: str = knob("", "'2/3': train on the second of three interleaved parts of the rows; empty: on all")
    max_samples: int = knob(0, "use only the first so many rows; 0: all", rule=">=0")


@dataclass(frozen=True)
class PruneSection:
    sample_pruner: str = knob("q-tuning", "which samples of a batch to keep", choices=SAMPLE_PRUNERS)
    token_pruner: str = knob("q-tuning", "which tokens of the samples in token_scope to keep", choices=TOKEN_PRUNERS)
    token_scope: str = knob(
        "auto", "whose tokens are pruned: of Q2, of both kept corners, of every kept sample; auto: Q2 where samples have quadrants, else kept",
        choices=("auto", "q2", "q2+q4", "kept"),
    )  # fmt: skip
    sample_keep: float = knob(0.25, "fraction (0-1] of each scoring batch's samples to keep", rule="(0,1]")
    token_keep: float = knob(0.5, "fraction (0-1] of a Q2 sample's trained tokens to keep", rule="(0,1]")
    batch_size: int = knob(128, "samples per scoring batch, all devices together; one optimizer step each", rule=">0")
    policy: str = knob("paper", "quadrants kept: paper Q2+Q4, article Q2+Q3", choices=("paper", "article"))
    supplement: str = knob("minmax", "how samples are ranked when corners are short", choices=("minmax", "ranks", "random"))
    corners: str = knob(
        "extreme", "of the kept quadrants' samples, those farthest from the medians first (the paper's), or any of them", choices=("extreme", "random")
    )
    warmup_fraction: float = knob(0.0, "fraction (0-1) of the steps that train on full data before pruning begins", rule="[0,1)")
    mode: str = knob("mask", "pruned tokens leave the loss (mask) or the input too (drop)", choices=("mask", "drop"))
    compact_positions: bool = knob(False, "drop mode only: renumber the kept tokens' positions without gaps")
    neighbor_weight: float = knob(0.5, "lambda of eq. 7, fraction (0-1)", rule="[0,1]")
    neighbors: str = knob("sum", "eq. 7's neighbour term, or the figure caption's average", choices=("sum", "mean"))
    protect_eos: bool = knob(False, "never prune the token that closes an answer")
    reference_model: str = knob("", "HF folder or hub name of the model that rho-1 and token-cleaning compare with")
    infobatch_fraction: float = knob(0.5, "infobatch: fraction (0-1) of the samples below the mean loss that an epoch drops", rule="[0,1)")
    infobatch_anneal: float = knob(0.125, "infobatch: last fraction (0-1) of the epochs that train on all samples", rule="[0,1]")
    score_every: int = knob(1, "epochs from one scoring pass over a sample to the next; its last scores serve in between", rule=">0")
    score_dtype: str = knob("", "compute dtype of the scoring pass; empty: model.dtype; int8: of the layers' products", choices=("", *DTYPES, "int8"))
    score_model: str = knob("", "HF folder or hub name of a model that scores the data once, before training; empty: the model in training")
    reuse_forward: bool = knob(False, "keep the scoring pass's layers: training runs them once where remat full does twice; masked, data x fsdp of 1")
    score_lag: int = knob(0, "optimizer steps by which the scoring weights are old: 0 exact, 1 lets scoring overlap training", rule="0 or 1")


@dataclass(frozen=True)
class OverlaySection:
    method: str = knob("none", "'none': full-parameter training; or an overlay: lora, dora, ia3, prefix, ...; 'lora+ln_tuning' stacks")
    path: str = knob("", "adapter folder (PEFT's or qtjax's) to go on from, with its own settings; empty: a fresh one")
    r: int = knob(-1, "rank; -1: the method's own default (lora 8)", rule="-1 or >0")
    lora_alpha: float = knob(-1.0, "scale is lora_alpha / r; -1: the method's own default (lora 16)", rule="-1 or >0")
    lora_dropout: float = knob(0.0, "dropout fraction [0-1) on the side path's input", rule="[0,1)")
    target_modules: str = knob("", "'all-linear', comma-separated module names, or one regex; empty: the method's own default")
    fields: str = knob("", "the method's other settings by PEFT's names: 'init_r=12 target_r=8 coft=true', values in JSON")


@dataclass(frozen=True)
class TrainSection:
    epochs: float = knob(3.0, "passes over the data", rule=">0")
    max_steps: int = knob(0, "stop after so many optimizer steps; 0: by epochs", rule=">=0")
    loss: str = knob("plain", "nll of the kept tokens, or nll re-weighted token by token: dft by probability, eaft by entropy", choices=LOSSES)
    learning_rate: float = knob(1e-4, "peak learning rate", rule=">0")
    warmup_fraction: float = knob(0.03, "fraction (0-1) of the steps spent warming up linearly", rule="[0,1)")
    final_lr_fraction: float = knob(0.0, "cosine ends at this fraction (0-1) of the peak", rule="[0,1]")
    weight_decay: float = knob(0.0, "AdamW decoupled weight decay, matrices only", rule=">=0")
    b1: float = knob(0.9, "AdamW first moment decay", rule="[0,1)")
    b2: float = knob(0.999, "AdamW second moment decay", rule="[0,1)")
    eps: float = knob(1e-8, "AdamW epsilon", rule=">0")
    clip_norm: float = knob(1.0, "global gradient norm limit; 0: off", rule=">=0")
    row_length: int = knob(0, "tokens per packed row; 0: data.max_length", rule=">=0")
    rows: int = knob(8, "packed rows per microbatch, all devices together", rule=">0")
    shapes: int = knob(4, "microbatch shapes compiled at most: rows, rows/2, ... (1-4); fewer compile faster, more waste less", rule="1..4")
    seed: int = knob(0, "seed of shuffling, initialisation and dropout", rule=">=0")
    checkpoint_every: int = knob(100, "optimizer steps between checkpoints", rule=">0")
    keep_checkpoints: int = knob(2, "newest checkpoints kept on disk", rule=">0")
    compare_full_data: int = knob(0, "optimizer steps of full-data training timed at the end for the speed-up; 0: none", rule=">=0")


@dataclass(frozen=True)
class MeshSection:
    data: int = knob(-1, "devices along the data axis (replicated parameters); -1: all that remain", rule="-1 or >0")
    fsdp: int = knob(1, "devices along the fsdp axis (sharded parameters and data)", rule=">0")
    tensor: int = knob(1, "devices along the tensor axis (sharded heads, MLP and vocabulary)", rule=">0")


@dataclass(frozen=True)
class EvalSection:
    max_samples: int = knob(0, "held-out samples used; 0: all", rule=">=0")
    generate_samples: int = knob(0, "held-out samples answered for exact match; 0: none", rule=">=0")
    max_new_tokens: int = knob(128, "tokens generated per answer at most", rule=">0")
    batch_size: int = knob(32, "prompts generated at a time", rule=">0")


@dataclass(frozen=True)
class RunSection:
    folder: str = knob("runs/default", "where the run writes everything; started again it resumes")
    tensorboard: bool = knob(True, "write TensorBoard event files")
    export: bool = knob(True, "write the trained model (or adapter) as an HF folder at the end")
    compile_cache: str = knob("", "folder of the persistent compilation cache; empty: <run folder>/compile_cache")


@dataclass(frozen=True)
class Config:
    """One experiment. `to_dict` is what a run folder stores and compares."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    prune: PruneSection = field(default_factory=PruneSection)
    overlay: OverlaySection = field(default_factory=OverlaySection)
    train: TrainSection = field(default_factory=TrainSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    eval: EvalSection = field(default_factory=EvalSection)
    run: RunSection = field(default_factory=RunSection)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """{"train.learning_rate": 1e-4, ...}"""
        return {f"{s}.{k}": v for s, section in self.to_dict().items() for k, v in section.items()}


_RULES: dict[str, tuple[typing.Callable[[Any], bool], str]] = {
    ">0": (lambda v: v > 0, "must be above 0"),
    ">1": (lambda v: v > 1, "must be above 1"),
    ">=0": (lambda v: v >= 0, "must be 0 or more"),
    "(0,1]": (lambda v: 0 < v <= 1, "is a fraction above 0 and at most 1"),
    "[0,1]": (lambda v: 0 <= v <= 1, "is a fraction from 0 to 1"),
    "[0,1)": (lambda v: 0 <= v < 1, "is a fraction from 0 to below 1"),
    "0 or 1": (lambda v: v in (0, 1), "must be 0 or 1"),
    "1..4": (lambda v: 1 <= v <= 4, "must be 1, 2, 3 or 4"),
    "-1 or >0": (lambda v: v == -1 or v > 0, "must be -1 or above 0"),
}


def validate(config: Config) -> Config:
    """Checks every field against its type and rule, and fields against each other. Raises QtjaxError."""
    for section in fields(config):
        values = getattr(config, section.name)
        for f in fields(values):
            name, value = f"{section.name}.{f.name}", getattr(values, f.name)
            if f.type is float and type(value) is int:
                value = float(value)
            if type(value) is not f.type:
                raise QtjaxError(f"{name} = {value!r}: must be {KINDS[f.type]}, is {type(value).__name__}")
            _check(name, value, f.metadata)
    if config.data.part:
        part, _, parts = config.data.part.partition("/")
        if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
            raise QtjaxError(f"data.part = {config.data.part!r}: must be k/n with 1 <= k <= n, for example 2/3")
    if config.train.row_length and config.train.row_length < config.data.max_length:
        raise QtjaxError(
            f"train.row_length = {config.train.row_length}: must be at least data.max_length ="
            f" {config.data.max_length}, so that every sample fits a row; raise it, or set it to 0"
        )
    return config


def _check(name: str, value: Any, metadata: types.MappingProxyType | dict) -> None:
    choices, rule = metadata["choices"], metadata["rule"]
    if choices and value not in choices:
        raise QtjaxError(f"{name} = {value!r}: must be one of {', '.join(choices)}{near_names(value, choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise QtjaxError(f"{name} = {value}: must be a finite number")
    if rule and not _RULES[rule][0](value):
        raise QtjaxError(f"{name} = {value!r}: {_RULES[rule][1]}; see --help for its unit and default")


def read_config(path: str) -> Config:
    """Runs a configs/*.py file and returns its `get_config()`. Raises QtjaxError if the file or function is missing."""
    if not Path(path).is_file():
        raise QtjaxError(f"--config {path}: no such file; ready-made ones are in configs/")
    spec = importlib.util.spec_from_file_location("qtjax_experiment", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except (TypeError, SyntaxError, ImportError, AttributeError, NameError) as error:
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        known = {f.name for section in fields(Config) for f in fields(getattr(Config(), section.name))}
        hint = near_names(named[1], known) if named else ""
        raise QtjaxError(f"--config {path}: {type(error).__name__}: {error}{hint}; mend the file") from None
    if not hasattr(module, "get_config"):
        raise QtjaxError(f"--config {path}: the file must define get_config() -> qtjax.config.Config")
    if not isinstance(config, Config):
        raise QtjaxError(f"--config {path}: get_config() must return a qtjax.config.Config, returned {type(config).__name__}")
    return config


def override(config: Config, values: dict[str, Any]) -> Config:
    """A copy with {"train.learning_rate": 3e-4, ...} set. Raises QtjaxError for an unknown field."""
    known = config.flat()
    for name, value in values.items():
        if name not in known:
            raise QtjaxError(f"{name}: no such field{near_names(name, known)}")
        section, key = name.split(".")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def load_config(
    prog: str, description: str, argv: Sequence[str] | None = None, extra: Flags | None = None, *, run_flag: str = ""
) -> tuple[Config, dict[str, Any]]:
    """Parses a door's command line: `--config FILE`, one typed flag per field, and the door's own flags.

    Args:
      prog: "python -m qtjax.train"; description: first line of --help.
      extra: the door's own flags, {"name": (default, doc)}; typed by their default.
      run_flag: the one of `extra` that may name a run folder. It does, and no --config was given: the run's own config
        is what the other flags change, so that a run is measured on its own data and not on the default file's.
    Returns: (validated Config, {name: value} of `extra`). Raises QtjaxError for anything mistyped.
    """
    extra = extra or {}
    parser = flag_parser(prog, description, extra, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this text; with --config, with that file's values")
    or_run = f", or the run's own config where --{run_flag} is a run folder" if run_flag else ""
    parser.add_argument("--config", help=f"experiment file with get_config() (default: {_DEFAULT_FILE!r}{or_run})")
    flags = {}
    for section in fields(Config):
        group = parser.add_argument_group(section.name)
        for f in fields(section.type):
            name = f"{section.name}.{f.name}"
            flags[name] = f, group.add_argument(f"--{dashed(name)}", dest=name, metavar=f.type.__name__)
    given, unknown = parser.parse_known_args(argv)
    if given.help:
        _print_help(parser, flags, given.config)
    refuse_unknown(parser, unknown)
    own = typed_flags(given, extra)
    if run_flag and not given.config and own[run_flag] and is_run_folder(own[run_flag]):
        config = run_config(own[run_flag])
    else:
        config = read_config(given.config or _DEFAULT_FILE)
    texts = {name: getattr(given, name) for name in flags}
    changes = {
        name: typed(f"{name} =", f.type, texts[name], dashed(name)) for name, (f, _) in flags.items() if texts[name] is not None
    }
    return validate(override(config, changes)), own


def _print_help(parser: argparse.ArgumentParser, flags: dict[str, Any], file: str | None) -> typing.NoReturn:
    """Each field's default, and what `file` makes of it; a file that cannot be read is no reason to withhold the rest."""
    here = {}
    if file:
        with contextlib.suppress(QtjaxError):
            here = read_config(file).flat()
    for name, (f, action) in flags.items():
        choices = f" [{' | '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        value = here.get(name, f.default)
        said = f"; {Path(file).name}: {value!r}" if value != f.default else "" if here else ", unless the config file sets it"
        action.help = f"{f.metadata['doc']}{choices} (default: {f.default!r}{said})".replace("%", "%%")
    parser.print_help()
    raise SystemExit(0)


def is_run_folder(path: str | Path) -> bool:
    """Whether config.json in `path` is a run's (sections), not a model's. Raises QtjaxError if it is damaged."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QtjaxError(f"{file}: is not valid JSON ({error}); the folder is damaged") from None
    return isinstance(raw, dict) and isinstance(raw.get("train"), dict)


def run_config(folder: str | Path) -> Config:
    """The config that a run folder was written with; run.folder is where it lies now: its files are there.

    Raises QtjaxError when it is no run folder.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise QtjaxError(f"{folder}: no config.json there, so this is no run folder; give the run.folder of a training run")
    return override(from_json(file.read_text(encoding="utf-8")), {"run.folder": str(folder)})


def to_json(config: Config) -> str:
    """The whole config, every field, as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`; raises QtjaxError for unknown sections or fields."""
    raw = json.loads(text)
    if not isinstance(raw, dict) or not all(isinstance(section, dict) for section in raw.values()):
        raise QtjaxError("this config.json is not a run's; give the run.folder of a training run")
    values = {f"{s}.{k}": v for s, section in raw.items() for k, v in section.items()}
    return validate(override(Config(), values))
