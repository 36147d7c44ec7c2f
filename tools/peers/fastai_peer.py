"""fastai, as its tutorials use it. Runs in .venv-peers: it cannot be installed together with nbdev."""

import time

import timm
from fastai.vision.all import (
    Adam,
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    Flip,
    ImageDataLoaders,
    Learner,
    Resize,
    accuracy,
    resnet18,
    set_seed,
    vision_learner,
)
from protocol import serve
from safetensors.torch import load_file

state = {}


class Stopwatch(Callback):
    "Seconds and validation accuracy after each epoch; ends the training at the target."
    order = 60  # after fastai's Recorder

    def __init__(self, began, target, limit):
        self.began, self.target, self.limit, self.rows = began, target, limit, []

    def after_epoch(self):
        accuracy = float(self.learn.recorder.values[-1][-1])
        self.rows.append({"seconds": time.perf_counter() - self.began, "accuracy": accuracy})
        if accuracy >= self.target or self.rows[-1]["seconds"] > self.limit:
            raise CancelFitException


class Steps(Callback):
    "When each batch was done; ends the training after `steps` of them."
    def __init__(self, steps):
        self.steps, self.times = steps, []

    def after_batch(self):
        self.times.append(time.perf_counter())
        if self.training and len(self.times) == self.steps: raise CancelFitException

    def rate(self):
        "Return the images a second between the first batch and the last, so that starting does not count."
        return (len(self.times) - 1) * state["loaders"].bs / (self.times[-1] - self.times[0])


def quiet(learner):
    "Return a learner without printing and progress bar."
    learner.logger = lambda values: None
    learner.remove_cbs([callback for callback in learner.cbs if callback.name == "progress"])
    return learner


def read(folder, **options):
    "Return the images of a folder, as fastai reads them."
    return ImageDataLoaders.from_folder(folder, train="train", valid="validation", **options)


def prepare(model, image_size, batch_size, folder):
    "Build a network and its images; return how long one step takes."
    loaders = read(folder, item_tfms=Resize(image_size), bs=batch_size, val_bs=batch_size)
    network = timm.create_model(model, num_classes=loaders.c)
    learner = quiet(Learner(loaders, network, loss_func=CrossEntropyLossFlat(), lr=1e-4))
    state.update(loaders=loaders, learner=learner)
    return {"seconds": batch_size / rates(1)["training"]}


def rates(steps):
    "Return the images a second of `fit` and of `get_preds`."
    learner, loaders, training, inference = state["learner"], state["loaders"], Steps(steps + 1), Steps(steps + 1)
    learner.fit(1 + steps // len(loaders.train), cbs=training)
    files = loaders.train_ds.items
    shown = [files[i % len(files)] for i in range((steps + 1) * loaders.bs)]
    learner.get_preds(dl=loaders.test_dl(shown), cbs=inference)
    return {"training": training.rate(), "inference": inference.rate()}


def same_adam(parameters, **options): return Adam(parameters, sqr_mom=.999, eps=1e-8, **options)


def fit_same(network, recipe, start, folder, image_size, seed, target, limit):
    "Train the model of the course from the same start with the same recipe, in fastai's hands."
    from course_ml.baselines import CNNS, build_cnn
    began = time.perf_counter()
    set_seed(seed)
    loaders = read(folder, batch_tfms=[Flip()], bs=recipe["batch_size"])
    model = build_cnn(CNNS[network], image_size, loaders.c)
    model.load_state_dict(load_file(start))
    learner = quiet(Learner(loaders, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=same_adam,
                            wd_bn_bias=True))
    callback = Stopwatch(began, target, limit)
    learner.fit_one_cycle(recipe["epochs"], recipe["learning_rate"], pct_start=.3, wd=recipe["weight_decay"],
                          moms=(.9, .9, .9), cbs=callback)
    return {"epochs": callback.rows}


def fit_default(folder, image_size, seed, target, limit, epochs=5):
    "Train `vision_learner` of a ResNet-18 with fastai's defaults, from a random start, as often as it takes."
    began = time.perf_counter()
    set_seed(seed)
    learner = quiet(vision_learner(read(folder), resnet18, pretrained=False, metrics=accuracy))
    callback = Stopwatch(began, target, limit)
    while not callback.rows or (callback.rows[-1]["accuracy"] < target and callback.rows[-1]["seconds"] < limit):
        learner.fit_one_cycle(epochs, cbs=callback)
    return {"epochs": callback.rows, "parameters": sum(weights.numel() for weights in learner.model.parameters())}


if __name__ == "__main__":
    serve({"prepare": prepare, "rates": rates, "fit_same": fit_same, "fit_default": fit_default})
