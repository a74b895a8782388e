"""Asks vLLM to go on with prompts: runs in vLLM's own environment and knows nothing of moecli.

    PYTHON vllm_worker.py REQUEST.json RESPONSE.json

What vLLM raises is not caught: whoever started this process reads it from the process's output.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    model = LLM(**request["engine"])
    sampling = SamplingParams(**request["sampling"])
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    answers = [_answer(output.outputs[0]) for output in model.generate(prompts, sampling)]
    versions = {name: importlib.metadata.version(name) for name in request["packages"]}
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, "versions": versions}))


def _answer(output: Any) -> dict[str, Any]:
    """The tokens, and the log probabilities of the likeliest ones at each place."""
    logprobs = [
        {str(token): entry.logprob for token, entry in place.items()} for place in output.logprobs
    ]
    return {"tokens": list(output.token_ids), "logprobs": logprobs}


if __name__ == "__main__":  # vLLM starts its processes by importing this file
    main()
