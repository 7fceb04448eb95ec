"""The record as a text that a person reads in a minute."""

from __future__ import annotations

import numpy as np

from ..byte_units import readable_bytes
from ..config import MODELS
from ..generate.record import ARCHIVES, STAGES, CacheRecord
from ..generate.schedule import timesteps_text
from .ages import choices
from .facts import (
    attended_mids,
    bytes_per_value,
    counted,
    frames_made,
    layout_of,
    loop_seconds,
    model_bytes_per_value,
    seconds_per_block,
    selection_facts,
    token_counts,
)
from .story_report import story_report


def report(record: CacheRecord) -> str:
    """The record as aligned plain text, at most 60 lines however long the run."""
    blocks = record.blocks
    frames = frames_made(record, blocks)
    made = f"{counted(len(blocks), 'block')}, {frames:,} frames, {frames / record.fps:,.1f} s at {record.fps:g} fps"
    sections = [f"PackForcing cache: {made if blocks else 'no block has been made yet'}", _conditions(record)]
    if record.notes:
        sections.append("\n".join(["Notes", *(f"  {note}" for note in record.notes)]))
    if blocks:
        sections += [story_report(record), _memory(record), _selections(record), _moves(record), _times(record)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _rows(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<18}{text}" for name, text in rows)])


def _conditions(record: CacheRecord) -> str:
    model, config, size, layout = record.model, record.config, record.size, layout_of(record)
    name = next((name for name, shape in MODELS.items() if shape == model), "a model")
    if config.top_k:
        ratio = layout.tokens_per_block / layout.compressed_tokens_per_block
        mid = f"the {config.top_k} chosen of all others, {layout.compressed_tokens_per_block:,} tokens each"
        compressed = f"{record.compressor}, temporal stride {record.temporal_stride}, {ratio:.1f} times fewer tokens"
    else:
        mid, compressed = "off (top_k is 0)", "not used"
    selection = config.selection
    if selection == "affinity":
        selection += f", {config.query_fraction:.0%} of the queries, {config.head_fraction:.0%} of the heads"
    positions = f"within {config.position_range} latent frames" if config.position_range else "the paper's spacing"
    if not config.rope_adjustment:
        positions = "not adjusted: every block stands where it was made"
    budget = f", up to {config.archive_budget_gb:g} GB on the device" if config.archive_device == "auto" else ""
    return _rows(
        "Conditions",
        [
            ("model", f"{name}: {model.layers} layers, width {model.dim:,}, {model.heads} heads"),
            ("video", f"{size.width}x{size.height}, {record.fps:g} fps"),
            ("block", f"{counted(config.block_frames, 'latent frame')}, {layout.tokens_per_block:,} tokens"),
            ("sink, recent", f"{config.sink_frames} and {config.recent_frames} latent frames at full resolution"),
            ("mid", mid),
            ("selection", selection),
            ("positions", positions),
            ("compressor", compressed),
            *([("denoising", _denoising(record))] if record.update else []),
            ("archive", config.archive_device + budget),
            ("keys and values", record.dtype if config.kv_dtype == "model" else _rounded(record)),
            ("runs on", f"{record.device}, {record.dtype}"),
        ],
    )


def _denoising(record: CacheRecord) -> str:
    usual, first = timesteps_text(record.timesteps), timesteps_text(record.first_timesteps)
    own = "" if first == usual else f"; first block {first}"
    return f"{record.update}, t = {usual}{own}"


def _rounded(record: CacheRecord) -> str:
    return f"{record.config.kv_dtype}, relative error {record.rounding_error:.1%}"


def _memory(record: CacheRecord) -> str:
    model, last = record.model, record.blocks[-1]
    width = bytes_per_value(record)
    tokens = {name: int(values[-1]) for name, values in token_counts(record).items()}
    context = tokens["sink"] + tokens["mid"] + tokens["recent"] + tokens["current"]
    names = {"mid": "mid, attended"} | {each: f"archive, {each.removeprefix('archive_')}" for each in ARCHIVES}
    per_mid = model.kv_bytes(layout_of(record).compressed_tokens_per_block, width)
    lines = [f"Tokens and memory after block {last.block:,}", f"  {'':<18}{'tokens':>12}{'bytes':>12}"]

    def line(name: str, count: int | None, size: int, note: str = "") -> None:
        number = "" if count is None else f"{count:,}"
        lines.append(f"  {name:<18}{number:>12}{readable_bytes(size):>12}  {note}".rstrip())

    for name in ("sink", "mid", "recent", "current"):
        line(names.get(name, name), tokens[name], last.bytes.get(name, 0))
    line("context", context, sum(last.bytes.get(n, 0) for n in ("sink", "mid", "recent", "current")), _constant(record))
    if last.bytes.get("aside"):
        line("set aside", None, last.bytes["aside"], "for the block that was being decoded")
    full = model.kv_bytes(tokens["full"], model_bytes_per_value(record))
    line("full cache would be", tokens["full"], full, f"{tokens['full'] / context:.1f} times the context")
    for name in ARCHIVES:
        size = last.bytes.get(name, 0)
        if name == "archive_disk" and not size:
            continue
        line(names[name], None, size, counted(round(size / per_mid), "mid block") if per_mid else "")
    line("key sums", None, last.bytes.get("key_sums", 0))
    on_device = sum(size for name, size in last.bytes.items() if name not in ARCHIVES[1:])
    less = f"{full / on_device:.1f} times less than the full cache" if full > on_device > 0 else ""
    line("all on the device", None, on_device, less)
    return "\n".join(lines)


def _constant(record: CacheRecord) -> str:
    """Since when the context has not grown."""
    counts = token_counts(record)
    context = counts["sink"] + counts["mid"] + counts["recent"] + counts["current"]
    limit = layout_of(record).context_tokens
    if context[-1] < limit:
        return f"still growing, to {limit:,} tokens"
    full = np.flatnonzero(context < limit)
    since = record.blocks[full[-1] + 1 if len(full) else 0].block
    return f"constant since block {since:,}"


def _selections(record: CacheRecord) -> str:
    facts = selection_facts(record)
    if facts.mean_age is None:
        return _rows("Selections", [("mid blocks", "none has been attended yet" if record.config.top_k else "off")])
    seconds = seconds_per_block(record)
    rows = [
        ("most attended" if i == 0 else "", f"block {mid:,}: {times:,} times, {share:.0%} of its chances")
        for i, (mid, times, share) in enumerate(facts.most_attended)
    ]
    age = f"{facts.mean_age:,.1f} blocks ({facts.mean_age * seconds:,.1f} s)"
    if facts.mean_stored_age is not None:
        age += f"; of all that were stored {facts.mean_stored_age:,.1f} blocks"
    back = f"{counted(facts.returns, 'time')} a layer took up a block again that it had left;"
    above = choices(record).affinity
    above = above[np.isfinite(above)]
    if above.size:
        text = f"chosen {above.mean():+.2f} standard deviations from the mean of all stored"
        rows.append(("affinity", text))
    rows += [
        ("mean age", age),
        ("came back", f"{back} {facts.returned_blocks:,} of {counted(facts.seen_blocks, 'block')}"),
    ]
    if facts.agreement is not None:
        agreement = f"two layers share {facts.agreement:.0%} of their mid blocks"
        rows.append(("layers agree", f"{agreement} ({facts.chance_agreement:.0%} by chance)"))
    else:
        rows.append(("layers agree", "no choice yet: every stored mid block was attended"))
    return _rows("Selections", rows)


def _moves(record: CacheRecord) -> str:
    written = sum(block.mid_slots_written for block in record.blocks)
    possible = sum(len(block.selected) * attended_mids(block) for block in record.blocks)
    share = f" ({written / possible:.0%}); the others were in place" if possible else ""
    rotated = sum(block.recent_rotated for block in record.blocks)
    return _rows(
        "Moves",
        [
            ("mid slots written", f"{written:,} of {possible:,}{share}"),
            ("recent rotations", f"{rotated:,}, {rotated / len(record.blocks):.2f} a block"),
        ],
    )


def _times(record: CacheRecord) -> str:
    timed = [block for block in record.blocks if block.seconds]
    if not timed:
        return _rows("Time", [("", "not measured")])
    whole = sum(map(loop_seconds, timed)) or 1.0
    lines = ["Seconds a block", f"  {'':<18}{'mean':>10}{'median':>10}{'slowest':>10}{'share':>8}"]
    extra = sorted({stage for block in timed for stage in block.seconds} - set(STAGES))
    for stage in (*STAGES, *extra):
        seconds = np.array([block.seconds.get(stage, 0.0) for block in timed])
        if not any(stage in block.seconds for block in timed):
            continue
        numbers = "".join(f"{value:>10.3f}" for value in (seconds.mean(), np.median(seconds), seconds.max()))
        lines.append(f"  {stage:<18}{numbers}{seconds.sum() / whole:>8.0%}")
    frames = frames_made(record, timed)
    without = sum(seconds for block in timed for stage, seconds in block.seconds.items() if stage != "decode")
    overlapped = any("wait" in block.seconds for block in timed)
    if overlapped:
        lines.append("  Blocks were decoded beside the next one; the loop only waited for what was not done by then.")
    for name, total in (("without decoding", 0.0 if overlapped else without), ("with all stages", whole)):
        if total > 0:
            lines.append(f"  {name:<18}{frames / total:,.2f} frames a second")
    return "\n".join(lines)
