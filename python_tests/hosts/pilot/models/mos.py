"""MOS: an adapter per task; a sample finds its own by looking, at most four times, where the last one sends it."""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from models.base import BaseLearner
from torch.utils.data import DataLoader
from utils.inc_net import MOSNet

num_workers = 8


class Learner(BaseLearner):
    def __init__(self, args):
        super().__init__(args)
        self._network, self.ensemble, self.cls2task = MOSNet(args, True), args["ensemble"], {}

    def incremental_train(self, data_manager):
        self._cur_task += 1
        self._total_classes = self._known_classes + data_manager.get_task_size(self._cur_task)
        new = np.arange(self._known_classes, self._total_classes)
        self.cls2task.update(dict.fromkeys(new.tolist(), self._cur_task))
        self._network.update_fc(self._total_classes)

        def loader(classes, source, mode, shuffle):
            dataset = data_manager.get_dataset(classes, source=source, mode=mode)
            return DataLoader(dataset, self.args["batch_size"], shuffle, num_workers=num_workers)

        self.test_loader = loader(np.arange(self._total_classes), "test", "test", False)
        self._train(loader(new, "train", "train", True))
        self._replace_fc(loader(new, "train", "test", True))

    def _train(self, loader):
        vit = self._network.backbone.train()
        optimizer = torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], self.args["init_lr"], 0.9)
        for _, images, labels in loader:
            logits = self._network(images, adapter_id=self._cur_task, train=True)["logits"][:, : self._total_classes]
            logits[:, : self._known_classes] = -torch.inf
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            vit.adapter_merge()
        vit.adapter_update()

    @torch.no_grad()
    def _replace_fc(self, loader):
        self._network.eval()
        pairs = [(self._network.forward_orig(images)["features"], labels) for _, images, labels in loader]
        features, labels = (torch.cat(part) for part in zip(*pairs))
        for c in labels.unique():
            self._network.fc.weight.data[c] = features[labels == c].mean(0)

    def after_task(self):
        self._known_classes = self._total_classes

    def _eval_cnn(self, loader):
        vit, tasks = self._network.eval().backbone, range(self._cur_task + 1)
        predicted, targets, right = [], [], []
        for _, images, labels in loader:
            with torch.no_grad():
                first = self._network.forward_orig(images)["logits"][:, : self._total_classes]
                features = [vit(images, adapter_id=task, train=False)["features"] for task in tasks]
                last = []
                for row, guess in enumerate(first.argmax(1).tolist()):
                    task, looks, settled = self.cls2task[guess], 0, False
                    while looks < 4 and not settled:
                        logits = vit(features[task][row : row + 1], fc_only=True)["logits"][:, : self._total_classes]
                        before, task, looks = task, self.cls2task[int(logits.argmax())], looks + 1
                        settled = task == before
                    last.append(logits)
                outputs = torch.cat(last)
                if self.ensemble:
                    outputs = outputs.softmax(1) + (first * (self._cur_task + 1)).softmax(1)
            predicted.append(outputs.topk(self.topk, 1)[1].numpy())
            targets.append(labels.numpy())
            right.append((first.argmax(1) == labels).numpy())
        percent = np.concatenate(right).mean() * 100
        logging.info(f"the accuracy of the original model:{np.around(percent, 2)}")
        return np.concatenate(predicted), np.concatenate(targets)
