"""Techniques of the model on every architecture: each works, or is refused, as docs/architectures.md says.

``pytest tests/surgery/test_architectures.py --write-docs`` writes the table from what ran; it is checked otherwise.
"""

import math
import traceback
from pathlib import Path

import cells
import pytest
from architectures import ARCHITECTURES, IMAGES, MASKED, tiny

from hf_accel.evidence.cards import area
from hf_accel.recipe import known_techniques
from hf_accel.testing import losses_of, tiny_trainer

pytestmark = pytest.mark.ci

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
KINDS = {name: kind for name, kind in known_techniques().items() if area(kind) == "model"}
FIELDS = {
    "LayerFreezing": {"start": 0.0, "max_fraction": 1.0},
    "LowRankTraining": {"tolerance": 10.0},
}
"""For runs of four steps, by technique; defaults elsewhere."""
DONORS = {
    "ExpandFrom": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 1},
    "ShrinkFrom": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4},
}
"""Sizes of the model of the same architecture that a technique starts from."""
HEADING = """# Techniques of the model, by architecture

<!-- Written by pytest tests/surgery/test_architectures.py --write-docs, from what ran. -->

*Works*: the technique trained a tiny model for four steps and showed its effect. A number refers to the error below,
which comes before the first step. Architectures with the same parts behave alike. Qwen is Qwen3; ResNet has batch norm.
"""


def donor_of(name, architecture):
    """The folder of the checkpoint that a technique starts from, in the working directory; none for others."""
    if name not in DONORS or architecture in ("T5", *IMAGES):
        return {}
    sizes = DONORS[name] | (
        {"num_key_value_heads": DONORS[name]["num_attention_heads"]} if architecture == "Qwen" else {}
    )
    tiny(architecture, **sizes).save_pretrained("donor")
    return {"checkpoint": "donor"}


def outcome(name, architecture, directory):
    """``works``, after a run in which the technique took effect, or why it was refused."""
    kind = KINDS[name]
    technique = kind(**(kind.probe_fields | FIELDS.get(name, {}) | donor_of(name, architecture)))
    modality = "image" if architecture in IMAGES else "masked text" if architecture in MASKED else "text"
    try:
        trainer = tiny_trainer([technique], directory, model=tiny(architecture), modality=modality, max_steps=4)
        trainer.train()
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        assert "/hf_accel/" in last, f"not refused by us: {error!r}"
        return " ".join(str(error).split())
    assert len(losses_of(trainer)) == 4 and all(map(math.isfinite, losses_of(trainer)))
    report = trainer.receipt.techniques[0]["report"]
    assert technique.took_effect(report), report
    return "works"


@pytest.fixture(scope="module")
def table(request):
    """What the document says; written anew from what ran, where this was asked for."""
    found = cells.read(TABLE.read_text()) if TABLE.exists() else {}
    yield found
    if request.config.getoption("write_docs"):
        TABLE.write_text(cells.written(HEADING, KINDS, {name: name for name in ARCHITECTURES}, found, "works"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KINDS)
def test_it_works_or_is_refused_as_the_table_says(name, architecture, table, tmp_path, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = outcome(name, architecture, tmp_path)
    if request.config.getoption("write_docs"):
        table[name, architecture] = found
    assert table[name, architecture] == found
