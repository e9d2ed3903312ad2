"""Compute the loss of a language model without the logits of the whole batch.

N tokens and a vocabulary of V need N * V logits, their probabilities and a gradient of the same size.  These are
gigabytes, beside megabytes of hidden states.  This technique makes the logits of one chunk of tokens at a time, turns
them into losses and gradients, and frees them.  With h the hidden state of a token, y its target and W, b the last
projection,

    z = W h + b        l = logsumexp(z) - z_y        dl/dz = softmax(z) - onehot(y)
    dl/dh = W^T dl/dz        dl/dW = sum over tokens of dl/dz h^T

Gradients are made together with the losses, for weights of 1, and multiplied in the backward pass.  If tokens have
different weights, the gradient of W is made again from new logits.  Tokens without a label (prompts, padding, unmasked
positions) are not projected at all.

Recommendation: Use ChunkedCrossEntropy if the logits of a large vocabulary limit your batch.
When to use: Language models with a large vocabulary.  Masked language modeling and answers to long prompts, where most
positions have no label.  On one CPU thread, with 4096 tokens, a vocabulary of 50,257 and width 256, loss and gradient
take 0.89 [0.87, 0.90] of the time of all logits at once.  With labels at 15 % of the tokens they take 0.14 [0.13,
0.14].
When not to use: Small vocabularies.  It refuses FSDP2, ZeRO, techniques that read the logits (distillation), and models
that change their logits after the projection.
Differences from the paper: It is plain PyTorch without a kernel.  Liger's kernel is not used because it makes all
logits a second time for the losses of weighted tokens.
References: Wijmans et al. (2024), Cut Your Losses in Large-Vocabulary Language Models,
https://arxiv.org/abs/2411.09009; Hsu et al. (2024), Liger Kernel, https://arxiv.org/abs/2410.10989 (gradients with the
losses).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_accel.adapters import unwrapped
from hf_accel.losses import IGNORED, ExampleLosses, Head, TokenHead
from hf_accel.preserve import evaluation_mode
from hf_accel.surgery.partial_projection import PartialProjection

LOGITS_OF_A_CHUNK = {"cpu": 2**23}
"""Logits of a chunk by device type, 32 MiB in float32: on CPU faster than half or twice as many."""
LOGITS_ELSEWHERE = 2**27
"""Logits of a chunk on accelerators, for large matrices; not measured."""


def chunked_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy of each token, (N,), in float32 or wider; 0 if the target is -100.

    It equals ``F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")``.
    """
    counted_N = targets_N != IGNORED
    with_gradient = torch.is_grad_enabled()
    losses: Any = _ChunkedCrossEntropy.apply(
        hidden_NH[counted_N], weight_VH, bias_V, targets_N[counted_N], label_smoothing, with_gradient
    )
    return losses.new_zeros(len(targets_N)).masked_scatter(counted_N, losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH, weight_VH, bias_V, targets_N, smoothing, with_gradient) -> Tensor:
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        wide = torch.promote_types(dtype, torch.float32)
        losses_N = hidden_NH.new_empty(len(hidden_NH), dtype=wide)
        of_weight = with_gradient and weight_VH.requires_grad
        of_bias = with_gradient and bias_V is not None and bias_V.requires_grad
        grad_NH = torch.empty_like(hidden_NH) if with_gradient else hidden_NH.new_empty(0)
        grad_VH = torch.zeros_like(weight_VH, dtype=wide) if of_weight else None
        grad_V = bias_V.new_zeros(bias_V.shape, dtype=wide) if of_bias else None
        low_VH = weight_VH.to(dtype)
        for part, logits_CV in _chunks(hidden_NH, low_VH, bias_V, wide):
            targets_C1 = targets_N[part, None]
            total_C1 = logits_CV.logsumexp(1, keepdim=True)
            losses_C1 = total_C1 - logits_CV.gather(1, targets_C1)
            if smoothing:
                losses_C1 = (1 - smoothing) * losses_C1 + smoothing * (total_C1 - logits_CV.mean(1, keepdim=True))
            losses_N[part] = losses_C1[:, 0]
            if with_gradient:
                slopes_CV = _slopes(logits_CV, total_C1, targets_C1, smoothing)
                grad_NH[part] = (slopes_CV.to(dtype) @ low_VH).to(grad_NH.dtype)
                _add(grad_VH, grad_V, slopes_CV, hidden_NH[part], dtype)
        ctx.settings = smoothing, dtype, wide
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, grad_NH, grad_VH, grad_V)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (upstream_N,) = upstream
        hidden_NH, weight_VH, bias_V, targets_N, grad_NH, grad_VH, grad_V = ctx.saved_tensors
        smoothing, dtype, wide = ctx.settings
        uneven = len(upstream_N) > 0 and bool((upstream_N != upstream_N[0]).any())
        if uneven and (grad_VH is not None or grad_V is not None):
            grad_VH = None if grad_VH is None else torch.zeros_like(grad_VH)
            grad_V = None if grad_V is None else torch.zeros_like(grad_V)
            for part, logits_CV in _chunks(hidden_NH, weight_VH.to(dtype), bias_V, wide):
                total_C1 = logits_CV.logsumexp(1, keepdim=True)
                slopes_CV = _slopes(logits_CV, total_C1, targets_N[part, None], smoothing)
                _add(grad_VH, grad_V, slopes_CV.mul_(upstream_N[part, None]), hidden_NH[part], dtype)
            factor = 1.0
        else:
            factor = upstream_N[0] if len(upstream_N) else 0.0
        return (
            (grad_NH * upstream_N[:, None]).to(hidden_NH.dtype),
            None if grad_VH is None else (grad_VH * factor).to(weight_VH.dtype),
            None if grad_V is None else (grad_V * factor).to(bias_V.dtype),
            None,
            None,
            None,
        )


class _Tied(torch.autograd.Function):
    """Pass hidden states through, so that DistributedDataParallel finds the projection in their graph."""

    @staticmethod
    def forward(ctx: Any, hidden, *parameters) -> Tensor:
        ctx.parameters = len(parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*upstream, *[None] * ctx.parameters)


def _chunks(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wide: torch.dtype):
    """Yield each chunk's place among the tokens, and its logits, multiplied in the dtype of the weight."""
    size = max(LOGITS_OF_A_CHUNK.get(hidden_NH.device.type, LOGITS_ELSEWHERE) // len(weight_VH), 1)
    for start in range(0, len(hidden_NH), size):
        part = slice(start, start + size)
        logits_CV = (hidden_NH[part].to(weight_VH.dtype) @ weight_VH.T).to(wide)
        yield part, logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _slopes(logits_CV: Tensor, total_C1: Tensor, targets_C1: Tensor, smoothing: float) -> Tensor:
    """Overwrite logits with the derivatives of the losses."""
    slopes_CV = logits_CV.sub_(total_C1).exp_()
    slopes_CV.scatter_add_(1, targets_C1, slopes_CV.new_full(targets_C1.shape, smoothing - 1))
    return slopes_CV.sub_(smoothing / logits_CV.shape[1]) if smoothing else slopes_CV


def _add(grad_VH: Tensor | None, grad_V: Tensor | None, slopes_CV: Tensor, hidden_CH: Tensor, dtype: torch.dtype):
    if grad_VH is not None:
        if dtype == grad_VH.dtype:
            grad_VH.addmm_(slopes_CV.T, hidden_CH.to(dtype))
        else:
            grad_VH += slopes_CV.to(dtype).T @ hidden_CH.to(dtype)
    if grad_V is not None:
        grad_V += slopes_CV.sum(0)


@dataclass(frozen=True)
class ChunkedTokenHead(TokenHead):
    """Loss of a language model that returns hidden states instead of logits while it trains."""

    projection: nn.Linear
    run: Any

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any], num_examples: int, label_smoothing: float = 0.0
    ) -> ExampleLosses:
        hidden_RLH = outputs["logits"]
        if hidden_RLH.shape[-1] == self.projection.out_features:  # of a model in evaluation, or of another model
            return super().losses(outputs, inputs, num_examples, label_smoothing)
        targets_RL = self._targets(inputs).to(hidden_RLH.device)
        with self.run.accelerator.autocast():  # as in the forward pass, which the projection left
            losses_N = chunked_cross_entropy(
                hidden_RLH.flatten(0, -2),
                self.projection.weight,
                self.projection.bias,
                targets_RL.flatten(),
                label_smoothing,
            )
        example_RL = self._examples(inputs, num_examples).to(losses_N.device)
        return ExampleLosses(losses_N.view_as(targets_RL), targets_RL.ne(IGNORED), example_RL)


@dataclass(eq=False)
class ChunkedCrossEntropy(PartialProjection):
    """Compute the loss of a language model, and its gradient, from one chunk of the logits at a time."""

    refused_backends: ClassVar = {
        "fsdp2": "the weight of the last projection is sharded again after the forward pass",
        "zero": "the weight of the last projection is partitioned again after the forward pass",
    }
    claims: ClassVar = frozenset({"logits"})

    def loss_head(self, head: Head) -> Head:
        """Return the model's own head, from hidden states."""
        run: Any = self.run_
        model = unwrapped(run.model)
        projection = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        for backend, used in (("fsdp2", run.is_fsdp_enabled), ("zero", run.is_deepspeed_enabled)):
            if used:
                raise ValueError(
                    f"{self!r} does not support {backend} because {self.refused_backends[backend]}. Use DDP."
                )
        if not isinstance(head, TokenHead) or type(projection) is not nn.Linear:
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it does not end in one linear projection "
                "to a "
                "vocabulary. Remove ChunkedCrossEntropy."
            )
        if projection.in_features == projection.out_features:
            raise ValueError(
                f"{self!r} does not support hidden states as wide as the vocabulary because they look like logits. "
                "Remove ChunkedCrossEntropy."
            )
        if "labels" in head.without_labels(model, {"labels": torch.zeros(1, 2, dtype=torch.long)}):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it makes the decoder's inputs together with "
                "its own loss. Remove ChunkedCrossEntropy."
            )
        try:
            ends = _ends_in(model, projection)
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because a trial of its projection failed "
                f"({problem}). Remove ChunkedCrossEntropy."
            ) from error
        if not ends:
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it changes its logits after the projection. "
                "Remove ChunkedCrossEntropy."
            )
        if readers := run.with_hook("extra_loss"):
            raise ValueError(f"{self!r} does not support {readers[0]!r}: it reads the logits. Remove one of the two.")
        return ChunkedTokenHead(head.kind, head.shift, projection, run)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        projection = unwrapped(model).get_output_embeddings()
        projection.forward = types.MethodType(_nothing_in_training, projection)

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        del unwrapped(model).get_output_embeddings().forward


def _nothing_in_training(projection: nn.Linear, hidden: Tensor) -> Tensor:
    if not projection.training:
        return nn.Linear.forward(projection, hidden)
    tied: Any = _Tied.apply(hidden, *projection.parameters())
    return tied


@torch.no_grad()
def _ends_in(model: Any, projection: nn.Module) -> bool:
    """Return whether a model returns its projection's output unchanged, by a trial with other values."""
    given = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        given.append(torch.linspace(-100, 100, output.numel(), device=output.device).to(output).view_as(output))
        return given[-1]

    example: Any = next(model.parameters())
    ids_BL = torch.zeros(1, 2, dtype=torch.long, device=example.device)
    inputs: dict[str, Any] = {"input_ids": ids_BL}
    if model.config.is_encoder_decoder:  # whose encoder may read speech or images
        width = getattr(model.config, "encoder", model.config).hidden_size
        encoded = BaseModelOutput(last_hidden_state=example.new_zeros(1, 2, width))
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids_BL}
    handle = projection.register_forward_hook(replace)
    try:
        with evaluation_mode(model):
            logits = model(**inputs).logits
    finally:
        handle.remove()
    return len(given) == 1 and torch.equal(given[0], logits)
