"""Layer freezing: stop training the earliest blocks, one after another.

A backward pass ends at the first trainable block, so a frozen block costs its forward pass only: about a third of a
trained one, and no optimizer update.  Of the model's L blocks, counted from the input, at most n = floor(L *
max_fraction) are frozen, at progress p

    schedule         block i = 0 ... n - 1 from p = start + (1 - start) i / n on
    gradient_norm    from ``start`` on, at each of ``checks`` equal distances, the blocks l, from the first trainable
                     one on, whose change | |g'_l| - |g_l| | / |g'_l| is below the quantile ``threshold`` of those of
                     the trainable blocks; |g_l| is the root mean square of the norm of a step's gradient since the
                     last check, |g'_l| that before it (as a callback of a plain Trainer, of the clipped gradient)
    plasticity       there, those of which P_l = |S'_l - S_l|^2 / n^2 has twice in a row been below ``threshold`` times
                     its largest value; S_l are the products of what the block makes of each two of n examples of the
                     training set, each row of length 1, now, and S'_l at the last check

The first of the blocks is given a detached input, so that the backward pass does not go on to the embeddings; with the
first block they stop learning, except as an output head with tied weights.

Reference: Brock et al. (2017), FreezeOut, https://arxiv.org/abs/1706.04983; Liu et al. (2021), AutoFreeze,
https://arxiv.org/abs/2102.01386; Wang et al. (2022), Egeria, https://arxiv.org/abs/2201.06227.  Departures: a learning
rate of its own for each block is left out; freezing starts late and ends at ``max_fraction``.  AutoFreeze takes the
norm of the sum of an interval's gradients, which needs a copy of them.  Egeria compares with a quantized model that
runs beside; here the reference is what the blocks made of the examples at the last check, averaged over positions, and
no block is trained again.

When to use: fine-tuning a pretrained encoder over several epochs; for the policies that look at the model their authors
report 19 to 43 % less time, and more where outputs of frozen blocks are cached (which this does not do).
When not to use: training from scratch, where others measured 5 % less time for 0.5 to 1 points of accuracy, and no gain
at equal quality; with ``torch.compile``, which compiles again at each change.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_accel.batch import StepPlan
from hf_accel.losses import widest
from hf_accel.preserve import random_state_kept
from hf_accel.stream.indexed import StepStream
from hf_accel.stream.reader import StepReader
from hf_accel.surgery.block_wrapper import refuse_waiting_ddp
from hf_accel.surgery.blocks import block_lists
from hf_accel.technique import Fraction, State, Technique

EXAMPLES = 16
"""Of the training set, on which plasticity is measured."""

THRESHOLDS = {"gradient_norm": 0.5, "plasticity": 0.2}
"""The authors' for each policy."""


def frozen_depth(progress: float, num_blocks: int, *, start: float, max_fraction: float) -> int:
    """Number of frozen blocks, counted from the input."""
    most = int(num_blocks * max_fraction + 1e-9)
    if progress < start:
        return 0
    return min(int(most * (progress - start) / (1 - start) + 1e-9) + 1, most)


def settled_by_gradient(norms_TL: Sequence[Sequence[float]], depth: int, threshold: float) -> int:
    """Number of blocks to freeze, given the norms of the blocks' gradients at every check, and how many are frozen."""
    if len(norms_TL) < 2 or depth == len(norms_TL[0]):
        return depth
    change_L = [abs(before - now) / before if before else 0.0 for before, now in zip(*norms_TL[-2:], strict=True)]
    limit = np.quantile(change_L[depth:], threshold)
    return next((i for i in range(depth, len(change_L)) if not change_L[i] < limit), len(change_L))


def settled_by_plasticity(plasticity_TL: Sequence[Sequence[float]], depth: int, threshold: float) -> int:
    """Number of blocks to freeze, given the blocks' plasticity at every check, and how many are frozen."""
    if len(plasticity_TL) < 2:
        return depth
    plasticity_LT = list(zip(*plasticity_TL, strict=True))
    settled_L = [max(of_block[-2:]) < threshold * max(of_block) for of_block in plasticity_LT]
    return next((i for i in range(depth, len(settled_L)) if not settled_L[i]), len(settled_L))


def similarities(activations_NH: Tensor) -> Tensor:
    """Of examples with each other, (N, N), each row of length 1 (Tung & Mori 2019)."""
    return F.normalize(activations_NH @ activations_NH.T)


def find_blocks(model: Any) -> nn.ModuleList:
    """The longest of the model's lists of blocks."""
    return max(block_lists(model).values(), key=len)


def detach_input(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: the hidden states, a block's first argument, reach it without their history."""
    if args:
        return (args[0].detach(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}


@dataclass(eq=False)
class LayerFreezing(Technique):
    """Freezes the blocks of a model from the input upwards; needs no more than a plain Trainer.

    Args:
        policy: What decides: the time, or whether a block still changes, by its gradient or by what it computes.
        start: Progress, in [0, 1), before which no block is frozen.
        max_fraction: Share of the blocks, in [0, 1], that are frozen at most; by the schedule at the end of training.
        threshold: In [0, 1]; below it a block has settled: for ``gradient_norm`` a quantile of the trainable blocks,
            for ``plasticity`` a share of the largest value; None: 0.5 and 0.2.
        checks: How many times in a run it is looked whether blocks have settled; at least 2.
    """

    policy: Literal["schedule", "gradient_norm", "plasticity"] = "schedule"  # costs nothing
    start: Annotated[float, at.Interval(ge=0, lt=1)] = 0.5  # AutoFreeze leaves early training alone
    max_fraction: Fraction = 0.5  # AutoFreeze: not past half of the blocks at first
    threshold: Fraction | None = None  # AutoFreeze: the median; Egeria: 0.2
    checks: Annotated[int, at.Ge(2)] = 20  # AutoFreeze: several in an epoch
    neutral: ClassVar = {"max_fraction": 0.0}
    expected_failed_checks: ClassVar = {
        "check_reentrant_checkpointing": "refused: blocks above frozen ones would get no gradient"
    }
    probe_fields: ClassVar = {"policy": "gradient_norm", "start": 0.25, "threshold": 0.75, "checks": 12}
    variations: ClassVar = {"start": 0.75, "threshold": 0.25}
    refused_backends: ClassVar = {"zero": "frozen weights go on moving in its flat partitions"}
    claims: ClassVar = frozenset({"frozen_blocks"})

    @property
    def decides_by_weights(self) -> bool:  # type: ignore[override]
        """Whether it looks at gradients or activations, and not at the clock alone."""
        return self.policy != "schedule"

    def on_train_begin(self, args, state, control, model: Any = None, train_dataloader: Any = None, **kwargs):
        if args.deepspeed_plugin is not None:
            raise ValueError(
                f"{self!r}: under DeepSpeed ZeRO, frozen weights go on moving. Use DDP or FSDP, or drop it."
            )
        refuse_waiting_ddp(self, args, model)
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                f"{self!r}: reentrant checkpointing gives no gradient to blocks above frozen ones. "
                "Set use_reentrant=False."
            )
        try:
            self.blocks_ = find_blocks(model)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        self.trainable_ = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks_]
        self.tied_ = _has_tied_head(model)
        self.hook_ = None
        self.depth_, self.steps_, self.frozen_steps_ = 0, 0, 0
        self.settled_, self.looks_, self.measured_ = 0, 0, []
        self.squares_ = torch.zeros(len(self.blocks_), dtype=widest(args.device), device=args.device)
        self.squared_steps_ = 0
        self.reference_: Tensor | None = None
        if self.policy == "plasticity":
            self.examples_ = self._examples(train_dataloader, args.seed)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._freeze(self._depth_at(self.progress(state), model))
        self.steps_ += 1
        self.frozen_steps_ += self.depth_

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.policy != "gradient_norm":
            return
        squares_L = torch.stack([_sum_of_squares(parameters, self.squares_) for parameters in self.trainable_])
        if args.world_size > 1:
            dist.all_reduce(squares_L)  # of shards, or as many times the whole: the ratio is the same
        if self.run_ is not None and args.max_grad_norm > 0:
            norm = self.run_.grad_norm
            norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm).to(squares_L)
            squares_L = squares_L * (norm / args.max_grad_norm).clamp(min=1).square()
        self.squares_ += squares_L.nan_to_num(0.0, posinf=0.0)  # in float16, gradients may be too large
        self.squared_steps_ += 1

    def _depth_at(self, progress: float, model: Any) -> int:
        most = {"start": self.start, "max_fraction": self.max_fraction}
        if self.policy == "schedule":
            return frozen_depth(progress, len(self.trainable_), **most)
        if (looks := int(progress * self.checks + 1e-9)) > self.looks_:
            self.looks_ = looks
            self._measure(model)
            if progress >= self.start:
                settled = settled_by_gradient if self.policy == "gradient_norm" else settled_by_plasticity
                threshold = THRESHOLDS[self.policy] if self.threshold is None else self.threshold
                depth = settled(self.measured_, self.settled_, threshold)
                self.settled_ = min(depth, frozen_depth(1.0, len(self.trainable_), **most))
        return self.settled_

    def _measure(self, model: Any) -> None:
        """What the policy judges the blocks by, since the last look; the same on every rank."""
        if self.policy == "gradient_norm":
            self.measured_.append((self.squares_ / max(self.squared_steps_, 1)).sqrt().tolist())
            self.squares_.zero_()
            self.squared_steps_ = 0
            return
        now_LNN = self._similarities(model)
        if self.reference_ is not None:
            self.measured_.append((now_LNN - self.reference_).square().mean((1, 2)).tolist())
        self.reference_ = now_LNN

    @torch.no_grad()
    def _similarities(self, model: Any) -> Tensor:
        """Of the examples, in what each block makes of them, (L, N, N), on the CPU."""
        activations: list[list[Tensor]] = [[] for _ in self.blocks_]

        def keep(block, args, output, i):
            hidden = output[0] if isinstance(output, tuple) else output
            activations[i].append(hidden.flatten(0, -2).mean(0).cpu().double())

        hooks = [block.register_forward_hook(functools.partial(keep, i=i)) for i, block in enumerate(self.blocks_)]
        modes = [(module, module.training) for module in model.modules()]
        with random_state_kept(model.device):
            model.eval()
            for inputs in self.examples_:
                inputs = {name: value.to(model.device) for name, value in inputs.items()}
                run = functools.partial(model, **inputs)
                run() if self.run_ is None else self.run_.count(inputs, run, needed=False)
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()
        return torch.stack([similarities(torch.stack(of_block)) for of_block in activations])

    def _examples(self, loader: Any, seed: int) -> list[dict[str, Tensor]]:
        """Some of the training set, each a batch of its own, the same on every rank and in a resumed run."""
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) < 2:
            raise ValueError(
                f"{self!r}: plasticity is measured on examples of the training set, which has no index or fewer than "
                "two. Take policy='gradient_norm'."
            )
        chosen_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(dataset))[:EXAMPLES])
        reader = loader.reader if isinstance(loader, StepStream) else StepReader(dataset, loader.collate_fn)
        return [micro.inputs for micro in reader[StepPlan(0, chosen_N, None, 1, 0, 1, seed)].micro_batches]

    def on_train_end(self, args, state, control, **kwargs):
        frozen = self.depth_
        self._freeze(0)
        self.depth_ = frozen

    def _freeze(self, depth: int) -> None:
        if depth == self.depth_:
            return
        for i, parameters in enumerate(self.trainable_):
            for parameter in parameters:
                parameter.requires_grad_(i >= depth)
                if i < depth:
                    parameter.grad = None  # optimizers pass over parameters without a gradient
        if depth > 0 and self.hook_ is None:
            self.hook_ = self.blocks_[0].register_forward_pre_hook(detach_input, with_kwargs=True)
        elif depth == 0 and self.hook_ is not None:
            self.hook_.remove()
            self.hook_ = None
        self.depth_ = depth

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        if scope == "rank":
            return {}
        state: dict[str, Any] = {"steps": self.steps_, "frozen_steps": self.frozen_steps_}
        if self.policy != "schedule":
            state |= {"settled": self.settled_, "looks": self.looks_, "measured": self.measured_}
        if self.policy == "gradient_norm":
            state |= {"squares": self.squares_.cpu(), "squared_steps": self.squared_steps_}
        if self.reference_ is not None:
            state["reference"] = self.reference_
        return state

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        if scope == "rank":
            return
        self.steps_, self.frozen_steps_ = state["steps"], state["frozen_steps"]
        if self.policy != "schedule":
            self.settled_, self.looks_, self.measured_ = state["settled"], state["looks"], list(state["measured"])
        if self.policy == "gradient_norm":
            self.squares_.copy_(state["squares"])
            self.squared_steps_ = state["squared_steps"]
        self.reference_ = state.get("reference")

    def report(self) -> Mapping[str, Any]:
        """Blocks frozen at the end, the share of frozen blocks over all steps, and what became of the embeddings."""
        num_blocks = len(self.trainable_)
        return {
            "frozen_blocks": self.depth_,
            "frozen_share": self.frozen_steps_ / max(self.steps_ * num_blocks, 1),
            "embeddings": "learn as the tied output head" if self.tied_ else "frozen with the first block",
        }

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["frozen_share"] > 0


def _has_tied_head(model: Any) -> bool:
    head: Any = model.get_output_embeddings()
    weight: Tensor | None = None if head is None else head.weight
    return weight is not None and weight is model.get_input_embeddings().weight


def _sum_of_squares(parameters: Sequence[nn.Parameter], like: Tensor) -> Tensor:
    """Of this rank's part of the gradients."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=like.dtype) for gradient in gradients]
    return sum((norm.square() for norm in norms), start=like.new_zeros(()))
