"""Measure the gradient noise scale; `GradientNoiseScale` reports it and `NoiseScaleRamp` follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_accel.batch import MicroBatch
from hf_accel.technique import Positive, Technique

logger = logging.get_logger(__name__)

POINTS = 10
"""Number of parts of the run; the report has the value after each part."""


def signal_and_noise(
    squared_norm: Tensor, squared_norms_of_parts: Tensor, squared_shares: Tensor, batch_size: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimate |G|^2, and tr(Sigma) for one example, without bias.

    Args:
        squared_norm: Squared norm of the gradient of a step of ``batch_size`` examples.
        squared_norms_of_parts: Sum over the parts of the step; their gradients add up to that of the step.
        squared_shares: Sum over the parts of the square of each part's share; the shares add up to 1.
    """
    signal = (squared_norm - squared_norms_of_parts) / (1 - squared_shares)
    return signal, batch_size * (squared_norm - signal)


@dataclass(eq=False)
class NoiseScaleMeasurement(Technique):
    """Measure the gradient noise scale, in examples, as a base of techniques that use it.

    Args:
        half_life: Steps after which a measurement counts half, above 0.
    """

    half_life: Positive = 50
    probe_micro_batch_size: ClassVar = 2
    variations: ClassVar = {"half_life": 1.0}
    refused_backends: ClassVar = {
        "fsdp2": "it exchanges gradients before hooks can see them",
        "zero": "it exchanges gradients before hooks can see them",
    }
    counters: ClassVar = ("means", "values")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        if run.is_deepspeed_enabled or run.is_fsdp_enabled:
            raise ValueError(
                f"{self!r} does not support FSDP or DeepSpeed because they exchange gradients before hooks can see "
                f"them. Use DDP, or remove {type(self).__name__}."
            )
        if run.owner("synchronize") is not None and args.world_size > 1:
            raise ValueError(
                f"{self!r} does not support {run.owner('synchronize')!r} because ranks differ, so no gradient of the "
                "whole step exists. Remove one of the two."
            )
        self.means_ = torch.zeros(3, device=args.device)  # signal, noise, number of measurements
        self.values_: dict[str, float | None] = {}
        size = run.nominal_batch_size
        if args.world_size == 1 and run.micro_batch_size >= size:
            remedy = f"micro_batch_size={size // 2} or less" if size > 1 else "gradient_accumulation_steps=2 or more"
            self._cannot_measure(
                f"{self!r}: a step of {size} examples is one micro-batch, so its noise cannot be measured. "
                f"Set {remedy}."
            )

    def _cannot_measure(self, sentence: str) -> None:
        logger.warning(sentence)

    def objective(self, model: nn.Module, backward: Callable[[], Tensor]) -> Tensor:
        """Compute the plain gradient, and measure those of the micro-batches on the way."""
        run: Any = self.run_
        squares: list[Tensor] = []
        seen: dict[int, MicroBatch] = {}
        size = run.micro_batch_size

        def look(gradient: Tensor) -> None:
            nonlocal size
            if run.micro_batch_size != size:  # memory ran out, so the step is repeated with smaller ones
                size = run.micro_batch_size
                squares.clear()
                seen.clear()
            seen[id(run.micro_batch)] = run.micro_batch
            squares.append(_squared_norm(gradient))

        trainable = [p for p in run.model.parameters() if p.requires_grad]
        handles = [p.register_hook(look) for p in trainable]
        try:
            loss = backward()
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            whole = torch.stack([_squared_norm(p.grad) for p in trainable if p.grad is not None]).sum()
            self._measure(whole, torch.stack(squares).sum(), list(seen.values()))
        return loss

    def _measure(self, whole: Tensor, parts: Tensor, micros: list[MicroBatch]) -> None:
        """Add a step to the means."""
        run: Any = self.run_
        examples = sum(int((micro.ids_B >= 0).sum()) for micro in micros)
        items_MK = torch.stack([self._items(micro) for micro in micros]).double()
        if not run.args.average_tokens_across_devices:
            items_MK = items_MK / items_MK.sum(0)  # each rank's own mean, and the mean of these
        terms = items_MK.shape[1]
        local = torch.cat([items_MK.sum(0), (items_MK.T @ items_MK).flatten(), torch.tensor([float(examples)])])
        local = torch.cat([parts.reshape(1) / run.args.world_size**2, local.to(parts)])
        total = run.accelerator.reduce(local, "sum") if run.args.world_size > 1 else local
        items_K, products_KK = total[1 : 1 + terms], total[1 + terms : -1].view(terms, terms)
        squared_shares = (products_KK / items_K.outer(items_K)).mean()
        scaler = run.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        signal, noise = signal_and_noise(whole, total[0], squared_shares, total[-1])
        now = torch.stack([signal / scale**2, noise / scale**2])
        means, number = self.means_.to(now)[:2], self.means_[2] + 1
        weight = (1 / number).clamp(min=1 - 2 ** (-1 / self.half_life))
        after = torch.cat([means + weight * (now - means), number.reshape(1).to(now)])
        self.means_ = torch.where(now.isfinite().all(), after, self.means_.to(now))

    def _items(self, micro: MicroBatch) -> Tensor:
        """Return how many items each term of the loss counts, (K,); examples for an unknown head."""
        num_examples = int((micro.ids_B >= 0).sum())
        head = self.run_.head  # type: ignore[union-attr]
        if head is None:
            return torch.tensor([num_examples])
        items_K = head.count(micro.inputs, len(micro.ids_B))
        return items_K if num_examples else torch.zeros_like(items_K)

    def noise_scale(self) -> float | None:
        """Return B_simple in examples: infinite if noise hides the signal, None before the first measurement."""
        signal, noise, number = self.means_.tolist()
        if number == 0:
            return None
        return max(noise, 0.0) / signal if signal > 0 else math.inf

    def on_step_end(self, args, state, control, **kwargs):
        part = math.floor(self.run_.clock.progress * POINTS)  # type: ignore[union-attr]
        if part > len(self.values_):
            for i in range(len(self.values_) + 1, part + 1):
                self.values_[f"noise_scale_at_{i / POINTS:g}"] = _written(self.noise_scale())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs and (value := _written(self.noise_scale())) is not None:
            logs["accel/noise_scale"] = state.log_history[-1]["accel/noise_scale"] = value

    def report(self) -> Mapping[str, Any]:
        """Report the noise scale at tenths of the run and at its end, with advice about the batch."""
        run: Any = self.run_
        value, measured = self.noise_scale(), int(self.means_[2])
        numbers = {"noise_scale": _written(value), "measured_steps": measured, **self.values_}
        return numbers | {"advice": advice(value, run.nominal_batch_size)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["measured_steps"] > 0


def advice(noise_scale: float | None, batch_size: int) -> str:
    """Compare a batch size with a noise scale, in a sentence."""
    if noise_scale is None:
        return "The noise scale was not measured: no step had two micro-batches."
    if math.isinf(noise_scale):
        return f"The noise hides the signal: steps of {batch_size} examples may be many times larger."
    above = f"Above about {noise_scale:.2g} examples a step, compute is wasted"
    if batch_size > 2 * noise_scale:
        return f"{above}; the present {batch_size} are too many."
    if batch_size > noise_scale / 2:
        return f"{above}; the present {batch_size} are about right."
    return f"{above}; the present {batch_size} leave room for more devices."


def _written(noise_scale: float | None) -> float | None:
    """Return None for infinity, which JSON cannot represent."""
    return noise_scale if noise_scale is not None and math.isfinite(noise_scale) else None


def _squared_norm(gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient.detach(), dtype=wide).square()
