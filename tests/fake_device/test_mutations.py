"""The suite fails when any one tensor of the path is made on the wrong device, or a copy is not waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_generate
import test_training
from device_cases import on_cpu, started_on_cpu, state_on_cpu
from device_trainers import step_on_cpu
from fake_device import Refused
from mutations import Mutation

from packforcing import devices
from packforcing.cache.archive import Archive
from packforcing.cache.cache import Cache
from packforcing.cache.fp8_kv import Fp8Buffer
from packforcing.cache.kv_buffer import KVBuffer
from packforcing.cache.rope import Rotation
from packforcing.cache.rotations import BlockRotations
from packforcing.generate.decoding import BlockDecoder
from packforcing.generate.long_video import LongVideo
from packforcing.generate.side_stream import SideStream
from packforcing.model import vae_latents
from packforcing.model.causal_wan import CausalWan
from packforcing.training.base import BaseTrainer
from packforcing.training.self_rollout import NoiseSource


@dataclass(frozen=True)
class Check:
    """A test that must see what is wrong. Its reference is made before, or it would be wrong as well."""

    test: Callable[[], None]
    reference: Callable[[], object] = lambda: None


def case(name: str) -> Check:
    test = test_generate.test_a_video_on_the_device_is_that_of_the_cpu
    return Check(lambda: test(name), lambda: on_cpu(name))


def step(part: str) -> Check:
    test = test_training.test_a_step_on_the_device_is_that_of_the_cpu
    return Check(lambda: test(part), lambda: step_on_cpu(part))


STATE = Check(test_generate.test_a_state_goes_on_without_waiting, state_on_cpu)
START_IMAGE = Check(test_generate.test_a_start_image_is_encoded_on_the_device, started_on_cpu)
DROPPED_FRAMES = Check(test_generate.test_frames_may_be_dropped_while_the_device_reads_them)

# What is made in the wrong place, and the test that must see it.
PLACES = [
    (Mutation(LongVideo._noise, "to_device(", "(lambda x, device: x)("), case("plain")),
    (Mutation(LongVideo._taken, "to_device(given, self.wan.device, torch.float32)", "given.float()"), STATE),
    (Mutation(CausalWan._modulations, "to_device(time_features", "(lambda x, *_: x)(time_features"), case("plain")),
    (Mutation(CausalWan.embed_text, "to_device(self.padded", "(lambda x, *_: x)(self.padded"), case("plain")),
    (Mutation(CausalWan._unpatchify, "tokens.to(", "tokens.cpu().to("), case("plain")),
    (Mutation(Rotation.to, "to_device(self.sin, device)", "self.sin"), case("plain")),
    (Mutation(BlockRotations.by_time, ".to(self._device)", ""), case("plain")),
    (Mutation(BlockRotations._to_mid, ".to(self._device)", ""), case("plain")),
    (Mutation(Cache.__init__, "self._sampled = to_device(", "self._sampled = (lambda x, *_: x)("), case("plain")),
    (Mutation(Cache._allocate, "self.heads, model.head_dim), device=self.device", "self.heads, model.head_dim)"),
     case("plain")),
    (Mutation(Cache._allocate, "device=self.device,\n        dtype=self.kept", "dtype=self.kept"), case("plain")),
    (Mutation(KVBuffer.__init__, "self.values = torch.empty(shape, device=device", "self.values = torch.empty(shape"),
     case("plain")),
    (Mutation(Fp8Buffer.write, "saturated(values))", "saturated(values.cpu()))"), case("fp8")),
    (Mutation(Archive._keep_key_sums, "key_sums.new_empty((16", "key_sums.cpu().new_empty((16"), case("plain")),
    (Mutation(Archive.read, ".to(self.device, non_blocking=True)", ""), case("archive on the host")),
    (Mutation(Archive._pinned.fget, 'self.device.type == "cuda"', "False"), case("archive on the host")),
    (Mutation(vae_latents._latent_statistics, "to_device(", "(lambda x, device: x)("), START_IMAGE),
    (Mutation(NoiseSource.next, "to_device(", "(lambda x, device: x)("), step("forcing")),
    (Mutation(BaseTrainer.__init__, ".view(1, -1, 1, 1, 1).to(self.device)", ".view(1, -1, 1, 1, 1)"), step("base")),
]  # fmt: skip

# What is not waited for, or more often than it must be.
WAITS = [
    (Mutation(devices.from_device, "        there.synchronize()\n", ""), case("plain")),
    (Mutation(devices.from_device, 'x.to("cpu", non_blocking=True)', 'x.to("cpu")'), case("plain")),
    (Mutation(devices.to_device, "x.pin_memory().to(device, non_blocking=True)", "x.to(device)"), case("plain")),
    (Mutation(SideStream._run, "            self._stream.synchronize()\n", ""), case("overlap")),
    (Mutation(BlockDecoder._decoded, "frames.record_stream(", "str("), DROPPED_FRAMES),
    (Mutation(LongVideo._check_finite, "if not torch.isfinite(latents).all()", "if False"), case("overlap")),
    (Mutation(LongVideo._fill, "record.bytes =", "self.cache._key_sums.sum().item()\n    record.bytes ="),
     case("plain")),
]  # fmt: skip


MUTATIONS = [*PLACES, *WAITS]


@pytest.mark.parametrize(("mutation", "check"), MUTATIONS, ids=[str(mutation) for mutation, _ in MUTATIONS])
def test_a_wrong_placement_makes_the_suite_fail(mutation: Mutation, check: Check):
    """By what the device refuses, or by a count of waits."""
    check.reference()
    with mutation.applied(), pytest.raises((Refused, AssertionError)):
        check.test()
