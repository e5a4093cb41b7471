"""EASE: an adapter per task, prototypes in the subspace of every adapter, the missing ones made up by similarity."""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from models.base import BaseLearner
from torch.utils.data import DataLoader
from utils.inc_net import EaseNet

num_workers = 8


class Learner(BaseLearner):
    def __init__(self, args):
        super().__init__(args)
        self._network = EaseNet(args)
        self.init_cls, self.inc, self.moni_adam = args["init_cls"], args["increment"], args["moni_adam"]
        self.use_exemplars, self.use_init_ptm = args["use_old_data"], args["use_init_ptm"]
        self.use_diagonal, self.recalc_sim = args["use_diagonal"], args["recalc_sim"]

    def incremental_train(self, data_manager):
        self._cur_task += 1
        self._total_classes = self._known_classes + data_manager.get_task_size(self._cur_task)
        self._network.update_fc(self._total_classes)
        self.data_manager, new = data_manager, np.arange(self._known_classes, self._total_classes)
        self.train_loader = self._loader(new, "train", "train", True)
        self.test_loader = self._loader(np.arange(self._total_classes), "test", "test", False)
        self.test_dataset = self.test_loader.dataset
        self.train_loader_for_protonet = self._loader(new, "train", "test", True)
        self.train_dataset_for_protonet = self.train_loader_for_protonet.dataset
        learned = [p for p in self._network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, self.args["init_lr"], 0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args["init_epochs"])
        self._init_train(self.train_loader, self.test_loader, optimizer, scheduler)
        self.replace_fc(self.train_loader_for_protonet)

    def _init_train(self, train_loader, test_loader, optimizer, scheduler):
        epochs = self.args["init_epochs" if self._cur_task == 0 or self.init_cls == self.inc else "later_epochs"]
        for _ in range(epochs):
            self._network.train()
            losses, correct, total = 0.0, 0, 0
            for _, images, labels in train_loader:
                logits, labels = self._network(images)["logits"], labels - self._known_classes
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses, total = losses + loss.item(), total + len(labels)
                correct += (logits.argmax(1) == labels).sum()
            scheduler.step()
            shares = losses / len(train_loader), np.around(correct.cpu().numpy() * 100 / total, 2)
        logging.info(
            "Task {}, Epoch {}/{} => Loss {:.3f}, Train_accy {:.2f}".format(self._cur_task, epochs, epochs, *shares)
        )

    def _loader(self, classes, source, mode, shuffle):
        dataset = self.data_manager.get_dataset(classes, source=source, mode=mode)
        return DataLoader(dataset, self.args["batch_size"], shuffle, num_workers=num_workers)

    def after_task(self):
        self._known_classes = self._total_classes
        self._network.requires_grad_(False)
        self._network.backbone.add_adapter_to_list()

    def _blocks(self):
        """The classifier's weight [C, subspaces, D]."""
        weight = self._network.fc.weight.data
        return weight.view(len(weight), -1, self._network.out_dim)

    @torch.no_grad()
    def replace_fc(self, train_loader):
        vit, ptm = self._network.eval().backbone, int(self.use_init_ptm)
        for index in range(-ptm, self._cur_task + 1):
            if not self.use_diagonal or index in (-1, self._cur_task):
                self._set_means(index, train_loader)
        if self.use_exemplars and self._cur_task:
            self._set_means(self._cur_task, self._loader(np.arange(self._known_classes), "train", "test", True))
        if self.use_diagonal or self.use_exemplars:
            return
        self.solve_sim_reset() if self.recalc_sim else self.solve_similarity()
        assert vit is self._network.backbone

    def _set_means(self, index, loader):
        pairs = [(self._network.backbone.forward_proto(images, index), labels) for _, images, labels in loader]
        features, labels = (torch.cat(part) for part in zip(*pairs))
        for c in labels.unique():
            self._blocks()[c, index + int(self.use_init_ptm)] = features[labels == c].mean(0)

    def _range(self, task):
        return (self.init_cls + (task - 1) * self.inc if task else 0), self.init_cls + task * self.inc

    def _make_up(self, task, subspace, first):
        """Prototypes of `task` in a later subspace: those of classes from `first` on, by likeness in its own."""
        blocks, (start, stop), ptm = self._blocks(), self._range(task), int(self.use_init_ptm)
        old, new = blocks[start:stop, task + ptm], blocks[first : self._total_classes, task + ptm]
        similarity = F.cosine_similarity(old[:, None], new[None], dim=2).softmax(1)
        blocks[start:stop, subspace + ptm] = similarity @ blocks[first : self._total_classes, subspace + ptm]

    def solve_similarity(self):
        for task in range(self._cur_task):
            self._make_up(task, self._cur_task, self._known_classes)

    def solve_sim_reset(self):
        for task in range(self._cur_task):
            for subspace in range(task + 1, self._cur_task + 1):
                self._make_up(task, subspace, self._range(subspace)[0])

    def _eval_cnn(self, loader):
        self._network.eval()
        predicted, targets, own, given = [], [], 0, 0
        for _, images, labels in loader:
            with torch.no_grad():
                logits = self._network(images, test=True)["logits"]
            predicted.append(logits.topk(self.topk, 1)[1].numpy())
            targets.append(labels.numpy())
            for row, label in zip(logits, labels.tolist()):
                task = (label - self.init_cls) // self.inc + 1
                start, stop = self._range(task)
                inside = torch.zeros_like(row)
                inside[start:stop] = row[start:stop]
                own += (row.argmax() - self.init_cls).div(self.inc, rounding_mode="floor") + 1 == task
                given += inside.argmax() == label
        n = sum(map(len, targets))
        logging.info(f"Task correct: {own.long().numpy() * 100 / n}")
        logging.info(f"Task acc: {given.long().numpy() * 100 / n}")
        return np.concatenate(predicted), np.concatenate(targets)
