"""Run techniques in a trainer: connect the roster, meter, steps, updates and checkpoints.

`AccelTrainerMixin` has one attribute, its engine, and answers Trainer's questions by asking it.  `Engine.begin` makes
new parts for each call of ``train()``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_accel import host as hosts
from hf_accel import losses
from hf_accel.batch import StepBatch
from hf_accel.checkpoints.writer import CheckpointWriter
from hf_accel.clock import Clock, Limits
from hf_accel.engine import batch_norm, memory, setup
from hf_accel.engine.averages import AveragedWeights
from hf_accel.engine.batch_sizes import loader_counter
from hf_accel.engine.callbacks import ClockCallback, RestoreCallback
from hf_accel.engine.checkpoints import RunCheckpoints
from hf_accel.engine.data import prepared_dataset, stream_of
from hf_accel.engine.meter import Meter, gauges_for, receipt_of
from hf_accel.engine.optimization import Optimization
from hf_accel.engine.ranks import Ranks
from hf_accel.engine.roster import Roster
from hf_accel.engine.run_view import RunView
from hf_accel.engine.setup import Options
from hf_accel.engine.step import OnePass, StepRunner
from hf_accel.host.view import TrainerView
from hf_accel.receipt import Receipt
from hf_accel.recipe import Recipe
from hf_accel.stream.indexed import StepStream
from hf_accel.technique import Technique


class Engine:
    """Answer the questions of `AccelTrainerMixin`; `view` shows the run to the techniques.

    Args:
        trainer: The trainer that the engine belongs to.
        techniques: Techniques, in the order in which they are asked.
        recipe: Recipe to save beside the model, with the arguments and techniques of the run.
        gauges: Gauges of the clock, by unit; None: those that the limits need.
        streamed: True to take batches from the stream even if no technique needs it.
        paced: True to let Trainer's notion of time follow the clock even if no technique needs it.
    """

    def __init__(
        self,
        trainer: Any,
        techniques: Sequence[Technique],
        options: Options | None = None,
        recipe: Recipe | None = None,
        *,
        gauges: dict[str, Any] | None = None,
        streamed: bool = False,
        paced: bool = False,
    ):
        self.host = TrainerView(trainer)
        self.options = options or Options()
        self.recipe = recipe or Recipe()
        streamed = streamed or self.options.micro_batch_size is not None
        self.roster = Roster(techniques, streamed=streamed, paced=paced)
        self.ranks = Ranks(self.host)
        self.writer = CheckpointWriter(self.host, in_background=self.options.async_checkpoints)
        self.gauges = gauges
        self.receipt: Receipt | None = None
        self.head: losses.Head | None = None
        self.nominal_batch_size = 0
        self.accumulation_steps = 1
        self.steps_per_epoch = 1
        self._micro_batch_size = 1
        self._explicit_args: dict[str, Any] = {}
        self._made_optimizer = False
        self.searched_hyperparameters: dict[str, Any] = {}
        self.view = RunView(self)
        setup.show_run(self.roster.techniques, self.view)
        self.begin({})

    def begin(self, limits: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        """Make the parts that belong to one call of ``train()``."""
        clock = Clock(limits, now=now, share=self.ranks.share)
        self.meter = Meter(clock, self.gauges or {}, self.roster, self.ranks)
        self.optimization = Optimization(self.host, self.roster, clock)
        self.step = self._make_step()
        self.averages = AveragedWeights(
            self.host,
            self.roster,
            self.meter,
            stream=self._stream_or_new,
            micro_batch_size=lambda: self.step.micro_batch_size,
        )
        self._reports: list[dict[str, Any]] = []
        self._final_learning_rate = 0.0
        self.checkpoints = RunCheckpoints(
            self.host,
            self.roster,
            self.meter,
            self.optimization,
            self.step,
            self.averages,
            self.writer,
            write_metadata=self.write_run_metadata,
        )
        self._flops_by_size: dict[tuple[int, int], float] = {}

    def _stream_or_new(self) -> StepStream:
        return self.make_stream(self.host.train_dataset) if self.step.stream is None else self.step.stream

    def _make_step(self) -> StepRunner:
        return StepRunner(
            self.host,
            self.roster,
            self.ranks,
            self.meter,
            head=self.head,
            example_loss=self.options.example_loss_func is not None,
            micro_batch_size=self._micro_batch_size,
            halves=self.options.micro_batch_size == "auto",
        )

    # Construction ---------------------------------------------------------------------------------------------------

    def prepare_args(self, args: TrainingArguments, dataset: Any) -> TrainingArguments:
        """Return the arguments that Trainer sees."""
        args = hosts.with_accumulation_steps(args)
        self._explicit_args = hosts.recorded_arguments(args)
        args = setup.prepared_args(args, dataset, self.roster, self.options)
        self.accumulation_steps = args.gradient_accumulation_steps
        if self.roster.streamed:
            args.gradient_accumulation_steps = 1
        return args

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model that the techniques make of a model."""
        return setup.prepared_model(model, self.roster)

    def prepare_quantized_model(self, model: nn.Module, args: TrainingArguments) -> nn.Module:
        """Return the prepared model of quantized weights, which Trainer refuses unless they have adapters."""
        self.host.args = args
        model = self.prepare_model(model)
        hosts.refuse_quantized(model)
        return model

    def settle(self, *, model_is_prepared: bool = False) -> None:
        """Complete the engine once Trainer is built: model, callbacks, loss and batch sizes."""
        host, roster = self.host, self.roster
        hosts.refuse_overrides(host, roster.techniques, streamed=roster.streamed)
        if roster.streamed:
            hosts.refuse_stream_hosts(host, roster.techniques, self.options.micro_batch_size)
        self.writer.refuse_backends()
        if not model_is_prepared:
            setup.replace_model(host, roster)
        if (owner := roster.owner("averaging")) is not None:
            batch_norm.refuse_iterables(owner, host.model, host.train_dataset)
        setup.add_callbacks(host, self.ranks, ClockCallback(self), RestoreCallback(self))
        if self.gauges is None:
            self.gauges = gauges_for(self.limits().amounts, host.args)
        self.head = self.find_head() if roster.streamed else None
        self.settle_sizes()
        self.begin({}, self.meter.clock.now)

    def settle_sizes(self) -> None:
        """Compute the batch sizes from the arguments."""
        self.nominal_batch_size = self.host.train_batch_size * self.accumulation_steps * self.ranks.world_size
        size = memory.first_micro_batch_size(self.host, self.options.micro_batch_size, self.accumulation_steps)
        self._micro_batch_size = self.step.micro_batch_size = size

    def find_head(self) -> losses.Head | None:
        """Return the head that computes losses of items, or None if it is unknown and no technique needs it."""
        return setup.find_head(self.host, self.roster, self.options.example_loss_func)

    # The run --------------------------------------------------------------------------------------------------------

    def train(self, resume: str | bool | None, plain: Callable[[str | None], Any], one_pass: OnePass) -> Any:
        """Train with Trainer's own ``train``, ``plain(checkpoint)``, and its ``training_step``, ``one_pass``."""
        self.checkpoints.finish()  # of a run that was interrupted
        args = self.host.args
        setup.show_run(self.roster.techniques, self.view)
        limits = self.limits()
        self.begin(limits.amounts, self.meter.clock.now)
        self.step.one_pass = one_pass
        checkpoint = self.checkpoints.find(resume, allow_changes=self.options.allow_changes)
        if checkpoint is not None:
            self.checkpoints.resume(checkpoint, allow_changes=self.options.allow_changes)
        self.meter.start(resumed=self.resumed, began=limits.began)
        if args.device.type == "cuda" and not self.host.is_in_train:  # a short run inside a run is part of it
            torch.cuda.reset_peak_memory_stats(args.device)
        try:
            with self.meter.stopwatch.charge("other"):
                output = plain(checkpoint)
            self.meter.count_energy()
            self._write_receipt()
        finally:
            setup.hide_run(self.roster.techniques)
        return output

    def limits(self) -> Limits:
        """Return the limits of the run: those of the owner of ``budget``, or the arguments'."""
        args, owner = self.host.args, self.roster.owner("budget")
        if owner is not None:
            return owner.budget()
        steps, epochs = float(args.max_steps), float(args.num_train_epochs)
        return Limits({"steps": steps} if steps > 0 else {"epochs": epochs})

    def change_trial(self, trial: Any, plain: Callable[[Any], Any]) -> None:
        """Apply the arguments of a hyperparameter search's trial; ``plain`` is Trainer's own method."""
        args = self.host.args
        if self.roster.streamed:
            args.gradient_accumulation_steps = self.accumulation_steps
        plain(trial)
        self.searched_hyperparameters = dict(trial if isinstance(trial, dict) else getattr(trial, "params", {}))
        self.accumulation_steps = args.gradient_accumulation_steps
        if self.roster.streamed:
            args.gradient_accumulation_steps = 1
        if (self.roster.techniques or self.roster.streamed) and trial is not None:
            self.host.train_batch_size = args.train_batch_size
            self.settle_sizes()
            self.meter.clock.limits = self.limits().amounts

    def initial_values(self, args: TrainingArguments, values: tuple) -> tuple:
        """Return Trainer's initial values, with epochs and steps that follow the clock in a paced run."""
        found = list(values)
        self.steps_per_epoch = int(found[1] or 1)
        self.step.loader_counter = loader_counter(self.host)
        if self.roster.paced:
            limits = self.meter.clock.limits
            found[0] = math.ceil(limits["epochs"]) if "epochs" in limits else sys.maxsize
            steps = hosts.nominal_steps(limits, self.steps_per_epoch, self.nominal_batch_size)
            hosts.refuse_absolute_warmup(args, steps, limits, self.roster.owner("schedule"))
            self.optimization.nominal_steps = steps
            found[6] = steps or self.steps_per_epoch
        return tuple(found)

    def initial_position(self, position: tuple[int, int]) -> tuple[int, int]:
        """Return the epoch and step at which Trainer begins."""
        host, stream = self.host, self.step.stream
        if self.roster.paced:
            for kind in ("logging", "eval", "save"):
                if 0 < (getattr(host.args, f"{kind}_steps") or 0) < 1:
                    setattr(host.state, f"{kind}_steps", sys.maxsize)  # `ClockCallback` fires at fractions of progress
        if (state := self.checkpoints.state) is None:
            return position
        if stream is not None and "stream" not in state:
            stream.pass_over(*position)
        if "clock" not in state:  # of a plain Trainer
            steps, epochs = host.state.global_step, host.state.epoch
            if stream is not None:
                epochs = stream.epochs if stream.consumed else position[0]
            self.meter.clock.advance(steps=steps, samples=steps * self.nominal_batch_size, epochs=epochs)
        if stream is None:
            return position
        if "stream" not in state:
            return position[0], 0
        return stream.epoch + int(stream.epoch_is_over), 0

    def run_epoch(self, plain: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Run one epoch; ``plain`` is Trainer's own method."""
        if (self.roster.techniques or self.roster.streamed) and self.resumed and self.meter.clock.done:
            self.host.control.should_training_stop = True  # Trainer would take one more step
            return None
        continued = kwargs["epoch"] == kwargs["epochs_trained"] and not self.host.args.ignore_data_skip
        self.step.begin_epoch(kwargs["steps_trained_in_current_epoch"] if continued else 0)
        if self.step.stream is not None:
            self.step.stream.epoch_begins = True
            # The stream ends its epochs itself (see `ClockCallback`), because their steps are unknown in advance.
            kwargs |= {"steps_in_epoch": sys.maxsize, "num_update_steps_per_epoch": sys.maxsize}
        return plain(**kwargs)

    def end_step(self) -> None:
        """Advance the clock by the cost of the step, before the scheduler sets the next learning rate."""
        stream, steps = self.step.stream, self.host.state.global_step + 1
        epochs = steps / self.steps_per_epoch if stream is None else stream.epochs
        by_scaler = self.host.accelerator.optimizer_step_was_skipped  # fp16, with a gradient that is not finite
        self.meter.end_step(skipped=self.step.refused or by_scaler, epochs=epochs)

    def finish(self, num_train_samples: float) -> float:
        """Leave the final weights in the model; return the number of samples for Trainer's speed metrics."""
        self.checkpoints.finish()
        self.meter.count_tokens()
        self.step.flush_observations()
        self._final_learning_rate = self.host.get_learning_rate()
        self.averages.finish()
        self._reports = [dict(technique.report()) for technique in self.roster.techniques]
        self.averages.ended = True
        if samples := self.meter.clock.spent["samples"]:  # Trainer expects those of the whole schedule
            return samples * self.host.state.max_steps / max(self.host.state.global_step, 1)
        return num_train_samples

    @property
    def stream(self) -> StepStream | None:
        """Return the stream of step batches, or None if Trainer's own loader is used."""
        return self.step.stream

    @property
    def resumed(self) -> bool:
        """Return whether the run resumes from a checkpoint."""
        return self.checkpoints.state is not None

    def fit_memory(self) -> None:
        """Find the largest micro-batch that fits before the first step, if several ranks must agree on it."""
        if self.options.micro_batch_size == "auto" and self.ranks.world_size > 1 and not self.resumed:
            assert self.step.stream is not None
            dataset, size = self.step.stream.reader.dataset, self.step.micro_batch_size
            size = memory.agree_micro_batch_size(size, self.step.fits, dataset, self.host, self.ranks)
            self.step.set_micro_batch_size(size)

    # Data -----------------------------------------------------------------------------------------------------------

    def train_loader(self, plain: Callable[[], Any]) -> Any:
        """Return the stream, or Trainer's own loader."""
        host = self.host
        if self.step.stream is not None and host.is_in_train:  # a caller's look into the run's own
            return self.step.stream
        replaced = self.head is not None and host.overrides("compute_loss") is not None  # on the instance
        if self.roster.streamed and (host.model_init is not None or replaced):  # another model or loss
            self.step.head = self.head = self.find_head()
            vars(self.step).pop("_host_scales_rightly", None)
        with prepared_dataset(host, self.roster, self.meter):
            if not self.roster.streamed or host.train_dataset is None:
                return plain()
            stream = self.step.stream = self.make_stream(host.train_dataset)
        stream.serves_looks = True  # Trainer and other callers get it from the same method
        if "stream" in (state := self.checkpoints.state or {}):
            stream.load_state_dict(state["stream"])
        return stream

    def make_stream(self, dataset: Any) -> StepStream:
        """Return the stream of a data set."""
        return stream_of(self.host, self.roster, dataset, self.nominal_batch_size, self.step.micro_batch_size)

    # Steps ----------------------------------------------------------------------------------------------------------

    def next_batches(self, epoch_iterator: Any, plain: Callable[[], tuple[list[Any], Any]]) -> tuple[list[Any], Any]:
        """Return the batches of the next update and the divisor of its loss; ``plain`` is Trainer's own method."""
        self.meter.clock.step_begins()
        if self.step.stream is not None:
            return self.step.next_batch(epoch_iterator)
        with self.meter.stopwatch.charge("data"):
            batches, items = plain()
            self.step.plain_batches(batches)
        return batches, items

    def flops(self, inputs: Any, plain: Callable[[Any], float]) -> float:
        """Return a batch's operations by Trainer's rule; ``plain`` is its own method."""
        if isinstance(inputs, StepBatch):
            return sum(self.flops(micro.inputs, plain) for micro in inputs.micro_batches)
        if getattr(plain, "__func__", None) is not Trainer.floating_point_ops:
            return plain(inputs)
        # Trainer counts all parameters in every step. A model with new parameters gives them to the optimizer.
        groups = self.host.optimizer.param_groups
        size = self.step.num_positions(inputs), sum(len(group["params"]) for group in groups)
        if size not in self._flops_by_size:
            self._flops_by_size[size] = plain(inputs)
        return self._flops_by_size[size]

    def make_optimizer(self, model: Any, plain: Callable[[Any], Any]) -> Any:
        """Return the optimizer; ``plain`` is Trainer's own method to make it."""
        present = self.host.optimizer
        optimizer = self.optimization.make_optimizer(model, plain, made=self._made_optimizer)
        self._made_optimizer |= present is None and self.optimization.makes_optimizer()
        return optimizer

    # Evaluation and saving ------------------------------------------------------------------------------------------

    def save_model(self, output_dir: Any, plain: Callable[[], Any]) -> None:
        """Save the model that the user receives; ``plain`` is Trainer's own method."""
        with self.averages.in_place():
            plain()
        self.write_run_metadata(output_dir or self.host.args.output_dir)

    # The receipt ----------------------------------------------------------------------------------------------------

    def _write_receipt(self) -> None:
        self.receipt = receipt_of(self.host, self.roster, self.meter, self._final_learning_rate, self._reports)
        if self.host.args.should_save:
            self.write_run_metadata(self.host.args.output_dir)

    def write_run_metadata(self, directory: str | Path) -> None:
        """Write the recipe, and the receipt if there is one, beside a saved model."""
        if not self.host.args.should_save:
            return
        recipe = self.recipe.of_run(self._explicit_args, self.roster.techniques)
        recipe.save(Path(directory, "recipe.yaml"))
        if self.receipt is not None:
            self.receipt.save(Path(directory, "receipt.json"))
