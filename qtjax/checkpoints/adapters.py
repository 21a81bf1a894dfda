"""Adapters as Hugging Face PEFT folders: adapter_config.json and adapter_model.safetensors.

What a method's settings and tensors are called is the method's own business (`overlays.METHODS`); this file knows the
folder, the bytes and how to refuse what does not fit.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks numpy for
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from qtjax import models
from qtjax.atomic import disk_errors, write_atomic
from qtjax.checkpoints.folder import read_json
from qtjax.errors import QtjaxError, near_names
from qtjax.overlays import METHODS, Overlay, method_named
from qtjax.overlays import leaves as table
from qtjax.overlays.base import Base
from qtjax.tree import Tree, describe_difference, flatten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINABLE = "qtjax_trainable.safetensors"  # where PEFT's file is a derived form, or PEFT lacks the method
STACK = "qtjax_stack.json"
_PICKLED = "adapter_model.bin"
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def adapter_state_dict(overlay: Overlay) -> dict[str, np.ndarray]:
    """The overlay's tensors by PEFT's names and in torch's layouts, as they stand in adapter_model.safetensors.

    Returns: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": float32 [r, in], ...} on the host; for
      lora, layers that are not edited and the padding of unequal ranks are left out.
    A gradient with respect to the trainables has the same tree, so that its tensors by PEFT's names are
    `adapter_state_dict(overlay.replace(params=gradient))`.
    """
    own = method_named(overlay.method)
    return table.tensors(own.leaves(overlay.spec), *jax.tree.map(_host, (overlay.params, overlay.frozen)))


def save_adapter(path: str | Path, overlay: Overlay, base_model_name: str = "") -> None:
    """Writes the folder that peft, vLLM and TGI load.

    Args:
      path: folder, made if it is missing; the files of an earlier adapter in it are replaced atomically.
      base_model_name: what adapter_config.json names as the base (hub name or folder); empty: null.
    On several hosts every process must call it; process 0 writes. Raises QtjaxError if the disk
    refuses; a file of an earlier adapter is then left as it was.
    """
    folder, own = Path(path), method_named(overlay.method)
    if isinstance(overlay.spec, tuple) and "+" in overlay.method:
        _save_stack(folder, overlay, base_model_name)
        return
    files, trained = {}, adapter_state_dict(overlay)
    derived = None if own.file is None else own.file(overlay.spec, *jax.tree.map(_host, (overlay.params, overlay.frozen)))
    if derived is not None or not own.in_peft:
        files[TRAINABLE] = trained
    if own.in_peft:
        files[WEIGHTS] = trained if derived is None else derived
    fields = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name or None,
        "revision": None,
        "inference_mode": True,
        **own.to_peft(overlay.spec),
    }
    if jax.process_index() != 0:
        return
    with disk_errors(folder, "making the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    # The weights first: to every reader a folder without its config is no adapter.
    for name in (WEIGHTS, TRAINABLE):
        if name in files:
            write_atomic(folder / name, save({k: _plain(v) for k, v in files[name].items()}, metadata={"format": "pt"}))
        else:
            (folder / name).unlink(missing_ok=True)
    # Fields in the order given: of overlapping patterns the first wins, so sorting keys would change scales.
    write_atomic(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def _save_stack(folder: Path, overlay: Overlay, base_model_name: str) -> None:
    """Each part is a folder of its own that its own readers load."""
    names = overlay.method.split("+")
    for name, part in zip(names, stack_parts(overlay)):
        save_adapter(folder / name, part, base_model_name)
    if jax.process_index() == 0:
        write_atomic(folder / STACK, json.dumps({"parts": names}, indent=2) + "\n")


def stack_parts(overlay: Overlay) -> list[Overlay]:
    """The overlays that a stack "a+b" is made of."""
    return [
        Overlay(name, spec, overlay.params.get(name, {}), overlay.frozen.get(name, {}))
        for name, spec in zip(overlay.method.split("+"), overlay.spec)
    ]


def load_adapter(path: str | Path, config: models.ModelConfig, params: Tree | None) -> Overlay:
    """Reads a PEFT folder as an overlay for this base model; training can go on from it.

    Args:
      path: folder with adapter_config.json and adapter_model.safetensors (pickled adapter_model.bin is refused).
      config, params: the base model; only shapes are used, so `params` may be abstract or None.
    Returns: an Overlay with float32 trainables (stored float16 and bfloat16 are widened) on the default device.
    Raises QtjaxError, one line, for a folder or file that is missing or corrupt, a method or setting that is not
    supported (named), and tensors that are missing, unknown or mis-shaped for this base (listed).
    """
    folder = Path(path)
    if (folder / STACK).is_file():
        return _load_stack(folder, config, params)
    peft_config = _read_config(folder)
    method = _method(folder, peft_config)
    own = METHODS[method]
    base = Base(config, flatten(models.abstract_params(config) if params is None else params))
    try:
        spec = own.read(base, peft_config, False)
    except QtjaxError as error:
        raise QtjaxError(f"{folder / CONFIG}: {error}") from None
    leaves = own.leaves(spec)
    shapes = table.abstract(leaves)
    form = None if own.file is None else jax.eval_shape(lambda trees: own.file(spec, *trees), shapes)
    # Our own file where there is one and PEFT's does not hold the trainables as they are.
    plain = own.in_peft and form is None and (folder / WEIGHTS).is_file()
    name = TRAINABLE if not own.in_peft or (not plain and (folder / TRAINABLE).is_file()) else WEIGHTS
    derived = name == WEIGHTS and form is not None
    expected = form if derived else jax.eval_shape(lambda trees: table.tensors(leaves, *trees), shapes)
    tensors = _read_tensors(folder, name, expected)
    difference = describe_difference(expected, tensors)
    if difference:
        raise QtjaxError(f"{folder / name}: does not fit {CONFIG} and this base model: {difference}")
    if derived:
        return Overlay(method, *own.from_file(spec, tensors))
    return Overlay(method, spec, *table.trees(leaves, tensors))


def _load_stack(folder: Path, config: models.ModelConfig, params: Tree | None) -> Overlay:
    names = read_json(folder / STACK).get("parts")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise QtjaxError(f"{folder / STACK}: must name the parts of the stack, {{'parts': ['lora', ...]}}")
    parts = [load_adapter(folder / name, config, params) for name in names]
    method_named("+".join(names))
    trees = ({name: getattr(part, tree) for name, part in zip(names, parts)} for tree in ("params", "frozen"))
    return Overlay("+".join(names), tuple(part.spec for part in parts), *trees)


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise QtjaxError(f"{folder}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    file = folder / CONFIG
    if not file.is_file():
        raise QtjaxError(f"{file}: missing; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    return read_json(file)


def _method(folder: Path, peft_config: Mapping[str, Any]) -> str:
    claiming = [name for name, method in METHODS.items() if method.claims(peft_config)]
    if len(claiming) != 1:
        kind, known = peft_config.get("peft_type"), [name.upper() for name in METHODS]
        raise QtjaxError(
            f"{folder / CONFIG}: peft_type {kind!r} is not supported{near_names(str(kind), known)}; supported: {', '.join(known)}"
        )
    return claiming[0]


def _read_tensors(folder: Path, name: str, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    file = folder / name
    if not file.is_file():
        if name == WEIGHTS and (folder / _PICKLED).is_file():
            raise QtjaxError(
                f"{folder / _PICKLED}: pickled weights can run code and are not read; load them with peft and save them"
                f" with safe_serialization=True, which writes {WEIGHTS}"
            )
        raise QtjaxError(f"{file}: missing; copy or download the adapter again")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise QtjaxError(
            f"{file}: not a readable safetensors file ({_one_line(error)}); it is truncated or corrupt, copy or download it again"
        ) from None
    whole = {key for key, value in expected.items() if np.issubdtype(value.dtype, np.integer)}  # indices
    fits = {k: v.dtype.kind in "iu" if k in whole else v.dtype.name in _FLOATS for k, v in tensors.items()}
    odd = sorted(k for k, fit in fits.items() if not fit)
    if odd:
        raise QtjaxError(f"{file}: {odd[0]!r} is stored as {tensors[odd[0]].dtype.name}; readable are {', '.join(_FLOATS)}")
    return tensors


def _plain(value: Any) -> np.ndarray:
    """Contiguous, floats as float32, the file's dtype; indices as they are."""
    value = np.asarray(value)
    return np.ascontiguousarray(value, np.float32 if np.issubdtype(value.dtype, np.floating) else value.dtype)


def _host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
