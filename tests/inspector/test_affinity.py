"""Ages and affinity of chosen mid blocks: what a cache records, against the cache that forgets nothing."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cache_reference import CLEAN, DENOISE, Everything, Stream, run_blocks, small_layout

from packforcing.cache.cache import Cache
from packforcing.config import ModelShape
from packforcing.generate.record import BlockRecord, CacheRecord
from packforcing.inspector import numbers, picture, report
from packforcing.inspector.ages import ages, choices, layer_shares
from packforcing.inspector.choice_panels import affinity_by_age

BLOCKS, MODEL = 14, ModelShape(layers=2, dim=24, heads=2)


class Run(NamedTuple):
    record: CacheRecord
    everything: Everything
    stream: Stream

    def queries(self, block: int, layer: int) -> torch.Tensor:
        return self.stream(block, layer, DENOISE).queries


def run(**config: object) -> Run:
    layout = small_layout(**config)
    cache, stream = Cache(layout, MODEL, dtype=torch.float64), Stream(layout, MODEL)
    everything = Everything(layout, MODEL)
    record = CacheRecord(
        model=MODEL,
        config=layout.config,
        size=layout.size,
        fps=16.0,
        temporal_stride=2,
        compressor="none",
        dtype="float64",
        device="cpu",
    )
    for block in run_blocks(cache, stream, BLOCKS):
        everything.blocks.append([stream(block, layer, CLEAN).raw for layer in range(MODEL.layers)])
        selected = [list(chosen or ()) for chosen in cache.selected]
        record.blocks.append(BlockRecord(block, selected, bytes=cache.bytes(), affinity=cache.affinities))
    return Run(record, everything, stream)


@pytest.fixture(scope="module")
def made() -> Run:
    return run()


def test_the_recorded_scores_are_the_reference_s(made: Run):
    scored = 0
    for block in made.record.blocks:
        _, mids, _ = made.everything.history(block.block)
        for layer, affinity in enumerate(block.affinity):
            if len(mids) <= 3:  # top_k: there was nothing to choose
                assert affinity is None
                continue
            every = [made.everything.score(m, layer, made.queries(block.block, layer)) for m in mids]
            chosen = [every[mids.index(m)] for m in block.selected[layer]]
            np.testing.assert_allclose(affinity.chosen, chosen, rtol=1e-6)  # kept as float32
            assert affinity.mean == pytest.approx(np.mean(every), rel=1e-9)
            assert affinity.deviation == pytest.approx(np.std(every), rel=1e-9)
            assert np.mean(affinity.chosen) > affinity.mean
            scored += 1
    assert scored > 10


def test_ages_and_affinity_equal_plain_counts(made: Run):
    chosen, stored, above = Counter(), Counter(), {}
    for block in range(BLOCKS):
        _, mids, _ = made.everything.history(block)
        for layer in range(MODEL.layers):
            stored.update(block - m for m in mids)
            queries = made.queries(block, layer)
            choice = made.everything.choose(block, layer, queries)
            chosen.update(block - m for m in choice)
            if len(choice) < len(mids):
                every = {m: made.everything.score(m, layer, queries) for m in mids}
                for m in choice:
                    z = (every[m] - np.mean(list(every.values()))) / np.std(list(every.values()))
                    above.setdefault(block - m, []).append(z)
    found = ages(made.record, choices(made.record))
    assert found.age.tolist() == list(range(min(stored), max(stored) + 1))
    assert found.chosen.tolist() == [chosen[age] for age in found.age]
    assert found.stored.tolist() == [stored[age] for age in found.age]
    for age, mean in zip(found.age, found.affinity, strict=True):
        assert (mean == pytest.approx(np.mean(above[age]), rel=1e-5)) if age in above else np.isnan(mean)

    starts, levels = affinity_by_age(choices(made.record))
    for i, age in enumerate(starts[:-1]):
        if age in above:
            np.testing.assert_allclose(levels[:, i], np.percentile(above[age], (10, 50, 90)), rtol=1e-5)
        else:
            assert np.isnan(levels[:, i]).all()

    summary = numbers(made.record)["summary"]["ages"]
    assert summary["chosen"] == found.chosen.tolist()
    mean = np.mean([z for group in above.values() for z in group])
    assert f"chosen {mean:+.2f} standard deviations from the mean" in report(made.record)


def test_a_layer_s_shares_equal_plain_counts(made: Run):
    shares = layer_shares(made.record, choices(made.record))
    assert shares.shape == (MODEL.layers, BLOCKS)
    for layer in range(MODEL.layers):
        for mid in range(BLOCKS):
            chances = [b for b in range(BLOCKS) if mid in made.everything.history(b)[1]]
            times = sum(mid in made.everything.choose(b, layer, made.queries(b, layer)) for b in chances)
            found = shares[layer, mid]
            assert (found == pytest.approx(times / len(chances))) if chances else np.isnan(found)


def test_a_repeated_mid_block_counts_once():
    record = run(repeat_mids=True).record
    assert any(len(set(mids)) < len(mids) for block in record.blocks for mids in block.selected)
    found = ages(record, choices(record))
    assert (found.chosen <= found.stored).all()
    assert found.chosen.sum() == sum(len(set(mids)) for block in record.blocks for mids in block.selected)


@pytest.mark.parametrize("config", [{"selection": "recency"}, {"top_k": 0}, {"top_k": 50}])
def test_without_a_choice_by_affinity_nothing_is_recorded(config: dict[str, object]):
    record = run(**config).record
    assert all(affinity is None for block in record.blocks for affinity in block.affinity)
    assert "standard deviations" not in report(record)
    assert picture(record).mode == "RGB"
