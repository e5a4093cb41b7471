"""Adapters for any model that has `nn.Linear` layers: add one per task, train the newest, use their exact sum."""

import torch
from torch import nn

from plora_ext.nn import inject

model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
adapters = inject(model, ["0", "2"], r=4)  # by name, as PEFT matches them
for task in ("first", "second"):
    adapters.add_adapter(task)  # it alone is active and trains
    optimizer = torch.optim.AdamW(adapters.parameters(task), 1e-2)
    for _ in range(5):
        loss = (model(torch.randn(64, 16)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
adapters.set_adapter(["first", "second"], [0.5, 0.5])
print(adapters, model(torch.randn(3, 16)).shape)
