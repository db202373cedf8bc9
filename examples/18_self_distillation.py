# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Self-distillation: a network as its own teacher, and no larger one anywhere.

A trained network teaches a fresh copy of itself, and that the next ("born again"); inside of one
network the last exit teaches earlier ones. Twins without a teacher tell what that was worth.

    python examples/18_self_distillation.py           # 1,000 labels: 1 to 2 minutes
    python examples/18_self_distillation.py --quick   # a first look: under a minute

Times are for 2 CPU cores. Furlanello et al.: Born-Again Neural Networks, 2018, arXiv:1805.04770.
Zhang et al.: Be Your Own Teacher, 2019, arXiv:1905.08094.
"""

import dataclasses
import functools
import time
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
    output_dir: str = "runs/18_self_distillation"  # for results, figure and checkpoints
    seed: int = 42  # labelled images, initial weights, batches; a generation's derive from it
    labels: str | None = None  # labelled images, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # of each network; else what the labels need
    batch_size: int | None = None  # images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # peak (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of the learning rate: onecycle or constant
    generations: int | None = None  # born again after the baseline, 1 to 10; else 3, quick 1
    temperature: float = 3.0  # T of the self-distilled copy and of the exits; generations have 1
    alpha: float = 0.5  # weight of the labels wherever there is a teacher; it has 1 - alpha
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, 200 labels, few steps


# %% Models


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


class ExitCNN(nnx.Module):
    """Three blocks, a small classifier (exit) behind each: [B, 28, 28, 1] to [3, B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.blocks, self.exits = nnx.List(), nnx.List()
        for a, b in ((1, 16), (16, 32), (32, 64)):
            norm = nnx.BatchNorm(b, momentum=0.9, rngs=rngs)
            self.blocks.append(nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs), norm]))
            dense = nnx.Linear(b * 9, 64, rngs=rngs), nnx.Linear(64, num_classes, rngs=rngs)
            self.exits.append(nnx.Sequential(dense[0], nnx.relu, dense[1]))

    def __call__(self, x, train=False):
        logits = []
        for (layer, norm), head in zip(self.blocks, self.exits, strict=True):
            small = x = max_pool(nnx.relu(norm(layer(x), use_running_average=not train)))
            while small.shape[1] > 3:  # every exit sees 3×3
                small = max_pool(small)
            logits.append(head(small.reshape(len(x), -1)))
        return jnp.stack(logits)


# %% Losses and training
# A batch brings "label" [B] and, if a teacher says it, "teacher_logits" [B, C] or "weight" [B].


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


def label_loss(logits, batch):
    """Labels alone; a teacher may weight the images ("confidence weighted by teacher max")."""
    # Σ wᵢ · −log pᵢ[labelᵢ] / Σ wᵢ; wᵢ: the teacher's largest probability; 1 if there is none
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.average(losses, weights=batch.get("weight"))


def born_again_loss(logits, batch, temperature, alpha):
    """Labels and teacher; at T = 1 what Furlanello et al. (2018) call "BAN+L"."""
    return distillation_loss(logits, batch["teacher_logits"], batch["label"], temperature, alpha)[0]


def permute_dark_knowledge(logits, rng):
    """Shuffles each row of [N, C] but for its largest entry ("with permuted predictions")."""
    others = np.arange(logits.shape[1]) != logits.argmax(-1)[:, None]
    permuted = logits.copy()
    permuted[others] = rng.permuted(logits[others].reshape(len(logits), -1), axis=1).ravel()
    return permuted


def exits_loss(logits, batch, early, temperature, alpha):
    """Zhang et al. (2019): the last exit has labels alone and teaches the others, if alpha < 1."""
    *others, last = logits  # [B, C] each
    loss = label_loss(last, batch)
    for other in others:
        # early · (α · −log p_k[label] + (1 − α) · T² · KL(p_last ‖ p_k)), p_last as a constant
        loss += early * distillation_loss(other, last, batch["label"], temperature, alpha)[0]
    return loss


@nnx.jit(static_argnums=3)
def loss_step(model, optimizer, batch, loss, weights):
    """One step of any network on `loss(logits, batch, **weights)`. Returns that scalar."""
    score = nnx.value_and_grad(lambda net: loss(net(batch["image"], train=True), batch, **weights))
    value, grads = score(model)
    optimizer.update(model, grads)
    return {"loss": value}


class Recipe(NamedTuple):
    seed: int  # of initial weights, batches and dropout
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str


@functools.cache  # so that equal recipes share a compiled step
def make_transform(learning_rate, schedule, steps):
    """Adam; its rate rises for 30 % of the steps and falls to nearly 0, or is constant."""
    if schedule == "onecycle":
        learning_rate = optax.cosine_onecycle_schedule(max(1, steps), learning_rate)
    return optax.adam(learning_rate)


def train_fresh(name, network, loss, recipe, data, config, tables, **weights):
    """Trains a fresh network, with its teacher's `tables` by index. Returns it and its Phase."""
    model = network(rngs=nnx.Rngs(recipe.seed))  # no weight comes from the teacher
    steps = recipe.epochs * (len(data.train.label) // recipe.batch_size)
    transform = make_transform(recipe.learning_rate, recipe.schedule, steps)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    more = weights | {key: utils.digest(table) for key, table in tables.items()}
    phase = utils.Phase(name.replace(" ", "_"), config.output_dir, recipe, data, **more)
    cached_step = utils.bind(loss_step, model, optimizer)
    for epoch in phase.epochs(model, optimizer, None):  # scored once, at the end, to save time
        for batch in utils.batches(data.train, recipe.batch_size, recipe.seed, epoch, **tables):
            phase.log(cached_step(batch, loss, weights))
    return model, phase


def train_all(config, count, recipe, data):
    """Trains all networks: {name: (model, Phase)}, and the logits of those that teach. A twin has
    its generation's start and batches; the baseline's other students have those of generation 1."""
    runs, both = {}, {"temperature": config.temperature, "alpha": config.alpha}
    born_again, labels_only = both | {"temperature": 1.0}, {"temperature": 1.0, "alpha": 1.0}

    def add(name, loss, generation, network=StudentCNN, says=None, **weights):
        utils.banner(name)
        # Far from the seeds that anyone would choose for another run.
        own = recipe._replace(seed=(recipe.seed + 1_000_003 * generation) % 2**32)
        runs[name] = train_fresh(name, network, loss, own, data, config, says or {}, **weights)

    add("baseline", label_loss, 0)
    said = {"baseline": utils.predict_by_index(runs["baseline"][0], data.train)}
    add("self-distilled", born_again_loss, 1, says={"teacher_logits": said["baseline"]}, **both)
    for k in range(1, count + 1):
        before, name = [*said.values()][-1], f"generation {k}"
        add(name, born_again_loss, k, says={"teacher_logits": before}, **born_again)
        said[name] = utils.predict_by_index(runs[name][0], data.train)
        add(f"twin {k}", label_loss, k)
    sure, rng = jax.nn.softmax(said["baseline"]).max(-1), np.random.default_rng([recipe.seed, 10])
    add("confidence-weighted", label_loss, 1, says={"weight": np.asarray(sure)})
    said["permuted"] = permute_dark_knowledge(said["baseline"], rng)
    add("permuted", born_again_loss, 1, says={"teacher_logits": said["permuted"]}, **born_again)
    add("last exit only", exits_loss, 0, ExitCNN, early=0.0, **labels_only)
    add("exits on labels", exits_loss, 0, ExitCNN, early=1.0, **labels_only)
    add("exits self-taught", exits_loss, 0, ExitCNN, early=1.0, **both)
    return runs, said


# %% Main


def student_recipe(config, labels):
    """A student's recipe, from flags or else from the number of labels. 1,000 labels and nearly
    all were searched on validation images; a power law joins their epochs, 60 and 4."""
    epochs = utils.given(config.epochs, 20 if config.quick else round(60 * (1000 / labels) ** 0.66))
    rate = 1e-3 if config.schedule == "constant" else 4e-2 if labels < 10_000 else 2e-2
    rate = utils.given(config.learning_rate, rate)
    batch_size = utils.given(config.batch_size, min(32 if config.quick else 128, labels))
    utils.check_batch("--batch-size", batch_size, labels)
    return Recipe(config.seed, epochs, batch_size, rate, config.schedule)


def time_exits(network, split, repeats=30):
    """Milliseconds for 1,000 images up to each exit (`jit` leaves out the rest): medians."""
    image = jnp.array(np.resize(split.image, (1000, 28, 28, 1)) / np.float32(255))
    exits = [nnx.cached_partial(nnx.jit(lambda f, x, k=k: f(x)[k]), network) for k in range(3)]
    seconds = np.empty((repeats + 1, 3))
    for turn, k in np.ndindex(seconds.shape):  # in turns: a busy moment meets all
        begun = time.perf_counter()
        jax.block_until_ready(exits[k](image))
        seconds[turn, k] = time.perf_counter() - begun
    return 1000 * np.median(seconds[1:], axis=0)  # the first turn compiles


def draw(percent, milliseconds, data, targets):
    """Generations beside twins, exits by time, and what is said of an ambiguous labelled image."""
    figure = Figure(figsize=(18, 5.5), layout="constrained")
    chain, exits, bars = figure.subplots(1, 3)
    for kind, color in (("generation", "C0"), ("twin", "C1")):
        y = [percent[name] for name in percent if name.startswith(("baseline", kind))]
        chain.plot(y, f"{color}o-", label=f"{kind}s")
        chain.axhline(percent[f"ensemble of {kind}s"], c=color, ls="--", label=f"all {kind}s")
    for name, marker in (("self-distilled", "*"), ("confidence-weighted", "^"), ("permuted", "x")):
        chain.plot(1, percent[name], f"k{marker}", label=name)
    chain.set(title="Generations", xlabel="generation", ylabel="accuracy, %", xticks=range(len(y)))
    for way in ("last exit only", "exits on labels", "exits self-taught"):
        y = [percent[name] for name in percent if name.startswith(way)]
        exits.plot(milliseconds[-len(y) :], y, "o-", label=way)
    i, width = targets["baseline"].max(-1).argmin(), 0.8 / len(targets)
    for place, (name, probs) in enumerate(targets.items()):
        bars.bar(np.arange(10) + place * width - 0.4, probs[i], width, align="edge", label=name)
    picture = bars.inset_axes((0.02, 0.72, 0.2, 0.26), xticks=[], yticks=[])
    picture.imshow(data.train.image[i, :, :, 0], cmap="gray_r")
    exits.set(title="Exits of one network", xlabel="ms for 1,000 images", ylabel="accuracy, %")
    title = f"Probabilities for training image {data.train.index[i]}, a {data.train.label[i]}"
    bars.set(title=title, xticks=range(10), yscale="log", ylim=(1e-8, 1e3), ylabel="probability")
    for axes in (chain, exits, bars):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return figure


def main(config):
    data, count = utils.start(config), utils.given(config.generations, 1 if config.quick else 3)
    labels = config.labels or (200 if config.quick else 300 if data.name == "digits" else 1000)
    labelled = data._replace(train=utils.take_labels(data.train, labels, config.seed))
    recipe, seen = student_recipe(config, len(labelled.train.label)), labelled.train.index
    runs, teacher_logits = train_all(config, count, recipe, labelled)
    soft = {name: np.asarray(jax.nn.softmax(x[seen])) for name, x in teacher_logits.items()}
    exits = {name: runs.pop(name) for name in [*runs] if isinstance(runs[name][0], ExitCNN)}
    logits = {name: utils.predict(model, data.test) for name, (model, _) in runs.items()}
    untrained = utils.Phase("untrained", config.output_dir, recipe, data)  # a cost counts once
    for kind in ("generation", "twin"):
        names, name = [x for x in runs if x.startswith(("baseline", kind))], f"ensemble of {kind}s"
        runs[name] = tuple(runs[x][0] for x in names), untrained
        logits[name] = np.mean([jax.nn.softmax(logits[x]) for x in names], axis=0)  # soft voting
    for way, (network, phase) in exits.items():
        answers = utils.predict(network, data.test)
        for k in (2,) if way == "last exit only" else range(3):
            name, layers = f"{way}: exit {k + 1}", (*network.blocks[: k + 1], network.exits[k])
            runs[name], logits[name] = (layers, phase if k == 2 else untrained), answers[k]
    times, rows = time_exits(network, data.test), utils.rows(runs, logits, data)
    percent = {row["name"]: 100 * row[f"{data.scored_on}_accuracy"] for row in rows}
    pairs = {"self-distilled": "twin 1", "ensemble of generations": "ensemble of twins"}
    pairs |= {f"generation {k}": f"twin {k}" for k in range(1, count + 1)}
    pairs |= {"confidence-weighted": "twin 1", "permuted": "twin 1"}
    pairs |= {f"exits self-taught: exit {k}": f"exits on labels: exit {k}" for k in (1, 2, 3)}
    points = {f"{a} - {b}": percent[a] - percent[b] for a, b in pairs.items()}
    sure = {name: float(x.max(-1).mean()) for name, x in soft.items()}  # of the labelled images
    more = {"differences": points, "exit_milliseconds": times.tolist(), "sure": sure}
    report = utils.write_results(config, data, rows, draw(percent, times, labelled, soft), more)
    lines = {a: f"{percent[a] - percent[b]:+.2f} points against {b}" for a, b in pairs.items()}
    lines["Exits, for 1,000 images"] = ", ".join(f"{x:.1f} ms" for x in times)
    utils.summary(report, data, lines)
    return report


if __name__ == "__main__":
    utils.run(main, Config)
