"""How many to keep: the one rounding rule of both stages (eq. 1 of arXiv 2509.23873 and the token count of eq. 7)."""

import numpy as np

from qtjax.errors import QtjaxError


def budget_table(keep: float, largest: int) -> np.ndarray:
    """int32 [largest + 1]: at index N, max(1, floor(keep * N + 1e-6)), and 0 at N = 0.

    A table in float64 made on the host, because N is known only on the device, where float32 would miscount: the 1e-6
    (so that 0.7 * 90 is 63) is below float32's resolution from 16 upwards.

    Args: keep: fraction (0, 1] of N; largest: the largest N that can occur.
    Raises: QtjaxError if keep is not a number above 0 and at most 1.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float, np.integer, np.floating)) or not 0 < keep <= 1:
        raise QtjaxError(f"keep = {keep!r}: is a fraction above 0 and at most 1; 1 keeps everything")
    counts = np.arange(largest + 1)
    return np.where(counts > 0, np.maximum(1, np.floor(float(keep) * counts + 1e-6)), 0).astype(np.int32)
