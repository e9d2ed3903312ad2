"""Deeper models from shallower ones: which block each block of the new stack is a copy of, and the copying.

An operator gives, for each new block, the index of the block that it copies:

    stacked(2, 6)      0 1 0 1 0 1       the whole stack again and again (G_stack)
    interleaved(2, 6)  0 0 0 1 1 1       each block again and again
    on_top(2, 6)       0 1 1 1 1 1       the last block again and again
    middle(4, 6)       0 1 2 1 2 3       the middle of the stack twice (MIDAS)

A name in the new model, mapped by `origin`, says whose values it starts from: weights, gradients, and moments of an
optimizer alike.  Where blocks add to a residual stream and norms come before them, a copy whose last projections are
zero (`zero_residual_branches`) leaves the function as it was.

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
    """The whole stack on top of itself."""
    return [i % depth for i in range(new_depth)]


def interleaved(depth: int, new_depth: int) -> list[int]:
    """Each block followed by its copies; with fewer blocks than there were, some of them at equal distances."""
    return [i * depth // new_depth for i in range(new_depth)]


def on_top(depth: int, new_depth: int) -> list[int]:
    """Copies of the last block after it."""
    return [min(i, depth - 1) for i in range(new_depth)]


def middle(depth: int, new_depth: int) -> list[int]:
    """The middle ``new_depth - depth`` blocks twice, one copy after the other; at most twice the depth."""
    size = new_depth - depth
    if not 0 <= size <= depth:
        raise ValueError(f"new_depth={new_depth}: the middle of {depth} blocks is at most all of them, twice.")
    end = depth - (depth - size) // 2
    return [*range(end), *range(end - size, depth)]


def repeats(sources: Sequence[int]) -> list[int]:
    """The new blocks that copy a block which one before them copies already."""
    return [i for i, source in enumerate(sources) if source in sources[:i]]


def block_path(model: Any) -> str:
    """The path of the model's one stack of blocks; ValueError where it has several."""
    lists = block_lists(model)
    if len(lists) > 1:
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks ({', '.join(lists)}), and its depth is no one number."
        )
    return next(iter(lists))


def origin(name: str, path: str, sources: Sequence[int]) -> str:
    """The name, in the model whose blocks lie at ``path``, of what a name in the new one is a copy of."""
    if not name.startswith(f"{path}."):
        return name
    index, dot, rest = name[len(path) + 1 :].partition(".")
    return f"{path}.{sources[int(index)]}{dot}{rest}"


def deepened_config(model: Any, sources: Sequence[int]) -> Any:
    """A copy of the model's configuration with as many blocks, whose kinds (as of attention) are those of the sources;
    ValueError where the architecture gives a new block another kind or other parameters."""
    path, config = block_path(model), copy.deepcopy(model.config)
    blocks: Any = model.get_submodule(path)
    if getattr(config, "num_hidden_layers", None) != len(blocks):
        raise ValueError(f"{type(model).__name__}: its configuration has no number of blocks, num_hidden_layers.")
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(sources)
    if kinds is not None:
        config.layer_types = [kinds[source] for source in sources]
    with torch.device("meta"):
        grown: Any = type(model)(copy.deepcopy(config)).get_submodule(path)
    for i, source in enumerate(sources):
        if makeup(grown[i]) != makeup(blocks[source]):
            raise ValueError(
                f"{type(model).__name__}: block {i} of {len(sources)} is of another kind than block {source}, which it "
                "would copy. Choose a depth that is a multiple of the pattern of its blocks."
            )
    return config


def makeup(block: nn.Module) -> Any:
    """What a copy must have in common with a block."""
    kind = {name: value for name, value in vars(block).items() if name.endswith("_type") or "sliding" in name}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()]
    return type(block).__name__, kind, shapes


@torch.no_grad()
def deepened(model: Any, sources: Sequence[int]) -> Any:
    """A new model with the blocks of ``sources``, in the dtype and on the device of the given one.

    Global generators are left alone.
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
    """Make the last projection of each residual branch in these blocks zero, and say how many there are.

    The blocks then compute the identity, unless norms follow the addition (BERT).
    """
    path = block_path(model)
    starts = tuple(f"{path}.{index}." for index in blocks)
    projections = [layer for name, layer in residual_projections(model).items() if name.startswith(starts)]
    for layer in projections:
        for parameter in layer.parameters():
            parameter.zero_()
    return len(projections)
