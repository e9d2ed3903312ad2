"""Define the options of a run beside ``TrainingArguments``, for ``HfArgumentParser`` and ``TrlParser``.

    parser = HfArgumentParser((AccelArguments, TrainingArguments))
    accel, args = parser.parse_args_into_dataclasses()
    trainer = AccelTrainer(model=model, args=args, train_dataset=train, **accel.for_trainer())

Everything else of a run stays in ``TrainingArguments``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_accel.recipe import Recipe, RecipeError, build_technique, read_technique


@dataclass
class AccelArguments:
    """Options of a command line that make training faster."""

    recipe: str | None = field(
        default=None, metadata={"help": "YAML file with args, budget and techniques (hf_accel.Recipe)."}
    )
    techniques: list[str] = field(
        default_factory=list,
        metadata={"help": "Techniques in Python syntax, for example 'InfoBatch(keep=0.5)'; after the recipe's."},
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "Limit of the run with a unit, for example 30min, 500steps, 3epochs or 1e9tok."},
    )
    micro_batch_size: str | None = field(
        default=None,
        metadata={"help": "Examples per forward pass on a device: a number, or 'auto' for the most that fit."},
    )
    allow_changes: bool = field(
        default=False, metadata={"help": "Resume even if the checkpoint was made with other techniques."}
    )
    async_checkpoints: bool = field(
        default=False, metadata={"help": "Write checkpoints while training continues; not under DeepSpeed."}
    )

    def __post_init__(self) -> None:
        if self.micro_batch_size not in (None, "auto"):
            if not str(self.micro_batch_size).isdecimal() or int(self.micro_batch_size) < 1:
                raise ValueError(f"micro_batch_size({self.micro_batch_size!r}): must be 'auto' or a number above zero.")

    def for_trainer(self) -> dict[str, Any]:
        """Return these options as keyword arguments of `AccelTrainer`."""
        recipe = None if self.recipe is None else Recipe.load(self.recipe)
        techniques = [read_technique(text) for text in self.techniques]
        if self.budget is not None:
            if recipe is not None and recipe.budget is not None:
                raise RecipeError(
                    f"budget: the arguments say {self.budget!r} and the recipe says {recipe.budget!r}. "
                    "Remove one of them."
                )
            techniques.insert(0, build_technique("Budget", {"limit": self.budget}))
        size = self.micro_batch_size
        return {
            "recipe": recipe,
            "techniques": techniques,
            "micro_batch_size": size if size in (None, "auto") else int(size),
            "allow_changes": self.allow_changes,
            "async_checkpoints": self.async_checkpoints,
        }
