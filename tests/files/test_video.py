"""Files that are written while they grow: what is read back, what survives, and what is refused."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import av
import numpy as np
import pytest
import torch

from packforcing.errors import PackForcingError
from packforcing.files import growing_file
from packforcing.files.video import VideoWriter, _Encoder, probe, read_video
from packforcing.pixels import to_uint8

WIDTH, HEIGHT = 96, 64


def smooth_frames(count: int, first: int = 0) -> torch.Tensor:
    """[3, count, HEIGHT, WIDTH] in [-1, 1]: ramps in x and y, and a slow wave in time."""
    x = torch.linspace(-1, 1, WIDTH).expand(HEIGHT, WIDTH)
    y = torch.linspace(-1, 1, HEIGHT)[:, None].expand(HEIGHT, WIDTH)
    waves = [torch.full_like(x, np.sin((first + i) / 9)) for i in range(count)]
    return torch.stack([torch.stack([x, y, wave]) for wave in waves], dim=1)


def write(path, frames: torch.Tensor, fps: float = 16, **options) -> None:
    with VideoWriter(path, fps, frames.shape[-1], frames.shape[-2], **options) as writer:
        writer.write(frames)


def stream_facts(path) -> tuple[str, str, int]:
    """Codec, pixel format and start time of the video stream."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.codec_context.name, stream.codec_context.pix_fmt, stream.start_time


def test_bytes_are_rounded_and_clipped():
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    for dtype in (torch.float32, torch.float64):
        assert to_uint8(values.to(dtype))[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_every_byte_survives_the_conversion():
    levels = torch.arange(256)
    frames = (levels / 127.5 - 1).view(1, 256, 1, 1).expand(3, 256, 1, 1)
    assert torch.equal(to_uint8(frames)[:, 0, 0, 1], levels.to(torch.uint8))


def test_frames_come_back_in_order_and_close(tmp_path):
    path = tmp_path / "video.mp4"
    batches = [smooth_frames(13), smooth_frames(16, 13)[None], smooth_frames(40, 29).to(torch.bfloat16).float()]
    with VideoWriter(path, 16, WIDTH, HEIGHT) as writer:
        for batch in batches:
            writer.write(batch)
        assert writer.frames == 69
    frames, fps = read_video(path)
    expected = np.concatenate([to_uint8(batch.reshape(3, -1, HEIGHT, WIDTH)).numpy() for batch in batches])
    assert frames.shape == (69, HEIGHT, WIDTH, 3)
    assert fps == 16
    difference = np.abs(frames.astype(int) - expected)
    assert difference.mean() < 2
    assert difference.max() < 16
    # Each frame lies nearest to the frame it was made from, by its wave, so none is lost, doubled or swapped.
    wave = np.sin(np.arange(69) / 9)
    assert np.abs(frames[..., 2].mean(axis=(1, 2)) / 127.5 - 1 - wave).max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_taken(tmp_path, dtype):
    write(tmp_path / "video.mp4", smooth_frames(3).to(dtype))
    frames, _ = read_video(tmp_path / "video.mp4")
    assert np.abs(frames.astype(int) - to_uint8(smooth_frames(3)).numpy()).mean() < 3


@pytest.mark.parametrize("colour", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, 1), (-1, -1, -1), (0.0, 0.5, -0.5)])
def test_colours_are_kept(tmp_path, colour):
    frames = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1, 1).expand(3, 4, 32, 32)
    write(tmp_path / "video.mp4", frames)
    found = read_video(tmp_path / "video.mp4")[0].mean(axis=(0, 1, 2))
    assert np.abs(found - (np.array(colour) + 1) * 127.5).max() < 4


@pytest.mark.parametrize("fps", [16, 23.976, 24000 / 1001, 25.0, 0.5])
def test_the_frame_rate_is_exact(tmp_path, fps):
    path = tmp_path / "video.mp4"
    write(path, smooth_frames(20), fps)
    info = probe(path)
    assert (info.frames, info.fps, info.width, info.height) == (20, fps, WIDTH, HEIGHT)
    assert info.seconds == pytest.approx(20 / fps, rel=1e-6)
    assert read_video(path)[1] == fps


def test_a_closed_file_is_an_ordinary_seekable_mp4(tmp_path):
    path = tmp_path / "video.mp4"
    write(path, smooth_frames(50))
    data = path.read_bytes()
    assert b"moof" not in data
    assert 0 < data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    assert stream_facts(path) == ("h264", "yuv420p", 0)
    assert os.listdir(tmp_path) == ["video.mp4"], "no temporary file stays"


def test_metadata_is_stored(tmp_path):
    path = tmp_path / "video.mp4"
    write(path, smooth_frames(3), metadata={"comment": "a fox, größer\nthan 'life'", "prompt": {"seed": 7}})
    with av.open(str(path)) as container:
        tags = dict(container.metadata)
    assert tags["comment"] == "a fox, größer\nthan 'life'"
    assert tags["prompt"] == '{"seed": 7}'


def test_a_lower_crf_makes_a_larger_file(tmp_path):
    noise = torch.rand(3, 8, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = []
    for crf in (10, 40):
        write(tmp_path / f"{crf}.mp4", noise, crf=crf)
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > 2 * sizes[1]


def test_an_exception_in_the_body_leaves_a_finished_file(tmp_path):
    path = tmp_path / "video.mp4"

    def interrupted_run():
        with VideoWriter(path, 16, WIDTH, HEIGHT) as writer:
            writer.write(smooth_frames(21))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted_run()
    assert probe(path).frames == len(read_video(path)[0]) == 21
    assert b"moof" not in path.read_bytes()


def test_no_frame_leaves_no_file(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", 16, WIDTH, HEIGHT):
        pass
    assert os.listdir(tmp_path) == []


def test_an_older_file_stays_until_the_first_frame(tmp_path):
    path = tmp_path / "video.mp4"
    write(path, smooth_frames(5))
    with pytest.raises(RuntimeError), VideoWriter(path, 16, WIDTH, HEIGHT):
        raise RuntimeError("no block was made")
    assert probe(path).frames == 5
    write(path, smooth_frames(7))
    assert probe(path).frames == 7


def test_what_a_killed_run_left_is_not_taken_for_the_video(tmp_path):
    """A whole video under the name with `.part`, as when a run is killed while it makes its file seekable."""
    write(tmp_path / "b.mp4.part", smooth_frames(40, first=90))
    write(tmp_path / "a.mp4", frames := smooth_frames(20))
    wanted = (tmp_path / "a.mp4").read_bytes()
    write(tmp_path / "b.mp4", frames)
    assert (tmp_path / "b.mp4").read_bytes() == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


def test_what_a_killed_run_left_and_somebody_holds_is_told(tmp_path, monkeypatch):
    def busy(path, missing_ok):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(growing_file.Path, "unlink", busy)
    with pytest.raises(PackForcingError, match="is there from an earlier run, and cannot be removed"):
        growing_file.GrowingFile(tmp_path / "b.mp4")


def test_a_file_under_the_final_name_is_never_empty(tmp_path, monkeypatch):
    """Looked at after each frame that is encoded; short videos get their name at the end."""
    path = tmp_path / "video.mp4"
    write(path, smooth_frames(9))
    encode, seen = _Encoder._mux, []

    def watched(encoder, frame):
        encode(encoder, frame)
        seen.append((path.read_bytes(), len(read_video(path)[0])))

    monkeypatch.setattr(_Encoder, "_mux", watched)
    write(path, smooth_frames(40))
    first = seen[0]
    assert first[1] == 9
    grown = [frames for content, frames in seen if content != first[0]]
    assert all(after - before >= 0 for before, after in itertools.pairwise(grown))
    assert len(grown) > 20
    assert grown[0] >= 1
    assert probe(path).frames == 40


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    path = tmp_path / "video.mp4"
    path.symlink_to("there/real.mp4")
    write(path, smooth_frames(5))
    assert path.is_symlink()
    assert probe(tmp_path / "there" / "real.mp4").frames == 5
    assert os.listdir(tmp_path / "there") == ["real.mp4"]


@pytest.mark.parametrize("name", ["file:x.mp4", "take:1.mp4", "http:a.mp4", "-x.mp4", "pipe:1", "a b%d?.mp4"])
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(name, smooth_frames(5))
    assert os.listdir(tmp_path) == [name]
    assert len(read_video(name)[0]) == probe(name).frames == 5


def test_the_encoder_works_without_macroblock_trees(tmp_path):
    """They make equal frames into files that differ now and then. x264 writes its options into the stream."""
    write(tmp_path / "video.mp4", smooth_frames(3))
    options = (tmp_path / "video.mp4").read_bytes().partition(b"options: ")[2]
    assert b" mbtree=0 crf=21.0 " in options.replace(b"rc=crf ", b"").replace(b"rc_lookahead=0 ", b"")


def test_a_killed_writer_leaves_a_file_that_plays(tmp_path):
    path = tmp_path / "video.mp4"
    program = textwrap.dedent(
        f"""
        import sys, time, torch
        from packforcing.files.video import VideoWriter
        writer = VideoWriter(sys.argv[1], 16, {WIDTH}, {HEIGHT})
        while True:
            writer.write(torch.rand(3, 16, {HEIGHT}, {WIDTH}) * 2 - 1)
            print(writer.frames, flush=True)
            time.sleep(0.05)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        while int(child.stdout.readline()) < 192:
            pass
        deadline = time.monotonic() + 10
        while path.stat().st_size < 50_000 and time.monotonic() < deadline:  # the encoder may be behind
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    frames, fps = read_video(path)
    assert frames.shape[1:] == (HEIGHT, WIDTH, 3)
    assert len(frames) >= 16
    assert fps == 16


def test_a_file_that_breaks_off_gives_what_is_before_the_break(tmp_path):
    path = tmp_path / "video.mp4"
    write(path, torch.rand(3, 48, HEIGHT, WIDTH) * 2 - 1)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert 10 < len(read_video(path)[0]) < 40


def test_a_full_disk_is_told_and_ends_nothing_else(tmp_path):
    path = tmp_path / "video.mp4"
    path.symlink_to("/dev/full")
    with pytest.raises(PackForcingError, match="No space left"):
        write(path, smooth_frames(320))


def test_a_disk_that_fills_up_keeps_the_frames_before(tmp_path):
    path = tmp_path / "video.mp4"
    program = textwrap.dedent(
        f"""
        import resource, signal, sys, torch
        from packforcing.errors import PackForcingError
        from packforcing.files.video import VideoWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            with VideoWriter(sys.argv[1], 16, {WIDTH}, {HEIGHT}) as writer:
                while True:
                    writer.write(torch.rand(3, 16, {HEIGHT}, {WIDTH}) * 2 - 1)
        except PackForcingError as error:
            print("told:", error)
        """
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "told: Writing the video" in run.stdout
    assert len(read_video(path)[0]) >= 16


def test_an_error_of_the_thread_is_raised_by_write_or_close(tmp_path):
    writer = VideoWriter(tmp_path / "video.mp4", 16, WIDTH, HEIGHT)

    def fail(frames):
        raise OSError("the disk went away")

    writer._encoder.encode = fail
    with pytest.raises(PackForcingError, match="the disk went away"):
        writer.write(smooth_frames(1600))  # more than the queue holds: `write` must raise, not hang
    with pytest.raises(PackForcingError, match="the disk went away"):
        writer.close()
    writer.close()


@pytest.mark.parametrize("error", [OSError("No space left on device"), None])
def test_a_failed_copy_keeps_the_whole_video(tmp_path, monkeypatch, caplog, error):
    def fail(source, target):
        target.write_bytes(b"half a file")
        if error:
            raise error

    monkeypatch.setattr("packforcing.files.video._copy_packets", fail)
    write(tmp_path / "video.mp4", smooth_frames(20))
    assert len(read_video(tmp_path / "video.mp4")[0]) == probe(tmp_path / "video.mp4").frames == 20
    assert os.listdir(tmp_path) == ["video.mp4"]
    assert "could not be made seekable" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fps": 0}, "frame rate must be above 0"),
        ({"fps": float("nan")}, "frame rate must be above 0"),
        ({"width": 33}, "even, but the size is 33x64"),
        ({"height": 0}, "even, but the size is 96x0"),
        ({"crf": 52}, "crf must lie in 0"),
        ({"path": "missing/video.mp4"}, "does not exist"),
        ({"path": "."}, "is a folder"),
    ],
)
def test_mistakes_are_told_before_any_frame(tmp_path, change, sentence):
    options = {"path": "video.mp4", "fps": 16, "width": WIDTH, "height": HEIGHT} | change
    options["path"] = tmp_path / options["path"]
    with pytest.raises(PackForcingError, match=sentence):
        VideoWriter(**options)
    assert os.listdir(tmp_path) == []


def test_a_file_name_the_system_refuses_is_told(tmp_path):
    with pytest.raises(PackForcingError, match="cannot be written to"):
        VideoWriter(tmp_path / ("x" * 300 + ".mp4"), 16, WIDTH, HEIGHT)


def test_a_nearly_full_disk_is_told_before_any_frame(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(PackForcingError, match=r"1\.0 MiB free"):
        VideoWriter(tmp_path / "video.mp4", 16, WIDTH, HEIGHT)


@pytest.mark.parametrize("shape", [(3, 4, 64, 64), (1, 4, HEIGHT, WIDTH), (2, 3, 4, HEIGHT, WIDTH), (3, HEIGHT, WIDTH)])
def test_frames_of_another_shape_are_refused(tmp_path, shape):
    with (
        VideoWriter(tmp_path / "video.mp4", 16, WIDTH, HEIGHT) as writer,
        pytest.raises(PackForcingError, match=r"must have the shape \[3, F, 64, 96\]"),
    ):
        writer.write(torch.zeros(shape))


def test_a_closed_writer_takes_no_frame(tmp_path):
    writer = VideoWriter(tmp_path / "video.mp4", 16, WIDTH, HEIGHT)
    writer.write(smooth_frames(2))
    writer.close()
    with pytest.raises(PackForcingError, match="closed already"):
        writer.write(smooth_frames(2))


def test_reading_what_is_no_video_is_told(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for path in (tmp_path / "text.mp4", tmp_path / "missing.mp4"):
        for read in (read_video, probe):
            with pytest.raises(PackForcingError, match="cannot be opened"):
                read(path)
