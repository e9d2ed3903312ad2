"""Declarations of techniques are checked when a trainer is built."""

from dataclasses import dataclass

import pytest

from hf_accel import InfoBatch, Technique
from hf_accel.engine.roster import Roster
from hf_accel.technique import Positive


def test_owners_hooks_and_names():
    techniques = [InfoBatch()]
    roster = Roster(techniques)
    assert roster.owner("select") is techniques[0] and roster.owner("order") is None
    assert roster.with_hook("observe") == techniques and roster.name_of(techniques[0]) == "0.InfoBatch"


@dataclass(eq=False)
class Misspelled(Technique):
    def exmaple_loss_head(self, head):
        return head

    def extra_lost(self, model, inputs, outputs):
        return None


@dataclass(eq=False)
class Idle(Technique):
    pass


@dataclass(eq=False)
class ClaimsText(InfoBatch):
    claims = "logits"


@dataclass(eq=False)
class Underscored(InfoBatch):
    rank_counters = ("seen_",)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Misspelled, "overrides no event, hook or slot. Did you mean 'extra_loss' by 'extra_lost'"),
        (Idle, "overrides no event, hook or slot. Override one."),
        (ClaimsText, r"ClaimsText.claims \('logits'\) must be a frozenset"),
        (Underscored, "the counter 'seen_' ends with '_'. Write 'seen'."),
    ],
)
def test_a_wrong_declaration_is_refused(kind, words):
    with pytest.raises(ValueError, match=words):
        Roster([kind()])


def test_a_class_with_fields_must_be_a_dataclass():
    class Undecorated(Technique):
        weight: Positive = 1.0

    with pytest.raises(TypeError, match="Undecorated: 'weight' is not a hyperparameter.*Write @dataclass"):
        Undecorated()
    assert type("Renamed", (InfoBatch,), {})().keep == InfoBatch().keep
