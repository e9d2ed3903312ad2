"""Pre-train an encoder to tell which tokens of a text a small generator has replaced (ELECTRA).

A masked language model learns from the masked tokens only; this one learns from all.  In each text, a share ``rate`` of
the tokens is masked.  A generator, a narrower encoder that trains beside the model, fills the gaps with tokens drawn
from its prediction.  The model predicts for every token x' whether it is the original x:

    loss = weight * mean over tokens of CE(model(x'), x' != x) + mean over masked tokens of CE(generator(x_masked), x)

A drawn token that equals the original counts as original.  The generator has the model's depth and ``width`` times its
width.  It shares the model's token embeddings, as input and as output.

The model is one for token classification with two labels, 0 original and 1 replaced.  The saved model has no generator;
only the checkpoints of the run have it.  Training needs texts without masks or labels.  Evaluation needs texts with
some tokens replaced, and their labels.  All draws are keyed by seed, epoch and example.

Recommendation: Use ReplacedTokenDetection if you pre-train a small encoder and do not need masked prediction.
When to use: Pre-training of small encoders; the authors report the quality of RoBERTa at a quarter of its compute.
When not to use:
- Fine-tuning.
- Models that have to predict masked tokens.
- Without a comparison with masked language modeling: later comparisons at equal compute found smaller gains.  Recent
  encoders (MosaicBERT, ModernBERT) are masked language models with a rate of 0.3.
Defaults: The authors take a width of 1/4 to 1/2.  Weight and rate are theirs, too.
Differences from the paper:
- A softmax over two labels replaces the sigmoid, and equals the sigmoid of their difference.
- The mean over masked tokens divides by `rate` times the number of all tokens, so it does not depend on micro-batches.
- Replacements are drawn without dropout, in a second pass of the generator.
- Only token embeddings are shared.
Reference: Clark et al. (2020), ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators,
https://arxiv.org/abs/2003.10555.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import annotated_types as at
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ElectraConfig, ElectraModel
from transformers.models.electra.modeling_electra import ElectraGeneratorPredictions

from hf_accel.adapters import unwrapped
from hf_accel.features.augmentation import generators
from hf_accel.losses import IGNORED, examples_of, kind_of, widest
from hf_accel.technique import Positive, Technique

if TYPE_CHECKING:
    from hf_accel.batch import MicroBatch, StepBatch
    from hf_accel.losses import ExampleLosses

FAMILIES = ("bert", "electra", "roberta")
OTHER_BACKENDS = "the generator reads the model's embeddings outside of the model's forward pass, when they are sharded"


def draw_from(logits_NV: Tensor, points_N: Tensor) -> Tensor:
    """Draw a class of each row by its probability: where the cumulated ones pass a uniform point in [0, 1)."""
    cumulated_NV = logits_NV.to(widest(logits_NV.device)).softmax(-1).cumsum(-1)
    points_N1 = points_N.to(cumulated_NV)[:, None] * cumulated_NV[:, -1:]
    return torch.searchsorted(cumulated_NV, points_N1, right=True).squeeze(1).clamp(max=logits_NV.shape[-1] - 1)


class Generator(nn.Module):
    """Predict masked tokens by a narrow encoder with the embeddings of another model."""

    def __init__(self, model: Any, width: float):
        super().__init__()
        config, embeddings = model.config, model.get_input_embeddings()
        hidden = max(round(width * config.hidden_size), 1)
        heads = max(round(hidden / (config.hidden_size / config.num_attention_heads)), 1)
        narrow = ElectraConfig(
            vocab_size=config.vocab_size,
            embedding_size=embeddings.embedding_dim,
            hidden_size=hidden,
            num_attention_heads=next(n for n in range(heads, 0, -1) if hidden % n == 0),
            intermediate_size=max(round(width * config.intermediate_size), 1),
            num_hidden_layers=config.num_hidden_layers,
            max_position_embeddings=config.max_position_embeddings,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        )
        self.encoder = ElectraModel(narrow)
        self.encoder.embeddings.word_embeddings = None  # type: ignore[assignment]
        self.predictions = ElectraGeneratorPredictions(narrow)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, embeddings: nn.Embedding, ids_BL: Tensor, mask_BL: Tensor, chosen_BL: Tensor) -> Tensor:
        """Return the logits of the chosen tokens, (N, V)."""
        states = self.encoder(inputs_embeds=embeddings(ids_BL), attention_mask=mask_BL).last_hidden_state
        return F.linear(self.predictions(states[chosen_BL]), embeddings.weight, self.bias)


@dataclass(eq=False)
class ReplacedTokenDetection(Technique):
    """Train a model to tell replaced tokens from original ones, and the generator that replaces them.

    Args:
        width: Width of the generator, as a share of the model's, in (0, 1].
        weight: Weight of the model's loss beside the generator's, above 0; the paper's lambda.
        rate: Share of the tokens to mask, in (0, 1).
    """

    width: Annotated[float, at.Interval(gt=0, le=1)] = 0.25
    weight: Positive = 50.0
    rate: Annotated[float, at.Interval(gt=0, lt=1)] = 0.15
    modality: ClassVar = "replaced text"
    refused_backends: ClassVar = {"fsdp2": OTHER_BACKENDS, "zero": OTHER_BACKENDS}
    rank_counters: ClassVar = ("replaced", "tokens")

    def prepare_args(self, args):
        """Stop DDP from looking for unused parameters: the model's forward pass does not use the generator."""
        args.ddp_find_unused_parameters = False
        return args

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Add a generator to the model."""
        config: Any = getattr(unwrapped(model), "config", None)
        if (
            kind_of(unwrapped(model)) != "token classification"
            or config.num_labels != 2
            or config.model_type not in FAMILIES
        ):
            raise ValueError(
                f"{self!r} does not support {type(model).__name__} because it needs a model for token classification "
                f"with 2 labels, of the family {', '.join(FAMILIES)}. Use such a model."
            )
        run: Any = self.run_
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.args.seed)
            generator = Generator(model, self.width)
        parameter = next(model.parameters())
        model.add_module("generator", generator.to(parameter.device, parameter.dtype))
        return model

    def inspect_dataset(self, dataset: Any) -> None:
        """Find the mask token; raise if the model is sharded."""
        run: Any = self.run_
        if run.is_fsdp_enabled or run.is_deepspeed_enabled:
            raise ValueError(f"{self!r} does not support FSDP or DeepSpeed because {OTHER_BACKENDS}. Use DDP.")
        if run.requested_micro_batch_size == "auto":
            raise ValueError(
                f"{self!r} does not support micro_batch_size='auto' because tokens are replaced before the search for "
                "the largest micro-batch, and that may run out of memory. Set micro_batch_size to a number."
            )
        tokenizer = run.processing_class
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(f"{self!r} needs a mask token. Pass a tokenizer that has one as processing_class=.")
        self.mask_id_, self.special_ids_ = tokenizer.mask_token_id, torch.tensor(tokenizer.all_special_ids)
        self.texts_: list[tuple[Tensor, Tensor, Tensor]] = []
        self.replaced_, self.tokens_ = 0, 0

    def transform_batch(self, batch: StepBatch) -> StepBatch:
        """Replace tokens of each text by the generator's, and label them."""
        self.texts_ = []
        micros = [self._replaced(micro, batch) for micro in batch.micro_batches]
        return dataclasses.replace(batch, micro_batches=micros)

    def _replaced(self, micro: MicroBatch, batch: StepBatch) -> MicroBatch:
        ids_RL = micro.inputs["input_ids"]
        seen_RL = micro.inputs.get("attention_mask", torch.ones_like(ids_RL)).bool()
        examples_RL = examples_of({**micro.inputs, "labels": ids_RL}, len(micro.ids_B))
        maskable_RL = seen_RL & ~torch.isin(ids_RL, self.special_ids_)
        points_RL = torch.ones(ids_RL.shape, dtype=torch.float64)
        fills_RL = torch.zeros(ids_RL.shape, dtype=torch.float64)
        for example, drawn in enumerate(generators(self, batch.plan, micro)):
            places = (maskable_RL & (examples_RL == example)).flatten().nonzero().flatten()
            for numbers_RL in (points_RL, fills_RL):
                numbers_RL.view(-1)[places] = torch.from_numpy(drawn.random(len(places)))
        chosen_RL = points_RL < self.rate
        logits_NV = self._predict(ids_RL, seen_RL, chosen_RL, learns=False)
        new_RL = ids_RL.clone()
        new_RL[chosen_RL] = draw_from(logits_NV, fills_RL[chosen_RL]).to(ids_RL)
        labels_RL = (new_RL != ids_RL).long().masked_fill(~seen_RL, IGNORED)
        self.texts_.append((new_RL, ids_RL, chosen_RL))
        self.replaced_ += int((labels_RL == 1).sum())
        self.tokens_ += int(seen_RL.sum())
        return micro._replace(inputs={**micro.inputs, "input_ids": new_RL, "labels": labels_RL})

    def _predict(self, ids_RL: Tensor, seen_RL: Tensor, chosen_RL: Tensor, learns: bool) -> Tensor:
        """Return the generator's logits at the chosen positions, which are masked."""
        run: Any = self.run_
        generator = run.model.generator
        masked_RL = ids_RL.masked_fill(chosen_RL, self.mask_id_)
        tensors = [tensor.to(run.args.device) for tensor in (masked_RL, seen_RL.long(), chosen_RL)]
        generator.train(learns)
        with torch.set_grad_enabled(learns), run.accelerator.autocast():
            return generator(run.model.get_input_embeddings(), *tensors)

    def loss_weights(self, losses: ExampleLosses, ids_B: Tensor) -> Tensor:
        """Return the weight of the model's loss, the same for all examples."""
        return losses.losses_BL.new_full((len(ids_B),), self.weight)

    def extra_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
        """Return the generator's loss summed over masked tokens, divided by `rate`; the step divides by its tokens."""
        micro = self.run_.micro_batch
        found = next((rest for new_RL, *rest in self.texts_ if new_RL is micro.inputs["input_ids"]), None)
        if found is None:
            raise ValueError(
                f"{self!r}: another technique has changed the texts after it. List ReplacedTokenDetection last."
            )
        ids_RL, chosen_RL = found
        seen_RL = micro.inputs.get("attention_mask", torch.ones_like(ids_RL))
        logits_NV = self._predict(ids_RL, seen_RL, chosen_RL, learns=True)
        targets_N = ids_RL[chosen_RL].to(logits_NV.device)
        wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        losses_N = F.cross_entropy(wide_NV, targets_N, reduction="none")
        if micro.weights_B is not None:
            example_N = examples_of({**micro.inputs, "labels": ids_RL}, len(micro.ids_B))[chosen_RL]
            losses_N = losses_N * micro.weights_B[example_N].to(losses_N)
        return losses_N.sum() / self.rate

    @contextlib.contextmanager
    def for_inference(self, model: nn.Module):
        """Evaluate and save the model without the generator."""
        generator = model._modules.pop("generator")
        try:
            yield
        finally:
            model.add_module("generator", generator.train(model.training))  # an evaluation changes the mode

    def report(self) -> Mapping[str, Any]:
        """Report this rank's share of replaced tokens."""
        return {"replaced": self.replaced_ / max(self.tokens_, 1)}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["replaced"] > 0
