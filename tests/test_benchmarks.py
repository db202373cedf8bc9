"""What the benchmarks count on: the same networks, the work counted right, a clock that adds up."""

import time

import breakdown
import compare
import jax.numpy as jnp
import plain_loop
import pytest
from flax import nnx


def test_the_plain_loop_has_the_same_networks(kd):
    for plain, ours in (
        (plain_loop.Teacher(nnx.Rngs(0)), kd.TeacherCNN(rngs=nnx.Rngs(0))),
        (plain_loop.Student(nnx.Rngs(0)), kd.StudentCNN(rngs=nnx.Rngs(0))),
    ):
        shapes, others = (
            {path: x.shape for path, x in nnx.to_flat_state(nnx.state(net, nnx.Param))}
            for net in (plain, ours)
        )
        assert shapes == others


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_products_are_counted_right(kd, name, monkeypatch):
    counted = []

    def counting(layer):
        call = layer.__call__

        def count(self, x):
            y = call(self, x)
            # Each output is a product with all that leads to one channel.
            counted.append(y[0].size * self.kernel[...].size // y.shape[-1])
            return y

        monkeypatch.setattr(layer, "__call__", count)

    counting(nnx.Conv)
    counting(nnx.Linear)
    network = {"student": kd.StudentCNN, "teacher": kd.TeacherCNN}[name]
    network(rngs=nnx.Rngs(0))(jnp.zeros((1, 28, 28, 1)))
    assert counted[0] == compare.FIRST[name]
    assert sum(counted) == compare.FORWARD[name]


def test_a_ratio_is_taken_within_each_round():
    assert compare.ratio([1, 20, 3], [2, 10, 3]) == [1, 0.5, 2]


def test_parts_add_up_to_the_whole(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = breakdown.Clock()
    with clock.part("run"):
        now[0] += 1
        with clock.part("training"):
            now[0] += 10
            clock.compiled("/jax/core/compile/inner", 2)
            now[0] += 1
            clock.compiled("/jax/core/compile/outer", 4)  # holds the inner one
            clock.compiled("/jax/some/other/event", 5)
        now[0] += 3
    assert clock.seconds == {"compilation": 4, "training": 7, "run": 4}
