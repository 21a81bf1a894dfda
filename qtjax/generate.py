"""python -m qtjax.generate --model FOLDER --prompt "...": answers of a model, through its chat template if it has one."""

import dataclasses
import sys
from collections.abc import Sequence

from qtjax.config import Config, validate
from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags


def main(argv: Sequence[str] | None = None) -> None:
    own = parse_flags(
        "python -m qtjax.generate",
        "Prints what a model answers. Several prompts (flags, or lines on standard input) are answered in one batch.",
        argv,
        {
            "model": ("smol", "run folder, HF folder, hub name or 'smol'"),
            "adapter": ("", "PEFT adapter folder put over the model"),
            "prompt": ([], "what to answer; none: lines of standard input"),
            "system": ("", "system message, where the chat template takes one"),
            "chat-template": ("auto", "'auto': the tokenizer's own if it has one; 'none'; or a Jinja file"),
            "max-new-tokens": (128, "tokens an answer may have"),
            "temperature": (0.0, "0 is greedy; higher is more random"),
            "top-p": (1.0, "draw from the most probable tokens with this mass, fraction (0-1]"),
            "seed": (0, "of the draws"),
            "task-id": (0, "the prompts' task, for an adapter that tells tasks apart (poly, mpt)"),
            "batch-size": (32, "prompts at a time"),
            "dtype": ("float32", "compute dtype: float32, bfloat16 or float16"),
        },
    )
    rules = (
        ("max-new-tokens", own["max-new-tokens"] > 0, "must be above 0"),
        ("batch-size", own["batch-size"] > 0, "must be above 0"),
        ("temperature", own["temperature"] >= 0, "must be 0 (greedy) or more"),
        ("top-p", 0 < own["top-p"] <= 1, "is a fraction above 0 and at most 1"),
        ("seed", own["seed"] >= 0, "must be 0 or more"),
        ("task-id", own["task-id"] >= 0, "must be 0 or more"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise QtjaxError(f"--{name} {own[name]}: {rule}")
    prompts = own["prompt"] or _lines()
    base = Config()
    config = validate(dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path=own["model"], dtype=own["dtype"], param_dtype=own["dtype"]),
        data=dataclasses.replace(base.data, chat_template=own["chat-template"], system_prompt=own["system"]),
    ))  # fmt: skip

    import numpy as np

    from qtjax import evals
    from qtjax.data.examples import Example
    from qtjax.data.templates import resolve_template
    from qtjax.data.progress import LateProgress
    from qtjax.data.tokenize import prompt_and_answer
    from qtjax.data.tokenizer import check_vocabulary
    from qtjax.training.open_model import open_model

    model = open_model(config.model, adapter=own["adapter"])
    if own["task-id"] and (model.overlay is None or not model.overlay.tasks):
        raise QtjaxError(f"--task-id {own['task-id']}: the model has no adapter that tells tasks apart; leave it out")
    template = resolve_template(model.tokenizer, config.data.chat_template)
    ids = [
        prompt_and_answer(
            model.tokenizer, Example(prompt=prompt, completion="-"), template, f"prompt {i}", system_prompt=own["system"]
        )[0]
        for i, prompt in enumerate(prompts)
    ]
    check_vocabulary(model.tokenizer, model.config.vocab_size, np.concatenate(ids))
    with LateProgress("answering", len(ids)) as bar:
        new = evals.answer(
            model.config, model.params, [i.tolist() for i in ids], max_new_tokens=own["max-new-tokens"],
            batch_size=own["batch-size"], stop_ids=evals.stop_ids_of_chat(config, model.config, model.tokenizer),
            temperature=own["temperature"], top_p=own["top-p"], seed=own["seed"], overlay=model.overlay,
            task_ids=[own["task-id"]] * len(ids),
            progress=bar.advance,
        )  # fmt: skip
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    if len(prompts) == 1:
        print(texts[0])
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"> {prompt}\n{text}\n")


def _lines() -> list[str]:
    prompts = [] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise QtjaxError('no prompt: give --prompt "..." (several are allowed), or lines on standard input')
    return prompts


if __name__ == "__main__":
    door(main)
