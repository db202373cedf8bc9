"""Script 19: networks that learn together. Whom they follow, bugs of following, what every network
is shown, and the clock."""

import contextlib
import io
import types

import experiment
import jax
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, exhibit, gain_in_words, load, make_run, watch
from experiment import Recipe, fingerprint
from flax import nnx

SCRIPT = "19_online_distillation.py"
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)


def batch(**more):
    return {"image": IMAGES, "label": LABELS} | more


def with_sgd(*models):
    """The models, and an optimizer for each that subtracts the gradient."""
    optimizers = [nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param) for model in models]
    return list(models), optimizers


def students(script, count):
    return with_sgd(*(script.StudentCNN(rngs=nnx.Rngs(seed)) for seed in range(count)))


def weights(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@nnx.jit
def answer(model):
    """Its logits in training."""
    return model(batch()["image"], train=True)


def own_gradient(peer, others, temperature=1.0):
    """Of CE + mean over others of T² · KL(p_other ‖ p_peer), with the others' logits as numbers."""

    @nnx.jit
    def loss_fn(peer):
        z = answer(peer)
        log_p = jax.nn.log_softmax(z / temperature)
        loss = -jax.nn.log_softmax(z)[np.arange(8), LABELS].mean()
        for other in others:
            q = jax.nn.softmax(other / temperature)
            kl = (q * (jax.nn.log_softmax(other / temperature) - log_p)).sum(-1).mean()
            loss += temperature**2 * kl / len(others)
        return loss

    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.grad(loss_fn)(peer)))


# %% The bug museum


def peers_not_detached_from_each_other(online):
    """Each peer moves by the gradient of its own loss: nobody learns through another's logits."""
    peers, optimizers = students(online, 3)
    logits = [np.array(answer(peer)) for peer in peers]
    before = [weights(peer) for peer in peers]
    grads = [own_gradient(peer, logits[:k] + logits[k + 1 :], 2.0) for k, peer in enumerate(peers)]
    online.mutual_learning_step(peers, optimizers, batch(), 2.0)
    for peer, start, grad in zip(peers, before, grads, strict=True):
        assert_close(weights(peer), jax.tree.map(lambda w, g: w - g, start, grad))


def online_teacher_learns_from_its_student(online):
    """The teacher moves as it would alone: same start, same dropout, same batch, no student."""
    alone, together = (online.TeacherCNN(rngs=nnx.Rngs(1)) for _ in range(2))
    [alone], [optimizer] = with_sgd(alone)
    online.train_step(alone, optimizer, batch())
    pair, optimizers = with_sgd(online.StudentCNN(rngs=nnx.Rngs(0)), together)
    online.online_distillation_step(*pair, optimizers, batch(), 3.0, 0.5)
    assert_close(weights(pair[1]), weights(alone))


def ensemble_of_logits(online):
    """The ensemble answers with the mean of probabilities: one very sure member does not decide."""
    peers = [np.array([[30.0, 0.0]]), np.array([[0.0, 3.0]]), np.array([[0.0, 3.0]])]  # logits
    online.predict = lambda peer, split: peer
    rows = []
    test = utils.Split(np.zeros((1, 28, 28, 1)), np.array([1]), np.array([0]))
    run = types.SimpleNamespace(
        data=types.SimpleNamespace(test=test),
        add_row=lambda name, model, logits, **more: rows.append((model, logits, more)),
    )
    online.add_group_row("3 mutual peers", peers, [0, 1, 2], run)
    [(model, logits, more)] = rows
    assert model is peers[0]
    assert logits is peers[0]
    assert more["members"] == [0.0, 1.0, 1.0]
    assert more["ensemble"] == 1.0


CONSTANT = "jax.lax.stop_gradient(at_least_float32(teacher_logits))"
MUSEUM = {
    peers_not_detached_from_each_other: (SCRIPT, CONSTANT, "at_least_float32(teacher_logits)"),
    online_teacher_learns_from_its_student: (SCRIPT, CONSTANT, "at_least_float32(teacher_logits)"),
    ensemble_of_logits: (
        SCRIPT, "[jax.nn.softmax(logits) for logits in logits_of_peers]", "logits_of_peers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, *MUSEUM[check])


# %% Steps


@pytest.fixture(scope="module")
def online():
    return load(EXAMPLES / SCRIPT)


def test_apart_means_alone(online, kd):
    """With weight 0 for the peers, each of a group makes script 15's step on the labels."""
    peers, optimizers = students(online, 2)
    metrics = online.mutual_learning_step(peers, optimizers, batch(), 1.0, 0.0)
    alone, optimizers = students(kd, 2)
    for k, (model, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
        want = kd.train_step(model, optimizer, batch())
        np.testing.assert_allclose(metrics["loss"][k], want["loss"], rtol=1e-5)
        assert_close(weights(peers[k]), weights(model))
    assert metrics["soft_loss"].min() > 0, "what lies between them is measured all the same"


def test_losses_of_peers_are_label_plus_mean_distance_to_the_others(online):
    peers, optimizers = students(online, 4)
    logits = [np.array(answer(peer)) for peer in peers]
    metrics = online.mutual_learning_step(peers, optimizers, batch(), 2.0, 0.5)
    for k, own in enumerate(logits):
        others = logits[:k] + logits[k + 1 :]
        soft = np.mean([online.soft_loss(own, other, 2.0) for other in others])
        hard = online.hard_loss(own, LABELS)
        np.testing.assert_allclose(metrics["soft_loss"][k], soft, rtol=1e-4)
        np.testing.assert_allclose(metrics["hard_loss"][k], hard, rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"][k], hard + 0.5 * soft, rtol=1e-4)


def test_the_online_student_follows_the_teacher_of_the_moment(online):
    """Its soft targets are the logits of the teacher's own forward pass, before the update, with
    dropout and the batch's statistics: the step is script 15's beside these logits."""
    pair, optimizers = with_sgd(
        online.StudentCNN(rngs=nnx.Rngs(0)), online.TeacherCNN(rngs=nnx.Rngs(1))
    )
    twin, twin_optimizers = with_sgd(
        online.StudentCNN(rngs=nnx.Rngs(0)), online.TeacherCNN(rngs=nnx.Rngs(1))
    )
    live = answer(twin[1])
    want = online.train_student_step(
        twin[0], None, twin_optimizers[0], batch(teacher_logits=live), 3.0, 0.3
    )
    found = online.online_distillation_step(*pair, optimizers, batch(), 3.0, 0.3)
    assert_close(weights(pair[0]), weights(twin[0]))
    for key in ("loss", "hard_loss", "soft_loss"):
        np.testing.assert_allclose(found[key], want[key], rtol=1e-4)
    np.testing.assert_allclose(found["teacher_loss"], online.hard_loss(live, LABELS), rtol=1e-4)


# %% What every network is given and shown, in a run of two seeds

STUDENTS_ALONE = ("offline student", "baseline", "longer baseline")
SIZES = (2, 4)
GROUPS = [f"{size} {kind}" for size in SIZES for kind in ("baselines apart", "mutual peers")]
NAMES = ["offline teacher", "offline student", "online", "baseline", "longer baseline", *GROUPS]
ROWS = [
    "offline teacher", "offline student", "online teacher", "online student", "baseline",
    "longer baseline", *GROUPS,
]  # fmt: skip
SEEDS = [7, 8]


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(400)), test=digits.test.take(slice(100)))


@pytest.fixture(scope="module")
def watched(few, tmp_path_factory):
    """The run: its report, the trainings by (name, seed), what else each step was called with and
    with which transforms it updates, by the same, and the run's output."""
    module = load(EXAMPLES / SCRIPT, name="watched_online")
    config = module.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("watched")),
        seed=7, seeds=2, labels=60, epochs=2, batch_size=20, teacher_learning_rate=3e-3,
        temperature=5.0, alpha=0.25, mutual_temperature=2.0,
    )  # fmt: skip
    calls, transforms = [], {}  # of each training its step and that step's arguments; {id: ...}
    real_compile_step, real_make_optimizer = module.compile_step, module.make_optimizer

    def compile_step(step, *modules):
        compiled, arguments = real_compile_step(step, *modules), set()
        calls.append((step, arguments))

        def call(batch, *more):
            arguments.add(more)
            return compiled(batch, *more)

        return call

    def make_optimizer(model, *arguments):
        optimizer = real_make_optimizer(model, *arguments)
        transforms[id(model)] = optimizer.tx
        return optimizer

    module.compile_step, module.make_optimizer = compile_step, make_optimizer
    with contextlib.redirect_stdout(io.StringIO()) as output:
        report, trainings = watch(module, few, config)
    keys = [(training.name, training.recipe.seed) for training in trainings]
    return types.SimpleNamespace(
        config=config,
        report=report,
        row={(row["name"], row["seed"]): row for row in report["results"]},
        trainings=dict(zip(keys, trainings, strict=True)),
        calls=dict(zip(keys, calls, strict=True)),
        transforms=transforms,
        output=output.getvalue(),
    )


def network_of(watched, name, seed):
    """The network of a row: of a group its first peer."""
    if name == "online student":
        return watched.trainings["online", seed].model[0]
    if name == "online teacher":
        return watched.trainings["online", seed].model[1]
    model = watched.trainings[name, seed].model
    return model[0] if name in GROUPS else model


def peer_seeds(seed):
    return [seed, *np.random.default_rng([seed, 10]).integers(2**31, size=3).tolist()]


def test_trainings_and_rows_are_in_this_order(watched):
    assert list(watched.trainings) == [(name, seed) for seed in SEEDS for name in NAMES]
    assert list(watched.row) == [(name, seed) for seed in SEEDS for name in ROWS]
    assert len(watched.report["results"]) == len(watched.row)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_networks_learn_from_the_same_labelled_images_in_the_same_batches(watched, few, seed):
    """The teachers have no other labels than the students, and nobody sees a test image."""
    labelled = utils.take_labels(few.train, 60, seed)
    wanted = [batch for epoch in range(1, 9) for batch in utils.batches(labelled, 20, seed, epoch)]
    for name in NAMES:
        training = watched.trainings[name, seed]
        np.testing.assert_array_equal(training.split.index, labelled.index)
        assert len(training.batches) == (24 if name == "longer baseline" else 6)
        for shown, want in zip(training.batches, wanted, strict=False):
            for key in ("index", "image", "label"):
                np.testing.assert_array_equal(shown[key], want[key])
        place = np.searchsorted(few.train.index, training.shown("index"))
        images = few.train.image[place] / np.float32(255)
        np.testing.assert_array_equal(training.shown("image"), images)
        np.testing.assert_array_equal(training.shown("label"), few.train.label[place])


@pytest.mark.parametrize("seed", SEEDS)
def test_all_train_by_one_recipe_but_for_the_teachers_rate_and_the_longer_baseline(watched, seed):
    recipe = Recipe(seed, epochs=2, batch_size=20, learning_rate=1e-2, schedule="onecycle")
    for name in NAMES:
        want = recipe
        if name == "offline teacher":
            want = recipe._replace(learning_rate=3e-3)
        if name == "longer baseline":
            want = recipe._replace(epochs=4 * 2)  # as many steps as four networks take
        assert watched.trainings[name, seed].recipe == want, name


@pytest.mark.parametrize("seed", SEEDS)
def test_within_a_seed_equal_networks_are_updated_alike(watched, seed):
    """Adam with the same schedule: one for teachers, one for students and peers."""

    def transform(name, k=None):
        model = watched.trainings[name, seed].model
        return watched.transforms[id(model if k is None else model[k])]

    assert transform("online", 0) is transform("offline student")
    assert transform("online", 1) is transform("offline teacher")
    assert transform("baseline") is transform("offline student")
    assert transform("offline teacher") is not transform("offline student")
    assert transform("longer baseline") is not transform("baseline")
    for name in GROUPS:
        size = len(watched.trainings[name, seed].model)
        assert len({transform(name, k) for k in range(size)}) == 1


def test_each_clock_includes_compiling(watched):
    """Trainings with the same kind of step do not share its transform, and so not the step."""
    for size in SIZES:
        used = [
            watched.transforms[id(watched.trainings[f"{size} {kind}", seed].model[0])]
            for kind in ("baselines apart", "mutual peers")
            for seed in SEEDS
        ]
        assert len(set(used)) == 4
    for name in ("offline teacher", *STUDENTS_ALONE):
        used = {watched.transforms[id(watched.trainings[name, seed].model)] for seed in SEEDS}
        assert len(used) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_single_students_and_the_first_of_each_group_share_their_start_and_so_do_the_teachers(
    watched, online, seed
):
    student = online.StudentCNN(rngs=nnx.Rngs(seed))
    teacher = online.TeacherCNN(rngs=nnx.Rngs(seed))
    starts = {name: watched.trainings[name, seed].start for name in NAMES}
    for name in STUDENTS_ALONE:
        assert starts[name] == fingerprint(student)
    assert starts["offline teacher"] == fingerprint(teacher)
    assert starts["online"] == fingerprint((student, teacher))
    others = [online.StudentCNN(rngs=nnx.Rngs(other)) for other in peer_seeds(seed)[1:]]
    for size in SIZES:
        for kind in ("baselines apart", "mutual peers"):
            assert starts[f"{size} {kind}"] == fingerprint([student, *others][:size])


def test_members_of_a_group_differ_in_their_start(online):
    for seed in SEEDS:
        seeds = online.draw_peer_seeds(seed, 4)
        assert seeds == peer_seeds(seed)
        assert len(set(seeds)) == 4
        assert seeds[0] == seed
        assert online.draw_peer_seeds(seed, 2) == peer_seeds(seed)[:2]


def test_seeds_differ_in_images_and_start(watched):
    for name in NAMES:
        one, other = (watched.trainings[name, seed] for seed in SEEDS)
        assert one.start != other.start
        assert (one.split.index != other.split.index).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_offline_student_is_given_logits_those_of_the_finished_teacher(watched, seed):
    teacher = watched.trainings["offline teacher", seed].model
    for name in NAMES:
        training = watched.trainings[name, seed]
        assert ("teacher_logits" in training.batches[0]) == (name == "offline student")
        if name == "offline student":
            assert training.given["teacher"] is teacher
            want = utils.predict(teacher, training.split)
            place = np.searchsorted(training.split.index, training.shown("index"))
            np.testing.assert_allclose(training.shown("teacher_logits"), want[place], atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_who_follows_whom_at_which_temperature_and_weight(watched, seed):
    alone = ("train_step", {()})
    wanted = {
        "offline teacher": alone,
        "offline student": ("train_student_step", {(5.0, 0.25)}),
        "online": ("online_distillation_step", {(5.0, 0.25)}),
        "baseline": alone,
        "longer baseline": alone,
        "2 baselines apart": ("mutual_learning_step", {(2.0, 0.0)}),
        "2 mutual peers": ("mutual_learning_step", {(2.0, 1.0)}),
        "4 baselines apart": ("mutual_learning_step", {(2.0, 0.0)}),
        "4 mutual peers": ("mutual_learning_step", {(2.0, 1.0)}),
    }
    for name in NAMES:
        step, arguments = watched.calls[name, seed]
        assert (step.__name__, arguments) == wanted[name], name


def test_single_networks_are_to_the_bit_those_of_script_15(watched, few, kd, tmp_path):
    """Offline distillation and the baselines are trained as there, from the same numbers."""
    labelled = watched.trainings["baseline", 7].split
    run = make_run(tmp_path, few)
    recipes = {name: watched.trainings[name, 7].recipe for name in NAMES}
    teacher = kd.train_teacher(few._replace(train=labelled), recipes["offline teacher"], run)
    student = kd.train_student_with_distillation(
        teacher, few, labelled, recipes["offline student"], run, 5.0, 0.25
    )
    baseline = kd.train_student_baseline(few, labelled, recipes["baseline"], run)
    longer = kd.train_student_baseline(few, labelled, recipes["longer baseline"], run)
    same = {
        "offline teacher": teacher,
        "offline student": student,
        "baseline": baseline,
        "longer baseline": longer,
    }
    for name, model in same.items():
        assert fingerprint(watched.trainings[name, 7].model) == fingerprint(model), name


@pytest.mark.parametrize("seed", SEEDS)
def test_the_online_teacher_ends_as_the_offline_teacher(watched, seed):
    """Nothing flows back from the student; start, batches and dropout are the same."""
    teachers = []
    for kind in ("offline", "online"):
        teacher = weights(network_of(watched, f"{kind} teacher", seed))
        for name in ("conv1", "conv2", "conv3"):
            # Before BatchNorm its gradient is 0 but for rounding, out of which Adam makes steps.
            del teacher[name]["bias"]
        teachers.append(teacher)
    assert_close(*teachers, atol=2e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_of_the_baselines_apart_is_the_baseline_and_peers_are_not(watched, few, seed):
    """Apart, nobody follows anybody. (Another program is rounded otherwise.)"""
    baseline = utils.predict(network_of(watched, "baseline", seed), few.test)
    for size in SIZES:
        apart = utils.predict(network_of(watched, f"{size} baselines apart", seed), few.test)
        mutual = utils.predict(network_of(watched, f"{size} mutual peers", seed), few.test)
        np.testing.assert_allclose(apart, baseline, atol=0.05 * np.abs(baseline).max())
        assert np.abs(mutual - baseline).max() > 0.2 * np.abs(baseline).max()


# %% What is reported


def test_networks_are_scored_on_all_test_images(watched, few):
    """On the way the student of a pair and the first of a group; teachers not at all."""
    for (name, seed), training in watched.trainings.items():
        row_name = "online student" if name == "online" else name
        network = network_of(watched, row_name, seed)
        if name == "offline teacher":
            assert not training.scored
            continue
        assert len(training.scored) == training.recipe.epochs
        for scored_on, model, split in training.scored:
            assert scored_on == "test"
            assert model is network
            assert split is few.test


def test_rows_are_of_these_networks_after_their_last_epoch(watched, few):
    for (name, seed), row in watched.row.items():
        network = network_of(watched, name, seed)
        errors = (utils.predict(network, few.test).argmax(-1) != few.test.label).sum()
        assert row["test_errors"] == errors
        assert row["test_accuracy"] == 1 - errors / 100
        assert row["params"] == (946_954 if "teacher" in name else 56_810)
        if "teacher" in name:
            assert all("test_accuracy" not in record for record in row["history"])
        else:
            assert row["history"][-1]["test_accuracy"] == pytest.approx(row["test_accuracy"])


def test_rows_of_the_pair_are_of_their_joint_training(watched):
    for seed in SEEDS:
        teacher, student = (watched.row[f"online {who}", seed] for who in ("teacher", "student"))
        for key in ("epoch_seconds", "seconds_to_end"):
            assert teacher[key] == student[key]
        assert (teacher["seconds"], student["seconds"] > 0) == (0, True)  # what both cost, once
        assert teacher["settings"]["learning_rate"] == 3e-3
        assert student["settings"]["learning_rate"] == 1e-2
        offline = watched.row["offline teacher", seed]["history"]
        for here, there in zip(teacher["history"], offline, strict=True):
            assert here["teacher_loss"] == pytest.approx(there["loss"], rel=1e-3)


def test_rows_of_groups_have_each_member_and_the_ensemble_of_probabilities(watched, few):
    for name in GROUPS:
        for seed in SEEDS:
            row, peers = watched.row[name, seed], watched.trainings[name, seed].model
            logits = np.stack([utils.predict(peer, few.test) for peer in peers])
            accuracies = (logits.argmax(-1) == few.test.label).mean(-1)
            np.testing.assert_allclose(row["members"], accuracies)
            probs = np.asarray(jax.nn.softmax(logits)).mean(0)
            assert row["ensemble"] == (probs.argmax(-1) == few.test.label).mean()
            assert row["peer_seeds"] == peer_seeds(seed)[: len(peers)]
            assert row["members"][0] == pytest.approx(row["test_accuracy"])
            assert np.shape(row["history"][0]["soft_loss"]) == (len(peers),)


def test_saved_weights_of_networks_that_learned_together_are_found(watched, online):
    blank = nnx.Rngs(0)
    folder = watched.config.output_dir
    pair = (online.StudentCNN(rngs=blank), online.TeacherCNN(rngs=blank))
    peers = [online.StudentCNN(rngs=blank) for _ in range(4)]
    for name, models in (("online", pair), ("4 mutual peers", peers)):
        loaded = experiment.load_network(folder, name, models, seed=8)
        assert fingerprint(loaded) == fingerprint(watched.trainings[name, 8].model)


def test_the_clock_runs_from_nothing_to_the_end(watched):
    """The offline student's begins with its teacher's training and the caching of its logits."""
    for (name, seed), row in watched.row.items():
        begin = 0.0
        if name == "offline student":
            assert row["cache_seconds"] > 0
            begin = sum(watched.row["offline teacher", seed]["epoch_seconds"])
            begin += row["cache_seconds"]
        seconds = begin + np.cumsum(row["epoch_seconds"])
        assert row["seconds_to_end"] == pytest.approx(seconds[-1])
        accuracies = [record.get("test_accuracy") for record in row["history"]]
        if "teacher" in name:
            assert row["clock"] == []
            assert row["seconds_to_baseline"] is None
        else:
            wanted = list(zip(seconds, accuracies, strict=True))
            np.testing.assert_allclose(row["clock"], wanted)


def test_when_the_baseline_was_reached(online):
    """First reached, by whoever did; each seed has a baseline of its own."""

    def row(name, accuracies, **more):
        history = [{"epoch": i, "test_accuracy": x} for i, x in enumerate(accuracies, 1)]
        return {"name": name, "epoch_seconds": [1.0] * len(history), "history": history, **more}

    rows = [
        {"name": "offline teacher", "epoch_seconds": [10.0, 10.0], "history": [{"epoch": 2}]},
        row("offline student", [0.5, 0.7, 0.9], cache_seconds=4.0),
        row("baseline", [0.5, 0.8, 0.7]),  # the last counts, not the best
        row("2 mutual peers", [0.5, 0.6, 0.69]),
        row("4 mutual peers", [0.71, 0.6, 0.9]),
    ]
    online.add_clocks(rows, "test")
    teacher, student = rows[:2]
    assert teacher["seconds_to_end"] == 20
    assert student["seconds_to_end"] == 27
    assert student["clock"][0] == (25, 0.5)
    found = [r["seconds_to_baseline"] for r in rows]
    assert found == [None, 26, 2, None, 1]


def line(watched, what):
    [found] = [x for x in watched.output.splitlines() if x.startswith(f"{what} ")]
    return found.removeprefix(what).strip()


def test_the_summary_compares_within_seeds_and_groups_by_all_their_members(watched):
    def values(name, key):
        return [np.mean(watched.row[name, seed][key]) for seed in SEEDS]

    assert line(watched, "Labels") == "60 of 400, for all networks"
    for name, other in (
        ("online student", "offline student"),
        ("online student", "baseline"),
        ("offline student", "baseline"),
        ("longer baseline", "baseline"),
    ):
        words = f"{name.capitalize()} over {other.removesuffix(' student')}"
        want = gain_in_words(values(name, "test_accuracy"), values(other, "test_accuracy"))
        assert line(watched, words) == want
    for size in SIZES:
        mutual, apart = f"{size} mutual peers", f"{size} baselines apart"
        found = line(watched, f"{mutual} over apart")
        assert found == gain_in_words(values(mutual, "members"), values(apart, "members"))
        for name in (mutual, apart):
            mean = 100 * np.mean(values(name, "ensemble"))
            assert line(watched, f"Ensemble of {name}") == f"{mean:.2f} %"


# %% Settings


def test_what_is_left_open_is_filled_in(online, few):
    fill = online.fill_in_defaults
    many = few._replace(name="mnist", train=few.train.take(np.zeros(10_000, int)))
    assert fill(online.Config(), many).labels == 1000
    assert fill(online.Config(), few).labels == 100
    assert fill(online.Config(quick=True), many).labels == 100
    assert fill(online.Config(quick=True), many).epochs == 40
    assert fill(online.Config(quick=True, labels="all"), few).labels == "all"
    assert fill(online.Config(), few).seeds == 1
    recipe = online.shared_recipe
    assert recipe(online.Config(), many, 7, 1000) == Recipe(7, 60, 128, 4e-2, "onecycle")
    assert recipe(online.Config(), many, 7, 60_000) == Recipe(7, 4, 128, 2e-2, "onecycle")
    assert recipe(online.Config(), many, 7, 100) == Recipe(7, 274, 100, 4e-2, "onecycle")
    assert recipe(online.Config(), few, 7, 200) == Recipe(7, 120, 32, 1e-2, "onecycle")
    given = online.Config(epochs=5, batch_size=9, learning_rate=0.1)
    assert recipe(given, many, 7, 200) == Recipe(7, 5, 9, 0.1, "onecycle")


@pytest.mark.parametrize(("quick", "times", "sizes"), [(False, 4, [2, 4]), (True, 2, [2])])
def test_the_longer_baseline_takes_as_many_steps_as_the_largest_group(few, quick, times, sizes):
    module = load(EXAMPLES / SCRIPT, name="baselines_of_online")
    trained, rows = {}, []
    module.predict = lambda model, split: f"logits of {model}"

    def train_student_alone(name, data, labelled, recipe, run):
        trained[name] = recipe
        return name

    module.train_student_alone = train_student_alone
    run = types.SimpleNamespace(data=few, add_row=lambda *row: rows.append(row))
    config, recipe = module.Config(quick=quick), Recipe(7, 3, 20, 4e-2, "onecycle")
    assert module.sizes_of_groups(config) == sizes
    module.train_baselines(config, few.train, recipe, run)
    assert trained == {"baseline": recipe, "longer baseline": recipe._replace(epochs=3 * times)}
    assert rows == [(name, name, f"logits of {name}") for name in trained]


def multiplications(model):
    """Of one image, in convolutions (of padding, too) and matrix products."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                kernel = equation.invars[1].aval.shape
                total += equation.outvars[0].aval.size * np.prod(kernel[:-1])
            if equation.primitive.name == "dot_general":
                (axes, _), _ = equation.params["dimension_numbers"]
                [axis] = axes
                total += equation.outvars[0].aval.size * equation.invars[0].aval.shape[axis]
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    total += count(inner.jaxpr)
        return total

    return count(jax.make_jaxpr(lambda x: model(x))(IMAGES[:1]).jaxpr)


def test_a_step_of_the_teacher_costs_32_steps_of_a_student(online):
    assert multiplications(online.TeacherCNN(rngs=nnx.Rngs(0))) == 22_851_072
    assert multiplications(online.StudentCNN(rngs=nnx.Rngs(0))) == 706_752
