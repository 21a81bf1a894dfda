"""The experiment as a whole: its fields (sections.py) checked, read from a file, and changed by flags that are typed by field.

`load_config("configs/smol.py", ["--train.learning-rate", "1e-4"])` is what every door calls.
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
from qtjax.sections import DataSection, EvalSection, MeshSection, ModelSection, OverlaySection, PruneSection, RunSection, TrainSection

_DEFAULT_FILE = "configs/smol.py"


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

    @property
    def row_length(self) -> int:
        """Tokens of a packed row."""
        return self.train.row_length or self.data.max_length

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
