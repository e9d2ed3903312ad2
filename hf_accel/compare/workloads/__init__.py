"""Workloads by name."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from hf_accel.compare.workloads.digits import Digits
from hf_accel.compare.workloads.fine_tuning import Gsm8kLora, Gsm8kSft
from hf_accel.compare.workloads.from_recipe import FromRecipe
from hf_accel.compare.workloads.images import Cifar10ResNet, Cifar10Vit
from hf_accel.compare.workloads.language_modeling import CodeLm, NovelsLm
from hf_accel.compare.workloads.synthetic import Synthetic
from hf_accel.compare.workloads.text_classification import Banking77, Sst2
from hf_accel.compare.workloads.workload import DATA_ROOT, Workload
from hf_accel.recipe.technique_syntax import nearest

WORKLOADS: dict[str, type[Workload]] = {
    kind.name: kind
    for kind in (
        CodeLm,
        NovelsLm,
        Sst2,
        Banking77,
        Gsm8kSft,
        Gsm8kLora,
        Cifar10ResNet,
        Cifar10Vit,
        Digits,
        Synthetic,
        FromRecipe,
    )
}


def build_workload(name: str, options: dict[str, Any] | None = None) -> Workload:
    """Build a workload by its name, or by ``package.module:Class`` for one of your own."""
    kind = WORKLOADS.get(name)
    if kind is None:
        module, colon, member = name.partition(":")
        if not colon:
            raise ValueError(f"workload({name!r}): there is none of this name. {nearest(name, WORKLOADS)}")
        try:
            kind = getattr(importlib.import_module(module), member)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"workload({name!r}): cannot be imported ({error}). Check the name.") from None
        if not (isinstance(kind, type) and issubclass(kind, Workload)):
            raise ValueError(f"workload({name!r}): is not a Workload. Name a subclass of it.")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in options or {}:
        if key not in known:
            raise ValueError(f"workload({name!r}): there is no option {key!r}. {nearest(key, known)}")
    return kind(**(options or {}))


__all__ = ["DATA_ROOT", "WORKLOADS", "FromRecipe", "Workload", "build_workload"]
