"""One vLLM server: transfer of weights, requests for completions, and validation of its replies.

The routes are those of vLLM 0.32.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from moslim.generation.vllm_client import Client, Refused, ServerError, Unavailable

_HIGHEST = 1e-3  # log-probability that rounding can lead to
_LOWEST = -1e4  # vLLM's log-probability of an impossible token; below it, float32 overflows in a ratio
_BYTES_PER_TOKEN, _BYTES_PER_PROMPT_TOKEN, _BYTES = 2048, 16, 1 << 18
_KEPT = 2  # versions on disk: a test may alternate between the full weights of policy and reference
_CONNECTIONS = 64
_NOT_FOUND, _ENGINE_DIED = 404, 500


@dataclass(frozen=True)
class CompletionRequest:
    """Request for the completions of one prompt.

    Args:
        prompt: Token ids.
        num_generations: Number of completions.
        seed: Seed of the first completion; completion ``i`` is drawn with ``seed + i``.
    """

    prompt: list[int]
    num_generations: int
    seed: int


@dataclass(frozen=True)
class SamplingLimits:
    """Options of sampling that all requests share.

    Args:
        max_new_tokens: Length limit of a completion.
        temperature: Sampling temperature; 0 takes the most likely token.
        eos_ids: Tokens that end a completion and are part of it.
        vocabulary: Number of token ids.
    """

    max_new_tokens: int
    temperature: float
    eos_ids: list[int]
    vocabulary: int


@dataclass(frozen=True)
class CompletionTokens:
    """Token ids of one completion and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


def largest_reply(request: CompletionRequest, limits: SamplingLimits) -> int:
    """Upper bound of the size of the reply to a request, in bytes."""
    completions = request.num_generations * limits.max_new_tokens * _BYTES_PER_TOKEN
    return completions + (request.num_generations + 1) * len(request.prompt) * _BYTES_PER_PROMPT_TOKEN + _BYTES


def completions_of(
    reply: Any, request: CompletionRequest, limits: SamplingLimits, client: Client
) -> list[CompletionTokens]:
    """Validates the reply of ``/v1/completions`` to one request.

    Args:
        reply: Decoded reply.
        request: Request that was sent.
        limits: Options of sampling.
        client: Client of the server, for error texts.

    Returns:
        The requested completions in the order of their seeds.

    Raises:
        Unavailable: The server aborted a completion, as it does when it ends or is paused.
        ServerError: The reply is invalid: completions are missing, too many, repeated or of another prompt; token ids
            are missing, outside of the vocabulary, too many or continue after an end; there is not one finite
            log-probability of at most 0 per token; or the finish reason contradicts the tokens.
    """

    def error(fault: str) -> ServerError:
        return ServerError(
            f"{client.url}/v1/completions was asked for {request.num_generations} completions of at most "
            f"{limits.max_new_tokens} tokens of one prompt of {len(request.prompt)} tokens, and {fault}. Is it vLLM, "
            "0.11 or later, and does no proxy change its replies?"
        )

    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise error(f"sent {client.quoted(reply)}")
    if len(choices) != request.num_generations:
        raise error(f"gave {len(choices)} completions")
    by_index: dict[int, dict[str, Any]] = {}
    for choice in choices:
        index = choice.get("index")
        if not _is_integer(index) or not 0 <= index < request.num_generations or index in by_index:
            why = "twice" if _is_integer(index) and index in by_index else "which was not requested"
            raise error(f"gave a completion of index {client.quoted(index)}, {why}")
        by_index[index] = choice
    ordered = [by_index[index] for index in range(request.num_generations)]
    if any(choice.get("finish_reason") == "abort" for choice in ordered):
        raise Unavailable(f"{client.url}/v1/completions aborted a completion (finish_reason `abort`)")
    if ordered[0].get("prompt_token_ids") is None:
        raise error("does not return the prompt (prompt_token_ids)")
    for index, choice in enumerate(ordered):
        fault = _fault(choice, request.prompt, limits, client.quoted)
        if fault is not None:
            raise error(f"completion {index} {fault}")
    return [CompletionTokens(choice["token_ids"], [float(p) for p in _logprobs(choice)]) for choice in ordered]


def models_of(reply: Any, client: Client) -> tuple[str, set[str]]:
    """Validates the reply of ``/v1/models``.

    Returns:
        The name of the model that the server was started with, and the names of all its models and adapters.

    Raises:
        ServerError: The reply is not a list of models, or lists adapters only.
    """
    cards = reply.get("data") if isinstance(reply, dict) else None
    valid = isinstance(cards, list) and all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
    )
    if not valid or not cards:
        raise ServerError(
            f"{client.url}/v1/models was asked for the list of models, and sent {client.quoted(reply)}: is it vLLM?"
        )
    base = next((card["id"] for card in cards if not card.get("parent")), None)
    if base is None:
        raise ServerError(f"{client.url}/v1/models lists adapters only, and not their base model: is it vLLM?")
    return base, {card["id"] for card in cards}


def _fault(
    choice: dict[str, Any], prompt: Sequence[int], limits: SamplingLimits, quoted: Callable[[Any], str]
) -> str | None:
    """The first fault of a completion; None if it is valid."""
    if choice.get("prompt_token_ids") not in (None, prompt):
        return "is of another prompt than was sent: does the server cut or extend prompts?"
    tokens, logprobs = choice.get("token_ids"), _logprobs(choice)
    if not isinstance(tokens, list) or not tokens:
        return f"has no token ids, but {quoted(tokens)}"
    invalid = next((token for token in tokens if not _is_integer(token) or not 0 <= token < limits.vocabulary), None)
    if invalid is not None or None in tokens:
        return f"holds the token {quoted(invalid)}, which is not in the vocabulary of {limits.vocabulary}"
    if len(tokens) > limits.max_new_tokens:
        return f"has {len(tokens)} tokens"
    end = next((i for i, token in enumerate(tokens) if token in limits.eos_ids), None)
    if end is not None and end < len(tokens) - 1:
        return f"continues after the token {tokens[end]} at position {end}, which ends completions"
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        count = len(logprobs) if isinstance(logprobs, list) else "no"
        return f"has {count} log-probabilities for {len(tokens)} tokens"
    invalid_logprobs = [p for p in logprobs if not _is_finite(p) or not _LOWEST <= p <= _HIGHEST]
    if invalid_logprobs:
        return f"has a log-probability of {quoted(invalid_logprobs[0])}"
    match choice.get("finish_reason"):
        case "stop" if end is None:
            return "was ended (finish_reason `stop`) without a token that ends completions"
        case "length" if len(tokens) < limits.max_new_tokens:
            return (
                f"was cut after {len(tokens)} tokens (finish_reason `length`): start the server with a --max-model-len "
                f"of at least {len(prompt) + limits.max_new_tokens}"
            )
        case "stop" | "length":
            return None
        case reason:
            return f"ended for an unknown reason (finish_reason {quoted(reason)})"


def _logprobs(choice: dict[str, Any]) -> Any:
    logprobs = choice.get("logprobs")
    return logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


@dataclass(frozen=True)
class Version:
    """Saved version of the weights.

    Args:
        name: Name with a hash of the weights: equal weights have equal names, in every process and run.
        folder: Folder as the trainer sees it.
        adapter: True for the weights of an adapter, false for those of the whole model.
    """

    name: str
    folder: Path
    adapter: bool


class WeightFolder:
    """Folder with the last versions of a model's weights, for servers to load.

    Args:
        folder: Path; several runs and processes may share it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._kept: list[Version] = []

    def save(self, model: Any) -> Version | None:
        """Saves the weights if they have changed.

        Args:
            model: Transformers model, or peft model, whose active adapter is saved.

        Returns:
            The version; None for a peft model whose adapter is disabled, as the server has the base model.
        """
        if not hasattr(model, "peft_config"):
            return self._saved(model.state_dict(), False, model.save_pretrained)
        if _adapter_disabled(model):
            return None
        from peft import get_peft_model_state_dict

        active = model.active_adapter
        options = {"adapter_name": active, "save_embedding_layers": False}
        scale = model.peft_config[active].lora_alpha
        state = {**get_peft_model_state_dict(model, **options), "alpha": torch.tensor(float(scale))}

        def write(folder: Path) -> None:
            model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
            if active != "default":  # peft saves it in a subfolder
                (folder / active).rename(folder.with_suffix(".inner"))
                shutil.rmtree(folder)
                folder.with_suffix(".inner").rename(folder)

        return self._saved(state, True, write)

    def forget(self) -> None:
        """Deletes all but the last versions; call it once no server needs older ones."""
        for version in self._kept[:-_KEPT]:
            shutil.rmtree(version.folder, ignore_errors=True)
        self._kept = self._kept[-_KEPT:]

    def _saved(self, state: dict[str, Tensor], adapter: bool, write: Callable[[Path], Any]) -> Version:
        name = f"moslim-{digest(state)}"
        version = Version(name, self.folder / name, adapter)
        self._kept = [*(kept for kept in self._kept if kept != version), version]
        if not version.folder.exists():
            part = self.folder / f".{name}-{uuid4().hex}"
            write(part)
            try:
                os.rename(part, version.folder)
            except OSError:  # another process was first
                shutil.rmtree(part)
        return version


def digest(state: dict[str, Tensor]) -> str:
    """Hash of all names, shapes, dtypes and values."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def _adapter_disabled(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) and layer.disable_adapters for layer in model.modules())


class VLLMServer:
    """A running vLLM server.

    Args:
        client: Client of the server.
        folder: Path of the weight folder on the server's host; None = the same as here.
    """

    def __init__(self, client: Client, folder: str | None) -> None:
        self.client = client
        self._folder = folder
        self._adapter: str | None = None  # the last one that this process loaded

    @property
    def url(self) -> str:
        """Address of the server."""
        return self.client.url

    def generate(
        self, version: Version | None, requests: Sequence[CompletionRequest], limits: SamplingLimits
    ) -> list[list[CompletionTokens]]:
        """Generates completions with the given weights, after loading these into the server if it lacks them.

        If the server becomes unavailable, all is repeated once it is back: it may have been restarted, with the weights
        that it starts with.

        Args:
            version: Weights; None = those that the server was started with.
            requests: Requests; they are sent concurrently, as the server batches them.
            limits: Options of sampling.

        Returns:
            The completions of each request.

        Raises:
            ServerError: The server is unavailable or does not support a request.
        """

        def attempt() -> list[list[CompletionTokens]]:
            model = self._serve(version)
            with ThreadPoolExecutor(min(len(requests), _CONNECTIONS)) as pool:
                return list(pool.map(lambda request: self._complete(model, request, limits), requests))

        return self.client.patiently(attempt)

    def _serve(self, version: Version | None) -> str:
        """Loads the weights into the server and returns the name of the model to request."""
        base, names = self._models()
        if version is None:
            return base
        if not version.adapter:
            self._reload(version)  # each time, since the server may have been restarted
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

    def _server_path(self, version: Version) -> str:
        return str(Path(self._folder) / version.name if self._folder else version.folder.absolute())

    def _load(self, version: Version) -> None:
        path = self._server_path(version)
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
        path = self._server_path(version)
        try:
            self.client.order("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            self.client.order("/reset_prefix_cache", {})  # it was computed with the old weights
        except Refused as error:
            raise ServerError(
                f"the weights were not reloaded: {error}. The server must see the folder {path} "
                "(engine.server_folder), and be started with VLLM_SERVER_DEV_MODE=1; or train an adapter (lora)"
            ) from error

    def _complete(self, model: str, request: CompletionRequest, limits: SamplingLimits) -> list[CompletionTokens]:
        greedy = limits.temperature == 0  # vLLM returns a single greedy completion
        sent = replace(request, num_generations=1) if greedy else request
        try:
            reply = self.client.post("/v1/completions", _body(model, sent, limits), largest_reply(sent, limits))
        except Refused as error:
            if error.status in (_NOT_FOUND, _ENGINE_DIED):  # not found: a restarted server has no adapter
                raise Unavailable(str(error)) from error
            raise
        completions = completions_of(reply, sent, limits, self.client)
        return completions * request.num_generations if greedy else completions


def _body(model: str, request: CompletionRequest, limits: SamplingLimits) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": request.prompt,
        "n": request.num_generations,
        "seed": request.seed,
        "max_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        # Explicit, since the model's generation_config.json would otherwise change the distribution.
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"stop_token_ids": limits.eos_ids, "ignore_eos": True},
        **{"logprobs": 0, "return_token_ids": True},
    }
