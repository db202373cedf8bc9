"""The main job in Keras 3 on JAX, to measure ours against: `keras.distillation.Distiller`, all
labels, 5 epochs for the teacher and 10 for each student, constant rate, teacher inside the step.

    python tests/benchmarks/keras_loop.py DATA_DIR

It takes nothing from the examples.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
from idx import parser, read
from keras import layers


def block(channels, padding):
    conv = layers.Conv2D(channels, 3, padding=padding)
    return conv, layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(2)


def make_teacher():
    dense = [x for n in (512, 256) for x in (layers.Dense(n, "relu"), layers.Dropout(0.5))]
    blocks = *block(64, "same"), *block(128, "same"), *block(128, "same")
    return keras.Sequential(
        [keras.Input((28, 28, 1)), *blocks, layers.Flatten(), *dense, layers.Dense(10)]
    )


def make_student():
    dense = layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(10)
    blocks = *block(16, "valid"), *block(32, "valid")
    return keras.Sequential([keras.Input((28, 28, 1)), *blocks, *dense])


def distiller(teacher, student):
    return keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation(temperature=3.0)
    )


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def cases(folder):
    """What compare.py times: functions that take a number of steps, by name. `fit` keeps its state
    in JAX from step to step, so a number of steps is one call of it."""
    image, label = read(folder, "train")
    keras.utils.set_random_seed(0)
    teacher, student, guided = compiled(make_teacher()), compiled(make_student()), make_student()
    other = make_teacher()
    guided = compiled(distiller(other, guided))

    def fit(model):
        return lambda count: model.fit(
            image[: 128 * count], label[: 128 * count], batch_size=128, verbose=0
        )

    return {
        "student step": fit(student),
        "teacher step": fit(teacher),
        "teacher inference": lambda count: other.predict(
            image[: 128 * count], batch_size=128, verbose=0
        ),
        "distillation step": fit(guided),
    }


def main(folder):
    train_set, test_set = read(folder, "train"), read(folder, "t10k")

    def train(name, model, epochs):
        history = compiled(model).fit(
            *train_set, batch_size=128, epochs=epochs, validation_data=test_set, verbose=0
        )
        print(name)
        for epoch, accuracy in enumerate(history.history["val_accuracy"], 1):
            print(f"epoch {epoch}: {accuracy:.4f}", flush=True)

    keras.utils.set_random_seed(42)
    teacher, student, baseline = make_teacher(), make_student(), make_student()
    baseline.set_weights(student.get_weights())
    train("teacher", teacher, 5)
    train("distilled", distiller(teacher, student), 10)
    train("baseline", baseline, 10)


if __name__ == "__main__":
    main(parser(__doc__).parse_args().data_dir)
