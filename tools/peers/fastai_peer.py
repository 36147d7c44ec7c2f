"""fastai, as its tutorials use it. Runs in .venv-peers: its companions cannot be installed beside nbdev's."""
import time
import timm
import torch
from fastai.vision.all import (Adam, Callback, CancelFitException, CrossEntropyLossFlat, Flip, ImageDataLoaders, Learner, Resize, accuracy,
                               resnet18, set_seed, vision_learner)
from protocol import serve
from safetensors.torch import load_file

state = {}


class Stopwatch(Callback):
    "Seconds and validation accuracy after each epoch; ends the training at the target."
    order = 60  # after fastai's Recorder
    def __init__(self, began, target, limit): self.began, self.target, self.limit, self.rows = began, target, limit, []

    def after_epoch(self):
        self.rows.append({"seconds": time.perf_counter() - self.began, "accuracy": float(self.learn.recorder.values[-1][-1])})
        if self.rows[-1]["accuracy"] >= self.target or self.rows[-1]["seconds"] > self.limit: raise CancelFitException


class Steps(Callback):
    "When each batch was done; ends the training after `steps` of them."
    def __init__(self, steps): self.steps, self.times = steps, []

    def after_batch(self):
        self.times.append(time.perf_counter())
        if self.training and len(self.times) == self.steps: raise CancelFitException

    def rate(self):
        "Images a second between the first batch and the last, so that starting the worker processes does not count."
        return (len(self.times) - 1) * state["loaders"].bs / (self.times[-1] - self.times[0])


def quiet(learner):
    "Without the printing and the progress bar, which a process without a screen has no use for."
    learner.logger = lambda values: None
    if hasattr(learner, "progress"): learner.remove_cb(learner.progress)
    return learner


def prepare(model, image_size, batch_size, folder):
    "Build a network and its images; one step to warm up."
    loaders = ImageDataLoaders.from_folder(folder, train="train", valid="validation", item_tfms=Resize(image_size), bs=batch_size, val_bs=batch_size)
    state.update(loaders=loaders, learner=quiet(Learner(loaders, timm.create_model(model, num_classes=loaders.c), loss_func=CrossEntropyLossFlat(), lr=1e-4)))
    return {"seconds": batch_size / rates(1)["training"]}


def rates(steps):
    "Images a second of `fit` and of `get_preds`."
    learner, loaders, training, inference = state["learner"], state["loaders"], Steps(steps + 1), Steps(steps + 1)
    learner.fit(1 + steps // len(loaders.train), cbs=training)
    files = loaders.train_ds.items
    learner.get_preds(dl=loaders.test_dl([files[i % len(files)] for i in range((steps + 1) * loaders.bs)]), cbs=inference)
    return {"training": training.rate(), "inference": inference.rate()}


def fit_same(layers, recipe, start, folder, image_size, seed, target, limit):
    "Train the model of the course from the same start with the same recipe, in fastai's hands."
    from course_ml.baselines import build_cnn
    from course_ml.config import LAYERS, parse_specs
    began = time.perf_counter()
    set_seed(seed)
    loaders = ImageDataLoaders.from_folder(folder, train="train", valid="validation", batch_tfms=[Flip()], bs=recipe["batch_size"])
    model = build_cnn(parse_specs(layers, LAYERS, "layers"), image_size, loaders.c)
    model.load_state_dict(load_file(start))
    learner = quiet(Learner(loaders, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=same_adam, wd_bn_bias=True))
    callback = Stopwatch(began, target, limit)
    learner.fit_one_cycle(recipe["epochs"], recipe["learning_rate"], pct_start=.3, wd=recipe["weight_decay"], moms=(.9, .9, .9), cbs=callback)
    return {"epochs": callback.rows}


def same_adam(parameters, **options): return Adam(parameters, sqr_mom=.999, eps=1e-8, **options)


def fit_default(folder, image_size, seed, target, limit, epochs=5):
    "`vision_learner` of a ResNet-18 with fastai's defaults, from a random start, as often as it takes."
    began = time.perf_counter()
    set_seed(seed)
    learner = quiet(vision_learner(ImageDataLoaders.from_folder(folder, train="train", valid="validation"), resnet18, pretrained=False, metrics=accuracy))
    callback = Stopwatch(began, target, limit)
    while not callback.rows or (callback.rows[-1]["accuracy"] < target and callback.rows[-1]["seconds"] < limit): learner.fit_one_cycle(epochs, cbs=callback)
    return {"epochs": callback.rows, "parameters": sum(p.numel() for p in learner.model.parameters())}


if __name__ == "__main__": serve({"prepare": prepare, "rates": rates, "fit_same": fit_same, "fit_default": fit_default})
