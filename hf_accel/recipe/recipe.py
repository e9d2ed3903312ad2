"""Describe a whole run in one YAML file, with the same values as in Python.

    task: causal-lm                    # for `hf-accel train`; your own script needs only args, budget and techniques
    model: {config: {model_type: llama, hidden_size: 128}}
    data: {source: stdlib}
    args: {learning_rate: 1e-3}        # TrainingArguments, verbatim
    budget: 30min
    techniques:                        # asked in this order
      - InfoBatch: {keep: 0.5}
      - ExponentialMovingAverage

No templates, no inheritance, no variables.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import is_deepspeed_available
from transformers import TrainingArguments

from hf_accel.bounds import broken_rule, field_hints
from hf_accel.host.arguments import non_default_arguments
from hf_accel.recipe.lookup import RecipeError, build_technique, known_techniques
from hf_accel.recipe.technique_syntax import nearest
from hf_accel.recipe.yaml_io import dump_yaml, load_yaml
from hf_accel.technique import Technique

Arguments = TypeVar("Arguments", bound=TrainingArguments)


@dataclass
class Recipe:
    """A run: data, model, arguments, budget and techniques.

    Args:
        task: Name of a task of `hf_accel.tasks`.
        model: A path or name, or options of the task.
        data: Options of the task.
        args: Fields of ``TrainingArguments``, or of the trainer's own subclass of it.
        budget: Limits as `Budget` takes them.
        techniques: Names, one-key mappings of a name to its fields, or `Technique` objects; stored as mappings.
            A name is one of `hf_accel`, or ``package.module:Class`` for others.
    """

    task: str | None = None
    model: str | dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    budget: str | list[str] | None = None
    techniques: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("data", "args"):
            if not isinstance(value := getattr(self, key) or {}, dict):
                raise RecipeError(f"{key}({value!r}): must be a mapping. Write '{key}: {{name: value}}'.")
            setattr(self, key, value)
        if not isinstance(self.model, str | dict | None):
            raise RecipeError(f"model({self.model!r}): must be a path or a mapping. Write 'model: {{config: ...}}'.")
        limits = [] if self.budget is None else self.budget if isinstance(self.budget, list) else [self.budget]
        for limit in limits:
            if not isinstance(limit, str):
                raise RecipeError(f"budget({limit!r}): must have a unit. Write, for example, '30min' or '500steps'.")
        if not isinstance(self.techniques or [], Sequence) or isinstance(self.techniques, str):
            raise RecipeError(f"techniques({self.techniques!r}): must be a list. Write '- Name: {{field: value}}'.")
        self.techniques = [_entry(technique) for technique in self.techniques or []]

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"recipe({str(path)!r}): there is no such file. Check the path.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe({str(path)!r}): cannot be read ({error}). Give a text file.") from None
        try:
            document = load_yaml(text)
        except ValueError as error:
            raise RecipeError(f"recipe({str(path)!r}): {error}") from None
        if document is None:
            raise RecipeError(f"recipe({str(path)!r}): the file is empty. Write at least 'args:'.")
        return cls.from_dict(document)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data."""
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(document, Mapping):
            raise RecipeError(f"recipe: must be a mapping, not a {type(document).__name__}. Known: {', '.join(known)}.")
        for key in document:
            if key not in known:
                raise RecipeError(f"recipe: there is no key {key!r}. {nearest(str(key), known)}")
        return cls(**copy.deepcopy(dict(document)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without unset keys."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, {}, [])}

    def save(self, path: str | Path) -> None:
        """Write a YAML file."""
        Path(path).write_text(dump_yaml(self.to_dict()), encoding="utf-8")

    def with_changes(self, *assignments: str) -> Recipe:
        """Return the recipe with values replaced, each as ``key=value`` with dots in the key and YAML in the value.

        Examples are ``args.learning_rate=1e-3``, ``techniques.InfoBatch.keep=0.7`` and ``budget=2min``.
        """
        document = copy.deepcopy({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        for assignment in assignments:
            key, sign, text = assignment.partition("=")
            if not sign or not key.strip():
                raise RecipeError(f"set({assignment!r}): must be 'key=value'. Write, for example, 'budget=2min'.")
            try:
                value = load_yaml(text)
            except ValueError as error:
                raise RecipeError(f"set({assignment!r}): {error}") from None
            _assign(document, key.strip(), value)
        return Recipe.from_dict(document)

    def build_techniques(self) -> list[Technique]:
        """Build fresh techniques, the budget first."""
        techniques = [build_technique(name, fields) for entry in self.techniques for name, fields in entry.items()]
        if self.budget is None:
            return techniques
        if rivals := [technique for technique in techniques if "budget" in type(technique).implemented_hooks()]:
            raise RecipeError(f"budget({self.budget!r}): {rivals[0]!r} is a budget, too. Keep one.")
        return [build_technique("Budget", {"limit": self.budget}), *techniques]

    def training_arguments(self, kind: type[Arguments] = TrainingArguments) -> Arguments:
        """Build the arguments of the run."""
        check_fields("args", self.args, kind)
        if self.args.get("deepspeed") and not is_deepspeed_available():
            raise RecipeError("args.deepspeed: needs deepspeed. Install it with: pip install 'hf-accel[deepspeed]'.")
        try:
            return kind(**self.args)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"args: {' '.join(str(error).split())}") from error

    def of_run(self, args: dict[str, Any], techniques: Sequence[Any]) -> Recipe:
        """Return the recipe of a run with these arguments and techniques.

        Store a leading `Budget` under ``budget:``, so that ``--budget`` can override it.
        """
        first, kind = next(iter(techniques), None), known_techniques()["Budget"]
        budget: Any = vars(first)["limit"] if type(first) is kind else None
        return dataclasses.replace(self, args=args, techniques=list(techniques)[budget is not None :], budget=budget)

    def merge_args(
        self, args: TrainingArguments | None, kind: type[TrainingArguments] = TrainingArguments
    ) -> TrainingArguments:
        """Merge the given arguments with the recipe's, or build them; values in both must be the same.

        A given argument counts only if it differs from its default.
        """
        if args is None:
            return self.training_arguments(kind)
        if not self.args:
            return args
        kind = type(args)
        check_fields("args", self.args, kind)
        given = non_default_arguments(args)
        merged = dataclasses.replace(self, args=given | self.args).training_arguments(kind)
        for name, value in self.args.items():
            if name in given and given[name] != getattr(merged, name):
                raise RecipeError(f"{name}: args say {given[name]!r} and the recipe says {value!r}. Remove one.")
        return merged


def check_fields(where: str, values: Mapping[str, Any], kind: type) -> None:
    """Raise RecipeError if a name is not a field of a dataclass, or a value breaks the field's annotation."""
    hints = field_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.init]
    for name, value in values.items():
        if name not in known:
            raise RecipeError(f"{where}: there is no option {name!r}. {nearest(str(name), known)}")
        if (rule := broken_rule(value, hints[name])) is not None:
            raise RecipeError(f"{where}.{name}({value!r}): must be {rule}. Correct the value.")


def _entry(technique: Any) -> dict[str, dict[str, Any]]:
    """Return the one-key mapping that stands for a technique."""
    if isinstance(technique, Technique):
        kind = type(technique)
        name = kind.__name__ if known_techniques().get(kind.__name__) is kind else f"{kind.__module__}:{kind.__name__}"
        return {name: {f.name: getattr(technique, f.name) for f in dataclasses.fields(technique) if f.init}}  # type: ignore[arg-type]
    if isinstance(technique, str):
        return {technique: {}}
    if isinstance(technique, dict) and len(technique) == 1:
        ((name, fields),) = technique.items()
        if isinstance(name, str) and isinstance(fields or {}, dict):
            return {name: fields or {}}
    raise RecipeError(f"techniques({technique!r}): not a name with its fields. Write '- Name: {{field: value}}'.")


def _assign(document: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in a recipe's plain data."""
    head, *path = key.split(".")
    if head not in document:
        raise RecipeError(f"set({key!r}): there is no key {head!r}. {nearest(head, document)}")
    node, path = document, [head, *path]
    if head == "techniques" and len(path) > 1:
        rest = key.removeprefix("techniques.")
        named = [(name, entry) for entry in document[head] for name in entry if f"{rest}.".startswith(f"{name}.")]
        if len(named) != 1:
            names = [name for entry in document[head] for name in entry]
            problem = f"{len(named)} techniques {named[0][0]!r}" if named else f"no technique {path[1]!r}"
            remedy = "Set the list as a whole." if named else nearest(path[1], names)
            raise RecipeError(f"set({key!r}): the recipe has {problem}. {remedy}")
        ((name, node),) = named
        path = [name, *rest.removeprefix(name).split(".")[1:]]
    for depth, part in enumerate(path[:-1], 1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"set({key!r}): {'.'.join(path[:depth])} has no parts. Set it as a whole.")
    node[path[-1]] = value
