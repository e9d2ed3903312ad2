"""Carry a learning rate over from one batch size to another.

The mean of more examples has less noise, and allows a longer step.  With kappa = examples of a step / reference_batch,
counted over micro-batches and ranks,

    lr' = kappa * lr                                             rule "linear", for SGD
    lr' = sqrt(kappa) * lr                                       rule "sqrt", for Adam and its kind
    lr' = sqrt(kappa) * lr,  eps' = eps / sqrt(kappa),
    1 - beta1' = kappa * (1 - beta1),  1 - beta2' = kappa * (1 - beta2)        rule "sde", for Adam

If noise outweighs the gradient, Adam follows the same path per example only under the rule "sde": its memory covers the
same number of examples.  The rule ends where kappa * (1 - beta1) reaches 1, at kappa = 10 for the usual 0.9.

The rule scales the rate of every parameter group, whatever technique makes the optimizer.  A log message lists each
change.  If a technique varies the batch, the nominal batch size counts.

Recommendation: Use LearningRateScaling if you run a recipe on more or fewer devices than it was tuned for.
When to use: A recipe that was tuned at one batch size and runs on more or fewer devices.
When not to use:
- A rate that was tuned at the current batch size.
- Batches far above the critical batch size, the noise scale of the gradient.  There, more examples hardly make a better
  step, and the rules overstate the rate.
Defaults: The square root is Krizhevsky's, and the reference batch is that of Goyal et al.
Differences from the paper: None.
Example: LearningRateScaling(rule="sqrt", reference_batch=256)
References: Goyal et al. (2017), Accurate, large minibatch SGD, https://arxiv.org/abs/1706.02677 (linear); Krizhevsky
(2014), One weird trick for parallelizing convolutional neural networks, https://arxiv.org/abs/1404.5997 (square root);
Malladi et al. (2022), On the SDEs and scaling rules for adaptive gradient algorithms, https://arxiv.org/abs/2205.10287.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_accel.technique import Technique

logger = logging.get_logger(__name__)


def rate_factor(kappa: float, rule: Literal["linear", "sqrt", "sde"]) -> float:
    """Return the factor on the learning rate."""
    return kappa if rule == "linear" else math.sqrt(kappa)


def sde_settings(kappa: float, beta1: float, beta2: float, epsilon: float) -> tuple[float, float, float]:
    """Return Adam's betas and epsilon by the rule "sde"."""
    return 1 - kappa * (1 - beta1), 1 - kappa * (1 - beta2), epsilon / math.sqrt(kappa)


@dataclass(eq=False)
class LearningRateScaling(Technique):
    """Scale the learning rate, and with "sde" Adam's betas and epsilon, with the batch size.

    Args:
        rule: ``"linear"``, ``"sqrt"`` or ``"sde"``.
        reference_batch: Examples of an update, at least 1, for which ``learning_rate`` and the betas were chosen.
        critical_batch: Examples of an update above which a warning is logged; None if unknown.
    """

    rule: Literal["linear", "sqrt", "sde"] = "sqrt"
    reference_batch: Annotated[int, at.Ge(1)] = 256  # Goyal's
    critical_batch: Annotated[int, at.Ge(1)] | None = None
    variations: ClassVar = {"critical_batch": 1}

    def prepare_args(self, args: TrainingArguments) -> TrainingArguments:
        """Log what will be scaled, and set Adam's betas and epsilon."""
        self._refuse_unknown_batches(args)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        kappa = batch / self.reference_batch
        changes = [_change("learning_rate", args.learning_rate, args.learning_rate * rate_factor(kappa, self.rule))]
        if self.rule == "sde":
            self._refuse_where_the_rule_ends(args, kappa)
            names = ("adam_beta1", "adam_beta2", "adam_epsilon")
            before = [getattr(args, name) for name in names]
            for name, old, new in zip(names, before, sde_settings(kappa, *before), strict=True):
                setattr(args, name, new)
                changes.append(_change(name, old, new))
        if args.process_index == 0:
            logger.warning(
                f"{self!r}: a step takes {batch} examples, {kappa:g} times the reference batch. " + "; ".join(changes)
            )
            if self._above_critical(batch):
                logger.warning(
                    f"{self!r}: {batch} examples are more than the critical batch: they hardly make a better step than "
                    f"{self.critical_batch}, and the rule overstates the learning rate. Use fewer."
                )
        return args

    def _refuse_unknown_batches(self, args: TrainingArguments) -> None:
        """Raise if the arguments do not tell how many examples a step takes."""
        assert self.run_ is not None
        accelerator_config: Any = args.accelerator_config
        if args.auto_find_batch_size and not self.run_.streamed:
            raise ValueError(
                f"{self!r} does not support auto_find_batch_size=True because it changes the examples of a step when "
                "memory runs out. Set micro_batch_size='auto' of the trainer instead."
            )
        if accelerator_config.split_batches:
            raise ValueError(
                f"{self!r} does not support accelerator_config.split_batches=True because it changes how many examples "
                "a step takes. Set split_batches=False."
            )
        if args.parallelism_config is not None:
            raise ValueError(
                f"{self!r} does not support parallelism_config because ranks share examples. Set learning_rate for "
                "your batch, and remove LearningRateScaling."
            )

    def _refuse_where_the_rule_ends(self, args: TrainingArguments, kappa: float) -> None:
        assert self.run_ is not None
        makers = [repr(owner) for owner in [self.run_.owner("optimizer")] if owner is not None]
        optim = OptimizerNames(args.optim).value
        if not optim.startswith(("adamw", "paged_adamw")):
            makers.append(f"{optim=}")
        if makers:
            raise ValueError(
                f"{self!r} does not support {makers[0]} because this rule holds for Adam only. Use rule='sqrt'."
            )
        for name in ("adam_beta1", "adam_beta2"):
            if kappa > 1 and kappa * (1 - getattr(args, name)) >= 1:
                raise ValueError(
                    f"{self!r} does not support {kappa:g} times the reference batch because "
                    f"{name}={getattr(args, name):g} would become {1 - kappa * (1 - getattr(args, name)):g}. "
                    "Use fewer examples per step, or rule='sqrt'."
                )

    def _above_critical(self, batch: int) -> bool:
        return self.critical_batch is not None and batch > self.critical_batch

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the factor of the rule, for every parameter."""
        assert self.run_ is not None
        return {"lr": rate_factor(self.run_.nominal_batch_size / self.reference_batch, self.rule)}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        assert self.run_ is not None
        if self.rule == "sde" and self.run_.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"{self!r} does not support optimizer_cls_and_kwargs because it may hold Adam's betas. "
                "Set optim instead."
            )
        self.batch_ = self.run_.nominal_batch_size
        adam = {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "epsilon": args.adam_epsilon}
        self.adam_ = adam if self.rule == "sde" else {}

    def report(self) -> Mapping[str, Any]:
        """Report the examples of a step, the factor on the learning rate, and Adam's changed settings."""
        factor = rate_factor(self.batch_ / self.reference_batch, self.rule)
        above = self._above_critical(self.batch_)
        return {"batch": self.batch_, "lr_factor": factor, "above_critical": above} | self.adam_

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["lr_factor"] != 1


def _change(name: str, old: float, new: float) -> str:
    return f"{name}: {old:g} -> {new:g}"
