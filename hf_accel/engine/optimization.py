"""The update: parameter groups, the optimizer and the learning rate, as the techniques and the clock say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_accel.engine.hosting import Hosting

REWARMED = 0.02
"""Share of what a run that goes on may spend in which it returns to its schedule.  Ibrahim et al. (2024), Simple and
scalable strategies to continually pre-train large language models, https://arxiv.org/abs/2403.08763: that a finished
run is warmed up anew matters, how long does not, from nothing to 2 %."""


def entered(shape: Callable[[float], float], progress: float, rate: float) -> Callable[[float], float]:
    """The schedule of a run that begins at a progress above 0, where the learning rate was ``rate`` of its peak.

    Its own warm-up is over.  From the rate as it was, it returns to the schedule in a straight line: nothing is to
    return to from a run that had not begun to cool down.
    """
    peak = max(range(1001), key=lambda i: (shape(i / 1000), -i)) / 1000

    def factor(now: float) -> float:
        returned = min((now - progress) / max((1 - progress) * REWARMED, 1e-9), 1.0)
        return rate + (shape(max(now, peak)) - rate) * returned

    return factor


class Updating(Hosting):
    """Answers Trainer where it makes the optimizer and the schedule."""

    def create_optimizer(self, model=None):
        owner = self._owners["optimizer"]
        asked = [t for t in self.techniques if t.implemented_hooks() & {"optimizer", "parameter_rules"}]
        if asked and self.optimizer is not None and not self._made_optimizer:
            raise ValueError(
                f"optimizer ({type(self.optimizer).__name__}): it was given, so {asked[0]!r} has no say in it. "
                "Leave one of the two out."
            )
        if self.optimizer is not None or not asked:
            return super().create_optimizer(model)
        self._made_optimizer = True
        model = self.model if model is None else model
        groups = self._parameter_groups(model)
        if owner is not None:
            self.optimizer = owner.optimizer(model, groups)
        else:
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            kwargs = dict(kwargs)
            of_modules = kwargs.pop("optimizer_dict", None)  # SentenceTransformerTrainer's groups, by module
            own_groups = "params" in kwargs or isinstance(of_modules, dict)
            own_groups = own_groups or bool(getattr(self.args, "learning_rate_mapping", None))
            if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or own_groups:
                raise ValueError(
                    f"optim={self.args.optim}: it makes its own parameter groups. Choose another optimizer."
                )
            self.optimizer = cls([{k: v for k, v in g.items() if k != "names"} for g in groups], **kwargs)
            if "bitsandbytes" in str(cls) and kwargs.get("optim_bits") == 8:  # as Trainer does
                from bitsandbytes.optim import GlobalOptimManager

                for module in model.modules():
                    if isinstance(module, nn.Embedding):
                        GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by weight decay and by what the techniques say of each."""
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            rules = [t.parameter_rules(name, parameter) for t in self.with_hook("parameter_rules")]
            lr = self.args.learning_rate * math.prod(rule.get("lr", 1.0) for rule in rules)
            decay = self.args.weight_decay if name in decayed else 0.0
            decay *= math.prod(rule.get("weight_decay", 1.0) for rule in rules)
            key = (lr, decay, "/".join(str(rule["group"]) for rule in rules if "group" in rule))
            group = groups.setdefault(
                key, {"params": [], "names": [], "lr": lr, "weight_decay": decay, "group": key[2]}
            )
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def create_scheduler(self, num_training_steps, optimizer=None):
        owner = self._owners["schedule"]
        if owner is not None and self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise ValueError(
                f"lr_scheduler ({type(self.lr_scheduler).__name__}): it was given, and {owner!r} is the schedule. "
                "Leave one of the two out."
            )
        if not self.paced or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        shape = self._named_shape(optimizer) if owner is None else owner.schedule
        if self.continuation_point is not None:
            shape = entered(shape, *self.continuation_point)
        self.learning_rate_factor = shape
        self.lr_scheduler = LambdaLR(optimizer, lambda _: shape(self.clock.progress))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.paced or self._resumed is None or "clock" not in self._resumed:
            return
        if self._resumed["clock"]["limits"] != dict(self.clock.limits):
            # What was spent is another share of this budget, with another learning rate.
            scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
            scheduler._last_lr = [b * f(0) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _named_shape(self, optimizer: torch.optim.Optimizer) -> Callable[[float], float]:
        """Trainer's named schedule as a function of progress."""
        steps = self.nominal_steps or 10_000
        # Some schedules divide by the peak that the optimizer was made with.
        peak = getattr(optimizer, "defaults", {}).get("lr", self.args.learning_rate)
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak),
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        factor = scheduler.lr_lambdas[0]  # type: ignore[union-attr]

        def shape(progress: float) -> float:
            step = progress * steps
            # At whole steps, exactly Trainer's value.
            return factor(round(step) if abs(step - round(step)) < 1e-6 else step)

        return shape
