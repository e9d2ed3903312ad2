import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_accel import AccelArguments, AccelTrainer, Recipe, RecipeError
from hf_accel.testing import CountingText, tiny_llama


def parse(*line: str):
    parser = HfArgumentParser((AccelArguments, TrainingArguments))
    return parser.parse_args_into_dataclasses(list(line))


def test_beside_training_arguments(tmp_path):
    accel, args = parse(
        *("--output_dir", str(tmp_path), "--learning_rate", "1e-3", "--budget", "3epochs", "--micro_batch_size", "4"),
        *("--allow_changes", "--techniques", "Budget", "Budget('2min')"),
    )
    assert args.learning_rate == 1e-3
    given = accel.for_trainer()
    assert [repr(technique) for technique in given.pop("techniques")] == [
        "Budget(limit='3epochs')",
        "Budget(limit='1epoch')",
        "Budget(limit='2min')",
    ]
    assert given == {
        "recipe": None,
        "micro_batch_size": 4,
        "allow_changes": True,
        "async_checkpoints": False,
    }


def test_without_options_nothing_is_asked_for():
    (accel, _) = parse()
    assert accel.for_trainer() == {
        "recipe": None,
        "techniques": [],
        "micro_batch_size": None,
        "allow_changes": False,
        "async_checkpoints": False,
    }


def test_the_trainer_takes_them(tmp_path):
    accel, args = parse("--output_dir", str(tmp_path), "--budget", "3steps", "--micro_batch_size", "2", "--use_cpu")
    trainer = AccelTrainer(model=tiny_llama(), args=args, train_dataset=CountingText(), **accel.for_trainer())
    assert [repr(technique) for technique in trainer.techniques] == ["Budget(limit='3steps')"]
    assert trainer.micro_batch_size == 2


def test_recipe(tmp_path):
    Recipe(budget="3epochs").save(tmp_path / "recipe.yaml")
    (accel, _) = parse("--recipe", str(tmp_path / "recipe.yaml"), "--micro_batch_size", "auto")
    given = accel.for_trainer()
    assert given["recipe"] == Recipe(budget="3epochs") and given["micro_batch_size"] == "auto"
    both = AccelArguments(recipe=str(tmp_path / "recipe.yaml"), budget="2min")
    with pytest.raises(RecipeError, match="budget: the arguments say '2min' and the recipe says '3epochs'"):
        both.for_trainer()


def test_trl_parser_reads_a_configuration(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    (tmp_path / "config.yaml").write_text("budget: 2min\ntechniques: ['Budget']\nmax_steps: 3\n")
    parser = trl.TrlParser((AccelArguments, TrainingArguments))
    accel, args = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert accel.budget == "2min" and accel.techniques == ["Budget"] and args.max_steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": "big"}, "micro_batch_size('big'): must be 'auto' or a number above zero."),
        ({"micro_batch_size": "0"}, "micro_batch_size('0'): must be"),
        ({"budget": "3 parsecs"}, "there is no unit 'parsecs'"),
        ({"techniques": ["Budgte"]}, "Did you mean 'Budget'?"),
        ({"recipe": "none.yaml"}, "recipe('none.yaml'): there is no such file."),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AccelArguments(**options).for_trainer()


def test_every_option_is_explained():
    for field in AccelArguments.__dataclass_fields__.values():
        assert field.metadata["help"].endswith("."), field.name
