"""Damage to a file's content, drawn by a generator: to its bytes, or to what it holds so that its form stays good."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from .kinds import entries_of, journal_with

BRACKETS = "[" * 100_000
NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e308, math.inf, -math.inf, math.nan)
VALUES = (
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "\ud800",
    "a" * 10_000,
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    "NaN",
    "../../x",
    "0" * 5000,
)


# --- bytes ----------------------------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes cut off, added, zeroed, moved, or counted wrongly."""
    data = bytearray(content)
    place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 2048))  # heads matter
    length = min(int(10 ** rng.uniform(0, 4)), len(data) - place)
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data[rng.randrange(len(data)) if rng.random() < 0.5 else place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data += rng.randbytes(length) if rng.random() < 0.5 else data[place : place + length]
    elif kind == 3:
        data[place : place + length] = bytes(length)
    elif kind == 4:
        data[place : place + length] = rng.randbytes(length)
    elif kind == 5:
        del data[place : place + length]
    else:  # a number where a length may stand
        width = rng.choice((4, 8))
        number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 100_000_000)) % 2 ** (8 * width)
        place = rng.choice((0, 4, 8, place))
        data[place : place + width] = number.to_bytes(width, rng.choice(("little", "big")))
    return bytes(data)


# --- JSON -----------------------------------------------------------------------------------------------------------


def damaged_json(text: str, rng: random.Random) -> str:
    """Another value somewhere, a key or an element gone or added, or brackets."""
    if rng.random() < 0.05:
        return rng.choice((BRACKETS, '{"a":' * 100_000, "", "null", "5", '"x"', text[: rng.randrange(len(text) + 1)]))
    document = [json.loads(text)]
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            collect(value[key])

    collect(document)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        parent, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0 and parent is not document and (not isinstance(parent, list) or key < len(parent)):
            del parent[key]
            break
        if kind == 1 and isinstance(parent, dict):
            parent["another"] = rng.choice(VALUES)
        elif kind == 1:
            parent.insert(key, copy.deepcopy(rng.choice(VALUES)))
            break
        elif not isinstance(parent, list) or key < len(parent):
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(document[0])


# --- tensors --------------------------------------------------------------------------------------------------------


def plain_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    """Another dense tensor in its place: of another type, shape or content."""
    choices: list[Callable[[], Tensor]] = [
        lambda: torch.full(tensor.shape, math.nan),
        lambda: torch.full(tensor.shape, math.inf, dtype=tensor.dtype if tensor.is_floating_point() else None),
        lambda: torch.full(tensor.shape, 3e38),
        lambda: torch.zeros(tensor.shape, dtype=torch.int64),
        lambda: torch.zeros(tensor.shape, dtype=torch.bool),
        lambda: torch.zeros(tensor.shape, dtype=torch.complex64),
        lambda: torch.full(tensor.shape, 255, dtype=torch.uint8),
        lambda: torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn),
        lambda: torch.zeros(tensor.shape, dtype=torch.float64),
        lambda: torch.zeros(0),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(*tensor.shape, 1),
        lambda: torch.zeros(1, *tensor.shape),
        lambda: torch.zeros([size + 1 for size in tensor.shape]),
        lambda: torch.zeros([max(0, size - 1) for size in tensor.shape]),
        lambda: torch.zeros([0, *tensor.shape]),
        lambda: tensor.flatten().clone(),
        lambda: torch.zeros(tensor.shape[::-1]),
        lambda: torch.zeros(8 * (1,)),
    ]
    return rng.choice(choices)()


def odd_tensor(tensor: Tensor, rng: random.Random) -> Any:
    """In its place what only torch's files can hold."""
    flat = torch.zeros(4)
    choices: list[Callable[[], Any]] = [
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: torch.zeros(1).expand(tensor.shape) if tensor.ndim else torch.zeros(1).expand(10**9),
        lambda: torch.zeros(1).expand(10**10),
        lambda: torch.zeros(tensor.shape).to_sparse() if tensor.ndim else flat.to_sparse(),
        lambda: torch.zeros(4, 4).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([flat, flat[:2]]),
        lambda: torch.quantize_per_tensor(torch.zeros(tensor.shape), 0.1, 0, torch.qint8),
        lambda: torch.quantize_per_channel(torch.zeros(4, 4), torch.ones(4), torch.zeros(4), 0, torch.quint8),
        lambda: torch.nn.Parameter(torch.zeros(tensor.shape)),
        lambda: torch.zeros(2, *tensor.shape).transpose(0, -1),
        lambda: torch.zeros(8)[::2],
        lambda: torch.zeros(tensor.shape, dtype=torch.complex64).conj(),
        lambda: torch.zeros(tensor.shape, dtype=torch.bfloat16),
        lambda: rng.choice(VALUES),
        lambda: torch.Size([1]),
        lambda: torch.float32,
        lambda: [tensor],
        lambda: {"weight": tensor},
    ]
    return plain_tensor(tensor, rng) if rng.random() < 0.4 else rng.choice(choices)()


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def metadata_of(content: bytes) -> dict[str, str]:
    return header_of(content).get("__metadata__", {})


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Other tensors, other names, other metadata; or a header that claims something else."""
    if rng.random() < 0.3:
        end = 8 + int.from_bytes(content[:8], "little")
        header = damaged_json(content[8:end].decode(), rng).encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + content[end:]
    tensors, metadata = load(content), metadata_of(content)
    name = rng.choice(list(tensors))
    kind = rng.randrange(6)
    if kind <= 2:
        tensors[name] = plain_tensor(tensors[name], rng)
    elif kind == 3:
        tensor = tensors.pop(name)
        if rng.random() < 0.5:
            tensors[rng.choice((name + "x", "x." + name, "", "é", "a" * 3000, "blocks.99999999999.weight"))] = tensor
    elif kind == 4:
        tensors[rng.choice((name + ".x", "another", "blocks.7.modulation", "scaled_fp8"))] = torch.zeros(2)
    elif metadata:
        key = rng.choice(list(metadata))
        text = metadata[key]
        try:
            metadata[key] = damaged_json(text, rng)
        except ValueError:
            metadata[key] = rng.choice(("", "x", BRACKETS, "\x00"))
        if rng.random() < 0.2:
            del metadata[key]
        metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata or None)


# --- torch's files --------------------------------------------------------------------------------------------------

CANARY = "executed"  # a folder that code in a file makes


class Code:
    """What a pickle of this runs."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def with_code(content: bytes, rng: random.Random) -> bytes:
    """A file that runs something when it is unpickled."""
    import os

    code = rng.choice(
        (
            Code(os.mkdir, CANARY),
            Code(os.system, f"mkdir {CANARY}"),
            Code(eval, f"__import__('os').mkdir('{CANARY}')"),
            Code(exec, f"import os; os.mkdir('{CANARY}')"),
        )
    )
    out = io.BytesIO()
    kind = rng.randrange(4)
    if kind == 0:
        return pickle.dumps(code, protocol=rng.choice((2, 4)))
    if kind == 1:
        torch.save({"generator": {"x": code}}, out)
    elif kind == 2:
        torch.save({"x": code}, out, _use_new_zipfile_serialization=False)
    else:  # a good file whose pickle is another one
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.namelist():
                data = pickle.dumps({"x": code}, protocol=2) if entry.endswith("data.pkl") else old.read(entry)
                new.writestr(entry, data)
    return out.getvalue()


def damaged_torch(content: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in what is saved, or code."""
    if rng.random() < 0.15:
        return with_code(content, rng)
    saved = torch.load(io.BytesIO(content), weights_only=True)
    places: list[tuple[dict[Any, Any], Any]] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                places.append((value, key))
                collect(value[key])
        elif isinstance(value, list):
            for each in value:
                collect(each)

    collect(saved)
    outer = [place for place in places if not isinstance(place[0][place[1]], Tensor)] or places
    parent, key = rng.choice(outer if rng.random() < 0.3 else places)
    value = parent[key]
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[rng.choice((0, "x", "", ("a", 1), f"{key}x", 2.5, None))] = rng.choice((value, torch.zeros(2), *VALUES))
    elif kind == 2:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3:
        saved = rng.choice((value, [saved], None, 5, "text", {}, {"x": saved}, torch.zeros(3), {0: torch.zeros(2)}))
    else:
        parent[key] = odd_tensor(value, rng) if isinstance(value, Tensor) else odd_tensor(torch.zeros(2, 2), rng)
    out = io.BytesIO()
    try:
        torch.save(saved, out, _use_new_zipfile_serialization=rng.random() < 0.9)
    except (RuntimeError, NotImplementedError, AttributeError):  # the older format knows no such tensor
        out = io.BytesIO()
        torch.save(saved, out)
    return out.getvalue()


# --- all of it ------------------------------------------------------------------------------------------------------


def damaged_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = damaged_json(lines[number], rng)
    return "\n".join(lines).encode("utf-8", "surrogatepass") + rng.choice((b"\n", b"", b"\r\n", b"\xff\n", b"\x00"))


def damaged_journal(content: bytes, rng: random.Random) -> bytes:
    entries = entries_of(content)
    number = rng.randrange(len(entries))
    kind = rng.randrange(5)
    if kind == 0:
        del entries[number]
    elif kind == 1:
        rng.shuffle(entries)
    elif kind == 2:
        entries[number] = damaged_bytes(entries[number], rng)
    else:
        entries[number] = damaged_safetensors(entries[number], rng)
    return journal_with(entries)


FORMS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": damaged_bytes,
    "json": lambda content, rng: damaged_json(content.decode(), rng).encode("utf-8", "surrogatepass"),
    "lines": damaged_lines,
    "safetensors": damaged_safetensors,
    "torch": damaged_torch,
    "journal": damaged_journal,
}


def damaged(content: bytes, form: str, rng: random.Random) -> bytes:
    """A file's content with one damage: to its bytes in two of five cases, else within its form."""
    return damaged_bytes(content, rng) if rng.random() < 0.4 else FORMS[form](content, rng)
