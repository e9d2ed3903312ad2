"""Compute statistics of batch normalization for averaged weights.

The running mean and variance of a layer describe activations under the training weights; averaged weights have other
activations.  New statistics are therefore computed before averaged weights are evaluated or saved.  They are the plain
mean over micro-batches of a fixed set of training examples.  All other layers are in evaluation mode, so dropout draws
nothing.  A model without batch normalization costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from hf_accel import weights
from hf_accel.batch import StepPlan
from hf_accel.preserve import evaluation_mode
from hf_accel.stream.indexed import StepStream
from hf_accel.technique import Technique

NUM_EXAMPLES = 1024
"""Maximum number of training examples for the statistics."""


def layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def refuse_iterables(owner: Technique, model: nn.Module, dataset: Any) -> None:
    """Refuse averages of a model with batch normalization if examples have no index."""
    if isinstance(dataset, IterableDataset) and layers(model):
        raise ValueError(
            f"{owner!r} does not support batch normalization with train_dataset ({type(dataset).__name__}) because it "
            "reads examples by index for the statistics. Use a data set with __len__ and __getitem__."
        )


@torch.no_grad()
def statistics(
    model: nn.Module, averages: Mapping[str, Tensor], inputs: Iterable[Any], predict: Callable[[Any], None]
) -> dict[str, Tensor]:
    """Return the layers' buffers under averaged weights, by name, and leave the model unchanged.

    Every rank computes them from the same examples.
    """
    found = layers(model)
    ours = {id(buffer) for layer in found for buffer in layer.buffers()}
    buffers = {name: buffer for name, buffer in weights.buffers(model).items() if id(buffer) in ours}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    momenta = [layer.momentum for layer in found]
    weights.swap(model, averages)
    try:
        with evaluation_mode(model):
            for layer in found:
                layer.reset_running_stats()
                layer.momentum = None  # the mean over batches
                layer.train()
            for batch in inputs:
                known = {name: buffer.clone() for name, buffer in buffers.items()}
                predict(batch)
                if not all(buffer.isfinite().all() for buffer in buffers.values()):  # one spoiled example
                    for name, buffer in buffers.items():
                        buffer.copy_(known[name])
        return {name: buffer.clone() for name, buffer in buffers.items()}
    finally:
        weights.swap(model, averages)
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum


def micro_batches(stream: StepStream, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield whole micro-batches, read in the same way as for training."""
    generator = torch.Generator().manual_seed(stream.seed)
    ids_N = torch.randperm(len(stream.dataset), generator=generator)[:NUM_EXAMPLES]
    whole = max(len(ids_N) // size, 1) * size
    for ids_B in ids_N[:whole].split(size):
        yield stream.read(StepPlan(0, ids_B, None, size, seed=stream.seed)).micro_batches[0].inputs
