"""Let each middle block compute some of the positions, while the others bypass it.

At progress p a share k of an example's n tokens is kept, rising in steps of a sixteenth to all of them:

    k(p) = start + (1 - start) * min(p / end, 1)        m = floor(k n)

Every block except the first and the last draws a new set S of m positions for each example.  It computes them as a
sequence of their own, in order, with their positions and their part of the attention mask.  The others keep their
hidden states:

    h'[S] = block(h[S])        h'[not S] = h[not S]

So attention costs k^2, and everything else k, of the usual amount.  An example's first position (the class token, the
sink of attention) is always kept.  Padding fills up shorter examples of a batch.

Recommendation: Use RandomTokenDrop if you pretrain a deep model on long sequences.
When to use: Pretraining of deep models on long sequences, and fine-tuning of vision transformers.  The authors report
1.5 to 2 times less computation at about equal quality, with metrics that hardly resolve it.
When not to use:
- Few blocks, or short sequences, where gathering costs the savings.
- Flash attention and models with several stacks: it refuses both.
- Short budgets of FLOPs or time: evaluation sees full sequences after training almost only on dropped ones.
- Compiled models, because every share is a new shape.
Defaults: ``start`` is the authors' for BERT, 128 of 512 tokens.  ``end`` is theirs for GPT-3.
Differences from the paper: Examples draw separately.  The layer-token learning rate is missing.
References: Yao et al. (2022), Random-LTD, https://arxiv.org/abs/2211.11586.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import torch
from torch import Tensor, nn

from hf_accel.adapters import unwrapped
from hf_accel.host.internals import attention_of
from hf_accel.losses import examples_of
from hf_accel.surgery.block_wrapper import ExampleSeeds, wrap_block
from hf_accel.surgery.blocks import block_lists
from hf_accel.technique import Technique

LEVELS = 16
"""Number of steps from a share of 0 to 1: few, so that few shapes are compiled or counted."""

BY_POSITION = {"attention_mask", "position_ids", "position_embeddings"}
"""Arguments of blocks with an entry for each position."""


def kept_share(progress: float, *, start: float, end: float) -> float:
    """Return the share of the tokens that middle blocks compute; it never falls."""
    if progress >= end:
        return 1.0
    share = start + (1 - start) * progress / end
    return max(math.floor(share * LEVELS) / LEVELS, start)


def places_of(examples_RL: Tensor, seen_RL: Tensor, num_examples: int) -> list[np.ndarray]:
    """Return the places of each example's tokens, ascending, as indices into all positions.

    Args:
        examples_RL: Example of each position, from 0.
        seen_RL: True for tokens, False for padding.
    """
    places_N = seen_RL.flatten().nonzero().flatten()
    example_N = examples_RL.flatten()[places_N]
    counts_B = torch.bincount(example_N, minlength=num_examples)
    return [own.numpy() for own in places_N[example_N.argsort(stable=True)].split(counts_B.tolist())]


def draw_kept(places: list[np.ndarray], seen_RL: Tensor, share: float, drawn: list[np.random.Generator]) -> Tensor:
    """Return the kept positions, ascending, (R, K): a share of each example's tokens, with the first one.

    Rows with fewer of them than others also keep padding or, without padding, more tokens.

    Args:
        places: Places of each example's tokens.
        seen_RL: True for tokens, False for padding.
        drawn: Generator of each example.
    """
    rank_RL = np.where(seen_RL.numpy(), 2, 1)  # kept tokens get 0
    for own, generator in zip(places, drawn, strict=True):
        others = math.floor(share * len(own) + 1e-9) - 1
        chosen = [own[:1], own[1:][generator.permutation(max(len(own) - 1, 0))[: max(others, 0)]]]
        rank_RL.reshape(-1)[np.concatenate(chosen)] = 0
    kept = max(int((rank_RL == 0).sum(1).max()), 1)
    order_RL = np.argsort(rank_RL, axis=1, kind="stable")
    return torch.from_numpy(np.sort(order_RL[:, :kept], axis=1))


def at_kept(value: Tensor, kept_RK: Tensor, dim: int) -> Tensor:
    """Return the entries along a dimension at each row's kept positions; values shared by all rows are expanded."""
    shape = [len(kept_RK), *value.shape[1:]]
    index = kept_RK.view([len(kept_RK), *(-1 if d == dim else 1 for d in range(1, value.dim()))])
    shape[dim] = kept_RK.shape[1]
    return value.expand(len(kept_RK), *value.shape[1:]).gather(dim, index.expand(shape))


def argument_at_kept(name: str, value: Any, kept_RK: Tensor) -> Any:
    """Return a block's argument for the kept positions alone."""
    if isinstance(value, tuple) and name in BY_POSITION:
        return tuple(argument_at_kept(name, item, kept_RK) for item in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if name not in BY_POSITION:
        raise ValueError(f"the positions in its argument {name} are unknown")
    if name == "attention_mask" and value.dim() == 4:  # queries, then keys
        by_query = at_kept(value, kept_RK, 2) if value.shape[2] > 1 else value
        return at_kept(by_query, kept_RK, 3)
    return at_kept(value, kept_RK, 1)


@dataclass(eq=False)
class RandomTokenDrop(Technique):
    """Let some of the tokens bypass the middle blocks of a model; needs no more than a plain Trainer.

    Args:
        start: Share of the tokens that the first step keeps, in (0, 1].
        end: Progress, in (0, 1], from which all tokens are kept.
    """

    start: Annotated[float, at.Interval(gt=0, le=1)] = 0.25
    end: Annotated[float, at.Interval(gt=0, le=1)] = 0.7
    neutral: ClassVar = {"start": 1.0}
    rank_counters: ClassVar = ("counts",)
    claims: ClassVar = frozenset({"block_positions"})

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        base = unwrapped(model)
        blocks = self._blocks(base)
        if (attention := attention_of(base)).startswith(("flash", "flex", "paged")):
            raise ValueError(
                f"{self!r} does not support {attention} attention because it cannot skip positions. Use sdpa or eager."
            )
        self.share_ = 1.0
        self.counts_ = {"kept": 0, "all": 0}
        self.batch_: tuple[Tensor | None, Tensor | None, list[int]] | None = None
        self.drawn_: dict[int, Tensor | None] = {}
        self.keys_: ExampleSeeds | None = None
        self.parameters_ = list(inspect.signature(blocks[0].forward).parameters)
        # Not a method: copies of the model would copy the technique as well.
        self.hook_ = model.register_forward_pre_hook(lambda _, args, inputs: self._see(model, inputs), with_kwargs=True)
        self.middle_ = range(1, len(blocks) - 1)
        self.ends_ = [wrap_block(blocks[i], functools.partial(self._call, i)) for i in self.middle_]

    def _blocks(self, model: Any) -> nn.ModuleList:
        try:
            lists = block_lists(model)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        blocks = next(iter(lists.values()))
        name = type(model).__name__
        if len(lists) > 1 or getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self!r} does not support {name} because it has several stacks of blocks. Remove RandomTokenDrop."
            )
        if any(isinstance(module, nn.Conv2d) for module in blocks.modules()):
            raise ValueError(
                f"{self!r} does not support {name} because its blocks have convolutions, which need all positions. "
                "Remove RandomTokenDrop."
            )
        if len(blocks) < 3:
            raise ValueError(
                f"{self!r} needs a block between the first and the last; {name} has none. Remove RandomTokenDrop."
            )
        return blocks

    def on_step_begin(self, args, state, control, **kwargs):
        self.share_ = kept_share(self.progress(state), start=self.start, end=self.end)
        self.keys_ = ExampleSeeds(self, args, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.batch_ = None

    def on_train_end(self, args, state, control, **kwargs):
        self.hook_.remove()
        for end in self.ends_:
            end()

    def _see(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Find the examples in the model's batch, and their keys: known ids, or else places in the step."""
        self.drawn_.clear()
        self.batch_ = None
        if self.keys_ is None or (keys := self.keys_.of_examples(model, inputs)) is None:
            return
        if self.keys_.streamed:
            inputs = self.keys_.run.micro_batch.inputs
        ids_RL = inputs.get("input_ids")
        if ids_RL is None:
            self.batch_ = None, None, keys
            return
        mask_RL = inputs.get("attention_mask")
        seen_RL = torch.ones_like(ids_RL).bool() if mask_RL is None or mask_RL.dim() != 2 else mask_RL.bool()
        examples_RL = examples_of({**inputs, "labels": ids_RL}, len(keys))
        self.batch_ = examples_RL.cpu(), seen_RL.cpu(), keys

    def _draw(self, num_rows: int, length: int, device: torch.device) -> None:
        """Draw the positions that each block keeps, None for all, and move them in one copy."""
        assert self.batch_ is not None and self.keys_ is not None
        examples_RL, seen_RL, keys = self.batch_
        if examples_RL is None or seen_RL is None:
            seen_RL = torch.ones(num_rows, length, dtype=torch.bool)
            examples_RL = torch.arange(num_rows)[:, None].expand(num_rows, length)
        if seen_RL.shape != (num_rows, length):
            raise ValueError(
                f"{self!r}: blocks see {num_rows} x {length} positions, the batch has {tuple(seen_RL.shape)}. "
                "Remove techniques that add positions (prompt tuning)."
            )
        self.counts_["all"] += len(self.middle_) * num_rows * length
        if self.share_ == 1:
            self.drawn_ = dict.fromkeys(self.middle_)
            self.counts_["kept"] += len(self.middle_) * num_rows * length
            return
        places = places_of(examples_RL, seen_RL, len(keys))
        kept = []
        for i in self.middle_:
            generators = [np.random.default_rng((*self.keys_.of_step, i, key)) for key in keys]
            kept.append(draw_kept(places, seen_RL, self.share_, generators))
        sizes = [kept_RK.numel() for kept_RK in kept]
        of_blocks = torch.cat([kept_RK.flatten() for kept_RK in kept]).to(device).split(sizes)
        self.drawn_ = {i: own.view(num_rows, -1) for i, own in zip(self.middle_, of_blocks, strict=True)}
        self.counts_["kept"] += sum(sizes)

    def _call(self, i: int, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.batch_ is None:
            return call(*args, **kwargs)
        hidden_states = self.parameters_[0]
        whole_RLH = args[0] if args else kwargs[hidden_states]
        if not self.drawn_:  # once a pass: checkpointing calls a block again
            self._draw(whole_RLH.shape[0], whole_RLH.shape[1], whole_RLH.device)
        if (kept_RK := self.drawn_[i]) is None:
            return call(*args, **kwargs)
        kept_RK = kept_RK.to(whole_RLH.device)
        given = dict(zip(self.parameters_, args, strict=False)) | kwargs
        try:
            few = {name: argument_at_kept(name, given[name], kept_RK) for name in given if name != hidden_states}
        except ValueError as error:
            raise ValueError(f"{self!r} does not support this model because {error}. Remove RandomTokenDrop.") from None
        few[hidden_states] = at_kept(whole_RLH, kept_RK, 1)
        output = call(*(few[name] for name in self.parameters_[: len(args)]), **{name: few[name] for name in kwargs})
        new_RKH, *rest = output if isinstance(output, tuple) else (output,)
        mixed_RLH = whole_RLH.scatter(1, kept_RK[..., None].expand(new_RKH.shape), new_RKH.to(whole_RLH.dtype))
        return (mixed_RLH, *rest) if isinstance(output, tuple) else mixed_RLH

    def flops_key(self) -> Hashable:
        """Return the share of kept tokens."""
        return self.share_

    def report(self) -> Mapping[str, Any]:
        """Report the share of positions that the middle blocks computed, on this rank."""
        return {"kept": self.counts_["kept"] / self.counts_["all"] if self.counts_["all"] else 1.0}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["kept"] < 1
