"""What accelerate lacks for FSDP2 and DeepSpeed on CPUs, for tests: patches of private names, inside a context.

Without them both run without an error and test nothing: FSDP2 falls back to DDP, and DeepSpeed to a single process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


@contextmanager
def fsdp2() -> Iterator[None]:
    """Let ``AcceleratorState`` take an FSDP plugin on CPUs, which it does for several devices of other kinds only."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        shared = PartialState._shared_state
        if fsdp_plugin is not None and shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    with mock.patch.object(AcceleratorState, "__init__", patched):
        yield


@contextmanager
def deepspeed() -> Iterator[None]:
    """Give ``PartialState`` a backend for DeepSpeed on CPUs, and let ``TrainingArguments`` take ``bf16`` there."""
    prepare = PartialState._prepare_backend

    def patched(self, *args, **kwargs):
        backend, distributed_type = prepare(self, *args, **kwargs)
        if backend is None and "LOCAL_RANK" in os.environ:
            return "gloo", DistributedType.MULTI_CPU
        return backend, distributed_type

    with (
        warnings.catch_warnings(),
        mock.patch.object(PartialState, "_prepare_backend", patched),
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True),
    ):
        for category in (DeprecationWarning, FutureWarning):  # DeepSpeed calls what torch has deprecated
            warnings.simplefilter("ignore", category)
        yield
