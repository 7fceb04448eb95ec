"""The demo's text encoder: no weights, and the same bits everywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from packforcing.demo.text import MAX_WORDS, TEXT_DIM, encode_prompt, words

PROMPT = "A red circle moves over blue water, slowly."
PROMPT_SHA256 = "a3ab208d054a971f4a0e4d41eada9d995e917b175ba81cc0d702d1b0bf8a0d4f"


def similarity(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=-1).item()


def test_a_prompts_embedding_is_pinned_to_the_bit():
    data = encode_prompt(PROMPT).numpy().astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest() == PROMPT_SHA256


def test_words_and_marks_are_tokens_and_case_is_not():
    assert words("A red circle, slowly!") == ["a", "red", "circle", ",", "slowly", "!", "<end>"]
    assert torch.equal(encode_prompt("A Red Circle"), encode_prompt("a red  circle"))


@pytest.mark.parametrize("prompt", ["", "one", PROMPT, "雨の街 über Köln", "\n\t"])
def test_an_embedding_is_1_by_words_by_4096(prompt):
    embedding = encode_prompt(prompt)
    assert embedding.shape == (1, len(words(prompt)), 4096)
    assert embedding.dtype == torch.float32
    assert TEXT_DIM == 4096


def test_an_empty_prompt_is_one_token():
    assert words("") == ["<end>"]
    assert encode_prompt("").abs().sum() > 0


def test_every_token_has_unit_variance():
    """Exactly: a sum of signs 1, 1/2 and 1/2 has variance 3/2, and 4096 of them are close to their mean."""
    embedding = encode_prompt(PROMPT)[0]
    assert (embedding.square().mean(-1) - 1).abs().max() < 0.05
    assert embedding.mean(-1).abs().max() < 0.06
    assert sorted(embedding.unique().tolist()) == pytest.approx([n / 1.5**0.5 for n in range(-2, 3)])


def test_long_prompts_are_capped():
    long = " ".join(f"word{i}" for i in range(200))
    assert encode_prompt(long).shape == (1, MAX_WORDS, 4096) == (1, 64, 4096)
    first = " ".join(f"word{i}" for i in range(63))
    assert torch.equal(encode_prompt(long), encode_prompt(first))


def test_word_order_matters_even_to_attention_that_knows_none():
    """As a set of tokens: no token of "circle red" is one of "red circle" but for none at all."""
    one, other = encode_prompt("red circle")[0], encode_prompt("circle red")[0]
    assert not any(torch.equal(a, b) for a in one for b in other)


def test_a_word_resembles_itself_and_no_other():
    red, circle, _ = encode_prompt("red circle")[0]
    same_word_elsewhere = encode_prompt("a very red thing")[0, 2]
    assert similarity(red, same_word_elsewhere) > 0.5
    assert abs(similarity(red, circle)) < 0.1


def test_different_prompts_differ():
    assert not torch.equal(encode_prompt("a cat"), encode_prompt("a dog"))
