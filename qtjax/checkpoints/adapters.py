"""Adapters as Hugging Face PEFT folders: adapter_config.json and adapter_model.safetensors.

What a method's settings and tensors are called is the method's own business (`overlays.METHODS`); this file knows the
folder, the bytes and how to refuse what does not fit.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks numpy for
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from qtjax import models
from qtjax.atomic import disk_errors, write_atomic
from qtjax.checkpoints.folder import read_json
from qtjax.errors import QtjaxError, near_names
from qtjax.overlays import METHODS, Method, Overlay, method_named
from qtjax.overlays import leaves as table
from qtjax.overlays.base import Base
from qtjax.parallel import wait_for_all
from qtjax.tree import Tree, describe_difference, flatten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINABLE = "qtjax_trainable.safetensors"  # where PEFT's file is a derived form, or PEFT lacks the method
STACK = "qtjax_stack.json"
# Metadata of TRAINABLE: the digest of the WEIGHTS saved with it, and the settings that it is read with if not CONFIG's.
_SHA, _RAW = "weights_sha256", "settings"
_PICKLED = "adapter_model.bin"
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def adapter_state_dict(overlay: Overlay) -> dict[str, np.ndarray]:
    """The overlay's own arrays, trained and frozen, by PEFT's names and in torch's layouts.

    Returns: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": float32 [r, in], ...} on the host; for
      lora, layers that are not edited and the padding of unequal ranks are left out.
    They are what adapter_model.safetensors holds, except where that is a derived form (an encoder's prompt, pruned ranks,
    initial factors folded in) or PEFT has no such method: then they are what qtjax_trainable.safetensors holds, and the
    derived form is only written by `save_adapter`.
    A gradient with respect to the trainables has their tree, so that its tensors by these names are
    `adapter_state_dict(overlay.replace(params=gradient))`, for every method; frozen arrays stand in it as they are.
    """
    own = method_named(overlay.method)
    return table.tensors(own.leaves(overlay.spec), *jax.tree.map(host_array, (overlay.params, overlay.frozen)))


def save_adapter(path: str | Path, overlay: Overlay, base_model_name: str = "") -> None:
    """Writes the folder that peft, vLLM and TGI load.

    Args:
      path: folder, made if it is missing; the files of an earlier adapter in it are replaced atomically.
      base_model_name: what adapter_config.json names as the base (hub name or folder); empty: null.
    On several hosts every process must call it; process 0 writes, and none returns before the folder stands. Raises
    QtjaxError if the disk refuses; a file of an earlier adapter is then left as it was.
    """
    folder = Path(path)
    if isinstance(overlay.spec, tuple) and "+" in overlay.method:
        _save_stack(folder, overlay, base_model_name)
    else:
        _save_one(folder, overlay, base_model_name)
    wait_for_all(f"save_adapter {folder.name}")


def _save_one(folder: Path, overlay: Overlay, base_model_name: str) -> None:
    own, host = method_named(overlay.method), jax.tree.map(host_array, (overlay.params, overlay.frozen))
    trained = table.tensors(own.leaves(overlay.spec), *host)
    spec, conversion = own.saved_spec(overlay.spec, host[0]), own.conversion(overlay.spec)
    theirs = conversion.file(*host) if conversion is not None else _peft_file(own, spec, *host)
    files = {WEIGHTS: trained} if theirs is None else {TRAINABLE: trained} | ({WEIGHTS: theirs} if theirs else {})
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model_name or None, "revision": None, "inference_mode": True}
    fields = common | own.to_peft(spec)
    if jax.process_index() != 0:
        return
    with disk_errors(folder, "making the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    (folder / STACK).unlink(missing_ok=True)  # what stood here before is no longer this adapter
    for part, part_config in own.parts(spec).items():
        _write_part(folder / part, files[WEIGHTS], f"{part}/", common | part_config)
    # The weights first: to every reader a folder without its config is no adapter.
    notes: dict[str, Any] = {}
    for name in (WEIGHTS, TRAINABLE):
        if name in files:
            elsewhere = tuple(f"{part}/" for part in own.parts(spec))
            data = save({k: _plain(v) for k, v in files[name].items() if not k.startswith(elsewhere)}, metadata=_metadata(name, notes))
            write_atomic(folder / name, data)
            notes = {_SHA: hashlib.sha256(data).hexdigest()} | ({} if conversion is None else {_RAW: conversion.settings})
        else:
            (folder / name).unlink(missing_ok=True)
    # Fields in the order given: of overlapping patterns the first wins, so sorting keys would change scales.
    write_atomic(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def _write_part(folder: Path, tensors: Mapping[str, Any], prefix: str, fields: Mapping[str, Any]) -> None:
    """An adapter that another is made of, in a folder of its own: its tensors are those whose key begins with `prefix`."""
    own = {key.removeprefix(prefix): _plain(value) for key, value in tensors.items() if key.startswith(prefix)}
    with disk_errors(folder, "making the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save(own, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def _save_stack(folder: Path, overlay: Overlay, base_model_name: str) -> None:
    """Each part is a folder of its own that its own readers load."""
    names = overlay.method.split("+")
    for name, part in zip(names, stack_parts(overlay)):
        save_adapter(folder / name, part, base_model_name)
    if jax.process_index() == 0:
        for name in (CONFIG, WEIGHTS, TRAINABLE):
            (folder / name).unlink(missing_ok=True)
        write_atomic(folder / STACK, json.dumps({"parts": names}, indent=2) + "\n")


def is_adapter_folder(path: str | Path) -> bool:
    """Whether `load_adapter` would read this folder."""
    return (Path(path) / CONFIG).is_file() or (Path(path) / STACK).is_file()


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
    notes, parts = _notes(folder), _parts(folder, own, peft_config)
    if parts:
        peft_config = {**peft_config, "parts": [_read_config(part) for part in parts]}
    try:
        spec = own.read(base, notes[_RAW] if _RAW in notes else peft_config, False)
    except QtjaxError as error:
        raise QtjaxError(f"{folder / CONFIG}: {error}") from None
    name, derived = _file_to_read(folder, own, spec, _RAW in notes)
    tensors = _read_tensors(folder, name)
    for part, prefix in zip(parts, own.parts(spec)):
        tensors |= {f"{prefix}/{key}": value for key, value in _read_tensors(part).items()}
    spec = own.complete(spec, sorted(tensors))
    leaves = own.leaves(spec)
    read = partial(_peft_file, own, spec) if derived else partial(table.tensors, leaves)
    expected = jax.eval_shape(lambda trees: read(*trees), table.abstract(leaves))
    difference = describe_difference(expected, tensors)
    if difference:
        raise QtjaxError(f"{folder / name}: does not fit {CONFIG} and this base model: {difference}")
    _check_dtypes(folder / name, tensors, expected)
    broken = [key for key, value in tensors.items() if value.dtype.name in _FLOATS and not np.isfinite(value.astype(np.float32)).all()]
    if broken:
        raise QtjaxError(f"{folder / name}: {broken[0]!r} holds NaN or infinity; training diverged or the file is damaged, take another")
    if derived:
        return Overlay(method, *own.from_file(spec, tensors))
    return Overlay(method, spec, *table.trees(leaves, tensors))


def _peft_file(own: Method, spec: Any, params: Tree, frozen: Tree) -> dict[str, Any] | None:
    """PEFT's file where it is not that of the trainables (None); {} where PEFT cannot have one."""
    return ({} if not own.in_peft else None) if own.file is None else own.file(spec, params, frozen)


def _file_to_read(folder: Path, own: Method, spec: Any, raw: bool) -> tuple[str, bool]:
    """(which file, whether it holds PEFT's derived form): our own file where PEFT's does not hold the trainables as they are."""
    theirs = jax.eval_shape(lambda trees: _peft_file(own, spec, *trees), table.abstract(own.leaves(spec)))
    if raw or theirs == {}:
        return TRAINABLE, False
    if theirs is None:
        return WEIGHTS, False
    return (TRAINABLE, False) if (folder / TRAINABLE).is_file() else (WEIGHTS, True)


def _load_stack(folder: Path, config: models.ModelConfig, params: Tree | None) -> Overlay:
    names = read_json(folder / STACK).get("parts")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise QtjaxError(f"{folder / STACK}: must name the parts of the stack, {{'parts': ['lora', ...]}}")
    method = "+".join(names)
    if len(names) < 2:
        raise QtjaxError(f"{folder / STACK}: parts = {names}: a stack has two parts or more")
    try:
        method_named(method)
    except QtjaxError as error:
        raise QtjaxError(f"{folder / STACK}: {error}") from None
    parts = [load_adapter(folder / name, config, params) for name in names]
    for name, part in zip(names, parts):
        if part.method != name:
            raise QtjaxError(f"{folder / name}: holds a {part.method} adapter, and {STACK} calls it {name!r}")
    kinds = ([(name, getattr(part, kind)) for name, part in zip(names, parts)] for kind in ("params", "frozen"))
    trees = ({name: tree for name, tree in kind if tree} for kind in kinds)  # as a fresh stack has them
    return Overlay(method, tuple(part.spec for part in parts), *trees)


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise QtjaxError(f"{folder}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    file = folder / CONFIG
    if not file.is_file():
        raise QtjaxError(f"{file}: missing; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    return read_json(file)


def _parts(folder: Path, own: Any, peft_config: Mapping[str, Any]) -> list[Path]:
    """The folders of the adapters that this one is made of, in order. Raises QtjaxError when they are not there."""
    if not own.in_parts:
        return []
    adapters = peft_config.get("adapters")
    named = list(adapters.values()) if isinstance(adapters, Mapping) else []
    folders = [folder / Path(str(name)).name for name in named]
    missing = [str(path) for path in folders if not path.is_dir()]
    if missing or not folders:
        raise QtjaxError(
            f"{folder / CONFIG}: adapters must name the folders of its experts beside it;"
            f" {'missing: ' + ', '.join(missing) if missing else 'it names none'}"
        )
    return folders


def _method(folder: Path, peft_config: Mapping[str, Any]) -> str:
    claiming = [name for name, method in METHODS.items() if method.claims(peft_config)]
    if len(claiming) != 1:
        kind, known = peft_config.get("peft_type"), sorted({kind for method in METHODS.values() for kind in method.claims.types})
        raise QtjaxError(
            f"{folder / CONFIG}: peft_type {kind!r} is not supported{near_names(str(kind), known)}; supported: {', '.join(known)}"
        )
    return claiming[0]


def _read_tensors(folder: Path, name: str = WEIGHTS) -> dict[str, np.ndarray]:
    file = folder / name
    if not file.is_file():
        if name == WEIGHTS and (folder / _PICKLED).is_file():
            raise QtjaxError(
                f"{folder / _PICKLED}: pickled weights can run code and are not read; load them with peft and save them"
                f" with safe_serialization=True, which writes {WEIGHTS}"
            )
    return read_safetensors(file)


def _check_dtypes(file: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    whole = {key for key, value in expected.items() if np.issubdtype(value.dtype, np.integer)}  # indices
    fits = {k: v.dtype.kind in "iu" if k in whole else v.dtype.name in _FLOATS for k, v in tensors.items()}
    odd = sorted(k for k, fit in fits.items() if not fit)
    if odd:
        raise QtjaxError(f"{file}: {odd[0]!r} is stored as {tensors[odd[0]].dtype.name}; readable are {', '.join(_FLOATS)}")


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The file's tensors. Raises QtjaxError, one line, when it is missing or corrupt."""
    if not file.is_file():
        raise QtjaxError(f"{file}: missing; copy or download the adapter again")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise QtjaxError(
            f"{file}: not a readable safetensors file ({_one_line(error)}); it is truncated or corrupt, copy or download it again"
        ) from None


def _metadata(name: str, notes: Mapping[str, Any]) -> dict[str, str]:
    """One entry, since safetensors writes several in any order: the same adapter is the same bytes."""
    return {"format": "pt"} if name == WEIGHTS else {"qtjax": json.dumps(notes)}


def _notes(folder: Path) -> Mapping[str, Any]:
    """The metadata of the file of trainables. Raises QtjaxError when it is not of one piece with the file for PEFT."""
    if not (folder / TRAINABLE).is_file():
        return {}
    try:
        with safe_open(folder / TRAINABLE, "np") as file:
            notes = json.loads((file.metadata() or {}).get("qtjax", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}  # `_read_tensors` says what is wrong with it
    weights = folder / WEIGHTS
    if _SHA in notes and weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() != notes[_SHA]:
        raise QtjaxError(
            f"{folder / TRAINABLE}: belongs to another {WEIGHTS} than the one beside it; remove it to read that one, or"
            " save the adapter again"
        )
    return notes


def _plain(value: Any) -> np.ndarray:
    """Contiguous, floats as float32, the file's dtype; indices as they are."""
    value = np.asarray(value)
    return np.ascontiguousarray(value, np.float32 if np.issubdtype(value.dtype, np.floating) else value.dtype)


def host_array(value: Any) -> np.ndarray:
    """A whole array as numpy, gathered where other hosts hold parts of it."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
