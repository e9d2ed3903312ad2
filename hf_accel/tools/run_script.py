"""Run an unmodified script with techniques attached to the trainers that it builds.

    hf-accel run --technique "InfoBatch(keep=0.5)" --budget 30min train.py --learning_rate 2e-5
    accelerate launch -m hf_accel.cli run --recipe recipe.yaml train.py --learning_rate 2e-5
    torchrun --nproc_per_node 2 -m hf_accel.cli run --recipe recipe.yaml train.py --learning_rate 2e-5

The script may use any subclass of `transformers.Trainer`: from transformers, TRL, sentence-transformers or the script.
When it calls ``train()``, `hf_accel.attach` gives each trainer fresh techniques.  With nothing to attach, the script
runs as under ``python``, without any of our code.
"""

from __future__ import annotations

import dataclasses
import functools
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import Trainer, set_seed
from transformers.models.auto import modeling_auto as auto

from hf_accel.adapters import unwrapped
from hf_accel.host import replace_arguments
from hf_accel.recipe import Recipe, RecipeError, read_technique
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
def attached(recipe: Recipe) -> Iterator[None]:
    """Attach a recipe to trainers that start to train inside.

    Every subclass calls ``Trainer.train``, whatever else it overrides.  Replacing the class ``transformers.Trainer``
    would miss subclasses that exist already.
    """
    if not recipe.techniques and not recipe.args and recipe.budget is None:
        yield
        return
    plain = Trainer.train

    @functools.wraps(plain)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, AccelTrainerMixin):
            return plain(self, *args, **kwargs)
        equip(self, recipe)
        output = self.train(*args, **kwargs)  # with the class that `equip` has set
        if self.is_world_process_zero():
            Console(stderr=True).print(self.receipt.table())
        return output

    Trainer.train = train
    try:
        yield
    finally:
        Trainer.train = plain


def equip(trainer: Trainer, recipe: Recipe) -> None:
    """Attach a recipe's techniques, and give the trainer its arguments."""
    found: Any = trainer.model
    model = type(unwrapped(found)).__name__
    models = MODELS_OF_TASKS.get(recipe.task or "")
    if models is not None and model not in models.values():
        raise RecipeError(f"task({recipe.task!r}): the script trains a {model}. Give a recipe for its task.")
    if recipe.args:
        merged: Any = recipe.merge_args(trainer.args)
        for name in sorted(READ_AT_INIT & recipe.args.keys()):
            if getattr(merged, name) != getattr(trainer.args, name):
                raise RecipeError(f"args.{name}: the script built its trainer with another value. Set it there.")
        replace_arguments(trainer, merged)
        if "seed" in recipe.args:
            set_seed(trainer.args.seed)
    attach(trainer, techniques=recipe.build_techniques())
