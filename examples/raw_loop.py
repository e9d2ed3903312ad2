"""No Trainer at all: the functions behind the techniques, in a loop of one's own.

python examples/raw_loop.py

Needs: pip install -c constraints.txt -e .
"""

import torch
from torch import nn

from hf_accel.data.sampling.info_batch import prune_learned
from hf_accel.optim.learning_rate.warmup_stable_decay import warmup_stable_decay
from hf_accel.updates.newton_schulz import orthogonalized

torch.manual_seed(0)
inputs_NF = torch.randn(2048, 16)
labels_N = (inputs_NF[:, :4].sum(1) > 0).long() + 2 * (inputs_NF[:, 4:8].prod(1) > 0).long()
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
momentum = {p: torch.zeros_like(p) for p in model.parameters()}
scores_N = torch.full((len(labels_N),), float("inf"))  # the last loss of each example
generator = torch.Generator().manual_seed(0)
epochs, batch_size, peak_lr = 12, 64, 0.05

for epoch in range(epochs):
    keep = 0.5 if 0 < epoch < epochs - 2 else 1.0  # the first and the last epochs see everything
    ids_N, weights_N = prune_learned(scores_N, keep, generator)
    order = torch.randperm(len(ids_N), generator=generator)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        losses_B = nn.functional.cross_entropy(model(inputs_NF[ids_N[part]]), labels_N[ids_N[part]], reduction="none")
        scores_N[ids_N[part]] = losses_B.detach()
        (losses_B * weights_N[part]).mean().backward()
        rate = peak_lr * warmup_stable_decay((epoch + start / len(order)) / epochs)
        with torch.no_grad():
            for p in model.parameters():
                momentum[p].lerp_(p.grad, 0.1)
                update = orthogonalized(momentum[p][None])[0] if p.dim() == 2 else momentum[p]
                p -= rate * update
                p.grad = None

with torch.no_grad():
    loss = nn.functional.cross_entropy(model(inputs_NF), labels_N)
print({"eval_loss": float(loss)})
