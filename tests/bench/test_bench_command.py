"""python -m packforcing bench: its JSON, its plot, its notes, and how it refuses the impossible."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from packforcing.bench.result import growths, listed
from packforcing.bench.settings import parsed_blocks, parsed_size
from packforcing.bench.stages import MeasuredBlock, first_full, growth, spread, stage_times, steady
from packforcing.cli.main import main
from packforcing.config import CacheConfig
from packforcing.errors import PackForcingError

REPO = Path(__file__).resolve().parents[2]

# Blocks of one latent frame at 64x64 are the cheapest that have mid blocks; the cache is full from block 4 on.
CHEAP = shlex.split(
    "--model tiny --size 64x64 --block 1 --sink 1 --recent 1 --top-k 2 --steps 2 --repeats 1 --device cpu"
)
KEYS = set(
    shlex.split(
        "device versions date model size dtype context_tokens cache_bytes fps_denoise fps_end_to_end peak_memory_bytes "
        "block_time_ratio memory_ratio stages floor baselines blocks repeats notes memory overlap"
    )
)
CONFIG = CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=2)


def bench(*options: str) -> int:
    return main(["bench", *CHEAP, *options])


def result(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    assert bench("--json", *options) == 0
    return json.loads(capsys.readouterr().out)


def test_the_whole_benchmark_reports_time_memory_floors_and_baselines(capsys: pytest.CaptureFixture[str]):
    found = result(capsys, "--seconds", "2.5", "--baseline-blocks", "6,8")
    assert set(found) >= KEYS
    assert (found["model"], found["size"], found["repeats"]) == ("tiny", [64, 64], 1)
    assert found["context_tokens"] == 3 * 16 + 2 * 1
    assert found["blocks_made"] == len(found["blocks"]) == 10
    assert found["measured_blocks"] == {"first": 4, "count": 6, "full_cache": True}

    stages = found["stages"]
    assert set(stages) == {"denoise", "selection", "decode", "write", "compression", "clean_pass"}
    assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
    assert all(stage["median_ms"] > 0 and stage["spread_ms"] >= 0 for stage in stages.values())
    assert found["block_time_ratio"] > 0
    assert found["memory_ratio"] > 0

    passes = sum(stages[name]["median_ms"] for name in ("denoise", "selection", "clean_pass"))
    assert found["fps_denoise"] == pytest.approx(4000 / passes)
    assert found["fps_end_to_end"] == pytest.approx(4000 / found["block_ms"])

    floor = found["floor"]
    assert set(floor["stages"]) == set(stages) - {"write"}
    assert floor["block_ms"] == pytest.approx(sum(at["floor_ms"] for at in floor["stages"].values()))
    measured = sum(stages[name]["median_ms"] for name in floor["stages"])
    assert floor["ratio"] == pytest.approx(measured / floor["block_ms"])

    memory = found["memory"]
    assert (
        memory["archive_device"] == 8 * 4 * 2 * 256 * 4
    )  # 8 blocks of one token: K and V, 4 layers, 256 wide, float32
    assert memory["kv_buffers"] == found["cache_bytes"]
    assert found["cached_kv_bytes"] == (2 * 16 + 2 * 1) * 4 * 2 * 256 * 4
    assert sum(memory.values()) == found["peak_memory_bytes"]

    overlap = found["overlap"]
    assert overlap["blocks_compared"] == 6
    assert overlap["speedup"] == pytest.approx(overlap["apart_ms"] / overlap["block_ms"])
    assert overlap["fps_end_to_end"] == pytest.approx(4000 / overlap["block_ms"])
    assert overlap["apart_ms"] == pytest.approx(found["block_ms"])
    assert 0 <= overlap["wait_ms"] < overlap["block_ms"]

    assert [entry["name"] for entry in found["baselines"]] == [
        "unbounded-full-cache",
        "self-forcing-rolling-window",
        "concatenating-three-partition",
    ]
    for entry in found["baselines"]:
        assert [at["block"] for at in entry["blocks"]] == [6, 8]
        assert entry["speedup"] == entry["blocks"][-1]["speedup"] > 0
        assert entry["fps_denoise"] > 0


def test_without_a_vae_only_the_transformer_is_measured(capsys: pytest.CaptureFixture[str]):
    found = result(capsys, "--seconds", "2", "--no-vae", "--no-baselines")
    assert set(found["stages"]) == {"denoise", "selection", "compression", "clean_pass"}
    assert found["memory"]["vae"] == 0
    assert found["overlap"] is None
    assert found["baselines"] == []
    assert any("stand-in" in note for note in found["notes"])


def test_a_bare_checkout_without_av_measures_all_but_the_file(tmp_path: Path):
    program = (
        "import sys; sys.modules['av'] = None; from packforcing.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    file = tmp_path / "bench.json"
    options = [*CHEAP, "--seconds", "1", "--no-baselines", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", *options], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "av is not installed" in done.stdout
    assert "write" not in json.loads(file.read_text())["stages"]


def test_the_report_is_text_and_the_plot_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench("--seconds", "1.5", "--no-vae", "--baseline-blocks", "5", "--plot", str(tmp_path / "soak.png")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("clean_pass") for line in lines)
    assert any("unbounded-full-cache at block 5" in line for line in lines)
    assert Image.open(tmp_path / "soak.png").size[0] > 100


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "100x64"], "The width must be a positive multiple of 16 pixels, but it is 100"),
        (["--size", "832"], "--size is WIDTHxHEIGHT"),
        (["--size=-16x64"], "--size is WIDTHxHEIGHT"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--memory-gb", "0"], "--memory-gb must be above 0"),
        (["--memory-gb", "0.0001"], "needs about"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--steps", "0"], "at least 1 step"),
        (["--seconds", "0"], "length must be above 0"),
        (["--seconds", "nan"], "length must be above 0"),
        (["--baseline-blocks", "60,x"], "--baseline-blocks are positive numbers"),
        (["--baseline-blocks", "0"], "--baseline-blocks are positive numbers"),
        (["--device", "meta"], "the clocks of cuda and cpu"),
        (["--device", "toaster"], "'toaster' cannot be used here"),
        (["--json", "/no/such/folder/x.json"], "the folder /no/such/folder does not exist"),
        (["--plot", "/no/such/folder/x.png"], "the folder /no/such/folder does not exist"),
    ],
)
def test_an_impossible_option_is_told_in_one_sentence(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    assert bench(*options) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_gpu_is_told(capsys: pytest.CaptureFixture[str]):
    assert bench("--device", "cuda") == 1
    assert "The device 'cuda' cannot be used here" in capsys.readouterr().err


def test_options_are_parsed():
    size = parsed_size("832x480")
    assert (size.width, size.height) == (832, 480)
    assert parsed_blocks("120, 60,60") == (60, 120)
    with pytest.raises(PackForcingError):
        parsed_blocks("")


# --- what follows from measured blocks -------------------------------------------------------------------------------


def blocks(times: list[float]) -> list[MeasuredBlock]:
    return [MeasuredBlock(i, ms, {"denoise": ms}, 1000 + i) for i, ms in enumerate(times)]


def test_growth_compares_the_last_ten_with_the_first_ten():
    assert growth([1.0] * 10 + [50.0] * 7 + [3.0] * 10) == 3
    assert growth([1.0, 2.0]) == 2
    assert growth([1.0]) is None


def test_only_blocks_with_a_full_cache_count():
    assert first_full(CONFIG) == 4
    assert first_full(CacheConfig()) == 19
    measured = blocks([9.0] * 4 + [1.0] * 10 + [2.0] * 10)
    assert [block.index for block in steady(measured, CONFIG)] == list(range(4, 24))
    assert growths(measured, CONFIG)["block_time_ratio"] == 2
    # A run that ends before the cache is full stands for itself, its first two blocks aside.
    assert [block.index for block in steady(measured[:4], CONFIG)] == [2, 3]
    assert steady(measured[:1], CONFIG) == measured[:1]


def test_the_first_block_that_is_full_has_all_partitions_full():
    for config in (CONFIG, CacheConfig(), CacheConfig(top_k=0), CacheConfig(recent_frames=0)):
        full = first_full(config)
        assert config.attended_mids(full) == config.top_k
        assert len(config.partition(full).recent) == config.recent_blocks
        if full:
            before = config.partition(full - 1)
            assert min(config.top_k, len(before.mid)) + len(before.recent) + len(before.sink) < full


def test_medians_and_quartiles():
    times = stage_times(blocks([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert (times["denoise"].median_ms, times["denoise"].spread_ms, times["denoise"].share) == (3, 2, 1)
    assert spread([5.0]) == 0


def test_a_long_run_lists_some_of_its_blocks_and_the_last():
    assert len(listed(blocks([1.0] * 200))) == 200
    few = [entry["index"] for entry in listed(blocks([1.0] * 1001))]
    assert len(few) <= 200
    assert few[-1] == 1000
    assert few == sorted(few)
