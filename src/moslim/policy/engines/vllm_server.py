"""One vLLM server: which weights it answers with, and its answers (routes of vLLM 0.32)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslim.policy.engines.vllm_client import Client, Refused, ServerError, Unavailable
from moslim.policy.engines.vllm_weights import Version

_CONNECTIONS = 64
_NOT_FOUND, _ENGINE_DIED = 404, 500


@dataclass(frozen=True)
class Request:
    """One prompt.

    Args:
        prompt: Token ids.
        samples: Number of answers.
        seed: Answer ``i`` is drawn with ``seed + i``.
    """

    prompt: list[int]
    samples: int
    seed: int


@dataclass(frozen=True)
class Limits:
    """How to sample.

    Args:
        max_new_tokens: Length limit.
        temperature: 0 takes the most likely token.
        eos_ids: Tokens that end an answer, and are part of it.
    """

    max_new_tokens: int
    temperature: float
    eos_ids: list[int]


@dataclass(frozen=True)
class Answer:
    """Token ids as the server drew them, with their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


class VLLMServer:
    """A running server.

    Args:
        client: Connection to it.
        folder: Where it sees the trainer's weight folder; None = under the same path.
    """

    def __init__(self, client: Client, folder: str | None) -> None:
        self.client = client
        self._folder = folder
        self._adapter: str | None = None  # the last one that this engine loaded

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    def answers(self, version: Version | None, requests: Sequence[Request], limits: Limits) -> list[list[Answer]]:
        """Answers prompts with the given weights, which are brought to the server first where it lacks them.

        When the server goes away in between, everything is done anew once it is back: it may have been restarted, and
        then it has the weights that it starts with.

        Args:
            version: The weights; None = those that the server was started with.
            requests: The prompts; all are sent at once, as the server batches them itself.
            limits: How to sample.

        Returns:
            For each prompt, its answers.

        Raises:
            ServerError: The server is not there, stayed away, or does not support what is asked of it.
        """

        def attempt() -> list[list[Answer]]:
            model = self._serve(version)
            with ThreadPoolExecutor(min(len(requests), _CONNECTIONS)) as pool:
                return list(pool.map(lambda request: self._complete(model, request, limits), requests))

        return self.client.patiently(attempt)

    def _serve(self, version: Version | None) -> str:
        """Makes the server hold the weights, and returns the name that they are asked for by."""
        cards = self.client.get("/v1/models")["data"]
        base, names = next(card["id"] for card in cards if not card.get("parent")), {card["id"] for card in cards}
        if version is None:
            return base
        if not version.adapter:
            self._reload(version)  # each time: nothing shows whether the server was restarted since
            return base
        if version.name not in names:
            self._load(version)
        if self._adapter in names - {version.name}:
            self._unload(self._adapter)
        self._adapter = version.name
        return version.name

    def _seen(self, version: Version) -> str:
        return str(Path(self._folder) / version.name if self._folder else version.folder.absolute())

    def _load(self, version: Version) -> None:
        path = self._seen(version)
        try:
            self.client.post("/v1/load_lora_adapter", {"lora_name": version.name, "lora_path": path})
        except Refused as error:
            if "already been loaded" in str(error):  # by another process of this run
                return
            raise ServerError(
                f"the adapter was not loaded: {error}. The server must see the folder {path} (engine.server_folder), "
                "and be started with --enable-lora, --max-lora-rank of at least lora.rank and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; or train all weights"
            ) from error

    def _unload(self, name: str | None) -> None:
        try:
            self.client.post("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != _NOT_FOUND:  # by another process of this run
                raise

    def _reload(self, version: Version) -> None:
        path = self._seen(version)
        try:
            self.client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            self.client.post("/reset_prefix_cache", {})  # it holds keys and values of the old weights
        except Refused as error:
            raise ServerError(
                f"the weights were not reloaded: {error}. The server must see the folder {path} "
                "(engine.server_folder), and be started with VLLM_SERVER_DEV_MODE=1; or train an adapter (lora)"
            ) from error

    def _complete(self, model: str, request: Request, limits: Limits) -> list[Answer]:
        greedy = limits.temperature == 0  # of which vLLM gives one answer only
        try:
            found = self.client.post("/v1/completions", _body(model, request, limits, 1 if greedy else request.samples))
        except Refused as error:
            if error.status in (_NOT_FOUND, _ENGINE_DIED):  # the first: it was restarted and knows no adapter
                raise Unavailable(str(error)) from error
            raise
        answers = _parsed(found, request.prompt, self.url)
        return answers * request.samples if greedy else answers


def _body(model: str, request: Request, limits: Limits, samples: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": request.prompt,
        "n": samples,
        "seed": request.seed,
        "max_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        # Written out, as the model's generation_config.json would otherwise change the distribution.
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"stop_token_ids": limits.eos_ids, "ignore_eos": True},
        **{"logprobs": 0, "return_token_ids": True},
    }


def _parsed(found: dict[str, Any], prompt: list[int], url: str) -> list[Answer]:
    answers = []
    for choice in sorted(found["choices"], key=lambda choice: choice["index"]):
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or not logprobs or len(tokens) != len(logprobs):
            raise ServerError(f"{url} returned no token ids with log-probabilities: is it vLLM, 0.11 or later?")
        if choice.get("prompt_token_ids", prompt) != prompt:
            raise ServerError(f"{url} answered another prompt than it was sent: does it cut or extend prompts?")
        answers.append(Answer(tokens, logprobs))
    return answers
