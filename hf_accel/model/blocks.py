"""The repeated blocks of a model: the lists of modules that it declares, in ``_no_split_modules``, not to be split; and
the linear layers in them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def block_lists(model: Any) -> dict[str, nn.ModuleList]:
    """Its lists of blocks by their paths, as the model registers them; ValueError where there is none."""
    names = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        # FSDP puts a subclass with another name in the place of a block's class.
        return any(cls.__name__ in names for cls in type(module).__mro__)

    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_block, module))
    }
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of the blocks that it declares in _no_split_modules "
            f"({', '.join(sorted(names)) or 'none'}). Leave it out for this model."
        )
    return lists


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers in its blocks by path, as far as their parameters are a weight and a bias."""
    paths = block_lists(model)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(path.startswith(f"{blocks}.") for blocks in paths)
        and {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}
    }
