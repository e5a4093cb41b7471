"""What a model of Mammoth derives from: a network, its optimizer, and how many classes were seen."""

import torch
from torch import nn


class ContinualModel(nn.Module):
    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__()
        self.net, self.loss, self.args, self.transform, self.dataset = backbone, loss, args, transform, dataset
        self.device, self.num_classes = torch.device("cpu"), args.num_classes
        self.n_past_classes = self.n_seen_classes = 0

    def get_optimizer(self, params=None, lr=None):
        return torch.optim.AdamW(params or self.get_parameters(), self.args.lr, weight_decay=self.args.optim_wd)

    def forward(self, x):
        return self.net(x)
