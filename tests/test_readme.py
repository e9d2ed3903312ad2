import re
from pathlib import Path

import pytest

import hf_accel
from hf_accel import Recipe
from hf_accel.recipe import known_techniques
from hf_accel.recipe.yaml_io import load_yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
AREAS = {"data": "data", "model": "model", "optim": "optimization", "budget": "budgeted", "system": "system"}
LIST = TEXT.split("<!-- techniques -->")[1].split("<!-- /techniques -->")[0]
OVERVIEW = (ROOT / "docs" / "techniques.md").read_text()
ROWS = dict(re.findall(r"^\| \[(\w+)\]\(.*?\) \| (.*) \|$", OVERVIEW, re.MULTILINE))


def test_the_list_has_every_technique_in_its_place():
    listed = {}
    for area, folder, links in re.findall(r"^\| (\w+) \| ([\w ]+) \| (.*) \|$", LIST, re.MULTILINE):
        for name, card in re.findall(r"\[(\w+)\]\((.*?)\)", links):
            assert (ROOT / card).read_text().startswith(f"# {name}\n")
            listed[name] = area, folder
    for name, technique in known_techniques().items():
        *_, folder, _ = path = technique.__module__.split(".")
        assert listed.pop(name) == (AREAS[path[1]], folder.replace("_", " "))
    assert not listed


@pytest.mark.parametrize("name", known_techniques())
def test_a_row_of_the_overview_says_what_the_code_says(name):
    technique = known_techniques()[name]
    area, saves, _, fidelity, _ = ROWS[name].split(" | ")
    assert saves and (area, fidelity) == (AREAS[technique.__module__.split(".")[1]], technique.fidelity)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_recipe_can_be_followed():
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    recipe = Recipe.from_dict(load_yaml(text))
    assert len(recipe.build_techniques()) == 3 and recipe.training_arguments().learning_rate == 2e-5
    changes = re.findall(r"--set ([^ ]+)", TEXT)
    assert recipe.with_changes(*changes).build_techniques()[1].mega_batch == 20


def test_the_scripts_name_what_there_is():
    lines = re.findall(r"from hf_accel import (.*)", TEXT)
    assert lines and all(hasattr(hf_accel, name.strip()) for line in lines for name in line.split(","))
