"""Try whether a model keeps the examples of a row apart.

Shape suffixes: ``R`` rows, ``L`` positions of a row.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel.adapters import unwrapped
from hf_accel.features.flattening import CAUSAL, Layout, stop_telling_apart, tell_apart
from hf_accel.features.truncation import refuse_media_tokens
from hf_accel.host.internals import attention_of
from hf_accel.losses import IGNORED, kind_of
from hf_accel.preserve import evaluation_mode
from hf_accel.technique import Technique

Result = TypeVar("Result")

BORDER = 6
"""Length of the first of the two examples of a trial; the second is longer by one."""

BLOCKS = 8
"""Blocks of a copy that is tried in place of the model; so many include all kinds of blocks that a model mixes."""


def _layouts(model: Any, num_rows: int) -> list[Layout]:
    """List the layouts to try: encoders that accept a mask of pairs get one, and the positions of RoBERTa."""
    made_by = vars(sys.modules[type(model.base_model).__module__])
    takes_pairs = "create_bidirectional_mask" in made_by and "create_bidirectional_sliding_window_mask" not in made_by
    encodes = kind_of(model) in ("masked LM", "token classification") and not getattr(model.config, "is_decoder", False)
    if num_rows > 1 or not encodes or not takes_pairs or attention_of(model) not in ("sdpa", "eager"):
        return [CAUSAL]
    beyond_padding = getattr(model.config, "pad_token_id", None) or 0
    return [CAUSAL, Layout(masked=True), Layout(first=beyond_padding + 1, masked=True)]


def check_kept_apart(model: Any, asking: Technique, num_rows: int = 1) -> Layout:
    """Find the layout in which a model keeps the examples of a row apart, or raise ValueError."""
    base, run = unwrapped(model), asking.run_
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{asking!r} does not support {type(base).__name__} because it is not a transformers model. "
            f"Remove {type(asking).__name__}."
        )
    refuse_media_tokens(asking, base)
    if run is not None and run.args.use_cache:
        raise ValueError(
            f"{asking!r} does not support use_cache=True because a cache mixes the examples of a row. "
            "Set use_cache=False."
        )
    model.config.use_cache = False  # Trainer does not for every model of a ``model_init``
    faults = []
    for layout in _layouts(base, num_rows):
        if (fault := flattening_fault(model, num_rows, run, layout)) is None:
            return layout._replace(shift=not _tried(model, run, layout, _predicts_itself))
        faults.append(fault)
    remedy = "PaddingFree()" if num_rows > 1 and len(_layouts(base, 1)) > 1 else "LengthGrouped()"
    raise ValueError(
        f"{asking!r} does not support {type(model).__name__} with {attention_of(model)!r} attention "
        f"because {faults[0]}. Use {remedy}."
    )


def flattening_fault(model: Any, num_rows: int = 1, run: Any = None, layout: Layout = CAUSAL) -> str | None:
    """Return why flattened rows would not train like separate examples, or None if they would.

    The trial has ``num_rows`` equal rows, and the device and precision of ``run``.  It leaves the model as found.
    """
    try:
        return _tried(model, run, layout, lambda tried: _fault(tried, tried, num_rows, layout)) or None
    except (IndexError, TypeError, ValueError) as error:
        if not layout.masked:
            raise
        return f"it takes no mask of pairs ({error})"


@torch.no_grad()
def _tried(model: Any, run: Any, layout: Layout, trial: Callable[[Any], Result]) -> Result:
    """Run a trial on a model, or on a fresh one of its kind if its weights are elsewhere."""
    device = next(model.parameters()).device if run is None else run.args.device
    accelerator = getattr(run, "accelerator", None)  # a quantized model is asked before there is one
    precision = contextlib.nullcontext() if accelerator is None else accelerator.autocast()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), precision:
        tried = model if _can_run(model, device) else _fresh(model).to(device)
        try:
            if layout.masked:
                tell_apart(tried)
            with evaluation_mode(tried):
                return trial(tried)
        finally:
            stop_telling_apart(tried)


def _can_run(model: Any, device: torch.device) -> bool:
    """Return whether a model can compute where it is now.

    Flash attention needs an accelerator.  ZeRO-3 keeps weights elsewhere; FSDP may load them on the first rank only.
    """
    weight = next(model.parameters())
    if weight.device.type == "meta" or hasattr(weight, "ds_tensor"):
        return False
    return weight.device.type == device.type or "flash" not in attention_of(model)


def _fresh(model: Any) -> Any:
    """Build the first blocks of a model of the same kind, with random weights that are equal on all ranks."""
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


def _fault(model: Any, forward: Callable, num_rows: int, layout: Layout) -> str:
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return "it is not a decoder of token ids"
    accepted = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in accepted):
        return "its forward takes no position_ids"
    if kind_of(unwrapped(model)) in ("classification", "one of several", "question answering"):
        return "it has no output for each token"
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids_RL = torch.randint(vocab_size, (1, 2 * BORDER + 1), generator=generator).repeat(num_rows, 1).to(device)
    padding = getattr(model.config, "pad_token_id", None)
    ids_RL[ids_RL == padding] = 0 if padding else 1
    others_RL = ids_RL.clone()
    others_RL[:, :BORDER] = (others_RL[:, :BORDER] + 1) % vocab_size
    positions_RL = torch.cat([torch.arange(BORDER), torch.arange(BORDER + 1)]).repeat(num_rows, 1).to(device)
    positions_RL += layout.first

    def logits(ids: Tensor, **kwargs: Tensor) -> Tensor:
        outputs = forward(input_ids=ids, **kwargs)
        return outputs["logits"].double() if "logits" in outputs else torch.empty(0)

    def joined(ids: Tensor) -> Tensor:
        return logits(ids, attention_mask=torch.ones_like(ids))

    flat = logits(ids_RL, position_ids=positions_RL)
    if flat.shape[:2] != ids_RL.shape:
        return "it has no output for each token"
    # One sequence of both examples shows how much a crossing changes, because everything crosses in it.
    one = joined(ids_RL)
    would_change = (one - joined(others_RL))[:, BORDER:].norm()
    if would_change == 0 and forward is model:
        # Fresh projections may be zero and hide everything: try weights that are not.
        noisy = {name: _noisy(p, generator) for name, p in model.named_parameters() if p.is_floating_point()}
        return _fault(model, lambda **kwargs: torch.func.functional_call(model, noisy, (), kwargs), num_rows, layout)
    if _crosses(model, lambda: forward(input_ids=ids_RL, position_ids=positions_RL)["logits"], generator):
        return "what it computes of one example depends on the one before"
    apart = torch.cat([joined(ids_RL[:, :BORDER]), joined(ids_RL[:, BORDER:])], 1)
    if (flat - apart).norm() > 0.1 * (one - apart).norm():
        return f"it does not count positions from {layout.first}"
    return ""


def _crosses(model: Any, forward: Callable[[], Tensor], generator: torch.Generator) -> bool:
    """Return whether the logits of the second example have a gradient at the tokens of the first.

    The gradient is exactly 0 if nothing crosses.  Otherwise it is not, however little crosses with fresh weights.
    """
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output if output.requires_grad else output.requires_grad_())
    )
    try:
        with torch.enable_grad():
            logits = forward()
            weights = torch.randn(logits.shape, generator=generator).to(logits)
            weights[:, :BORDER] = 0
            gradients = torch.autograd.grad((logits * weights).sum(), embedded, allow_unused=True)
    finally:
        hook.remove()
    return any(gradient is not None and bool(gradient[:, :BORDER].any()) for gradient in gradients)


def _predicts_itself(model: Any) -> bool:
    """Return whether the loss predicts each token itself, so that a label of the first token counts."""
    ids_1L = torch.ones(1, BORDER, dtype=torch.long, device=next(model.parameters()).device)
    labels_1L = torch.full_like(ids_1L, IGNORED)
    labels_1L[:, 0] = 0
    loss = model(input_ids=ids_1L, labels=labels_1L).get("loss")
    return loss is not None and bool(loss > 0)  # nan where no label counts


def _noisy(parameter: Tensor, generator: torch.Generator) -> Tensor:
    return parameter + 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
