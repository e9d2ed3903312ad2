"""Statistics of batch normalization for averaged weights.

The running mean and variance of such a layer say what the weights of training make of the data; averaged weights make
something else of them.  So they are computed anew, as the plain mean over micro-batches of training examples, always
the same ones, before averaged weights are evaluated or saved.  Everything else is in evaluation mode, so that dropout
draws nothing.  A model without such layers costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from hf_accel import weights
from hf_accel.batch import StepPlan

NUM_EXAMPLES = 1024
"""Most training examples that the statistics are computed from."""


def layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def refuse_iterables(trainer: Any) -> None:
    """Averages of a model with such layers need examples by their index."""
    if isinstance(trainer.train_dataset, IterableDataset) and layers(trainer.model):
        raise ValueError(
            f"{trainer._owners['averaging']!r}: the model has batch normalization, whose statistics it computes anew "
            f"from examples by their index, which train_dataset ({type(trainer.train_dataset).__name__}) lacks. "
            "Give a data set with __len__ and __getitem__."
        )


@torch.no_grad()
def statistics(trainer: Any, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of the model's layers, by name, as they are with averaged weights; the model is left as found.

    Every rank computes them from the same examples.
    """
    model, found = trainer.model, layers(trainer.model)
    if not found:
        return {}
    ours = {id(buffer) for layer in found for buffer in layer.buffers()}
    buffers = {name: buffer for name, buffer in weights.buffers(model).items() if id(buffer) in ours}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in found]
    weights.swap(model, averages)
    try:
        model.eval()
        for layer in found:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over batches
            layer.train()
        with trainer.stopwatch.charge("batch norm"):
            for inputs in _micro_batches(trainer):
                trainer.prediction_step(
                    trainer.model_wrapped if trainer.is_deepspeed_enabled else model, inputs, prediction_loss_only=True
                )
        return {name: buffer.clone() for name, buffer in buffers.items()}
    finally:
        weights.swap(model, averages)
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
        for module, training in modes:
            module.training = training
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum


def _micro_batches(trainer: Any) -> Iterator[dict[str, Tensor]]:
    """Whole micro-batches, as they are read for training."""
    stream = trainer._make_stream(trainer.train_dataset) if trainer.stream is None else trainer.stream
    size = trainer.micro_batch_size
    generator = torch.Generator().manual_seed(stream.seed)
    ids_N = torch.randperm(len(stream.dataset), generator=generator)[:NUM_EXAMPLES]
    whole = max(len(ids_N) // size, 1) * size
    for ids_B in ids_N[:whole].split(size):
        yield stream.read(StepPlan(0, ids_B, None, size, seed=stream.seed)).micro_batches[0].inputs
