"""A step of each trainer on a CUDA device: nothing lies on the wrong one, and the losses are the CPU's."""

from __future__ import annotations

from collections import Counter

import pytest
from device_trainers import TRAINERS, one_step, step_on_cpu
from fake_device import FakeDevice

# Where a batch is made on the host and sent.
BATCH = {
    f"packforcing/training/{place}"
    for place in (
        "base_samples.py:stacked",
        "prompts.py:<genexpr>",
        "compressor.py:_batch",
        "forcing_batch.py:draw_batch",
        "vae.py:<genexpr>",
    )
}
# Beside that the host waits for two numbers a turn: the gradient's norm, and the mean losses.
READ_BACK = {"packforcing/training/learner.py:clip_gradients", "packforcing/training/loop.py:_one_turn"}


@pytest.mark.parametrize("part", TRAINERS)
def test_a_step_on_the_device_is_that_of_the_cpu(part: str):
    wanted = step_on_cpu(part)
    with FakeDevice() as fake:
        trainer = TRAINERS[part]("cuda")
        before = len(fake.waits)
        found = one_step(trainer)
        waits = Counter(wait.where for wait in fake.waits[before:])
        for learner in trainer.learners.values():
            learner.state()
    assert found == pytest.approx(wanted, rel=2e-3)
    sent = {wait.where for wait in fake.waits[before:] if "to the device" in wait.what}
    assert sent <= BATCH
    assert set(waits) - sent == READ_BACK
    assert all(waits[where] == len(trainer.turns(0)) for where in READ_BACK)
