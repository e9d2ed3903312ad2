"""Before training, find the peak learning rate with short runs on a copy of the model.

No other hyperparameter matters as much, and none is as often left at its default.  A range test, in which the rate
grows exponentially, tells where to look; alone it proposes too much.  So short runs follow, each over a small part of
the horizon T with warm-up and decay inside it.  The first 4 to 7 rates are a factor of 2 apart and train for a time t.
Then the best of them and its neighbors, a factor of sqrt(2) away, train for 2 t.  The best rate falls with the horizon,
and training gets

    learning_rate = best * min(2 t / T, 1)^0.32

on the lattice 1e-3 x 2^(i/2), rounded toward the best.  All runs begin with the weights of the model and one seed.
They are judged by the loss of the same examples of the evaluation set, or of the training set if there is no other.

Recommendation: Use LearningRateSearch if the model, data, batch size or optimizer is new and you have one run.
When to use: A new model, data set, batch size or optimizer, and one run to get it right.
When not to use:
- A known rate.
- Many runs that follow: ``hf-accel find-lr`` finds the rate once, with longer runs.
- Budgets of a few hundred updates, and models that learn nothing at first, because shorter runs say nothing.
Defaults: The share is not taken from a paper.
Differences from the paper: The range test only chooses the first rates of the short runs.  The exponent 0.32 is that of
language models, and is used for all models.
References: Smith (2017), Cyclical learning rates for training neural networks, arXiv:1506.01186, for the range test;
Jamieson and Talwalkar (2016), Non-stochastic best arm identification, arXiv:1502.07943, for halving; Bjorck et al.
(2025), Scaling optimal LR across token horizons, arXiv:2409.19913, for the exponent, of language models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_accel.clock import CONTINUOUS
from hf_accel.technique import Positive, Technique
from hf_accel.updates.learning_rates import FoundRate, search


@dataclass(eq=False)
class LearningRateSearch(Technique):
    """Set the peak learning rate to the result of a search on a copy of the model.

    With a `Budget`, the search takes its share of it, and training gets the rest.  Without one, training is as long as
    before.

    Args:
        share: Cost of the search, as a share of the run, above 0; below 1 with a `Budget`.
    """

    share: Positive = 0.25
    fidelity: ClassVar = "lossy"
    refused_backends: ClassVar = {
        "fsdp2": "short runs train a copy of the whole model",
        "zero": "short runs train a copy of the whole model",
    }
    variations: ClassVar = {"share": 4.0}
    counters: ClassVar = ("report",)

    def inspect_dataset(self, dataset: Any) -> None:
        """Search for the rate; in a resumed run, use the rate of its first part."""
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
                raise ValueError(f"{self!r} leaves nothing of {run.owner('budget')!r} for training. Set share below 1.")
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
        """Report the found rate, the given one, and the cost of the search."""
        return dict(self.report_)

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["runs"] > 1


def find_lr(trainer: Any, *, share: float = 3.0, follow: Callable[[str], None] = lambda _: None) -> FoundRate:
    """Propose a peak learning rate for a trainer's whole run, by a range test and a sweep of short runs.

    The trainer, its model and the global random generators do not change.

    Args:
        trainer: An `AccelTrainer`, or one that `hf_accel.attach` equipped, before ``train()``.
        share: Cost of the search, in runs of the trainer's own length; the longest short runs cost about an eighth
            of it.
        follow: Function that receives a line for every short run that ended.
    """
    if not hasattr(trainer, "techniques"):
        raise ValueError(
            f"find_lr does not support {type(trainer).__name__} because it hosts no techniques. Use AccelTrainer, or "
            "call hf_accel.attach first."
        )
    if not 0 < share < float("inf"):
        raise ValueError(f"find_lr(share={share!r}): share must be > 0. Set, for example, share=2.")
    own = [technique for technique in trainer.techniques if isinstance(technique, LearningRateSearch)]
    engine = trainer.accel
    limits = engine.limits().amounts
    return search(engine, share, limits, kept=True, asking=f"find_lr(share={share:g})", without=own, follow=follow)
