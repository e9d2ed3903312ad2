"""Every recipe that we ship can be followed."""

from pathlib import Path

import pytest

from hf_accel import Recipe

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path, tmp_path):
    recipe = Recipe.load(path)
    arguments = recipe.with_changes("args.use_cpu=true").training_arguments()
    assert arguments.learning_rate == recipe.args["learning_rate"]
    techniques = recipe.build_techniques()
    assert techniques
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert recipe.task and recipe.data


def test_there_are_recipes():
    assert len(RECIPES) >= 2
