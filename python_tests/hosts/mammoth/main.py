"""Mammoth's main.py in short: `--model` from the registry learns five tasks of two classes, blobs in 8 x 8 pixels."""

import sys
from argparse import ArgumentParser
from types import SimpleNamespace

import torch
from models import REGISTERED_MODELS
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Blobs(Dataset):
    def __init__(self, centres, classes, n, transform):
        self.labels = [c for c in classes for _ in range(n)]
        self.images = centres[self.labels] + torch.randn(len(self.labels), 1, 8, 8)
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i], self.images[i]


class Backbone(nn.Module):
    feature_dim = 32

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 32)

    def forward(self, x, returnt="out"):
        assert returnt == "features"
        return self.fc2(torch.relu(self.norm(self.fc1(x.flatten(1)))))


def main():
    name = sys.argv[sys.argv.index("--model") + 1]
    host = REGISTERED_MODELS[name]["class"]
    parser = ArgumentParser()
    for option, kind in (("model", str), ("lr", float), ("n_epochs", int), ("batch_size", int), ("optimizer", str),
                         ("optim_wd", float)):  # fmt: skip
        parser.add_argument(f"--{option}", type=kind)
    args = host.get_parser(parser).parse_args()
    args.num_classes = 10
    torch.manual_seed(0)
    centres = torch.randn(10, 1, 8, 8)
    data = SimpleNamespace(test_loaders=[])
    model = host(Backbone(), nn.CrossEntropyLoss(), args, None, dataset=data)
    statistics = model.net.backbone.backbone.norm.running_mean.clone()
    for task in range(5):
        model.n_past_classes, model.n_seen_classes = 2 * task, 2 * task + 2
        images = Blobs(centres, range(2 * task, 2 * task + 2), 30, lambda image: image + 0.1 * torch.randn(1, 8, 8))
        data.train_loader = DataLoader(images, args.batch_size, shuffle=True)
        own = Blobs(centres, range(2 * task, 2 * task + 2), 8, lambda image: image)
        data.test_loaders.append(DataLoader(own, args.batch_size))
        model.begin_task(data)
        for epoch in range(args.n_epochs):
            model.net.train()
            for noisy, labels, clean in data.train_loader:
                model.observe(noisy, labels, clean, epoch=epoch)
        model.end_task(data)
        model.net.eval()
        test = Blobs(centres, range(2 * task + 2), 8, lambda image: image)
        right = sum(int(model(image[None]).argmax() == label) for image, label, _ in test)
        print(f"Accuracy for {task + 1} task(s): [Class-IL]: {100 * right / len(test):.2f}%")
    assert torch.equal(model.net.backbone.backbone.norm.running_mean, statistics)
    for c in images.labels:  # prototypes are of images as the tests have them
        clean = images.images[torch.tensor(images.labels) == c]
        torch.testing.assert_close(model.net.bank.prototypes[c], model.net.backbone(clean).mean(0))
