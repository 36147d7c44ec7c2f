"""Keras `fit` on TensorFlow, as the tutorials of Keras use it."""
import time
from course_ml.baselines import build_cnn, build_keras_cnn, load_keras, to_keras
from course_ml.config import LAYERS, parse_specs
from protocol import serve
from safetensors.torch import load_file
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
        self.rows.append({"seconds": time.perf_counter() - self.began, "accuracy": float(logs["val_accuracy"])})
        if self.rows[-1]["accuracy"] >= self.target or self.rows[-1]["seconds"] > self.limit: self.model.stop_training = True


def images_of(folder, part, image_size, batch_size, **options):
    "The images of a folder, as Keras reads them."
    return keras.utils.image_dataset_from_directory(f"{folder}/{part}", image_size=(image_size, image_size), batch_size=batch_size, verbose=False, **options)


def prepare(model, image_size, batch_size, folder):
    "Build a network and its images; one step to warm up."
    keras.backend.clear_session()
    data = images_of(folder, "train", image_size, batch_size)
    network = getattr(keras.applications, APPLICATIONS[model])(weights=None, input_shape=(image_size, image_size, 3), classes=len(data.class_names))
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
        "Images a second between the first batch and the last, so that starting does not count."
        return (len(self.times) - 1) * state["batch_size"] / (self.times[-1] - self.times[0])


def rates(steps):
    "Images a second of `fit` and of `predict`."
    training, inference = Steps(), Steps()
    state["model"].fit(state["data"], steps_per_epoch=steps + 1, verbose=0, callbacks=[training])
    state["model"].predict(state["data"], steps=steps + 1, verbose=0, callbacks=[inference])
    return {"training": training.rate(), "inference": inference.rate()}


class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    "The learning rate climbs for three tenths of the steps and falls for the rest, each half a wave of a cosine."
    def __init__(self, highest, steps): self.highest, self.steps = highest, float(steps)

    def __call__(self, step):
        step, top = tf.cast(step, tf.float32), .3 * self.steps
        climbing = self.highest / 25 + (self.highest - self.highest / 25) * .5 * (1 - tf.cos(3.14159265 * step / top))
        falling = self.highest * .5 * (1 + tf.cos(3.14159265 * tf.minimum(1.0, (step - top) / (self.steps - top))))
        return tf.where(step < top, climbing, falling)


def fit_same(layers, recipe, start, folder, image_size, seed, target, limit):
    "Train the model of the course from the same start with the same recipe, in Keras's hands."
    began = time.perf_counter()
    keras.utils.set_random_seed(seed)
    train, validation = (images_of(folder, part, image_size, recipe["batch_size"], label_mode="int") for part in ("train", "validation"))
    flip, classes = keras.layers.RandomFlip("horizontal"), len(train.class_names)
    layers = parse_specs(layers, LAYERS, "layers")
    twin, model = build_cnn(layers, image_size, classes), build_keras_cnn(layers, image_size, classes)
    twin.load_state_dict(load_file(start))
    to_keras(twin, model)
    steps = recipe["epochs"] * len(train)
    train = train.map(lambda images, labels: (flip(images, training=True) / 255, labels), num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    validation = validation.map(lambda images, labels: (images / 255, labels)).prefetch(tf.data.AUTOTUNE)
    model.compile(optimizer=keras.optimizers.AdamW(OneCycle(recipe["learning_rate"], steps), weight_decay=recipe["weight_decay"], epsilon=1e-8),
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    callback = Stopwatch(began, target, limit)
    model.fit(train, validation_data=validation, epochs=recipe["epochs"], verbose=0, callbacks=[callback])
    return {"epochs": callback.rows}


def small_xception(image_size):
    "The network of https://keras.io/examples/vision/image_classification_from_scratch/ for two classes."
    inputs = keras.Input((image_size, image_size, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Conv2D(128, 3, strides=2, padding="same")(x)
    before = x = layers.Activation("relu")(layers.BatchNormalization()(x))
    for size in (256, 512, 728):
        for _ in range(2): x = layers.BatchNormalization()(layers.SeparableConv2D(size, 3, padding="same")(layers.Activation("relu")(x)))
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
        before = x = layers.add([x, layers.Conv2D(size, 1, strides=2, padding="same")(before)])
    x = layers.Activation("relu")(layers.BatchNormalization()(layers.SeparableConv2D(1024, 3, padding="same")(x)))
    x = layers.Dropout(.25)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(1)(x))


def fit_default(folder, image_size, seed, target, limit, epochs=25):
    "The example of Keras, with its network and settings, at the images' own size."
    began = time.perf_counter()
    keras.utils.set_random_seed(seed)
    train, validation = (images_of(folder, part, image_size, 128) for part in ("train", "validation"))
    changes = [layers.RandomFlip("horizontal"), layers.RandomRotation(.1)]
    def augment(images, labels):
        for change in changes: images = change(images, training=True)
        return images, labels
    train = train.map(augment, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    model = small_xception(image_size)
    model.compile(optimizer=keras.optimizers.Adam(3e-4), loss=keras.losses.BinaryCrossentropy(from_logits=True), metrics=[keras.metrics.BinaryAccuracy(name="accuracy", threshold=0)])
    callback = Stopwatch(began, target, limit)
    model.fit(train, validation_data=validation.prefetch(tf.data.AUTOTUNE), epochs=epochs, verbose=0, callbacks=[callback])
    return {"epochs": callback.rows, "parameters": model.count_params()}


if __name__ == "__main__": serve({"prepare": prepare, "rates": rates, "fit_same": fit_same, "fit_default": fit_default})
