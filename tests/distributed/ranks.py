"""Run a function on several ranks, on CPUs with gloo, forked from the test process, which has imported all already."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import cpu_backends
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import is_deepspeed_available
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

Backend = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
BACKENDS: tuple[Backend, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def backend_args(backend: Backend, **zero_optimization: Any) -> dict[str, Any]:
    """Keywords of ``TrainingArguments`` that select a backend on CPUs, for Llama models.

    ``zero_optimization`` are more settings of that section of DeepSpeed's configuration.
    """
    if backend == "ddp":
        return {"use_cpu": True}
    if backend == "fsdp2":
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT",
        }
        return {"use_cpu": True, "fsdp": True, "fsdp_config": config}
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": int(backend[-1]),
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
            **zero_optimization,
        },
        "zero_allow_untested_optimizer": True,
    }
    # With use_cpu accelerate would ignore DeepSpeed; on a machine without a GPU the CPU is used anyway.
    return {"use_cpu": False, "optim": "adamw_torch", "deepspeed": config}


def assert_backend(trainer: Trainer, backend: Backend, world: int = 2) -> None:
    """Fail unless a trainer, during or after ``train()``, really uses a backend on so many ranks."""
    assert dist.get_world_size() == trainer.accelerator.num_processes == trainer.args.world_size == world
    wrapped = trainer.model_wrapped
    if backend == "ddp":
        assert isinstance(wrapped, DistributedDataParallel)
    elif backend == "fsdp2":
        assert trainer.accelerator.is_fsdp2
        assert isinstance(wrapped, FSDPModule)
    else:
        assert trainer.is_deepspeed_enabled
        assert wrapped.zero_optimization_stage() == int(backend[-1])


def run_on_ranks(
    fn: Callable, *args: Any, world: int = 2, backend: Backend = "ddp", timeout: float = 180, **kwargs: Any
) -> list[Any]:
    """What ``fn(*args, **kwargs)`` returns on each rank, in order of ranks.

    ``fn`` may be a closure; what it returns is pickled.  An exception on a rank, or more than ``timeout`` seconds,
    fails the test with the tracebacks of all ranks, the first to fail first.
    """
    if backend.startswith("zero"):
        load_deepspeed()
    elif is_deepspeed_available():
        import deepspeed  # noqa: F401 - accelerate imports it to unwrap a model; here once, not on every rank
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), fn, args, kwargs, world, free_port(), backend, timeout)
        context = start_processes(_rank, arguments, nprocs=world, join=False, start_method="fork")
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(deadline - time.monotonic(), 0), grace_period=2):
                if time.monotonic() >= deadline:
                    pytest.fail(f"{world} ranks did not end within {timeout} s.\n{_tracebacks(folder)}")
        except (ProcessRaisedException, ProcessExitedException) as error:
            pytest.fail(_tracebacks(folder) or str(error), pytrace=False)
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world)]


def _rank(
    rank: int,
    folder: Path,
    fn: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    world: int,
    port: int,
    backend: Backend,
    timeout: float,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    gc.freeze()  # Trainer collects garbage, which takes 0.3 s each time with all that the parent has imported
    # Trainers of earlier tests in the parent have left word that there is one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    patch = {"ddp": nullcontext, "fsdp2": cpu_backends.fsdp2}.get(backend, cpu_backends.deepspeed)
    with (folder / f"{rank}.traceback").open("w") as file:
        faulthandler.dump_traceback_later(timeout * 0.9, file=file)
        try:
            with patch(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of convolutions
                torch.save(fn(*args, **kwargs), folder / f"{rank}.result")
        except BaseException:
            traceback.print_exc(file=file)
            file.flush()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            if dist.is_initialized():
                dist.destroy_process_group()  # gloo's threads abort some processes at exit otherwise


def _tracebacks(folder: str) -> str:
    files = sorted(Path(folder).glob("*.traceback"), key=lambda file: file.stat().st_mtime_ns)
    return "\n".join(f"rank {file.stem}:\n{text}" for file in files if (text := file.read_text()))


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def forced_fp16_support(supported: bool) -> Iterator[None]:
    """Let DeepSpeed find, on a rank, that the CPU computes in float16, or that it does not."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: supported):
        yield


@functools.cache
def load_deepspeed() -> None:
    """Import DeepSpeed before ranks are forked, without its extension for CPUs, which a machine compiles for a minute.

    Gloo then reduces between ranks, as on CPUs that the extension does not support.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("deepspeed", reason="ZeRO needs DeepSpeed (pip install deepspeed)")
        import deepspeed.ops
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401 - imports torch.compile, which takes seconds

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
