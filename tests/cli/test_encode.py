"""The command `encode`: what it writes, what it does not do twice, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_umt5
import torch
from safetensors.torch import save_file

from packforcing.cli import encode as command
from packforcing.cli.main import main
from packforcing.errors import PackForcingError
from packforcing.files.encoded_prompts import read_prompt
from packforcing.files.weights import read_state_dict
from packforcing.text.encoder import TextEncoder, open_text_encoder
from packforcing.training.models import encoded_prompts

WORDS = ["a red circle", "it starts to rain", "画面"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with an encoder and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    tiny_umt5.comfyui_file(tmp_path, tiny_umt5.random_umt5())
    write(WORDS)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is encoded from here on, call by call."""
    calls: list[list[str]] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, words: calls.append(list(words)) or encode(self, words))
    return calls


def write(words: list[str]) -> None:
    Path("words.txt").write_text("# prompts\n\n" + "\n".join(words) + "\n", encoding="utf-8")


def run(*options: str) -> int:
    given = {"--prompts": "words.txt", "--text-encoder": "umt5_xxl_fp16.safetensors", "--device": "cpu"}
    for name, value in zip(options[::2], options[1::2], strict=True):
        given[name] = value
    return main(["encode", *(part for pair in given.items() for part in pair)])


def in_file(path: str = "prompts.safetensors") -> dict[str, str]:
    tensors, metadata = read_state_dict(path)
    return {name: metadata[name] for name in sorted(tensors)}


def test_prompts_become_a_file_with_their_words(folder: Path):
    assert run() == 0
    assert in_file() == {"00001": WORDS[0], "00002": WORDS[1], "00003": WORDS[2]}
    encoder = open_text_encoder("umt5_xxl_fp16.safetensors", None, torch.device("cpu"))
    expected = encoder.encode(WORDS)
    for name, words, context in zip(in_file(), WORDS, expected, strict=True):
        found = read_prompt(f"prompts.safetensors:{name}")
        assert found.words == words
        assert torch.equal(found.context, context)
    for found, context in zip(encoded_prompts("prompts.safetensors"), expected, strict=True):  # the trainers' reader
        assert torch.equal(found, context)


def test_what_is_there_is_not_encoded_again(folder: Path, encoded: list[list[str]]):
    assert run() == 0
    first = dict(zip(WORDS, encoded_prompts("prompts.safetensors"), strict=True))
    write(["a small blue lake", *reversed(WORDS), WORDS[0]])
    assert run() == 0
    assert encoded == [WORDS, ["a small blue lake"]]
    assert list(in_file().values()) == ["a small blue lake", *reversed(WORDS)]
    for words, context in zip(reversed(WORDS), encoded_prompts("prompts.safetensors")[1:], strict=True):
        assert torch.equal(context, first[words])
    write(WORDS[:1])
    assert run() == 0
    assert len(encoded) == 2
    assert list(in_file().values()) == WORDS[:1]


def test_a_run_that_was_stopped_goes_on(folder: Path, encoded: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    """Parts of few tokens, and a stop in the second one."""
    monkeypatch.setattr(command, "TOKENS_AT_ONCE", 1)
    save = command.write_prompts

    def stopped(path: Path, prompts: dict[str, object], encoder: str) -> None:
        if len(prompts) == 2:
            raise KeyboardInterrupt
        save(path, prompts, encoder)

    monkeypatch.setattr(command, "write_prompts", stopped)
    assert run() == 130
    assert list(in_file().values()) == WORDS[:1]
    monkeypatch.setattr(command, "write_prompts", save)
    assert run() == 0
    assert encoded == [WORDS[:1], WORDS[1:2], WORDS[1:2], WORDS[2:]]
    assert list(in_file().values()) == WORDS


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--prompts", "words.txt", "--text-encoder", "umt5_xxl_fp16.safetensors", "--device", "cpu", "--json"]
    assert main(["encode", *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "prompts.safetensors", "prompts": 3, "encoded": 3}


def test_one_of_several_must_be_named(folder: Path):
    assert run() == 0
    with pytest.raises(PackForcingError, match="holds 3 prompts, and one is wanted: name it"):
        read_prompt("prompts.safetensors")
    with pytest.raises(PackForcingError, match="has no prompt '7', but '00001', '00002', '00003'"):
        read_prompt("prompts.safetensors:7")


MISTAKES = {
    "no file": (["--prompts", "gone.txt"], "The file of prompts gone.txt cannot be read (No such file or directory)"),
    "no text": (["--prompts", "umt5_xxl_fp16.safetensors"], "is no text file: save it as plain text in UTF-8"),
    "no prompt": (["--prompts", "empty.txt"], "The file empty.txt has no prompt: write one on each line"),
    "no folder": (["--output", "gone/a.safetensors"], "the folder gone does not exist"),
    "another suffix": (["--output", "a.pt"], "Encoded prompts are written as safetensors, but --output is a.pt"),
    "no encoder": (["--text-encoder", "words.txt"], "words.txt has the suffix '.txt'"),
    "another's": (["--output", "other.safetensors"], "other.safetensors was not written by this text encoder ('' is"),
    "another type": (["--text-dtype", "bfloat16", "--output", "done.safetensors"], "was not written by this text enc"),
    "device": (["--device", "moon"], "The device 'moon' cannot be used here"),
}


@pytest.mark.parametrize(("options", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_encoded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
):
    Path("empty.txt").write_text("# nothing\n")
    save_file({"a": torch.zeros(3, 4096)}, "other.safetensors")
    if "done.safetensors" in options:
        assert run("--output", "done.safetensors") == 0
        capsys.readouterr()

    def encode(*_: object) -> None:
        raise AssertionError("something was encoded")

    monkeypatch.setattr(TextEncoder, "encode", encode)
    assert run(*options) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert told in err
