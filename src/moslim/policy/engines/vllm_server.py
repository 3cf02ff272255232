"""One vLLM server: which weights it answers with, and its answers (routes of vLLM 0.32)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from moslim.policy.engines.vllm_client import Client, Refused, ServerError, Unavailable
from moslim.policy.engines.vllm_reply import Answer, CompletionRequest, Limits, answers_of, largest_reply, models_of
from moslim.policy.engines.vllm_weights import Version

_CONNECTIONS = 64
_NOT_FOUND, _ENGINE_DIED = 404, 500


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

    def answers(
        self, version: Version | None, requests: Sequence[CompletionRequest], limits: Limits
    ) -> list[list[Answer]]:
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
        base, names = self._models()
        if version is None:
            return base
        if not version.adapter:
            self._reload(version)  # each time: nothing shows whether the server was restarted since
            return base
        if version.name not in names:
            self._load(version)
            if version.name not in self._models()[1]:
                raise ServerError(
                    f"{self.url} accepted the adapter {version.name} but does not list it in /v1/models: is it vLLM?"
                )
        if self._adapter in names - {version.name}:
            self._unload(self._adapter)
        self._adapter = version.name
        return version.name

    def _models(self) -> tuple[str, set[str]]:
        return models_of(self.client.get("/v1/models"), self.client)

    def _seen(self, version: Version) -> str:
        return str(Path(self._folder) / version.name if self._folder else version.folder.absolute())

    def _load(self, version: Version) -> None:
        path = self._seen(version)
        try:
            self.client.order("/v1/load_lora_adapter", {"lora_name": version.name, "lora_path": path})
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
            self.client.order("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != _NOT_FOUND:  # by another process of this run
                raise

    def _reload(self, version: Version) -> None:
        path = self._seen(version)
        try:
            self.client.order("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            self.client.order("/reset_prefix_cache", {})  # it holds keys and values of the old weights
        except Refused as error:
            raise ServerError(
                f"the weights were not reloaded: {error}. The server must see the folder {path} "
                "(engine.server_folder), and be started with VLLM_SERVER_DEV_MODE=1; or train an adapter (lora)"
            ) from error

    def _complete(self, model: str, request: CompletionRequest, limits: Limits) -> list[Answer]:
        greedy = limits.temperature == 0  # of which vLLM gives one answer only
        sent = replace(request, samples=1) if greedy else request
        try:
            found = self.client.post("/v1/completions", _body(model, sent, limits), largest_reply(sent, limits))
        except Refused as error:
            if error.status in (_NOT_FOUND, _ENGINE_DIED):  # the first: it was restarted and knows no adapter
                raise Unavailable(str(error)) from error
            raise
        answers = answers_of(found, sent, limits, self.client)
        return answers * request.samples if greedy else answers


def _body(model: str, request: CompletionRequest, limits: Limits) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": request.prompt,
        "n": request.samples,
        "seed": request.seed,
        "max_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        # Written out, as the model's generation_config.json would otherwise change the distribution.
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"stop_token_ids": limits.eos_ids, "ignore_eos": True},
        **{"logprobs": 0, "return_token_ids": True},
    }
