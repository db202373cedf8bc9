"""How networks are trained, in all scripts: the course of the learning rate, and where the recipes
come from."""

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXAMPLES, SCRIPTS, load
from flax import nnx
from tables import errors_of_rates, read, searched

OWN_TRANSFORM = [x for x in SCRIPTS if "def make_transform(" in (EXAMPLES / x).read_text()]
WITH_TEACHER = [x for x in SCRIPTS if "class TeacherCNN(" in (EXAMPLES / x).read_text()]


def rates(transform, steps):
    """The learning rate of each step: where all gradients are 1, that is Adam's update."""
    weights = jnp.zeros(())
    state, found = transform.init(weights), []
    for _ in range(steps):
        update, state = transform.update(jnp.ones(()), state, weights)
        found.append(-float(update))
    return np.array(found)


@pytest.mark.parametrize("script", OWN_TRANSFORM)
def test_the_rate_rises_for_30_percent_of_the_steps_and_falls_to_nearly_0(script):
    module = load(EXAMPLES / script)
    found = rates(module.make_transform(0.1, "onecycle", 100), 100)
    assert found.argmax() == 30
    assert found[30] == pytest.approx(0.1, rel=1e-3)
    assert found[0] == pytest.approx(0.1 / 25, rel=1e-3)
    assert (np.diff(found[:31]) > 0).all()
    assert (np.diff(found[30:]) < 0).all()
    assert found[-1] < 1e-3
    constant = rates(module.make_transform(0.1, "constant", 100), 100)
    np.testing.assert_allclose(constant, 0.1, rtol=1e-3)


def test_most_scripts_have_a_transform_and_a_teacher_of_this_kind():
    assert len(OWN_TRANSFORM) >= 10
    assert len(WITH_TEACHER) >= 6


@pytest.mark.parametrize("script", WITH_TEACHER)
def test_the_seed_decides_the_dropout_and_batchnorm_follows_fast(script):
    module = load(EXAMPLES / script)
    keys = []
    for seed in (0, 1, 1):
        teacher = module.TeacherCNN(rngs=nnx.Rngs(seed))
        [key] = jax.tree.leaves(nnx.state(teacher, nnx.RngKey))
        keys.append(jax.random.key_data(key).tolist())
        for k in (1, 2, 3):
            assert getattr(teacher, f"bn{k}").momentum == 0.9
    assert keys[0] != keys[1]
    assert keys[1] == keys[2]
    if hasattr(module, "StudentCNN"):
        student = module.StudentCNN(rngs=nnx.Rngs(0))
        assert student.bn1.momentum == student.bn2.momentum == 0.9


def means_of_both(search, labels, *settings):
    """{settings: the mean accuracy of both students}, of a search, for so many labels."""
    means = {}
    for cell, accuracies in searched(search).items():
        if cell.labels == labels:
            recipe = tuple(getattr(cell, key) for key in settings)
            means[recipe] = np.mean([np.mean(accuracies[x]) for x in ("baseline", "distilled")])
    return means


def test_the_recipe_for_1000_labels_is_the_best_of_its_search_for_both_students(kd, many):
    means = means_of_both("tuning", 1000, "epochs", "learning_rate")
    recipe = kd.student_recipe(kd.Config(), many, 7, 1000)
    assert (recipe.epochs, recipe.learning_rate) == max(means, key=means.get)


def test_the_recipe_for_all_labels_has_the_fewest_epochs_near_the_best(kd, many):
    """Within 0.05 points of the best mean of both students."""
    means = means_of_both("tuning", "all", "epochs", "learning_rate")
    near = [cell for cell, mean in means.items() if mean > max(means.values()) - 0.0005]
    epochs = min(epochs for epochs, _ in near)
    of_epochs = {cell: mean for cell, mean in means.items() if cell[0] == epochs}
    recipe = kd.student_recipe(kd.Config(), many, 7, 60_000)
    assert (recipe.epochs, recipe.learning_rate) in near
    assert recipe.epochs == epochs
    assert len(of_epochs) == 3


def test_the_recipe_of_the_digits_is_the_best_of_its_search_for_both_students(kd, digits):
    means = means_of_both("digits_tuning", 100, "epochs", "batch_size", "learning_rate")
    assert len(searched("digits_tuning")) == len(means)
    assert kd.student_recipe(kd.Config(), digits, 7, 100)[1:4] == max(means, key=means.get)


@pytest.mark.parametrize("name", ["tuning", "limited_tuning", "digits_tuning"])
def test_both_students_had_the_same_trials_on_images_held_out(name):
    for accuracies in searched(name).values():
        assert accuracies.keys() == {"baseline", "distilled"}
        assert len(accuracies["baseline"]) == len(accuracies["distilled"]) > 1
    assert read(name)["dataset"]["validation"] == (297 if name == "digits_tuning" else 10_000)


def test_the_teacher_has_the_epochs_of_its_search(kd, digits, many):
    """On MNIST the better of two, on the digits the fewest with which it does best."""

    def by_epochs(search):
        return {x.epochs: np.mean(found["teacher"]) for x, found in searched(search).items()}

    of_digits = by_epochs("digits_teacher_tuning")
    best = max(of_digits.values())
    wanted = min(epochs for epochs, mean in of_digits.items() if mean == best)
    assert kd.fill_in_defaults(kd.Config(), digits).teacher_epochs == wanted
    of_mnist = by_epochs("teacher_tuning")
    assert kd.fill_in_defaults(kd.Config(), many).teacher_epochs == max(of_mnist, key=of_mnist.get)


def best_of(rows, keys, *settings):
    """{keys of a row: the settings with the fewest errors, summed over its rows}."""
    errors_of = {}
    for row in rows:
        errors = errors_of.setdefault(tuple(row[key] for key in keys), {})
        cell = tuple(row[key] for key in settings)
        errors[cell] = errors.get(cell, 0) + sum(row["errors"])
    return {key: min(errors, key=errors.get) for key, errors in errors_of.items()}


def test_the_teacher_of_fashion_mnist_is_the_one_whose_students_err_least(kd, many):
    students = read("fashion_teaching")["results"]
    teachers = read("fashion_teacher_tuning")["runs"]
    assert len({row["teacher"] for row in students}) == len(teachers) > 3
    [(number,)] = best_of(students, (), "teacher").values()
    best = teachers[number]["config"]
    wanted = best["epochs"], 128, best["learning_rate"], "onecycle", best["augmentation"]

    clothes = many._replace(name="fashion_mnist")
    config = kd.fill_in_defaults(kd.Config(), clothes)
    assert kd.teacher_recipe(config, 60_000)[1:] == wanted
    for script, recipe in (
        ("16_limited_labels.py", "default_teacher_recipe"),
        ("21_feature_distillation.py", "default_teacher_recipe"),
    ):
        module = load(EXAMPLES / script)
        config = module.fill_in_defaults(module.Config(), clothes)
        assert getattr(module, recipe)(config, clothes)[1:] == wanted


def test_both_students_had_as_many_trials_on_fashion_mnist():
    search = read("fashion_tuning")
    assert search["dataset"] == {"name": "fashion_mnist", "validation": 10_000}
    trials = [
        (row["labels"], row["name"])
        for row in search["results"]
        for _ in row["errors"]
    ]  # fmt: skip
    for labels in (1000, 10_000, "all"):
        assert trials.count((labels, "baseline")) == trials.count((labels, "distilled")) > 5


def test_one_recipe_for_both_students_of_fashion_mnist_is_within_10_errors_of_the_best(kd, many):
    """In the mean of both students, over the cells that both tried with equal softness."""
    clothes = many._replace(name="fashion_mnist")
    config = kd.Config()
    rows = read("fashion_tuning")["results"]
    for searched_for, labels in ((1000, 1000), ("all", 50_000)):
        errors = {}  # {(epochs, rate): {student: mean errors}}
        for row in rows:
            if row["labels"] == searched_for and (row["temperature"], row["alpha"]) in (
                (None, None),
                (2.0, 0.1),
            ):
                cell = errors.setdefault((row["epochs"], row["learning_rate"]), {})
                cell[row["name"]] = np.mean(row["errors"])
        of_both = {
            cell: (students["baseline"] + students["distilled"]) / 2
            for cell, students in errors.items()
            if len(students) == 2
        }
        assert len(of_both) >= 6
        recipe = kd.student_recipe(config, clothes, 0, labels)
        assert of_both[recipe.epochs, recipe.learning_rate] <= min(of_both.values()) + 10


def test_one_temperature_and_alpha_for_10000_labels_of_fashion_mnist(kd, many):
    clothes = many._replace(name="fashion_mnist")
    config = kd.fill_in_defaults(kd.Config(labels=10_000), clothes)
    limited = load(EXAMPLES / "16_limited_labels.py")
    assert limited.choose_temperature(limited.Config(), clothes, 10_000) == config.temperature
    assert limited.Config().alpha == config.alpha
    for script in ("21_feature_distillation.py", "26_patient_teacher.py"):
        module = load(EXAMPLES / script)
        other = module.fill_in_defaults(module.Config(), clothes)
        assert (other.temperature, other.alpha) == (config.temperature, config.alpha)


def test_weights_of_features_are_the_best_of_their_search(many):
    features = load(EXAMPLES / "21_feature_distillation.py")
    clothes = many._replace(name="fashion_mnist")
    config = features.fill_in_defaults(features.Config(), clothes)
    best = best_of(read("features_tuning")["results"], ("name", "alpha"), "weight")
    wanted = {(name, 1.0): (weight,) for name, weight in features.WEIGHTS.items()}
    for name, weight in features.WEIGHTS_WITH_LOGITS.items():
        wanted[name, config.alpha] = (weight,)
    assert best == wanted


def test_rates_of_architectures_are_the_best_of_their_search():
    script = load(EXAMPLES / "22_architectures.py")
    rows = read("architectures_tuning")["results"]
    errors_of = {}  # {(role, architecture): {rate: errors}}; two rates were tried twice
    for row in rows:
        rates = errors_of.setdefault((row["name"], row["architecture"]), {})
        rates[row["learning_rate"]] = sum(row["errors"])
    for role, rates in (
        ("baseline", script.BASELINE_RATES),
        ("distilled", script.DISTILLED_RATES),
        ("teacher", script.TEACHER_RATES),
    ):
        for architecture, rate in rates.items():
            if (role, architecture) != ("teacher", "cnn"):  # script 13's
                tried = errors_of[role, architecture]
                assert rate == min(tried, key=tried.get)
    trials = [(row["name"], row["architecture"]) for row in rows]
    for architecture in script.STUDENTS:
        assert trials.count(("baseline", architecture)) == 4
        assert trials.count(("distilled", architecture)) == 4


def test_settings_of_views_are_those_of_their_search(many):
    """Temperature and alpha are script 15's, at most ten errors behind the best."""
    patient = load(EXAMPLES / "26_patient_teacher.py")
    clothes = many._replace(name="fashion_mnist")
    config = patient.fill_in_defaults(patient.Config(), clothes)
    rows = read("patient_tuning")["results"]
    mean_errors = {}  # {(rate, temperature, alpha): mean errors}, of students with a teacher
    errors_of_rate = {}  # {rate: errors over all lengths}, of the baseline
    for row in rows:
        rate = row["learning_rate"]
        if row["name"] == "baseline":
            errors_of_rate[rate] = errors_of_rate.get(rate, 0) + sum(row["errors"])
        else:
            mean_errors[rate, row["temperature"], row["alpha"]] = np.mean(row["errors"])
    recipe = patient.views_recipe(config, clothes, True, 0, 1000, 60)
    chosen = mean_errors[recipe.learning_rate, config.temperature, config.alpha]
    assert chosen <= min(mean_errors.values()) + 10
    first = {key: errors for key, errors in mean_errors.items() if key[1:] == (4.0, 0.5)}
    assert chosen == min(first.values())
    recipe = patient.views_recipe(config, clothes, False, 0, 1000, 60)
    assert recipe.learning_rate == min(errors_of_rate, key=errors_of_rate.get)
    trials = [row["name"] for row in rows]
    assert trials.count("baseline") >= trials.count("same view")


def test_the_rates_of_compressions_are_the_best_of_their_search():
    """Of all students whose weights a compression trains further the chosen rate has the fewest
    errors: with all labels over all of them, with 1,000 labels each has its own."""
    script = load(EXAMPLES / "23_compress_and_deploy.py")
    recipe = experiment.Recipe(0, 4, 128, 2e-2, "onecycle")
    tried = errors_of_rates()
    for labels, student in (
        ("all", "all three"),
        (1000, "baseline"),
        (1000, "distilled"),
        (1000, script.LEFT_OUT),
    ):
        count = 60_000 if labels == "all" else labels
        left_out = student == script.LEFT_OUT
        chosen = script.compression_recipe(script.Config(), recipe, count, left_out).learning_rate
        totals = {rate: sum(errors) for rate, errors in tried[labels, student].items()}
        assert chosen == min(totals, key=totals.get), (labels, student)
