"""Videos side by side under their labels, and strips of frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from packforcing.errors import PackForcingError
from packforcing.files import side_by_side
from packforcing.files.side_by_side import Caption, Labelled, frames_at, join_side_by_side, label_band, strip
from packforcing.files.video import VideoWriter, frames_of, probe, read_video
from packforcing.pixels import from_uint8, to_uint8

SIZE = 64
RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 160, 40), (40, 40, 200), (120, 120, 120)


def plain(path, colours, fps: float = 16, width: int = SIZE, height: int = SIZE):
    """A video with a frame of each colour."""
    frames = np.array(colours, np.uint8)[:, None, None, :].repeat(height, 1).repeat(width, 2)
    with VideoWriter(path, fps, width, height, crf=4) as writer:
        writer.write(from_uint8(torch.from_numpy(frames)))
    return path


def close(picture: np.ndarray, colour) -> bool:
    return bool(np.abs(picture.reshape(-1, 3).mean(0) - np.array(colour)).max() < 8)


def test_bytes_come_back_through_the_models_numbers():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(2, 1, 256, 3)
    frames = from_uint8(levels)
    assert frames.shape == (3, 2, 1, 256)
    assert (frames.min(), frames.max()) == (-1, 1)
    assert torch.equal(to_uint8(frames), levels)


def test_each_video_has_its_place_and_the_shorter_holds_its_last_frame(tmp_path):
    long = plain(tmp_path / "a.mp4", [RED] * 10 + [GREEN] * 11, fps=24)
    short = plain(tmp_path / "b.mp4", [BLUE] * 5 + [GREY] * 4, fps=24)
    out = tmp_path / "both.mp4"
    assert join_side_by_side([Labelled(long, "long"), Labelled(short, "short")], out) == 21
    frames, fps = read_video(out)
    assert (len(frames), fps) == (21, 24)
    assert frames.shape[2] == 2 * SIZE + side_by_side.GAP
    left, right = frames[:, -SIZE:, :SIZE], frames[:, -SIZE:, -SIZE:]
    inner = slice(8, -8)  # away from the edges, which the encoder softens
    for number in range(21):
        assert close(left[number, inner, inner], RED if number < 10 else GREEN), number
        assert close(right[number, inner, inner], BLUE if number < 5 else GREY), number


def test_up_to_four_with_an_odd_sum_of_heights(tmp_path):
    videos = [Labelled(plain(tmp_path / f"{i}.mp4", [RED] * 3, width=66, height=34), f"number {i}") for i in range(4)]
    out = tmp_path / "all.mp4"
    join_side_by_side(videos, out)
    info = probe(out)
    band = label_band("number 0", 66).shape[0]
    assert info.width == 4 * 66 + 3 * side_by_side.GAP
    assert info.height - (34 + band) in (0, 1)
    assert info.height % 2 == 0


def test_a_few_frames_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """However long the videos are: what was read stays at most a chunk before what was written."""
    path, other = (plain(tmp_path / f"{name}.mp4", [RED] * 90) for name in "ab")
    read, most = [0], [0]

    def counted(path):
        for frame in frames_of(path):
            read[0] += 1
            yield frame

    class Watched(VideoWriter):
        def write(self, frames):
            super().write(frames)
            most[0] = max(most[0], read[0] - 2 * self.frames)

    monkeypatch.setattr(side_by_side, "frames_of", counted)
    monkeypatch.setattr(side_by_side, "VideoWriter", Watched)
    told: list[tuple[int, int]] = []
    joined = join_side_by_side([Labelled(path), Labelled(other)], tmp_path / "out.mp4", lambda *now: told.append(now))
    assert joined == 90
    assert told == [(min(done, 90), 90) for done in range(8, 97, 8)]
    assert read[0] == 180
    assert most[0] <= 2 * side_by_side.CHUNK_FRAMES


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fps": 24}, "the first is 64x64 at 16 fps, and number 2 ('b') is 64x64 at 24 fps: make them"),
        ({"width": 96}, "number 2 ('b') is 96x64 at 16 fps: make them with the same width, height and fps."),
    ],
)
def test_videos_that_differ_are_refused(tmp_path, change, said):
    a, b = plain(tmp_path / "a.mp4", [RED] * 3), plain(tmp_path / "b.mp4", [RED] * 3, **change)
    with pytest.raises(PackForcingError) as caught:
        join_side_by_side([Labelled(a, "a"), Labelled(b, "b")], tmp_path / "out.mp4")
    assert said in str(caught.value)
    assert not (tmp_path / "out.mp4").exists()


def test_one_video_has_nothing_beside_it(tmp_path):
    with pytest.raises(PackForcingError, match="two videos or more, but there is 1"):
        join_side_by_side([Labelled(plain(tmp_path / "a.mp4", [RED] * 3))], tmp_path / "out.mp4")


def test_labels_are_there_in_whole_letters():
    """Ink within the band and nowhere at its edges; another label is another picture."""
    for width in (64, 128, 832):
        for label in ("without", "with mid blocks", "a label that is far too long for any band of this width " * 4):
            band = label_band(label, width).astype(int)
            ink = np.abs(band - np.array(side_by_side.BACKGROUND)).sum(2) > 60
            assert ink.any()
            assert not ink[0].any()
            assert not ink[-1].any()
            assert not ink[:, 0].any()
            assert not ink[:, -1].any()
    assert not np.array_equal(label_band("with", 128), label_band("without", 128))
    assert np.array_equal(label_band("", 128), np.full_like(label_band("x", 128), side_by_side.BACKGROUND))


def test_frames_are_found_by_their_numbers(tmp_path):
    colours = [(10 * i, 100, 255 - 10 * i) for i in range(20)]
    path = plain(tmp_path / "a.mp4", colours)
    frames = frames_at(path, [0, 7, 7, 19, 400])
    assert len(frames) == 5
    for frame, number in zip(frames, [0, 7, 7, 19, 19], strict=True):
        assert close(frame, colours[number]), number


def test_a_strip_has_each_frame_above_its_caption():
    frames = [np.full((32, 64, 3), colour, np.uint8) for colour in (RED, GREEN, BLUE)]
    captions = [Caption("0:00", "a fox in the snow"), Caption("0:20"), Caption("0:40", "many words " * 40)]
    picture = np.asarray(strip(frames, captions))
    width = side_by_side.STRIP_WIDTH
    step = width + 2 * side_by_side.GAP
    assert picture.shape[1] == 3 * step - 2 * side_by_side.GAP
    below = picture[width // 2 :].astype(int) - np.array(side_by_side.BACKGROUND)
    inks = []
    for i, colour in enumerate((RED, GREEN, BLUE)):
        assert close(picture[: width // 2, i * step : i * step + width], colour)
        inks.append(int((np.abs(below[:, i * step : i * step + step]).sum(2) > 60).sum()))
    assert 0 < inks[1] < inks[0] < inks[2]  # the time alone, a few words, many words
    assert not below[-1].any()
