"""Flax msgpack checkpoints (flax_model.msgpack), as transformers 4 wrote them: one file, or shards with an index."""

from functools import partial
from pathlib import Path

import numpy as np
from flax.serialization import msgpack_restore

from qtjax.checkpoints.assemble import Index, StoredTensor
from qtjax.checkpoints.hf import read_index
from qtjax.checkpoints.names import from_flax_name
from qtjax.errors import QtjaxError
from qtjax.tree import flatten

WEIGHTS = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"


def open_msgpack(folder: Path) -> dict[str, StoredTensor]:
    """{Hugging Face name: tensor}; a name that the table does not know keeps its Flax spelling.

    msgpack cannot be read in parts: the files' tensors are in host memory, in their stored dtype, until assembled.
    Raises QtjaxError for a truncated or corrupt file, a missing shard, and a leaf that is not an array.
    """
    if (folder / WEIGHTS).is_file():
        files, weight_map = [WEIGHTS], {}
    else:
        weight_map = read_index(folder / INDEX)
        files = sorted(set(weight_map.values()))
    arrays: dict[str, np.ndarray] = {}
    for name in files:
        arrays |= _restore(folder / name)
    lost = sorted(set(weight_map) - set(arrays))
    if lost:
        raise QtjaxError(f"{folder / INDEX}: {len(lost)} tensors are not in the files it names, first {lost[0]!r}")
    return {
        from_flax_name(name) or name: StoredTensor(array.shape, partial(_part, array), transposed=False)
        for name, array in arrays.items()
    }


def _restore(path: Path) -> dict[str, np.ndarray]:
    try:
        tree = msgpack_restore(path.read_bytes())
        flat = flatten(tree)
    except Exception as error:  # msgpack, flax and numpy each raise their own kinds for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QtjaxError(
            f"{path}: not a readable Flax msgpack file ({reason[:120]}); it is truncated or corrupt, copy or download it again"
        ) from None
    for name, leaf in flat.items():
        if not isinstance(leaf, np.ndarray):
            raise QtjaxError(f"{path}: {name!r} is a {type(leaf).__name__}, not an array; is this a model's weights file?")
    # FlaxPreTrainedModel writes the bare tree; a hand-made file often keeps the "params" collection around it.
    return {name.removeprefix("params/"): leaf for name, leaf in flat.items()}


def _part(array: np.ndarray, index: Index) -> np.ndarray:
    return array[index]
