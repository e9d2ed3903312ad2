"""Make deeper models from shallower ones by copies of their blocks.

An operator returns the index of the block that each new block copies:

    stacked(2, 6)      0 1 0 1 0 1       the whole stack repeated (G_stack)
    interleaved(2, 6)  0 0 0 1 1 1       each block repeated
    on_top(2, 6)       0 1 1 1 1 1       the last block repeated
    middle(4, 6)       0 1 2 1 2 3       the middle of the stack twice (MIDAS)

`origin` maps a name in the new model to the one with its first values: for weights, gradients, and moments of an
optimizer.  In pre-norm models, a copy with zeros in its last projections (`zero_residual_branches`) leaves the function
unchanged.

    sources = stacked(depth, 3 * depth)
    model = deepened(model, sources)

Reference: Gong et al. (2019), StackingBERT, https://proceedings.mlr.press/v97/gong19a.html; Du et al. (2024), G_stack,
https://arxiv.org/abs/2405.15319; Saunshi et al. (2024), MIDAS, https://arxiv.org/abs/2409.19044.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hf_accel.surgery.blocks import block_lists, residual_projections


def stacked(depth: int, new_depth: int) -> list[int]:
    """Repeat the whole stack."""
    return [i % depth for i in range(new_depth)]


def interleaved(depth: int, new_depth: int) -> list[int]:
    """Follow each block by its copies; for fewer blocks, choose some at equal distances."""
    return [i * depth // new_depth for i in range(new_depth)]


def on_top(depth: int, new_depth: int) -> list[int]:
    """Append copies of the last block."""
    return [min(i, depth - 1) for i in range(new_depth)]


def middle(depth: int, new_depth: int) -> list[int]:
    """Repeat the middle ``new_depth - depth`` blocks once; the result has at most twice the depth."""
    size = new_depth - depth
    if not 0 <= size <= depth:
        raise ValueError(
            f"new_depth={new_depth}: {depth} blocks repeat at most once. Choose a depth from {depth} to {2 * depth}."
        )
    end = depth - (depth - size) // 2
    return [*range(end), *range(end - size, depth)]


def repeats(sources: Sequence[int]) -> list[int]:
    """Return the new blocks with a source that an earlier block copies already."""
    return [i for i, source in enumerate(sources) if source in sources[:i]]


def block_path(model: Any) -> str:
    """Return the path of the model's stack of blocks, or raise ValueError if it has several."""
    lists = block_lists(model)
    if len(lists) > 1:
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks ({', '.join(lists)}), and its depth is no one number."
        )
    return next(iter(lists))


def origin(name: str, path: str, sources: Sequence[int]) -> str:
    """Return the name of a new parameter's source, for blocks at ``path``."""
    if not name.startswith(f"{path}."):
        return name
    index, dot, rest = name[len(path) + 1 :].partition(".")
    return f"{path}.{sources[int(index)]}{dot}{rest}"


def deepened_config(model: Any, sources: Sequence[int]) -> Any:
    """Return the model's configuration for as many blocks, with the layer types of the sources.

    ValueError if the architecture gives a new block another kind or other parameters than its source.
    """
    path, config = block_path(model), copy.deepcopy(model.config)
    blocks: Any = model.get_submodule(path)
    if getattr(config, "num_hidden_layers", None) != len(blocks):
        raise ValueError(f"{type(model).__name__} has no num_hidden_layers in its configuration.")
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(sources)
    if kinds is not None:
        config.layer_types = [kinds[source] for source in sources]
    with torch.device("meta"):
        grown: Any = type(model)(copy.deepcopy(config)).get_submodule(path)
    for i, source in enumerate(sources):
        if makeup(grown[i]) != makeup(blocks[source]):
            raise ValueError(
                f"{type(model).__name__}: block {i} of {len(sources)} would copy block {source}, which differs in "
                "kind. "
                "Choose a depth that is a multiple of the pattern of its blocks."
            )
    return config


def makeup(block: nn.Module) -> Any:
    """Return everything that a copy must share with a block."""
    kind = {name: value for name, value in vars(block).items() if name.endswith("_type") or "sliding" in name}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()]
    return type(block).__name__, kind, shapes


@torch.no_grad()
def deepened(model: Any, sources: Sequence[int]) -> Any:
    """Return a new model with the blocks of ``sources``, with the dtype and device of the given one.

    Global generators stay unchanged.
    """
    path, config = block_path(model), deepened_config(model, sources)
    with torch.random.fork_rng(devices=[]):
        grown = type(model)(config)
    grown = grown.to(device=model.device, dtype=model.dtype).train(model.training)
    state = model.state_dict()
    grown.load_state_dict({name: state[origin(name, path, sources)] for name in grown.state_dict()})
    if model.can_generate():
        grown.generation_config = copy.deepcopy(model.generation_config)
    return grown


@torch.no_grad()
def zero_residual_branches(model: Any, blocks: Iterable[int]) -> int:
    """Make the last projection of each residual branch in these blocks zero, and return their number.

    The blocks then compute the identity, unless norms follow the addition (BERT).
    """
    path = block_path(model)
    starts = tuple(f"{path}.{index}." for index in blocks)
    projections = [layer for name, layer in residual_projections(model).items() if name.startswith(starts)]
    for layer in projections:
        for parameter in layer.parameters():
            parameter.zero_()
    return len(projections)
