"""Engine that samples on vLLM servers, in other processes or on other hosts than the training."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moslim.generation.base import Completions, RolloutEngine
from moslim.generation.vllm_client import Client, ServerError
from moslim.generation.vllm_server import CompletionRequest, CompletionTokens, SamplingLimits, VLLMServer, WeightFolder
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.numerics import evenly_spaced
from moslim.training.distributed import process_count, process_rank
from moslim.utils.errors import UsageError


def logprob_difference(
    model: Any, input_ids: Tensor, attention_mask: Tensor, completions: Completions, rows: Tensor, temperature: float
) -> float:
    """Largest absolute difference between the log-probabilities of an engine and those of a forward pass here.

    Args:
        model: Policy, in eval mode.
        input_ids: ``[B, P]`` prompts, left-padded.
        attention_mask: ``[B, P]``.
        completions: ``N = B * n`` completions of the engine, those of one prompt adjacent.
        rows: ``[R]`` indices of the completions to compare.
        temperature: Sampling temperature; 0 (greedy) counts as 1.

    Returns:
        The difference; NaN if a log-probability is.
    """
    prompts = rows // (len(completions.tokens) // len(input_ids))
    tokens, mask = completions.tokens[rows], completions.mask[rows]
    ids = torch.cat([input_ids[prompts], tokens], dim=1)
    attention = torch.cat([attention_mask[prompts], mask.to(attention_mask.dtype)], dim=1)
    logprobs = completion_logprobs(
        model, CompletionBatch(ids, attention, mask), temperature, ForwardConfig(share_prefixes="never")
    )
    return float((logprobs - completions.logprobs[rows])[mask].abs().max())


class ParityError(ServerError):
    """Disagreement of trainer and server about the log-probabilities of the same tokens."""


class VLLMEngine(RolloutEngine):
    """Engine that samples on running vLLM servers, which load the policy's weights whenever these have changed.

    Each version of an adapter is loaded from a new folder under a new name, and the previous version is unloaded. Full
    weights are reloaded from a folder. On each call the log-probabilities of some completions are compared with those
    of the training process, which detects other weights on the server. See ``docs/vllm.md`` for starting one.

    Completions are drawn from a seed per prompt, so that a rollout repeats on an idle server. But the rounding in vLLM
    depends on the other requests in its batch, so that a completion may differ now and then.

    Args:
        max_new_tokens: Length limit of a completion, the end-of-sequence token included.
        temperature: Sampling temperature; 0 takes the most likely token.
        urls: Addresses of servers that were started with the model that training starts from. Prompts are split
            between them, and training processes divide them up. None = ``[http://127.0.0.1:8000]``.
        folder: Folder where weights are saved for the servers; all hosts must see it.
        server_folder: Path of that folder on the servers' hosts; None = the same.
        api_key_env: Name of the environment variable that holds the servers' API key.
        tolerance: Largest accepted difference of two log-probabilities. The default suits float32; bfloat16 needs more.
        parity_completions: Number of completions per server and call that are compared.
        timeout: Seconds that a request may take, from the connection to the last byte of the response.
        patience: Seconds to wait for a server that becomes unavailable; a restarted server gets the weights again.

    Raises:
        UsageError: An argument is out of range.
    """

    in_process = False

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        urls: list[str] | None = None,
        folder: str = "outputs/vllm",
        server_folder: str | None = None,
        api_key_env: str = "VLLM_API_KEY",
        tolerance: float = 1e-3,
        parity_completions: int = 4,
        timeout: float = 600.0,
        patience: float = 300.0,
    ) -> None:
        super().__init__(max_new_tokens, temperature)
        if urls == []:
            raise UsageError("engine.urls is empty: give at least one server's address")
        if parity_completions < 1:
            raise UsageError(f"engine.parity_completions is {parity_completions}: give at least 1")
        addresses = urls or ["http://127.0.0.1:8000"]
        clients = [Client(url, api_key_env, timeout, patience) for url in addresses]
        self.servers = [VLLMServer(client, server_folder) for client in clients]
        self._weights = WeightFolder(folder)
        self.tolerance = tolerance
        self.parity_completions = parity_completions
        self.difference = 0.0
        """Largest difference of log-probabilities in the last call."""

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: Tensor,
        eos_ids: list[int],
        pad_id: int,
    ) -> Completions:
        num_generations = seeds.shape[1]
        prompts = [row[keep].tolist() for row, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        requests = [
            CompletionRequest(prompt, num_generations, _seed(row))
            for prompt, row in zip(prompts, seeds.tolist(), strict=True)
        ]
        version = self._weights.save(model)
        is_adapter = version is None or version.adapter
        servers = own_servers(self.servers, process_count(), process_rank(), is_adapter)[: len(requests)]
        bounds = [len(requests) * i // len(servers) for i in range(len(servers) + 1)]
        shares = [requests[start:end] for start, end in pairwise(bounds)]
        vocabulary = len(model.get_input_embeddings().weight)
        limits = SamplingLimits(self.max_new_tokens, self.temperature, eos_ids, vocabulary)
        with ThreadPoolExecutor(len(servers)) as pool:
            replies = list(pool.map(lambda server, share: server.generate(version, share, limits), servers, shares))
        self._weights.forget()

        ordered = [completion for share in replies for group in share for completion in group]
        completions = _padded(ordered, eos_ids, pad_id, input_ids.device)
        self.difference = 0.0
        for server, (start, end) in zip(servers, pairwise(bounds), strict=True):
            indices = evenly_spaced((end - start) * num_generations, self.parity_completions)
            rows = torch.tensor([start * num_generations + index for index in indices], dtype=torch.long)
            difference = logprob_difference(model, input_ids, attention_mask, completions, rows, self.temperature)
            if not difference <= self.tolerance:  # also true for NaN
                raise ParityError(self._disagreement(server.url, difference))
            self.difference = max(self.difference, difference)
        return completions

    def _disagreement(self, url: str, difference: float) -> str:
        return (
            f"trainer and {url} differ by {difference:.3g} in the log-probability of the same token; "
            f"engine.tolerance is {self.tolerance:g}. The server was started with another model, computes in another "
            "dtype (--dtype), or returns log-probabilities before temperature (--logprobs-mode processed_logprobs). "
            "If it is rounding only, raise the tolerance"
        )


def own_servers(servers: list[VLLMServer], processes: int, rank: int, adapted: bool) -> list[VLLMServer]:
    """Selects the servers of one training process; there may be more servers than processes, or fewer.

    Args:
        servers: All servers.
        processes: Number of processes.
        rank: Rank of the process.
        adapted: Whether an adapter is trained; a server can hold several.

    Raises:
        UsageError: Processes that train all weights would share a server.
    """
    if len(servers) >= processes:
        return servers[rank::processes]
    if not adapted:
        raise UsageError(
            f"{processes} processes train all weights, but engine.urls names {len(servers)} servers: give each process "
            "its own, or train an adapter (lora)"
        )
    return [servers[rank % len(servers)]]


def _seed(seeds: Sequence[int]) -> int:
    """Seed of a prompt's first completion, small enough for vLLM to count up from it within int64."""
    return seeds[0] % 2**62


def _padded(
    completions: Sequence[CompletionTokens], eos_ids: list[int], pad_id: int, device: torch.device
) -> Completions:
    longest = max(len(completion.tokens) for completion in completions)
    padding = [longest - len(completion.tokens) for completion in completions]
    tokens = [completion.tokens + [pad_id] * pad for completion, pad in zip(completions, padding, strict=True)]
    logprobs = [completion.logprobs + [0.0] * pad for completion, pad in zip(completions, padding, strict=True)]
    mask = [[index < longest - pad for index in range(longest)] for pad in padding]
    ended = [completion.tokens[-1] in eos_ids for completion in completions]
    return Completions(
        torch.tensor(tokens, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(logprobs, dtype=torch.float32, device=device),
        torch.tensor(ended, device=device),
    )
