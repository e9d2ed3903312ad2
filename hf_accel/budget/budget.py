"""A budget: what the run may spend, in the user's own unit.

People guess ``max_steps``; the job is killed in mid-decay or ends early at a high learning rate.  With a budget the
learning rate and everything else that depends on "when" follow what was spent, and the run ends on time:

    progress = spent / limit,   stop when the next step would not fit

Seconds include compilation, evaluation and saving, and so do joules.  Operations (FLOPs) are those that ran, of the
forward and backward passes of all ranks: recomputed ones count, those of frozen blocks, dropped tokens and adapters do
as far as they are computed.  They are counted only where they are limited; a limit that is never reached has them
counted.  `LearningRateSearch` finds the rate within a share of the budget.

Reference: Li, Yumer and Ramanan (2020), Budgeted training, https://arxiv.org/abs/1905.04753; schedules on wall-clock
time: Izsak et al. (2021), https://arxiv.org/abs/2104.07705.  Departure: any unit, and several limits at once.

When to use: whenever the time, the number of tokens or the number of epochs is given.
When not to use: where runs must be bit-identical on machines of different speed, do not budget seconds.  Operations of
batches that all differ in shape are slow to count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hf_accel.clock import CONTINUOUS, UNITS, parse_budget
from hf_accel.meters.energy import EnergyMeter
from hf_accel.meters.flops import FlopMeter, peak_flops
from hf_accel.meters.job import job_seconds, passed_seconds
from hf_accel.technique import State, Technique


@dataclass(eq=False)
class Budget(Technique):
    """Ends the run when the limit is reached, with everything that follows progress at its end.

    Args:
        limit: An amount with a unit such as ``"30min"``, ``"2h"``, ``"500steps"``, ``"3epochs"``, ``"1e6samples"``,
            ``"1e9tok"``, ``"1e18flop"``, ``"50kJ"`` or ``"1.5kWh"``; or several, of which the first one reached ends
            the run.  ``"job"``: what the time limit of the job leaves, under Slurm.  ``"+30min"``: so much beyond what
            the run before it has spent, which is named by ``resume_from_checkpoint``.
    """

    limit: str | list[str] = "1epoch"
    fidelity: ClassVar = "exact"
    variations: ClassVar = {"limit": "2epochs"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.budget()

    def _texts(self) -> list[str]:
        texts = [self.limit] if isinstance(self.limit, str) else list(self.limit)
        return [text.strip() for text in texts]

    def budget(self) -> Mapping[str, float]:
        """The limits by unit."""
        texts = self._texts()
        further = [text.startswith("+") for text in texts]
        if len(set(further)) > 1 or "+job" in texts:
            raise ValueError(f"{self!r}: what comes on top of an earlier run, and what does not. Write all with a '+'.")
        pairs = [("seconds", job_seconds()) if t == "job" else parse_budget(t.removeprefix("+")) for t in texts]
        limits = dict(pairs)
        if not pairs or len(limits) < len(pairs):
            raise ValueError(f"{self!r}: each unit may be limited once, and at least one must be. Give other limits.")
        return limits

    def extends_previous_run(self) -> bool:
        return any(text.startswith("+") for text in self._texts())

    def meters(self) -> Mapping[str, Any]:
        """What counts operations, energy, and the seconds of a job."""
        limits, args = self.budget(), self.run_.args  # type: ignore[union-attr]
        meters: dict[str, Any] = {}
        if "flops" in limits:
            meters["flops"] = FlopMeter()
        if "joules" in limits:
            meters["joules"] = EnergyMeter(args.device, machine=args.local_process_index == 0)
        if "job" in self._texts():
            meters["seconds"] = passed_seconds
        return meters

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        clock = run.clock
        if "flops" in clock.limits:
            self.peak_ = peak_flops(args.device, _dtype_of(run))
        if run.resumed:
            over = clock.done or clock.seconds > clock.limits.get("seconds", float("inf"))
            if any(clock.share([float(over)])):
                raise ValueError(f"{self!r}: the run has spent it already. Give more.")
        else:
            self._refuse_too_little({"seconds": clock.seconds})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            run: Any = self.run_
            taken = run.first_step_cost()
            if "tokens" in run.clock.limits and not taken["tokens"]:
                raise ValueError(f"{self!r}: the batches hold no tokens. Give samples or epochs.")
            self._refuse_too_little(taken)

    def _refuse_too_little(self, taken: Mapping[str, float]) -> None:
        """Raise before the first update where it would be late, on every rank."""
        clock = self.run_.clock  # type: ignore[union-attr]
        fits = all(clock.can_afford(unit, amount) for unit, amount in taken.items() if unit in clock.limits)
        if not all(clock.share([float(fits)])):
            raise ValueError(
                f"{self!r}: one step, and the evaluation and the checkpoint after it, do not fit into it. Give more."
            )

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        meter = self.run_.meters.get("flops") if scope == "rank" else None  # type: ignore[union-attr]
        return {} if meter is None else {"flops": meter.state_dict()}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        if "flops" in state:
            self.run_.meters["flops"].load_state_dict(state["flops"])  # type: ignore[union-attr]

    def report(self) -> Mapping[str, Any]:
        """The share of the budget that was spent, by unit; where operations are counted, the share of what the device
        can do that the model needed."""
        run: Any = self.run_
        clock = run.clock
        spent = clock.spent | {u: clock.spent[u] + a for u, a in clock.excluded_cost.items() if u not in CONTINUOUS}
        spent["seconds"] = clock.seconds
        report = {f"{unit}_share": spent[unit] / limit for unit, limit in clock.limits.items()}
        if "flops" in clock.limits:
            report["utilization"] = clock.model_flops / (self.peak_ * run.args.world_size * clock.seconds)
        return report

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        """A limit was reached, and none was passed by more than a step."""
        return any(report.get(f"{unit}_share", 0.0) > 0.9 for unit in UNITS)


def _dtype_of(run: Any) -> torch.dtype:
    """What matrices are multiplied in."""
    if run.args.bf16:
        return torch.bfloat16
    return torch.float16 if run.args.fp16 else next(run.model.parameters()).dtype
