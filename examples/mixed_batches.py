"""Inference where every sample of a batch takes its own adapter, or none."""

import torch
from torch import nn

from plora_ext.nn import inject

model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
adapters = inject(model, ["0", "2"], r=4)
for name in ("cats", "dogs"):
    adapters.add_adapter(name)
    torch.nn.init.normal_(adapters.layers["2"].lora_B[name])  # as if it had been trained
images = torch.randn(4, 16)
with torch.no_grad(), adapters.batch(["cats", "__base__", "dogs", "cats"]):
    together = model(images)
adapters.set_adapter("cats")
with torch.no_grad():
    assert torch.allclose(together[0], model(images)[0], atol=1e-5)
print(together.shape)
