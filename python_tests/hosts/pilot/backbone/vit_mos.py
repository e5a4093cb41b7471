"""MOS's ViT: adapters that are moved towards the mean of their predecessors, whenever a block looks at them."""

import copy

from backbone import vit_ease
from torch import nn

SIDES = [(projection, part) for projection in ("down", "up") for part in ("weight", "bias")]


class Attention(vit_ease.Attention):
    def forward(self, x):
        return super().forward(x)


class VisionTransformer(vit_ease.VisionTransformer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head, self.adapter_list = nn.Linear(self.cls_token.shape[-1], kwargs["num_classes"]), nn.ModuleList()
        for block in self.blocks:
            heads, dim = block.attn.num_heads, block.norm1.normalized_shape[0]
            block.attn = Attention(dim, heads).requires_grad_(False)
        for projection, part in SIDES:  # of every block, the sum of the first, of the first two, ... adapters
            setattr(self, f"{projection}_{part}_sum", [[] for _ in self.blocks])

    def _moving(self, adapter):
        """The tensors of an adapter, each with its sums."""
        for layer, own in enumerate(adapter):
            for projection, part in SIDES:
                sums = getattr(self, f"{projection}_{part}_sum")[layer]
                yield getattr(getattr(own, f"{projection}_proj"), part), sums

    def adapter_update(self):
        self.adapter_list.append(copy.deepcopy(self.cur_adapter))
        for parameter, sums in self._moving(self.cur_adapter):
            sums.append(parameter.data + sums[-1] if sums else parameter.data)

    def reweight_adapter(self, adapter, idx):
        a = self.config.adapter_momentum
        if a and idx:
            for parameter, sums in self._moving(adapter):
                parameter.data = (1 - a) * parameter.data + a * sums[idx - 1] / idx
        return adapter

    def adapter_merge(self):
        self.reweight_adapter(self.cur_adapter, len(self.adapter_list))

    def forward_features(self, x, adapter_id, train):
        chosen = self.cur_adapter if train or adapter_id == len(self.adapter_list) else self.adapter_list[adapter_id]

        class Looked:
            def __getitem__(_, layer):
                return self.reweight_adapter(chosen, adapter_id)[layer]

        features = self._tokens(x, None if adapter_id == -1 else Looked())[:, 0]
        return {"x": features, "pre_logits": features, "features": features}

    def forward(self, x, adapter_id=-1, train=False, fc_only=False):
        result = {} if fc_only else self.forward_features(x, adapter_id, train)
        return {**result, "logits": self.head(x if fc_only else result["x"])}
