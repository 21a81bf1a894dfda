"""What all rows are given: the model folder, and samples tokenized once by qtjax, in the order in which a run reads them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from qtjax import models
from qtjax.atomic import write_json
from qtjax.checkpoints import read_config, resolve_folder, save_pretrained
from qtjax.config import Config, override, validate
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.data.prepare import training_data
from qtjax.data.tokenizer import check_vocabulary, load_tokenizer
from qtjax.errors import QtjaxError

SMALL = "15m"


class Work(NamedTuple):
    """One model with its samples. data: samples.npz; config: qtjax's, of full fine-tuning; useful, targets: tokens in all steps."""

    name: str
    model: str
    data: str
    config: Config
    useful: int
    targets: int


def small_shape() -> models.ModelConfig:
    """15,155,424 parameters, of which 9,216,000 are the (tied) embedding."""
    return models.ModelConfig(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
        head_dim=48, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip


def write_small(folder: Path, tokenizer: str) -> Path:
    """The 15M LLaMA with random weights as an HF folder. Args: tokenizer: a sentencepiece model of 32,000 tokens, or a folder of one.

    Raises QtjaxError where it is missing or has more tokens than the model.
    """
    source = Path(tokenizer)
    if not source.exists():
        raise QtjaxError(f"--tokenizer {tokenizer!r}: no such file; the model {SMALL} needs a sentencepiece model of 32,000 tokens")
    if source.is_file():
        given, source = source, folder / "tokenizer"
        source.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given, source / "tokenizer.model")
        write_json(source / "tokenizer_config.json", {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        })  # fmt: skip
    loaded, shape, fast = load_tokenizer(str(source)), small_shape(), folder / "fast"
    check_vocabulary(loaded, shape.vocab_size)
    loaded.save_pretrained(fast)  # as tokenizer.json: a peer's environment need not hold sentencepiece
    save_pretrained(folder / "model", shape, models.init_params(shape, jax.random.key(0)), tokenizer_from=str(fast))
    return folder / "model"


def work(name: str, given: dict, out: Path) -> Work:
    """A model of --models made ready: its folder, its samples.npz and the config of qtjax's own run.

    Raises QtjaxError for data or a model that cannot be read, and for too few rows.
    """
    folder = out / Path(name).name
    folder.mkdir(parents=True, exist_ok=True)
    model = str(write_small(folder, given["tokenizer"])) if name == SMALL else name
    config = training_config(model, given, folder)
    tokenizer = load_tokenizer(model)
    shape = read_config(resolve_folder(model))
    if config.data.max_length > shape.max_position_embeddings:
        raise QtjaxError(f"--max-length {config.data.max_length}: {name} has {shape.max_position_embeddings} positions; lower it to that")
    dataset = training_data(config.data, tokenizer, progress=False)
    check_vocabulary(tokenizer, shape.vocab_size, dataset.input_ids)
    needed = given["batch"] * given["steps"]
    if len(dataset) < needed:
        need = f"{given['steps']} steps of {given['batch']} need {needed}"
        raise QtjaxError(f"--data {given['data']}: {len(dataset)} samples of at most {given['max-length']} tokens, {need}; lower --steps or --batch")
    order = write_samples(folder / "samples.npz", dataset, config, given["steps"])
    useful, targets = (int(of[order].sum()) for of in (dataset.lengths, dataset.trained))
    return Work(name, model, str(folder / "samples.npz"), config, useful, targets)


def training_config(model: str, given: dict, folder: Path) -> Config:
    """qtjax on full data as a user would run it, with the optimizer that every row has: AdamW at a constant rate."""
    changes = {
        "model.path": model, "data.path": given["data"], "data.prompt_column": given["prompt-column"],
        "data.completion_column": given["completion-column"], "data.chat_template": "none", "data.eval_fraction": 0.0,
        "data.max_length": given["max-length"], "data.max_samples": rows_needed(given), "prune.sample_pruner": "none",
        "prune.token_pruner": "none", "prune.batch_size": given["batch"], "train.epochs": 1.0, "train.max_steps": given["steps"],
        "train.learning_rate": given["learning-rate"], "train.warmup_fraction": 0.0, "train.final_lr_fraction": 1.0,
        "train.checkpoint_every": 10**6, "run.folder": str(folder / "run"), "run.tensorboard": False, "run.export": False,
        "run.compile_cache": str(folder / "compile_cache"),
    }  # fmt: skip
    return validate(override(Config(), changes | given["set"]))


def rows_needed(given: dict) -> int:
    """Rows read: all samples of all steps, and a tenth more for rows that are skipped."""
    return -(-given["batch"] * given["steps"] * 11 // 10)


def lora_config(config: Config, adapter: str) -> Config:
    """The same with LoRA in place of full fine-tuning, going on from the adapter that peft wrote."""
    return validate(override(config, {"overlay.method": "lora", "overlay.path": adapter}))


def write_samples(file: Path, dataset: TokenizedDataset, config: Config, steps: int) -> np.ndarray:
    """samples.npz as scripts/measuring.py reads it; returns the order int [steps, batch]."""
    plan = BatchPlan(len(dataset), config.prune.batch_size, config.train.seed)
    order = np.stack([plan.global_batch(step) for step in range(steps)])
    targets = dataset.loss_mask.copy()
    targets[dataset.offsets[:-1]] = False  # nothing stands before a sample's first token
    np.savez(file, ids=dataset.input_ids, targets=targets, offsets=dataset.offsets, order=order)
    return order
