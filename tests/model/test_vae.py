"""The streaming Wan VAE: equal to ComfyUI's own, in any chunking, with a state that does not grow."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from packforcing.errors import PackForcingError
from packforcing.model.vae import (
    StreamingDecoder,
    StreamingEncoder,
    WanVAE,
    denormalise,
    encode_clip,
    init_vae,
    load_vae,
    normalise,
)
from packforcing.model.vae_convolutions import FastOnCPU
from packforcing.model.vae_norms import RMSNorm, on_rows, rms_norm, rms_norm_silu

LATENT_FRAMES = 7
FRAMES = 1 + 4 * (LATENT_FRAMES - 1)
CELLS = 2, 3  # a latent frame's height and width: unequal, so that a swap shows


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_vae() -> WanVAE:
    """A tiny VAE whose every parameter matters: gammas away from 1 and biases away from 0."""
    vae = init_vae(dim=8, seed=3).requires_grad_(False)
    for i, (name, parameter) in enumerate(vae.named_parameters()):
        if name.endswith(("gamma", "bias")):
            parameter += 0.2 * seeded(*parameter.shape, seed=i)
    return vae


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return make_vae()


@pytest.fixture(scope="module")
def z() -> Tensor:
    """Two videos of normalised latents."""
    return seeded(2, 16, LATENT_FRAMES, *CELLS)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return seeded(2, 3, FRAMES, 8 * CELLS[0], 8 * CELLS[1]).clamp(-1, 1)


@pytest.fixture(scope="module")
def decoded(vae: WanVAE, z: Tensor) -> Tensor:
    """The whole clip in one call."""
    return StreamingDecoder(vae).decode(z)


@pytest.fixture(scope="module")
def encoded(vae: WanVAE, pixels: Tensor) -> Tensor:
    return encode_clip(vae, pixels)


@pytest.fixture(scope="module")
def reference(comfy, vae: WanVAE) -> torch.nn.Module:
    """ComfyUI's VAE with the same weights."""
    from comfy.ldm.wan.vae import WanVAE as ComfyVAE

    model = ComfyVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    model.load_state_dict(vae.state_dict())
    return model.eval().requires_grad_(False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to float32 rounding: within 1e-4 of the expected tensor's scale."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def decode_in(decoder: StreamingDecoder, z: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([decoder.decode(chunk) for chunk in z.split(sizes, dim=2)], dim=2)


def encode_in(encoder: StreamingEncoder, pixels: Tensor, latent_sizes: list[int]) -> Tensor:
    frames = [4 * size for size in latent_sizes]
    frames[0] -= 3
    return torch.cat([encoder.encode(chunk) for chunk in pixels.split(frames, dim=2)], dim=2)


def blocks(size: int, total: int = LATENT_FRAMES) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def chunkings(total: int = LATENT_FRAMES) -> st.SearchStrategy[list[int]]:
    """All ways to cut `total` frames into chunks, as chunk sizes."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda at: [b - a for a, b in zip([0, *sorted(at)], [*sorted(at), total], strict=True)])


# --- against ComfyUI --------------------------------------------------------------------------------


def test_keys_and_shapes_are_the_checkpoints(reference, vae):
    ours = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize("sizes", [blocks(7), blocks(1), blocks(3), blocks(4), [2, 1, 4], [1, 5, 1]], ids=str)
def test_decoding_in_blocks_is_comfyuis_whole_clip(reference, vae, z, sizes):
    expected = reference.decode(denormalise(z))
    assert expected.abs().max() > 1, "the clamp should be at work"
    assert_close(decode_in(StreamingDecoder(vae), z, sizes), expected.clamp(-1, 1))


@pytest.mark.parametrize("sizes", [blocks(7), blocks(1), blocks(3), [2, 1, 4]], ids=str)
def test_encoding_in_blocks_is_comfyuis_whole_clip(reference, vae, pixels, sizes):
    expected = normalise(reference.encode(pixels))
    assert_close(encode_in(StreamingEncoder(vae), pixels, sizes), expected)


def test_a_single_image_is_a_video_of_one_frame(reference, vae, z, pixels):
    image, latent = pixels[:, :, :1], z[:, :, :1]
    assert_close(encode_clip(vae, image), normalise(reference.encode(image)))
    assert_close(StreamingDecoder(vae).decode(latent), reference.decode(denormalise(latent)).clamp(-1, 1))


def test_latent_convention_is_comfyuis(comfy, z):
    from comfy.latent_formats import Wan21

    assert_close(denormalise(z), Wan21().process_out(z))
    assert_close(normalise(z), Wan21().process_in(z))


# --- streaming --------------------------------------------------------------------------------------


@given(sizes=chunkings(), per_pass=st.none() | st.integers(1, 8))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_chunking_decodes_the_same(vae, z, decoded, sizes, per_pass):
    assert_close(decode_in(StreamingDecoder(vae, frames_per_pass=per_pass), z, sizes), decoded)


@given(sizes=chunkings(), per_pass=st.none() | st.integers(1, 8))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_chunking_encodes_the_same(vae, pixels, encoded, sizes, per_pass):
    assert_close(encode_in(StreamingEncoder(vae, frames_per_pass=per_pass), pixels, sizes), encoded)


def test_first_call_gives_three_frames_fewer(vae, z):
    decoder = StreamingDecoder(vae)
    first, second = decoder.decode(z[:, :, :4]), decoder.decode(z[:, :, 4:])
    assert first.shape == (2, 3, 13, 16, 24)
    assert second.shape == (2, 3, 12, 16, 24)


def test_reset_starts_a_new_video(vae, z, decoded):
    decoder = StreamingDecoder(vae)
    decoder.decode(seeded(1, 16, 2, 4, 4))
    decoder.reset()
    assert not decoder.started
    assert torch.equal(decoder.decode(z), decoded)


@pytest.mark.parametrize("resume", ["clone", "state", "file"])
def test_a_resumed_stream_gives_the_same_bits(vae, z, pixels, resume, tmp_path):
    def twin(stream):
        if resume == "clone":
            return stream.clone()
        state = stream.state
        if resume == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        other = type(stream)(vae)
        other.state = state
        return other

    decoder, encoder = StreamingDecoder(vae), StreamingEncoder(vae)
    decoder.decode(z[:, :, :3])
    encoder.encode(pixels[:, :, :9])
    later_decoder, later_encoder = twin(decoder), twin(encoder)
    # The originals run first: the twins must not notice.
    for size in (1, 2):
        assert torch.equal(decoder.decode(z[:, :, 3 : 3 + size]), later_decoder.decode(z[:, :, 3 : 3 + size]))
        chunk = pixels[:, :, 9 : 9 + 4 * size]
        assert torch.equal(encoder.encode(chunk), later_encoder.encode(chunk))


def storage_bytes(state: dict[str, Tensor]) -> int:
    """What the state keeps alive: whole storages, so that a view of something large counts as the large thing."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in state.values()}
    return sum(storage.nbytes() for storage in storages.values())


def test_state_does_not_grow(vae):
    decoder, encoder = StreamingDecoder(vae), StreamingEncoder(vae)
    sizes = []
    for block in range(30):
        frames = decoder.decode(seeded(1, 16, 1, 1, 1, seed=block))
        encoder.encode(frames)
        sizes.append((storage_bytes(decoder.state), storage_bytes(encoder.state)))
    assert sizes[2] == sizes[29]
    assert len(set(sizes)) == 1, "the size is settled by the first block"

    longer = StreamingDecoder(vae)
    longer.decode(seeded(1, 16, 6, 1, 1))
    assert storage_bytes(longer.state) == sizes[0][0], "nor does it depend on the chunk's length"


def test_after_a_failure_within_a_chunk_a_stream_goes_on_from_an_earlier_state_only(vae, z, decoded):
    decoder = StreamingDecoder(vae, frames_per_pass=1)
    start = decoder.decode(z[:, :, :4])
    earlier = decoder.state

    calls = []

    def run_out_of_memory(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")

    hook = vae.decoder.head.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode(z[:, :, 4:])
    hook.remove()
    for use in (lambda: decoder.decode(z[:, :, 4:]), decoder.clone, lambda: decoder.state, lambda: decoder.started):
        with pytest.raises(PackForcingError, match="lost its place in the video: call reset"):
            use()
    decoder.state = earlier
    assert_close(torch.cat([start, decoder.decode(z[:, :, 4:])], dim=2), decoded)


def test_bfloat16_stays_finite_and_near(vae, z, decoded):
    half = load_vae(vae.state_dict(), dtype=torch.bfloat16)
    frames = decode_in(StreamingDecoder(half), z, blocks(3))
    assert frames.dtype == torch.bfloat16
    assert (frames.float() - decoded).abs().mean() < 0.05
    assert encode_clip(half, frames).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_an_all_zero_pixel_is_zero(dtype):
    norm = RMSNorm(8, axes=3).to(dtype)
    assert torch.equal(norm(torch.zeros(1, 8, 1, 2, 2, dtype=dtype)), torch.zeros(1, 8, 1, 2, 2, dtype=dtype))


# --- training ---------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter():
    vae = init_vae(dim=8, seed=0)
    pixels = seeded(1, 3, 9, 16, 16).clamp(-1, 1)
    mean, log_variance = vae.encode(pixels)
    assert mean.shape == log_variance.shape == (1, 16, 3, 2, 2)
    raw = mean + (0.5 * log_variance).exp() * seeded(*mean.shape)
    (vae.decode(raw) - pixels).square().mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_in_chunks_gives_the_whole_clips_gradient(vae, z):
    def gradient(sizes: list[int]) -> Tensor:
        raw = z[:1, :, :3].clone().requires_grad_()
        history = {}
        frames = [vae.decode(chunk, history) for chunk in raw.split(sizes, dim=2)]
        torch.cat(frames, dim=2).square().sum().backward()
        return raw.grad

    assert_close(gradient([1, 2]), gradient([3]))


# --- weights ----------------------------------------------------------------------------------------


def test_init_is_the_same_everywhere():
    first, again, other = init_vae(8, seed=5), init_vae(8, seed=5), init_vae(8, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.conv2.weight, other.conv2.weight)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    # Pinned, so that a change of order or of formula shows.
    assert first.encoder.conv1.weight[0, 0, 0, 0, 0].item() == 0.12711401283740997
    assert first.decoder.head[2].bias[2].item() == -0.00870511308312416


def test_init_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    init_vae(8, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dim", [8, 16])
def test_init_gives_a_visible_picture(dim):
    frames = StreamingDecoder(init_vae(dim)).decode(seeded(1, 16, 2, 4, 4))
    assert frames.isfinite().all()
    assert 0.2 < frames.std() < 0.9


def test_loading_shares_the_tensors_and_finds_the_width():
    source = init_vae(dim=10).state_dict()
    loaded = load_vae(source)
    assert loaded.decoder.head[0].gamma.shape[0] == 10
    for name, tensor in loaded.state_dict().items():
        assert tensor.data_ptr() == source[name].data_ptr(), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_with_another_dtype_leaves_the_source_alone(vae):
    loaded = load_vae(vae.state_dict(), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert vae.dtype == torch.float32


def without(state_dict: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if name != key}


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    message = str(error.value)
    return message.endswith(".") and "\n" not in message and ". " not in message.replace("2.1 ", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda sd: {"decoder.upsamples.0.upsamples.0.residual.2.weight": torch.ones(1), **sd},
            "Wan 2.2 VAE",
        ),
        (lambda sd: {"decoder.22.bias": torch.ones(3)}, "TAEHV"),
        (lambda sd: {"decoder.conv_in.weight": torch.ones(1)}, "image VAE"),
        (lambda sd: {"decoder.conv_in.conv.weight": torch.ones(1)}, "Hunyuan"),
        (lambda sd: {f"vae.{name}": tensor for name, tensor in sd.items()}, "'vae.encoder.conv1.weight'"),
        (lambda sd: {}, "empty"),
        (lambda sd: without(sd, "conv2.bias"), "1 of its 194 tensors are missing, 'conv2.bias'"),
        (lambda sd: {**sd, "encoder.extra": torch.ones(1)}, "1 tensors too many, 'encoder.extra'"),
        (
            lambda sd: {**sd, "conv2.weight": torch.ones(8, 8, 1, 1, 1)},
            "[8, 8, 1, 1, 1] where [16, 16, 1, 1, 1]",
        ),
    ],
)
def test_loading_another_file_says_what_it_is(vae, change, said):
    with pytest.raises(PackForcingError) as error:
        load_vae(change(vae.state_dict()))
    assert said in str(error.value)
    assert "connect a Wan 2.1 VAE" in str(error.value)
    assert one_sentence(error)


# --- errors of the streams --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 4, 16, 16), "1 + 4k frames (1, 5, 9, ...), but 4 were given"),
        ((1, 3, 0, 16, 16), "but 0 were given"),
        ((1, 4, 5, 16, 16), "[1, 4, 5, 16, 16]"),
        ((3, 5, 16, 16), "[3, 5, 16, 16]"),
        ((1, 3, 5, 16, 20), "multiples of 8, but the frames are 16 x 20"),
    ],
)
def test_pixels_of_a_wrong_shape(vae, shape, said):
    for encode in (StreamingEncoder(vae).encode, vae.encode):
        with pytest.raises(PackForcingError) as error:
            encode(torch.zeros(shape))
        assert said in str(error.value)
        assert one_sentence(error)


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_later_frames_come_in_fours(vae, frames):
    encoder = StreamingEncoder(vae)
    encoder.encode(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(PackForcingError, match=rf"4k frames \(4, 8, 12, ...\), but {frames} were given"):
        encoder.encode(torch.zeros(1, 3, frames, 8, 8))
    assert encoder.encode(torch.zeros(1, 3, 4, 8, 8)).shape == (1, 16, 1, 1, 1)


@pytest.mark.parametrize("shape", [(1, 48, 2, 2, 2), (16, 2, 2, 2), (1, 16, 0, 2, 2)], ids=str)
def test_latents_of_a_wrong_shape(vae, shape):
    with pytest.raises(PackForcingError) as error:
        StreamingDecoder(vae).decode(torch.zeros(shape))
    assert one_sentence(error)


@pytest.mark.parametrize("shape", [(2, 16, 1, 1, 1), (1, 16, 1, 1, 2), (1, 16, 1, 2, 1)], ids=str)
def test_a_video_does_not_change_size(vae, shape):
    decoder = StreamingDecoder(vae)
    decoder.decode(torch.zeros(1, 16, 1, 1, 1))
    with pytest.raises(PackForcingError, match="reset") as error:
        decoder.decode(torch.zeros(shape))
    assert one_sentence(error)


def test_a_state_of_another_stream_is_refused(vae):
    encoder, decoder = StreamingEncoder(vae), StreamingDecoder(vae)
    encoder.encode(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(PackForcingError, match="decoder stream"):
        decoder.state = encoder.state
    assert not decoder.started


def test_frames_per_pass_is_at_least_one(vae):
    with pytest.raises(PackForcingError, match="but 0 was given"):
        StreamingDecoder(vae, frames_per_pass=0)


# --- memory formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_lie_last_in_all_that_convolutions_read(vae, batch, monkeypatch):
    """But for the first one of each half, which reads what it is given: pixels, or 16 channels."""
    twin, others = load_vae(vae.state_dict()).to_layout(channels_last=True), []
    given = {twin.conv2, twin.encoder.conv1}

    def noted(layer, x, *weights, convolved=FastOnCPU._conv_forward):
        last = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        if layer not in given and not x.is_contiguous(memory_format=last):
            others.append(layer)
        return convolved(layer, x, *weights)

    monkeypatch.setattr(FastOnCPU, "_conv_forward", noted)
    z = seeded(batch, 16, 9, 5, 7)
    frames = decode_in(StreamingDecoder(twin), z, [1, 3, 5])
    StreamingEncoder(twin, frames_per_pass=2).encode(frames)
    assert others == []
    monkeypatch.undo()
    assert_close(frames, StreamingDecoder(vae).decode(z))


# --- compiled -----------------------------------------------------------------------------------------


def test_norms_are_compiled_for_all_layers_at_once(vae, compiled_graphs):
    """The same pictures; two functions, compiled far fewer times than PyTorch's limit of 8, in both memory formats."""
    z = seeded(1, 16, 9, 5, 7)
    whole = StreamingDecoder(vae).decode(z)
    for channels_last in (False, True):
        twin = load_vae(vae.state_dict()).to_layout(channels_last)
        twin.compile_norms()
        assert_close(decode_in(StreamingDecoder(twin), z, [1, 3, 5]), whole)
    assert set(compiled_graphs) == {"rms_norm", "rms_norm_silu"}
    assert compiled_graphs.count("rms_norm_silu") <= 4


@pytest.mark.parametrize("function", [rms_norm, rms_norm_silu])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 2, 3, 4, 1), (4, 2, 0, 1, 3)], ids=str)
@pytest.mark.parametrize("out_order", [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1)], ids=str)
@pytest.mark.parametrize("first", [0, 2])
def test_norms_on_rows_are_norms(order, out_order, first, function):
    """Whatever the orders of the axes in memory, and also into a part of a tensor, of which the rest stays."""
    shape = (2, 3, 4, 5, 6)

    def ordered(axes, shape):
        return seeded(*(shape[axis] for axis in axes)).permute([axes.index(axis) for axis in range(5)])

    x, gamma = ordered(order, shape), 1 + seeded(3, 1, 1, 1)
    whole = ordered(out_order, (2, 3, first + 4, 5, 6))
    before = whole[:, :, :first].clone()
    on_rows(function, x, gamma, whole[:, :, first:])
    assert_close(whole[:, :, first:], norm_by_definition(x, gamma, silu=function is rms_norm_silu))
    assert torch.equal(whole[:, :, :first], before)
    frames, out = x[:, :, 1], whole[:, :, 1]
    on_rows(function, frames, gamma[..., 0], out)
    assert_close(out, norm_by_definition(frames, gamma[..., 0], silu=function is rms_norm_silu))


def norm_by_definition(x, gamma, silu):
    """Wan's: F.normalize over the channels, times sqrt(C) gamma."""
    y = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma
    return F.silu(y) if silu else y
