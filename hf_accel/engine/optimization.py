"""Make parameter groups, the optimizer and the learning-rate schedule from techniques and the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_accel.clock import Clock
from hf_accel.engine.roster import Roster
from hf_accel.host.view import TrainerView

REWARMED = 0.02
"""Share of the further budget in which a continued run returns to its schedule.

A finished run must be warmed up again; the length, from nothing to 2 %, does not matter.  Source: Ibrahim et al.
(2024), Simple and scalable strategies to continually pre-train large language models,
https://arxiv.org/abs/2403.08763."""

Shape = Callable[[float], float]
"""Factor on the peak learning rate as a function of progress."""


def entered(shape: Shape, progress: float, rate: float) -> Shape:
    """Return the schedule of a run that begins at a progress above 0, with ``rate`` times its peak learning rate.

    The run skips its own warm-up.  The rate returns to the schedule in a straight line; if the earlier run had not
    started to decay, it is already there.
    """
    peak = max(range(1001), key=lambda i: (shape(i / 1000), -i)) / 1000

    def factor(now: float) -> float:
        returned = min((now - progress) / max((1 - progress) * REWARMED, 1e-9), 1.0)
        return rate + (shape(max(now, peak)) - rate) * returned

    return factor


class Optimization:
    """Make the optimizer and the schedule of one call of ``train()``."""

    def __init__(self, host: TrainerView, roster: Roster, clock: Clock):
        self.host, self.roster, self.clock = host, roster, clock
        self.nominal_steps: int | None = None
        self.learning_rate_factor: Shape | None = None
        self.continuation_point: Sequence[float] | None = None
        """Progress and share of the peak learning rate at the end of an earlier run."""

    def make_optimizer(self, model: Any, plain: Callable[[Any], Any], made: bool) -> Any:
        """Return the optimizer; ``plain`` is Trainer's own method, and ``made`` is True if the present one is ours."""
        host, owner = self.host, self.roster.owner("optimizer")
        asked = [t for t in self.roster.techniques if t.implemented_hooks() & {"optimizer", "parameter_rules"}]
        if asked and host.optimizer is not None and not made:
            raise ValueError(
                f"{asked[0]!r} does not support a ready-made optimizer ({type(host.optimizer).__name__}) because "
                "its parameter groups are fixed. Remove one of the two."
            )
        if host.optimizer is not None or not asked:
            return plain(model)
        model = host.model if model is None else model
        groups = self.parameter_groups(model)
        host.optimizer = self._of_arguments(model, groups) if owner is None else owner.optimizer(model, groups)
        return host.optimizer

    def makes_optimizer(self) -> bool:
        """Return whether this class makes the optimizer, instead of Trainer."""
        return bool(self.roster.answered & {"optimizer", "parameter_rules"})

    def _of_arguments(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer that the arguments name, with our parameter groups."""
        host = self.host
        cls, kwargs = host.optimizer_cls_and_kwargs or host.get_optimizer_cls_and_kwargs(host.args, model)
        kwargs = dict(kwargs)
        of_modules = kwargs.pop("optimizer_dict", None)  # SentenceTransformerTrainer's groups, by module
        own_groups = "params" in kwargs or isinstance(of_modules, dict)
        own_groups = own_groups or bool(getattr(host.args, "learning_rate_mapping", None))
        if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or own_groups:
            raise ValueError(f"optim={host.args.optim} makes its own parameter groups. Choose another optimizer.")
        optimizer = cls([{k: v for k, v in g.items() if k != "names"} for g in groups], **kwargs)
        if "bitsandbytes" in str(cls) and kwargs.get("optim_bits") == 8:  # as Trainer does
            from bitsandbytes.optim import GlobalOptimManager

            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
        return optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group trainable parameters by weight decay and by the techniques' rules."""
        args = self.host.args
        decayed = set(self.host.get_decay_parameter_names(model))
        groups: dict[tuple, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            rules = [t.parameter_rules(name, parameter) for t in self.roster.with_hook("parameter_rules")]
            lr = args.learning_rate * math.prod(rule.get("lr", 1.0) for rule in rules)
            decay = args.weight_decay if name in decayed else 0.0
            decay *= math.prod(rule.get("weight_decay", 1.0) for rule in rules)
            key = (lr, decay, "/".join(str(rule["group"]) for rule in rules if "group" in rule))
            group = groups.setdefault(
                key, {"params": [], "names": [], "lr": lr, "weight_decay": decay, "group": key[2]}
            )
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def make_scheduler(self, num_training_steps: int, optimizer: Any, plain: Callable[..., Any]) -> Any:
        """Return the schedule; ``plain`` is Trainer's own method to make it.

        A schedule made before ``train()`` counts steps, because the clock stands; ``train()`` makes another.
        """
        host, owner = self.host, self.roster.owner("schedule")
        if owner is not None and host.lr_scheduler is not None and not host.created_lr_scheduler:
            raise ValueError(
                f"{owner!r} does not support a ready-made lr_scheduler ({type(host.lr_scheduler).__name__}) because "
                "a run has one schedule. Remove one of the two."
            )
        named_early = owner is None and not host.is_in_train
        if (
            not self.roster.paced
            or named_early
            or host.lr_scheduler is not None
            or host.overrides("create_scheduler") is not None
        ):
            return plain(num_training_steps, optimizer)
        if owner is not None and not isinstance(factor := owner.schedule(self.clock.progress), int | float):
            raise ValueError(f"{owner!r}: schedule returned {factor!r}. Return a factor on the learning rate.")
        optimizer = optimizer or host.optimizer
        shape = self._named_shape(optimizer) if owner is None else owner.schedule
        if self.continuation_point is not None:
            shape = entered(shape, *self.continuation_point)
        self.learning_rate_factor = shape
        host.lr_scheduler = LambdaLR(optimizer, lambda _: shape(self.clock.progress))
        host.created_lr_scheduler = True
        return host.lr_scheduler

    def rescale_learning_rate(self) -> None:
        """Set the learning rate for the new progress after a resume under another budget."""
        scheduler: Any = getattr(self.host.lr_scheduler, "scheduler", self.host.lr_scheduler)
        scheduler._last_lr = [b * f(0) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(self.host.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def share_of_peak(self) -> float | None:
        """Return the current learning rate divided by its peak, or None if it does not follow the clock."""
        scheduler: Any = getattr(self.host.lr_scheduler, "scheduler", self.host.lr_scheduler)
        peak = getattr(scheduler, "base_lrs", [0.0])[0]
        return scheduler.get_last_lr()[0] / peak if self.roster.paced and peak else None

    def _named_shape(self, optimizer: torch.optim.Optimizer) -> Shape:
        """Return Trainer's named schedule as a function of progress."""
        args, steps = self.host.args, self.nominal_steps or 10_000
        # Some schedules divide by the optimizer's initial learning rate.
        peak = getattr(optimizer, "defaults", {}).get("lr", args.learning_rate)
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        factor = scheduler.lr_lambdas[0]  # type: ignore[union-attr]

        def shape(progress: float) -> float:
            step = progress * steps
            # Return exactly Trainer's value at whole steps.
            return factor(round(step) if abs(step - round(step)) < 1e-6 else step)

        return shape
