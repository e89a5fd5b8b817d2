"""vLLM's OpenAI-compatible server as a process, and its completions.

It is started as a module, which is what ``vllm serve`` does: the command itself asks for the version of a package named
vllm, and the CPU build that is used here has another name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

START_SECONDS = 1800
"""A server compiles its model first; on one busy core that takes minutes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """A server of one folder, in float32, on a free port of this machine.

    Parameters
    ----------
    venv : Path
        Environment with vLLM's CPU build and the cospadi wheel.
    folder : Path
        Compressed checkpoint.
    log : Path
        Takes what the server prints.
    options : sequence of str
        More options of the server; the last of several counts.
    module : str
        The server.
    """

    def __init__(
        self,
        venv: Path,
        folder: Path,
        log: Path,
        options: Sequence[str] = (),
        module: str = "vllm.entrypoints.openai.api_server",
    ) -> None:
        self.port, self.log = free_port(), log
        command = [
            *(str(venv / "bin" / "python"), "-m", module),
            *("--model", str(folder)),
            *("--dtype", "float32", "--max-model-len", "256", "--block-size", "128"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "small"),
            *options,
        ]
        environment = {
            **os.environ,
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with log.open("w") as sink:
            # A session of its own, so that the engine's processes end with the server.
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=environment, start_new_session=True
            )

    def wait(self) -> VllmServer:
        """Wait until it answers; a server that ends instead fails the test with its last lines."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url("/health"), timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def url(self, path: str) -> str:
        """Return the address of a path of the server."""
        return f"http://127.0.0.1:{self.port}{path}"

    def ask(self, path: str, **body: object) -> dict:
        """Send one request and return the answer."""
        request = urllib.request.Request(
            self.url(path), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def greedy(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        """Return the most probable continuations of token ids, several requests at a time."""

        def continued(prompt: Sequence[int]) -> list[int]:
            answer = self.ask(
                "/v1/completions",
                model="small",
                prompt=list(prompt),
                max_tokens=n_tokens,
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
            )
            return answer["choices"][0]["token_ids"]

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(continued, prompts))

    def stop(self) -> None:
        """End the server and what it started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(timeout=60)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
