"""Train the weight matrices of the blocks with orthogonal updates, and the rest with AdamW.

A few directions dominate the momentum of a weight matrix.  Muon gives all of them the same length, and so learns the
rare ones as fast.  With matrices M, gradient G and weights W of shape (out, in),

    M = momentum * M + (1 - momentum) * G
    U = NewtonSchulz5((1 - momentum) * G + momentum * M)           all singular values near 1
    W = (1 - lr * weight_decay) * W - lr * s * U
    s = sqrt(max(1, out / in))            scale "spectral"
    s = 0.2 * sqrt(max(out, in))          scale "match_rms": an element moves as far as under AdamW, so its rate fits

It takes up to 1.4 times fewer steps than well-tuned AdamW at 0.1B parameters, 1.1 times at 1.2B (Wen et al.).  All
other parameters have AdamW with the trainer's learning rate: embeddings, output heads, norms and biases.  The schedule
multiplies both rates.  With ``cautious``, matrices decay only at elements with the same sign in U and W.  With
``momentum_warmup``, the momentum rises linearly from 0.85 while progress goes from 0 to it.

The module type decides which parameters are matrices.  These are the weights of linear layers, of convolutions without
groups and of experts.  Other tables in two dimensions are not, such as the decay rates of a state-space model
(``A_log``) or the position biases of a Swin.

Query, key and value in one layer are three matrices.  Such a layer is a ``Conv1D`` called ``c_attn``, or a ``Linear``
with ``qkv`` in its name, and has three times as many outputs as inputs.  It is split into thirds, in any order of the
three.  With fewer keys than queries, or under another name, it is one matrix.

The weight of a convolution without groups is flattened to (out, rest); a stack of experts is many matrices.  Matrices
of one shape are iterated together: in bfloat16 on GPUs that have it, otherwise in float32, and in float64 for float64
weights.  Under FSDP2 every rank gathers each matrix and iterates it whole.

Recommendation: Use Muon if you pre-train a transformer.
When to use: Pre-training of transformers.  Tune both ``lr`` and the trainer's learning rate.  The latter may be above
that of AdamW alone, because only embeddings, heads and norms use it.
When not to use:
- Full fine-tuning of models that were pre-trained with Adam, which it degrades (https://arxiv.org/abs/2605.10468).
- Convolutional networks.
- Small models or steps, because the iteration costs 10 to 40 % more time.
Defaults: Rate, momentum and scale are Jordan's.  Cautious decay and the warm-up of the momentum are off.
Differences from the paper: None.  The scale "match_rms" is that of Liu et al.
References: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/; Liu et al. (2025), Muon is scalable for
LLM training, https://arxiv.org/abs/2502.16982; the numbers: Wen et al. (2025), https://arxiv.org/abs/2509.02046;
cautious weight decay: Chen et al. (2025), https://arxiv.org/abs/2510.12402.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import annotated_types as at
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_accel.adapters import is_adapted
from hf_accel.surgery.blocks import embedding_layers
from hf_accel.technique import Fraction, Positive, Technique
from hf_accel.updates.newton_schulz import orthogonalized

logger = logging.get_logger(__name__)

BATCH = 2**24
"""Most elements that are iterated together, unless one parameter has more."""

TRANSPOSED_EXPERTS = frozenset({"Llama4TextExperts"})
"""Classes that store experts as (in, out) without transformers' mark for it, ``is_transposed``."""

Scale = Literal["spectral", "match_rms"]


class Matrices(NamedTuple):
    """Describe how a parameter consists of matrices."""

    transposed: bool
    """True if it is stored as (in, out)."""
    shape: tuple[int, int, int]
    """Number of matrices, their outputs and inputs."""

    def of(self, tensor: Tensor) -> Tensor:
        return (tensor.mT if self.transposed else tensor).reshape(self.shape)

    def back(self, matrices_KOI: Tensor, shape: torch.Size) -> Tensor:
        """Invert `of` for a parameter of this shape."""
        if self.transposed:
            return matrices_KOI.reshape((*shape[:-2], shape[-1], shape[-2])).mT
        return matrices_KOI.reshape(shape)


def matrices_in(model: Any) -> dict[str, Matrices]:
    """Find the parameters that Muon updates, by name: matrices in blocks, without embeddings and heads."""
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outside |= {id(p) for layer in embedding_layers(model) for p in layer.parameters()}
    inside = {id(p) for m in blocks for p in m.parameters()} - outside
    return {
        f"{path}.{name}": matrices
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in inside and (matrices := _matrices(path, module, name, tuple(parameter.shape))) is not None
    }


def _matrices(path: str, module: nn.Module, name: str, shape: tuple[int, ...]) -> Matrices | None:
    if 0 in shape or "bias" in name:  # the biases of experts are stacked in two dimensions
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Matrices(False, (1, shape[0], math.prod(shape[1:]))) if module.groups == 1 else None
    kinds = {cls.__name__ for cls in type(module).__mro__}  # FSDP2 replaces the class by a subclass
    if len(shape) == 3 and any("Experts" in kind for kind in kinds):
        transposed = bool(getattr(module, "is_transposed", kinds & TRANSPOSED_EXPERTS))
        return Matrices(transposed, (shape[0], shape[2], shape[1]) if transposed else shape)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return Matrices(False, (3, shape[1], shape[1]))
    if len(shape) != 2 or not (isinstance(module, nn.Linear | Conv1D) or name == "weight"):
        return None
    transposed = isinstance(module, Conv1D) and name == "weight"
    num_out, num_in = shape[::-1] if transposed else shape
    layer = path.rpartition(".")[2].lower()
    fused = layer == "c_attn" if transposed else isinstance(module, nn.Linear) and "qkv" in layer
    if fused and num_out == 3 * num_in:
        return Matrices(transposed, (3, num_in, num_in))
    return Matrices(transposed, (1, num_out, num_in))


class MuonAdamW(torch.optim.Optimizer):
    """Apply Muon to groups with ``algorithm="muon"``, and AdamW to those with ``"adamw"``.

    It is one optimizer with an ordinary state; `torch.optim.AdamW` works on its own groups in that state.  A group of
    Muon has the keys ``lr``, ``weight_decay``, ``cautious``, ``momentum``, ``scale`` and, from `Matrices`,
    ``transposed`` and ``shape``.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Let AdamW work on its current groups and the state; groups get its default options."""
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        self._adamw = torch.optim.AdamW(groups) if groups else None
        if self._adamw is not None:
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Update all groups once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                parameters = [p for p in group["params"] if p.grad is not None]
                size = max(BATCH // math.prod(group["shape"]), 1)
                for start in range(0, len(parameters), size):
                    self._update(group, parameters[start : start + size])
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """Update parameters that have matrices of one shape."""
        matrices, momentum = Matrices(group["transposed"], group["shape"]), group["momentum"]
        _, num_out, num_in = matrices.shape
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        directions = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            direction = p.grad.lerp(state["momentum_buffer"], momentum)
            directions.append(matrices.of(direction.full_tensor() if isinstance(p, DTensor) else direction))
        updates = orthogonalized(torch.cat(directions)).split(matrices.shape[0])
        for p, update_KOI in zip(parameters, updates, strict=True):
            weight, update = p, matrices.back(update_KOI, p.shape)
            if isinstance(p, DTensor):
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None).to_local()
                weight = p.to_local()
            if group["cautious"]:
                weight.sub_(weight * (update * weight >= 0), alpha=decay)
            elif decay:
                weight.mul_(1 - decay)
            weight.add_(update, alpha=-lr * update_scale(num_out, num_in, group["scale"]))


def update_scale(num_out: int, num_in: int, scale: Scale) -> float:
    """Return the factor on the orthogonal update of a matrix."""
    return 0.2 * math.sqrt(max(num_out, num_in)) if scale == "match_rms" else math.sqrt(max(1, num_out / num_in))


def warmed_up(momentum: float, share: float) -> float:
    """Return the momentum after a share of its warm-up."""
    first = min(0.85, momentum)
    return first + (momentum - first) * min(share, 1.0)


@dataclass(eq=False)
class Muon(Technique):
    """Train the matrices of the blocks with Muon and everything else with AdamW.

    Args:
        lr: Peak learning rate of the matrices, above 0.  None means 0.02 with scale "spectral", and
            ``args.learning_rate`` with "match_rms".  The rest has ``args.learning_rate``; a search sets only that.
        momentum: Decay of the momentum per step, in [0, 1).
        momentum_warmup: Progress, in [0, 1], at which the momentum has risen from 0.85 to ``momentum``.
        cautious: True if weight decay skips elements of the matrices that the update enlarges.
        scale: Rule for the length of an update, by the shape of the matrix.
    """

    lr: Positive | None = None  # Jordan's 0.02, for scale "spectral"
    momentum: Annotated[float, at.Interval(ge=0, lt=1)] = 0.95  # Jordan's
    momentum_warmup: Fraction = 0.0
    cautious: bool = False
    scale: Scale = "spectral"  # Jordan's; "match_rms" is Liu et al.'s
    variations: ClassVar = {"lr": 0.01}
    refused_backends: ClassVar = {"zero": "it flattens parameters, and Muon needs matrices"}

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Divide each group by the shape of its matrices; weight decay and factors on the rate hold for all."""
        run: Any = self.run_
        if run.is_deepspeed_enabled:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because {self.refused_backends['zero']}. Use DDP or FSDP."
            )
        args, matrices = run.args, matrices_in(model)
        if args.learning_rate == 0:
            raise ValueError(
                f"{self!r} does not support learning_rate=0 because it is the rate of embeddings, heads and norms. "
                "Set learning_rate above 0, or freeze these."
            )
        peak = self.lr or (args.learning_rate if self.scale == "match_rms" else 0.02)
        muon = {"algorithm": "muon", "momentum": self.momentum, "cautious": self.cautious, "scale": self.scale}
        adamw = {
            "algorithm": "adamw",
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "fused": args.optim == OptimizerNames.ADAMW_TORCH_FUSED or None,
        }
        divided: dict[Any, dict[str, Any]] = {}
        for number, group in enumerate(groups):
            for name, parameter in zip(group["names"], group["params"], strict=True):
                kind = matrices.get(name)
                if (number, kind) not in divided:
                    options = adamw if kind is None else muon | kind._asdict()
                    lr = group["lr"] if kind is None else group["lr"] * peak / args.learning_rate
                    divided[number, kind] = group | options | {"params": [], "lr": lr}
                    del divided[number, kind]["names"]
                divided[number, kind]["params"].append(parameter)
        count = {"muon": 0, "adamw": 0}
        for group in divided.values():
            count[group["algorithm"]] += sum(p.numel() for p in group["params"])
        if count["muon"] == 0:
            raise ValueError(
                f"{self!r} does not support this model because {type(model).__name__} has no trainable matrix in a "
                "block. Use another optimizer."
            )
        if self.scale == "spectral" and is_adapted(model):
            logger.warning(
                f"{self!r}: with scale='spectral', a step of a tall adapter (out x rank) is sqrt(out / rank) times as "
                "long as that of a square matrix. Set scale='match_rms' to train adapters at AdamW's rate."
            )
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        if (source := getattr(model, "name_or_path", "")) and not matrices.keys() & frozen:
            logger.warning(
                f"{self!r}: {source!r} looks pre-trained, and Muon degrades the full fine-tuning of models that were "
                "pre-trained with Adam. Use AdamW or train adapters, unless the model is new or Muon trained it."
            )
        self.share_ = count["muon"] / sum(count.values())
        return MuonAdamW(list(divided.values()))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.momentum_warmup == 0:
            return
        momentum = warmed_up(self.momentum, self.progress(state) / self.momentum_warmup)
        for group in kwargs["optimizer"].param_groups:
            if group["algorithm"] == "muon":
                group["momentum"] = momentum

    def report(self) -> Mapping[str, Any]:
        """Report the share of the trainable parameters that Muon updates."""
        return {"muon_share": self.share_}
