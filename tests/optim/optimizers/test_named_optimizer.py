"""NamedOptimizer against hand-made optimizers and hand-written loops."""

import ast
import copy
import re

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from hf_accel import LAMB, Muon, NamedOptimizer, WarmupStableDecay
from hf_accel.recipe import Recipe, read_technique
from hf_accel.testing import largest_difference, losses_of, tiny_llama, tiny_trainer, weights_of

EXACT = {"dropout": 0.0, "dtype": torch.float64}


def by_hand(trainer, optimizer):
    """Trainer's own batches, clipping and linear decay, in a loop."""
    model = copy.deepcopy(trainer.model).train()
    optimizer = optimizer(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(7)
    plain = tiny_trainer([], trainer.args.output_dir, trainer_class=Trainer, **EXACT)
    for step, batch in enumerate(plain.get_train_dataloader()):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - step / 8)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def soap(model):
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)


def sgd_in_groups(model):
    named = dict(model.named_parameters())
    norm = [p for n, p in named.items() if "norm" in n]
    first = [p for n, p in named.items() if "layers.0" in n and "norm" not in n]
    both = [p for n, p in named.items() if "norm" in n and "layers.0" in n]
    norm = [p for p in norm if not any(p is q for q in both)]
    rest = [p for p in named.values() if not any(p is q for q in (*norm, *first, *both))]
    return torch.optim.SGD(
        [
            {"params": rest, "lr": 5e-3, "momentum": 0.8},
            {"params": norm, "lr": 10e-3, "momentum": 0.8},
            {"params": first, "lr": 2.5e-3, "momentum": 0.5},
            {"params": both, "lr": 5e-3, "momentum": 0.5},
        ]
    )


RULES = {"norm": {"lr": 2.0}, r"layers\.0\.": {"lr": 0.5, "momentum": 0.5}}


@pytest.mark.parametrize(
    ("technique", "oracle"),
    [
        (NamedOptimizer("SGD", options={"momentum": 0.8}, rules=RULES), sgd_in_groups),
        (NamedOptimizer("pytorch_optimizer:SOAP", options={"betas": [0.9, 0.95]}), soap),
    ],
    ids=["SGD with rules", "SOAP"],
)
def test_it_is_the_named_optimizer(technique, oracle, tmp_path):
    trainer = tiny_trainer([technique], tmp_path, num_train_epochs=1, **EXACT)
    expected = by_hand(trainer, oracle)
    trainer.train()
    assert largest_difference(weights_of(trainer), expected) < 1e-10
    assert largest_difference(weights_of(trainer), dict(tiny_llama(**EXACT).state_dict())) > 1e-3


def test_factors_on_weight_decay_hold_where_names_match(tmp_path):
    trainer = tiny_trainer([NamedOptimizer(rules={"embed": {"weight_decay": 0.5}})], tmp_path, weight_decay=0.1)
    made = trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert len(decay) == len(names)
    assert all(d == pytest.approx(0.05 if "embed" in n else 0.0 if "norm" in n else 0.1) for n, d in decay.items())


SCHEDULE_FREE = {"lr_scheduler_type": "constant", "num_train_epochs": 1, "dropout": 0.0}


@pytest.mark.parametrize("name", ["schedulefree:AdamWScheduleFree", "ScheduleFreeAdamW"])
def test_schedule_free_weights_are_evaluated_saved_and_returned(name, tmp_path):
    def trained(directory, **args):
        trainer = tiny_trainer([NamedOptimizer(name)], directory, **SCHEDULE_FREE, **args)
        trainer.train()
        return trainer

    trainer = trained(tmp_path / "a")
    averages = weights_of(trainer)
    optimizer = trainer.optimizer.optimizer
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    for parameter_name, parameter in trainer.model.named_parameters():  # y = 0.9 x + 0.1 z
        between = 0.9 * parameter + 0.1 * optimizer.state[parameter]["z"]
        assert not torch.equal(between, parameter), parameter_name
    trainer.save_model(str(tmp_path / "saved"))
    saved = dict(LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict())
    assert largest_difference(saved, averages) == 0.0

    often = trained(tmp_path / "b", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=3)
    assert largest_difference(weights_of(often), averages) == 0.0, "evaluation changed training"
    evaluated = [entry["eval_loss"] for entry in often.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 8 and often.evaluate()["eval_loss"] == evaluated[-1]

    resumed = tiny_trainer([NamedOptimizer(name)], tmp_path / "c", **SCHEDULE_FREE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(often)
    assert largest_difference(weights_of(resumed), averages) == 0.0


@pytest.mark.parametrize(
    ("technique", "args", "message"),
    [
        (
            NamedOptimizer("AdamV"),
            {},
            "there is no optimizer 'AdamV' in torch.optim, pytorch_optimizer, schedulefree. Did you",
        ),
        (NamedOptimizer("torch.optim:AdamV"), {}, "there is no optimizer 'AdamV' in torch.optim. Did you mean 'Adam"),
        (NamedOptimizer("no_such_package:Adam"), {}, "No module named 'no_such_package'. Check the name."),
        (NamedOptimizer("SOAP", options={"beta": 0.9}), {}, "SOAP has no option 'beta'. Did you mean 'betas'?"),
        (NamedOptimizer(rules={"norm": {"beta": 1}}), {}, "AdamW has no option 'beta'. Did you mean 'betas'?"),
        (
            NamedOptimizer("SGD", options={"momentum": -1.0}),
            {},
            "SGD refuses its options: ValueError: Invalid momentum",
        ),
        (
            NamedOptimizer(rules={"layers.0": {"lr": 0.5}, "nrm": {}}),
            {},
            "'nrm' matches no trainable parameter. The",
        ),
        (NamedOptimizer("LBFGS"), {}, "LBFGS needs a closure"),
        (NamedOptimizer("Rprop"), {"weight_decay": 0.1}, "Rprop has no weight decay. Set args.weight_decay to 0."),
        (NamedOptimizer("schedulefree:SGDScheduleFree"), {}, "lr_scheduler_type='linear' decays the learning rate"),
        (
            NamedOptimizer("schedulefree:SGDScheduleFree"),
            {**SCHEDULE_FREE, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "load_best_model_at_end would return them",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_cannot_be_is_refused(technique, args, message, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(repr(technique))}: .*{re.escape(message)}"):
        tiny_trainer([technique], tmp_path, **({"weight_decay": 0.0} | args)).train()


@pytest.mark.parametrize(
    "technique", [NamedOptimizer("SGD"), Muon(), LAMB()], ids=lambda technique: type(technique).__name__
)
@pytest.mark.parametrize(
    ("args", "said"),
    [({"optim": "adafactor"}, "optim='adafactor'"), ({"optim_args": "rank=4"}, "optim_args='rank=4'")],
)
def test_one_optimizer_in_arguments_and_techniques(technique, args, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{said}: {technique!r} is the optimizer. Remove one.")):
        tiny_trainer([technique], tmp_path, **args)


PROJECTED = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "projection_type": "std"}


def galore(model):
    from pytorch_optimizer import GaLore

    named = dict(model.named_parameters())
    rest = [p for n, p in named.items() if "proj" not in n]
    projected = [p for n, p in named.items() if "proj" in n]
    return GaLore([{"params": rest, "lr": 5e-3}, {"params": projected, "lr": 5e-3} | PROJECTED])


def nor_muon(model):
    from pytorch_optimizer import NorMuon

    named = dict(model.named_parameters())
    rest = [p for n, p in named.items() if "proj" not in n]
    matrices = [p for n, p in named.items() if "proj" in n]
    groups = [
        {"params": rest, "lr": 5e-3, "weight_decay": 0.0, "use_muon": False},
        {"params": matrices, "lr": 2e-2, "weight_decay": 0.0, "use_muon": True},
    ]
    return NorMuon(groups)


@pytest.mark.parametrize(
    ("technique", "oracle"),
    [
        (NamedOptimizer("GaLore", rules={"proj": PROJECTED}), galore),
        (NamedOptimizer("NorMuon", rules={"": {"use_muon": False}, "proj": {"use_muon": True, "lr": 4.0}}), nor_muon),
    ],
    ids=["GaLore", "NorMuon"],
)
def test_rules_give_keys_that_the_optimizer_reads_from_its_groups(technique, oracle, tmp_path):
    trainer = tiny_trainer([technique], tmp_path, num_train_epochs=1, **EXACT)
    expected = by_hand(trainer, oracle)
    trainer.train()
    assert largest_difference(weights_of(trainer), expected) < 1e-10


@pytest.mark.parametrize("name", ["GaLore", "AdamWSN", "AdaMuon", "MuonClip"])
def test_the_rules_that_a_refusal_proposes_train(name, tmp_path):
    with pytest.raises(ValueError) as refusal:
        tiny_trainer([NamedOptimizer(name)], tmp_path, **EXACT).train()
    rules = ast.literal_eval(str(refusal.value).partition("for example ")[2].removesuffix("."))
    trainer = tiny_trainer([NamedOptimizer(name, rules=rules)], tmp_path, **EXACT | {"max_steps": 1})
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("name", ["GaLore", "APOLLO", "Fira"])
def test_moments_are_as_small_as_the_rank(name, tmp_path):
    trainer = tiny_trainer([NamedOptimizer(name, rules={"proj": PROJECTED})], tmp_path, max_steps=2)
    trainer.train()
    state = trainer.optimizer.optimizer.state
    for n, p in trainer.model.named_parameters():
        moments = state[p]["exp_avg"]
        assert moments.numel() == (2 * max(p.shape) if "proj" in n else p.numel()), n


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (
            NamedOptimizer("GaLore"),
            "GaLore needs groups with 'rank'. Set rules, for example {'proj': {'rank'",
        ),
        (NamedOptimizer("APOLLO"), "APOLLO needs groups with 'rank'"),
        (NamedOptimizer("Fira"), "Fira needs groups with 'rank'"),
        (NamedOptimizer("AdamWSN"), "AdamWSN needs groups with 'sn'"),
        (
            NamedOptimizer("AdaMuon"),
            "AdaMuon needs groups with 'use_muon'. Set rules, for example {'': {'use_muon': False}, 'proj': {'use_m",
        ),
        (NamedOptimizer("pytorch_optimizer:Muon"), "Muon needs groups with 'use_muon'"),
        (NamedOptimizer("GaLore", options={"rank": 4}), "GaLore has no option 'rank'. Set it in rules."),
        (
            NamedOptimizer("GaLore", rules={"proj": {"rank": 4}}),
            "GaLore fails at an update: KeyError: 'update_proj_gap'",
        ),
        (NamedOptimizer("GaLore", rules={"proj": {"rnk": 4}}), "GaLore has no option 'rnk'"),
        (NamedOptimizer("Muon"), "Muon refuses its options: ValueError: Muon only supports 2D parameters"),
        (
            NamedOptimizer("AdamMini"),
            "AdamMini takes a model, but Trainer passes groups of parameters. Choose another.",
        ),
        (NamedOptimizer("LOMO"), "LOMO takes a model, but Trainer passes groups of parameters."),
        (NamedOptimizer("AdaLOMO"), "AdaLOMO takes a model, but Trainer passes groups of parameters."),
        (
            NamedOptimizer("SparseAdam"),
            "SparseAdam fails at an update: RuntimeError: SparseAdam does not support dense",
        ),
        (NamedOptimizer("SophiaH"), "SophiaH fails at an update: RuntimeError"),
        (NamedOptimizer("LoRARite"), "LoRARite fails at an update: "),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_would_fail_or_do_nothing_is_refused_before_the_first_step(technique, message, tmp_path):
    trainer = tiny_trainer([technique], tmp_path, weight_decay=0.0)
    with pytest.raises(ValueError, match=f"{re.escape(repr(technique))}: {re.escape(message)}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_state_that_cannot_be_loaded_again_is_refused_where_it_would_be_saved(tmp_path):
    technique = NamedOptimizer("GaLore", rules={"proj": PROJECTED})
    with pytest.raises(ValueError, match="GaLore cannot resume, .* Set save_strategy='no'."):
        tiny_trainer([technique], tmp_path, save_strategy="steps").train()


def test_trying_an_optimizer_leaves_the_run_alone(tmp_path):
    """Kron draws; the run's own draws, of dropout, stay those of a run that does not try it."""
    trainer = tiny_trainer([NamedOptimizer("Kron")], tmp_path, max_steps=1)
    torch.manual_seed(3)
    trainer.create_optimizer()
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_a_decay_by_a_technique_is_refused_too(tmp_path):
    techniques = [NamedOptimizer("schedulefree:SGDScheduleFree"), WarmupStableDecay()]
    with pytest.raises(ValueError, match="WarmupStableDecay.* decays the learning rate"):
        tiny_trainer(techniques, tmp_path).train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"lr": 0.1}}, "'lr' is no option. Set args.learning_rate"),
        ({"options": [1]}, "options must be a dict"),
        ({"rules": {"a(": {}}}, "'a(' is no regular expression"),
        ({"rules": {"a": 0.5}}, "the rule of 'a' must be a dict"),
        ({"rules": {"a": {"lr": -1}}}, "the factor 'lr' of 'a' must be a number >= 0"),
    ],
)
def test_bad_fields_are_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NamedOptimizer(**fields)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        ValueError, match=r"NamedOptimizer\(name='SOAP'.*pytorch_optimizer.*pip install 'hf-accel\[optim\]'"
    ):
        tiny_trainer([NamedOptimizer("SOAP")], tmp_path).train()


def test_recipes_and_options_name_it(tmp_path):
    text = "techniques:\n  - NamedOptimizer: {name: SOAP, options: {betas: [0.95, 0.95]}, rules: {norm: {lr: 0.5}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (read,) = Recipe.load(tmp_path / "recipe.yaml").build_techniques()
    written = read_technique("NamedOptimizer('SOAP', options={'betas': [0.95, 0.95]}, rules={'norm': {'lr': 0.5}})")
    assert repr(read) == repr(written)
    Recipe(techniques=[read]).save(tmp_path / "again.yaml")
    assert repr(Recipe.load(tmp_path / "again.yaml").build_techniques()[0]) == repr(read)
    groups = tiny_trainer([read], tmp_path).create_optimizer().param_groups
    assert [(group["lr"], group["betas"]) for group in groups] == [(5e-3, (0.95, 0.95)), (2.5e-3, (0.95, 0.95))]
