from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import annotated_types as at
import pytest
from transformers import TrainingArguments

from hf_accel import Budget, Recipe, RecipeError, Technique
from hf_accel.recipe import known_techniques, read_technique


@dataclass(eq=False)
class Third(Technique):
    """A technique of somebody else."""

    share: Annotated[float, at.Interval(ge=0, le=1)] = 0.5
    names: list[str] | None = None


THIRD = f"{__name__}:Third"


class NotATechnique:
    pass


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


FULL = f"""
task: causal-lm
model: {{config: {{model_type: llama, hidden_size: 32}}}}
data: {{source: stdlib}}
args: {{learning_rate: 1e-3, eval_strategy: no, max_steps: 1_000}}
techniques:
  - {THIRD}: {{share: 0.25, names: [no, 1e-3]}}
  - Budget: {{limit: [3epochs, 500steps]}}
"""


def test_load_build_and_save(write, tmp_path):
    recipe = Recipe.load(write(FULL))
    assert recipe.args == {"learning_rate": 0.001, "eval_strategy": "no", "max_steps": 1000}
    args = recipe.training_arguments()
    assert args.learning_rate == 0.001 and args.max_steps == 1000
    first, second = recipe.build_techniques()
    assert (first.share, first.names, second.limit) == (0.25, ["no", 0.001], ["3epochs", "500steps"])
    assert recipe.build_techniques()[0] is not first
    recipe.save(tmp_path / "copy.yaml")
    assert Recipe.load(tmp_path / "copy.yaml") == recipe == Recipe.from_dict(recipe.to_dict())


def test_techniques_as_objects_are_kept_as_their_fields():
    recipe = Recipe(techniques=[Budget("3epochs"), Third(share=0.75)])
    assert recipe.techniques == [{"Budget": {"limit": "3epochs"}}, {THIRD: {"share": 0.75, "names": None}}]
    assert [repr(technique) for technique in recipe.build_techniques()] == [
        "Budget(limit='3epochs')",
        "Third(share=0.75, names=None)",
    ]


def test_every_technique_can_be_named():
    known = known_techniques()
    assert "Budget" in known and "Technique" not in known and "AccelTrainer" not in known
    for name in known:
        (built,) = Recipe(techniques=[name]).build_techniques()
        assert Recipe(techniques=[built]).build_techniques()[0].__dict__ == built.__dict__


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("args.learning_rate=1e-4", lambda r: r.args["learning_rate"] == 1e-4),
        ("args.warmup_steps=0.1", lambda r: r.args["warmup_steps"] == 0.1),
        ("args.run_name=a=b", lambda r: r.args["run_name"] == "a=b"),
        ("budget=2min", lambda r: r.budget == "2min"),
        ("budget=[2min, 500steps]", lambda r: r.budget == ["2min", "500steps"]),
        ("budget=", lambda r: r.budget is None),
        ("model.config.hidden_size=64", lambda r: r.model["config"] == {"model_type": "llama", "hidden_size": 64}),
        ("model=some/path", lambda r: r.model == "some/path"),
        (f"techniques.{THIRD}.share=0.75", lambda r: r.techniques[0][THIRD]["share"] == 0.75),
        ("techniques=[]", lambda r: r.techniques == []),
    ],
)
def test_set(write, change, expected):
    recipe = Recipe.load(write(FULL))
    assert expected(recipe.with_changes(change))
    assert recipe == Recipe.load(write(FULL)), "the recipe itself is not changed"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[1]", "recipe: must be a mapping, not a list. Known: task, model, data, args, budget, techniques."),
        ("argz: {}", "recipe: there is no key 'argz'. Did you mean 'args'?"),
        ("args: [1]", "args([1]): must be a mapping."),
        ("args: {learning_rat: 1}", "args: there is no option 'learning_rat'. Did you mean 'learning_rate'?"),
        ("args: {learning_rate: fast}", "args.learning_rate('fast'): must be a float, not a str. Correct the value."),
        ("args: {optim: adamm}", "args: adamm is not a valid OptimizerNames"),
        ("model: 3", "model(3): must be a path or a mapping."),
        ("budget: 30", "budget(30): must have a unit. Write, for example, '30min' or '500steps'."),
        ("budget: 3 parsecs", "Budget('3 parsecs'): there is no unit 'parsecs'."),
        ("techniques: Budget", "techniques('Budget'): must be a list."),
        ("techniques: ['LengthGrouped(mega_batch=2)']", "is a call. In a recipe, write '- Name: {field: value}'."),
        ("techniques: [3]", "techniques(3): not a name with its fields. Write '- Name: {field: value}'."),
        ("techniques: [{Budget: {}, Other: {}}]", "not a name with its fields."),
        ("techniques: [{Budget: 30min}]", "not a name with its fields."),
        ("techniques: [budgte]", "technique('budgte'): there is no such technique. Did you mean 'Budget'?"),
        ("techniques: [{Budget: {limits: 1s}}]", "Budget: there is no field 'limits'. Did you mean 'limit'?"),
        (f"techniques: [{{'{THIRD}': {{share: 2}}}}]", "Third(share=2): share must be >= 0 and <= 1."),
        ("techniques: ['no_such_package:X']", "technique('no_such_package:X'): cannot be imported"),
        (f"techniques: ['{__name__}:Nothing']", "cannot be imported"),
        (f"techniques: ['{__name__}:NotATechnique']", "is not a Technique."),
        ("{budget: 1s, techniques: [Budget]}", "budget('1s'): Budget(limit='1epoch') is a budget, too. Keep one."),
    ],
)
def test_mistakes_are_named_with_their_remedy(write, document, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        recipe = Recipe.load(write(document))
        recipe.training_arguments()
        recipe.build_techniques()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a: [", "Correct the YAML there."),
        ("budget: 1s\nbudget: 2s", "'budget' appears twice"),
    ],
)
def test_bad_files_are_named(write, text, message):
    path = write(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        Recipe.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_a_folder_and_bytes_are_named(tmp_path):
    with pytest.raises(RecipeError, match="there is no such file"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "bytes")


def test_a_budget_comes_first():
    budget, other = Recipe(budget=["30min", "500steps"], techniques=[THIRD]).build_techniques()
    assert repr(budget) == "Budget(limit=['30min', '500steps'])" and repr(other) == repr(Third())


def test_a_technique_that_is_there_twice_is_not_set_by_name():
    with pytest.raises(RecipeError, match="the recipe has 2 techniques 'Budget'. Set the list as a whole."):
        Recipe(techniques=["Budget", "Budget"]).with_changes("techniques.Budget.limit=3s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("budget", "set('budget'): must be 'key=value'."),
        ("=3", "must be 'key=value'."),
        ("arg.seed=1", "set('arg.seed'): there is no key 'arg'. Did you mean 'args'?"),
        ("args.seed=[", "set('args.seed=['): "),
        ("task.unit=1", "set('task.unit'): task has no parts. Set it as a whole."),
        ("techniques.Infobatch.keep=1", "set('techniques.Infobatch.keep'): the recipe has no technique 'Infobatch'."),
        ("budget=5", "budget(5): must have a unit."),
    ],
)
def test_bad_changes_are_named(write, change, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.load(write(FULL)).with_changes(change)


def test_arguments_and_recipe_are_merged(tmp_path):
    given = TrainingArguments(str(tmp_path), learning_rate=1e-3, seed=7, report_to="none")
    recipe = Recipe(args={"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"})
    merged = recipe.merge_args(given)
    assert (merged.max_steps, merged.learning_rate, merged.seed) == (5, 1e-3, 7)
    assert merged.output_dir == str(tmp_path) and merged.lr_scheduler_type == "cosine"
    assert given.max_steps == -1, "the given arguments are not changed"
    assert Recipe().merge_args(given) is given
    assert recipe.merge_args(None).max_steps == 5


def test_a_value_that_both_say_differently_is_refused(tmp_path):
    given = TrainingArguments(str(tmp_path), learning_rate=1e-3)
    with pytest.raises(RecipeError, match="learning_rate: args say 0.001 and the recipe says 0.01"):
        Recipe(args={"learning_rate": 1e-2}).merge_args(given)


def test_techniques_as_python_writes_them():
    technique = Third(share=0.75, names=["a"])
    again = read_technique(repr(technique).replace("Third", THIRD))
    assert repr(again) == repr(technique)
    assert repr(read_technique("Budget('2min')")) == "Budget(limit='2min')"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Budgte('1s')", "Did you mean 'Budget'?"),
        ("Budget(1, 2)", "Budget: takes at most 1 values, not 2."),
        ("Budget('1s', limit='2s')", "Budget: 'limit' is given twice."),
        ("Budget(limt='1s')", "Did you mean 'limit'?"),
        ("Budget(limit=1s)", "not a name with literal values"),
    ],
)
def test_bad_techniques_are_named(text, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_technique(text)
