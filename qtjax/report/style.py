"""How pictures look: colours that colour-blind readers can tell apart (Okabe and Ito), and one way to write a PNG."""

import io
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtjax.atomic import disk_errors, write_atomic

# Okabe & Ito, "Color Universal Design" (2008); each kept kind also has a marker of its own.
BLUE, VERMILION, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#9A9A9A", "#D0D0D0"

KIND_COLORS = {"q2": VERMILION, "q4": BLUE, "q3": PURPLE, "supplement": GREEN, "kept": SKY}
QUADRANT_COLORS = {1: "#4D4D4D", 2: VERMILION, 3: PURPLE, 4: BLUE}


def title_size(text: str, fitting: int) -> float:
    """Font size in points: 15, or what lets a title of more than `fitting` characters fit the width."""
    return min(15.0, 15.0 * fitting / max(len(text), 1))


def tidy(axes: Axes) -> None:
    """No box, a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(True, color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)


def save(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes the PNG whole or not at all; makes the folder. Raises QtjaxError if the disk refuses."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, facecolor="white")
    write_atomic(path, image.getvalue())
    return path
