"""What PILOT's learners derive from."""

import numpy as np
import torch


class BaseLearner:
    def __init__(self, args):
        self.args, self._device, self._network = args, args["device"][0], None
        self._cur_task, self._known_classes, self._total_classes, self.topk = -1, 0, 0, 5

    def _eval_cnn(self, loader):
        self._network.eval()
        predicted, targets = [], []
        for _, images, labels in loader:
            with torch.no_grad():
                logits = self._network(images)["logits"]
            predicted.append(logits.topk(self.topk, 1)[1].numpy())
            targets.append(labels.numpy())
        return np.concatenate(predicted), np.concatenate(targets)
