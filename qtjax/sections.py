"""The fields of an experiment: frozen dataclasses, one field one knob, each with its unit and rule. Defaults live here only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
# Also the keys of pruning.SAMPLE_PRUNERS and TOKEN_PRUNERS, and scoring.LOSSES, which lie above this room.
SAMPLE_PRUNERS = (
    "none", "random", "longest", "shortest", "entropy", "perplexity-low", "perplexity-middle", "perplexity-high", "infobatch",
    "infobatch-budget", "q-tuning",
)  # fmt: skip
TOKEN_PRUNERS = ("none", "random", "perplexity", "fastv", "sparsevlm", "rho-1", "token-cleaning", "q-tuning")
LOSSES = ("plain", "dft", "eaft")


def knob(default: Any, doc: str, *, rule: str = "", choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its help text, and a rule checked at the door: ">0", ">=0", "(0,1]", "[0,1]"."""
    return field(default=default, metadata={"doc": doc, "rule": rule, "choices": tuple(choices)})


@dataclass(frozen=True)
class ModelSection:
    path: str = knob("smol", "HF folder (safetensors or Flax msgpack), hub name, or 'smol' (the embedded model)")
    random_init: bool = knob(False, "start from random weights of the folder's config.json (pretraining)")
    dtype: str = knob("float32", "compute dtype of matrix products and activations", choices=DTYPES)
    param_dtype: str = knob("float32", "dtype in which parameters are stored and updated", choices=DTYPES)
    remat: str = knob("none", "what the backward pass recomputes per layer; offload: all, inputs wait on the host", choices=("none", "dots", "full", "offload"))
    unroll_layers: bool = knob(False, "unroll the loop over layers, as small models always do: faster steps, slower compilation")
    quantization: str = knob(
        "none", "the layers' kernels packed while loading, a frozen base for overlays (QLoRA)", choices=("none", "nf4", "int8", "int4")
    )

    @property
    def quantized(self) -> str | None:
        """What the layers' kernels are quantized to, if they are."""
        return None if self.quantization == "none" else self.quantization


@dataclass(frozen=True)
class DataSection:
    path: str = knob("smol-instruct", "file, saved datasets folder, hub name, or 'smol-instruct' (the embedded generator)")
    split: str = knob("train", "split of a hub name or of a saved DatasetDict")
    eval_path: str = knob("", "held-out data; empty: eval_fraction of `path` is held out")
    eval_split: str = knob("test", "split of eval_path when it is a hub name or a saved DatasetDict")
    eval_fraction: float = knob(0.05, "fraction (0-1) of `path` held out when eval_path is empty", rule="[0,1)")
    format: str = knob(
        "auto",
        "shape of a row",
        choices=("auto", "prompt_completion", "instruction", "messages", "sharegpt", "text"),
    )
    prompt_column: str = knob("", "column that holds the prompt; empty: by format")
    completion_column: str = knob("", "column that holds the answer (or the text); empty: by format")
    chat_template: str = knob("auto", "'auto': the tokenizer's own if it has one; 'none'; or a .jinja file")
    system_prompt: str = knob("", "system message put before conversations that have none; empty: none")
    task_column: str = knob("", "column that says a row's task, for overlays that tell tasks apart (poly, mpt); empty: one task")
    task_names: str = knob("", "the tasks' names in the order of their ids, comma-separated; empty: the column holds ids 0, 1, ...")
    max_length: int = knob(512, "tokens a sample may have; longer answers are cut and counted", rule=">1")
    part: str = knob("", "'2/3': train on the second of three interleaved parts of the rows; empty: on all")
    max_samples: int = knob(0, "use only the first so many rows; 0: all", rule=">=0")


@dataclass(frozen=True)
class PruneSection:
    sample_pruner: str = knob("q-tuning", "which samples of a batch to keep", choices=SAMPLE_PRUNERS)
    token_pruner: str = knob("q-tuning", "which tokens of the samples in token_scope to keep", choices=TOKEN_PRUNERS)
    token_scope: str = knob(
        "auto", "whose tokens are pruned: of Q2, of both kept corners, of every kept sample; auto: Q2 where samples have quadrants, else kept",
        choices=("auto", "q2", "q2+q4", "kept"),
    )  # fmt: skip
    sample_keep: float = knob(0.25, "fraction (0-1] of each scoring batch's samples to keep", rule="(0,1]")
    token_keep: float = knob(0.5, "fraction (0-1] of a Q2 sample's trained tokens to keep", rule="(0,1]")
    batch_size: int = knob(128, "samples per scoring batch, all devices together; one optimizer step each", rule=">0")
    policy: str = knob("paper", "quadrants kept: paper Q2+Q4, article Q2+Q3", choices=("paper", "article"))
    supplement: str = knob("minmax", "how samples are ranked when corners are short", choices=("minmax", "ranks", "random"))
    corners: str = knob(
        "extreme", "of the kept quadrants' samples, those farthest from the medians first (the paper's), or any of them", choices=("extreme", "random")
    )
    warmup_fraction: float = knob(0.0, "fraction (0-1) of the steps that train on full data before pruning begins", rule="[0,1)")
    mode: str = knob("mask", "pruned tokens leave the loss (mask) or the input too (drop)", choices=("mask", "drop"))
    compact_positions: bool = knob(False, "drop mode only: renumber the kept tokens' positions without gaps")
    neighbor_weight: float = knob(0.5, "lambda of eq. 7, fraction (0-1)", rule="[0,1]")
    neighbors: str = knob("sum", "eq. 7's neighbour term, or the figure caption's average", choices=("sum", "mean"))
    protect_eos: bool = knob(False, "never prune the token that closes an answer")
    reference_model: str = knob("", "HF folder or hub name of the model that rho-1 and token-cleaning compare with")
    infobatch_fraction: float = knob(0.5, "infobatch: fraction (0-1) of the samples below the mean loss that an epoch drops", rule="[0,1)")
    infobatch_anneal: float = knob(0.125, "infobatch: last fraction (0-1) of the epochs that train on all samples", rule="[0,1]")
    score_every: int = knob(1, "epochs from one scoring pass over a sample to the next; its last scores serve in between", rule=">0")
    score_dtype: str = knob("", "compute dtype of the scoring pass; empty: model.dtype; int8: of the layers' products", choices=("", *DTYPES, "int8"))
    score_model: str = knob("", "HF folder or hub name of a model that scores the data once, before training; empty: the model in training")
    reuse_forward: bool = knob(False, "keep the scoring pass's layers: training runs them once where remat full does twice; masked, data x fsdp of 1")
    score_lag: int = knob(0, "optimizer steps by which the scoring weights are old: 0 exact, 1 lets scoring overlap training", rule="0 or 1")


@dataclass(frozen=True)
class OverlaySection:
    method: str = knob("none", "'none': full-parameter training; or an overlay: lora, dora, ia3, prefix, ...; 'lora+ln_tuning' stacks")
    path: str = knob("", "adapter folder (PEFT's or qtjax's) to go on from, with its own settings; empty: a fresh one")
    r: int = knob(-1, "rank; -1: the method's own default (lora 8)", rule="-1 or >0")
    lora_alpha: float = knob(-1.0, "scale is lora_alpha / r; -1: the method's own default (lora 16)", rule="-1 or >0")
    lora_dropout: float = knob(0.0, "dropout fraction [0-1) on the side path's input", rule="[0,1)")
    target_modules: str = knob("", "'all-linear', comma-separated module names, or one regex; empty: the method's own default")
    fields: str = knob("", "the method's other settings by PEFT's names: 'init_r=12 target_r=8 coft=true', values in JSON")


@dataclass(frozen=True)
class TrainSection:
    epochs: float = knob(3.0, "passes over the data", rule=">0")
    max_steps: int = knob(0, "stop after so many optimizer steps; 0: by epochs", rule=">=0")
    loss: str = knob("plain", "nll of the kept tokens, or nll re-weighted token by token: dft by probability, eaft by entropy", choices=LOSSES)
    learning_rate: float = knob(1e-4, "peak learning rate", rule=">0")
    warmup_fraction: float = knob(0.03, "fraction (0-1) of the steps spent warming up linearly", rule="[0,1)")
    final_lr_fraction: float = knob(0.0, "cosine ends at this fraction (0-1) of the peak", rule="[0,1]")
    weight_decay: float = knob(0.0, "AdamW decoupled weight decay, matrices only", rule=">=0")
    b1: float = knob(0.9, "AdamW first moment decay", rule="[0,1)")
    b2: float = knob(0.999, "AdamW second moment decay", rule="[0,1)")
    eps: float = knob(1e-8, "AdamW epsilon", rule=">0")
    clip_norm: float = knob(1.0, "global gradient norm limit; 0: off", rule=">=0")
    row_length: int = knob(0, "tokens per packed row; 0: data.max_length", rule=">=0")
    rows: int = knob(8, "packed rows per microbatch, all devices together", rule=">0")
    shapes: int = knob(4, "microbatch shapes compiled at most: rows, rows/2, ... (1-4); fewer compile faster, more waste less", rule="1..4")
    seed: int = knob(0, "seed of shuffling, initialisation and dropout", rule=">=0")
    checkpoint_every: int = knob(100, "optimizer steps between checkpoints", rule=">0")
    keep_checkpoints: int = knob(2, "newest checkpoints kept on disk", rule=">0")
    compare_full_data: int = knob(0, "optimizer steps of full-data training timed at the end for the speed-up; 0: none", rule=">=0")


@dataclass(frozen=True)
class MeshSection:
    data: int = knob(-1, "devices along the data axis (replicated parameters); -1: all that remain", rule="-1 or >0")
    fsdp: int = knob(1, "devices along the fsdp axis (sharded parameters and data)", rule=">0")
    tensor: int = knob(1, "devices along the tensor axis (sharded heads, MLP and vocabulary)", rule=">0")


@dataclass(frozen=True)
class EvalSection:
    max_samples: int = knob(0, "held-out samples used; 0: all", rule=">=0")
    generate_samples: int = knob(0, "held-out samples answered for exact match; 0: none", rule=">=0")
    max_new_tokens: int = knob(128, "tokens generated per answer at most", rule=">0")
    batch_size: int = knob(32, "prompts generated at a time", rule=">0")


@dataclass(frozen=True)
class RunSection:
    folder: str = knob("runs/default", "where the run writes everything; started again it resumes")
    tensorboard: bool = knob(True, "write TensorBoard event files")
    export: bool = knob(True, "write the trained model (or adapter) as an HF folder at the end")
    compile_cache: str = knob("", "folder of the persistent compilation cache; empty: <run folder>/compile_cache")
