"""The search of a peak learning rate: a range test, then successive halving of short runs.

The range test is one short run in which the rate grows exponentially; it tells where to look.  The sweep trains for
short horizons, with the schedule of the run inside each: some rates a factor of 2 apart, then the best of them and its
neighbors, a factor of sqrt(2) away, for twice as long.  The best of these is good for its own horizon; for the whole
one it is scaled by (short / whole)^0.32.  Rates are those of the lattice 1e-3 x 2^(i/2), with whole i; the scaled one
is that of the lattice which is nearest on the side of the best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers import SchedulerType
from transformers.trainer_utils import has_length

from hf_accel.clock import CONTINUOUS
from hf_accel.engine.engine import Engine
from hf_accel.engine.short_run import ShortRun, many_runs, probe_of, short_run
from hf_accel.host.arguments import nominal_steps
from hf_accel.host.view import TrainerView
from hf_accel.technique import Technique

LOWEST, HIGHEST = 1e-6, 10.0
"""The rates of the range test."""
BRACKET = 4
"""Rates of the sweep, a factor of 2 apart, from that of the range test's lowest loss downwards."""
EXTENSIONS = 2
"""How many more rates are tried where the best one lies at an end of the bracket."""
LENGTHS = (1, 2)
"""Of the runs of the two rounds, in shortest runs."""
MOST_RUNS = (BRACKET + 1 + EXTENSIONS, 3)
"""Of each round."""
RUNS_COST = sum(number * length for number, length in zip(MOST_RUNS, LENGTHS, strict=True))
"""Of the whole sweep, in shortest runs, evaluations aside."""
EXPONENT = 0.32
"""How the best rate falls with the horizon."""
EVALUATED = 0.5
"""Examples of an evaluation, as a share of those that the run before it trained on."""
FORWARD = 1 / 3
"""What an evaluated example costs, as a share of one that is trained on."""


def rate_at(index: int) -> float:
    """The rate of a place of the lattice, to three digits."""
    return float(f"{1e-3 * 2 ** (index / 2):.3g}")


def index_of(rate: float) -> int:
    """The place of the lattice that is nearest to a rate."""
    return round(2 * math.log2(rate / 1e-3))


def divergence(losses: Sequence[float]) -> int | None:
    """The first step whose loss is not finite, or more than twice that of the beginning."""
    start = smoothed(losses)[0]
    return next((i for i, loss in enumerate(losses) if not math.isfinite(loss) or loss > 2 * start), None)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a window of an eighth of the losses around each."""
    reach = len(losses) // 16 + 1
    parts = [losses[max(i - reach, 0) : i + reach + 1] for i in range(len(losses))]
    return [sum(part) / len(part) for part in parts]


def bracket(rates: Sequence[float], losses: Sequence[float], given: float) -> list[int]:
    """Where the sweep begins, as places of the lattice: below the rate at which the range test's loss is lowest, and
    at the rate as given, where the range test did not diverge before it."""
    end = divergence(losses)
    means = smoothed(losses[:end])
    top = index_of(rates[min(range(len(means)), key=means.__getitem__)]) if means else index_of(LOWEST)
    found = [top - 2 * i for i in range(BRACKET)]
    if 0 < given < (math.inf if end is None else rates[end]):
        found.append(index_of(given))
    return sorted(set(found))


def best(losses: Mapping[int, float]) -> int:
    """The place of the lowest loss; of equal ones, of the lowest rate."""
    return min(losses, key=lambda index: (losses[index], index))


def halve(loss: Callable[[int, int], float], start: Sequence[int]) -> list[dict[int, float]]:
    """The two rounds of the sweep, from places of the lattice; ``loss(index, length)`` is that of a run, ``length``
    times as long as the shortest.  Their losses, infinite where they were not finite."""

    def tried(index: int, length: int) -> float:
        value = loss(index, length)
        return value if math.isfinite(value) else math.inf

    first = {index: tried(index, LENGTHS[0]) for index in start}
    for _ in range(EXTENSIONS):
        untried = [best(first) + move for move in (2, -2) if best(first) + move not in first]
        if not untried:
            break
        first[untried[0]] = tried(untried[0], LENGTHS[0])
    middle = best(first)
    return [first, {index: tried(index, LENGTHS[1]) for index in (middle - 1, middle, middle + 1)}]


def at_whole_horizon(index: int, share: float) -> int:
    """The place of the lattice for a whole run, of the best one for runs of a share of its horizon: lower by the whole
    places that the exponent asks for."""
    return index + math.trunc(min(2 * EXPONENT * math.log2(share), 0))


@dataclass
class FoundRate:
    """What a search of a learning rate found.

    Args:
        learning_rate: The proposed peak.
        given: The rate as it was.
        diverged_at: Where the range test diverged; None: nowhere.
        range_test: Rates, and the loss of the step at each.
        rounds: Of the sweep: the ``share`` of the horizon that its runs have, and the ``losses``, by rate.
        steps: Updates of all runs.
        samples: Examples that they trained on.
        evaluated: Examples that were evaluated.
        flops: As Trainer counts them, without those of evaluations.
        seconds: Wall seconds.
        horizon_steps: Updates of the run that the rate is for.
    """

    learning_rate: float = math.nan
    given: float = math.nan
    diverged_at: float | None = None
    range_test: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    samples: float = 0.0
    evaluated: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    horizon_steps: float = 0.0

    @property
    def cost(self) -> float:
        """What the search took, as a share of the run that the rate is for, in updates and evaluations."""
        evaluations = FORWARD * self.evaluated * self.steps / self.samples
        return (self.steps + evaluations) / self.horizon_steps

    @property
    def runs(self) -> int:
        """Short runs, the range test among them."""
        return 1 + sum(len(round_["losses"]) for round_ in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite is None."""
        return _plain(asdict(self) | {"cost": self.cost})

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw the range test and the sweep."""
        figure = _figure((11, 4.2))
        left, right = figure.subplots(1, 2)
        rates, losses = self.range_test["rates"], self.range_test["losses"]
        end = divergence(losses)
        left.plot(rates, losses, color="0.75", label="loss of a step")
        left.plot(rates[:end], smoothed(losses[:end]), color="C0", label="mean of its neighbors")
        if self.diverged_at is not None:
            left.axvline(self.diverged_at, color="C3", linestyle=":", label="diverged")
        left.axvspan(min(self.rounds[0]["losses"]), max(self.rounds[0]["losses"]), color="0.93", label="sweep")
        start = smoothed(losses)[0]
        finite = [loss for loss in losses if math.isfinite(loss)]
        left.set_ylim(min(finite) - 0.05 * start, min(max(finite), 2 * start) + 0.05 * start)
        left.set(title="Range test", ylabel="training loss")
        for i, round_ in enumerate(self.rounds):
            points = sorted((rate, loss) for rate, loss in round_["losses"].items() if math.isfinite(loss))
            right.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=f"{round_['share']:.2g} of the horizon")
        right.set(title="Short runs, each decayed", ylabel="loss after the run")
        worst = max(loss for round_ in self.rounds for loss in round_["losses"].values() if math.isfinite(loss))
        if worst > 2 * start:
            right.set_ylim(top=2 * start)
        for axes in (left, right):
            axes.set(xscale="log", xlabel="peak learning rate")
            axes.axvline(self.learning_rate, color="C2", linestyle="--", label=f"proposed: {self.learning_rate:g}")
            axes.legend(fontsize="small", frameon=False)
        tried = sorted({rate for round_ in self.rounds for rate in round_["losses"]})
        right.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=90, fontsize="small")
        right.set_xticks([], minor=True)
        figure.savefig(path, dpi=120)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib: is not installed. Install it with: pip install 'hf-accel[compare]'.") from None
    return Figure(size, layout="constrained")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(eq=False)
class _RangeTest(Technique):
    """The rate grows exponentially to the peak, `HIGHEST`; the run ends where the loss diverges.

    A rate of its own, as Muon's, so grows to itself and not above.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.rates_: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates_.append(HIGHEST * self.schedule(self.progress(state)))  # as before where an update was refused

    def schedule(self, progress: float) -> float:
        return (LOWEST / HIGHEST) ** (1 - progress)

    def on_log(self, args, state, control, logs, **kwargs):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        control.should_training_stop |= len(losses) > 8 and divergence(losses) is not None


@many_runs()
def search(
    engine: Engine,
    share: float,
    limits: Mapping[str, float],
    *,
    kept: bool = False,
    asking: str,
    without: Sequence[Technique] = (),
    follow: Callable[[str], None] = lambda _: None,
) -> FoundRate:
    """Search the peak rate of a trainer's run.

    Args:
        engine: Of the trainer, before or at the start of its training.
        share: What the search may cost, as a share of the limits.
        limits: What the run may spend.
        kept: Whether the share must be kept; otherwise, the shortest run is of one update at least.
        asking: Who asks, for messages.
        without: Techniques that are no part of the short runs.
        follow: Is told of every run that ended.
    """
    _refuse(engine.host, asking)
    host, clock = engine.host, engine.meter.clock
    began = clock.now()
    given = host.args.learning_rate
    found = FoundRate(given=given)

    def counted(run: ShortRun) -> ShortRun:
        clear_device_cache(garbage_collection=True)  # of the copy
        found.steps += run.steps
        found.samples += run.spent["samples"]
        found.evaluated += run.evaluated
        found.flops += run.flops
        return run

    per_epoch = math.ceil(len(host.train_dataset) / engine.nominal_batch_size) if has_length(host.train_dataset) else 0
    known = nominal_steps(limits, per_epoch, engine.nominal_batch_size)
    steps = 48 if known is None else min(max(round(share * known / 15), 24), 192)

    def shortest(whole: float, lost: float) -> int:
        """Updates of the shortest run, where a whole run has so many, and so many are lost to other things."""
        updates = math.floor((share * whole - lost) / (RUNS_COST * (1 + EVALUATED * FORWARD)))
        if kept and updates < 1:
            raise ValueError(
                f"{asking}: {share:g} of the budget is about {share * whole:.0f} updates, and a search needs "
                f"{lost + RUNS_COST * (1 + EVALUATED * FORWARD):.0f}. Give a larger share, or a larger budget."
            )
        return max(updates, 1)

    if known is not None:
        shortest(known, steps)  # raises before anything is trained
    unlimited = dict.fromkeys(limits, 1e30)
    range_test = _RangeTest()
    run = counted(
        short_run(
            engine,
            HIGHEST,
            unlimited | {"steps": float(steps)},
            techniques=[range_test],
            without=without,
            each_step=True,
        )
    )
    rates = range_test.rates_[: len(run.losses)]
    found.range_test = {"rates": rates, "losses": run.losses}
    end = divergence(run.losses)
    found.diverged_at = None if end is None else rates[end]
    follow(
        f"range test, {len(rates)} updates: " + ("no divergence" if end is None else f"diverged at {rates[end]:.2g}")
    )

    # The horizon in updates, judging from those of the range test where the limits do not say it.
    pace = {u: run.step_seconds if u == "seconds" else run.spent[u] / run.steps for u in limits}
    whole, lost = known or min(limit / max(pace[u], 1e-12) for u, limit in limits.items()), float(steps)
    if any(u in limits for u in CONTINUOUS):  # beside its updates, every run has a beginning and an end
        passed = clock.now() - began
        lost = (passed + sum(MOST_RUNS) * (passed - run.steps * run.step_seconds)) / max(run.step_seconds, 1e-12)
    whole, lost = engine.ranks.share([float(whole), lost])
    found.horizon_steps = whole
    unit = shortest(whole, lost) * (1 - 1e-9) / whole  # whole updates, whatever the unit
    warmup = host.args.warmup_steps / whole if host.args.warmup_steps >= 1 else None

    def loss(index: int, length: int) -> float:
        part = length * unit
        own = {u: part * limit for u, limit in limits.items() if u not in CONTINUOUS} or {"steps": part * whole}
        examples = max(round(EVALUATED * part * whole * engine.nominal_batch_size), 1)
        probe = probe_of(engine, examples)
        run = counted(short_run(engine, rate_at(index), own, without=without, warmup=warmup, probe=probe))
        follow(f"learning rate {rate_at(index):g}, {part:.2g} of the horizon: loss {run.loss:.4f}")
        return run.loss

    rounds = halve(loss, bracket(rates, run.losses, given))
    found.rounds = [
        {"share": length * unit, "losses": {rate_at(index): losses[index] for index in sorted(losses)}}
        for length, losses in zip(LENGTHS, rounds, strict=True)
    ]
    if math.isinf(min(rounds[-1].values())):
        raise ValueError(f"{asking}: no learning rate from {rate_at(min(rounds[0])):g} on trained. Look at the model.")
    found.learning_rate = rate_at(at_whole_horizon(best(rounds[-1]), found.rounds[-1]["share"]))
    found.seconds = clock.now() - began
    return found


def _refuse(host: TrainerView, asking: str) -> None:
    """Raise ValueError where short runs are not possible, or would not tell."""
    if host.is_deepspeed_enabled or host.is_fsdp_enabled:
        raise ValueError(f"{asking}: the model's weights are in parts. Search on one device, and give the rate.")
    if host.train_dataset is None:
        raise ValueError(f"{asking}: the trainer has no train_dataset. Give one.")
    kind = SchedulerType(host.args.lr_scheduler_type)
    if kind in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise ValueError(f"{asking}: lr_scheduler_type={kind.value!r} follows the metric. Choose another.")
    if host.optimizer is not None or host.lr_scheduler is not None:
        raise ValueError(
            f"{asking}: the trainer has an optimizer already, of its own model. Leave optimizers= out, "
            "or where it is that of an earlier run, make a new trainer."
        )
    if host.optimizer_cls_and_kwargs is not None and "lr" in host.optimizer_cls_and_kwargs[1]:
        raise ValueError(f"{asking}: optimizer_cls_and_kwargs says lr. Say it as learning_rate.")
