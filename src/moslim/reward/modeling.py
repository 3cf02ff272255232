"""The reward classifier: a backbone, pooling, and one head per preference dimension.

Pooling reduces the hidden states of a text's tokens to one vector, which all heads read. Each head has its own number
of levels.
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


def pool(hidden: Tensor, mask: Tensor, kinds: Sequence[Pooling]) -> Tensor:
    """Pools the hidden states of texts, wherever their padding is.

    Args:
        hidden: ``[B, T, H]``.
        mask: ``[B, T]``, 0 on padding; each row has a token.
        kinds: ``last`` or ``first`` (the state of that token), ``mean`` or ``max`` (over all tokens).

    Returns:
        ``[B, P * H]`` float32 or finer, for ``P`` kinds, side by side in their order.
    """
    parts = [widened(_pooled(hidden, mask, kind)) for kind in kinds]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _pooled(hidden: Tensor, mask: Tensor, kind: Pooling) -> Tensor:
    if kind == "first":
        return hidden[torch.arange(len(mask), device=mask.device), mask.argmax(1)]
    if kind == "last":
        position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        end = (mask * position).argmax(1)
        return hidden[torch.arange(len(end), device=end.device), end]
    if kind == "max":
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    total = (hidden * mask[..., None].to(hidden.dtype)).sum(1, dtype=at_least_float32(hidden.dtype))
    return total / mask.sum(1, keepdim=True).clamp(min=1)


class PreferenceClassifierConfig(PreTrainedConfig):
    """Configuration of a :class:`PreferenceClassifier`.

    Args:
        backbone: Configuration of the backbone, or its dictionary form.
        dimensions: ``[name, [level names]]`` per dimension. A list, because dictionaries are saved with sorted
            keys and the order of the heads would be lost.
        pooling: What the heads read (:mod:`moslim.reward.modeling`); several kinds are put side by side.
        layer: Backbone layer whose hidden states are pooled, counted from 1; None = the last.
        pair_length: Tokens of a question-answer pair that the classifier was trained on; None = no limit.
        link: How a head's outputs become level probabilities (:mod:`moslim.reward.heads`).
        head_hidden: Width of each head's hidden layer; None = the heads are slices of one linear layer.
        head_dropout: Dropout on the hidden layers.
        added_heads: The last dimensions, if they came to a trained classifier later: for each ``dimension``, and
            ``hidden`` and ``dropout`` of its head, which is a network of its own.
        temperatures: What each head's logits are divided by in evaluation mode; None = all 1.

    Raises:
        UsageError: The link is unknown, there is not one temperature above 0 per dimension, or the added heads are not
            the last.
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
            raise UsageError(f"link '{link}' is unknown; there are: {', '.join(LINKS)}")
        # A copy: the base class resets the attention choice of nested configurations, also of one in use.
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
            raise UsageError(f"added_heads are {added}: they must be the last of the dimensions {self.dimensions}")
        names = [f"{name}: {level}" for name, levels in self.dimensions for level in levels]
        if names:
            kwargs["id2label"] = dict(enumerate(names))
            kwargs["label2id"] = {name: index for index, name in enumerate(names)}
        super().__init__(**kwargs)


@dataclass
class PreferenceClassifierOutput(ModelOutput):
    """Output of the classifier.

    Args:
        logits: ``[B, D, K]`` float32 or finer, ``K`` the largest number of levels; ``-inf`` on levels that a dimension
            lacks. Their softmax are the level probabilities, in evaluation mode calibrated ones.
        scores: ``[B, D, S]`` float32 or finer, the heads' raw outputs, ``S`` the widest; ``-inf`` fills up the others.
    """

    logits: Tensor | None = None
    scores: Tensor | None = None


class PreferenceClassifier(PreTrainedModel):
    """Sorts a question-answer pair into a level on every dimension (MOSLIM, arXiv 2505.20336).

    The heads are slices of one linear layer, ``head``, or a small network each, ``head.{dimension}``. Those that were
    added to a trained classifier are ``added.{dimension}``: layers of their own, so that the others' outputs stay as
    they were, to the last bit. The instruction that asks for levels is never part of the input.

    Args:
        config: The configuration.
        backbone: A ready backbone of that configuration; None builds one with random weights.
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
            self.backbone.pooler = None  # BERT's: not used here, and parameters without gradient stop DDP
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
        """Puts untrained heads on a pretrained backbone, in float32.

        Args:
            backbone: Hub name or local folder of any ``AutoModel`` (a causal language model's folder works), or a
                loaded model.
            preferences: The dimensions.
            pooling: None: ``last`` for decoders, ``mean`` for encoders.
            layer: Backbone layer that is read; None = the last.
            max_length: Most tokens of a pair, kept in the configuration for the scorer.
            link: How a head's outputs become level probabilities; losses say which they need.
            head_hidden: Width of each head's hidden layer; None = one linear layer for all heads.
            head_dropout: Dropout on the hidden layers.
            trust_remote_code: Whether code from the backbone's repository may run.
            base: Base model of a backbone that is an adapter, where it is not at the place that the adapter names.

        Raises:
            MissingFileError: There is no such backbone.
            UsageError: The backbone is an encoder-decoder, its folder lacks weights, or it lacks the layer.
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
            raise UsageError(f"layer = {layer}: '{name}' has layers 1 to {layers}")
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
            UsageError: A tensor is missing. Transformers would set it to random numbers and go on.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        model = load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        align(model)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {kind: [] for kind in kinds}) if wants_report else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled hidden states ``[B, H]`` of right-padded pairs ``[B, T]``."""
        # encoders need not know the argument
        cache: dict[str, Any] = {"use_cache": False} if is_causal(self.config.backbone) else {}
        hidden = self.states(input_ids=input_ids, attention_mask=attention_mask, **cache)
        return pool(hidden, attention_mask, self.config.pooling)

    def states(self, **inputs: Any) -> Tensor:
        """Hidden states ``[B, T, H]`` of the layer that is read; the arguments are the backbone's."""
        if self.config.layer is None:
            last: Tensor = self.backbone(**inputs).last_hidden_state
            return last
        layers: tuple[Tensor, ...] = self.backbone(**inputs, output_hidden_states=True).hidden_states
        return layers[self.config.layer]

    @full_precision()
    def classify(self, features: Tensor) -> PreferenceClassifierOutput:
        """Classifies pooled hidden states ``[B, H]``, in float32 or finer whatever the run's precision."""
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
            token_type_ids: Not used, but some tokenizers return it: separators part question and answer.
        """
        return self.classify(self.features(input_ids, attention_mask))

    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Probability of every level, ``[B, D, K]`` float32 or finer; 0 on levels that a dimension lacks."""
        return self.level_probabilities(self(input_ids, attention_mask).logits)

    def level_probabilities(self, logits: Tensor) -> Tensor:
        """Probability of every level, shape as given; 0 on levels that a dimension lacks.

        Args:
            logits: ``[B, D, K]``, as :meth:`classify` returns them.
        """
        probs = torch.zeros_like(logits)
        for head, size in enumerate(self.preferences.sizes):  # padding must not change how a head's are rounded
            probs[:, head, :size] = logits[:, head, :size].softmax(-1)
        return probs


def checked_temperatures(temperatures: Any, heads: int) -> list[float] | None:
    """Returns what logits can be divided by, as it was given; None = all 1.

    Args:
        temperatures: One per head.
        heads: Number of heads.

    Raises:
        UsageError: There are more or fewer, or one is no finite number above 0.
    """
    if temperatures is None:
        return None
    if not isinstance(temperatures, (list, tuple)) or len(temperatures) != heads:
        raise UsageError(f"temperatures is {temperatures!r}, for {heads} dimensions: give one each, or null")
    for value in temperatures:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UsageError(
                f"temperatures is {list(temperatures)}: logits are divided by them, so each must be a finite number "
                "above 0"
            )
    return list(temperatures)


def _refuse_unfit(transformer: PreTrainedModel, name: str) -> None:
    """Raises where a backbone does not read one text, or is not what its configuration builds when it is loaded."""
    built: Any = MODEL_MAPPING.get(type(transformer.config), None)
    if transformer.config.is_encoder_decoder or (built is not None and not isinstance(transformer, built)):
        raise UsageError(
            f"backbone '{name}' ({type(transformer).__name__}) is an encoder-decoder or a part of one: take an encoder "
            "such as ModernBERT, or a decoder such as Qwen"
        )
    if needed_inputs(transformer) or not isinstance(language_part(transformer).get_input_embeddings(), nn.Embedding):
        raise UsageError(
            f"backbone '{name}' ({type(transformer).__name__}) does not read texts, or not without something else: "
            "take an encoder such as ModernBERT, or a decoder such as Qwen"
        )


def _heads(config: PreferenceClassifierConfig, widths: dict[str, int]) -> tuple[nn.Module, SeparateHeads]:
    """The heads that were trained together, and those that were added later."""
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
