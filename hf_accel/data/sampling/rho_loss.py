"""Train on the examples of each step that are learnable, worth learning and not yet learned.

A step is drawn as usual, and a forward pass computes its losses.  The step then trains on the share ``keep`` of its
examples with the highest

    reducible loss_i = loss_i - irreducible loss_i

The irreducible loss comes from a model trained on other data.  It is high for wrong labels and for the unknowable.  It
is read from a column of the training set.  Without a column, a smaller copy of the model (its first ``depth`` blocks)
is trained before training, on a random part ``holdout`` of the data.  AdamW trains the copy with the trainer's peak
learning rate, decayed to zero.  The copy judges the rest of the data, and only this rest trains the model.

Recommendation: Use RHOLoss if you train on noisy web data for many epochs, or have a column of irreducible losses for
many runs.
When to use: Noisy web data of many epochs, or a column of losses that serves many runs.  The authors need 18 times
fewer steps on Clothing-1M.
When not to use: Clean data.  Language models: no gain on BERT and T5 (https://arxiv.org/abs/2307.06440).  A
step of b examples at keep=0.1 costs 1 + 10/3 times as much as a plain one.  The smaller copy comes on top.
Differences from the paper: The smaller copy begins with the model's own weights.
References: Mindermann et al. (2022), Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet
Learnt, https://arxiv.org/abs/2206.07137.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_accel.batch import StepPlan
from hf_accel.features.columns import check_indexable, numbers
from hf_accel.features.scores import (
    WHOLE_WEIGHTS,
    check_scores,
    check_whole_weights,
    head_for,
    losses_and_outputs,
    reader_for,
    score_examples,
)
from hf_accel.features.static_subset import rows_of
from hf_accel.losses import weighted_mean
from hf_accel.preserve import random_state_kept
from hf_accel.technique import Technique


def highest(values_B: Tensor, keep: float) -> Tensor:
    """Return the positions, ascending, of the highest share ``keep`` of the values; of equal ones, the first."""
    ranked_B = values_B.argsort(descending=True, stable=True)
    return ranked_B[: max(round(keep * len(values_B)), 1)].sort().values


def shallower(model: Any, depth: float) -> Any:
    """Copy a model with the first of its blocks, or with all if its blocks differ."""
    small = copy.deepcopy(model)
    small._forward_pre_hooks.clear()  # hooks on the model must not see the copy
    small._forward_hooks.clear()
    number = getattr(getattr(small, "config", None), "num_hidden_layers", 0)
    kept = max(round(depth * number), 1)
    for blocks in [m for m in small.modules() if isinstance(m, nn.ModuleList) and len(m) == number]:
        if len({tuple(p.shape for p in block.parameters()) for block in blocks}) == 1:
            del blocks[kept:]
            small.config.num_hidden_layers = kept
    return small


@dataclass(eq=False)
class RHOLoss(Technique):
    """Train on the share of each step with the largest loss beyond that of another model.

    The batch size is the size of the drawn step.  Multiply it by 1 / keep to train on as many examples as before.

    Args:
        keep: Share of a drawn step to train on, in (0, 1].
        column: Column of the training set with the irreducible loss of each example; None: train a smaller copy of the
            model.
        holdout: Share of the examples that train the smaller copy, in (0, 1); unused with a column.
        epochs: Epochs of the smaller copy, at least 1.
        depth: Share of the model's blocks in the smaller copy, in (0, 1].
    """

    keep: Annotated[float, at.Interval(gt=0, le=1)] = 0.1  # the authors' (percent_train in their configurations)
    column: str | None = None
    holdout: Annotated[float, at.Interval(gt=0, lt=1)] = 0.1  # not taken from a paper
    epochs: Annotated[int, at.Ge(1)] = 3  # not taken from a paper
    depth: Annotated[float, at.Interval(gt=0, le=1)] = 0.5  # not taken from a paper
    fidelity: ClassVar = "lossy"
    neutral: ClassVar = {"keep": 1.0}
    refused_backends: ClassVar = WHOLE_WEIGHTS
    expected_failed_checks: ClassVar = {
        "two_ranks_equal_one[ddp]": "a step of fewer examples than ranks computes our loss in the weights' precision. "
        "One process computes the model's loss in float32. Weights differ by 7e-7"
    }
    variations: ClassVar = {"keep": 0.5, "column": "score"}
    counters: ClassVar = ("irreducible_N", "judged", "kept")

    def prepare_dataset(self, dataset: Any) -> Any:
        """Hold out the examples of the smaller copy."""
        run: Any = self.run_
        check_indexable(dataset, self)
        if self.keep == 1 or self.column is not None:
            return dataset
        shuffled_N = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(run.args.seed))
        held = max(round(self.holdout * len(dataset)), 1)
        if held == len(dataset):
            raise ValueError(f"{self!r} would hold out all of {len(dataset)} examples. Set a smaller holdout.")
        self.held_ = rows_of(dataset, shuffled_N[:held].sort().values)
        return rows_of(dataset, shuffled_N[held:].sort().values)

    def inspect_dataset(self, dataset: Any) -> None:
        """Find the irreducible losses; a resumed run keeps those of its checkpoint."""
        self.judged_, self.kept_ = 0, 0
        self.irreducible_N_ = torch.empty(0)
        if self.keep == 1:
            return
        if self.column is not None:
            self.irreducible_N_ = numbers(dataset, self.column, self).float()
        elif (state := self.run_.resumed_state(self)) is not None:
            self.load_state_dict("global", state)
        else:
            head, small = head_for(self), self._train_small(self.held_)
            self.irreducible_N_ = score_examples(
                self,
                dataset,
                lambda inputs, n: losses_and_outputs(head, small, inputs, n)[0].per_example(n),
                model=small,
            )
        check_scores(self.irreducible_N_, len(dataset), self)

    def _train_small(self, held: Any) -> nn.Module:
        """Train the smaller copy on the held-out examples; every rank trains the same one."""
        run: Any = self.run_
        check_whole_weights(self)
        args, head, reader = run.args, head_for(self), reader_for(run, held)
        small = shallower(run.model, self.depth)
        small.train()
        parameters = [p for p in small.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
        size, rows = run.nominal_batch_size, min(run.micro_batch_size, run.args.train_batch_size)
        # Gradients in float16 would need a scaler.
        precision = contextlib.nullcontext if args.fp16 else run.accelerator.autocast
        steps = math.ceil(len(held) / size) * self.epochs
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        with random_state_kept(args.device):
            torch.manual_seed(args.seed)
            for epoch in range(self.epochs):
                shuffled_N = torch.randperm(len(held), generator=torch.Generator().manual_seed(args.seed + epoch))
                for ids_B in shuffled_N.split(size):
                    batch = reader[StepPlan(epoch, ids_B, None, rows, seed=args.seed)]
                    micros = [(send_to_device(m.inputs, args.device), len(m.ids_B)) for m in batch.micro_batches]
                    items_K = torch.stack([head.count(inputs, number) for inputs, number in micros]).sum(0)
                    for inputs, number in micros:
                        with precision():
                            example, _ = losses_and_outputs(head, small, inputs, number)
                            loss = weighted_mean(example, items_K)
                        loss.backward()
                    if args.max_grad_norm:
                        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    decay.step()
                    optimizer.zero_grad()
        return small

    def needs_step_losses(self) -> bool:
        return self.keep < 1

    def step_select(self, ids_B: Tensor, losses_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keep the examples with the highest reducible loss."""
        if self.keep == 1:
            return torch.arange(len(ids_B)), None
        positions = highest(losses_B - self.irreducible_N_[ids_B], self.keep)
        self.judged_, self.kept_ = self.judged_ + len(ids_B), self.kept_ + len(positions)
        return positions, None

    def report(self) -> Mapping[str, Any]:
        """Report the share of drawn examples that was trained on, and the mean irreducible loss."""
        mean = float(self.irreducible_N_.mean()) if len(self.irreducible_N_) else 0.0
        return {"kept": self.kept_ / self.judged_ if self.judged_ else 1.0, "irreducible_loss": mean}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
