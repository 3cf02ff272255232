"""The reward classifier: a backbone, pooling, and one head per preference dimension.

Pooling reduces the hidden states of a text's tokens to one vector, which all heads read. Dimensions can have different
numbers of levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput

from moslim.ops.loading import (
    CLASSIFIER_TYPE,
    hidden_width,
    is_causal,
    language_part,
    load_whole,
    needed_inputs,
    transformer_part,
)
from moslim.ops.models import Positions, align, load_backbone
from moslim.ops.numerics import apply_wide, at_least_float32, full_precision, widened
from moslim.preferences import PreferenceSet
from moslim.reward.heads import LINKS, HeadLinear, HeadShape, LinkName, SeparateHeads
from moslim.utils.errors import UsageError

Pooling = Literal["last", "mean", "first", "max"]


def pool(hidden: Tensor, mask: Tensor, poolings: Sequence[Pooling]) -> Tensor:
    """Pools the hidden states of texts that are padded on either side.

    Args:
        hidden: ``[B, T, H]``.
        mask: ``[B, T]``, 0 on padding; each row has at least one token.
        poolings: ``last`` or ``first`` (the state of that token), ``mean`` or ``max`` (over all tokens).

    Returns:
        ``[B, P * H]`` in float32 or higher precision: the results of the ``P`` poolings, concatenated.
    """
    parts = [widened(_pooled(hidden, mask, pooling)) for pooling in poolings]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "first":
        return hidden[torch.arange(len(mask), device=mask.device), mask.argmax(1)]
    if pooling == "last":
        position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        end = (mask * position).argmax(1)
        return hidden[torch.arange(len(end), device=end.device), end]
    if pooling == "max":
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    total = (hidden * mask[..., None].to(hidden.dtype)).sum(1, dtype=at_least_float32(hidden.dtype))
    return total / mask.sum(1, keepdim=True).clamp(min=1)


class PreferenceClassifierConfig(PreTrainedConfig):
    """Configuration of a :class:`PreferenceClassifier`.

    Args:
        backbone: Configuration of the backbone, or its dictionary form.
        dimensions: ``[name, [level names]]`` per dimension; a list, because dictionaries are saved with sorted keys,
            which would lose the order of the heads.
        pooling: Pooling of the hidden states (:func:`pool`); the results of several are concatenated.
        layer: Backbone layer whose hidden states are pooled, counted from 1; None = the last.
        pair_length: Maximum number of tokens of a question-completion pair in training; None = no limit.
        link: Link from a head's outputs to level probabilities (:mod:`moslim.reward.heads`).
        head_hidden: Width of each head's hidden layer; None = the heads are slices of one linear layer.
        head_dropout: Dropout on the hidden layers.
        added_heads: ``dimension``, ``hidden`` and ``dropout`` of each head that was added to a trained classifier.
            These are separate networks for the last dimensions.
        temperatures: Divisor of each head's logits in evaluation mode; None = all 1.

    Raises:
        UsageError: The link is unknown, a temperature is missing or not positive, or the added heads are not the last.
    """

    model_type = CLASSIFIER_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}

    def __init__(
        self,
        backbone: PreTrainedConfig | dict[str, Any] | None = None,
        dimensions: list[list[Any]] | None = None,
        pooling: Pooling | list[Pooling] = "last",
        layer: int | None = None,
        pair_length: int | None = None,
        link: LinkName = "softmax",
        head_hidden: int | None = None,
        head_dropout: float = 0.0,
        added_heads: list[dict[str, Any]] | None = None,
        temperatures: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        if link not in LINKS:
            raise UsageError(f"link '{link}' is unknown: give one of {', '.join(LINKS)}")
        # A copy, since the base class resets the attention implementation of nested configurations.
        self.backbone = AutoConfig.for_model(**backbone) if isinstance(backbone, dict) else deepcopy(backbone)
        self.dimensions = [[name, list(levels)] for name, levels in dimensions or []]
        self.pooling: list[Pooling] = [pooling] if isinstance(pooling, str) else list(pooling)
        self.layer = layer
        self.pair_length = pair_length
        self.link = link
        self.head_hidden = head_hidden
        self.head_dropout = head_dropout
        self.added_heads = added_heads or []
        self.temperatures = checked_temperatures(temperatures, len(self.dimensions))
        added = [head["dimension"] for head in self.added_heads]
        if added != [name for name, _ in self.dimensions][len(self.dimensions) - len(added) :]:
            raise UsageError(
                f"added_heads are {added}, but they must be the last of the dimensions {self.dimensions}: correct "
                "config.json"
            )
        labels = [f"{name}: {level}" for name, levels in self.dimensions for level in levels]
        if labels:
            kwargs["id2label"] = dict(enumerate(labels))
            kwargs["label2id"] = {label: index for index, label in enumerate(labels)}
        super().__init__(**kwargs)


@dataclass
class PreferenceClassifierOutput(ModelOutput):
    """Output of the classifier, in float32 or higher precision.

    Args:
        logits: ``[B, D, K]`` for ``K`` the largest number of levels; ``-inf`` on absent levels. Their softmax gives the
            level probabilities, which are calibrated in evaluation mode.
        scores: ``[B, D, S]``, raw outputs of the heads, for ``S`` the widest; narrower heads are padded with ``-inf``.
    """

    logits: Tensor | None = None
    scores: Tensor | None = None


class PreferenceClassifier(PreTrainedModel):
    """Predicts the level of a question-completion pair on each dimension (MOSLIM, arXiv 2505.20336).

    The heads are slices of one linear layer, ``head``, or separate networks, ``head.{dimension}``. Heads that were
    added to a trained classifier are separate networks ``added.{dimension}``, so that the outputs of the others remain
    bit-identical. The input never contains the instruction that asks for levels.

    Args:
        config: The configuration.
        backbone: Backbone with that configuration; None = one with random weights.
    """

    config_class = PreferenceClassifierConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: PreferenceClassifierConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        self.head, self.added = _heads(config, dict(zip(self.preferences.names, self.head_widths, strict=True)))
        self.backbone: Any = AutoModel.from_config(config.backbone) if backbone is None else backbone
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # unused; DDP fails on parameters without gradients
        self.post_init()

    @cached_property
    def preferences(self) -> PreferenceSet:
        """The dimensions, in the order of the heads."""
        return PreferenceSet(dict(self.config.dimensions))

    @property
    def head_widths(self) -> list[int]:
        """Number of raw outputs of each head."""
        return [LINKS[self.config.link].width(size) for size in self.preferences.sizes]

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        preferences: PreferenceSet,
        *,
        pooling: Pooling | list[Pooling] | None = None,
        layer: int | None = None,
        max_length: int | None = None,
        link: LinkName = "softmax",
        head_hidden: int | None = None,
        head_dropout: float = 0.0,
        trust_remote_code: bool = False,
        base: str | Path | None = None,
    ) -> PreferenceClassifier:
        """Returns a classifier with untrained heads on a pretrained backbone, in float32.

        Args:
            backbone: Hub name or local folder of any ``AutoModel``, such as a causal language model, or a loaded model.
            preferences: The dimensions.
            pooling: Pooling of the hidden states; None = ``last`` for decoders, ``mean`` for encoders.
            layer: Backbone layer whose hidden states are pooled, counted from 1; None = the last.
            max_length: Maximum number of tokens of a pair, saved in the configuration; None = no limit.
            link: Link from a head's outputs to level probabilities, as the loss requires.
            head_hidden: Width of each head's hidden layer; None = one linear layer for all heads.
            head_dropout: Dropout on the hidden layers.
            trust_remote_code: Whether code from the backbone's repository may run.
            base: Base model if the backbone is an adapter; None = the one that the adapter names.

        Raises:
            MissingFileError: The backbone does not exist.
            UsageError: The backbone is an encoder-decoder or does not read text alone, its folder lacks weights, it
                has no such layer, or it cannot read ``max_length`` tokens.
        """
        if isinstance(backbone, PreTrainedModel):
            transformer, name = cast(PreTrainedModel, transformer_part(backbone)), type(backbone).__name__
        else:
            name = str(backbone)
            transformer = load_backbone(backbone, trust_remote_code, base)
            align(transformer)
        _refuse_unfit(transformer, name)
        layers = transformer.config.get_text_config().num_hidden_layers
        if layer is not None and not 1 <= layer <= layers:
            raise UsageError(f"model.layer is {layer}, but '{name}' has layers 1 to {layers}: give one of these")
        Positions.of(transformer).longest(max_length, name)
        config = PreferenceClassifierConfig(
            backbone=transformer.config,
            dimensions=[[d.name, list(d.levels)] for d in preferences.dimensions],
            pooling=pooling or ("last" if is_causal(transformer.config) else "mean"),
            layer=layer,
            pair_length=max_length,
            link=link,
            head_hidden=head_hidden,
            head_dropout=head_dropout,
        )
        return cls(config, transformer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved classifier; see ``PreTrainedModel.from_pretrained`` for the arguments.

        Raises:
            UsageError: A tensor is missing, which transformers alone would initialise at random.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        model = load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        align(model)
        info_keys = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {key: [] for key in info_keys}) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the pooled hidden states ``[B, H]`` of right-padded pairs ``[B, T]``."""
        # encoders may not accept `use_cache`
        cache: dict[str, Any] = {"use_cache": False} if is_causal(self.config.backbone) else {}
        hidden = self.states(input_ids=input_ids, attention_mask=attention_mask, **cache)
        return pool(hidden, attention_mask, self.config.pooling)

    def states(self, **inputs: Any) -> Tensor:
        """Returns the hidden states ``[B, T, H]`` of the configured layer; the arguments are the backbone's."""
        if self.config.layer is None:
            last_hidden_state: Tensor = self.backbone(**inputs).last_hidden_state
            return last_hidden_state
        hidden_states: tuple[Tensor, ...] = self.backbone(**inputs, output_hidden_states=True).hidden_states
        return hidden_states[self.config.layer]

    @full_precision()
    def classify(self, features: Tensor) -> PreferenceClassifierOutput:
        """Classifies pooled hidden states ``[B, H]``, in float32 or higher precision, also under autocast."""
        raw = apply_wide(self.head, features)
        if len(self.added):
            raw = torch.cat([raw, apply_wide(self.added, features)], dim=-1)
        parts = raw.split(self.head_widths, dim=-1)
        widest = max(self.head_widths)
        scores = torch.stack([F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts], dim=1)
        logits = LINKS[self.config.link].logits(scores, self.preferences.sizes)
        if not self.training and self.config.temperatures is not None:
            logits = logits / logits.new_tensor(self.config.temperatures)[:, None]
        return PreferenceClassifierOutput(logits=logits, scores=scores)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> PreferenceClassifierOutput:
        """Classifies pairs.

        Args:
            input_ids: ``[B, T]``, right-padded.
            attention_mask: ``[B, T]``, 0 on padding.
            token_type_ids: Ignored; accepted because some tokenizers return it.
        """
        return self.classify(self.features(input_ids, attention_mask))

    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the probability of each level, ``[B, D, K]`` in float32 or higher precision; 0 on absent levels."""
        return self.level_probabilities(self(input_ids, attention_mask).logits)

    def level_probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probability of each level, ``[B, D, K]``; 0 on absent levels.

        Args:
            logits: ``[B, D, K]``, from :meth:`classify`.
        """
        probs = torch.zeros_like(logits)
        for head, size in enumerate(self.preferences.sizes):  # padding could change the rounding of a softmax
            probs[:, head, :size] = logits[:, head, :size].softmax(-1)
        return probs


def checked_temperatures(temperatures: Any, heads: int) -> list[float] | None:
    """Returns temperatures after a check of their number and values.

    Args:
        temperatures: List of one temperature per head, or None for all 1.
        heads: Number of heads.

    Raises:
        UsageError: The number differs, or a temperature is not a finite number above 0.
    """
    if temperatures is None:
        return None
    if not isinstance(temperatures, (list, tuple)) or len(temperatures) != heads:
        raise UsageError(f"temperatures is {temperatures!r}, for {heads} dimensions: give one each, or null")
    for value in temperatures:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UsageError(
                f"temperatures is {list(temperatures)}, but logits are divided by them: each must be a finite number "
                "above 0"
            )
    return list(temperatures)


def _refuse_unfit(transformer: PreTrainedModel, name: str) -> None:
    """Raises a UsageError if a backbone is no plain text model that ``AutoModel`` restores from its configuration."""
    model_class: Any = MODEL_MAPPING.get(type(transformer.config), None)
    if transformer.config.is_encoder_decoder or (model_class is not None and not isinstance(transformer, model_class)):
        raise UsageError(
            f"backbone '{name}' ({type(transformer).__name__}) is an encoder-decoder or a part of one: take an encoder "
            "such as ModernBERT, or a decoder such as Qwen"
        )
    if needed_inputs(transformer) or not isinstance(language_part(transformer).get_input_embeddings(), nn.Embedding):
        raise UsageError(
            f"backbone '{name}' ({type(transformer).__name__}) does not read texts alone: take an encoder such as "
            "ModernBERT, or a decoder such as Qwen"
        )


def _heads(config: PreferenceClassifierConfig, widths: dict[str, int]) -> tuple[nn.Module, SeparateHeads]:
    """Returns the heads that were trained together, and those that were added later."""
    assert config.backbone is not None
    inputs = hidden_width(config.backbone) * len(config.pooling)
    added = {
        head["dimension"]: HeadShape(widths.pop(head["dimension"]), head["hidden"], head["dropout"])
        for head in config.added_heads
    }
    if config.head_hidden is None:
        return nn.Linear(inputs, sum(widths.values())), SeparateHeads(inputs, added)
    first = {name: HeadShape(width, config.head_hidden, config.head_dropout) for name, width in widths.items()}
    return SeparateHeads(inputs, first), SeparateHeads(inputs, added)


AutoConfig.register(PreferenceClassifierConfig.model_type, PreferenceClassifierConfig)
AutoModelForSequenceClassification.register(PreferenceClassifierConfig, PreferenceClassifier)
