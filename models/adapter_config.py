"""The training settings of an adapter, from PEFT's adapter_config.json, and its errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import StudioError
from core.text import printable

MAX_CONFIG_BYTES = 1 << 20


UNSUPPORTED_OPTIONS = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
"""Options of adapter_config.json that change the meaning of the same tensors. Source: PEFT 0.21."""


BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` whose methods change the base weights before training."""


@dataclass(frozen=True)
class PeftConfig:
    """PEFT's training settings.

    Attributes:
        kind: "LORA" or "LOKR".
        rank_stabilised: whether alpha is divided by the square root of the rank (rsLoRA).
        alpha_pattern, rank_pattern: exceptions, for modules whose name is or ends in their key.
    """

    kind: str
    alpha: float
    rank: float
    rank_stabilised: bool
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_pattern: dict[str, float] = field(default_factory=dict)

    def fits(self, module: str, roles: Iterable[str], rank: int) -> bool:
        """Whether these can be the settings of such matrices, by their kind and rank."""
        right_kind = ("lora_A" in roles) == (self.kind == "LORA")
        return right_kind and rank in (0, self._lookup(self.rank_pattern, module, self.rank))

    def scale(self, module: str) -> float:
        """alpha / rank of a module."""
        rank = self._lookup(self.rank_pattern, module, self.rank)
        alpha = self._lookup(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    @staticmethod
    def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
        """The first matching exception, as in PEFT."""
        found = (pattern[key] for key in pattern if f".{module}".endswith(f".{key}"))
        return next(found, default)


def parse(text: bytes | None, metadata: Mapping[str, Any], name: str) -> PeftConfig | None:
    """The training settings from adapter_config.json or the header's metadata, if there are any.

    No regular expression in them is evaluated: keys that are more than a name are refused.
    """
    try:
        if len(text or b"") > MAX_CONFIG_BYTES:
            raise ValueError("too long")
        if text is not None:
            config = json.loads(text)
        elif entry := metadata.get("lora_adapter_metadata"):
            config = {k.removeprefix("transformer."): v for k, v in json.loads(entry).items()}
        else:
            return None
        kind, init = config["peft_type"], str(config.get("init_lora_weights"))
        if used := [option for option in UNSUPPORTED_OPTIONS if config.get(option)]:
            raise unsupported(name, used[0])
        if kind not in ("LORA", "LOKR"):
            raise unsupported(name, str(kind))
        if init.startswith(BASE_CHANGING_INITS):
            raise unsupported(name, init)
        return PeftConfig(
            kind=kind,
            alpha=_positive(config["lora_alpha" if kind == "LORA" else "alpha"]),
            rank=_positive(config["r"]),
            rank_stabilised=config.get("use_rslora") is True,
            alpha_pattern=_pattern(config.get("alpha_pattern")),
            rank_pattern=_pattern(config.get("rank_pattern")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(name, "its adapter_config.json is not that of a LoRA or LoKr") from error


def _pattern(given: dict[str, Any] | None) -> dict[str, float]:
    pattern = {key.removeprefix("^"): _positive(value) for key, value in (given or {}).items()}
    if not all(re.fullmatch(r"[\w.]+", key) for key in pattern):
        raise ValueError("an expression, not a name")
    return pattern


def _positive(value: Any) -> float:
    """A positive number below a million. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ValueError("not a positive number")
    return float(value)


def unreadable(name: str, problem: str) -> StudioError:
    """The error for a file that is damaged, or no adapter at all."""
    return StudioError("adapter-unreadable", name=name, problem=problem)


def refused(name: str, problem: str, fix: str) -> StudioError:
    """The error for an adapter that is whole and cannot be applied."""
    return StudioError("adapter-refused", name=name, problem=problem, fix=fix)


def unsupported(name: str, kind: str) -> StudioError:
    """The error for a kind of adapter that the studio does not implement."""
    problem = f"this kind of adapter is not supported ({printable(kind)})"
    return refused(name, problem, "Choose an ordinary LoRA or LoKr version of it")
