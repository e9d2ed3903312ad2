"""Train on a teacher's distribution over the classes besides the labels.

A better model gives the probability of each class, which tells more than a label.  The items are classes of texts, or
tokens.  With logits z of the model and z_t of the teacher, the loss of every item that counts is

    (1 - weight) * CE(z, label) + weight * T^2 * KL(softmax(z_t / T) || softmax(z / T)) + hidden * MSE(h, h_t)

with T the ``temperature``.  With ``top_k``, the teacher's k most likely classes are kept.  All others count as one more
class that has the rest of the probability, on both sides.  So the divergence stays one, and is 0 if the two agree.

MSE compares hidden states of equal width: at the items or, for the class of a text, at all its tokens.  Embeddings are
compared with embeddings, and block s of S with the teacher's block round(s * T_blocks / S).  If vocabularies of one
tokenizer are padded to different lengths, the classes are those that both have.

The teacher answers at every step, or once before training.  With ``cache``, one pass over the training set writes its
answers (``top_k`` log-probabilities per item), and later epochs and runs read them.  Either way its FLOPs count for the
run, and its seconds appear in the receipt.  The model and its checkpoints do not contain the teacher.

Recommendation: Use Distillation if you have a teacher that is better at the same task with the same labels or
vocabulary.
When to use: A small model, and a teacher that is better at the same task with the same labels or vocabulary.
When not to use:
- No such teacher.
- Label smoothing, which blurs the teacher's answers.
- A teacher with a forward pass, 2 to 20 times the model's, that the saved steps do not pay back.  Compare with that
  time in the budget.
- A cache with augmentations, which it does not know, or with masked language models, because their masks differ each
  time.
Defaults: The values are not taken from a paper.
Differences from the paper: The weight is constant.  Hidden states are compared as in TinyBERT, but without its
projection.
Example: Distillation(teacher="path/to/teacher")
References: Hinton et al. (2015), Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; Jiao
et al. (2020), TinyBERT, https://arxiv.org/abs/1909.10351, for hidden states; Li and Hoiem (2016), Learning without
Forgetting, https://arxiv.org/abs/1606.09282, for training without a teacher.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_accel.adapters import unwrapped
from hf_accel.batch import StepPlan
from hf_accel.features.answers import Answer, Answers, has_answers, read_answers, write_answers
from hf_accel.features.columns import check_indexable
from hf_accel.features.scores import reader_for
from hf_accel.losses import ClassHead, TokenHead, widest
from hf_accel.surgery.frozen_model import freeze, judge, load_frozen, num_classes
from hf_accel.technique import Fraction, Positive, Technique

if TYPE_CHECKING:
    from hf_accel.batch import StepBatch
    from hf_accel.losses import ExampleLosses


def most_likely(logits_NV: Tensor, top_k: int | None, temperature: float) -> tuple[Tensor | None, Tensor]:
    """Return the kept classes, (N, K), and their log-probabilities with that of all others last, (N, K + 1).

    If all classes are kept, return None and their log-probabilities, (N, V).
    """
    log_NV = (logits_NV / temperature).log_softmax(-1)
    if top_k is None or top_k >= log_NV.shape[-1]:
        return None, log_NV
    classes_NK = log_NV.topk(top_k).indices
    return classes_NK, _grouped(log_NV, classes_NK)


def divergence(logits_NV: Tensor, classes_NK: Tensor | None, log_teacher_NK: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || softmax(logits / T)) of each item, (N,), given the result of `most_likely`."""
    log_NK = (logits_NV / temperature).log_softmax(-1)
    if classes_NK is not None:
        log_NK = _grouped(log_NK, classes_NK)
    return temperature**2 * F.kl_div(log_NK, log_teacher_NK.to(log_NK), reduction="none", log_target=True).sum(-1)


def _grouped(log_NV: Tensor, classes_NK: Tensor) -> Tensor:
    rest_N1 = log_NV.scatter(-1, classes_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_NV.gather(-1, classes_NK), rest_N1], -1)


def hidden_difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference over width and blocks; (B, L) for states of (B, L, width)."""
    blocks, teachers_blocks = len(student) - 1, len(teacher) - 1
    layers = [(_wide(student[s]), _wide(teacher[round(s * teachers_blocks / blocks)])) for s in range(blocks + 1)]
    return torch.stack([(ours - theirs).square().mean(-1) for ours, theirs in layers]).mean(0)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(eq=False)
class Distillation(Technique):
    """Train on a teacher's answers and the labels.

    Args:
        teacher: Folder or id of a model for the same classes, or ``package.module:function`` that returns one.  None
            uses the initial model, which keeps a fine-tuned model near it.
        temperature: Divisor of both logits, above 0.
        weight: Share, in [0, 1], of the teacher's answers in the loss; the labels have the rest.
        hidden: Weight of the hidden states, at least 0; the widths of both models must be equal.
        top_k: Number of classes to keep per answer, at least 1; None keeps all.
        cache: Folder for the teacher's answers, below ``output_dir`` unless it is absolute.  If it holds them already,
            the teacher is not needed.  It takes 8 * ``top_k`` bytes per item, and is read into memory.
    """

    teacher: str | None = None
    temperature: Positive = 2.0
    weight: Fraction = 0.5
    hidden: Annotated[float, at.Ge(0)] = 0.0
    top_k: Annotated[int, at.Ge(1)] | None = None
    cache: str | None = None
    neutral: ClassVar = {"weight": 0.0}
    expected_failed_checks: ClassVar = {
        "check_neutral_is_trainer": "the loss of a step is summed in another order than in the model, so logged losses "
        "differ in the last digit"
    }
    variations: ClassVar = {"teacher": "hf_accel.testing:tiny_teacher", "top_k": 4, "cache": "answers"}
    rank_counters: ClassVar = ("divergence", "items")
    claims: ClassVar = frozenset({"logits"})

    @property
    def _idle(self) -> bool:
        return self.weight == 0 and self.hidden == 0

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Keep a frozen copy of the initial model if it is the teacher."""
        if self.teacher is None and not self._idle:
            initial = copy.deepcopy(model)
            for module in initial.modules():
                module._forward_pre_hooks.clear()  # they must not see the passes of the copy
                module._forward_hooks.clear()
            self.initial_ = freeze(initial)
        return model

    def inspect_dataset(self, dataset: Any) -> None:
        """Load the teacher or its answers, before the first step."""
        self.divergence_, self.items_ = torch.zeros((), dtype=torch.float64), 0
        self.teacher_: Any = None
        self.answers_: Answers | None = None
        if self._idle:
            return
        self._check_head()
        if self.cache is not None:
            self.answers_ = self._cached(dataset)
            return
        self.teacher_ = self._load_teacher()
        widths = [getattr(unwrapped(m).config, "hidden_size", None) for m in (self.run_.model, self.teacher_)]
        if self.hidden and (widths[0] is None or widths[0] != widths[1]):
            raise ValueError(
                f"{self!r}: the model's hidden states have a width of {widths[0]}, and the teacher's of {widths[1]}. "
                "Set hidden=0, or use a teacher of the same width."
            )

    def _check_head(self) -> None:
        head = self.run_.head
        one_of_several = isinstance(head, TokenHead)
        if isinstance(head, ClassHead):
            usual = "regression" if head.config.num_labels == 1 else "single_label_classification"
            one_of_several = (head.problem or head.config.problem_type or usual) == "single_label_classification"
        if not one_of_several:
            raise ValueError(
                f"{self!r} does not support {type(self.run_.model).__name__} ({head.kind}) because it does not choose "
                "one of several classes. Remove Distillation."
            )
        if self.cache is not None and self.hidden:
            raise ValueError(f"{self!r}: the cache does not hold hidden states. Set cache=None or hidden=0.")
        if self.cache is not None and head.kind == "masked LM":
            raise ValueError(f"{self!r}: masks differ each time, so a cache does not fit them. Set cache=None.")

    def _load_teacher(self) -> Any:
        if self.teacher is not None:
            return load_frozen(self, self.teacher)
        if getattr(self.initial_, "is_quantized", False):
            return self.initial_  # cannot be moved, and is on its device already
        return self.initial_.to(self.run_.args.device)  # FSDP and others move the model after it was copied

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Ask the model for its hidden states if they are compared."""
        if not self.hidden:
            return batch
        asking: Any = {"output_hidden_states": True}
        micros = [micro._replace(inputs={**micro.inputs, **asking}) for micro in batch.micro_batches]
        return dataclasses.replace(batch, micro_batches=micros)

    def loss_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor | None:
        """Return the labels' share, the same for all examples."""
        if self._idle:
            return None
        self.mask_BL_, self.example_BL_ = losses.mask_BL, losses.example_BL  # for `extra_loss`, which is called next
        return losses.losses_BL.new_full((len(ids_B),), 1 - self.weight)

    def extra_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor | None:
        """Return the teacher's share, summed over the items of a micro-batch."""
        run: Any = self.run_
        micro = run.micro_batch
        if self._idle or micro.ids_B[0] < 0:
            return None
        items_N = self.mask_BL_.flatten().nonzero().squeeze(1)
        example_N = self.example_BL_.flatten()[items_N]
        logits_NV = _logits_of(outputs, self.mask_BL_, items_N, self)
        if self.answers_ is not None:
            classes_NK, log_NK = send_to_device(self.answers_.of(micro.ids_B, len(items_N), self), logits_NV.device)
            logits_NV = logits_NV if classes_NK is not None else logits_NV[:, : log_NK.shape[1]]
        else:
            answers = judge(self, self.teacher_, inputs)
            theirs_NV = _logits_of(answers, self.mask_BL_, items_N, self)[:, : logits_NV.shape[1]]
            logits_NV = logits_NV[:, : theirs_NV.shape[1]]
            classes_NK, log_NK = most_likely(theirs_NV, self.top_k, self.temperature)
        divergence_N = divergence(logits_NV, classes_NK, log_NK, self.temperature)
        total = divergence_N.detach().sum().to(widest(divergence_N.device))
        self.divergence_ = self.divergence_.to(total) + total
        self.items_ += len(items_N)
        loss_N = self.weight * divergence_N
        if self.hidden:
            loss_N = loss_N + self.hidden * self._hidden_losses(inputs, outputs, answers).flatten()[items_N]
        if micro.weights_B is not None:
            loss_N = loss_N * micro.weights_B.to(loss_N)[example_N]
        return loss_N.sum()

    def _hidden_losses(self, inputs: Mapping[str, Tensor], outputs: Any, answers: Any) -> Tensor:
        """Return the loss of each item in the shape of the mask: at a token, or the mean over an example's tokens."""
        for states in (getattr(outputs, "hidden_states", None), getattr(answers, "hidden_states", None)):
            if states is None:
                raise ValueError(f"{self!r}: a model returns no hidden_states. Set hidden=0.")
        losses_BL = hidden_difference(outputs.hidden_states, answers.hidden_states)
        if losses_BL.shape == self.mask_BL_.shape:
            return losses_BL
        seen_BL = inputs.get("attention_mask")
        seen_BL = torch.ones_like(losses_BL) if seen_BL is None else seen_BL.to(losses_BL)
        return (losses_BL * seen_BL).flatten(1).sum(1, keepdim=True) / seen_BL.flatten(1).sum(1, keepdim=True)

    def _cached(self, dataset: Any) -> Answers:
        """Read the teacher's answers from the cache, and write them first if it has none."""
        run: Any = self.run_
        assert self.cache is not None
        check_indexable(dataset, self)
        folder = Path(run.args.output_dir, self.cache)
        said = {"teacher": self.teacher, "temperature": self.temperature, "top_k": self.top_k, "examples": len(dataset)}
        said["classes"] = num_classes(unwrapped(run.model))
        if self.teacher is None:
            total = sum(float(p.cpu().double().sum()) for p in self.initial_.parameters())
            said["teacher"] = f"weights of sum {total:.9e}"
        if not has_answers(folder):
            write_answers(self, folder, self._answer(dataset), said)
        return read_answers(self, folder, said)

    @torch.no_grad()
    def _answer(self, dataset: Any) -> Iterator[Answer]:
        """Yield the teacher's answers over this rank's part of the training set."""
        run: Any = self.run_
        args, teacher = run.args, self._load_teacher()
        reader = reader_for(run, dataset)
        ids_N = torch.arange(len(dataset)).tensor_split(args.world_size)[args.process_index]
        bar = tqdm(ids_N.split(args.eval_batch_size), desc="Teacher", disable=args.disable_tqdm)
        for ids_B in bar:
            (micro,) = reader[StepPlan(0, ids_B, None, len(ids_B), seed=args.seed)].micro_batches
            inputs = send_to_device(micro.inputs, args.device)
            outputs = judge(self, teacher, inputs)
            example = run.head.losses(outputs, inputs, len(ids_B))
            items_N = example.mask_BL.flatten().nonzero().squeeze(1)
            counts_B = torch.bincount(example.example_BL.flatten()[items_N], minlength=len(ids_B))
            logits_NV = _logits_of(outputs, example.mask_BL, items_N, self)[:, : num_classes(unwrapped(run.model))]
            yield counts_B, *most_likely(logits_NV, self.top_k, self.temperature)

    def report(self) -> Mapping[str, Any]:
        """Report this rank's mean divergence from the teacher per item, and the examples in the cache."""
        cached = 0 if self.answers_ is None else len(self.answers_.counts_N)
        return {"divergence": float(self.divergence_) / max(self.items_, 1), "cached": cached}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["divergence"] > 0


def _logits_of(outputs: Any, mask_BL: Tensor, items_N: Tensor, technique: Technique) -> Tensor:
    """Return the logits of the items that count, (N, V), in float32 or wider."""
    logits = getattr(outputs, "logits", None)
    if logits is None or logits[..., 0].numel() != mask_BL.numel():
        given = "no logits" if logits is None else f"logits{tuple(logits.shape)}"
        raise ValueError(
            f"{technique!r} does not support {type(outputs).__name__} with {given} because each of the "
            f"labels{tuple(mask_BL.shape)} needs a distribution. Disable prompt tuning or sparse prediction."
        )
    rows = logits.flatten(0, -2)
    return _wide(rows[items_N])
