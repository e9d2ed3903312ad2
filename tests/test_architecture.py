"""The shape of the package: imports run one way, and each part keeps to its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Trainer

import hf_accel
from hf_accel import contrib
from hf_accel.host.signatures import RELIED_ON
from hf_accel.host.view import MAKERS_OF_LOADERS, PRIVATE, PUBLIC
from hf_accel.recipe import known_techniques
from hf_accel.technique import Technique
from hf_accel.testing import tiny_trainer

ROOT = Path(hf_accel.__file__).parent
AREAS = ("data", "model", "optim", "budget", "system", "contrib")
LAYERS = (
    ("bounds", "clock", "metrics", "weights", "adapters", "batch", "preserve", "losses", "receipt", "meters"),
    ("technique", "run"),
    ("recipe", "host", "checkpoints", "stream", "surgery", "features"),
    ("engine",),
    ("updates",),
    (*AREAS, "trainer", "arguments"),
    ("testing", "tasks", "tools"),
    ("evidence",),
    ("compare",),
    ("cli",),
)
"""What may import what: a part imports its own layer and those before it.  Within a layer there are no circles."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
MOST_LINES = 400
LONGER = {
    "hf_accel.compare.comparison": 480,  # one class, from the arms to their runs
}
"""Files that may be longer, and how long."""


def modules() -> dict[str, Path]:
    """The files of the package by the name of the module."""
    paths = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in paths.items()}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever it does so."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_accel"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def part(name: str) -> str:
    """The package or module of the root that a module is a part of."""
    return name.split(".")[1] if "." in name else ""


IMPORTS = {name: {other for other in imports(name) if other != name} for name in MODULES}


def test_every_part_has_a_layer():
    assert {part(name) for name in MODULES if part(name)} == set(RANK) - ({"contrib"} - set(map(part, MODULES)))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    if not part(name):
        return
    above = {other for other in IMPORTS[name] if part(other) and RANK[part(other)] > RANK[part(name)]}
    assert not above


def test_imports_form_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(IMPORTS[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(MODULES):
        if name != "hf_accel":
            IMPORTS[name].discard("hf_accel")  # for the folder of the package
    for name in sorted(MODULES):
        visit(name, ())


TECHNIQUES = {kind.__module__ for kind in known_techniques().values()}
TECHNIQUES |= {getattr(contrib, name).__module__ for name in contrib.__all__}


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_no_technique_imports_another(name):
    assert not IMPORTS[name] & (TECHNIQUES - {name})


def test_areas_hold_techniques_only():
    """Their base classes lie in ``features``, ``surgery`` and ``updates``."""
    assert TECHNIQUES == {n for n in MODULES if part(n) in AREAS and MODULES[n].name != "__init__.py"}


PRIVATE_NAMES = {name for name in (*RELIED_ON, *PRIVATE.values(), *MAKERS_OF_LOADERS) if name.startswith("_")}
OF_OTHERS = frozenset(
    "_BatchNorm _C _backward_hooks _compiled_call_impl _current_graph_task_id _forward_hooks _forward_pre_hooks "
    "_get_fsdp_state _last_lr _local_scalar_dense _modules _ops _orig_mod _root_post_backward_final_callback "  # torch
    "_schema _Int8MixedPrecisionTrainingLinearFunction "  # torch and torchao
    "_ex_iterable "  # datasets
    "_asdict _exit _fields _reconstructor _replace".split()  # Python
)
"""Private attributes of other packages than transformers and accelerate."""


def private_attributes(tree: ast.AST) -> Iterator[str]:
    """The private attributes that code reads from other objects than its own."""
    own_names = {"self", "cls", "kind", "twin"} | {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match(r"_[^_]", node.attr):
            continue
        owner = node.value
        own = isinstance(owner, ast.Name) and owner.id in own_names
        if not own and not (isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"):
            yield node.attr


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if part(name) != "host"])
def test_private_names_of_transformers_and_accelerate_stay_in_host(name):
    tree = ast.parse(MODULES[name].read_text())
    overrides = {"_save"} if name == "hf_accel.trainer" else set()
    assert set(private_attributes(tree)) <= OF_OTHERS | overrides
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not texts & PRIVATE_NAMES


def test_a_trainer_gains_one_attribute(tmp_path):
    plain = tiny_trainer([], tmp_path / "plain", trainer_class=Trainer)
    hosted = tiny_trainer([hf_accel.InfoBatch()], tmp_path / "hosted")
    assert vars(hosted).keys() - vars(plain).keys() == {"accel"}
    plain.train()
    hosted.train()
    assert vars(hosted).keys() - vars(plain).keys() == {"accel"}


def test_two_trainers_share_nothing(tmp_path):
    first, second = (tiny_trainer([hf_accel.InfoBatch()], tmp_path / name) for name in ("first", "second"))
    first.train()
    assert second.receipt is None and second.clock.spent["steps"] == 0
    second.train()
    assert first.receipt.samples == second.receipt.samples
    assert not any("run_" in vars(technique) for trainer in (first, second) for technique in trainer.techniques)
    assert Technique.run_ is None


def test_what_the_engine_uses_of_trainer_exists(tmp_path):
    trainer = tiny_trainer([], tmp_path)
    trainer.train()
    missing = {name for name in {*PUBLIC, *PRIVATE.values()} if not hasattr(trainer, name)}
    assert not missing


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_is_long(name):
    assert len(MODULES[name].read_text().splitlines()) <= LONGER.get(name, MOST_LINES)
