"""Read, exchange, gather and scatter this rank's part of the weights, under any sharding.

These are plain functions on a model, wrapped or not, for one process, DDP, FSDP2 and DeepSpeed ZeRO-1/2/3, with or
without peft adapters.  Weight averages, local SGD and all other work on weights between two steps need them:

    averages = {name: weight.clone() for name, weight in local_parameters(model).items()}
    ...
    swap(model, averages)    # evaluate the averages
    swap(model, averages)    # train on, bit for bit

Parameters have the names of the model itself, without the prefixes that DDP, DeepSpeed, ``torch.compile`` and
activation checkpointing put before or into names.  Call these functions on all ranks, because `gather` communicates.
Call them between steps, never between a forward and its backward.

Under ZeRO in fp16 or bf16 the weights are the half-precision copies that the forward uses.  The fp32 masters in the
optimizer stay unchanged, and the next optimizer step overwrites the copies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

NESTED_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Parts that ``torch.compile`` and activation checkpointing add inside the names of parameters."""


def local_parameters(model: nn.Module, trainable_only: bool = True) -> dict[str, Tensor]:
    """Return this rank's part of each parameter, by name.

    The tensors are detached and share memory with the model.  For one process, DDP and ZeRO-1/2 they are whole
    parameters.  Under FSDP2 they are this rank's shards, and under ZeRO-3 flat slices without padding.  Both may be
    empty.
    """
    return {
        name: _local(parameter)
        for name, parameter in _named_parameters(model).items()
        if parameter.requires_grad or not trainable_only
    }


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers, by name; every rank has them whole.  The other functions take them beside parameters."""
    return {_bare(name): buffer for name, buffer in _unwrapped(model).named_buffers()}


@torch.no_grad()
def swap(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Exchange this rank's part of the named parameters with ``tensors``, in place.

    Afterwards the model computes with the values of ``tensors``, and ``tensors`` hold the model's values.  A second
    call undoes the first one exactly.  Shapes and dtypes are those of `local_parameters`.
    """
    parameters = _named(model, tensors)
    for name, parameter in parameters.items():
        live, other = _local(parameter), tensors[name]
        assert (other.shape, other.dtype) == (live.shape, live.dtype), f"{name}: {other.shape} {other.dtype}"
        before = live.clone()
        live.copy_(other)
        other.copy_(before)
    _refresh([parameter for parameter in parameters.values() if _in_zero3(parameter)])


@torch.no_grad()
def gather(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full tensors by name, on the CPU and in their dtype, from the parts of all ranks.

    All ranks must call it with the same names.  Only rank 0 gets the tensors, as copies; the others get an empty dict.
    One copy is enough to write or send them, and a copy for each rank may not fit into a host's memory.
    """
    full = {}
    for name, parameter in _named(model, tensors).items():
        tensor = _full(parameter, tensors[name])
        if not dist.is_initialized() or dist.get_rank() == 0:
            full[name] = tensor.to("cpu", copy=True)
    return full


@torch.no_grad()
def scatter(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of full tensors, by name: the inverse of `gather`, on any number of ranks.

    Every rank gives the full tensors (say, from a file), so the ranks do not communicate.  The parts are copies, on the
    device of the parameters' parts, in the dtype of the given tensors.
    """
    parts = {}
    for name, parameter in _named(model, tensors).items():
        shape = tuple(parameter.ds_shape if _in_zero3(parameter) else parameter.shape)
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name}{tuple(tensors[name].shape)}: the model has {shape}. Use the model that it was saved with."
            )
        parts[name] = _part(parameter, tensors[name]).to(_local(parameter).device, copy=True)
    return parts


# How each backend keeps its part --------------------------------------------------------------------------------------

AnyParameter = Any
"""A parameter, with the attributes that DTensor or DeepSpeed give it."""


def _named_parameters(model: nn.Module) -> dict[str, AnyParameter]:
    model = _unwrapped(model)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"model({type(module).__name__}): FSDP1 mixes several parameters in one shard. "
                "Use FSDP2: fsdp_config={'version': 2}."
            )
        if isinstance(module, FSDPModule):
            # After a forward without backward the outermost module still holds full copies: they are not the weights.
            module.reshard()
    return {_bare(name): parameter for name, parameter in model.named_parameters()}


def _unwrapped(model: Any) -> nn.Module:
    # accelerate's extract_model_from_parallel takes 5 ms, because it asks each time whether DeepSpeed is installed.
    wrappers: tuple[type, ...] = (DistributedDataParallel, DataParallel)
    if "deepspeed" in sys.modules:  # otherwise it cannot wrap any model
        from deepspeed import DeepSpeedEngine

        wrappers += (DeepSpeedEngine,)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif is_compiled_module(model):
            model = model._orig_mod
        else:
            return model


def _named(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, AnyParameter]:
    """Return the parameters that have tensors, in the model's order, which is the same on all ranks."""
    parameters = _named_parameters(model) | buffers(model)
    if unknown := sorted(tensors.keys() - parameters.keys()):
        raise ValueError(
            f"{unknown[0]}: the model has no such parameter ({len(unknown)} unknown names). "
            "Use the model that they belong to."
        )
    return {name: parameter for name, parameter in parameters.items() if name in tensors}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in NESTED_WRAPPERS)


def _in_zero3(parameter: AnyParameter) -> bool:
    # DeepSpeed's own test (is_zero_param) asks for an attribute, too, and needs DeepSpeed.
    return hasattr(parameter, "ds_tensor")


def _local(parameter: AnyParameter) -> Tensor:
    if _in_zero3(parameter):
        if parameter.ds_tensor.final_location == "nvme":
            raise ValueError("offload_param(device='nvme'): weights on disk have no memory to share. Use device='cpu'.")
        return parameter.ds_tensor.detach()[: _zero3_slice(parameter)[1]]
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return parameter.detach()


def _full(parameter: AnyParameter, local: Tensor) -> Tensor:
    if _in_zero3(parameter):
        padded = local.new_zeros(parameter.ds_tensor.ds_numel, device=parameter.device)
        padded[: local.numel()] = local
        ranks = parameter.ds_zero_partition_world_size
        full = padded.new_empty(padded.numel() * ranks)
        dist.all_gather(list(full.chunk(ranks)), padded, group=parameter.ds_process_group)
        return full[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        local = local.to(mesh.device_type)  # parameters that are offloaded to the CPU are gathered on the device
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(local, mesh, parameter.placements, shape=shape, stride=stride).full_tensor()
    return local


def _part(parameter: AnyParameter, full: Tensor) -> Tensor:
    if _in_zero3(parameter):
        start, numel = _zero3_slice(parameter)
        return full.flatten()[start : start + numel]
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()
    return full


def _zero3_slice(parameter: AnyParameter) -> tuple[int, int]:
    """Return the start and the number of elements of this rank's slice of the flat parameter, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * parameter.ds_zero_partition_rank, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def _refresh(parameters: list[AnyParameter]) -> None:
    """Drop ZeRO-3's outdated copies of whole parameters; the next forward makes new ones."""
    if not parameters:
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    outdated = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.AVAILABLE]
    if outdated:
        outdated[0].partition(param_list=outdated, has_been_updated=False)
    for parameter in parameters:
        parameter.ds_secondary_tensor = None  # hierarchical partitioning makes a new one from the next full copy
