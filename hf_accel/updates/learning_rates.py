"""Search the peak learning rate by a range test, then by successive halving of short runs.

The range test is one short run in which the rate grows exponentially; it tells where to look.  The sweep trains for
short horizons, each with the whole schedule of the run.  Its first rates are a factor of 2 apart.  Then the best of
them and its neighbors, a factor of sqrt(2) away, train for twice as long.

The best of these fits its own horizon; for the whole one it is scaled by (short / whole)^0.32.  Rates lie on the
lattice 1e-3 x 2^(i/2), with whole i.  The scaled rate is rounded to the lattice toward the best.
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
"""Lowest and highest rate of the range test."""
BRACKET = 4
"""Number of first rates of the sweep, a factor of 2 apart, from the range test's lowest loss downwards."""
EXTENSIONS = 2
"""Number of rates that may be added while the best one lies at an end of the bracket."""
LENGTHS = (1, 2)
"""Lengths of the runs of the two rounds, in shortest runs."""
MOST_RUNS = (BRACKET + 1 + EXTENSIONS, 3)
"""Most runs of each round."""
RUNS_COST = sum(number * length for number, length in zip(MOST_RUNS, LENGTHS, strict=True))
"""Cost of the whole sweep, in shortest runs, without evaluations."""
EXPONENT = 0.32
"""Exponent with which the best rate falls with the horizon."""
EVALUATED = 0.5
"""Examples of an evaluation, as a share of those that the run before it trained on."""
FORWARD = 1 / 3
"""Cost of an evaluated example, as a share of a trained one."""


def rate_at(index: int) -> float:
    """Return the rate at a place of the lattice, to three digits."""
    return float(f"{1e-3 * 2 ** (index / 2):.3g}")


def index_of(rate: float) -> int:
    """Return the place of the lattice that is nearest to a rate."""
    return round(2 * math.log2(rate / 1e-3))


def divergence(losses: Sequence[float]) -> int | None:
    """Return the first step with a loss that is not finite, or more than twice that of the beginning."""
    start = smoothed(losses)[0]
    return next((i for i, loss in enumerate(losses) if not math.isfinite(loss) or loss > 2 * start), None)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return means over a window of an eighth of the losses around each."""
    reach = len(losses) // 16 + 1
    parts = [losses[max(i - reach, 0) : i + reach + 1] for i in range(len(losses))]
    return [sum(part) / len(part) for part in parts]


def bracket(rates: Sequence[float], losses: Sequence[float], given: float) -> list[int]:
    """Return the first rates of the sweep, as places of the lattice.

    They start at the rate with the lowest loss of the range test and go down.  The given rate is added unless the range
    test diverged before it.
    """
    end = divergence(losses)
    means = smoothed(losses[:end])
    top = index_of(rates[min(range(len(means)), key=means.__getitem__)]) if means else index_of(LOWEST)
    found = [top - 2 * i for i in range(BRACKET)]
    if 0 < given < (math.inf if end is None else rates[end]):
        found.append(index_of(given))
    return sorted(set(found))


def best(losses: Mapping[int, float]) -> int:
    """Return the place of the lowest loss; of equal ones, the lowest rate."""
    return min(losses, key=lambda index: (losses[index], index))


def halve(loss: Callable[[int, int], float], start: Sequence[int]) -> list[dict[int, float]]:
    """Run the two rounds of the sweep from places of the lattice, and return their losses.

    ``loss(index, length)`` trains a run that is ``length`` times as long as the shortest, and returns its loss.  Losses
    that are not finite become infinite.
    """

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
    """Return the place for a whole run, given the best one for a share of its horizon.

    It is lower by the whole number of places that the exponent asks for.
    """
    return index + math.trunc(min(2 * EXPONENT * math.log2(share), 0))


@dataclass
class FoundRate:
    """Hold the result of a search for a learning rate.

    Args:
        learning_rate: The proposed peak.
        given: The rate before the search.
        diverged_at: Rate at which the range test diverged, or None.
        range_test: Rates, and the loss of the step at each.
        rounds: Rounds of the sweep, each with the ``share`` of the horizon of its runs and the ``losses`` by rate.
        steps: Updates of all runs.
        samples: Examples that they trained on.
        evaluated: Examples that were evaluated.
        flops: FLOPs of training as Trainer counts them.
        seconds: Wall seconds.
        horizon_steps: Updates of the run that will use the rate.
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
        """Return the cost of updates and evaluations, as a share of the run that will use the rate."""
        evaluations = FORWARD * self.evaluated * self.steps / self.samples
        return (self.steps + evaluations) / self.horizon_steps

    @property
    def runs(self) -> int:
        """Return the number of short runs, with the range test."""
        return 1 + sum(len(round_["losses"]) for round_ in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with None instead of numbers that are not finite."""
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
        raise ValueError("The plot needs matplotlib. Install it with pip install 'hf-accel[compare]'.") from None
    return Figure(size, layout="constrained")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(eq=False)
class _RangeTest(Technique):
    """Raise the rate exponentially to the peak, `HIGHEST`, and end the run when the loss diverges.

    A separate rate, such as Muon's, grows to its own peak and not above.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.rates_: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates_.append(HIGHEST * self.schedule(self.progress(state)))  # repeated if an update was refused

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
        engine: Engine of the trainer, before or at the start of its training.
        share: Cost of the search, as a share of the limits.
        limits: Limits of the run, by unit.
        kept: True if the share must not be exceeded; otherwise, the shortest run has at least one update.
        asking: Name of the caller, for messages.
        without: Techniques that the short runs do without.
        follow: Function that receives a line for every run that ended.
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
        """Return the updates of the shortest run, given those of a whole run and those lost to other work."""
        updates = math.floor((share * whole - lost) / (RUNS_COST * (1 + EVALUATED * FORWARD)))
        if kept and updates < 1:
            raise ValueError(
                f"{asking}: {share:g} of the budget is about {share * whole:.0f} updates, and a search needs "
                f"{lost + RUNS_COST * (1 + EVALUATED * FORWARD):.0f}. Set a larger share or a larger budget."
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

    # The horizon in updates, extrapolated from the range test if the limits do not tell it.
    pace = {u: run.step_seconds if u == "seconds" else run.spent[u] / run.steps for u in limits}
    whole, lost = known or min(limit / max(pace[u], 1e-12) for u, limit in limits.items()), float(steps)
    if any(u in limits for u in CONTINUOUS):  # every run has a start and an end besides its updates
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
        raise ValueError(
            f"{asking}: no learning rate from {rate_at(min(rounds[0])):g} up gives a finite loss. Check the model."
        )
    found.learning_rate = rate_at(at_whole_horizon(best(rounds[-1]), found.rounds[-1]["share"]))
    found.seconds = clock.now() - began
    return found


def _refuse(host: TrainerView, asking: str) -> None:
    """Raise ValueError if short runs are impossible or would not tell anything."""
    if host.is_deepspeed_enabled or host.is_fsdp_enabled:
        raise ValueError(f"{asking} does not support sharded weights. Search on one device, and set learning_rate.")
    if host.train_dataset is None:
        raise ValueError(f"{asking} needs data. Pass train_dataset= to the trainer.")
    kind = SchedulerType(host.args.lr_scheduler_type)
    if kind in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise ValueError(
            f"{asking} does not support lr_scheduler_type={kind.value!r} because it follows the metric. "
            "Choose another schedule."
        )
    if host.optimizer is not None or host.lr_scheduler is not None:
        raise ValueError(
            f"{asking} does not support a trainer that has an optimizer already because short runs train a copy of the "
            "model. Remove optimizers=. After a run, create a new trainer."
        )
    if host.optimizer_cls_and_kwargs is not None and "lr" in host.optimizer_cls_and_kwargs[1]:
        raise ValueError(f"{asking} does not support lr in optimizer_cls_and_kwargs. Set learning_rate instead.")
