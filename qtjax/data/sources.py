"""Where rows come from: files, folders written by `datasets`, names on the Hugging Face hub, the embedded generator.

Nothing here runs code from the data: no dataset scripts, no pickle.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtjax.data.delimited import read_delimited
from qtjax.data.rows import Rows, from_arrow, from_json_lines, from_objects, from_parquet
from qtjax.data.stored import Stored, open_stored
from qtjax.errors import QtjaxError, near_names
from qtjax.hub import give_up_early

EMBEDDED = "smol-instruct"
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def load_rows(path: str, split: str = "train", columns: Sequence[str] = (), *, scratch: Path | None = None) -> Rows:
    """The rows of a source.

    Args:
      path: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt; each may end in .gz), a folder written by
        `datasets.save_to_disk` or one that holds data files, a hub name ("org/name", or "org/name:config"), or "smol-instruct".
      split: split of a saved DatasetDict, of a hub name, of a JSON object of lists, or of the embedded generator.
      columns: columns that the config names. A CSV or TSV whose columns are asked for as c0, c1, ... is read as a
        file without a header line.
      scratch: folder for what a .gz holds, unpacked, in a file without a name; None: the system's for temporary files.
    Returns: Rows, which stay in their file and are read when asked for; those of a .json file alone, which is one value, are
      held in memory. A .txt file is one row with the column `text`.
    Raises QtjaxError, one line: missing or empty file, malformed content (file and line), unknown split, hub out of reach.
    """
    if path == EMBEDDED:
        # Imported here because the generator is a room of its own, which most data does not need.
        from qtjax.smol.instruct import load_rows as generate

        return from_objects(f"{path}[{split}]", generate(split))
    if not path:
        raise QtjaxError("data.path is empty; give a file, a folder, a hub name, or 'smol-instruct'")
    file = Path(path).expanduser()
    if file.is_dir():
        return _folder(path, file, split)
    if file.is_file():
        return _file(path, file, split, columns, scratch)
    if _looks_like_file(path, file):
        raise QtjaxError(f"{path}: no such file{_neighbours(file)}")
    return _hub(path, split)


def _looks_like_file(path: str, file: Path) -> bool:
    if not _HUB_NAME.fullmatch(path) or _suffix(file) in FORMATS:
        return True
    # "data/train" is a hub name by its shape, but a missing file where a folder "data" lies here.
    return "/" in path and file.parent.is_dir()


def _neighbours(file: Path) -> str:
    if not file.parent.is_dir():
        return f" (nor the folder {file.parent}); check the path"
    names = sorted(entry.name for entry in file.parent.iterdir())
    return near_names(file.name, names) or f"; {file.parent} holds {_some(names)}"


def _some(names: Sequence[Any], limit: int = 8) -> str:
    listed = ", ".join(str(n) for n in names[:limit])
    return (listed + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "nothing"


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _file(name: str, file: Path, split: str, columns: Sequence[str], scratch: Path | None) -> Rows:
    kind = _suffix(file)
    if kind not in FORMATS:
        raise QtjaxError(f"{name}: cannot tell the format from its name; known endings are {', '.join(FORMATS)}, each also with .gz")
    try:
        if not file.stat().st_size:
            raise QtjaxError(f"{name}: the file is empty; give a file with at least one row")
        data = open_stored(name, file, scratch)
    except OSError as error:
        raise QtjaxError(f"{name}: cannot be read ({error.strerror or error})") from None
    if not data.size:
        raise QtjaxError(f"{name}: the file is empty; give a file with at least one row")
    if kind in (".jsonl", ".ndjson"):
        return from_json_lines(name, data)
    if kind == ".json":
        return _json(name, data, split)
    if kind == ".parquet":
        return from_parquet(name, data)
    if kind != ".txt":
        return read_delimited(name, data, "\t" if kind == ".tsv" else ",", columns)
    text = _text(name, data)
    if not text.strip():
        raise QtjaxError(f"{name}: holds no rows; the file has only blank lines")
    return from_objects(name, [{"text": text}])


def _text(name: str, data: Stored) -> str:
    raw = data.read(0, data.size)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise QtjaxError(f"{name}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _json(name: str, data: Stored, split: str) -> Rows:
    text = _text(name, data)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Many files called .json are JSON lines; "Extra data" after a complete first line is how they show.
        if error.msg == "Extra data" and "\n" in text[: error.pos]:
            return from_json_lines(name, data)
        raise QtjaxError(f"{name}:{error.lineno}: malformed JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise QtjaxError(f"{name}: JSON nested too deeply to read") from None
    if isinstance(value, dict):
        lists = [key for key, rows in value.items() if isinstance(rows, list)]
        key = next((k for k in (split, "data", "train") if k in lists), None)
        if key is None:
            raise QtjaxError(
                f"{name}: must be a list of objects, or an object with such a list under"
                f" {split!r}, 'data' or 'train'; it has {_some(list(value))}"
            )
        name, value = f"{name}[{key}]", value[key]
    if not isinstance(value, list):
        raise QtjaxError(f"{name}: must be a list of objects, is {type(value).__name__}")
    return from_objects(name, value)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _folder(name: str, folder: Path, split: str) -> Rows:
    import datasets

    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if not saved:
        files = sorted(f for f in folder.rglob("*") if f.is_file() and _suffix(f) in FORMATS)
        if not files:
            raise QtjaxError(
                f"{name}: neither a folder written by datasets.save_to_disk nor one with data files; it holds"
                f" {_some(sorted(f.name for f in folder.iterdir()))}"
            )
        return _fetch(name, split, f"the files of {name} cannot be read together; give one file")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library's own errors for a damaged folder have no common class
        raise QtjaxError(f"{name}: the saved dataset is damaged ({_first_line(error)}); save it again") from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise QtjaxError(f"{name}: has no split {split!r}{near_names(split, dataset)}; it has {_some(list(dataset))}")
        name, dataset = f"{name}[{split}]", dataset[split]
    return from_arrow(name, dataset)


def _hub(path: str, split: str) -> Rows:
    give_up_early()
    return _fetch(
        path,
        split,
        "no such file or folder here, and no such dataset on the Hugging Face hub that can be reached or is cached; where there is"
        " no network, download it elsewhere with datasets' save_to_disk and give that folder",
    )


def _fetch(path: str, split: str, remedy: str) -> Rows:
    import datasets

    name, _, config = path.partition(":")
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client, the network and the builders each raise their own classes
        reason = _first_line(error)
        if isinstance(error, ValueError) and not isinstance(error, OSError) and "Couldn't find cache" not in reason:
            # What the library says of splits and configurations is the remedy already: it lists those that exist.
            listed = " ".join(line.strip() for line in str(error).splitlines())[:400]
            raise QtjaxError(f"{path} (split {split!r}): {listed}; a configuration is given as name:config") from None
        raise QtjaxError(f"{path}: {remedy} ({type(error).__name__}: {reason[:200]})") from None
    finally:
        datasets.enable_progress_bars()
    return from_arrow(f"{path}[{split}]", dataset)
