"""The few microbatch shapes that are ever compiled, and how a number of rows is cut into them."""

from qtjax.parallel import round_up


def ladder(rows: int, ways: int, shapes: int) -> tuple[int, ...]:
    """Row counts, largest first: rows, rows/2, ... at most `shapes` of them, each a multiple of `ways` devices."""
    steps = [round_up(max(rows // 2**i, 1), ways) for i in range(shapes)]
    return tuple(sorted(set(steps), reverse=True))


def cut(count: int, shapes: tuple[int, ...]) -> list[int]:
    """Shapes to launch, in order, that hold `count` rows: the largest that are filled, then the smallest; [] for no rows.

    cut(7, (4, 2, 1)) == [4, 2, 1]; cut(5, (4,)) == [4, 4].
    """
    out: list[int] = []
    for shape in shapes:
        while count >= shape:
            out.append(shape)
            count -= shape
    if count > 0:
        out.append(shapes[-1])
    return out
