"""LoRA's settings by PEFT's names: read, checked, and written back; what is not supported is refused by name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtjax.errors import QtjaxError, near_names
from qtjax.overlays.targets import Linear, Names, as_names, normalize_targets

# Fields of LoraConfig (peft 0.21) whose only supported values are listed; they are checked, never ignored.
_INERT: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "ensure_weight_tying": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "loftq_config": (None, {}),
    "layers_pattern": (None, "", [], "layers", ["layers"]),
    "megatron_config": (None, {}),
}  # fmt: skip

# Fields that say who and how, or that matter only together with one of the above.
_DESCRIPTIVE = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode megatron_core"
    " qalora_group_size runtime_config".split()
)

# Initialisations that leave the base weights alone, so that an adapter made with them means what its file says.
_SAFE_INITS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class LoraFields:
    """r: rank; scale lora_alpha / r; lora_dropout: fraction [0, 1) of the side path's input dropped in training.

    target_modules: a regex or a sorted tuple of names; rank_pattern, alpha_pattern: (regex, value) pairs, first match
    wins; layers_to_transform: layer indices or None for all.
    """

    r: int
    lora_alpha: float
    target_modules: Names
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    exclude_modules: Names | None = None
    init_lora_weights: bool | str = True

    def to_peft(self) -> dict[str, Any]:
        """adapter_config.json's fields. An integral alpha is written as an integer, which is PEFT's type for it."""

        def listed(rule: Names | None) -> Any:
            return list(rule) if isinstance(rule, tuple) else rule

        return {
            "r": self.r,
            "lora_alpha": _integral(self.lora_alpha),
            "target_modules": listed(self.target_modules),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: _integral(value) for key, value in self.alpha_pattern},
            "layers_to_transform": listed(self.layers_to_transform),
            "exclude_modules": listed(self.exclude_modules),
            "init_lora_weights": self.init_lora_weights,
            "bias": "none",
            "fan_in_fan_out": False,
            "lora_bias": False,
            "modules_to_save": None,
            "layers_pattern": None,
            "use_dora": False,
        }


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise QtjaxError(f"{field} = {value!r}: {rule}")


def _pattern(value: Any, field: str) -> tuple[tuple[str, Any], ...]:
    value = {} if value is None else value
    _require(isinstance(value, Mapping), field, value, "must map module names or regexes to numbers")
    return tuple(value.items())


def read_fields(fields: Mapping[str, Any], linears: Sequence[Linear]) -> LoraFields:
    """Checks settings given by name, from a caller or from adapter_config.json.

    Raises QtjaxError naming the field, its value and the rule: unknown fields, values of the wrong kind, and PEFT
    fields whose effect is not supported. A field unknown here passes only when it is off (None, False or empty), so
    that files of newer PEFT versions are read exactly when they mean the same.
    """
    known = set(LoraFields.__dataclass_fields__)
    for field, value in fields.items():
        if field in known or field in _DESCRIPTIVE:
            continue
        value = list(value) if isinstance(value, tuple) else value
        if field in _INERT:
            allowed = " or ".join(repr(v) for v in _INERT[field][:2])
            _require(value in _INERT[field], field, value, f"is not supported for lora; only {allowed} is")
        elif not (value is None or value is False or value in ("", [], {})):
            names = [*known, *_INERT]
            raise QtjaxError(f"{field} = {value!r}: is not a field that lora supports{near_names(field, names)}")

    r, alpha = fields["r"], fields["lora_alpha"]
    dropout, rslora = fields.get("lora_dropout", 0.0), fields.get("use_rslora", False)
    init = fields.get("init_lora_weights", True)
    _require(_is_integer(r) and r > 0, "r", r, "the rank must be an integer above 0")
    _require(_is_number(alpha), "lora_alpha", alpha, "must be a number")
    _require(_is_number(dropout) and 0 <= dropout < 1, "lora_dropout", dropout, "is a fraction from 0 to below 1")
    _require(isinstance(rslora, bool), "use_rslora", rslora, "must be true or false")
    _require(
        any(init is v or (isinstance(v, str) and init == v) for v in _SAFE_INITS),
        "init_lora_weights", init, f"is not supported; only {', '.join(map(repr, _SAFE_INITS))} leave the base weights"
        " unchanged",
    )  # fmt: skip
    ranks, alphas = (_pattern(fields.get(name), name) for name in ("rank_pattern", "alpha_pattern"))
    for key, value in ranks:
        _require(_is_integer(value) and value > 0, f"rank_pattern[{key!r}]", value, "must be an integer above 0")
    for key, value in alphas:
        _require(_is_number(value), f"alpha_pattern[{key!r}]", value, "must be a number")
    return LoraFields(
        r=r,
        lora_alpha=float(alpha),
        target_modules=normalize_targets(fields["target_modules"], linears),
        lora_dropout=float(dropout),
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=tuple((key, float(value)) for key, value in alphas),
        layers_to_transform=_layers(fields.get("layers_to_transform")),
        exclude_modules=as_names(fields.get("exclude_modules"), "exclude_modules"),
        init_lora_weights=init,
    )


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    listed = [value] if _is_integer(value) else value
    valid = isinstance(listed, (list, tuple, set, range)) and all(_is_integer(n) for n in listed)
    _require(valid, "layers_to_transform", value, "must be a layer index or a list of them")
    return tuple(sorted(set(listed))) or None
