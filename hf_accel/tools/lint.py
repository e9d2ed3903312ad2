"""Find mistakes in configurations of DeepSpeed and accelerate: removed keys, and keys that contradict each other.

DeepSpeed 0.19 removed about a dozen sections and refuses configurations with them.  Neither library refuses other
mistakes, which silently train something else than intended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

REMOVED = {
    "progressive_layer_drop": "hf_accel.ProgressiveLayerDrop",
    "curriculum_learning": "hf_accel.SequenceLengthWarmup",
    "compression_training": "hf_accel.SparseTraining or torchao",
    "eigenvalue": "nothing: it served quantize_training",
    "quantize_training": "torchao (hf_accel.Int8Training)",
    "sparse_attention": "attn_implementation='flex_attention' of the model",
    "elasticity": "torchrun --nnodes MIN:MAX",
    "amp": "bf16",
    "nebula": "an ordinary checkpoint",
    "sparse_gradients": "nothing: embeddings have dense gradients",
    "graph_harvesting": "nothing: it was for CUDA graphs",
}
"""Sections that DeepSpeed 0.19 refuses, with their replacements."""

REMOVED_OF_ZERO = {
    "mics_shard_size": "zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "zero_hpz_partition_size",
    "zeropp_loco_param": "zero_quantized_gradients",
    "cpu_offload_params": "offload_param: {device: cpu}",
}
"""Keys of ``zero_optimization`` that DeepSpeed 0.19 refuses."""

DEPRECATED_OF_ZERO = {
    "cpu_offload": "offload_optimizer: {device: cpu}",
    "cpu_offload_param": "offload_param: {device: cpu}",
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer and offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Keys of ``zero_optimization`` that DeepSpeed 0.19 still accepts."""

REMOVED_OPTIMIZERS = {"OneBitAdam": "AdamW", "OneBitLamb": "LAMB", "ZeroOneAdam": "AdamW"}


def lint(path: Path) -> list[str]:
    """List the mistakes in a file, one sentence each; raise ValueError if it is not a known configuration."""
    try:
        text = path.read_text()
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config({str(path)!r}): cannot be read ({error}). Correct it.") from None
    if not isinstance(document, dict):
        raise ValueError(f"config({str(path)!r}): is not a mapping. Give a configuration of DeepSpeed or accelerate.")
    return (of_accelerate if "distributed_type" in document else of_deepspeed)(document)


def of_deepspeed(config: Mapping[str, Any]) -> list[str]:
    """List mistakes in a configuration of DeepSpeed."""
    zero = config.get("zero_optimization", {})
    mistakes = [f"{key}: DeepSpeed 0.19 refuses it. Use {other}." for key, other in REMOVED.items() if key in config]
    mistakes += [
        f"zero_optimization.{key}: DeepSpeed 0.19 refuses it. Use {other}."
        for key, other in REMOVED_OF_ZERO.items()
        if key in zero
    ]
    mistakes += [
        f"zero_optimization.{key}: is deprecated. Use {other}."
        for key, other in DEPRECATED_OF_ZERO.items()
        if key in zero
    ]
    optimizer = config.get("optimizer", {}).get("type")
    if optimizer in REMOVED_OPTIMIZERS:
        mistakes.append(
            f"optimizer.type({optimizer!r}): DeepSpeed 0.19 removed it. Use {REMOVED_OPTIMIZERS[optimizer]!r}."
        )
    return mistakes + [sentence for rule, sentence in CONTRADICTIONS if rule(config, zero)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _enabled(config: Mapping[str, Any], key: str) -> bool:
    return config.get(key, {}).get("enabled") is True


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"  # DeepSpeed's default


CONTRADICTIONS: tuple[tuple[Callable[[Mapping[str, Any], Mapping[str, Any]], bool], str], ...] = (
    (
        lambda config, zero: _enabled(config, "fp16") and _enabled(config, "bf16"),
        "fp16 and bf16: both are enabled. Keep one; bf16 needs no loss scale.",
    ),
    (
        lambda config, zero: _offloads(zero, "offload_param") and zero.get("stage", 0) < 3,
        "zero_optimization.offload_param: only stage 3 offloads weights. Set stage 3, or remove offload_param.",
    ),
    (
        lambda config, zero: _offloads(zero, "offload_optimizer") and zero.get("stage", 0) < 1,
        "zero_optimization.offload_optimizer: needs stage 1 or higher. Set stage 1 or higher.",
    ),
    (
        lambda config, zero: zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"),
        "zero_optimization.stage3_gather_16bit_weights_on_model_save: without it, save_model writes no weights under "
        "stage 3. Set it to true.",
    ),
    (
        lambda config, zero: any(
            _number(config.get(key))
            for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        ),
        "train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps: numbers here must agree with "
        'TrainingArguments. Write "auto".',
    ),
    (
        lambda config, zero: "scheduler" in config,
        "scheduler: DeepSpeed's schedule follows steps, not the budget. Remove it, and use lr_scheduler_type or a "
        "technique.",
    ),
)
"""Contradictions: a test of the configuration and its ZeRO section, and the message."""


def of_accelerate(config: Mapping[str, Any]) -> list[str]:
    """List mistakes in a configuration of accelerate."""
    mistakes = []
    kind, fsdp, deepspeed = config["distributed_type"], config.get("fsdp_config"), config.get("deepspeed_config")
    if kind == "FSDP" and (fsdp or {}).get("fsdp_version", 1) == 1:
        mistakes.append("fsdp_config.fsdp_version: techniques do not support FSDP1. Set fsdp_version: 2.")
    if (fsdp or {}).get("fsdp_sharding_strategy") and (fsdp or {}).get("fsdp_version") == 2:
        mistakes.append(
            "fsdp_config.fsdp_sharding_strategy: FSDP2 ignores it. Use fsdp_reshard_after_forward: true or false."
        )
    if kind != "FSDP" and fsdp:
        mistakes.append(f"fsdp_config: distributed_type {kind} ignores it. Set distributed_type: FSDP.")
    if kind != "DEEPSPEED" and deepspeed:
        mistakes.append(f"deepspeed_config: distributed_type {kind} ignores it. Set distributed_type: DEEPSPEED.")
    if kind == "DEEPSPEED" and (deepspeed or {}).get("deepspeed_config_file"):
        for key in ("gradient_accumulation_steps", "zero_stage", "offload_optimizer_device", "offload_param_device"):
            if key in (deepspeed or {}):
                mistakes.append(f"deepspeed_config.{key}: belongs to deepspeed_config_file. Keep it in one place.")
        if config.get("mixed_precision"):
            mistakes.append("mixed_precision: belongs to deepspeed_config_file. Keep it in one place.")
    if config.get("num_machines", 1) > 1 and not config.get("main_process_ip"):
        mistakes.append("main_process_ip: several machines need it. Give the address of the first machine.")
    if kind in ("NO", False) and config.get("num_processes", 1) > 1:
        mistakes.append("num_processes: distributed_type NO starts one process. Set distributed_type: MULTI_GPU.")
    return mistakes
