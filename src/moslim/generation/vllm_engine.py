"""Generation by vLLM servers.

Do the trainer and an engine that runs elsewhere hold the same policy?

Sampling by vLLM servers: other processes, or other hosts, than the one that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moslim.generation.base import Completions, RolloutEngine
from moslim.generation.vllm_client import Client, ServerError
from moslim.generation.vllm_server import Answer, CompletionRequest, Limits, VLLMServer, WeightFolder
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.numerics import evenly_spaced
from moslim.training.distributed import process_count, process_rank
from moslim.utils.errors import UsageError


def logprob_difference(
    model: Any, input_ids: Tensor, attention_mask: Tensor, found: Completions, rows: Tensor, temperature: float
) -> float:
    """Largest absolute difference between an engine's log-probabilities and those of a forward pass here.

    Args:
        model: The policy, in eval mode.
        input_ids: ``[B, P]`` prompts, left-padded.
        attention_mask: ``[B, P]``.
        found: The engine's ``N = B * n`` answers, those of one prompt adjacent.
        rows: ``[R]`` the answers to compare.
        temperature: The sampler's; 0 (greedy) is taken as 1.

    Returns:
        A number; NaN where either side gave one.
    """
    owners = rows // (len(found.tokens) // len(input_ids))
    tokens, mask = found.tokens[rows], found.mask[rows]
    ids = torch.cat([input_ids[owners], tokens], dim=1)
    attention = torch.cat([attention_mask[owners], mask.to(attention_mask.dtype)], dim=1)
    own = completion_logprobs(
        model, CompletionBatch(ids, attention, mask), temperature, ForwardConfig(share_prefixes="never")
    )
    return float((own - found.logprobs[rows])[mask].abs().max())


class ParityError(ServerError):
    """Trainer and server give other log-probabilities to the same tokens."""


class VLLMEngine(RolloutEngine):
    """Samples with running vLLM servers, which get the policy's weights whenever these have changed.

    An adapter is pushed under a new name and from a new folder per version, and its predecessor unloaded; all weights
    are reloaded from a folder. The training process's own log-probabilities of some answers of every call are compared
    with the server's, so that a server with other weights cannot go unnoticed. ``docs/vllm.md`` says how to start one.

    Answers are drawn from a seed per prompt, so that a rollout repeats on an idle server; but vLLM's rounding depends
    on what else is in its batch, so that now and then an answer differs.

    Args:
        max_new_tokens: Length limit of an answer, the end-of-sequence token included.
        temperature: Sampling temperature; 0 takes the most likely token.
        urls: Addresses of servers that were started with the model that training starts from. Prompts are split over
            them; training processes share them out. None = ``[http://127.0.0.1:8000]``.
        folder: Where weights are put for the servers; all hosts must see it.
        server_folder: Path of that folder on the servers' hosts; None = the same.
        api_key_env: Name of the environment variable that holds the servers' API key.
        tolerance: Largest accepted difference of two log-probabilities. The default suits float32; bfloat16 needs more.
        parity_answers: Answers per server and call that are compared.
        timeout: Seconds that a server may take over a prompt, from the connection to the last byte of its answer.
        patience: Seconds to wait for a server that stops answering; one that is restarted gets its weights again.

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
        parity_answers: int = 4,
        timeout: float = 600.0,
        patience: float = 300.0,
    ) -> None:
        super().__init__(max_new_tokens, temperature)
        if urls == []:
            raise UsageError("engine.urls is empty: give at least one server's address")
        if parity_answers < 1:
            raise UsageError(f"engine.parity_answers is {parity_answers}: give at least 1")
        addresses = urls or ["http://127.0.0.1:8000"]
        clients = [Client(url, api_key_env, timeout, patience) for url in addresses]
        self.servers = [VLLMServer(client, server_folder) for client in clients]
        self._weights = WeightFolder(folder)
        self.tolerance = tolerance
        self.parity_answers = parity_answers
        self.difference = 0.0
        """Largest difference of two log-probabilities in the last call."""

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
        samples = seeds.shape[1]
        prompts = [row[keep].tolist() for row, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        requests = [
            CompletionRequest(prompt, samples, _seed(row)) for prompt, row in zip(prompts, seeds.tolist(), strict=True)
        ]
        version = self._weights.save(model)
        adapted = version is None or version.adapter
        servers = own_servers(self.servers, process_count(), process_rank(), adapted)[: len(requests)]
        bounds = [len(requests) * i // len(servers) for i in range(len(servers) + 1)]
        shares = [requests[start:end] for start, end in pairwise(bounds)]
        vocabulary = len(model.get_input_embeddings().weight)
        limits = Limits(self.max_new_tokens, self.temperature, eos_ids, vocabulary)
        with ThreadPoolExecutor(len(servers)) as pool:
            found = list(pool.map(lambda server, share: server.answers(version, share, limits), servers, shares))
        self._weights.forget()

        answers = [answer for share in found for group in share for answer in group]
        completions = _completions(answers, eos_ids, pad_id, input_ids.device)
        self.difference = 0.0
        for server, (start, end) in zip(servers, pairwise(bounds), strict=True):
            chosen = evenly_spaced((end - start) * samples, self.parity_answers)
            rows = torch.tensor([start * samples + index for index in chosen], dtype=torch.long)
            difference = logprob_difference(model, input_ids, attention_mask, completions, rows, self.temperature)
            if not difference <= self.tolerance:  # so written, NaN fails too
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
    """The servers that one of several training processes uses; there may be more of them than processes, or fewer.

    Args:
        servers: All servers.
        processes: Number of processes.
        rank: Which of them asks.
        adapted: Whether an adapter is trained, of which a server can hold several.

    Raises:
        UsageError: A process would overwrite the weights of a server while another samples.
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
    """The seed of a prompt's first answer; vLLM counts up from it, within int64."""
    return seeds[0] % 2**62


def _completions(answers: Sequence[Answer], eos_ids: list[int], pad_id: int, device: torch.device) -> Completions:
    longest = max(len(answer.tokens) for answer in answers)
    padding = [longest - len(answer.tokens) for answer in answers]
    pairs = list(zip(answers, padding, strict=True))
    tokens = [answer.tokens + [pad_id] * pad for answer, pad in pairs]
    logprobs = [answer.logprobs + [0.0] * pad for answer, pad in pairs]
    mask = [[True] * len(answer.tokens) + [False] * pad for answer, pad in pairs]
    ended = [answer.tokens[-1] in eos_ids for answer in answers]
    return Completions(
        torch.tensor(tokens, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(logprobs, dtype=torch.float32, device=device),
        torch.tensor(ended, device=device),
    )
