"""Knows which files of a repository a model is made of; asks nobody."""

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from moecli.errors import MoecliError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a checkpoint needs besides config.json and weights, where it has it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def head_files(names: Collection[str]) -> list[str]:
    """What says of what sizes a model is: little, and enough to plan with."""
    return [name for name in (CONFIG, INDEX) if name in names]


def small_files(names: Collection[str]) -> list[str]:
    """All that is no weights: tokenizer, templates and licences too."""
    return [*head_files(names), *(name for name in COMPANIONS if name in names)]


def check_names(repo_id: str, names: Collection[str]) -> None:
    """Raise MoecliError unless a model in safetensors is among the files."""
    if CONFIG not in names:
        raise MoecliError(
            f"`{repo_id}` has no `{CONFIG}`: it is no model in the form of Hugging Face",
            "GGUF files and adapters are not read; take the original model",
        )
    if INDEX in names or SINGLE in names:
        return
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in _PICKLES)
    if pickles:
        raise MoecliError(
            f"`{repo_id}` has only pickled weights (`{pickles[0]}`), which may run code when read",
            "use a safetensors version of this model",
        )
    raise MoecliError(
        f"`{repo_id}` has neither `{SINGLE}` nor `{INDEX}`",
        "use a safetensors version of this model",
    )


def weight_files(repo_id: str, index: Mapping[str, Any] | None) -> list[str]:
    """The files with weights: those that the index names, or the only one."""
    if index is None:
        return [SINGLE]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MoecliError(f"the index of `{repo_id}` has no weight_map", "take another revision")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A name that leads out of the directory must not be followed.
        if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
            raise MoecliError(f"the index of `{repo_id}` names the impossible file {name!r:.80}")
    return names
