"""Knows how a worker is told what to do: a line of JSON in, a line of JSON out, one at a time.

Standard library only. Between two requests a worker waits for its stdin and computes nothing.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

Handlers = dict[str, Callable[..., Any]]


def serve(handlers: Handlers) -> None:
    """Answer `{"do": name, ...arguments}` until stdin ends.

    Whatever else is printed goes to stderr, so that answers stand alone on stdout.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": handlers[request.pop("do")](**request)}
        except Exception as error:  # noqa: BLE001 - the caller decides what a failure means
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)
