"""Run an unmodified script with techniques attached to the trainers that it builds.

    hf-accel run --technique "InfoBatch(keep=0.5)" --budget 30min train.py --learning_rate 2e-5
    accelerate launch -m hf_accel.cli run --recipe recipe.yaml train.py --learning_rate 2e-5
    torchrun --nproc_per_node 2 -m hf_accel.cli run --recipe recipe.yaml train.py --learning_rate 2e-5

The script may use any subclass of `transformers.Trainer`: from transformers, TRL, sentence-transformers or the script.
When it calls ``train()``, `hf_accel.attach` gives each trainer fresh techniques.  With nothing to attach, the script
runs as under ``python``, without any of our code.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import Trainer, TrainingArguments, set_seed
from transformers.models.auto import modeling_auto as auto
from transformers.trainer_utils import has_length

from hf_accel.adapters import unwrapped
from hf_accel.host import replace_arguments
from hf_accel.recipe import Recipe, RecipeError, read_technique
from hf_accel.technique import Technique
from hf_accel.trainer import AccelTrainerMixin, attach

MODELS_OF_TASKS = {
    "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
"""Classes of the models that a recipe's task trains, by model type."""

READ_AT_INIT = {
    "disable_tqdm",
    "enable_jit_checkpoint",
    "full_determinism",
    "label_names",
    "label_smoothing_factor",
    "push_to_hub",
    "report_to",
    "use_cache",
}
"""Arguments that a Trainer reads only while it is built."""


def with_options(recipe: Recipe, techniques: list[str], budget: str | None) -> Recipe:
    """Add techniques and a budget of the command line to a recipe; fail on a mistake before the script starts."""
    if budget is not None and recipe.budget is not None:
        raise RecipeError(f"budget: the options say {budget!r} and the recipe says {recipe.budget!r}. Remove one.")
    entries = [*recipe.techniques, *map(read_technique, techniques)]
    recipe = dataclasses.replace(recipe, techniques=entries, budget=budget or recipe.budget)
    recipe.build_techniques()
    return recipe


def run_script(script: Path, arguments: list[str]) -> None:
    """Run a script in this process, as ``python script arguments`` does."""
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


@contextmanager
def attached(recipe: Recipe, *, allow_changes: bool = False) -> Iterator[None]:
    """Attach a recipe to trainers that start to train inside; for ``allow_changes``, see `AccelTrainerMixin`.

    Every subclass calls ``Trainer.train``, whatever else it overrides.  Replacing the class ``transformers.Trainer``
    would miss subclasses that exist already.
    """
    if not recipe.techniques and not recipe.args and recipe.budget is None:
        yield
        return
    plain, met, ended = Trainer.train, [], False

    @functools.wraps(plain)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        met.append(self)
        if isinstance(self, AccelTrainerMixin):
            return plain(self, resume_from_checkpoint, *args, **kwargs)
        equip(self, recipe, allow_changes=allow_changes)
        # `equip` changed its class.  If its own ``train`` called this function, do not enter it again.
        engine, one_pass = self.accel, super(AccelTrainerMixin, self).training_step  # type: ignore[misc]
        output = engine.train(resume_from_checkpoint, lambda found: plain(self, found, *args, **kwargs), one_pass)
        if self.is_world_process_zero():
            Console(stderr=True).print(self.receipt.table())
        return output

    Trainer.train = train
    try:
        yield
        ended = True
    except SystemExit:
        ended = True
        raise
    finally:
        Trainer.train = plain
        if ended and not met:
            say("The script never called Trainer.train() in this process, so nothing was attached.")


def say(line: str) -> None:
    """Print one line beside the script's output."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"hf-accel: {line}", markup=False)


def equip(trainer: Trainer, recipe: Recipe, *, allow_changes: bool) -> None:
    """Attach a recipe's techniques, and give the trainer its arguments."""
    found: Any = trainer.model
    model = type(unwrapped(found)).__name__
    models = MODELS_OF_TASKS.get(recipe.task or "")
    if models is not None and model not in models.values():
        raise RecipeError(f"task({recipe.task!r}): the script trains a {model}. Give a recipe for its task.")
    techniques = recipe.build_techniques()
    trainer.args = yielding_args(trainer, recipe.args, techniques)
    if recipe.args:
        merged: Any = recipe.merge_args(trainer.args)
        for name in sorted(READ_AT_INIT & recipe.args.keys()):
            if getattr(merged, name) != getattr(trainer.args, name):
                raise RecipeError(f"args.{name}: the script built its trainer with another value. Set it there.")
        replace_arguments(trainer, merged)
        if "seed" in recipe.args:
            set_seed(trainer.args.seed)
    attach(trainer, techniques=techniques, allow_changes=allow_changes)


def yielding_args(trainer: Any, given: Mapping[str, Any], techniques: Sequence[Technique]) -> TrainingArguments:
    """Return the script's arguments without a length or a warm-up that the command line replaces; print a line."""
    args, hooks = copy.copy(trainer.args), {hook: t for t in techniques for hook in t.implemented_hooks()}
    budget, schedule = hooks.get("budget"), hooks.get("schedule")
    steps = planned_steps(trainer)
    settled = {name: value for name, value in given.items() if name in ("max_steps", "warmup_steps")}
    if budget is not None:
        settled["max_steps"] = -1
    if schedule is not None:
        settled.setdefault("warmup_steps", 0)
    elif budget is not None and args.warmup_steps >= 1 and steps:
        settled.setdefault("warmup_steps", min(args.warmup_steps / steps, 0.99))
    for name, value in settled.items():
        theirs = getattr(args, name)
        if theirs not in (value, -1, 0):
            reason = schedule if name == "warmup_steps" and schedule is not None else budget
            source = f"args.{name} of the recipe" if reason is None or name in given else repr(reason)
            say(f"{source} replaces {name}={theirs} of the script by {name}={value:.4g}.")
            setattr(args, name, value)
    return args


def planned_steps(trainer: Any) -> int | None:
    """Return the number of updates that the script's own arguments request; None if the data has no length."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    if not has_length(trainer.train_dataset):
        return None
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(math.ceil(len(trainer.train_dataset) / batch_size) * args.num_train_epochs)
