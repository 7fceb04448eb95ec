"""A compressor's file there and back, and what is refused."""

import json
import os
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from wan_files import EMA, RAW, fsdp, sentence

from packforcing.files.compressor_file import COMPRESSOR_KEY, CompressorMetadata, load_compressor, save_compressor

METADATA = CompressorMetadata(
    model_dim=12, temporal_stride=2, hidden_channels=(2, 3, 4, 5), block_frames=4, base_model="tiny Wan"
)


def compressor_weights(metadata=METADATA):
    weights = {}
    for i, (before, after) in enumerate(pairwise(metadata.channels)):
        weights |= {f"hr.{i}.weight": torch.randn(after, before, 3, 2, 2), f"hr.{i}.bias": torch.randn(after)}
    return weights


def write_header(path, header, weights=None):
    save_file(weights or compressor_weights(), path, metadata={COMPRESSOR_KEY: header})


def test_compressor_round_trip(tmp_path):
    weights = compressor_weights()
    assert len(weights) == 10
    save_compressor(tmp_path / "c.safetensors", weights, METADATA)
    loaded, metadata = load_compressor(tmp_path / "c.safetensors")
    assert metadata == METADATA
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert os.listdir(tmp_path) == ["c.safetensors"]  # no partial file is left


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"model_dim": 0}, "model_dim is 0"),
        ({"model_dim": "12"}, "model_dim"),
        ({"temporal_stride": 3}, "temporal_stride is 3"),
        ({"block_frames": 3}, "does not divide its block_frames 3"),
        ({"hidden_channels": [2, -1]}, "hidden_channels[1] is -1"),
        ({"hidden_channels": None}, "damaged compressor metadata"),
        ({"hidden_channels": [2, 3, 4]}, "unexpected 'hr.4.bias', 'hr.4.weight'"),
        ({"model_dim": 13}, "'hr.4' has weight [12, 5, 3, 2, 2]"),
    ],
)
def test_compressor_metadata_is_checked(tmp_path, fields, says):
    path = tmp_path / "c.safetensors"
    write_header(path, json.dumps(asdict(METADATA) | fields))
    text = sentence(load_compressor, path)
    assert says in text
    assert str(path) in text


@pytest.mark.parametrize("header", ["", "{", "[]", "3", '{"format_version": 1}', "[" * 100_000])
def test_damaged_compressor_metadata(tmp_path, header):
    write_header(tmp_path / "c.safetensors", header)
    assert "damaged compressor metadata" in sentence(load_compressor, tmp_path / "c.safetensors")


def test_compressor_weights_are_checked(tmp_path):
    path = tmp_path / "c.safetensors"
    broken = compressor_weights()
    broken["hr.2.bias"][0] = float("nan")
    write_header(path, json.dumps(asdict(METADATA)), broken)
    assert "'hr.2.bias'" in sentence(load_compressor, path)
    assert "'hr.2.bias'" in sentence(save_compressor, path, broken, METADATA)
    assert "'lr.weight'" in sentence(
        save_compressor, path, compressor_weights() | {"lr.weight": torch.ones(1)}, METADATA
    )
    assert "model_dim" in sentence(replace, METADATA, model_dim=-1)
    assert ".safetensors" in sentence(save_compressor, tmp_path / "c.pt", compressor_weights(), METADATA)
    assert "folder" in sentence(save_compressor, tmp_path / "no" / "c.sft", compressor_weights(), METADATA)


def test_other_files_given_as_compressor(tmp_path):
    save_file(RAW, tmp_path / "wan.safetensors")
    assert "which is a Wan diffusion model" in sentence(load_compressor, tmp_path / "wan.safetensors")
    torch.save({"generator_ema": fsdp(EMA)}, tmp_path / "wan.pt")
    assert "which is a Wan diffusion model" in sentence(load_compressor, tmp_path / "wan.pt")
    save_file(compressor_weights(), tmp_path / "bare.safetensors")
    assert COMPRESSOR_KEY in sentence(load_compressor, tmp_path / "bare.safetensors")
    assert "does not exist" in sentence(load_compressor, tmp_path / "no.safetensors")
