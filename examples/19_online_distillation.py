# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Online distillation: a teacher and its student, or a group of peers, learn at the same time.

Offline, a teacher is trained before its student can begin. Online, the student follows a teacher
that is still learning; in deep mutual learning there is no teacher, and peers follow each other.

    python examples/19_online_distillation.py          # 1,000 labels: 3 to 5 minutes
    python examples/19_online_distillation.py --quick  # a first look: about a minute

Times: on 2 CPU cores. Zhang et al.: Deep Mutual Learning, CVPR 2018, arXiv:1706.00384.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU
from flax import nnx
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/19_online_distillation"  # for results, figure and checkpoints
    seed: int = 42  # of all networks: labelled images, initial weights, batches, dropout
    labels: str | None = None  # of all networks, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # of each network; else what the labels need
    batch_size: int | None = None  # images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of students and peers: peak; else by labels
    teacher_learning_rate: float = 5e-3  # of teachers: peak
    temperature: float = 3.0  # T between teacher and student
    alpha: float = 0.5  # weight of the labels; the teacher has 1 - alpha
    mutual_temperature: float = 1.0  # T between peers; the paper's is 1
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, 200 labels, few steps


# %% Models


class TeacherCNN(nnx.Module):
    """Three blocks of convolution, then three dense layers: [B, 28, 28, 1] to [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv1 = nnx.Conv(1, 64, (3, 3), conv_general_dilated=conv, rngs=rngs)  # "SAME" padding
        self.bn1 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(64, 128, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.conv3 = nnx.Conv(128, 128, (3, 3), rngs=rngs)
        self.bn3 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(128 * 3 * 3, 512, rngs=rngs)  # 28 → 14 → 7 → 3
        self.dense2 = nnx.Linear(512, 256, rngs=rngs)
        self.dense3 = nnx.Linear(256, num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn3(self.conv3(x), use_running_average=not train)))
        x = x.reshape(len(x), -1)
        x = self.dropout(nnx.relu(self.dense1(x)), deterministic=not train)
        x = self.dropout(nnx.relu(self.dense2(x)), deterministic=not train)
        return self.dense3(x)


class StudentCNN(nnx.Module):
    """Two blocks of convolution, then two dense layers: [B, 28, 28, 1] to logits [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding="VALID", conv_general_dilated=conv, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(32 * 5 * 5, 64, rngs=rngs)  # 28 → 26 → 13 → 11 → 5
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = x.reshape(len(x), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


# %% Loss


def distillation_loss(student_logits, teacher_logits, labels, temperature=3.0, alpha=0.5):
    """The loss of Hinton et al. (2015), from logits [B, C] and labels [B]: (total, hard, soft)."""
    # hard = −log p_student[label] at T = 1, mean over the batch
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student_logits, labels).mean()
    # soft = T² · KL(p_teacher ‖ p_student), both at temperature T, mean over the batch
    teacher_probs = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits / temperature)
    soft = temperature**2 * optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()
    # total = α · hard + (1 − α) · soft
    return alpha * hard + (1 - alpha) * soft, hard, soft


# %% Steps
# First all networks answer, then all are updated. The gradient of the sum of their losses is each
# one's gradient of its own loss, because `distillation_loss` takes the other's logits as constants.


@nnx.jit
def online_distillation_step(teacher, student, optimizers, batch, temperature=3.0, alpha=0.5):
    """One step of a teacher, on the labels, and of a student, on the labels and that teacher.

    The soft targets are the logits from which the teacher learns in this very step: with dropout
    and the batch's statistics, and at no cost. Returns scalars."""

    def loss_fn(teacher, student):
        teacher_logits = teacher(batch["image"], train=True)
        logits, label = student(batch["image"], train=True), batch["label"]
        loss, hard, soft = distillation_loss(logits, teacher_logits, label, temperature, alpha)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(teacher_logits, label)
        metrics = {"loss": loss, "hard_loss": hard, "soft_loss": soft}
        return loss + losses.mean(), metrics | {"teacher_loss": losses.mean()}

    grads, metrics = nnx.grad(loss_fn, argnums=(0, 1), has_aux=True)(teacher, student)
    for model, optimizer, grad in zip((teacher, student), optimizers, grads, strict=True):
        optimizer.update(model, grad)
    return metrics


@nnx.jit
def mutual_learning_step(peers, optimizers, batch, temperature=1.0, weights=(1.0, 1.0)):
    """One step of a list of K peers (Zhang et al., 2018), each on the labels and on all others.

    `weights` are those of labels and others; (1, 0) trains all apart. "teacher_logits" [B, C] in
    the batch are those of one more, who has finished learning. Returns each peer's losses, [K]."""
    finished = [batch["teacher_logits"]] if "teacher_logits" in batch else []

    def loss_fn(peers):
        logits, parts = [peer(batch["image"], train=True) for peer in peers], []
        for k, own in enumerate(logits):
            others = logits[:k] + logits[k + 1 :] + finished or [own]  # alone: KL(p ‖ p) = 0
            # hard_k = CE(label, p_k), soft_k = mean over the others l of T² · KL(p_l ‖ p_k)
            pairs = [distillation_loss(own, z, batch["label"], temperature)[1:] for z in others]
            parts.append(jnp.array(pairs).mean(0))
        hard, soft = jnp.array(parts).T
        loss = weights[0] * hard + weights[1] * soft
        return loss.sum(), {"loss": loss, "hard_loss": hard, "soft_loss": soft}

    grads, metrics = nnx.grad(loss_fn, has_aux=True)(peers)
    for peer, optimizer, grad in zip(peers, optimizers, grads, strict=True):
        optimizer.update(peer, grad)
    return metrics


# %% Training


class Recipe(NamedTuple):
    seed: int  # of initial weights, batches and dropout
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str


def make_optimizer(model, recipe, images):
    """Adam; its rate rises for 30 % of the steps and falls to nearly 0, or is constant."""
    rate = recipe.learning_rate
    if recipe.schedule == "onecycle":
        steps = recipe.epochs * (images // recipe.batch_size)
        rate = optax.cosine_onecycle_schedule(max(1, steps), rate)
    return nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)


def evaluate(model, split):
    """The accuracy over all images of a split, and the logits [N, C] behind it."""
    logits = utils.predict(model, split)
    return (logits.argmax(-1) == split.label).mean(), logits


def co_train(name, networks, recipes, data, labelled, output_dir, teacher=None, **settings):
    """Trains networks side by side on the same batches: teacher and student if of two kinds, else
    peers. `teacher` was trained before. Returns the networks and their `utils.Phase`."""
    utils.banner(name.upper())
    models = [network(rngs=nnx.Rngs(r.seed)) for network, r in zip(networks, recipes, strict=True)]
    images, first, tables = len(labelled.label), recipes[0], {}
    optimizers = [make_optimizer(*pair, images) for pair in zip(models, recipes, strict=True)]
    how = {"labels": images, "networks": [r._asdict() for r in recipes], **settings}
    how["teacher"] = teacher and utils.digest(teacher)
    phase = utils.Phase(name.replace(" ", "_"), output_dir, first, data, **how)
    if teacher:
        with phase.timed("cache_seconds"):
            tables["teacher_logits"] = utils.predict_by_index(teacher, labelled)
    step, scored = utils.bind(mutual_learning_step, models, optimizers), models[0]
    if len(set(networks)) > 1:
        step, scored = utils.bind(online_distillation_step, *models, optimizers), models[1]
    score = (lambda: evaluate(scored, data.test)[0]) if StudentCNN in networks else None
    for epoch in phase.epochs(models, optimizers, score):
        for batch in utils.batches(labelled, first.batch_size, first.seed, epoch, **tables):
            phase.log(step(batch, **settings))
    return models, phase


# %% Main


def plan(config, data):
    """The labelled images, the teacher's recipe, and those of four peers (quick: two): they
    differ in their initial weights alone, and the first starts as the baseline does."""
    quick, default = config.quick, 200 if config.quick else 300 if data.name == "digits" else 1000
    labelled = utils.take_labels(data.train, config.labels or default, config.seed)
    labels = len(labelled.label)
    epochs = utils.given(config.epochs, 10 if quick else round(60 * (1000 / labels) ** 0.66))
    batch_size = utils.given(config.batch_size, min(32 if quick else 128, labels))
    rate = utils.given(config.learning_rate, 4e-2 if labels < 10_000 else 2e-2)
    more = np.random.default_rng([config.seed, 10]).integers(2**31, size=1 if quick else 3)
    peers = [Recipe(s, epochs, batch_size, rate, "onecycle") for s in (config.seed, *more.tolist())]
    return labelled, peers[0]._replace(learning_rate=config.teacher_learning_rate), peers


def draw(rows, data, ready):
    """Accuracy by the clock, a group's ensemble as a diamond, and distance to whom one follows."""
    figure, label = Figure(figsize=(14, 5.5), layout="constrained"), f"{data.scored_on} accuracy"
    race, distance = figure.subplots(1, 2)
    race.axvspan(0, ready, color="0.9", label="offline: its teacher is being trained")
    for row in (row for row in rows if "teacher" not in row["name"]):
        [line] = race.plot(*np.reshape(row["clock"], (-1, 2)).T, ".-", label=row["name"])
        style, soft = {"color": line.get_color()}, [np.mean(r["soft_loss"]) for r in row["history"]]
        race.plot(row["seconds_to_end"], row.get("ensemble", np.nan), "D", **style)
        if not row["name"].endswith("baseline"):  # which follows nobody
            distance.plot(range(1, len(soft) + 1), soft, **style)
    race.set(title="Of a group its first; diamonds: ensembles", xlabel="seconds", ylabel=label)
    race.set_ylim(min(row[f"{data.scored_on}_accuracy"] for row in rows) - 0.02)
    distance.set(title="Distance to others", xlabel="epoch", ylabel="soft loss", yscale="log")
    figure.legend(loc="outside right center")
    return figure


def main(config):
    data = utils.start(config)
    labelled, for_teacher, peers = plan(config, data)
    common, one, first = (data, labelled, config.output_dir), [StudentCNN], peers[:1]
    t, alpha, alone = config.temperature, config.alpha, {"weights": (1.0, 0.0)}
    runs = {"offline teacher": co_train("teacher", [TeacherCNN], [for_teacher], *common, **alone)}
    [teacher], _ = runs["offline teacher"]
    how = {"temperature": t, "weights": (alpha, 1 - alpha), "teacher": teacher}
    runs["offline student"] = co_train("offline student", one, first, *common, **how)
    both = [TeacherCNN, StudentCNN], [for_teacher, *first]
    (teacher, student), phase = co_train("online", *both, *common, temperature=t, alpha=alpha)
    runs |= {"online teacher": ([teacher], phase), "online student": ([student], phase)}
    runs["baseline"] = co_train("baseline", one, first, *common, **alone)
    longer = [peers[0]._replace(epochs=len(peers) * peers[0].epochs)]
    runs["longer baseline"] = co_train("longer baseline", one, longer, *common, **alone)
    pairs = {"online student": "offline student"}
    for k in range(2, len(peers) + 1, 2):
        pairs[f"{k} mutual peers"] = f"{k} baselines apart"
        for name, weight in ((f"{k} baselines apart", 0.0), (f"{k} mutual peers", 1.0)):
            how = {"temperature": config.mutual_temperature, "weights": (1.0, weight)}
            runs[name] = co_train(name, one * k, peers[:k], *common, **how)
    scores = {name: [evaluate(x, data.test) for x in models] for name, (models, _) in runs.items()}
    logits = {name: found[0][1] for name, found in scores.items()}
    rows = utils.rows({name: (x[0], phase) for name, (x, phase) in runs.items()}, logits, data)
    ready = sum(rows[0]["epoch_seconds"]) + rows[1]["cache_seconds"]
    mean, ensembles, key = {}, {}, f"{data.scored_on}_accuracy"
    for row in rows:
        late, found = ready if row["name"] == "offline student" else 0.0, scores[row["name"]]
        if row["name"] == "online teacher":  # In its run the student was scored.
            row["history"] = [{k: x for k, x in r.items() if k != key} for r in row["history"]]
        seconds = np.cumsum([late, *row["epoch_seconds"]]).tolist()
        row["clock"] = [(seconds[r["epoch"]], r[key]) for r in row["history"] if key in r]
        reached = (second for second, score in row["clock"] if score >= scores["baseline"][0][0])
        row |= {"seconds_to_end": seconds[-1], "seconds_to_baseline": next(reached, None)}
        if len(found) > 1:
            row["members"] = [float(score) for score, _ in found]
            mean_probs = np.mean([jax.nn.softmax(z) for _, z in found], axis=0)
            row["ensemble"] = float((mean_probs.argmax(-1) == data.test.label).mean())
            ensembles[f"Ensemble of {row['name']}"] = f"{100 * row['ensemble']:.2f} %"
        mean[row["name"]] = 100 * np.mean([score for score, _ in found])
    report = utils.write_results(config, data, rows, draw(rows, data, ready))
    gains = {a: f"{mean[a] - mean[b]:+.2f} points over {b} (means)" for a, b in pairs.items()}
    utils.summary(report, data, gains | ensembles)
    return report


if __name__ == "__main__":
    utils.run(main, Config)
