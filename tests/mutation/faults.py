"""Faults that `run.py` plants into a copy of the package, one at a time: each is one that happens to people.

They were chosen from the source alone, before any test was looked at.  ``module`` is where a fault was last seen and
only a hint: its ``original`` text is searched for in the whole package, where it occurs once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """A piece of source and what a mistake would have made of it.

    Args:
        name: For ``run.py --only``.
        module: Path below the package.
        original: Text that occurs once in the package.
        replacement: The faulty text.
        consequence: What goes wrong for the user.
        tests: Arguments of pytest for the tests that are the most likely to notice.
    """

    name: str
    module: str
    original: str
    replacement: str
    consequence: str
    tests: str


def find(fault: Fault, package: Path) -> Path:
    """The one file of a package in which a fault can be planted; ValueError where there is not exactly one place."""
    found = {path: path.read_text().count(fault.original) for path in sorted(package.rglob("*.py"))}
    places = {path: number for path, number in found.items() if number}
    if sum(places.values()) != 1:
        shown = ", ".join(f"{path.relative_to(package)} ({number})" for path, number in places.items()) or "nowhere"
        raise ValueError(
            f"{fault.name}: {fault.original!r} must occur once, and occurs {shown}; it was in {fault.module}. "
            "Correct the fault."
        )
    return next(iter(places))


FAULTS = (
    # The step ---------------------------------------------------------------------------------------------------------
    Fault(
        "first-micro-batch-counted",
        "engine/step.py",
        "counts = [self.head.count(m.inputs, len(m.ids_B)) for m in batch.real_micro_batches]",
        "counts = [self.head.count(m.inputs, len(m.ids_B)) for m in batch.real_micro_batches[:1]]",
        "The loss of a step is divided by the items of its first micro-batch: gradient accumulation multiplies it.",
        "tests/engine/test_hooks.py::test_weights_multiply_and_sums_add",
    ),
    Fault(
        "items-not-reduced",
        "engine/step.py",
        'items_K = self.host.accelerator.reduce(items_K, "sum")',
        "items_K = items_K * self.host.args.world_size",
        "Each rank divides by a multiple of its own items: ranks with short texts count for more.",
        "tests/distributed/test_contract.py::test_two_ranks[ddp-SelectiveLanguageModeling] "
        "tests/distributed/test_contract.py::test_two_ranks[ddp-InfoBatch]",
    ),
    Fault(
        "ranks-not-multiplied",
        "engine/step.py",
        "loss = loss * host.accelerator.num_processes  # DDP averages over ranks",
        "loss = loss * 1",
        "On two GPUs the gradient has half of its size.",
        "tests/distributed/test_contract.py::test_two_ranks[ddp-SelectiveLanguageModeling]",
    ),
    Fault(
        "example-weights-squared",
        "engine/step.py",
        "loss = losses.weighted_mean(example, items_K, weight_B, weight_BL)",
        "loss = losses.weighted_mean(example, items_K, _product(weight_B, weight_B), weight_BL)",
        "Pruned data are corrected for with squared weights: the gradient is biased.",
        "tests/engine/test_hooks.py::test_weights_multiply_and_sums_add",
    ),
    Fault(
        "divided-by-micro-batches-twice",
        "engine/step.py",
        "1.0 if self._own_loss else float(len(batch.micro_batches))",
        "float(len(batch.micro_batches))",
        "With a technique that weights examples, the learning rate shrinks with gradient accumulation.",
        "tests/engine/test_hooks.py::test_a_model_that_takes_no_number_of_items_has_the_same_step",
    ),
    Fault(
        "refused-update-counted",
        "engine/step.py",
        "steps=0 if skipped else 1,",
        "steps=1,",
        "A budget of updates is spent on those that were left out.",
        "tests/optim/optimizers/test_gradient_spike_guard.py::test_a_budget_of_updates_is_not_spent_on_refused_ones",
    ),
    Fault(
        "filler-losses-observed",
        "engine/step.py",
        "return ids_B[ids_B >= 0], values_B[ids_B >= 0]",
        "return ids_B, values_B",
        "On several ranks, the last example of the data gets the losses of placeholders.",
        "tests/engine/test_hooks.py::test_nothing_is_observed_of_a_rank_without_examples",
    ),
    Fault(
        "label-smoothing-dropped",
        "engine/step.py",
        "smoothing = host.args.label_smoothing_factor if host.label_smoother is not None else 0.0",
        "smoothing = 0.0",
        "label_smoothing_factor does nothing once a technique weights examples.",
        "tests/engine/test_hooks.py::test_under_weights_labels_are_smoothed_as_trainer_smooths_them",
    ),
    # The stream -------------------------------------------------------------------------------------------------------
    Fault(
        "resume-skips-an-example",
        "stream/indexed.py",
        "position = self.consumed\n",
        "position = self.consumed + bool(self.consumed)\n",
        "After an interruption every batch of the epoch is shifted by one.",
        "tests/stream/test_indexed.py",
    ),
    Fault(
        "order-without-epoch",
        "stream/indexed.py",
        "generator = torch.Generator().manual_seed(self.seed + epoch)",
        "generator = torch.Generator().manual_seed(self.seed)",
        "All epochs see the examples in the same order.",
        "tests/stream/test_indexed.py",
    ),
    Fault(
        "reading-without-epoch",
        "preserve.py",
        "key = (seed * 1_000_003 + epoch) * 1_000_003 + example",
        "key = seed * 1_000_003 + example",
        "Random crops and masks of a data set are the same in every epoch.",
        "tests/stream/test_indexed.py::test_every_epoch_draws_anew_for_every_example",
    ),
    Fault(
        "weights-not-ordered",
        "stream/indexed.py",
        "weights_N = by_id_N[ordered_N]",
        "weights_N = by_id_N[ids_N]",
        "Each example is trained with the weight of another one.",
        "tests/stream/test_indexed.py",
    ),
    Fault(
        "uneven-rest-misplaced",
        "batch.py",
        "begin = start + sum(sizes[:rank])",
        "begin = start + rank * sizes[rank]",
        "In the last step of an epoch ranks train on some examples twice and on others never.",
        "tests/stream/test_indexed.py",
    ),
    Fault(
        "changed-stream-accepted",
        "stream/iterable.py",
        'if before is not None and self._last in (digest(before), ""):',
        "if before is not None:",
        "A run continues on other data than before, without a word.",
        "tests/stream/test_iterable.py::test_other_data_is_refused "
        "tests/stream/test_iterable.py::test_a_state_that_is_not_exact_is_found_out "
        "tests/stream/test_iterable.py",
    ),
    # Checkpoints ------------------------------------------------------------------------------------------------------
    Fault(
        "digest-not-compared",
        "checkpoints/format.py",
        "if _digest(directory / name) != digest:",
        "if not _digest(directory / name):",
        "A checkpoint that the disk has damaged is resumed from.",
        "tests/checkpoints/test_format.py",
    ),
    Fault(
        "checkpoints-sorted-as-text",
        "checkpoints/format.py",
        "numbered = [(int(match[1]), path) for path in found",
        "numbered = [(match[1], path) for path in found",
        "After step 1000, a run resumes from checkpoint-900.",
        "tests/checkpoints/test_format.py",
    ),
    Fault(
        "heartbeat-ignored",
        "engine/resuming.py",
        "clock.spent[unit] = max(clock.spent[unit], spent)",
        "self.clock.spent[unit] = max(self.clock.spent[unit], 0.0)",
        "Seconds that a killed run took since its last checkpoint are not counted.",
        "tests/budget/test_budget.py::test_seconds_of_a_run_that_was_stopped_and_resumed_are_kept "
        "tests/meters/test_energy.py",
    ),
    Fault(
        "averages-not-restored",
        "updates/running_average.py",
        'self.averages_ = scatter(self.model_, state["averages"])',
        "self.averages_ = at_least_float32(self.weights())",
        "After resuming, the average of weights begins again.",
        "tests/optim/averaging/test_ema.py",
    ),
    Fault(
        "outer-momentum-not-restored",
        "system/synchronize/diloco.py",
        '((self.anchors_, state["anchors"]), (self.velocities_, state["velocities"]))',
        '((self.anchors_, state["anchors"]),)',
        "A resumed run of DiLoCo is another one.",
        "tests/system/synchronize/test_diloco.py "
        "tests/contract/test_contract.py::test_contract[DiLoCo-resumes_bit_exactly]",
    ),
    # The clock --------------------------------------------------------------------------------------------------------
    Fault(
        "progress-of-slowest-limit",
        "clock.py",
        "min(max(shares.values(), default=0.0), 1.0))",
        "min(min(shares.values(), default=0.0), 1.0))",
        "Of several limits, the schedule follows the wrong one and jumps to its end.",
        "tests/test_clock.py",
    ),
    Fault(
        "progress-goes-back",
        "clock.py",
        "self.progress = 1.0 if self.done else max(self.progress, min(",
        "self.progress = 1.0 if self.done else max(0.0, min(",
        "The learning rate rises again when the end of the run turns out to be cheaper.",
        "tests/test_clock.py",
    ),
    Fault(
        "watt-hours-as-joules",
        "clock.py",
        '{f"{prefix}wh": ("joules", 3600 * scale)',
        '{f"{prefix}wh": ("joules", scale)',
        "A budget of 1 kWh ends after a kilojoule.",
        "tests/test_clock.py",
    ),
    Fault(
        "reserve-ignored",
        "clock.py",
        'return self.reserve if unit == "seconds" else 0.0',
        "return 0.0",
        "A job is killed during its last evaluation.",
        "tests/test_clock.py",
    ),
    Fault(
        "earlier-seconds-lost",
        "clock.py",
        'self._earlier = self.spent["seconds"]',
        "self._earlier = 0.0",
        "Each interruption gives a run its whole time again.",
        "tests/test_clock.py tests/budget/test_budget.py",
    ),
    Fault(
        "fractions-fire-every-step",
        "engine/callbacks.py",
        "        self.fired_at = progress\n",
        "        self.fired_at = 0.0\n",
        "With eval_steps=0.25, each step after the first quarter is evaluated.",
        "tests/test_trainer.py::test_fractions_wait_for_the_delay_of_evaluations",
    ),
    Fault(
        "slowdown-inverted",
        "engine/reserve.py",
        "return min(max(pace / self.pace_when_measured, 0.5), 4.0)",
        "return min(max(self.pace_when_measured / pace, 0.5), 4.0)",
        "On a machine that gets slower, less time is kept back, and the run is late.",
        "tests/budget/test_budget.py::test_more_is_kept_back_on_a_machine_that_is_slower_than_when_it_last_evaluated",
    ),
    # Losses and memory ------------------------------------------------------------------------------------------------
    Fault(
        "labels-not-shifted",
        "losses/heads.py",
        "return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]",
        "return labels",
        "A language model learns to repeat each token.",
        "tests/losses/test_heads.py",
    ),
    Fault(
        "loss-averaged-over-padding",
        "losses/heads.py",
        "self.mask_BL.flatten().to(losses.dtype))",
        "torch.ones_like(losses))",
        "Short examples seem easy, and techniques drop them.",
        "tests/losses/test_heads.py::test_per_example_is_a_loop",
    ),
    Fault(
        "failed-gradient-kept",
        "engine/memory.py",
        "self.model.zero_grad(set_to_none=True)\n        clear_device_cache",
        "clear_device_cache",
        "Where memory ran out in the middle of a step, its first micro-batches count twice.",
        "tests/engine/test_memory.py",
    ),
    Fault(
        "failed-random-state-kept",
        "engine/memory.py",
        "restore_random_states(self.device, self.random)",
        "random_states(self.trainer.args.device)",
        "Dropout of a step that was done again depends on when memory ran out.",
        "tests/engine/test_memory.py",
    ),
    # The trainer and its short runs -----------------------------------------------------------------------------------
    Fault(
        "short-run-trains-the-model",
        "engine/short_run.py",
        "copied = copy.deepcopy(model)\n",
        "copied = model\n",
        "A search for the learning rate leaves a trained model to the run.",
        "tests/updates/test_learning_rates.py::test_the_trainer_stays_as_it_was",
    ),
    Fault(
        "averages-left-in-model",
        "trainer.py",
        "stack.callback(weights.swap, self.host.model, averages)",
        "stack.callback(lambda: None)",
        "Evaluating changes what is trained.",
        "tests/engine/test_averages.py",
    ),
    Fault(
        "seconds-charged-to-outermost",
        "receipt.py",
        "name = self._names[-1]",
        "name = self._names[0]",
        "The receipt says that all time went to 'other'.",
        "tests/optim/objective/test_distillation.py::test_the_teacher_is_charged_and_stays_out_of_the_model "
        "tests/cli/test_train.py::test_a_run_ends_with_model_recipe_and_receipt",
    ),
    Fault(
        "receipt-counts-refused-updates",
        "trainer.py",
        "steps=host.state.global_step - meter.skipped_steps,",
        "steps=self.state.global_step,",
        "The receipt counts updates that were not made.",
        "tests/optim/optimizers/test_gradient_spike_guard.py",
    ),
    Fault(
        "rate-factors-not-multiplied",
        "engine/optimization.py",
        'math.prod(rule.get("lr", 1.0) for rule in rules)',
        '(rules[-1].get("lr", 1.0) if rules else 1.0)',
        "Of several techniques with rules for a parameter, only the last one's learning rate counts.",
        "tests/engine/test_hooks.py::test_parameter_rules_multiply_and_join",
    ),
    Fault(
        "batch-norm-forgets",
        "engine/batch_norm.py",
        "layer.momentum = None  # the mean over batches",
        "layer.momentum = 0.5",
        "Averaged weights of a vision model are evaluated with the statistics of a few examples.",
        "tests/engine/test_batch_norm.py",
    ),
    # Optimizers, averages and schedules -------------------------------------------------------------------------------
    Fault(
        "average-decay-inverted",
        "optim/averaging/ema.py",
        "return 2 ** (-1 / self.half_life)",
        "return 1 - 2 ** (-1 / self.half_life)",
        "The average is of the last step alone.",
        "tests/optim/averaging/test_ema.py",
    ),
    Fault(
        "bias-correction-missing",
        "optim/large_batch/lamb.py",
        "update = mean / (1 - beta1**step) / (",
        "update = mean / (",
        "The direction of early steps is a tenth of what it should be, beside weight decay.",
        "tests/optim/large_batch/test_lamb.py",
    ),
    Fault(
        "embeddings-orthogonalized",
        "optim/optimizers/muon.py",
        "inside = {id(p) for m in blocks for p in m.parameters()} - outside",
        "inside = {id(p) for p in model.parameters()}",
        "Muon trains embeddings and head, which it should leave to AdamW.",
        "tests/optim/optimizers/test_muon.py::test_embeddings_and_heads_are_adamws tests/optim/optimizers/test_muon.py",
    ),
    Fault(
        "coefficient-digits-swapped",
        "updates/newton_schulz.py",
        "COEFFICIENTS = 3.4445, -4.7750, 2.0315",
        "COEFFICIENTS = 3.4445, -4.7750, 2.0135",
        "Singular values of Muon's updates lie in another range.",
        "tests/updates/test_newton_schulz.py",
    ),
    Fault(
        "matrix-scale-inverted",
        "optim/optimizers/muon.py",
        "math.sqrt(max(1, num_out / num_in))",
        "math.sqrt(max(1, num_in / num_out))",
        "Muon's learning rate does not transfer between layers.",
        "tests/optim/optimizers/test_muon.py",
    ),
    Fault(
        "embeddings-decay-as-first-block",
        "optim/learning_rate/layerwise_decay.py",
        "embeddings = max(map(len, stacks.values())) + 1",
        "embeddings = max(map(len, stacks.values()))",
        "Layerwise decay puts embeddings into the group of the first block.",
        "tests/optim/learning_rate/test_layerwise_decay.py",
    ),
    Fault(
        "temperature-not-squared",
        "optim/objective/distillation.py",
        "return temperature**2 * F.kl_div(",
        "return temperature * F.kl_div(",
        "The teacher counts for less, the softer its answers are.",
        "tests/optim/objective/test_distillation.py::test_the_divergence_is_its_closed_form",
    ),
    # Data -------------------------------------------------------------------------------------------------------------
    Fault(
        "packed-positions-not-reset",
        "features/flattening.py",
        "return {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}",
        "flat = {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}\n"
        '    return flat | {"position_ids": torch.arange(flat["input_ids"].shape[1])[None]}',
        "Packed examples attend to each other.",
        "tests/data/batching/test_packing.py tests/data/batching/test_padding_free.py",
    ),
    Fault(
        "example-predicts-the-next",
        "features/flattening.py",
        'row["labels"][:, :1] = -100',
        'row["labels"][:, :0] = -100',
        "Where examples are packed, their last tokens are trained on nonsense.",
        "tests/data/batching/test_packing.py tests/data/batching/test_padding_free.py",
    ),
    Fault(
        "duplicate-threshold-reversed",
        "data/sampling/deduplicate.py",
        "reached = [jaccard(sets[a], sets[b]) >= self.threshold",
        "reached = [jaccard(sets[a], sets[b]) <= self.threshold",
        "Examples that differ are dropped, and duplicates are kept.",
        "tests/data/sampling/test_deduplicate.py",
    ),
    Fault(
        "kept-examples-not-rescaled",
        "data/sampling/info_batch.py",
        "weights_N[kept_N] = len(low_N) / num_kept",
        "weights_N[kept_N] = 1.0",
        "Pruning biases the gradient towards hard examples.",
        "tests/data/sampling/test_info_batch.py",
    ),
    Fault(
        "importance-weights-inverted",
        "data/sampling/importance_sampling.py",
        "return positions, (1 / (len(p_B) * p_B[positions])).float()",
        "return positions, (len(p_B) * p_B[positions]).float()",
        "Hard examples count twice: they are drawn more often, and weighted more.",
        "tests/data/sampling/test_importance_sampling.py",
    ),
    Fault(
        "augmentation-without-epoch",
        "features/augmentation.py",
        "(plan.seed, plan.epoch, i % 2**32, purpose)",
        "(plan.seed, i % 2**32, purpose)",
        "Every epoch sees the same augmented images.",
        "tests/data/regularization/test_mixup.py tests/data/regularization/test_random_erasing.py",
    ),
    Fault(
        "mixed-labels-swapped",
        "features/mixing.py",
        "torch.lerp(others_BV, own_BV, shares_B[:, None])",
        "torch.lerp(own_BV, others_BV, shares_B[:, None])",
        "A mixed image has the label of its fainter part.",
        "tests/data/regularization/test_mixup.py",
    ),
    Fault(
        "clipped-after-update",
        "data/sampling/rho_loss.py",
        "                    if args.max_grad_norm:\n"
        "                        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)\n"
        "                    optimizer.step()\n",
        "                    optimizer.step()\n"
        "                    if args.max_grad_norm:\n"
        "                        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)\n",
        "The small model that judges examples ignores max_grad_norm.",
        "tests/data/sampling/test_rho_loss.py::test_the_copy_is_trained_as_a_loop_by_hand_with_clipped_gradients",
    ),
    # Models -----------------------------------------------------------------------------------------------------------
    Fault(
        "adapters-scaled-by-one",
        "model/compression/lora.py",
        "lora_alpha=alpha,",
        "lora_alpha=rank,",
        "LoRA's alpha does nothing.",
        "tests/model/compression/test_lora.py",
    ),
    Fault(
        "rslora-soup-scaling",
        "tools/soup.py",
        "return alpha / (math.sqrt(rank) if config.use_rslora else rank)",
        "return alpha / rank",
        "A soup of rsLoRA adapters is weaker than its ingredients.",
        "tests/cli/test_soup.py::test_a_soup_of_adapters_changes_the_weights_by_the_mean_of_their_changes",
    ),
    Fault(
        "kept-blocks-scaled-inversely",
        "model/curriculum/progressive_layer_drop.py",
        "new = x + (new - x) / kept",
        "new = x + (new - x) * kept",
        "The expectation of a block's output is not what an evaluation computes.",
        "tests/model/curriculum/test_progressive_layer_drop.py",
    ),
    Fault(
        "smoothing-without-gradient",
        "model/modules/chunked_cross_entropy.py",
        "slopes_CV.new_full(targets_C1.shape, smoothing - 1)",
        "slopes_CV.new_full(targets_C1.shape, -1.0)",
        "The chunked loss shows one number and trains another.",
        "tests/model/modules/test_chunked_cross_entropy.py",
    ),
    # Systems and budgets ----------------------------------------------------------------------------------------------
    Fault(
        "no-error-feedback",
        "system/synchronize/gradient_compression.py",
        "matrix_NM = matrix_NM + self.errors_[name]",
        "matrix_NM = matrix_NM + 0",
        "PowerSGD loses what does not fit into its rank: no error feedback.",
        "tests/system/synchronize/test_gradient_compression.py::test_what_was_not_sent_is_sent_later",
    ),
    Fault(
        "optimizer-not-sharded",
        "tools/planning.py",
        "states = 12 * traced.trained / devices",
        "states = 12 * traced.trained",
        "hf-accel plan says that ZeRO does not fit where it does.",
        "tests/tools/test_planning.py",
    ),
    Fault(
        "forecast-without-evaluations",
        "tools/calibration.py",
        'available = limit - self.once if unit == "seconds" else limit',
        "available = limit",
        "hf-accel plan promises more steps than a time allows.",
        "tests/tools/test_calibration.py",
    ),
    # Comparing --------------------------------------------------------------------------------------------------------
    Fault(
        "interval-one-sided",
        "compare/statistics.py",
        "half = float(student.ppf(0.5 + confidence / 2, len(values) - 1)",
        "half = float(student.ppf(confidence, len(values) - 1)",
        "95 % intervals are 90 % intervals, and speed-ups seem proven.",
        "tests/compare/test_statistics.py",
    ),
    Fault(
        "interpolation-doubt-subtracted",
        "compare/statistics.py",
        "math.exp(low - doubt), math.exp(high + doubt)",
        "math.exp(low + doubt), math.exp(high - doubt)",
        "The less a curve is known, the surer a speed-up looks.",
        "tests/compare/test_statistics.py::test_the_doubt_of_interpolation_widens_the_interval",
    ),
    Fault(
        "more-is-never-better",
        "compare/results.py",
        "sign = 1 if self.design.lower_is_better else -1",
        "sign = 1",
        "Of two accuracies the lower one wins.",
        "tests/compare/test_results.py::test_of_accuracies_the_higher_is_better",
    ),
    Fault(
        "placebo-judged-by-lower-end",
        "evidence/records.py",
        'theirs["high"] is None or theirs["high"] >= own["value"]',
        'theirs["low"] is None or theirs["low"] >= own["value"]',
        "A technique is called faster although its placebo may be as fast.",
        "tests/evidence/test_records.py",
    ),
    Fault(
        "placebos-may-be-none",
        "evidence/records.py",
        "if not placebos(document, arm):",
        "if None in placebos(document, arm):",
        "A technique is called faster although no placebo ran for it.",
        "tests/evidence/test_records.py",
    ),
    Fault(
        "search-without-free-options",
        "evidence/records.py",
        "and not untried(document) and",
        "and",
        "A speed-up over a baseline that never grouped by length counts as proven.",
        "tests/evidence/test_records.py",
    ),
    Fault(
        "trials-at-unequal-cost",
        "compare/tuning.py",
        "self.slope * math.log(cost)",
        "0 * math.log(cost)",
        "The search of the baseline ignores that grouping by length saves time.",
        "tests/compare/test_tuning.py",
    ),
    Fault(
        "p-values-not-adjusted",
        "evidence/records.py",
        "largest = max(largest, (len(p_values) - rank) * p_values[index])",
        "largest = max(largest, p_values[index])",
        "Of many candidates, one is proven by chance.",
        "tests/evidence/test_records.py",
    ),
    # The command line -------------------------------------------------------------------------------------------------
    Fault(
        "resume-flag-ignored",
        "cli/train.py",
        "resume_from_checkpoint=resume or (previous and str(previous))",
        "resume_from_checkpoint=previous and str(previous)",
        "hf-accel train --resume trains from the beginning.",
        "tests/cli/test_train.py::test_what_was_saved_is_kept_and_resumed",
    ),
    Fault(
        "devices-left-out-of-batch",
        "cli/plan.py",
        "kappa = rows * devices / tuned_for",
        "kappa = rows / tuned_for",
        "hf-accel plan proposes the learning rate of one device.",
        "tests/cli/test_plan.py",
    ),
    Fault(
        "soup-metric-always-lower",
        "cli/soup.py",
        "soups.greedy(scores, evaluate, lower_is_better=not more_is_better)",
        "soups.greedy(scores, evaluate, lower_is_better=True)",
        "hf-accel soup --greedy --metric accuracy keeps the worst models.",
        "tests/cli/test_soup.py::test_a_greedy_soup_keeps_what_is_more_accurate",
    ),
)
