"""Absurd values for every widget of every node, as a node checks them before anything runs: in this process."""

from __future__ import annotations

import inspect
import time
from types import ModuleType
from typing import Any

from campaign.numbers import LONGEST, VALUES

FILES = ("model_name", "lora_name", "compressor_name", "file", "name", "save_json")  # which are looked for on the disk
# Nodes without a check of their own: choices of a list, or words of any kind.
UNCHECKED = {"PackForcingCachePreset", "PackForcingDemoModels", "PackForcingLivePrompt", "PackForcingSideBySide"}


def usual_inputs(node: Any) -> dict[str, Any]:
    """The values of a node's widgets as it comes."""
    return {each.id: each.default for each in node.define_schema().inputs if getattr(each, "default", None) is not None}


def test_absurd_values_in_widgets_are_refused_in_one_sentence(pack: ModuleType):
    given, problems, skipped = 0, [], set()
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        if "validate_inputs" not in vars(node):
            skipped.add(name)
            continue
        usual = usual_inputs(node)
        taken = inspect.signature(node.validate_inputs).parameters
        if not any(each.kind == inspect.Parameter.VAR_KEYWORD for each in taken.values()):
            usual = {key: value for key, value in usual.items() if key in taken}
        for key in usual:
            for value in VALUES if key not in FILES else ():
                given += 1
                start = time.process_time()
                try:
                    node.validate_inputs(**usual | {key: value})
                except Exception as error:
                    sentence = type(error).__name__ == "PackForcingError" and "\n" not in str(error)
                    if not sentence or len(str(error)) > 1000:
                        problems.append(f"{name}.{key} = {repr(value)[:40]}: {type(error).__name__}: {str(error)[:80]}")
                if time.process_time() - start > LONGEST:
                    problems.append(f"{name}.{key} = {repr(value)[:40]}: {time.process_time() - start:.2f} s")
    assert given > 500
    assert skipped == UNCHECKED
    assert not problems, "\n".join(problems)
