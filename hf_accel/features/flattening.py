"""Examples end to end in one row: made from what the user's collator makes of each, for models that keep them apart."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel.technique import Technique

BORDER = 6
"""Length of the first of the two examples that are tried; the second is longer by one."""

BLOCKS = 8
"""Blocks of the copy that is tried where the model itself cannot be: among so many are all kinds that a model mixes."""


def unpadded(examples: Sequence[Mapping[str, Tensor]], asking: Technique) -> list[dict[str, Tensor]]:
    """Examples that are rows (1, L) each, without what an ``attention_mask`` hides, with ``position_ids`` from 0."""
    rows = []
    for example in examples:
        ids_1L = example["input_ids"]
        if len(ids_1L) != 1:
            raise ValueError(
                f"{asking!r}: the collator makes {len(ids_1L)} rows of one example, which belong together. "
                "Leave it out."
            )
        seen_1L = example.get("attention_mask", torch.ones_like(ids_1L)).bool()
        row = {"position_ids": torch.arange(int(seen_1L.sum()))[None]}
        for name, value in example.items():
            if name == "attention_mask":
                continue
            if value.shape != ids_1L.shape:
                raise ValueError(
                    f"{asking!r}: {name!r} has the shape {tuple(value.shape)} where input_ids have "
                    f"{tuple(ids_1L.shape)}, so it cannot be flattened. Drop it from the data, or pad."
                )
            row[name] = value[seen_1L][None]
        if "labels" in row:
            row["labels"][:, :1] = -100  # no example predicts the first token of the next
        rows.append(row)
    return rows


def end_to_end(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One row, (1, T), of rows."""
    return {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}


@torch.no_grad()
def flattening_fault(model: Any, num_rows: int = 1, host: Any = None) -> str | None:
    """Why flattened rows would not train as their examples do apart; None where they would.

    Tried on ``num_rows`` equal rows, on the device and in the precision of ``host``, the trainer.  Leaves the model as
    found.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device if host is None else host.args.device
    accelerator = getattr(host, "accelerator", None)  # a quantized model is asked before there is one
    precision = contextlib.nullcontext() if accelerator is None else accelerator.autocast()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), precision:
            tried = model if _can_run(model, device) else _fresh(model).to(device)
            tried.eval()
            return _fault(tried, tried, num_rows) or None
    finally:
        for module, mode in modes:
            module.training = mode


def _can_run(model: Any, device: torch.device) -> bool:
    """Whether a model computes where it is now: flash attention does on accelerators only, and nothing does without
    weights, which ZeRO-3 keeps elsewhere from the beginning and FSDP may read on the first rank only."""
    weight = next(model.parameters())
    if weight.device.type == "meta" or hasattr(weight, "ds_tensor"):
        return False
    return weight.device.type == device.type or "flash" not in model.config._attn_implementation


def _fresh(model: Any) -> Any:
    """The first blocks of a model of the same kind, with weights of its own, alike on every rank."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without adapters
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    if (number := getattr(text, "num_hidden_layers", 0)) > BLOCKS:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == number:
                setattr(text, name, value[:BLOCKS])
        text.num_hidden_layers = BLOCKS
    torch.manual_seed(0)
    return type(base)(config).to(base.dtype)


def _fault(model: Any, forward: Callable, num_rows: int) -> str:
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return "it is not a decoder of token ids"
    accepted = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in accepted):
        return "its forward takes no position_ids"
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids_RL = torch.randint(vocab_size, (1, 2 * BORDER + 1), generator=generator).repeat(num_rows, 1).to(device)
    others_RL = ids_RL.clone()
    others_RL[:, :BORDER] = (others_RL[:, :BORDER] + 1) % vocab_size
    positions_RL = torch.cat([torch.arange(BORDER), torch.arange(BORDER + 1)]).repeat(num_rows, 1).to(device)

    def logits(ids: Tensor, **kwargs: Tensor) -> Tensor:
        outputs = forward(input_ids=ids, **kwargs)
        return outputs["logits"].double() if "logits" in outputs else torch.empty(0)

    def joined(ids: Tensor) -> Tensor:
        return logits(ids, attention_mask=torch.ones_like(ids))

    flat = logits(ids_RL, position_ids=positions_RL)
    if flat.shape[:2] != ids_RL.shape:
        return "it has no output for each token"
    # What a crossing would change is known from one sequence of both, where everything crosses.
    one = joined(ids_RL)
    would_change = (one - joined(others_RL))[:, BORDER:].norm()
    if would_change == 0 and forward is model:
        # Freshly initialized projections may be zero and hide all: look at weights that are not.
        noisy = {name: _noisy(p, generator) for name, p in model.named_parameters() if p.is_floating_point()}
        return _fault(model, lambda **kwargs: torch.func.functional_call(model, noisy, (), kwargs), num_rows)
    if (flat - logits(others_RL, position_ids=positions_RL))[:, BORDER:].norm() > 0.1 * would_change:
        return "what it computes of one example depends on the one before"
    apart = torch.cat([joined(ids_RL[:, :BORDER]), joined(ids_RL[:, BORDER:])], 1)
    if (flat - apart).norm() > 0.1 * (one - apart).norm():
        return "it does not count positions from 0"
    labels_RL = torch.full_like(ids_RL, -100)
    labels_RL[:, 0] = 0
    loss = forward(input_ids=ids_RL, labels=labels_RL).get("loss")
    if loss is not None and loss > 0:  # nan where tokens predict the next one: nobody predicts the first
        return "its loss predicts each token itself and not the next one"
    return ""


def _noisy(parameter: Tensor, generator: torch.Generator) -> Tensor:
    return parameter + 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)


def check_kept_apart(model: Any, asking: Technique, num_rows: int = 1) -> None:
    """Raise ValueError where a model would mix examples of a row."""
    if (fault := flattening_fault(model, num_rows, asking.host_)) is not None:
        raise ValueError(
            f"{asking!r}: {type(model).__name__} with {model.config._attn_implementation!r} attention: {fault}, "
            "so flattened examples would not train as padded ones. Pad, and group examples by length."
        )
