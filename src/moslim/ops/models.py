"""Language models and tokenizers from a Hub name, a folder or an architecture, and the lengths that they support."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moslim.data.chat_templates import check_template
from moslim.ops.adapters import AdapterFolder
from moslim.ops.loading import (
    HEADLESS,
    first_few,
    is_causal,
    language_part,
    load_whole,
    named,
    needed_inputs,
    read_json,
    seems,
    transformer_part,
    untie,
)
from moslim.ops.transformers_compat import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    apply_liger,
)
from moslim.training.distributed import warn
from moslim.utils.errors import UsageError

_POSITION_LAYERS = ("wpe", "pos_emb")
_POSITION_TABLES = ("embed_positions", "pos_encoding")
_UNKNOWN = "\ue000"
"""A character for private use, which no vocabulary has. Tokenizers over bytes write it without an unknown token."""


@dataclass(frozen=True)
class Positions:
    """Number of tokens that a model can read at a time.

    Args:
        most: Rows of its table of positions: more tokens end in an index error. None = it has no such table.
        trained: Tokens that it was made for (``max_position_embeddings``): more are computed, but often badly. None =
            unknown.
    """

    most: int | None
    trained: int | None

    @classmethod
    def of(cls, model: Any) -> Positions:
        """Reads a model's limits from its layers and its configuration.

        Args:
            model: Transformer or language model, with or without adapter; of one of texts and images, its language
                model counts.
        """
        part = language_part(model)
        trained = getattr(part.config, "max_position_embeddings", None)
        trained = trained if isinstance(trained, int) and trained > 0 else None
        rows = [_rows(module) for name, module in part.named_modules() if _holds_positions(name, module)]
        rows += [
            len(b) for name, b in part.named_buffers() if name.rpartition(".")[2] in _POSITION_TABLES and b.ndim > 1
        ]
        return cls(min([*rows, *([trained] if rows and trained else [])], default=None), trained)

    def longest(self, wanted: int | None, path: str, completion: int = 0) -> int | None:
        """Returns the most tokens of a prompt or pair, and refuses more than the model can read.

        Args:
            wanted: What ``data.max_length`` says; None = no limit.
            path: The model's name, for messages.
            completion: Most tokens of an answer that is sampled after a prompt.

        Returns:
            ``wanted``; or, without it, what the model's table of positions leaves; None = no limit.

        Raises:
            UsageError: Prompt and answer, or a pair, would be longer than the table of positions.
        """
        if self.most is not None and self.most <= completion:
            raise UsageError(
                f"engine.max_new_tokens = {completion} leaves no room for a prompt, since '{path}' has {self.most} "
                f"positions: set it to less than {self.most}"
            )
        if wanted is None:
            return None if self.most is None else self.most - completion
        asked = f"data.max_length = {wanted}"
        if completion:
            asked += f" and engine.max_new_tokens = {completion} make {wanted + completion} tokens, which"
        if self.most is not None and wanted + completion > self.most:
            raise UsageError(
                f"{asked} is more than the {self.most} positions of '{path}': set data.max_length to "
                f"{self.most - completion} or less" + (", or engine.max_new_tokens lower" if completion else "")
            )
        if self.trained is not None and wanted + completion > self.trained:
            warn(
                f"{asked} is more than the {self.trained} tokens that '{path}' was made for (max_position_embeddings): "
                "what it computes of longer texts may be worthless"
            )
        return wanted


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any, path: str) -> PreTrainedTokenizerBase:
    """Checks that a model has an embedding of every token that its tokenizer can write.

    A padding token without one is given up, with a warning: padding is masked, and any other token can stand there.
    Other special tokens without one are accepted where no text and no template can lead to them.

    Args:
        tokenizer: The tokenizer; it is changed in place.
        model: Its model.
        path: The model's name, for messages.

    Returns:
        The tokenizer.

    Raises:
        UsageError: A token has no embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    outside = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not outside:
        return tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    frame = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token}
    if tokenizer.unk_token_id in tokenizer.encode(_UNKNOWN, add_special_tokens=False):
        frame.add(tokenizer.unk_token)
    template = str(tokenizer.chat_template or "")
    unfit = [
        f"'{token}' ({number})"
        for token, number in outside.items()
        if token not in special or token in frame or token in template
    ]
    if unfit:
        raise UsageError(
            f"the tokenizer of '{path}' has tokens whose ids are beyond the model's {rows} embeddings: "
            f"{first_few(unfit)}. They were added without resizing the model: call "
            "model.resize_token_embeddings(len(tokenizer)), train or set the new rows, and save model and tokenizer "
            "again; or take the tokens out of the tokenizer"
        )
    if tokenizer.pad_token in outside:
        warn(
            f"the padding token '{tokenizer.pad_token}' ({tokenizer.pad_token_id}) of '{path}' is beyond the model's "
            f"{rows} embeddings: padding, which is masked, is written with the end token instead"
        )
        tokenizer.pad_token = None
    return tokenizer


def _holds_positions(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return isinstance(module, nn.Embedding) and (last in _POSITION_LAYERS or "position" in last)


def _rows(layer: Any) -> int:
    """Texts that fit into a table of positions. RoBERTa counts from behind its padding id, OPT from 2."""
    first = getattr(layer, "offset", None)
    if first is None:
        first = 0 if layer.padding_idx is None else layer.padding_idx + 1
    return int(layer.num_embeddings - first)


class TokenizerSource(ABC):
    """Source of the tokenizer of a model with random weights."""

    @abstractmethod
    def load(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer."""


class PretrainedTokenizer(TokenizerSource):
    """The tokenizer of a Hub name or local folder.

    Args:
        path: Hub name or folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)


class WorkbenchTokenizer(TokenizerSource):
    """The word-level tokenizer of the embedded world."""

    def load(self) -> PreTrainedTokenizerBase:
        from moslim.workbench.grammar import build_tokenizer

        return build_tokenizer()


@dataclass
class Architecture:
    """A language model with random weights.

    Args:
        model_type: Architecture as transformers names it, e.g. ``llama``.
        tokenizer: Source of its tokenizer; vocabulary size and special ids are taken from it.
        options: Entries of that architecture's configuration, e.g. ``hidden_size``.
    """

    model_type: str
    tokenizer: TokenizerSource
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Builds the model from torch's global random state."""
        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **self.options,
        )
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, base: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hub name or folder; of an adapter that comes without one, its base model's.

    Args:
        path: Hub name or folder of a model or of an adapter.
        trust_remote_code: Whether code from its repository may run.
        base: Base model of an adapter, where it is not at the place that the adapter names.

    Raises:
        MissingFileError: There is none.
        UsageError: Its files cannot be read, or its chat template does not end.
    """
    if (adapter := AdapterFolder.find(path, base)) is not None and not adapter.has_tokenizer:
        return load_tokenizer(adapter.base, trust_remote_code)
    with named(path, trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_template(tokenizer, str(path))
    return tokenizer


def load_causal_lm(
    path: str | Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
) -> PreTrainedModel:
    """Loads a causal language model from a Hub name or folder; weights must be safetensors, and all of them there.

    Args:
        path: Hub name or folder of a model, or of an adapter, which is merged into its base model.
        trust_remote_code: Whether code from its repository may run.
        dtype: Of the weights.
        base: Base model of an adapter, where it is not at the place that the adapter names.

    Raises:
        MissingFileError: There is none.
        UsageError: It is no causal language model, or not all of one.
    """
    if (adapter := AdapterFolder.find(path, base)) is not None:
        return adapter.merged(lambda place: load_causal_lm(place, trust_remote_code, dtype))
    if "MOSLIM classifier" in (kind := seems(path)):
        raise UsageError(f"'{path}' is no language model to start from: it is {kind}. Give it as model.classifier")
    read_json(Path(path) / "generation_config.json")  # transformers would go on without one that is damaged
    with named(path, trust_remote_code):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    own_code = hasattr(config, "auto_map") and trust_remote_code
    factory: Any = AutoModelForCausalLM
    if not own_code and _sees_images(config):
        factory = AutoModelForImageTextToText
    if config.is_encoder_decoder or not (own_code or is_causal(config)):
        raise UsageError(
            f"'{path}' is no causal language model: it is {kind}, of the architecture '{config.model_type}', which "
            "does not write one token after the other. Start from a decoder such as Qwen or Llama"
        )
    headless = kind.startswith(HEADLESS) and not own_code
    if headless and getattr(config.get_text_config(), "tie_word_embeddings", False):
        raise UsageError(
            f"'{path}' is {kind}, whose weights may have been trained for something else than writing. If it is a "
            "language model with tied embeddings, save it as one: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...)"
        )
    model = load_whole(factory.from_pretrained, path, trust_remote_code=trust_remote_code, dtype=dtype)
    if needed := needed_inputs(model):
        raise UsageError(
            f"'{path}' ({type(model).__name__}) reads no text without {', '.join(needed)}: start from a decoder such "
            "as Qwen or Llama"
        )
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not tokens.weight:  # the files have both, whatever the configuration says
        untie(model)
    return model


def _sees_images(config: PreTrainedConfig) -> bool:
    """Whether a folder holds a model of texts and images. Some families have one of texts only, too (Llama 4)."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return True
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return whole is not None and whole in (config.architectures or ())


def load_backbone(path: str | Path, trust_remote_code: bool = False, base: str | Path | None = None) -> PreTrainedModel:
    """Loads a transformer without head, in float32, from a folder or Hub name of it or of a model with any head.

    Args:
        path: Hub name or folder of a model, or of an adapter, which is merged into its base model.
        trust_remote_code: Whether code from its repository may run.
        base: Base model of an adapter, where it is not at the place that the adapter names.

    Raises:
        MissingFileError: There is none.
        UsageError: Not all of the transformer is there.
    """
    if (adapter := AdapterFolder.find(path, base)) is not None:
        return adapter.merged(lambda place: load_backbone(place, trust_remote_code), backbone_only=True)
    model = load_whole(
        AutoModel.from_pretrained,
        path,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        spare_missing=["pooler."],  # BERT's, which is not used
        backbone_only=True,
    )
    if model.get_output_embeddings() is None:
        return model
    inside: PreTrainedModel = transformer_part(model)  # of Llama 4 with images there is none without a head
    return inside


def align(model: nn.Module) -> None:
    """Moves weights to addresses that are multiples of 64 bytes, where they are not.

    A loaded file is mapped into memory, where its weights lie by the length of its header, and a CPU's matrix product
    rounds by how they lie: the same weights in two files would give results that differ in the last bit.
    """
    for weight in model.parameters():
        if weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def chosen_device(device: str | torch.device | None) -> torch.device:
    """Returns a device as it was given; for None, a GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def eos_ids(model: PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes a model compute activations twice instead of keeping them for the backward pass."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # renamed within transformers 5
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})


def fuse_kernels(model: PreTrainedModel) -> None:
    """Puts Liger's fused Triton kernels in place of a model's norms, rotations and gated layers; CUDA only.

    Its fused losses stay out: log-probabilities here do not come from the model's own loss, and never hold all logits.

    Raises:
        UsageError: There is no CUDA device.
        ModuleNotFoundError: Liger is not installed.
    """
    if not torch.cuda.is_available():
        raise UsageError("model.liger is true, but Liger's kernels need a CUDA device, and there is none: leave it out")
    if find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("model.liger is true, but liger-kernel is not installed: pip install 'moslim[liger]'")
    apply_liger(model)
