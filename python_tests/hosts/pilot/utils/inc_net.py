"""The networks. EASE's: the backbone, a classifier of the new task to train with, one of all classes and subspaces."""

from backbone.linears import CosineLinear, EaseCosineLinear
from torch import nn


def get_backbone(args, pretrained=False):
    raise NotImplementedError("a test puts its own in the place")


class EaseNet(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.backbone = args, get_backbone(args)
        self.inc, self.init_cls, self.alpha, self.beta = (
            args["increment"],
            args["init_cls"],
            args["alpha"],
            args["beta"],
        )
        self.use_init_ptm, self.out_dim, self._cur_task, self.fc = args["use_init_ptm"], self.backbone.out_dim, -1, None

    def update_fc(self, nb_classes):
        self._cur_task += 1
        self.proxy_fc = EaseCosineLinear(self.out_dim, self.inc if self._cur_task else self.init_cls)
        fc = EaseCosineLinear(self.out_dim * (self._cur_task + 1 + self.use_init_ptm), nb_classes)
        nn.init.zeros_(fc.weight)
        if self.fc is not None:
            fc.sigma.data = self.fc.sigma.data
            fc.weight.data[: self.fc.out_features, : -self.out_dim] = self.fc.weight.data
        self.fc = fc

    def forward(self, x, test=False):
        if not test:
            features = self.backbone(x)
            return {**self.proxy_fc(features), "features": features}
        features = self.backbone(x, True, use_init_ptm=self.use_init_ptm)
        if not self.args["use_reweight"]:
            return {**self.fc(features), "features": features}
        logits = self.fc.forward_reweight(
            features, self._cur_task, self.alpha, self.beta, self.init_cls, self.inc, use_init_ptm=self.use_init_ptm
        )
        return {**logits, "features": features}


class MOSNet(nn.Module):
    def __init__(self, args, pretrained):
        super().__init__()
        self.backbone, self.fc = get_backbone(args, pretrained), None

    def update_fc(self, nb_classes):
        fc = CosineLinear(self.backbone.out_dim, nb_classes).requires_grad_(False)
        if self.fc is not None:
            fc.weight.data[: len(self.fc.weight)] = self.fc.weight.data
        self.fc = fc

    def forward_orig(self, x):
        features = self.backbone(x, adapter_id=0)["features"]
        return {**self.fc(features), "features": features}

    def forward(self, x, adapter_id=-1, train=False, fc_only=False):
        return self.backbone(x, adapter_id, train, fc_only)
