"""The course's own loop, in a process of its own like the others."""
import os
import tempfile
import threading
import time
from functools import partial
import numpy as np
import psutil
import torch
from course_ml.baselines import build_cnn
from course_ml.config import LAYERS, Recipe, parse_specs
from course_ml.data import Split
from course_ml.readers import read_dataset
from course_ml.speed import Choice, time_step
from course_ml.training import Batches, build_loader, predict, train_epoch
from course_ml.fitting import Training, fit
from course_ml.transfer import build_model
from course_ml.experiment import train_recipe
from protocol import serve, timed
from safetensors.torch import load_file

state = {}


def read(folder):
    "The images of the study and their parts."
    dataset = read_dataset(folder)
    return dataset, Split.from_split(dataset)


def empty_cache():
    "Begin with nothing decoded, probed, computed or trained."
    os.environ["COURSE_ML_HOME"] = tempfile.mkdtemp(dir=os.environ["COURSE_ML_HOME"])


def prepare(model, image_size, batch_size, folder, chosen, compile=False):
    "Build a network and its images; one step to warm up, and how long it took. `chosen`: how to compute training and inference."
    dataset, split = read(folder)
    recipe = Recipe(backbone=model, image_size=image_size, batch_size=batch_size, learning_rate=1e-4, precision=chosen["training"]["precision"], compile=compiled)
    network, images, classes = build_model(recipe, len(dataset.classes)), dataset.images(image_size), len(dataset.classes)
    state.update(training=Training(network, recipe, dataset.labels, classes, 1), loader=build_loader(Batches(images, dataset.labels, classes, recipe)), images=images,
                 labels=dataset.labels, ids=dataset.items.id.to_numpy(object), rows=split.rows("train"), chosen={kind: Choice(**choice) for kind, choice in chosen.items()})
    return {"seconds": batch_size / rates(1)["training"]}


def rates(steps):
    "Images a second of `train_epoch` and of `predict`."
    training, loader, batch_size = state["training"], state["loader"], state["training"].recipe.batch_size
    rows = np.resize(np.random.default_rng(0).permutation(state["rows"]), steps * batch_size)
    loader.sampler.items = training.plan(rows, state["labels"])
    with state["chosen"]["training"].applied(training.raw, autocast=False): learned = timed(partial(train_epoch, training, loader, state["ids"]), len(rows))
    with state["chosen"]["inference"].applied(training.raw): preds = timed(partial(predict, training.raw, state["images"], rows, batch_size), len(rows))
    return {"training": learned, "inference": preds}


def compare(model, image_size, batch_size, choices, training, seconds, repeats):
    "Images a second of one network computed in each of some ways in turn, on images that are in memory already."
    network, images = build_model(Recipe(backbone=model, image_size=image_size), 2).train(training), torch.rand(batch_size, 3, image_size, image_size)
    def rate(choice):
        with choice.applied(network):
            steps = max(1, round(seconds / time_step(network, images, training)))
            return timed(lambda: [time_step(network, images, training) for _ in range(steps)], steps * batch_size)
    choices = [Choice(**choice) for choice in choices]
    return [[rate(choice) for choice in choices] for _ in range(repeats)]


def fit_recipe(layers, recipe, start, folder, seed):
    "Train by a recipe from a given start; seconds and validation accuracy after each epoch. What is not part of an epoch (decoding, probing, saving) counts as if it all came first."
    empty_cache()
    dataset, split = read(folder)
    began, recipe = time.perf_counter(), Recipe(**recipe, seed=seed)
    model = build_cnn(parse_specs(layers, LAYERS, "layers"), recipe.image_size, len(dataset.classes))
    model.load_state_dict(load_file(start))
    history = fit(model, recipe, dataset, split).history
    rest = time.perf_counter() - began - history.seconds.sum()
    return {"epochs": [{"seconds": seconds, "accuracy": accuracy} for seconds, accuracy in zip(rest + history.seconds.cumsum(), history.validation_accuracy)], "rest": rest}


def frozen_head(model, image_size, batch_size, epochs, folder):
    "Seconds to train a new head on a frozen backbone whose features are computed once."
    empty_cache()
    dataset, split = read(folder)
    recipe = Recipe(backbone=model, freeze="backbone", head=("dense 512", "dropout 0.3", "dense 128"), image_size=image_size, learning_rate=5e-4, epochs=epochs, batch_size=batch_size)
    began = time.perf_counter()
    run = train_recipe(recipe, dataset, split)
    return {"seconds": time.perf_counter() - began, "head": float(run.history.seconds.sum()), "accuracy": float(run.history.validation_accuracy.iloc[0])}


def grow(file, batch_size, seconds=.02):
    "One epoch of the baseline CNN over a memory-mapped set: images a second, and the most memory the process had (bytes)."
    images, most, done = np.load(file, mmap_mode="r"), {"own": 0, "mapped": 0}, threading.Event()
    def callback():
        while not done.wait(seconds):
            memory = psutil.Process().memory_info()
            mapped = getattr(memory, "shared", 0)  # only Linux tells
            most.update(own=max(most["own"], memory.rss - mapped), mapped=max(most["mapped"], mapped))
    recipe, labels, rows = Recipe(image_size=images.shape[1], batch_size=batch_size), np.arange(len(images)) % 2, np.arange(len(images))
    training, loader = Training(build_model(recipe, 2), recipe, labels, 2, 1), build_loader(Batches(images, labels, 2, recipe))
    loader.sampler.items = training.plan(rows, labels)
    watcher = threading.Thread(target=callback)
    watcher.start()
    try: return {"images a second": timed(partial(train_epoch, training, loader, rows.astype(str).astype(object)), len(rows)), "memory": most}
    finally: done.set(); watcher.join()


if __name__ == "__main__": serve({"prepare": prepare, "rates": rates, "compare": compare, "fit_recipe": fit_recipe, "frozen_head": frozen_head, "grow": grow})
