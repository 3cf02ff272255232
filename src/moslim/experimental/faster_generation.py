"""Generation that may be faster but has no measured gain so far.

:class:`OneStepOff` samples the completions of the next batch during the update on the current ones. Missing
measurement: a run whose engine has its own device (vLLM servers). On shared cores, sampling and update only take turns
(``benchmarks/policy_stage.py``).

:class:`StaticTorchEngine` decodes with a key-value cache of fixed size, optionally compiled. Missing measurement: a
rollout on a GPU, where the compiled step becomes a CUDA graph. On a CPU it is slower than the growing cache
(``benchmarks/rollouts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from moslim.data.types import PromptBatch
from moslim.generation.base import Completions
from moslim.generation.decoding import Decoding, continues
from moslim.generation.kv_cache import Continuation, Prompts
from moslim.generation.torch_engine import TorchEngine
from moslim.policy.generation import BatchKey, Generations
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.policy.rollout import RolloutCollector
from moslim.training.checkpoint_files import GUARD_RECORD
from moslim.training.distributed import gathered, process_count
from moslim.training.optim import StepLoader
from moslim.utils.errors import UsageError


@dataclass
class Sampled:
    """Completions of a training batch.

    Args:
        generations: The completions.
        version: Number of optimizer steps of the policy that sampled them.
    """

    generations: Generations
    version: int

    def state(self) -> dict[str, Any]:
        """Returns plain data and CPU tensors, which a checkpoint can hold with ``weights_only``."""
        fields = vars(self.generations)
        tensors = {
            **vars(self.generations.completions),
            **{name: fields[name] for name in ("input_ids", "attention_mask")},
        }
        return {
            "version": self.version,
            "questions": self.generations.questions,
            "texts": self.generations.texts,
            "tensors": {name: None if value is None else value.cpu() for name, value in tensors.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Sampled:
        """Restores completions from :meth:`state`."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in state["tensors"].items()
        }
        ids, mask = moved.pop("input_ids"), moved.pop("attention_mask")
        generations = Generations(Completions(**moved), ids, mask, state["questions"], state["texts"])
        return cls(generations, state["version"])


class OneStepOff(Callback):
    """Callback that samples the completions of each training batch one batch ahead, before the current update.

    The engine uses a copy of the trained weights, since the policy changes meanwhile. Completions of the first batch of
    an epoch are sampled when they are needed. Seeds depend on the batch alone, and checkpoints hold the sampled
    completions, so that a resumed run equals an uninterrupted one.
    """

    replayed = True
    """``replay`` keeps this callback."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._kept: dict[BatchKey, Future[Sampled]] = {}
        self._copy: Any = None
        self._module: PolicyTrainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets this callback as the module's source of completions.

        Raises:
            UsageError: The module is not a PolicyTrainer.
        """
        if not isinstance(pl_module, PolicyTrainer):
            raise UsageError(f"OneStepOff samples for a PolicyTrainer, not for a {type(pl_module).__name__}")
        self._pool = self._pool or ThreadPoolExecutor(1)
        if stage == "fit":
            self.wait()
            self._kept, self._copy = {}, None  # those of a checkpoint are loaded later
        pl_module.collector.completion_source = self
        self._module = pl_module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the strategy.

        Raises:
            UsageError: The strategy shards the weights.
        """
        assert isinstance(pl_module, PolicyTrainer)
        if pl_module.models.sharded:
            raise UsageError(
                "OneStepOff samples with copies of the policy's weights, which the strategy keeps in shards: remove it "
                "from trainer.callbacks, or take another strategy"
            )

    def __call__(
        self, collector: RolloutCollector, batch: PromptBatch, key: BatchKey, step: int
    ) -> tuple[Generations, int]:
        """Returns the completions of a batch and starts to sample those of the next; see ``CompletionSource``."""
        module, policy = self._module, collector.models.policy
        assert module is not None
        ready = self._kept.get(key)
        if ready is None:
            self.wait()  # the engine may be busy after an epoch that ended early
            sampled = self._sampled(collector, policy, batch, key, step)
        else:
            sampled = ready.result()
        following = (key[0], key[1] + 1)
        # A failed step is repeated when the run is resumed, and must then get the same completions.
        self._kept = {k: self._kept[k] for k in (key, following) if k in self._kept}
        first = following[1] * module.batch_repeats
        if self._pool and following not in self._kept and first < module.trainer.num_training_batches:
            next_batch = self._batch(module.trainer, first)
            autocast = _autocast(next_batch.input_ids.device)
            self._kept[following] = self._pool.submit(
                self._sampled, collector, self._copied(policy), next_batch, following, step, autocast
            )
        return sampled.generations, sampled.version

    def wait(self) -> None:
        """Waits until the engine is free."""
        for future in self._kept.values():
            future.exception()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits until the engine is free."""
        self.wait()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Waits and removes this callback as the module's source of completions."""
        self.wait()
        if isinstance(pl_module, PolicyTrainer):
            pl_module.collector.completion_source = None
        self._module = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Calls :meth:`teardown`."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Sampled completions of all processes that are still to be learned from, except those that failed."""
        self.wait()
        done = {key: future for key, future in self._kept.items() if future.exception() is None}
        return {"processes": gathered([(list(key), future.result().state()) for key, future in done.items()])}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the completions of this process, if the module has restored its rollout."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        assert isinstance(pl_module, PolicyTrainer)
        if saved is None or pl_module.rollout is None:
            return
        processes, rank = saved["processes"], pl_module.global_rank
        if GUARD_RECORD in checkpoint and process_count() == 1:
            rank = checkpoint[GUARD_RECORD].get("process", 0)
        for (epoch, number), sampled in processes[rank]:
            self._kept[epoch, number] = Future()
            self._kept[epoch, number].set_result(Sampled.from_state(sampled, trainer.strategy.root_device))

    def _batch(self, trainer: Trainer, number: int) -> PromptBatch:
        """Returns a later batch of the current epoch, on the device."""
        loader = trainer.train_dataloader
        if not isinstance(loader, StepLoader):
            raise UsageError(
                f"OneStepOff needs the next batch in advance, which a {type(loader).__name__} does not give: use "
                "a PreferenceDataModule, or remove it from trainer.callbacks"
            )
        batch: PromptBatch = trainer.strategy.batch_to_device(loader.together(range(number, number + 1)))
        return batch

    def _sampled(
        self,
        collector: RolloutCollector,
        model: Any,
        batch: PromptBatch,
        key: BatchKey,
        version: int,
        autocast: dict[str, Any] | None = None,
    ) -> Sampled:
        with torch.autocast(**autocast) if autocast else nullcontext():
            return Sampled(collector.sample(model, batch, key), version)

    def _copied(self, policy: Any) -> Any:
        """Returns a copy of the policy that shares the weights that are not trained."""
        if self._copy is None:
            frozen: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
            self._copy = deepcopy(policy, frozen).requires_grad_(False)
            for parameter in self._copy.parameters():
                parameter.grad = None
        with torch.no_grad():
            for copied, current in zip(self._copy.parameters(), policy.parameters(), strict=True):
                if copied is not current:
                    copied.copy_(current)
        return self._copy


def _autocast(device: torch.device) -> dict[str, Any]:
    """Autocast settings of this thread, which other threads do not inherit."""
    device_type = device.type
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }


_ROUND = 64
"""The length of the cache is a multiple of this, so that most batches share a length."""


class StaticTorchEngine(TorchEngine):
    """:class:`TorchEngine` with a cache of fixed size, which holds all completions until the last one ends.

    It gives the same completions. All layers of the model must use full attention.

    Args:
        max_new_tokens: Length limit of a completion; see :class:`TorchEngine` for the arguments up to ``decoding``.
        temperature: Sampling temperature.
        stop_strings: Texts that end a completion.
        stop_ids: Tokens that end a completion, besides the model's own.
        top_k: Number of most likely tokens to draw from.
        top_p: Total probability of the most likely tokens to draw from.
        decoding: Options of decoding; ``cache``, ``merge`` and ``drop_finished`` have no effect.
        compiled: Whether to compile the step from token to token, on CUDA to a graph. This takes seconds to minutes for
            each number of completions and length of the cache, and switches ``pack_head`` off.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        stop_strings: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        top_k: int | None = None,
        top_p: float = 1.0,
        decoding: Decoding | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(max_new_tokens, temperature, stop_strings, stop_ids, top_k, top_p, decoding)
        self.compiled = compiled
        if compiled:  # a graph holds addresses of weights
            self.decoding = replace(self.decoding, pack_head=False)

    def _begin(self, model: Any, input_ids: Tensor, attention_mask: Tensor, num_generations: int) -> Continuation:
        if not continues(model):
            raise UsageError(
                f"StaticTorchEngine: this model ({model.config.model_type}) cannot continue from a cache: "
                "take TorchEngine"
            )
        prompts = Prompts(model, input_ids, attention_mask, num_generations)
        return _Fixed(prompts, self.max_new_tokens, self.decoding.share_prompts, self.compiled)


class _Fixed(Continuation):
    """Continuation whose tensors keep size and address from the first token to the last, as a CUDA graph needs."""

    def __init__(self, prompts: Prompts, room: int, share_prompts: bool, compiled: bool) -> None:
        width = prompts.input_ids.shape[1]
        length = -(-(width + room) // _ROUND) * _ROUND
        filled = StaticCache(prompts.model.config, length)
        if any(type(layer) is not StaticLayer for layer in filled.layers):
            model_type = prompts.model.config.model_type
            raise UsageError(
                f"StaticTorchEngine: not all layers of this model ({model_type}) attend to everything: take TorchEngine"
            )
        self.logits = prompts.computed(filled, share_prompts)
        if share_prompts:
            self.logits = prompts.repeated(self.logits)
        total = len(self.logits)
        self._step, cache = _static(prompts.model, total, length, compiled)
        for layer, source in zip(cast(list[Any], cache.layers), cast(list[Any], filled.layers), strict=True):
            parts = (source.keys, source.values)
            keys, values = map(prompts.repeated, parts) if share_prompts else parts
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            layer.cumulative_length.copy_(source.cumulative_length)
        # Unwritten positions need no mask: they are masked as later than the current token.
        self._attention = prompts.attention_mask.new_ones(total, length)
        self._attention[:, :width] = prompts.repeated(prompts.attention_mask)
        self._position = prompts.repeated(prompts.positions[:, -1:])
        self._places = torch.arange(total, device=self._position.device)

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        all_tokens = tokens.new_zeros(len(self._position), 1)
        all_tokens[self._places, 0] = tokens
        self._position += 1
        self.logits = self._step(all_tokens, self._attention, self._position)[self._places]

    def keep(self, rows: Tensor) -> None:
        """See the base class."""
        self._places = self._places[rows]


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
_COMPILED: WeakKeyDictionary[nn.Module, dict[tuple[int, int], tuple[Step, StaticCache]]] = WeakKeyDictionary()
"""Steps and caches of the last shapes by model: a CUDA graph works only with the cache that it was made with."""
_SHAPES = 4
"""Number of shapes to keep: two lengths of prompts in training, and two in evaluation."""


def _static(model: Any, rows: int, length: int, compiled: bool) -> tuple[Step, StaticCache]:
    """Returns the step of a model from token to token, and its cache."""
    kept = _COMPILED.setdefault(model, {}) if compiled else {}
    if (rows, length) in kept:
        return kept[rows, length]
    cache, owner = StaticCache(model.config, length), ref(model)

    def step(tokens: Tensor, attention: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = cast(Any, owner())(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    if not compiled:
        return step, cache
    while len(kept) >= _SHAPES:
        kept.pop(next(iter(kept)))  # frees its cache
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    kept[rows, length] = torch.compile(step, dynamic=False, mode=mode), cache
    return kept[rows, length]
