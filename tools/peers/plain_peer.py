"""The loop of a tutorial: PyTorch with its default settings, images decoded one by one while the network waits."""

import itertools
import time
from functools import partial

import timm
import torch
from protocol import serve, timed
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

state = {}


def read(folder, split, image_size):
    "Return the images of a folder, decoded when they are needed."
    scale = transforms.Compose([transforms.Resize((image_size, image_size)), transforms.ToTensor()])
    return datasets.ImageFolder(f"{folder}/{split}", scale)


def prepare(model, image_size, batch_size, folder):
    "Build a network and its images; return how long one step takes."
    dataset = read(folder, "train", image_size)
    network = timm.create_model(model, num_classes=len(dataset.classes))
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    state.update(model=network, loader=loader, optimizer=torch.optim.Adam(network.parameters(), lr=1e-4))
    return {"seconds": batch_size / rates(1)["training"]}


def batches(steps):
    "Return some batches, epoch after epoch."
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(state["loader"])), steps)


def learn(network, optimizer, images, labels):
    "Do one step of training."
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(steps):
    "Do some steps of training."
    state["model"].train()
    for images, labels in batches(steps):
        learn(state["model"], state["optimizer"], images, labels)


@torch.no_grad()
def infer(steps):
    "Do some steps of inference."
    state["model"].eval()
    for images, _ in batches(steps):
        state["model"](images).argmax(1)


def rates(steps):
    "Return the images a second in training and in inference."
    images = steps * state["loader"].batch_size
    return {"training": timed(partial(train, steps), images), "inference": timed(partial(infer, steps), images)}


def build_head(features, classes):
    "Return the head of the cactus study."
    return nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Dropout(.3), nn.Linear(512, 128), nn.ReLU(),
                         nn.Linear(128, classes))


def frozen_epoch(model, image_size, batch_size, folder):
    "Train a new head on a frozen backbone that sees every image again, validation included; return the seconds."
    train, validation = (DataLoader(read(folder, split, image_size), batch_size, shuffle=split == "train")
                         for split in ("train", "validation"))
    backbone = timm.create_model(model, num_classes=0).eval().requires_grad_(False)
    head = build_head(backbone.num_features, len(train.dataset.classes))
    optimizer, began = torch.optim.Adam(head.parameters(), lr=5e-4), time.perf_counter()
    for images, labels in train:
        learn(head, optimizer, backbone(images), labels)
    with torch.no_grad():
        head.eval()
        correct = sum((head(backbone(images)).argmax(1) == labels).sum().item() for images, labels in validation)
    return {"seconds": time.perf_counter() - began, "accuracy": correct / len(validation.dataset)}


if __name__ == "__main__":
    serve({"prepare": prepare, "rates": rates, "frozen_epoch": frozen_epoch})
