"""The repeated blocks of a model: the lists of modules that it declares, in ``_no_split_modules``, not to be split."""

from __future__ import annotations

from typing import Any

from torch import nn


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
