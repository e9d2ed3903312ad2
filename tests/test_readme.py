import re
from pathlib import Path

import pytest

import hf_accel
from hf_accel import Recipe
from hf_accel.notation import load_yaml
from hf_accel.recipe import known_techniques

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
AREAS = {"data": "data", "model": "model", "optim": "optimization", "budget": "budgeted", "system": "system"}
ROWS = dict(re.findall(r"^\| \[`(\w+)`\](\(.*)$", TEXT, re.MULTILINE))


def test_the_table_has_every_technique():
    assert sorted(ROWS) == sorted(known_techniques())


@pytest.mark.parametrize("name", known_techniques())
def test_a_row_says_what_the_code_says(name):
    technique = known_techniques()[name]
    link, area, _, fidelity, _ = (cell.strip() for cell in ROWS[name].strip("|").split("|"))
    assert (ROOT / link.strip("()")).read_text().find(f"class {name}(") > 0
    assert (area, fidelity) == (AREAS[technique.__module__.split(".")[1]], technique.fidelity)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_recipe_can_be_followed():
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    recipe = Recipe.from_dict(load_yaml(text))
    assert len(recipe.build_techniques()) == 3 and recipe.training_arguments().learning_rate == 2e-5
    changes = re.findall(r"--set ([^ ]+)", TEXT)
    assert recipe.with_changes(*changes).build_techniques()[1].keep == 0.7


def test_the_script_names_what_there_is():
    (names,) = re.findall(r"from hf_accel import (.*)", TEXT)
    assert all(hasattr(hf_accel, name.strip()) for name in names.split(","))
