"""Predict the memory of each device under each engine, and recommend a setting.

With P parameters of b bytes, T of them trained, on N devices (optimizer: AdamW, two states):

    engine    weights           gradients   optimizer   buffers
    ddp       b P               b T         2 b T       b T of gradients in transit
    zero1     b P               b T         12 T / N    one bucket
    zero2     b P               b T / N     12 T / N    one bucket
    zero3     b P / N           b T / N     12 T / N    one bucket, and gathered weights
    fsdp2     4 P / N           4 T / N     8 T / N     weights and gradients of two blocks, and those outside blocks

ZeRO keeps a copy of the weights in single precision among the optimizer's states; FSDP keeps no copy.  An offloading
engine keeps its shards in the memory of the host.  `hf_accel.tools.footprint` gives the activations, the logits and the
gradients alive at the same time.  On two ranks (docs/evidence/plan-memory.json) all predictions were within 3 % of the
measurements, except for ZeRO-3.  It took 17 % more for a small model that is mostly embeddings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_peft_available

from hf_accel.recipe.yaml_io import dump_yaml
from hf_accel.tools.footprint import Trace, trace
from hf_accel.tools.subjects import Subject

KEPT_BACK = 0.1
"""Share of a device's memory reserved for gaps of the allocator and for the context of the device."""

MOST_ROWS = 2**20
"""Largest number of examples that is tried."""

BUCKET = 500_000_000
"""Elements of the buffer in which DeepSpeed reduces gradients by default."""

LIVE = 1_000_000_000
"""Most parameters that ZeRO-3 keeps gathered by default."""


ENGINES = ("single", "ddp", "zero1", "zero2", "fsdp2", "zero3", "fsdp2-offload", "zero3-offload")
"""Engines in the order of recommendation: the less communication, the better."""


# Footprints ----------------------------------------------------------------------------------------------------------


class Footprint(NamedTuple):
    """Bytes on one device at the worst moment, and on the host for it."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    host: float

    @property
    def device(self) -> float:
        """Return the bytes on the device."""
        return sum(self[:-1])


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Args:
        engine: One of `ENGINES`.
        checkpointing: Recompute the activations of blocks.
        lora: Train adapters instead of the model.
    """

    engine: str
    checkpointing: bool = False
    lora: bool = False

    def __str__(self) -> str:
        kind = "LoRA adapters" if self.lora else "all weights"
        again = " with activation checkpointing" if self.checkpointing else ""
        return f"{self.engine}, {kind}{again}"


class Planner:
    """Compute footprints of a subject, and trace each pass once.

    Args:
        devices: Number of devices.
        bf16: Compute in bfloat16, as with ``TrainingArguments(bf16=True)``.
        lora_rank: Rank of adapters.
    """

    def __init__(self, subject: Subject, *, devices: int, bf16: bool = True, lora_rank: int = 16):
        self.subject, self.devices, self.bf16, self.lora_rank = subject, devices, bf16, lora_rank
        self._traces: dict[tuple, Trace] = {}

    def settings(self) -> Iterator[Setting]:
        """Yield all settings that the model supports, the fastest first.

        All weights come before adapters, and settings without recomputation before those with it.  Adapters need peft.
        """
        single = ("single", "fsdp2-offload", "zero3-offload")
        engines = single if self.devices == 1 else tuple(engine for engine in ENGINES if engine != "single")
        with torch.device("meta"):
            model: Any = self.subject.build()
        checkpointing = (False, True) if model.supports_gradient_checkpointing else (False,)
        for lora in (False, True) if is_peft_available() else (False,):
            for offload in (False, True):
                for again in checkpointing:
                    for engine in engines:
                        if engine.endswith("offload") == offload:
                            yield Setting(engine, again, lora)

    def footprint(self, setting: Setting, rows: int | None = None) -> Footprint:
        """Return the memory that a setting needs."""
        sharded = setting.engine not in ("single", "ddp")
        traced = self._traced(setting, sharded, rows or self.subject.rows)
        itemsize = self.subject.dtype.itemsize
        if setting.engine.startswith("zero"):
            return _zero(traced, setting.engine, self.devices, 2 if self.bf16 else itemsize)
        if setting.engine.startswith("fsdp2"):
            return _fsdp2(traced, setting.engine, self.devices, itemsize, 4 if self.bf16 else itemsize)
        return _copies(traced, self.devices)

    def largest_rows(self, setting: Setting, memory: float) -> int:
        """Return the most examples per forward pass that fit, at most `MOST_ROWS`; 0 if not one does.

        The footprint is the worst of several moments.  Each grows linearly with the examples, so chords lie above.
        """
        room = memory * (1 - KEPT_BACK)

        def left(rows: int) -> float:
            return room - self.footprint(setting, rows).device

        fits, high = 0, self.subject.rows if left(self.subject.rows) >= 0 else 1
        while left(high) >= 0:
            if high >= MOST_ROWS:
                return MOST_ROWS
            fits, high = high, 2 * high
        further = fits
        while further > 0:
            further = math.floor(left(fits) / (left(fits) - left(high)) * (high - fits))
            fits += further
        return fits

    def recommend(self, memory: float, settings: Sequence[Setting]) -> Setting | None:
        """Return the first setting that fits, or None."""
        return next((s for s in settings if self.footprint(s).device <= memory * (1 - KEPT_BACK)), None)

    def _traced(self, setting: Setting, sharded: bool, rows: int) -> Trace:
        # Sharding engines cast weights themselves; whole copies keep their dtype and compute under autocast.
        dtype = torch.bfloat16 if sharded and self.bf16 else self.subject.dtype
        autocast = self.bf16 and not sharded
        key = (dtype, autocast, setting.checkpointing, setting.lora, rows)
        if key not in self._traces:
            self._traces[key] = trace(
                lambda: self.subject.model(dtype),
                lambda: self.subject.inputs(rows, torch.float32 if autocast else dtype),
                autocast=autocast,
                checkpointing=setting.checkpointing,
                lora_rank=self.lora_rank if setting.lora else None,
                single_adapters=not (sharded and self.bf16),
            )
        return self._traces[key]


def _copies(traced: Trace, devices: int) -> Footprint:
    """Return the footprint of whole copies; on several devices, a second copy of the gradients is in transit."""
    worst = _worst(traced, 1.0, traced.gradients)
    buffers = traced.gradients if devices > 1 else 0
    return Footprint(traced.weights, worst[2], 2.0 * traced.gradients, worst[0], worst[1], buffers, 0)


def _zero(traced: Trace, engine: str, devices: int, itemsize: int) -> Footprint:
    stage, offload = int(engine[4]), engine.endswith("offload")
    share = {1: 1.0, 2: 1 / devices, 3: 0.0}[stage]
    held = itemsize * traced.trained / devices if stage == 3 and not offload else 0  # for gradients, at all times
    in_single = 0 if offload else 4 * traced.trained / devices  # the gradients of the update
    worst = _worst(traced, share, share * traced.gradients + in_single)
    shards = traced.weights / devices
    gathered = itemsize * min(traced.parameters, LIVE)
    states = 12 * traced.trained / devices
    weights = traced.weights if stage < 3 else gathered + (0 if offload else shards)
    host = states + shards + 4 * traced.trained / devices if offload else 0
    optimizer = 0 if offload else states
    return Footprint(weights, worst[2] + held, optimizer, worst[0], worst[1], itemsize * BUCKET, host)


def _fsdp2(traced: Trace, engine: str, devices: int, itemsize: int, of_trained: int) -> Footprint:
    """Return the footprint under FSDP2; in mixed precision, accelerate casts only trained weights to fp32."""
    offload = engine.endswith("offload")
    computed = traced.weights / traced.parameters
    trained_share = traced.trained / traced.parameters
    gradients = of_trained * traced.trained / devices
    shards, states = gradients + itemsize * (traced.parameters - traced.trained) / devices, 2 * gradients
    share = 0.0 if offload else gradients / traced.gradients
    # Until the gradients of a block are complete, one block and the weights outside blocks are gathered.  Later, two
    # blocks are, with their gradients in place and in transit.
    gathered = computed * min(traced.outside + traced.block, traced.parameters)
    two_blocks = computed * min(traced.outside + 2 * traced.block, traced.parameters) * (1 + 2 * trained_share)
    before, after = traced.peak(share), traced.peak(share, past=traced.gradients * traced.block / traced.parameters)
    worst, buffers = max((before, gathered), (after, two_blocks), key=lambda pair: pair[0].total + pair[1])
    kept = (0.0, 0.0, shards + states + gradients) if offload else (shards, states, 0.0)
    return Footprint(kept[0], worst.gradients, kept[1], worst.activations, worst.logits, buffers, kept[2])


def _worst(traced: Trace, gradient_share: float, at_update: float) -> tuple[float, float, float]:
    """Return activations, logits and gradients in the pass, or at the update if that needs more."""
    peak = traced.peak(gradient_share)
    return (0.0, 0.0, at_update) if at_update > peak.total else (peak.activations, peak.logits, peak.gradients)


# Configuration files -------------------------------------------------------------------------------------------------


def accelerate_config(setting: Setting, devices: int, bf16: bool, deepspeed: Path) -> dict[str, Any]:
    """Return the configuration for ``accelerate launch --config_file``."""
    kind = {"s": "NO", "d": "MULTI_GPU", "f": "FSDP", "z": "DEEPSPEED"}[setting.engine[0]]
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "num_machines": 1,
        "num_processes": devices,
    }
    if kind == "DEEPSPEED":
        return config | {"deepspeed_config": {"deepspeed_config_file": str(deepspeed), "zero3_init_flag": False}}
    config["mixed_precision"] = "bf16" if bf16 else "no"
    if kind == "MULTI_GPU":
        config["gpu_ids"] = "all"
    if kind == "FSDP":
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": setting.engine.endswith("offload"),
            "fsdp_activation_checkpointing": setting.checkpointing,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        }
    return config


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """Return the configuration for DeepSpeed; ``auto`` follows ``TrainingArguments``."""
    zero: dict[str, Any] = {"stage": int(setting.engine[4])}
    if setting.engine.endswith("offload"):
        for key in ("offload_optimizer", "offload_param"):
            zero[key] = {"device": "cpu", "pin_memory": True}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def write_configs(folder: Path, setting: Setting, devices: int, bf16: bool) -> list[Path]:
    """Write ``accelerate.yaml`` and, for ZeRO, ``deepspeed.json``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed, accelerate = folder / "deepspeed.json", folder / "accelerate.yaml"
    accelerate.write_text(dump_yaml(accelerate_config(setting, devices, bf16, deepspeed)))
    if not setting.engine.startswith("zero"):
        return [accelerate]
    deepspeed.write_text(json.dumps(deepspeed_config(setting), indent=2) + "\n")
    return [accelerate, deepspeed]


def parse_bytes(text: str) -> float:
    """Return the bytes of ``"80GB"`` or ``"24GiB"``."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(found.group(1)) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise ValueError(f"memory({text!r}): not an amount of memory. Write, for example, '80GB' or '24GiB'.")
    power = "KMGT".index(found.group(2).upper()) + 1
    return number * (1024 if found.group(3) else 1000) ** power
