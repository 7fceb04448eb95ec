"""Names, descriptions and tooltips in other languages: complete, in the frontend's form, and served.

English is the schema itself. What is missing is listed as `NODE.inputs.NAME.tooltip`, and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
from comfyui import REPO, Client

LOCALES = REPO / "locales"
# A sign of each language's script. Han alone does not tell Chinese from Japanese, so Japanese is asked for kana.
SCRIPTS = {"ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7a3]", "zh": "[\u4e00-\u9fff]"}
MESSAGE_SIGNS = set("{}@|")  # the frontend's message compiler takes them for its own
FILES = re.compile(r".*_name|file")  # inputs that list files, whose names nobody translates
WORDS = re.compile(r"[a-z]+(?:-[a-z]+)*")  # options that are words; fp8_e4m3 is the same in every language

Texts = dict[str, str]  # path such as NODE.inputs.NAME.tooltip -> text


@pytest.fixture(scope="module")
def english(pack: ModuleType) -> Texts:
    """Every text of the nodes, as the server describes them in /object_info."""
    texts: Texts = {}
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        texts |= {f"{name}.{path}": text for path, text in described(node.GET_NODE_INFO_V1())}
    return texts


def described(info: dict) -> Iterator[tuple[str, str]]:
    """The paths and texts of a node's description."""
    yield "display_name", info["display_name"]
    yield "description", info["description"]
    for group in ("required", "optional"):
        for name, (kind, options) in info["input"].get(group, {}).items():
            yield f"inputs.{name}.name", options.get("display_name") or name
            if options.get("tooltip"):
                yield f"inputs.{name}.tooltip", options["tooltip"]
            if options.get("control_after_generate"):
                yield "inputs.control_after_generate.name", "control after generate"  # the frontend's own widget
            choices = kind if isinstance(kind, list) else options.get("options") or []
            for choice in [] if FILES.fullmatch(name) else filter(WORDS.fullmatch, map(str, choices)):
                yield f"inputs.{name}.options.{choice}", choice
    for index, name in enumerate(info["output_name"]):
        yield f"outputs.{index}.name", name
    for index, tooltip in enumerate(info.get("output_tooltips") or []):
        if tooltip:
            yield f"outputs.{index}.tooltip", tooltip


def flattened(tree: dict, prefix: str = "") -> Texts:
    """The strings of nested dictionaries by their dotted paths."""
    texts: Texts = {}
    for key, value in tree.items():
        texts |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return texts


def translated(language: str) -> Texts:
    return flattened(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def explained(text: str, options: set[str]) -> set[str]:
    """The options that a tooltip tells the meaning of, as `keep: ...` or `... (keep)`."""
    return {option for option in options if re.search(rf"(?<![\w-]){re.escape(option)}[:)]", text)}


def test_the_languages_are_those_that_are_checked():
    assert {folder.name for folder in LOCALES.iterdir()} == set(SCRIPTS)


@pytest.mark.parametrize("language", SCRIPTS)
def test_every_text_has_its_translation_and_nothing_is_left_of_texts_that_went(english: Texts, language: str):
    there = translated(language)
    missing, left = sorted(english.keys() - there.keys()), sorted(there.keys() - english.keys())
    listed = "\n".join(f"  {path}: {english[path]}" for path in missing)
    assert not missing, f"locales/{language}/nodeDefs.json lacks\n{listed}"
    assert not left, f"locales/{language}/nodeDefs.json has what no node has: {', '.join(left)}"


@pytest.mark.parametrize("language", SCRIPTS)
def test_sentences_are_in_the_language(language: str):
    texts = translated(language)
    sentences = {path: text for path, text in texts.items() if path.endswith(("description", "tooltip"))}
    foreign = [path for path, text in sentences.items() if not re.search(SCRIPTS[language], text)]
    assert not foreign
    names = [text for path, text in texts.items() if path.endswith("display_name")]
    assert all(name.startswith("PackForcing ") for name in names)  # so that they are found together


@pytest.mark.parametrize("language", SCRIPTS)
def test_translations_say_the_same_numbers_and_options(english: Texts, language: str):
    """What a change of the English text most often changes, and a forgotten translation still says."""
    choices: dict[str, set[str]] = {}
    for path in english:
        parent, _, choice = path.partition(".options.")
        if choice:
            choices.setdefault(parent, set()).add(choice)
    other = []
    for path, text in translated(language).items():
        if path.endswith(("description", "tooltip")):
            options = choices.get(path.removesuffix(".tooltip"), set())
            unsaid = {option for option in explained(english[path], options) if option not in text}
            if unsaid or numbers(english[path]) - numbers(text):
                other.append(f"{path}: {english[path]!r} became {text!r}")
    assert not other, "\n".join(other)


@pytest.mark.parametrize("language", SCRIPTS)
def test_the_frontend_shows_translations_as_they_are(language: str):
    texts = translated(language)
    assert all(text.strip() == text and text for text in texts.values())
    assert not [path for path, text in texts.items() if MESSAGE_SIGNS & set(text)]


def test_the_server_gives_them_to_the_frontend(client: Client):
    served = client.request("/i18n")
    for language in SCRIPTS:
        assert translated(language).items() <= flattened(served[language]["nodeDefs"]).items()
