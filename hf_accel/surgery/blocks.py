"""Find the repeated blocks of a model, by its ``_no_split_modules``, and the layers in them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def block_lists(model: Any) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks by path, in order, or raise ValueError if there are none.

    Lists of stages, which consist of blocks themselves, do not count.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        # FSDP replaces a block's class by a subclass with another name.
        return any(cls.__name__ in names for cls in type(module).__mro__)

    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_block, module))
    }
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of the blocks that it declares in _no_split_modules "
            f"({', '.join(sorted(names)) or 'none'}). Remove the technique for this model."
        )
    return {path: blocks for path, blocks in lists.items() if not any(inner.startswith(f"{path}.") for inner in lists)}


def block_stacks(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of each stack, in order; an encoder and a decoder are two stacks.

    ValueError if there are none, or several towers, for example of text and images.  Towers see other rows than the
    batch, and read each other's outputs by the number of blocks.
    """
    stacks = stacks_of(model)
    if len(stacks) > 1 and not model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has several towers ({', '.join(stacks)}). Remove the technique for this model."
        )
    return [[model.get_submodule(path) for path in paths] for paths in stacks.values()]


def stacks_of(model: Any) -> dict[str, list[str]]:
    """Return the paths of the blocks in each stack, in order, by the path of the outermost list.

    The stages of a vision model are one stack.
    """
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks: dict[str, list[str]] = {}
    for path, blocks in block_lists(model).items():
        outermost = next(outer for outer in lists if f"{path}.".startswith(f"{outer}."))
        stacks.setdefault(outermost, []).extend(f"{path}.{i}" for i in range(len(blocks)))
    return stacks


def embedding_layers(model: nn.Module) -> list[nn.Module]:
    """Return the input embeddings and the output head of a model, if it has them."""
    base: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        return []
    try:
        inputs = base.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # models of images and speech
        inputs = None
    # Perceiver's input embeddings are a parameter.
    return [layer for layer in (inputs, base.get_output_embeddings()) if isinstance(layer, nn.Module)]


def linear_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers in blocks by path, with no parameters beside a weight and a bias."""
    paths = block_lists(model)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(path.startswith(f"{blocks}.") for blocks in paths)
        and {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}
    }


def residual_projections(model: Any) -> dict[str, Any]:
    """Return the layers that add to the residual stream, by path, or raise ValueError if some block has no such layer.

    These are the last linear layers of each attention of a block, and of the rest of the block.  In networks with batch
    norm, they are the last norms beside each shortcut.
    """
    if norms := _last_batch_norms(model):
        return norms
    found: dict[str, Any] = {}
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if has_experts(model):
        raise ValueError(
            f"{type(model).__name__} has experts, which are not linear layers. Remove the technique for this model."
        )
    for path, blocks in block_lists(model).items():
        for index, block in enumerate(blocks):
            for name, layer in _last_layers(block).items():
                whole = f"{path}.{index}.{name}"
                outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
                if width is not None and outputs != width:
                    raise ValueError(
                        f"{type(model).__name__}: {whole} ends a branch of its block with {outputs} outputs, and the "
                        f"residual stream has {width}. Remove the technique for this model."
                    )
                found[whole] = layer
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer in its blocks. Remove the technique for this model."
        )
    return found


def has_experts(model: nn.Module) -> bool:
    """Return whether a model holds the matrices of several experts in one parameter, outside linear layers."""
    return any(
        "experts" in type(module).__name__.lower() and any(p.dim() == 3 for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def _last_layers(block: nn.Module) -> dict[str, Any]:
    """Return the last linear layer of each branch of a block, by its path in the block."""
    attentions: list[str] = []
    last: dict[str, tuple[str, Any]] = {}
    adapted = [name for name, module in block.named_modules() if hasattr(module, "base_layer")]  # by peft
    for name, module in block.named_modules():
        if any(name.startswith(f"{path}.") and name != f"{path}.base_layer" for path in adapted):
            continue
        branch = next((path for path in attentions if name.startswith(f"{path}.")), "")
        if name and not branch and "attention" in type(module).__name__.lower():
            attentions.append(name)
        elif isinstance(module, nn.Linear | Conv1D):
            before = last[branch][0] if branch in last else ""
            if before.endswith(".out_proj") and before.partition(".")[0] != name.partition(".")[0] and not branch:
                raise ValueError(
                    f"{type(block).__name__}: {before} ends a branch that is not attention. Remove the technique for "
                    "this model."
                )
            last[branch] = name, module
    return dict(last.values())


def _last_batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the last batch norm beside each shortcut, by path."""
    found: dict[str, Any] = {}
    for path, block in model.named_modules():
        shortcuts = [name for name, _ in block.named_children() if name in ("shortcut", "downsample")]
        norms = {
            f"{path}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.BatchNorm2d) and name.partition(".")[0] not in shortcuts
        }
        if shortcuts and norms:
            last = list(norms)[-1]
            found[last] = norms[last]
    return found
