"""Train with any optimizer of torch, pytorch_optimizer or schedulefree, with rules for parameters by pattern.

    NamedOptimizer("SOAP", options={"precondition_frequency": 10}, rules={"embed": {"lr": 0.5, "weight_decay": 0.0}})

``package:Class`` names any class.  A name without a package is searched in ``torch.optim``, ``pytorch_optimizer`` and
``schedulefree``, in this order.  The trainer sets the peak learning rate and the weight decay.  ``args.adam_beta1`` and
the like are not read, and ``args.optim`` may not name another optimizer.

The keys of ``rules`` are regular expressions that are searched in the names of parameters.  ``lr`` and ``weight_decay``
are factors, which multiply if several rules match.  Any other key is an option of the optimizer for these parameters,
or a key of its parameter groups that its code reads.  The last rule that matches decides:

    projected = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}
    NamedOptimizer("GaLore", rules={"proj": projected})
    NamedOptimizer("NorMuon", rules={"": {"use_muon": False}, r"layers.*proj": {"use_muon": True, "lr": 20.0}})

Before the first step, the optimizer updates a small copy of the parameters, so that failures show then.

Schedule-free optimizers have different weights for training and evaluation.  They are switched around evaluation and
saving.  When training continues, the weights are those from before, bit for bit.  The checkpoints of a run hold the
weights of training, and the trained model those of evaluation.

Recommendation: Use NamedOptimizer if you want an optimizer that args.optim does not know, or rules for groups of
parameters.
When to use: To try an optimizer that the trainer's ``optim`` does not know, or to give groups of parameters their own
rates.  Tune the learning rate again, because scales differ.
When not to use:
- An optimizer that ``optim`` knows, without rules.
- FSDP2 or ZeRO with optimizers that work on whole matrices (SOAP, Shampoo): they see shards, and act differently.
- Optimizers that need a closure, which are refused, or second derivatives, which they do not find.
Differences from the paper: None.
Example: NamedOptimizer("SOAP")
References: https://github.com/kozistr/pytorch_optimizer; Defazio et al. (2024), The Road Less Scheduled,
https://arxiv.org/abs/2405.15682.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import SchedulerType

from hf_accel.recipe.technique_syntax import nearest
from hf_accel.technique import Technique
from hf_accel.weights import local_parameters

PACKAGES = "torch.optim", "pytorch_optimizer", "schedulefree"

SWITCHES = {
    "rank": {"proj": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}},
    "sn": {"proj": {"sn": True}},
    "use_muon": {"": {"use_muon": False}, "proj": {"use_muon": True}},
}
"""Keys of parameter groups that change the algorithm of an optimizer that reads them, with rules as an example."""


def optimizers_in(package: str) -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers that a package exports, by name."""
    members = vars(importlib.import_module(package))
    return {
        name: member
        for name, member in members.items()
        if isinstance(member, type)
        and issubclass(member, torch.optim.Optimizer)
        and member is not torch.optim.Optimizer
    }


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return the class with the name, ``package:Class`` or ``Class``; raise ValueError if there is none."""
    package, colon, member = name.rpartition(":")
    places = (package,) if colon else PACKAGES
    known: dict[str, type[torch.optim.Optimizer]] = {}
    for place in places:
        try:
            found = optimizers_in(place)
        except (ImportError, ValueError) as error:
            remedy = "pip install 'hf-accel[optim]'" if place in PACKAGES else "Check the name"
            raise ValueError(f"{member!r} cannot be searched in {place!r}: {error}. {remedy}.") from None
        if member in found:
            return found[member]
        known |= found
    raise ValueError(f"there is no optimizer {member!r} in {', '.join(places)}. {nearest(member, known)}")


def options_of(kind: type[torch.optim.Optimizer]) -> set[str]:
    """Return the names of the arguments that the class and its bases take."""
    named = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    return named - {"self", "params", "args", "kwargs", "defaults"}


def group_keys_of(kind: type[torch.optim.Optimizer]) -> set[str]:
    """Return names in the code of the class and its bases that it may read from parameter groups."""
    keys = set()
    for base in kind.__mro__[: kind.__mro__.index(torch.optim.Optimizer)]:
        with contextlib.suppress(OSError):  # a class of torch with a wrong __module__
            keys.update(re.findall(r"""['"]([A-Za-z_]\w*)['"]""", inspect.getsource(base)))
    return keys


def failure(
    kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any], saved: bool
) -> str | None:
    """Return an error of the optimizer when it updates small copies of the parameters, and is saved and loaded.

    Args:
        saved: True if its state must load as Trainer loads it, with ``weights_only``.
    """
    sizes = sorted({size for group in groups for p in group["params"] for size in p.shape if size > 1})
    smaller = {size: min(size, 2 + i) for i, size in enumerate(sizes)} | {0: 0, 1: 1}  # different sizes stay different

    def small(parameter: Tensor) -> nn.Parameter:
        copy = nn.Parameter(torch.rand([smaller[size] for size in parameter.shape], dtype=parameter.dtype))
        copy.grad = torch.rand_like(copy)
        return copy

    with torch.random.fork_rng(devices=[]):
        copies = [group | {"params": [small(p) for p in group["params"]]} for group in groups]
        try:
            made = kind(copies, **options)
        except Exception as error:
            return f"{kind.__name__} refuses its options: {_in_words(error)}. Correct options and rules."
        if callable(train := getattr(made, "train", None)):  # schedule-free
            train()
        try:
            for _ in range(2):
                made.step()
        except Exception as error:
            return f"{kind.__name__} fails at an update: {_in_words(error)}. Correct the rules, or choose another."
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        if saved:
            return (
                f"{kind.__name__} cannot resume, because its state holds more than tensors and numbers. "
                "Set save_strategy='no'."
            )
    return None


@dataclass(eq=False)
class NamedOptimizer(Technique):
    """Train with the named optimizer.

    Args:
        name: ``Class`` or ``package:Class``.
        options: Arguments of the class, without the parameters, ``lr`` and ``weight_decay``.
        rules: Factors ``lr`` and ``weight_decay`` and options, by regular expression on the names of parameters.
    """

    name: str = "AdamW"  # Trainer's
    options: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    neutral: ClassVar = {"options": {"fused": True}}
    variations: ClassVar = {"name": "SGD", "options": {"betas": [0.5, 0.9]}, "rules": {"norm": {"lr": 0.5}}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("options", "rules"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"NamedOptimizer({name}={value!r}): {name} must be a dict.")
        if given := {"params", "lr", "weight_decay"} & self.options.keys():
            raise ValueError(f"{self!r}: {min(given)!r} is no option. Set args.learning_rate or args.weight_decay.")
        for pattern, rule in self.rules.items():
            if not isinstance(rule, dict):
                raise ValueError(f"{self!r}: the rule of {pattern!r} must be a dict, such as {{'lr': 0.5}}.")
            for factor in ("lr", "weight_decay"):
                if not isinstance(value := rule.get(factor, 1.0), int | float) or not value >= 0:
                    raise ValueError(f"{self!r}: the factor {factor!r} of {pattern!r} must be a number >= 0.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{self!r}: {pattern!r} is no regular expression: {error}. Correct it.") from None

    def parameter_rules(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Multiply the factors of the rules that match."""
        answer: dict[str, Any] = {}
        for pattern in self._matching(name):
            answer["group"] = f"{answer.get('group', '')}[{pattern}]"
            for factor in self.rules[pattern].keys() & {"lr", "weight_decay"}:
                answer[factor] = answer.get(factor, 1.0) * self.rules[pattern][factor]
        return answer

    def _matching(self, name: str) -> list[str]:
        return [pattern for pattern in self.rules if re.search(pattern, name)]

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the named optimizer, with the groups that the rules make."""
        run: Any = self.run_
        names = [name for group in groups for name in group["names"]]
        for pattern in self.rules:
            if not any(re.search(pattern, name) for name in names):
                close = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
                raise ValueError(f"{self!r}: {pattern!r} matches no trainable parameter. The nearest are {close}.")
        try:
            kind = find_optimizer(self.name)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None
        if (first := next(iter(inspect.signature(kind).parameters))) != "params":
            raise ValueError(
                f"{self!r}: {kind.__name__} takes a {first}, but Trainer passes groups of parameters. Choose another."
            )
        known = options_of(kind)
        of_groups = group_keys_of(kind)
        ruled = {option for rule in self.rules.values() for option in rule}
        if unknown := sorted((self.options.keys() - known) | (ruled - known - of_groups - {"lr", "weight_decay"})):
            remedy = "Set it in rules." if unknown[0] in of_groups else nearest(unknown[0], known)
            raise ValueError(f"{self!r}: {kind.__name__} has no option {unknown[0]!r}. {remedy}")
        for key in (SWITCHES.keys() & of_groups) - known - ruled:
            raise ValueError(
                f"{self!r}: {kind.__name__} needs groups with {key!r}. Set rules, for example {SWITCHES[key]}."
            )
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{self!r}: {kind.__name__} needs a closure, which Trainer does not pass. Choose another.")
        if "weight_decay" not in known and any(group["weight_decay"] for group in groups):
            raise ValueError(f"{self!r}: {kind.__name__} has no weight decay. Set args.weight_decay to 0.")
        kept = []
        for group in groups:
            extra = {k: v for pattern in self._matching(group["names"][0]) for k, v in self.rules[pattern].items()}
            extra = {k: v for k, v in extra.items() if k not in ("lr", "weight_decay")}
            kept.append(
                {k: group[k] for k in ("params", "lr", "weight_decay") if k in known | {"params"}} | _tuples(extra)
            )
        options = ({"lr": run.args.learning_rate} if "lr" in known else {}) | _tuples(self.options)
        if (reason := failure(kind, kept, options, saved=run.args.save_strategy != "no")) is not None:
            raise ValueError(f"{self!r}: {reason}")
        made = kind(kept, **options)
        self.switched_ = callable(getattr(made, "eval", None))
        if self.switched_:
            self._refuse_what_breaks_switching(run)
        return made

    def _refuse_what_breaks_switching(self, run: Any) -> None:
        owner = run.owner("schedule")
        scheduled = None if owner is None else repr(owner)
        named = SchedulerType(run.args.lr_scheduler_type).value
        if scheduled is None and named not in ("constant", "constant_with_warmup"):
            scheduled = f"lr_scheduler_type={named!r}"
        if scheduled is not None:
            raise ValueError(
                f"{self!r}: its averaging replaces a decay, and {scheduled} decays the learning rate. "
                "Use lr_scheduler_type='constant' or 'constant_with_warmup'."
            )
        if run.args.load_best_model_at_end:
            raise ValueError(
                f"{self!r}: checkpoints hold the weights of training, and load_best_model_at_end would return them. "
                "Set load_best_model_at_end=False."
            )
        if run.is_deepspeed_enabled:
            raise ValueError(
                f"{self!r} does not support DeepSpeed ZeRO because it does not switch between training and evaluation. "
                "Use DDP or FSDP2."
            )

    @contextlib.contextmanager
    def for_inference(self, model: nn.Module) -> Iterator[None]:
        """Use the weights of evaluation during training; after it, the model has them anyway."""
        run: Any = self.run_
        if run is None or not run.is_in_train or not self.switched_:
            yield
            return
        before = {name: weight.clone() for name, weight in local_parameters(model).items()}
        run.optimizer.eval()
        try:
            yield
        finally:
            run.optimizer.train()
            with torch.no_grad():
                for name, weight in local_parameters(model).items():
                    weight.copy_(before[name])

    def on_train_end(self, args, state, control, **kwargs):
        if self.switched_:
            kwargs["optimizer"].eval()


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).removesuffix('.')}"


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lists to tuples, which YAML does not have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
