"""The course's own loop, in a process of its own like the others."""

import os
import tempfile
import threading
import time
from functools import partial

import numpy as np
import psutil
import torch
from protocol import serve, timed
from safetensors.torch import load_file

from course_ml.baselines import CNNS, HEADS, build_cnn
from course_ml.config import HeadOnly, Recipe
from course_ml.data import Split
from course_ml.experiment import train_recipe
from course_ml.fitting import Training, build_loader, fit
from course_ml.readers import read_dataset
from course_ml.speed import Choice, time_step
from course_ml.training import Batches, predict
from course_ml.transfer import build_model

state = {}


def read(folder):
    "Return the images of the study and their split."
    dataset = read_dataset(folder)
    return dataset, Split.from_split(dataset)


def empty_cache():
    "Begin with nothing decoded, probed, computed or trained."
    os.environ["COURSE_ML_HOME"] = tempfile.mkdtemp(dir=os.environ["COURSE_ML_HOME"])


def start_training(recipe, images, labels, rows, ids):
    "Return a training of a new network, and the loader of its batches."
    classes = int(labels.max()) + 1
    batches = -(-len(rows) // recipe.batch_size)
    training = Training(build_model(recipe, classes), recipe, labels[rows], classes, batches, ids)
    return training, build_loader(Batches(images, labels, classes))


def one_epoch(training, loader, rows):
    "Learn from some images once."
    loader.sampler.items = training.begin_epoch(rows, loader.dataset.labels.numpy())
    training.train_epoch(loader)


def prepare(model, image_size, batch_size, folder, chosen, compile=False):
    "Build a network and its images; return how long one step takes. `chosen`: how to compute training and inference."
    dataset, split = read(folder)
    recipe = Recipe(backbone=model, image_size=image_size, batch_size=batch_size, learning_rate=1e-4,
                    precision=chosen["training"]["precision"], compile=compile)
    images, rows, ids = dataset.images(image_size), split.rows("train"), dataset.items.id.to_numpy(object)
    training, loader = start_training(recipe, images, dataset.labels, rows, ids)
    choices = {kind: Choice(**choice) for kind, choice in chosen.items()}
    state.update(training=training, loader=loader, images=images, rows=rows, chosen=choices)
    return {"seconds": batch_size / rates(1)["training"]}


def rates(steps):
    "Return the images a second of an epoch of so many steps, and of `predict`."
    training, batch_size = state["training"], state["training"].recipe.batch_size
    rows = np.resize(np.random.default_rng(0).permutation(state["rows"]), steps * batch_size)
    with state["chosen"]["training"].applied(training.raw, autocast=False):
        learned = timed(partial(one_epoch, training, state["loader"], rows), len(rows))
    with state["chosen"]["inference"].applied(training.raw):
        predicted = timed(partial(predict, training.raw, state["images"], rows, batch_size), len(rows))
    return {"training": learned, "inference": predicted}


def compare(model, image_size, batch_size, choices, training, seconds, repeats):
    "Return the images a second of one network computed in each of some ways in turn, on images in memory."
    network = build_model(Recipe(backbone=model, image_size=image_size), 2).train(training)
    images, choices = torch.rand(batch_size, 3, image_size, image_size), [Choice(**choice) for choice in choices]

    def rate(choice):
        with choice.applied(network):
            steps = max(1, round(seconds / time_step(network, images, training)))
            return timed(lambda: [time_step(network, images, training) for _ in range(steps)], steps * batch_size)

    return [[rate(choice) for choice in choices] for _ in range(repeats)]


def fit_recipe(network, recipe, start, folder, seed):
    """Train one of the CNNs by a recipe (YAML) from a given start; return seconds and accuracy after each epoch.
    What is not part of an epoch (decoding, probing, saving) counts as if it all came first."""
    empty_cache()
    dataset, split = read(folder)
    began, recipe = time.perf_counter(), Recipe.from_yaml(recipe).replace(seed=seed)
    model = build_cnn(CNNS[network], recipe.image_size, len(dataset.classes))
    model.load_state_dict(load_file(start))
    history = fit(model, recipe, dataset, split).history
    rest = time.perf_counter() - began - history.seconds.sum()
    rows = zip(rest + history.seconds.cumsum(), history.validation_accuracy)
    return {"epochs": [{"seconds": seconds, "accuracy": accuracy} for seconds, accuracy in rows], "rest": rest}


def frozen_head(model, image_size, batch_size, epochs, folder):
    "Train a new head on a frozen backbone whose features are computed once; return the seconds."
    empty_cache()
    dataset, split = read(folder)
    recipe = Recipe(backbone=model, freeze=HeadOnly(), head=HEADS["cactus"], image_size=image_size,
                    learning_rate=5e-4, epochs=epochs, batch_size=batch_size)
    began = time.perf_counter()
    run = train_recipe(recipe, dataset, split)
    return {"seconds": time.perf_counter() - began, "head": float(run.history.seconds.sum()),
            "accuracy": float(run.history.validation_accuracy.iloc[0])}


class Memory:
    "Within the block, the most memory that this process had (bytes): its own, and files mapped into it."
    def __init__(self, seconds=.02):
        self.most, self.seconds, self.done = {"own": 0, "mapped": 0}, seconds, threading.Event()

    def measure(self):
        while not self.done.wait(self.seconds):
            memory = psutil.Process().memory_info()
            mapped = getattr(memory, "shared", 0)  # only Linux tells
            self.most["own"] = max(self.most["own"], memory.rss - mapped)
            self.most["mapped"] = max(self.most["mapped"], mapped)

    def __enter__(self):
        self.thread = threading.Thread(target=self.measure)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def grow(file, batch_size):
    "Train the baseline CNN for one epoch over a memory-mapped set; return images a second and memory (bytes)."
    images = np.load(file, mmap_mode="r")
    rows, recipe = np.arange(len(images)), Recipe(image_size=images.shape[1], batch_size=batch_size)
    training, loader = start_training(recipe, images, rows % 2, rows, rows.astype(str).astype(object))
    with Memory() as memory: rate = timed(partial(one_epoch, training, loader, rows), len(rows))
    return {"images a second": rate, "memory": memory.most}


if __name__ == "__main__":
    serve({"prepare": prepare, "rates": rates, "compare": compare, "fit_recipe": fit_recipe,
           "frozen_head": frozen_head, "grow": grow})
