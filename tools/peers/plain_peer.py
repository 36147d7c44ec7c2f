"""The loop of a tutorial: PyTorch with its default settings, images decoded one by one while the network waits."""
import itertools
import time
from functools import partial
import timm
import torch
from protocol import serve, timed
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

state = {}


def prepare(model, image_size, batch_size, folder):
    "Build a network and its images; one step to warm up."
    dataset = datasets.ImageFolder(f"{folder}/train", transforms.Compose([transforms.Resize((image_size, image_size)), transforms.ToTensor()]))
    network = timm.create_model(model, num_classes=len(dataset.classes))
    state.update(model=network, loader=DataLoader(dataset, batch_size, shuffle=True, drop_last=True), optimizer=torch.optim.Adam(network.parameters(), lr=1e-4))
    return {"seconds": batch_size / rates(1)["training"]}


def batches(steps):
    "Some batches, epoch after epoch."
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(state["loader"])), steps)


def train(steps):
    "Some steps of training."
    state["model"].train()
    for images, labels in batches(steps):
        state["optimizer"].zero_grad()
        loss = torch.nn.functional.cross_entropy(state["model"](images), labels)
        loss.backward()
        state["optimizer"].step()
        loss.item()


@torch.no_grad()
def infer(steps):
    "Some steps of inference."
    state["model"].eval()
    for images, _ in batches(steps): state["model"](images).argmax(1)


def rates(steps):
    "Images a second in training and in inference."
    images = steps * state["loader"].batch_size
    return {"training": timed(partial(train, steps), images), "inference": timed(partial(infer, steps), images)}


def frozen_epoch(model, image_size, batch_size, folder):
    "Seconds of one epoch of a new head on a frozen backbone that sees every image again, validation included."
    scale = transforms.Compose([transforms.Resize((image_size, image_size)), transforms.ToTensor()])
    train, validation = (DataLoader(datasets.ImageFolder(f"{folder}/{part}", scale), batch_size, shuffle=part == "train") for part in ("train", "validation"))
    backbone = timm.create_model(model, num_classes=0).eval().requires_grad_(False)
    head = torch.nn.Sequential(torch.nn.Linear(backbone.num_features, 512), torch.nn.ReLU(), torch.nn.Dropout(.3), torch.nn.Linear(512, 128), torch.nn.ReLU(),
                               torch.nn.Linear(128, len(train.dataset.classes)))
    optimizer, began = torch.optim.Adam(head.parameters(), lr=5e-4), time.perf_counter()
    for images, labels in train:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(backbone(images)), labels).backward()
        optimizer.step()
    with torch.no_grad(): right = sum((head.eval()(backbone(images)).argmax(1) == labels).sum().item() for images, labels in validation)
    return {"seconds": time.perf_counter() - began, "accuracy": right / len(validation.dataset)}


if __name__ == "__main__": serve({"prepare": prepare, "rates": rates, "frozen_epoch": frozen_epoch})
