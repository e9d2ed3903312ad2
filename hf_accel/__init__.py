"""Train to the same quality in less time: an extension of `transformers.Trainer`, with receipts."""

from hf_accel import budget, data, model, optim, system
from hf_accel.arguments import AccelArguments
from hf_accel.budget import *
from hf_accel.data import *
from hf_accel.model import *
from hf_accel.optim import *
from hf_accel.receipt import Receipt
from hf_accel.recipe import Recipe, RecipeError
from hf_accel.system import *
from hf_accel.technique import Technique
from hf_accel.trainer import AccelTrainer, AccelTrainerMixin, accelerated, attach

__version__ = "0.1.0"

__all__ = [
    "AccelArguments",
    "AccelTrainer",
    "AccelTrainerMixin",
    "Receipt",
    "Recipe",
    "RecipeError",
    "Technique",
    "accelerated",
    "attach",
]
__all__ += budget.__all__
__all__ += data.__all__
__all__ += model.__all__
__all__ += optim.__all__
__all__ += system.__all__
