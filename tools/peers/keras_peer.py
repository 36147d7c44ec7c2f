"""Keras `fit` on TensorFlow, as the tutorials of Keras use it."""

import time

from protocol import serve
from safetensors.torch import load_file

from course_ml.baselines import CNNS, build_cnn, build_keras_cnn, load_keras, to_keras

keras = load_keras()
import tensorflow as tf
from keras import layers

APPLICATIONS = {"resnet50": "ResNet50", "mobilenetv2_100": "MobileNetV2", "efficientnet_b0": "EfficientNetB0"}
state = {}


class Stopwatch(keras.callbacks.Callback):
    "Seconds and validation accuracy after each epoch; ends the training at the target."
    def __init__(self, began, target, limit):
        super().__init__()
        self.began, self.target, self.limit, self.rows = began, target, limit, []

    def on_epoch_end(self, epoch, logs):
        row = {"seconds": time.perf_counter() - self.began, "accuracy": float(logs["val_accuracy"])}
        self.rows.append(row)
        self.model.stop_training = row["accuracy"] >= self.target or row["seconds"] > self.limit


def read(folder, split, image_size, batch_size, **options):
    "Return the images of a folder, as Keras reads them."
    return keras.utils.image_dataset_from_directory(
        f"{folder}/{split}", image_size=(image_size, image_size), batch_size=batch_size, verbose=False, **options)


def prepare(model, image_size, batch_size, folder):
    "Build a network and its images; return how long one step takes."
    keras.backend.clear_session()
    data = read(folder, "train", image_size, batch_size)
    build, shape = getattr(keras.applications, APPLICATIONS[model]), (image_size, image_size, 3)
    network = build(weights=None, input_shape=shape, classes=len(data.class_names))
    network.compile(optimizer=keras.optimizers.Adam(1e-4), loss="sparse_categorical_crossentropy")
    state.update(model=network, data=data.repeat().prefetch(tf.data.AUTOTUNE), batch_size=batch_size)
    rates(1)
    return {"seconds": batch_size / rates(1)["training"]}


class Steps(keras.callbacks.Callback):
    "When each batch was done."
    def __init__(self):
        super().__init__()
        self.times = []

    def on_train_batch_end(self, batch, logs): self.times.append(time.perf_counter())
    def on_predict_batch_end(self, batch, logs): self.times.append(time.perf_counter())

    def rate(self):
        "Return the images a second between the first batch and the last, so that starting does not count."
        return (len(self.times) - 1) * state["batch_size"] / (self.times[-1] - self.times[0])


def rates(steps):
    "Return the images a second of `fit` and of `predict`."
    training, inference = Steps(), Steps()
    state["model"].fit(state["data"], steps_per_epoch=steps + 1, verbose=0, callbacks=[training])
    state["model"].predict(state["data"], steps=steps + 1, verbose=0, callbacks=[inference])
    return {"training": training.rate(), "inference": inference.rate()}


class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    "The learning rate climbs for three tenths of the steps and falls for the rest, each half a wave of a cosine."
    def __init__(self, highest, steps):
        self.highest, self.steps = highest, float(steps)

    def __call__(self, step):
        step, top, low = tf.cast(step, tf.float32), .3 * self.steps, self.highest / 25
        climbing = low + (self.highest - low) * .5 * (1 - tf.cos(3.14159265 * step / top))
        falling = self.highest * .5 * (1 + tf.cos(3.14159265 * tf.minimum(1.0, (step - top) / (self.steps - top))))
        return tf.where(step < top, climbing, falling)


def start_model(network, start, image_size, classes):
    "Return the Keras model of one of the CNNs, with the weights of its counterpart in torch."
    source = build_cnn(CNNS[network], image_size, classes)
    source.load_state_dict(load_file(start))
    model = build_keras_cnn(CNNS[network], image_size, classes)
    to_keras(source, model)
    return model


def fit_same(network, recipe, start, folder, image_size, seed, target, limit):
    "Train the model of the course from the same start with the same recipe, in Keras's hands."
    began = time.perf_counter()
    keras.utils.set_random_seed(seed)
    train, validation = (read(folder, split, image_size, recipe["batch_size"], label_mode="int")
                         for split in ("train", "validation"))
    flip, steps = keras.layers.RandomFlip("horizontal"), recipe["epochs"] * len(train)
    model = start_model(network, start, image_size, len(train.class_names))
    train = train.map(lambda images, labels: (flip(images, training=True) / 255, labels),
                      num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    validation = validation.map(lambda images, labels: (images / 255, labels)).prefetch(tf.data.AUTOTUNE)
    schedule = OneCycle(recipe["learning_rate"], steps)
    model.compile(optimizer=keras.optimizers.AdamW(schedule, weight_decay=recipe["weight_decay"], epsilon=1e-8),
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    callback = Stopwatch(began, target, limit)
    model.fit(train, validation_data=validation, epochs=recipe["epochs"], verbose=0, callbacks=[callback])
    return {"epochs": callback.rows}


def convolution(x, kind, size, **options):
    "Add a convolution and batch normalization."
    return layers.BatchNormalization()(kind(size, padding="same", **options)(x))


def small_xception(image_size):
    "The network of https://keras.io/examples/vision/image_classification_from_scratch/ for two classes."
    inputs = keras.Input((image_size, image_size, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Activation("relu")(convolution(x, layers.Conv2D, 128, kernel_size=3, strides=2))
    before = x
    for size in (256, 512, 728):
        for _ in range(2):
            x = convolution(layers.Activation("relu")(x), layers.SeparableConv2D, size, kernel_size=3)
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
        before = x = layers.add([x, layers.Conv2D(size, 1, strides=2, padding="same")(before)])
    x = layers.Activation("relu")(convolution(x, layers.SeparableConv2D, 1024, kernel_size=3))
    x = layers.Dropout(.25)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(1)(x))


def fit_default(folder, image_size, seed, target, limit, epochs=25):
    "Train the example of Keras, with its network and settings, at the images' own size."
    began = time.perf_counter()
    keras.utils.set_random_seed(seed)
    train, validation = (read(folder, split, image_size, 128) for split in ("train", "validation"))
    changes = [layers.RandomFlip("horizontal"), layers.RandomRotation(.1)]

    def augment(images, labels):
        for change in changes: images = change(images, training=True)
        return images, labels

    train = train.map(augment, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    model, accuracy = small_xception(image_size), keras.metrics.BinaryAccuracy(name="accuracy", threshold=0)
    model.compile(optimizer=keras.optimizers.Adam(3e-4), loss=keras.losses.BinaryCrossentropy(from_logits=True),
                  metrics=[accuracy])
    callback = Stopwatch(began, target, limit)
    model.fit(train, validation_data=validation.prefetch(tf.data.AUTOTUNE), epochs=epochs, verbose=0,
              callbacks=[callback])
    return {"epochs": callback.rows, "parameters": model.count_params()}


if __name__ == "__main__":
    serve({"prepare": prepare, "rates": rates, "fit_same": fit_same, "fit_default": fit_default})
