"""Train in rounds: ranks take steps by themselves, and meet every few steps.

This module handles the common duties of such techniques.  Between two meetings the ranks' weights differ.  So
evaluations and checkpoints that are due move to the next meeting, and the run ends with one.  Each rank's optimizer has
its own state, and checkpoints keep all of them; Trainer would keep only that of the first rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch.distributed as dist
from torch import Tensor

from hf_accel.technique import State, Technique
from hf_accel.weights import buffers, local_parameters

MOVED = ("should_evaluate", "should_save")
"""Requests of Trainer after a step that wait for the next meeting."""


@dataclass(eq=False)
class Rounds(Technique):
    """Let ranks train apart and meet every few steps; base of `LocalSGD` and `DiLoCo`."""

    every: Annotated[int, at.Gt(0)] = 20
    refused_backends: ClassVar = {
        "fsdp2": "no rank has the whole weights",
        "zero": "no rank has the whole weights",
    }

    counters: ClassVar = ("steps", "meetings", "bytes")
    probe_fields: ClassVar = {"every": 4}
    expected_failed_checks: ClassVar = {"two_ranks_equal_one[ddp]": "each rank trains by itself"}

    def meet(self, weights: Mapping[str, Tensor]) -> None:
        """Replace this rank's weights, in place, by common ones; every rank calls it at the same step."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        run: Any = self.run_
        if run.is_deepspeed_enabled or run.is_fsdp_enabled:
            raise ValueError(
                f"{self!r} does not support FSDP or DeepSpeed because {self.refused_backends['zero']}. Use DDP."
            )
        if args.world_size > 1:
            for technique in run.techniques:
                if technique.decides_by_weights or technique.implemented_hooks() & {"accept_step", "averaging"}:
                    raise ValueError(
                        f"{self!r} does not support {technique!r}, which would decide differently on each rank, "
                        "because the ranks' weights differ between meetings. Remove one of the two."
                    )
        self.names_ = list(local_parameters(run.model))  # some may be frozen between two meetings
        self.steps_, self.meetings_, self.bytes_ = 0, 0, 0
        self.due_: set[str] = set()

    def synchronize(self) -> bool:
        """Return False: gradients stay with their rank."""
        return False

    def on_step_end(self, args, state, control, **kwargs):
        run: Any = self.run_
        self.steps_ += 1
        if self.steps_ % self.every == 0 or self._ended(state, control):
            self.meetings_ += 1
            weights = local_parameters(run.model, trainable_only=False)
            self.meet({name: weights[name] for name in self.names_})
            saved = run.model.state_dict()
            for name, buffer in buffers(run.model).items():
                if name in saved and buffer.is_floating_point():  # statistics of batch normalization, not constants
                    buffer.copy_(self.mean(buffer))
            control.should_evaluate |= "should_evaluate" in self.due_
            control.should_save |= "should_save" in self.due_
            self.due_.clear()
        else:
            self._postpone(args, control)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.steps_ % self.every and not self._ended(state, control):
            self._postpone(args, control)
        return control

    def _ended(self, state: Any, control: Any) -> bool:
        """Return whether this step is the run's last."""
        run: Any = self.run_
        return control.should_training_stop or state.global_step >= state.max_steps or run.clock.done

    def _postpone(self, args: Any, control: Any) -> None:
        if args.world_size == 1:
            return  # all weights are equal
        for flag in MOVED:
            if getattr(control, flag):
                self.due_.add(flag)
                setattr(control, flag, False)

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over ranks, and count the bytes sent."""
        run: Any = self.run_
        if run.args.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        self.bytes_ += total.numel() * total.element_size()
        return total / run.args.world_size

    def state_dict(self, scope: Literal["global", "rank"]) -> State:
        run: Any = self.run_
        if scope == "global":
            return {**super().state_dict(scope), "ranks": run.args.world_size}
        if run.args.world_size == 1:
            return {}
        return {"optimizer": run.optimizer.state_dict()["state"]}

    def load_state_dict(self, scope: Literal["global", "rank"], state: State) -> None:
        run: Any = self.run_
        if scope == "global":
            if state["ranks"] != run.args.world_size:
                raise ValueError(
                    f"{self!r} does not support resuming on {run.args.world_size} ranks because the checkpoint has one "
                    f"optimizer for each of {state['ranks']} ranks. Resume on {state['ranks']}."
                )
            super().load_state_dict(scope, state)
        elif state:
            own = {int(index): values for index, values in state["optimizer"].items()}
            groups = run.optimizer.state_dict()["param_groups"]
            run.optimizer.load_state_dict({"state": own, "param_groups": groups})

    def report(self) -> Mapping[str, Any]:
        """Report how often the ranks met, and the bytes that each rank sent for it."""
        return {"meetings": self.meetings_, "bytes": self.bytes_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return 0 < report["meetings"] < self.steps_ or self.every == 1
