"""An adapter to PEFT's file format, and from there into PEFT."""

import copy
import tempfile

import timm
import torch

from plora_ext import io
from plora_ext.nn import inject

model = timm.create_model("test_vit", num_classes=0).eval()
original = copy.deepcopy(model)
adapters = inject(model, ["qkv", "proj"], r=4)
adapters.add_adapter("birds")
for factor in adapters.parameters("birds"):
    torch.nn.init.normal_(factor, std=0.02)
images = torch.randn(2, 3, 160, 160)
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    io.save_adapter(adapters, folder, "birds")
    try:
        import peft
    except ImportError:
        print("PEFT is not installed; the file is written all the same")
    else:
        theirs = peft.PeftModel.from_pretrained(original, folder)
        print(float((theirs(images) - model(images)).abs().max()))
        assert torch.allclose(theirs(images), model(images), atol=1e-4)
