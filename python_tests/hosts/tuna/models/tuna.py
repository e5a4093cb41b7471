"""TUNA: a sample is classified by the adapter that is surest of it, and by a general one."""

import numpy as np
import torch
import torch.nn.functional as F
from hosts.pilot.models.base import BaseLearner
from torch import nn
from torch.utils.data import DataLoader
from utils.inc_net import TUNANet

num_workers = 8


class AngularPenaltySMLoss(nn.Module):
    def __init__(self, loss_type="cosface", s=20.0, m=0.0):
        super().__init__()
        self.loss_type, self.s, self.m = loss_type, s, m

    def forward(self, wf, labels):
        losses = []
        for row, label in zip(wf, labels.tolist()):
            own = self.s * (row[label] - self.m)
            others = torch.cat([row[:label], row[label + 1 :]])
            losses.append(torch.log(torch.exp(own) + torch.exp(self.s * others).sum()) - own)
        return torch.stack(losses).mean()


class Learner(BaseLearner):
    def __init__(self, args):
        super().__init__(args)
        self._network, self.cls_mean = TUNANet(args, True), {}

    def incremental_train(self, data_manager):
        self._cur_task += 1
        self._total_classes = self._known_classes + data_manager.get_task_size(self._cur_task)
        self._network.update_fc(self._total_classes)
        new = np.arange(self._known_classes, self._total_classes)

        def loader(classes, source, mode, shuffle):
            dataset = data_manager.get_dataset(classes, source=source, mode=mode)
            return DataLoader(dataset, batch_size=self.args["batch_size"], shuffle=shuffle, num_workers=num_workers)

        self.test_loader = loader(np.arange(self._total_classes), "test", "test", False)
        self._train(loader(new, "train", "train", True))
        vit = self._network.backbone.eval()
        vit.adapter_update()
        vit.merge()
        with torch.no_grad():
            for c in new.tolist():
                features = [vit(x, self._cur_task, True)["features"] for _, x, _ in loader([c], "train", "test", False)]
                self.cls_mean[c] = torch.cat(features).mean(0)
                self._network.fc.weight[c] = self.cls_mean[c]  # TUNA trains it on, with features drawn around the means

    def _train(self, loader):
        network, loss_of = self._network, AngularPenaltySMLoss(s=self.args["scale"], m=self.args["m"])
        asks = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(asks, self.args["init_lr"], 0.9)
        for _ in range(self.args["tuned_epoch"]):
            network.train()
            for _, images, labels in loader:
                features = network.backbone(images, adapter_id=self._cur_task, train=True)["features"]
                logits = network.fc(features)["logits"][:, self._known_classes :]
                loss = loss_of(logits, labels - self._known_classes)
                if self.args["use_orth"] and self._cur_task:
                    loss = loss + self.args["reg"] * self.orth_loss(features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def orth_loss(self, features):
        vit, total = self._network.backbone, 0
        for block in range(12):
            newest = F.normalize(vit.cur_adapter[block].up_proj.weight, dim=1)
            for task in range(self._cur_task):
                old = F.normalize(vit.adapter_list[task][block].up_proj.weight, dim=1)
                total = total + (old @ newest.T).mean().abs()
        return total / 12

    def after_task(self):
        self._known_classes = self._total_classes

    def _eval_cnn(self, loader):
        network, tasks, predicted, targets = self._network.eval(), self._cur_task + 1, [], []
        for _, images, labels in loader:
            with torch.no_grad():
                every = []
                for i in range(tasks + 1):  # the last is meant to be the merged adapter
                    features = network.backbone(images, adapter_id=i, train=False)["features"]
                    every.append(network.fc(features)["logits"][:, : self._total_classes])
                if tasks == 1:
                    outputs = every[0]
                else:
                    every = [(self.args["scale"] * logits).softmax(1) for logits in every]
                    entropy = torch.stack([-(p * (p + 1e-10).log()).sum(1) for p in every[:tasks]])
                    surest = torch.stack([every[i][row] for row, i in enumerate(entropy.argmin(0).tolist())])
                    outputs = surest + every[tasks]
            predicted.append(outputs.topk(self.topk, 1)[1].numpy())
            targets.append(labels.numpy())
        return np.concatenate(predicted), np.concatenate(targets)
