"""Score the examples of a training set by a pass of the model, and choose the best.

Shape suffixes: ``N`` examples of the data set, ``B`` of a batch, ``K`` kept ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import datasets
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_accel.batch import StepPlan
from hf_accel.features.columns import column
from hf_accel.losses import IGNORED, ClassHead, ExampleLosses, Head, TokenHead
from hf_accel.preserve import evaluation_mode, random_state_kept
from hf_accel.stream.reader import StepReader
from hf_accel.technique import Technique

WHOLE_WEIGHTS = {
    "fsdp2": "it scores examples before training, while the weights of the model are not on the device",
    "zero": "it scores examples before training, while the weights of the model are not on the device",
}
"""`Technique.refused_backends` of techniques that call `score_examples`."""


@torch.no_grad()
def score_examples(
    technique: Technique,
    dataset: Any,
    score: Callable[[Mapping[str, Tensor], int], Tensor],
    *,
    batch_size: int | None = None,
    model: nn.Module | None = None,
) -> Tensor:
    """Compute ``score(inputs, num_examples)``, (B, ...), of all examples, (N, ...); on the CPU, equal on all ranks.

    Ranks share the work.  ``model``, by default the trainer's, is in evaluation mode meanwhile.
    """
    run: Any = technique.run_
    check_whole_weights(technique)
    args = run.args
    model = run.model if model is None else model
    assert model is not None
    rank, world, size = args.process_index, args.world_size, batch_size or args.eval_batch_size
    reader = reader_for(run, dataset)
    ids, values = [], []
    steps = range(0, len(dataset), size * world)
    bar = tqdm(steps, desc=type(technique).__name__, disable=args.disable_tqdm or not run.is_world_process_zero())
    with random_state_kept(args.device), evaluation_mode(model), run.accelerator.autocast():
        for start in bar:
            ids_N = torch.arange(start, min(start + size * world, len(dataset)))
            plan = StepPlan(0, ids_N, None, size, rank, world, args.seed)
            for micro in reader[plan].micro_batches:
                inputs = send_to_device(micro.inputs, args.device)
                ids.append(micro.ids_B)
                values.append(score(inputs, len(micro.ids_B)).float())
    ids_N, values_N = run.gather(torch.cat(ids), torch.cat(values))
    return values_N[ids_N.argsort()]


def check_whole_weights(technique: Technique) -> None:
    """Raise ValueError if the model's weights are not on the device before training."""
    run: Any = technique.run_
    if run.is_fsdp_enabled or run.is_deepspeed_enabled:
        raise ValueError(
            f"{technique!r} does not support FSDP and DeepSpeed because {WHOLE_WEIGHTS['zero']}. Score the examples "
            "on one device, and add the scores as a column."
        )


def reader_for(run: Any, dataset: Any) -> StepReader:
    """Make a reader of examples like the trainer's, without techniques."""
    return StepReader(*run.without_unused_columns(dataset))


def head_for(technique: Technique) -> Head:
    """Find the kind of loss of the trainer's model."""
    run: Any = technique.run_
    head = run.head or run.find_head()
    if head is None:
        raise ValueError(
            f"{technique!r} needs a loss of each example, but that of {type(run.model).__name__} is unknown. "
            "Set example_loss_func=."
        )
    return head


def losses_and_outputs(
    head: Head, model: nn.Module, inputs: Mapping[str, Tensor], num_examples: int
) -> tuple[ExampleLosses, Any]:
    """Compute the outputs of a batch and the losses of its examples."""
    outputs = model(**head.without_labels(model, inputs))
    logits, labels = outputs.get("logits"), inputs.get("labels")
    if isinstance(head, ClassHead | TokenHead) and logits is not None and labels is not None:
        check_classes(logits, labels)
    return head.losses(outputs, inputs, num_examples), outputs


def check_classes(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError if a label is a class that the model does not have; numbers and several labels pass."""
    if labels.is_floating_point() or labels.shape == logits.shape or logits.shape[-1] == 1:
        return
    wrong = (labels >= logits.shape[-1]) | ((labels < 0) & (labels != IGNORED))
    if wrong.any():
        raise ValueError(
            f"labels: {int(labels[wrong][0])} is not a class of the model, which has 0 to {logits.shape[-1] - 1}. "
            "Correct the labels or num_labels of the model."
        )


def mean_losses(head: Head, model: nn.Module, inputs: Mapping[str, Tensor], num_examples: int) -> Tensor:
    """Compute the mean loss of each example of a batch, (B,)."""
    losses, _ = losses_and_outputs(head, model, inputs, num_examples)
    return losses.per_example(num_examples)


def check_scores(scores_N: Tensor, num_examples: int, technique: Technique) -> None:
    """Raise ValueError unless each example has a number."""
    if scores_N.shape != (num_examples,):
        raise ValueError(
            f"{technique!r} does not support scores of shape {tuple(scores_N.shape)} for {num_examples} examples. "
            "Use one number per example."
        )
    if not_numbers := int(scores_N.isnan().sum()):
        raise ValueError(f"{technique!r}: {not_numbers} of {num_examples} scores are nan. Correct or remove them.")


def keep_by_score(
    scores_N: Tensor,
    keep: float,
    prefer: Literal["hard", "easy"],
    generator: torch.Generator,
    classes: list[Any] | None,
    technique: Technique,
) -> Tensor:
    """Keep the share ``keep`` with the highest (``hard``) or lowest scores, overall or in each class; ids, ascending.

    The order of equal scores is random.
    """
    shuffled_N = torch.randperm(len(scores_N), generator=generator)
    ranked_N = shuffled_N[scores_N[shuffled_N].argsort(descending=prefer == "hard", stable=True)]
    names = [""] * len(scores_N) if classes is None else classes
    groups: dict[Any, list[int]] = {}
    for i in ranked_N.tolist():
        groups.setdefault(names[i], []).append(i)
    kept = {name: members[: round(keep * len(members))] for name, members in groups.items()}
    if gone := [name for name, members in kept.items() if not members]:
        whose = "" if classes is None else f" of class {gone[0]!r}"
        raise ValueError(
            f"{technique!r} would keep none of the {len(groups[gone[0]])} examples{whose}. Set a larger keep."
        )
    return torch.tensor(sorted(i for members in kept.values() for i in members))


def refuse_lost_classes(dataset: Any, ids_K: Tensor, technique: Technique) -> None:
    """Raise ValueError if a class in the column ``label`` or ``labels`` would vanish."""
    found: Any = dataset.column_names if isinstance(dataset, datasets.Dataset) else dataset[0]
    name = next((name for name in ("label", "labels") if name in found), None)
    if name is None:
        return
    first = dataset[0][name]
    if not isinstance(first.item() if isinstance(first, Tensor) and first.ndim == 0 else first, int | str):
        return
    classes = column(dataset, name, technique)
    if lost := set(classes) - {classes[i] for i in ids_K.tolist()}:
        raise ValueError(
            f"{technique!r} would keep no example of class {min(lost, key=repr)!r}. Set a larger keep or "
            f"balance={name!r}."
        )
