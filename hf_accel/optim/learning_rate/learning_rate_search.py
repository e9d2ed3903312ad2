"""LearningRateSearch: before training, find the peak learning rate with short runs on a copy of the model.

No other hyperparameter matters as much, and none is as often left at its default.  A range test, in which the rate
grows exponentially, says where to look; alone it proposes too much.  So runs of a small part of the horizon T follow,
with warm-up and decay inside it, first 4 to 7 rates a factor of 2 apart for a time t, then the best of them and its
neighbors, a factor of sqrt(2) away, for 2 t.  The best rate falls with the horizon, and training gets

    learning_rate = best * min(2 t / T, 1)^0.32

on the lattice 1e-3 x 2^(i/2), rounded toward the best.  All runs begin with the weights of the model and one seed, and
are judged by the loss of the same examples of the evaluation set (of the training set, where there is no other).

Reference: Smith (2017), Cyclical learning rates for training neural networks, arXiv:1506.01186, for the range test;
Jamieson and Talwalkar (2016), Non-stochastic best arm identification, arXiv:1502.07943, for halving; Bjorck et al.
(2025), Scaling optimal LR across token horizons, arXiv:2409.19913, for the exponent, of language models.

When to use: a new model, data set, batch size or optimizer, and one run to get it right.
When not to use: where the rate is known; where many runs follow (``hf-accel find-lr`` finds it once, with longer runs);
budgets of a few hundred updates, and models that learn nothing at first: shorter runs than that say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_accel.clock import CONTINUOUS
from hf_accel.optim.learning_rate.search import FoundRate, search
from hf_accel.technique import Positive, Technique


@dataclass(eq=False)
class LearningRateSearch(Technique):
    """Sets the peak learning rate to what a search on a copy of the model proposes.

    Where there is a `Budget`, the search takes its share of it, and training gets the rest; otherwise, training is as
    long as without it.

    Args:
        share: What the search may take, as a share of the run, above 0; below 1 where there is a `Budget`.
    """

    share: Positive = 0.25
    fidelity: ClassVar = "lossy"
    refused_backends: ClassVar = {
        "fsdp2": "short runs are of a copy of the whole model",
        "zero": "short runs are of a copy of the whole model",
    }
    variations: ClassVar = {"share": 4.0}
    counters: ClassVar = ("report",)

    def inspect_dataset(self, dataset: Any) -> None:
        """Search, or in a run that goes on, take what its first part found."""
        run: Any = self.run_
        if "learning_rate" in run.searched_hyperparameters:
            raise ValueError(
                f"{self!r} does not support a hyperparameter_search of learning_rate because both choose it. Remove "
                "learning_rate from hp_space, or LearningRateSearch."
            )
        if (state := run.resumed_state(self)) is not None:
            self.report_ = dict(state["report"])
        else:
            budgeted = run.owner("budget") is not None
            limits = {u: limit - run.clock.excluded_cost.get(u, 0.0) for u, limit in run.clock.limits.items()}
            if budgeted and self.share >= 1:
                raise ValueError(f"{self!r}: nothing of {run.owner('budget')!r} is left to train. Give less than 1.")
            found = search(run.engine, self.share, limits, kept=budgeted, asking=repr(self), without=[self])
            self.report_ = {
                "learning_rate": found.learning_rate,
                "given": found.given,
                "runs": found.runs,
                "steps": found.steps,
                "samples": found.samples,
                "evaluated": found.evaluated,
            }
            if budgeted:
                rest = {u: self.share * limit for u, limit in limits.items() if u not in CONTINUOUS}
                run.count_energy()
                run.clock.excluded_cost = rest | {"seconds": run.clock.seconds, "joules": run.clock.spent["joules"]}
        run.args.learning_rate = self.report_["learning_rate"]

    def report(self) -> Mapping[str, Any]:
        """The rate that was found, the one that was given, and what the search cost."""
        return dict(self.report_)

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["runs"] > 1


def find_lr(trainer: Any, *, share: float = 3.0, follow: Callable[[str], None] = lambda _: None) -> FoundRate:
    """Propose a peak learning rate for a trainer's whole run, by a range test and a sweep of short runs.

    The trainer, its model and the global random generators stay as they are.

    Args:
        trainer: An `AccelTrainer`, or one that `hf_accel.attach` equipped, before ``train()``.
        share: What the search may cost, in runs of the trainer's own length; the longest short runs are of about an
            eighth of it.
        follow: Is told of every short run that ended.
    """
    if not hasattr(trainer, "techniques"):
        raise ValueError(
            f"find_lr({type(trainer).__name__}): it hosts no techniques. Use AccelTrainer, or hf_accel.attach first."
        )
    if not 0 < share < float("inf"):
        raise ValueError(f"find_lr(share={share!r}): share must be > 0. Give, for example, 2.")
    own = [technique for technique in trainer.techniques if isinstance(technique, LearningRateSearch)]
    engine = trainer.accel
    limits = engine.limits()
    return search(engine, share, limits, kept=True, asking=f"find_lr(share={share:g})", without=own, follow=follow)
