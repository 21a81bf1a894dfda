"""The two functions everybody calls: load_pretrained and save_pretrained."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from qtjax.checkpoints import hf
from qtjax.checkpoints.assemble import assemble
from qtjax.checkpoints.folder import TOKENIZER_FILES, open_weights, read_config, resolve_folder
from qtjax.checkpoints.names import Place, places, stored_shape
from qtjax.errors import QtjaxError, near_names
from qtjax.models import KINDS, ModelConfig, Quantized, abstract_params, init_params, kernel_of
from qtjax.parallel import wait_for_all
from qtjax.tree import Tree, describe_difference, flatten

MAX_SHARD_BYTES = 5_000_000_000  # what transformers 4 splits at; 5 readers take any


def load_pretrained(
    path: str | Path,
    dtype: str = "float32",
    *,
    mesh: jax.sharding.Mesh | None = None,
    param_dtype: str | None = None,
    random_init: bool = False,
    key: jax.Array | None = None,
    quantization: str | None = None,
) -> tuple[ModelConfig, Tree]:
    """Loads a LLaMA or Mistral checkpoint into a parameter tree.

    Args:
      path: HF folder (safetensors, or Flax msgpack; single or sharded), hub name "organisation/name", or "smol".
      dtype: compute dtype, goes into the config, as does the attention kernel of the platform. param_dtype: dtype of the returned leaves; default `dtype`.
      mesh: where leaves are sharded as parallel/sharding.py says; None: the default device.
      random_init: ignore the folder's weights and draw new ones with `key` (default jax.random.key(0)).
      quantization: "nf4", "int8" or "int4" packs the layers' linear kernels while they are read (models/quantized.py);
        norms, embedding and head stay in param_dtype. Such a model is a frozen base for overlays.
    Returns: (config, params). Each leaf goes from file to device by itself: host memory holds one leaf (one shard of it,
    with a mesh) beside the result; of a quantised leaf the packed form and one layer's matrix.
    Raises QtjaxError: nothing there, hub out of reach, unsupported config, damaged or missing files, pickles, and
    tensors that do not fit (all of them listed).
    """
    folder = resolve_folder(path)
    if quantization not in (None, *KINDS):
        raise QtjaxError(
            f"quantization = {quantization!r}: must be None or one of {', '.join(KINDS)}{near_names(str(quantization), KINDS)}"
        )
    config = read_config(folder).replace(
        dtype=_dtype(dtype), param_dtype=_dtype(param_dtype or dtype), quantization=quantization
    )
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    config = config.replace(attention=kernel_of(device.client.platform, config.dtype))  # "cuda" or "rocm", where device.platform is "gpu"
    shardings = None
    if mesh is not None:
        from qtjax.parallel.sharding import param_shardings

        shardings = param_shardings(config, mesh)
    if random_init:
        key = jax.random.key(0) if key is None else key
        if shardings is None:
            return config, init_params(config, key)
        return config, jax.jit(partial(init_params, config), out_shardings=shardings)(key)
    stored = open_weights(folder, config)
    return config, assemble(stored, abstract_params(config), str(folder), shardings)


def _dtype(name: str) -> str:
    name = np.dtype(name).name if not isinstance(name, str) else name
    if name not in ("float32", "bfloat16", "float16"):
        raise QtjaxError(f"dtype {name!r}: must be float32, bfloat16 or float16")
    return name


def save_pretrained(
    path: str | Path,
    config: ModelConfig,
    params: Tree,
    tokenizer_from: str | Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a folder that transformers loads: config.json, generation_config.json, model.safetensors (or shards + index).

    Everything is written beside its destination first and renamed into place when complete, so that a failure (disk
    full, interrupt) leaves what was there untouched. Weights keep the dtype of their leaves. On several hosts every
    process must call it; process 0 writes.

    Args:
      params: tree of numpy or jax arrays, sharded or not. tokenizer_from: folder, hub name or "smol" whose tokenizer
        files (and generation_config.json) are copied along. max_shard_bytes: bytes a weights file may have.
    Returns: the folder. Raises QtjaxError if the tree does not fit the config, or the disk does not take it.
    """
    folder = Path(path).expanduser()
    packed = next((leaf for leaf in flatten(params).values() if isinstance(leaf, Quantized)), None)
    if packed is not None:
        raise QtjaxError(
            f"cannot save to {folder}: the kernels are quantised ({packed.kind}), which the folder cannot hold; merge(config,"
            " params, overlay) first, which dequantises, or load the model without quantization"
        )
    difference = describe_difference(flatten(abstract_params(config)), flatten(params))
    if difference:
        raise QtjaxError(f"cannot save to {folder}: the parameters do not fit the config: {difference}")
    source = resolve_folder(tokenizer_from) if tokenizer_from is not None else None
    leaves = flatten(params)
    tensors, homes = [], places(params)
    for name, home in homes.items():
        leaf = leaves[home.path]
        tensors.append(hf.Outgoing(name, stored_shape(leaf.shape, home), _stored_dtype(name, leaf)))
    files = hf.plan_files(tensors, max_shard_bytes)
    if jax.process_index() == 0:
        try:
            _write_folder(folder, config, files, leaves, homes, source)
        except OSError as error:
            raise QtjaxError(
                f"cannot save to {folder}: {error.strerror or error}; what was there before is unchanged:"
                " free some space or choose another folder, and save again"
            ) from error
    else:
        for shard in files.values():
            for _ in _values(shard, leaves, homes):
                pass
    wait_for_all(f"save_pretrained {folder.name}")
    return folder


def _stored_dtype(name: str, leaf: jax.Array | np.ndarray) -> str:
    if leaf.dtype.name not in ("float32", "float16", "bfloat16"):
        raise QtjaxError(f"cannot save {name!r} of dtype {leaf.dtype.name}: must be float32, bfloat16 or float16")
    return leaf.dtype.name


def _values(shard: list[hf.Outgoing], leaves: dict[str, jax.Array], homes: dict[str, Place]) -> Iterator[np.ndarray]:
    for tensor in shard:
        home = homes[tensor.name]
        leaf = leaves[home.path]
        if home.layer is not None:
            leaf = leaf[home.layer]
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        yield array.T if home.transpose else array


def _write_folder(
    folder: Path,
    config: ModelConfig,
    files: dict[str, list[hf.Outgoing]],
    leaves: dict[str, jax.Array],
    homes: dict[str, Place],
    source: Path | None,
) -> None:
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _staging(folder) as staging:
            for name, shard in files.items():
                with open(staging / name, "wb") as out:
                    for piece in hf.encode_safetensors(shard, _values(shard, leaves, homes)):
                        out.write(piece)
                    out.flush()
                    os.fsync(out.fileno())
            if len(files) > 1:
                (staging / hf.INDEX).write_text(hf.index_json(files), encoding="utf-8")
            dtype = leaves["embed_tokens/embedding"].dtype.name
            (staging / "config.json").write_text(_json(config.replace(param_dtype=dtype).to_hf()), encoding="utf-8")
            if source is not None:
                _copy_tokenizer(source, staging)
            if not (staging / "generation_config.json").exists():
                (staging / "generation_config.json").write_text(_json(_generation(config)), encoding="utf-8")
            _publish(staging, folder)
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside the destination, so that renames out of it never cross a file system.

    What a killed save left in the destination is removed: a save holds a lock on its folder, which the system lets go of
    however the process ends, so that of two saves neither touches the other's.
    """
    for left in folder.glob(".saving-*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        with contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError):  # a file system without locks: its leftovers are nobody's to remove
                lock.enter_context(_locked(staging))
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; raises OSError where another save has it."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _publish(staging: Path, folder: Path) -> None:
    """Renames the complete files into place, then removes weights of an earlier save that are no longer named."""
    new = sorted(p.relative_to(staging) for p in staging.rglob("*") if p.is_file())
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    for old in (*folder.glob("model*.safetensors"), folder / hf.INDEX):
        if old.relative_to(folder) not in new:
            old.unlink(missing_ok=True)


def _copy_tokenizer(source: Path, staging: Path) -> None:
    copied = [p for pattern in TOKENIZER_FILES for p in source.glob(pattern)]
    if not copied:
        raise QtjaxError(f"tokenizer_from {source}: no tokenizer files in it (tokenizer.json, tokenizer.model, ...)")
    for file in (*copied, source / "generation_config.json"):
        if file.is_file():
            target = staging / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _generation(config: ModelConfig) -> dict[str, object]:
    eos = config.eos_token_id
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True} | {name: value for name, value in tokens.items() if value is not None}


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, indent=2) + "\n"
