"""What `hf_accel.host` says of transformers, on whichever version is installed."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import transformers
from transformers import Trainer, TrainingArguments

from hf_accel import AccelTrainer, attach, host
from hf_accel.testing import tiny_trainer

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}


def parameters(method):
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize("name", host.RELIED_ON)
def test_a_method_is_as_we_know_it(name):
    assert parameters(getattr(Trainer, name)) == host.RELIED_ON[name].split()


@pytest.mark.parametrize("name", sorted({*host.REFUSED, *host.REINTERPRETED}))
def test_an_argument_exists(name):
    assert name in FIELDS


def test_every_argument_is_treated_in_one_way():
    treated = {name: host.treatment(name)[0] for name in FIELDS}
    assert {"honored", "refused", "re-interpreted"} == set(treated.values())
    assert not host.REFUSED.keys() & host.REINTERPRETED.keys() - {"lr_scheduler_type"}


def overridden():
    """Methods of Trainer that a class of ours overrides, each with that class."""
    ours = [cls for cls in AccelTrainer.__mro__ if cls.__module__.startswith("hf_accel.")]
    return {
        name: cls
        for cls in reversed(ours)
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("__") and hasattr(Trainer, name)
    }


@pytest.mark.parametrize("name", overridden())
def test_what_is_overridden_is_listed_or_public(name):
    public = {"train", "evaluate", "evaluation_loop", "predict", "log", "get_train_dataloader", "create_model_card"}
    assert name in host.RELIED_ON or name in public


def test_this_version_is_between_the_tested_ones():
    found, oldest, newest = (
        tuple(map(int, version.split(".")[:3])) for version in (transformers.__version__, *host.TESTED)
    )
    assert oldest <= found <= newest


def changed(self, somewhat, other):
    raise AssertionError("called")


@pytest.mark.parametrize("change", ["parameters", "gone"])
def test_a_changed_host_is_an_error_that_names_the_tested_versions(change, monkeypatch, tmp_path):
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer)
    if change == "gone":
        monkeypatch.delattr(Trainer, "_run_epoch")
    else:
        monkeypatch.setattr(Trainer, "_run_epoch", changed)
    words = (
        rf"hf_accel does not support transformers {transformers.__version__} because Trainer._run_epoch has changed. "
        rf"Install a tested version \({host.TESTED[0]} to {host.TESTED[1]}\)."
    )
    with pytest.raises(ImportError, match=words):
        host.check_signatures()
    with pytest.raises(ImportError, match=words):
        tiny_trainer([], tmp_path)
    with pytest.raises(ImportError, match=words):
        attach(plain, [])
