"""Which task a row belongs to, for overlays that tell tasks apart (poly, mpt)."""

from collections.abc import Mapping
from typing import Any

from qtjax.config import DataSection
from qtjax.errors import QtjaxError, near_names


def task_of(row: Mapping[str, Any], data: DataSection, where: str) -> int:
    """The row's task id: 0 without data.task_column, else its place in data.task_names, or the column's own integer.

    Raises QtjaxError for a row without the column, a name that is not listed, and a value that is no integer.
    """
    if not data.task_column:
        return 0
    value = row.get(data.task_column)
    if value is None:
        raise QtjaxError(f"{where}: has no {data.task_column!r} (data.task_column){near_names(data.task_column, row)}")
    names = [name.strip() for name in data.task_names.split(",") if name.strip()]
    if names:
        if str(value) not in names:
            raise QtjaxError(
                f"{where}: {data.task_column} = {value!r} is none of data.task_names = {data.task_names}{near_names(str(value), names)}"
            )
        return names.index(str(value))
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise QtjaxError(
            f"{where}: {data.task_column} = {value!r}: without data.task_names it must be a task id, 0, 1, ...; list the names there"
        )
    return value
