"""Adapters merged into plain timm weights: a checkpoint that needs nothing but timm."""

import tempfile

import timm
import torch
from safetensors.torch import load_file, save_file

from plora_ext.nn import inject

model = timm.create_model("test_vit", num_classes=0).eval()
adapters = inject(model, ["qkv", "proj"], r=4)
for name in ("task0", "task1"):
    adapters.add_adapter(name)
    for factor in adapters.parameters(name):
        torch.nn.init.normal_(factor, std=0.02)
adapters.set_adapter(["task0", "task1"], [0.5, 0.5])
images = torch.randn(2, 3, 160, 160)
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    fused = model(images)
    save_file(adapters.unload().state_dict(), f"{folder}/merged.safetensors")  # the model is plain timm again
    plain = timm.create_model("test_vit", num_classes=0).eval()
    plain.load_state_dict(load_file(f"{folder}/merged.safetensors"))
    assert torch.allclose(plain(images), fused, atol=1e-4)
print("merged")
