"""The main job as it is commonly written, to measure ours against: all labels, 5 epochs for the
teacher and 10 for each student, constant rate, teacher inside the step, `nnx.max_pool`, one device.

    python tests/benchmarks/plain_loop.py DATA_DIR

It takes nothing from the examples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from idx import parser, read


class Teacher(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 64, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(64, rngs=rngs)
        self.conv2 = nnx.Conv(64, 128, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(128, rngs=rngs)
        self.conv3 = nnx.Conv(128, 128, (3, 3), rngs=rngs)
        self.bn3 = nnx.BatchNorm(128, rngs=rngs)
        self.dense1 = nnx.Linear(1152, 512, rngs=rngs)
        self.dense2 = nnx.Linear(512, 256, rngs=rngs)
        self.dense3 = nnx.Linear(256, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nnx.max_pool(nnx.relu(bn(conv(x))), (2, 2), strides=(2, 2))
        x = self.dropout(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))
        return self.dense3(self.dropout(nnx.relu(self.dense2(x))))


class Student(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding="VALID", rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, rngs=rngs)
        self.dense1 = nnx.Linear(800, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = nnx.max_pool(nnx.relu(bn(conv(x))), (2, 2), strides=(2, 2))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


@nnx.jit
def train_step(model, optimizer, image, label):
    loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(image), label))(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def distillation_step(student, teacher, optimizer, image, label):
    teacher_logits = teacher(image)

    def loss_fn(student):
        logits = student(image)
        soft = optax.losses.kl_divergence(
            nnx.log_softmax(logits / 3.0), nnx.softmax(teacher_logits / 3.0)
        ).mean()
        return 0.5 * cross_entropy(logits, label) + 0.5 * 9.0 * soft

    loss, grads = nnx.value_and_grad(loss_fn)(student)
    optimizer.update(student, grads)
    return loss


@nnx.jit
def count_right(model, image, label):
    return (model(image).argmax(-1) == label).sum()


def train(model, epochs, train_set, test_set, seed, teacher=None):
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    image, label = train_set
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        model.train()
        order = rng.permutation(len(label))
        for i in range(0, len(label) - 127, 128):
            batch = jnp.asarray(image[order[i : i + 128]]), jnp.asarray(label[order[i : i + 128]])
            if teacher is None:
                train_step(model, optimizer, *batch)
            else:
                distillation_step(model, teacher, optimizer, *batch)
        model.eval()
        parts = range(0, len(test_set[1]), 1000)
        right = sum(
            int(count_right(model, *(jnp.asarray(x[i : i + 1000]) for x in test_set)))
            for i in parts
        )
        print(f"epoch {epoch}: {right / len(test_set[1]):.4f}", flush=True)


def cases(folder):
    """What compare.py times: functions that take a number of steps, by name."""
    image, label = (x[:4096] for x in read(folder, "train"))
    order = np.random.default_rng(0).permutation(4096)
    teacher, student, other = Teacher(nnx.Rngs(0)), Student(nnx.Rngs(42)), Teacher(nnx.Rngs(1))
    other.eval()

    def steps(step, count):
        for i in range(count):
            at = order[i % 32 * 128 :][:128]
            out = step(jnp.asarray(image[at]), jnp.asarray(label[at]))
        return jax.block_until_ready(out)

    def training(model):
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        return optimizer, functools.partial(train_step, model, optimizer)

    optimizer, student_step = training(student)
    distil = functools.partial(distillation_step, student, other, optimizer)
    found = {"student step": student_step, "teacher step": training(teacher)[1]}
    found |= {"teacher inference": functools.partial(count_right, other)}
    found |= {"distillation step": distil}
    return {name: functools.partial(steps, step) for name, step in found.items()}


def main(folder):
    train_set, test_set = read(folder, "train"), read(folder, "t10k")
    teacher = Teacher(nnx.Rngs(0))
    print("teacher")
    train(teacher, 5, train_set, test_set, 0)
    for name, guide in (("distilled", teacher), ("baseline", None)):
        print(name)
        train(Student(nnx.Rngs(42)), 10, train_set, test_set, 42, guide)


if __name__ == "__main__":
    main(parser(__doc__).parse_args().data_dir)
