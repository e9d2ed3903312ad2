"""Restore a model and the random generators after use, with context managers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def seed_all(seed: int, epoch: int, example: int, repeat: int = 0) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators by a key."""
    key = (seed * 1_000_003 + epoch) * 1_000_003 + example
    if repeat:
        key = key * 1_000_003 + repeat
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.random.default_generator.manual_seed(key % 2**63)


@contextlib.contextmanager
def keyed_random() -> Iterator[None]:
    """Restore the global generators of the CPU at the end."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers at the end, such as the statistics of batch normalization."""
    before = copies_of_buffers(model)
    try:
        yield
    finally:
        restore_buffers(before)


def copies_of_buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return each buffer of a model with a copy of it."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


@torch.no_grad()
def restore_buffers(before: list[tuple[Tensor, Tensor]]) -> None:
    """Set buffers to the copies that `copies_of_buffers` gave."""
    for buffer, copy in before:
        buffer.copy_(copy)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each module back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the generators that a model draws from at the end."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(device, states)


def random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model on a device draws from."""
    states = [torch.random.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def restore_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Set the generators to states that `random_states` gave."""
    torch.random.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
