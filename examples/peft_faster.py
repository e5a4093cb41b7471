"""A PEFT model on this package's operators: one line, and a mixed batch that trains."""

import peft
import timm
import torch

from plora_ext.integrations import peft as faster

config = peft.LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules=["patch_embed.proj"])
model = peft.get_peft_model(timm.create_model("test_vit", num_classes=0), config, adapter_name="a")
model.add_adapter("b", config)
model.base_model.set_adapter(["a", "b"])  # both train
print(faster.patch())
print(faster.report(model))
loss = model(torch.randn(4, 3, 160, 160), adapter_names=["a", "b", "__base__", "a"]).square().mean()
loss.backward()
faster.unpatch()
