"""Mesh, shardings and multi-host start-up."""

from qtjax.parallel.hosts import agree_max, agree_sums, all_rows, check_shared, first_alone, local_rows, wait_for_all
from qtjax.parallel.mesh import (
    AXES,
    BATCH_AXES,
    batch_sharding,
    batch_size,
    everywhere,
    make_mesh,
    of_one_process,
    replicated,
    round_up,
    rows_on_device,
    tree_shardings,
)
from qtjax.parallel.sharding import param_shardings
from qtjax.parallel.start import join_processes, leaving_together

__all__ = [
    "AXES",
    "BATCH_AXES",
    "agree_max",
    "agree_sums",
    "all_rows",
    "batch_sharding",
    "batch_size",
    "check_shared",
    "everywhere",
    "first_alone",
    "join_processes",
    "leaving_together",
    "local_rows",
    "make_mesh",
    "of_one_process",
    "param_shardings",
    "replicated",
    "round_up",
    "rows_on_device",
    "tree_shardings",
    "wait_for_all",
]
