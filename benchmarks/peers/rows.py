"""Which rows there are, and the bars that compare them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qtjax.errors import QtjaxError, near_names
from qtjax.pages import HUGE, KEPT

FULL, LORA, SCORE = "full fine-tuning", "LoRA", "scoring"
RANK, ALPHA = 8, 16
# glibc gives large arrays back to the system and clears them again at every step unless it is told to keep them; PyTorch's
# tuning guide answers the same with jemalloc.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}
# What `python -m qtjax.score` and `train` give themselves (qtjax/pages.py); tuned torch has what `train` has.
HUGE_PAGES = {"GLIBC_TUNABLES": HUGE}
TRAINING = {"GLIBC_TUNABLES": f"{HUGE}:{KEPT}"}
TUNED = {"logits": "answers", "micro": 4, "fused": True}
COMPILED = TUNED | {"compile": True}
EAGER = TUNED | {"attention": "eager"}
GROUPED = TUNED | {"grouped": True}


class Row(NamedTuple):
    """One way of doing the work. kind: FULL, LORA or SCORE. env: qtjax (this interpreter), torch, tunix. script: below scripts/.

    own_batches: its steps hold other samples than the file's order, so that only the first step's loss can be compared.
    usual: measured unless --rows says otherwise. variables: of its environment.
    """

    name: str
    says: str
    kind: str
    env: str
    script: str
    options: Mapping[str, Any] = {}
    own_batches: bool = False
    usual: bool = True
    variables: Mapping[str, str] = {}


ROWS = {row.name: row for row in (
    Row("qtjax", "qtjax, full data", FULL, "qtjax", "qtjax_train.py", variables=TRAINING),
    Row("torch", "torch loop", FULL, "torch", "torch_loop.py"),
    Row("torch-answers", "torch, logits of answers", FULL, "torch", "torch_loop.py", {"logits": "answers"}),
    Row("torch-tuned", "torch, tuned: micro-batches", FULL, "torch", "torch_loop.py", TUNED, variables=KEEP_MEMORY | TRAINING),
    Row("torch-grouped", "torch, tuned: + by length", FULL, "torch", "torch_loop.py", GROUPED, True, variables=KEEP_MEMORY | TRAINING),
    Row("torch-eager", "torch, tuned: eager attention", FULL, "torch", "torch_loop.py", EAGER, usual=False, variables=KEEP_MEMORY | TRAINING),
    Row("torch-compile", "torch, tuned: compiled", FULL, "torch", "torch_loop.py", COMPILED, usual=False, variables=KEEP_MEMORY | TRAINING),
    Row("trl", "TRL, defaults", FULL, "torch", "trl_sft.py"),
    Row("trl-no-checkpoint", "TRL, no checkpointing", FULL, "torch", "trl_sft.py", {"checkpoint": False}),
    Row("trl-packing", "TRL, packing", FULL, "torch", "trl_sft.py", {"packing": True}, True),
    Row("trl-compile", "TRL, compiled", FULL, "torch", "trl_sft.py", {"compile": True}, usual=False),
    Row("tunix", "Tunix", FULL, "tunix", "tunix_loop.py"),
    Row("qtjax-lora", "qtjax, LoRA", LORA, "qtjax", "qtjax_train.py", variables=TRAINING),
    Row("peft", "peft, torch loop", LORA, "torch", "torch_loop.py"),
    Row("peft-tuned", "peft, torch loop tuned", LORA, "torch", "torch_loop.py", TUNED, variables=KEEP_MEMORY | TRAINING),
    Row("qtjax-score", "qtjax, scoring", SCORE, "qtjax", "qtjax_score.py", variables=HUGE_PAGES),
    Row("torch-score", "torch, all logits", SCORE, "torch", "torch_score.py"),
    Row("torch-score-tuned", "torch, tuned: micro-batches", SCORE, "torch", "torch_score.py", TUNED, variables=KEEP_MEMORY | TRAINING),
)}  # fmt: skip
OWN = {FULL: "qtjax", LORA: "qtjax-lora", SCORE: "qtjax-score"}
BEST_TORCH = ("torch", "torch-answers", "torch-tuned", "torch-grouped", "torch-eager", "torch-compile")
BEST_PEFT = ("peft", "peft-tuned")


class Bar(NamedTuple):
    """`own` against the best of `others`. least: how many times cheaper `own` must be in CPU seconds; None: said, not asked.

    measure: "speed" (CPU seconds, wall clock beside it), "memory" or "first" (seconds to the first step).
    """

    says: str
    own: str
    others: tuple[str, ...]
    least: float | None
    measure: str = "speed"


def bars_of(model: str) -> list[Bar]:
    """The bars of a model of --models; those that it has none for are said without one."""
    small, stories = model == "15m", model.rstrip("/").endswith("stories260K")
    ask = lambda least: least if small else None  # noqa: E731
    return [
        Bar("full fine-tuning / best torch", "qtjax", BEST_TORCH, 1.25 if small else 1.2 if stories else None),
        Bar("full fine-tuning / TRL's defaults", "qtjax", ("trl",), ask(3.0)),
        Bar("first step, warm cache / TRL's", "qtjax", ("trl",), 1.0, "first"),
        Bar("LoRA / peft, torch loop", "qtjax-lora", ("peft",), ask(1.6)),
        Bar("LoRA / best peft", "qtjax-lora", BEST_PEFT, None),
        Bar("scoring / torch with all logits", "qtjax-score", ("torch-score",), ask(2.2)),
        Bar("scoring / the same, peak memory", "qtjax-score", ("torch-score",), ask(3.0), "memory"),
        Bar("scoring / torch tuned", "qtjax-score", ("torch-score-tuned",), None),
    ]


def chosen(text: str) -> list[Row]:
    """The rows that --rows names: "" the usual ones, "all", or names. Raises QtjaxError for a name that there is not."""
    if text in ("", "all"):
        return [row for row in ROWS.values() if row.usual or text]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ROWS:
            raise QtjaxError(f"--rows: {name!r} is no row{near_names(name, ROWS)}; there are {', '.join(ROWS)}")
    return [row for row in ROWS.values() if row.name in names]
