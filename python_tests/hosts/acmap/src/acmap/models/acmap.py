"""ACMap: adapters that are merged into one, and prototypes mapped to where the merged one puts them."""

import numpy as np
import torch
import torch.nn.functional as F
from acmap.utils.inc_net import ACMapNet
from torch.utils.data import DataLoader

TOP_K = 5


class Learner:
    def __init__(self, context):
        self.c, self.config, self.network = context, context.config, ACMapNet(context)

    def incremental_train(self, data_manager):
        self.network.update_proxy_fc()
        self.network.backbone.setup_adapter()
        new = np.arange(self.c.known_classes, self.c.total_classes)

        def loader(classes, source, mode, shuffle):
            dataset = data_manager.get_dataset(classes, source=source, mode=mode)
            return DataLoader(dataset, batch_size=self.config.exp.batch_size, shuffle=shuffle)

        self.test_loader = loader(np.arange(self.c.total_classes), "test", "test", False)
        self.train_loader_for_protonet = loader(new, "train", "test", True)
        self.train_dataset_for_protonet = self.train_loader_for_protonet.dataset
        self._train(loader(new, "train", "train", True))
        self.network.merge_adapters()
        self.network.update_fc()
        self.network.replace_fc(self.train_dataset_for_protonet, self.train_loader_for_protonet)

    def _train(self, loader):
        asks = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(asks, self.config.exp.init_lr, 0.9)
        for _ in range(self.config.exp.init_epochs):
            self.network.train()
            for _, images, labels in loader:
                loss = F.cross_entropy(self.network(images)["logits"], labels - self.c.known_classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def after_task(self):
        self.network.requires_grad_(False)
        if self.c.is_first_task:
            self.network.backbone.init_adapter = self.network.backbone.cur_adapter
        self.c.next_task()

    def _eval_cnn(self, loader):
        self.network.eval()
        predicted, targets = [], []
        for _, images, labels in loader:
            with torch.no_grad():
                logits = self.network(images, test=True)["logits"]
            predicted.append(logits.topk(TOP_K, 1)[1].numpy())
            targets.append(labels.numpy())
        return np.concatenate(predicted), np.concatenate(targets)
