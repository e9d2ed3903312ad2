"""Limit a run in your own unit, and make everything that depends on progress follow it.

People guess ``max_steps``; then the job is killed in mid-decay, or ends early at a high learning rate.  With a budget,
the learning rate and everything else that depends on "when" follow the spent amount, and the run ends on time:

    progress = spent / limit,   stop when the next step would not fit

Seconds and joules include compilation, evaluation and saving.  FLOPs are those that ran, in the forward and backward
passes of all ranks.  Recomputed operations count.  Frozen blocks, dropped tokens and adapters count with their computed
operations only.  FLOPs are counted only if they are limited; add a limit that is never reached to count them.
`LearningRateSearch` finds the rate within a share of the budget.

Recommendation: Use Budget if your run has a fixed time, token count, epoch count or other limit.
When to use: Every run with a given time, number of tokens, number of epochs or other limit.
When not to use:
- Seconds, if runs must be bit-identical on machines of different speed.
- FLOPs, if all batches differ in shape: their operations are slow to count.
Defaults: One epoch, which is not taken from a paper.
Differences from the paper: A limit may have any unit, and there may be several.
Example: Budget("30min")
References: Li, Yumer and Ramanan (2020), Budgeted training, https://arxiv.org/abs/1905.04753; Izsak et al. (2021),
https://arxiv.org/abs/2104.07705, for schedules on wall-clock time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_accel.clock import CONTINUOUS, UNITS, Limits, parse_budget
from hf_accel.meters.flops import peak_flops
from hf_accel.meters.job import job_seconds, job_start
from hf_accel.technique import Technique


@dataclass(eq=False)
class Budget(Technique):
    """End the run when the limit is reached, with everything that follows progress at its end.

    Args:
        limit: An amount with a unit such as ``"30min"``, ``"2h"``, ``"500steps"``, ``"3epochs"``, ``"1e6samples"``,
            ``"1e9tok"``, ``"1e18flop"``, ``"50kJ"`` or ``"1.5kWh"``, or several.  The first limit reached ends the run.
            ``"job"`` is the rest of the job's time limit under Slurm.  ``"+30min"`` extends the finished run in
            ``resume_from_checkpoint`` by that amount.
    """

    limit: str | list[str] = "1epoch"
    fidelity: ClassVar = "exact"
    variations: ClassVar = {"limit": "2epochs"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.budget()

    def budget(self) -> Limits:
        """Return the limits; the seconds of a job count from its start."""
        given = self.limit if isinstance(self.limit, list | tuple) else [self.limit]
        if not all(isinstance(text, str) for text in given):
            raise ValueError(f"{self!r}: a limit must be text with a unit. Write, for example, '30min' or '500steps'.")
        texts = [text.strip() for text in given]
        further = [text.startswith("+") for text in texts]
        if len(set(further)) > 1 or "+job" in texts:
            raise ValueError(
                f"{self!r} does not support extensions ('+30min') beside absolute limits. "
                "Put '+' on all limits or on none."
            )
        pairs = [("seconds", job_seconds()) if t == "job" else parse_budget(t.removeprefix("+")) for t in texts]
        amounts = dict(pairs)
        if not pairs or len(amounts) < len(pairs):
            raise ValueError(f"{self!r}: each unit may be limited once, and at least one must be. Set other limits.")
        return Limits(amounts, extends=all(further), began=job_start() if "job" in texts else None)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        clock = run.clock
        if "flops" in clock.limits:
            self.peak_ = peak_flops(args.device, _dtype_of(run))
        if run.resumed:
            over = clock.done or clock.seconds > clock.limits.get("seconds", float("inf"))
            if any(clock.share([float(over)])):
                clock.done = True  # the trainer returns at once, as Trainer does
                if state.is_world_process_zero:
                    warnings.warn(
                        f"{self!r}: the run has spent this budget already, so nothing is trained. Set a larger one, or "
                        "extend the run in another output_dir by an amount such as '+30min'.",
                        stacklevel=2,
                    )
        else:
            self._refuse_too_little({"seconds": clock.seconds})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            run: Any = self.run_
            self._refuse_too_little(run.first_step_cost())

    def _refuse_too_little(self, taken: Mapping[str, float]) -> None:
        """Raise on every rank, before the first update, if the budget is too small for it."""
        clock = self.run_.clock  # type: ignore[union-attr]
        fits = all(clock.can_afford(unit, amount) for unit, amount in taken.items() if unit in clock.limits)
        if not all(clock.share([float(fits)])):
            raise ValueError(
                f"{self!r} is too small for one step and the evaluation and checkpoint after it. Set a larger limit."
            )

    def report(self) -> Mapping[str, Any]:
        """Report the spent share of the budget by unit.

        If FLOPs are counted, add the utilization: the model's FLOPs as a share of those that the device can do.
        """
        run: Any = self.run_
        clock = run.clock
        spent = clock.spent | {u: clock.spent[u] + a for u, a in clock.excluded_cost.items() if u not in CONTINUOUS}
        spent["seconds"] = clock.seconds
        report = {f"{unit}_share": spent[unit] / limit for unit, limit in clock.limits.items()}
        if "flops" in clock.limits:
            report["utilization"] = clock.model_flops / (self.peak_ * run.args.world_size * clock.seconds)
        return report

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """Return whether more than 0.9 of a limit was spent."""
        return any(report.get(f"{unit}_share", 0.0) > 0.9 for unit in UNITS)


def _dtype_of(run: Any) -> torch.dtype:
    """Return the dtype of matrix products."""
    if run.args.bf16:
        return torch.bfloat16
    return torch.float16 if run.args.fp16 else next(run.model.parameters()).dtype
