"""A model that grows while it is trained, against loops written by hand."""

import pytest
import torch
from architectures import inputs_for, tiny, used
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_accel import (
    AccelTrainer,
    ExponentialMovingAverage,
    LayerFreezing,
    LinearToZero,
    LocalSGD,
    LoRA,
    Muon,
    ProgressiveStacking,
    SparseTraining,
    StochasticWeightAveraging,
)
from hf_accel.model.compression.lora import add_adapters
from hf_accel.model.curriculum.progressive_stacking import depths
from hf_accel.testing import losses_of, tiny_llama, tiny_trainer, weights_of

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PIXELS, CLASS = inputs_for("ViT", torch.float64)["pixel_values"][0], torch.tensor(2)
ROW = torch.tensor([5, 9, 17, 33, 2, 8])
STEPS, LR, BETAS, EPS = 10, 1e-2, (0.9, 0.99), 1e-8


def deep(layers=4):
    """An encoder of images, for language models compute their losses in float32."""
    return tiny("ViT", torch.float64, num_hidden_layers=layers, **NO_DROPOUT)


def train(technique, directory, kind=Trainer, **args):
    """Steps on one image, so that the order does not matter."""
    settings = {"max_steps": STEPS, "learning_rate": LR, "adam_beta2": BETAS[1], "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 2, "optim": "adamw_torch", "report_to": [], "disable_tqdm": True}
    settings |= {"use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    arguments = TrainingArguments(str(directory), **(settings | args))
    given = {"techniques": [technique]} if kind is AccelTrainer else {}
    extra = [] if kind is AccelTrainer else [technique]
    trainer = kind(
        model=deep(),
        args=arguments,
        train_dataset=[{"pixel_values": PIXELS, "labels": CLASS}] * 40,
        callbacks=extra,
        **given,
    )
    trainer.train()
    return trainer


def test_depths():
    assert depths(12, start=0.25, stages=1) == [3, 12]
    assert depths(12, start=0.25, stages=3) == [3, 6, 9, 12]
    assert depths(4, start=0.1, stages=2) == [1, 3, 4]
    assert depths(4, start=1.0, stages=1) == [4, 4]


def named(block, layers):
    """The names, without the block, of the parameters of block ``layers``."""
    return [name for name in block if name.startswith(f"vit.layers.{layers}.")]


def by_hand(growths):
    """AdamW and copying, from their equations: models of each depth, moments by name."""
    whole = deep()
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    m, v, counts = {}, {}, {}
    depth = growths[0][1]
    model = deep(depth)
    for step in range(STEPS):
        for at, new_depth, sources in growths[1:]:
            if step == at:
                stores = (weights, m, v, counts)
                olds = [{name: store[name] for name in list(store)} for store in stores]
                for i, source in enumerate(sources):
                    for old, store in zip(olds, stores, strict=True):
                        for name in named(old, source):
                            store[name.replace(f".layers.{source}.", f".layers.{i}.")] = old[name]
                depth, model = new_depth, deep(new_depth)
        model.load_state_dict(weights, strict=False)
        model.zero_grad()
        model(pixel_values=torch.stack([PIXELS] * 2), labels=torch.stack([CLASS] * 2)).loss.backward()
        for name, p in model.named_parameters():
            g, lr = p.grad, LR * (1 - step / STEPS)
            counts[name] = t = counts.get(name, 0) + 1
            m[name] = BETAS[0] * m.get(name, 0) + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v.get(name, 0) + (1 - BETAS[1]) * g * g
            update = (m[name] / (1 - BETAS[0] ** t)) / ((v[name] / (1 - BETAS[1] ** t)).sqrt() + EPS)
            weights[name] = weights[name] - lr * update
    return weights


CASES = {
    "stacked": ({"start": 0.5}, [(0, 2, None), (3, 4, [0, 1, 0, 1])]),
    "interleaved": ({"start": 0.5}, [(0, 2, None), (3, 4, [0, 0, 1, 1])]),
    "on_top": ({"start": 0.25, "stages": 3}, [(0, 1, None), (1, 2, [0, 0]), (2, 3, [0, 1, 1]), (3, 4, [0, 1, 2, 2])]),
    "middle": ({"start": 0.75, "stages": 1}, [(0, 3, None), (3, 4, [0, 1, 1, 2])]),
}


@pytest.mark.parametrize("kind", [Trainer, AccelTrainer])
@pytest.mark.parametrize("operator", CASES)
def test_it_is_the_loop_that_copies_weights_and_moments(operator, kind, tmp_path):
    fields, growths = CASES[operator]
    trainer = train(ProgressiveStacking(operator=operator, until=0.3, **fields), tmp_path, kind=kind)
    expected = by_hand(growths)
    for name, parameter in trainer.model.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-9, name
    assert trainer.model.config.num_hidden_layers == len(blocks_of(trainer.model)) == 4
    assert type(blocks_of(trainer.model)) is torch.nn.ModuleList


class AtGrowth(TrainerCallback):
    """What a function gives at the end of each step, before or after the technique."""

    def __init__(self, function):
        self.function, self.found = function, []

    def on_step_end(self, args, state, control, **kwargs):
        self.found.append(self.function(**kwargs))


@pytest.mark.parametrize("operator", ["stacked", "middle", "interleaved", "on_top"])
@pytest.mark.parametrize("name", ["Llama", "Qwen", "GPT-2", "ViT"])
def test_silent_copies_keep_the_function(name, operator, tmp_path):
    model, inputs = used(tiny(name, torch.float64)), inputs_for(name, torch.float64)

    @torch.no_grad()
    def outputs(model, **kwargs):
        logits = model.eval()(**inputs).logits
        model.train()
        return len(list(blocks_of(model))), logits

    before, after = AtGrowth(outputs), AtGrowth(outputs)
    technique = ProgressiveStacking(operator, start=0.5, stages=2, until=0.5, silent=True)
    labels = {"labels": torch.zeros(2, dtype=torch.long) if name == "ViT" else inputs["input_ids"]}
    rows = [{key: value[i] for key, value in (inputs | labels).items()} for i in range(2)]
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model=model, args=args, train_dataset=rows * 20, callbacks=[before, technique, after]).train()
    assert [depth for depth, _ in after.found] == [2, 3, 3, 4, 4, 4, 4, 4]
    for (_, old), (_, new) in zip(before.found, after.found, strict=True):
        assert (old - new).abs().max() < 1e-9
    assert (after.found[-1][1] - after.found[0][1]).abs().max() > 1e-3


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_loud_copies_and_norms_after_branches_change_it(name, tmp_path):
    """What is not declared to keep the function does not, so that the test above says something."""
    model, inputs = used(tiny(name, torch.float64)), inputs_for(name)
    logits = AtGrowth(lambda model, **kwargs: model.eval()(**inputs).logits.detach())
    later = AtGrowth(logits.function)
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]]
    args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True)
    technique = ProgressiveStacking(start=0.5, until=0.5, silent=name == "BERT")
    Trainer(model=model, args=args, train_dataset=rows * 20, callbacks=[logits, technique, later]).train()
    assert (logits.found[1] - later.found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("others", [[], [Muon()]], ids=["adamw", "muon"])
def test_moments_of_copies(others, silent, tmp_path):
    """Those of their sources; none of copies that are silent, and none of blocks that are not there."""

    def moments(model, optimizer, **kwargs):
        state = getattr(optimizer, "optimizer", optimizer).state
        return {
            name: {key: torch.as_tensor(value).clone() for key, value in state.get(p, {}).items()}
            for name, p in model.named_parameters()
        }

    seen = AtGrowth(moments)
    technique = ProgressiveStacking("interleaved", start=0.5, until=0.5, silent=silent)
    trainer = tiny_trainer([technique, *others], tmp_path, max_steps=4)
    before = AtGrowth(moments)
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.add_callback(seen)
    trainer.train()
    old, new = before.found[1], seen.found[1]
    for name, state in new.items():
        place = name.split(".")
        if "layers" not in place:
            source = name
        else:
            i = int(place[2])
            assert not old[name] or i < 2
            if silent and i % 2:
                assert not state
                continue
            source = ".".join([*place[:2], str(i // 2), *place[3:]])
        assert state and state.keys() == old[source].keys()
        assert all(torch.equal(value, old[source][key]) for key, value in state.items())


def test_what_is_not_there_costs_nothing(tmp_path):
    model, ids = tiny_llama(dtype=torch.float32), torch.arange(3, 15)[None]
    model.config._attn_implementation = "eager"

    def operations(model, **kwargs):
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
        return counter.get_total_flops()

    seen = AtGrowth(operations)
    trainer = tiny_trainer(
        [ProgressiveStacking(start=0.25, stages=3, until=0.6)],
        tmp_path,
        model=model,
        max_steps=5,
        lr_scheduler_type="constant",
    )
    trainer.add_callback(seen)
    trainer.train()
    config = tiny_llama().config
    config._attn_implementation = "eager"
    expected = []
    for depth in (2, 3, 4, 4, 4):
        config.num_hidden_layers = depth
        expected.append(operations(AutoModelForCausalLM.from_config(config)))
    assert seen.found == expected
    report = trainer.receipt.techniques[0]["report"]
    assert report == {"depths": "1 2 3 4", "blocks_at_the_end": 4, "called": (1 + 2 + 3 + 4 + 4) / 20}


def test_a_checkpoint_is_a_model_of_its_time(tmp_path):
    inputs = {"input_ids": ROW[None]}
    logits = AtGrowth(lambda model, **kwargs: model.eval()(**inputs).logits.detach())
    technique = ProgressiveStacking(start=0.5, until=0.3)
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer = tiny_trainer([technique], tmp_path, max_steps=6, **args)
    trainer.add_callback(logits)
    trainer.train()
    for step, depth in ((1, 2), (2, 4), (6, 4)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert loaded.config.num_hidden_layers == len(loaded.model.layers) == depth
        assert torch.equal(loaded.eval()(**inputs).logits, logits.found[step - 1])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_plain_trainer_resumes_bit_exactly(step, tmp_path):
    def run(directory, resume=None):
        args = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}
        trainer = tiny_trainer([], directory, trainer_class=Trainer, **args)
        trainer.add_callback(ProgressiveStacking(start=0.5, stages=2, until=0.3))
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(trainer)

    straight = run(tmp_path)
    resumed = run(tmp_path / "again", str(tmp_path / f"checkpoint-{step}"))
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())


def test_a_run_that_stops_early_leaves_a_model_of_its_depth(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 2

    trainer = tiny_trainer([ProgressiveStacking(start=0.5, until=0.5)], tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert len(trainer.model.model.layers) == trainer.model.config.num_hidden_layers == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == trainer.model.state_dict().keys()


def test_averages_that_begin_after_the_last_growth_are_right(tmp_path):
    trainer = tiny_trainer([ProgressiveStacking(start=0.5), StochasticWeightAveraging(start=0.75)], tmp_path)
    trainer.train()
    assert len(losses_of(trainer)) == 24 and trainer.receipt.techniques[0]["report"]["blocks_at_the_end"] == 4


def refused(technique, match, tmp_path, others=(), **args):
    with pytest.raises(ValueError, match=match):
        tiny_trainer([technique, *others], tmp_path, **args).train()


def test_bad_input_is_refused_before_training(tmp_path):
    technique = ProgressiveStacking(start=0.5)
    refused(technique, "block 2 of ModernBert.* would copy block 0, which differs in kind", tmp_path,
            model=tiny("ModernBERT"), modality="masked text")  # fmt: skip
    refused(technique, "several stacks of blocks", tmp_path, model=tiny("T5"))
    refused(technique, "has no list of the blocks", tmp_path, model=tiny("ResNet"), modality="image")
    refused(ProgressiveStacking("middle"), "makes at most 2 blocks from 1, and 4 come next. Raise", tmp_path)
    refused(ProgressiveStacking(start=0.9), "covers all 4 blocks, so none is left to add. Lower start", tmp_path)
    adapted = add_adapters(tiny_llama(), rank=2, alpha=4)
    refused(technique, "adapters need a trained model", tmp_path, model=adapted)
    refused(technique, "and LoRA.* both claim the form of the weight matrices", tmp_path, [LoRA()])
    refused(technique, "and LayerFreezing.* both claim which blocks are trained", tmp_path, [LayerFreezing()])
    refused(technique, "and SparseTraining.* both claim the form of the weight matrices", tmp_path, [SparseTraining()])
    refused(
        technique,
        "and ExponentialMovingAverage.* both claim the weights of early steps",
        tmp_path,
        [ExponentialMovingAverage()],
    )
    refused(technique, "and LocalSGD.* both claim what ranks exchange", tmp_path, [LocalSGD()])
    refused(technique, "Set load_best_model_at_end=False", tmp_path, load_best_model_at_end=True, eval_strategy="steps",
            eval_steps=2, save_strategy="steps", save_steps=2)  # fmt: skip
    late = "at progress 0.8 the learning rate is down to 2.% of its peak"
    refused(ProgressiveStacking(start=0.5, until=0.8), late, tmp_path)
    refused(ProgressiveStacking(start=0.5, until=0.8), late, tmp_path, [LinearToZero()])
    with pytest.raises(ValueError, match="down to 20% of its peak"):
        train(ProgressiveStacking(start=0.5, until=0.8), tmp_path)
    tiny_llama().save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    refused(technique, "most blocks of the model from .* would be lost", tmp_path, model=loaded)
