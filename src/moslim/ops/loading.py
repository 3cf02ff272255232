"""Loading of complete weights from a folder or the Hub, from safetensors files only, and saving of language models.

A language model is saved with the end tokens and the sampling options of its training.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moslim.ops.numerics import at_least_float32
from moslim.ops.transformers_compat import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from moslim.utils.errors import MissingFileError, UsageError
from moslim.utils.folders import check_files, finish_exchange

CLASSIFIER_TYPE = "moslim_preference_classifier"
"""``model_type`` of a saved reward classifier."""

HEADLESS = "a model without a head"

_SHOWN = 4
_CONSTANTS = re.compile(r"(\.masked_bias|\.attn\.bias|\.attn\.attention\.bias|\.attention\.bias|\.inv_freq)$")
"""Names of causal masks and of rotation frequencies, which earlier versions of transformers saved with the weights."""
_INDEX = ".safetensors.index.json"

if TYPE_CHECKING:
    from moslim.generation.base import RolloutEngine


def load_whole(
    load: Callable[..., Any],
    path: str | Path,
    *args: Any,
    spare_missing: Collection[str] = (),
    backbone_only: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model and refuses weights that the folder lacks, has too many of, or has in another shape.

    Transformers would set missing ones to random numbers and leave out those that have no place.

    Args:
        load: A ``from_pretrained`` of transformers.
        path: Hub name or folder.
        args: Further positional arguments of ``load``.
        spare_missing: Beginnings of names that may be missing, of modules that are not used.
        backbone_only: Whether the model is a transformer without head, so that weights of heads may be left out.
        options: Further keyword arguments of ``load``.

    Raises:
        MissingFileError: There is no such model.
        UsageError: The folder's files are damaged, point outside the folder, or do not fit the model.
    """
    finish_exchange(path)
    refuse_outside(path)
    refuse_unclear(path)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    with named(path, own_code=bool(options.get("trust_remote_code"))):
        model, report = load(path, *args, **options)
    missing = [key for key in report["missing_keys"] if not key.startswith(tuple(spare_missing))]
    left_over = [key for key in report["unexpected_keys"] if not _CONSTANTS.search(key)]
    surplus = [key for key in left_over if not (backbone_only and _of_head(key, model))]
    reshaped = [
        f"{key} ({_shape(saved)} instead of {_shape(built)})" for key, saved, built in report["mismatched_keys"]
    ]
    if missing or surplus or reshaped:
        faults = {
            "lacks": missing,
            f"has no place in {type(model).__name__} for": surplus,
            "has in another shape": reshaped,
        }
        reasons = " and ".join(f"{fault} {first_few(keys)}" for fault, keys in faults.items() if keys)
        raise UsageError(f"'{path}' {reasons}, so it is not loaded: it is {seems(path)}. {_remedy(path, model)}")
    check_files(path)
    if broken := [name for name, weight in model.named_parameters() if not _finite(weight)]:
        raise UsageError(
            f"'{path}' has weights that are not finite numbers, so it is not loaded: {first_few(broken)}. Copy or "
            "download the folder again; if it was saved like that, take an earlier checkpoint of that training"
        )
    return model


def untie(model: PreTrainedModel) -> None:
    """Notes in a model's configuration that the layer that predicts tokens has weights of its own."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def first_few(names: Collection[str]) -> str:
    """The first names of a collection and the number of all, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{', '.join(ordered[:_SHOWN])}{more}"


def seems(path: str | Path) -> str:
    """Describes, for a message, the kind of model that a folder holds, by its configuration and its place."""
    config = read_json(Path(path) / "config.json") if Path(path).is_dir() else {}
    above = read_json(Path(path).parent / "config.json") if Path(path).is_dir() else {}
    if config.get("model_type") == CLASSIFIER_TYPE:
        return "a saved MOSLIM classifier"
    if above.get("model_type") == CLASSIFIER_TYPE:
        return f"a part of the saved MOSLIM classifier '{Path(path).parent}'"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    descriptions = {
        "ForCausalLM": "an incomplete or changed copy of a language model",
        "LMHeadModel": "an incomplete or changed copy of a language model",
        "ForSequenceClassification": "a sequence-classification model",
        "ForTokenClassification": "a token-classification model",
        "ForQuestionAnswering": "a question-answering model",
        "ForMaskedLM": "an encoder with a masked-language-modelling head",
        "ForPreTraining": "an encoder with pre-training heads",
        "EncoderModel": "the encoder of a model that has a decoder, too",
        "Model": HEADLESS,
        "ForConditionalGeneration": "an incomplete or changed copy of a generating model",
    }
    endings = (text for end, text in descriptions.items() if name.endswith(end))
    description = next(endings, "an incomplete or changed model")
    return f"{description} ({name})" if name else description


def _remedy(path: str | Path, model: PreTrainedModel) -> str:
    text = seems(path)
    if "MOSLIM classifier" in text and model.config.model_type != CLASSIFIER_TYPE:
        return "Give the folder of a language model, and the classifier as model.classifier"
    if "incomplete or changed" in text or model.config.model_type == CLASSIFIER_TYPE:
        return "Copy or download the folder again, or undo the change to its config.json"
    return "Give the folder of a model of the kind that is needed, with its weights and its own config.json"


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether tokens see only what is before them. BERT's family is in both tables and says so itself.

    A model of texts and images is what its language model is.
    """
    text = config.get_text_config()
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return False  # a decoder made an encoder, as in EmbeddingGemma
    if getattr(text, "attn_type", None) == "bi":  # XLNet
        return False
    model_types = {config.model_type, text.model_type}
    if model_types & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys():
        return bool(getattr(text, "is_decoder", False))
    generates = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    return bool(model_types & generates)


def hidden_width(config: Any) -> int:
    """Size of a model's last hidden states; some families set a projected one apart from the inner width (OPT)."""
    text = config.get_text_config()
    width: int = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    return width


def unwrapped(model: Any) -> Any:
    """Returns the model without peft's wrapper; the adapter's layers are still in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def language_part(model: Any) -> Any:
    """The part of a model, without an adapter's wrapper, that reads texts: not all of one that sees images, too."""
    whole = unwrapped(model)
    text = whole.config.get_text_config()
    if text is whole.config:
        return whole
    parts = (part for part in whole.modules() if isinstance(part, PreTrainedModel) and type(part.config) is type(text))
    return next(parts, whole)


def transformer_part(model: Any) -> Any:
    """The transformer under the layer that predicts tokens, in a model that may have an adapter's layers inside.

    Transformers' own name for it leads nowhere in some families, such as Llama 4.
    """
    whole = unwrapped(model)
    base = whole.base_model
    if base.get_output_embeddings() is None or base.config.is_encoder_decoder:
        return base
    parts = (part for part in language_part(base).modules() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.get_output_embeddings() is None), base)


def needed_inputs(model: PreTrainedModel) -> list[str]:
    """Inputs that a model needs besides a text, such as an image."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in needed if p.name not in ("input_ids", "attention_mask")]


def freeze_unread(model: Any) -> None:
    """Freezes what a text does not reach, such as the part that sees images: it would have no gradient."""
    part = language_part(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    read = {id(p) for module in (part, head) if module is not None for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


@contextmanager
def named(path: str | Path, own_code: bool = False) -> Iterator[None]:
    """Names the model that cannot be loaded.

    Args:
        path: Hub name or folder.
        own_code: Whether code of the model's repository runs, whose errors stay as they are.

    Raises:
        MissingFileError: There is no such folder, and no such model on the Hub; or it cannot be reached.
        UsageError: What is there cannot be loaded.
    """
    finish_exchange(path)
    folder = Path(path).is_dir()
    if not folder and (str(path).count("/") > 1 or str(path).startswith((".", "/", "~"))):
        raise MissingFileError(
            f"there is no folder '{path}' (looked in {Path.cwd()}): is what makes it still to be run?"
        )
    try:
        yield
    except (UsageError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if folder and (damaged := _damaged(Path(path))):
            raise UsageError(damaged) from error
        if folder and (pickled := _only_pickled(Path(path))):
            raise MissingFileError(
                f"the weights in '{pickled}' are a pickle, which can run code and is not read: save them as "
                "safetensors, e.g. with AutoModel...from_pretrained(folder).save_pretrained(folder) where you trust it"
            ) from error
        where = "cannot be loaded" if folder else "is no folder here, and the Hub gives no such model"
        raise MissingFileError(f"the model '{path}' {where}: {error}") from error
    except Exception as error:
        if own_code:
            raise
        raise UsageError(_damaged(Path(path)) or f"the model '{path}' cannot be loaded: {error}") from error


def refuse_outside(path: str | Path) -> None:
    """Refuses a folder whose index of weights names files that are not safetensors files in that folder.

    Raises:
        UsageError: It does, or an index cannot be read.
    """
    for file in sorted(Path(path).glob(f"*{_INDEX}")) if Path(path).is_dir() else ():
        content = read_json(file)
        places = content.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise UsageError(f"'{file}' has no `weight_map` from weights to files: copy or download the folder again")
        for weight, place in places.items():
            inside = PurePosixPath(place)
            if inside.is_absolute() or ".." in inside.parts or "\\" in place or inside.suffix != ".safetensors":
                raise UsageError(
                    f"'{file}' takes the weight '{weight}' from '{place}', which is no safetensors file inside its "
                    "folder, so nothing is loaded: put the file there and name its place in the folder"
                )


def refuse_unclear(path: str | Path) -> None:
    """Refuses a folder with two sets of weights, and one with whole numbers that no configuration gives a meaning.

    Transformers would take the single file before shards, and read the whole numbers as they are.

    Raises:
        UsageError: The folder is such a one.
    """
    folder = Path(path)
    single, index = folder / "model.safetensors", folder / f"model{_INDEX}"
    if not folder.is_dir():
        return
    if single.is_file() and index.is_file() and single.name not in read_json(index)["weight_map"].values():
        raise UsageError(
            f"'{folder}' has two sets of weights, {single.name} and the shards of {index.name}: remove the older one"
        )
    if "quantization_config" in read_json(folder / "config.json"):
        return
    files = sorted(folder.glob("model*.safetensors"))
    if files and (damaged := _damaged(folder)):
        raise UsageError(damaged)
    for file in files:
        with safe_open(file, "pt") as content:
            names = [key for key in content.keys() if key.endswith(".weight")]  # noqa: SIM118  (it is no mapping)
            dtypes = {key: content.get_slice(key).get_dtype() for key in names}
        quantised = [f"{key} ({dtype})" for key, dtype in dtypes.items() if not re.match(r"(B?F|C)(16|32|64)$", dtype)]
        if quantised:
            raise UsageError(
                f"'{file}' holds numbers of a quantised model, {first_few(quantised)}, but config.json has no "
                "quantization_config that says what they mean: restore it, or give the model as it was before"
            )


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; empty where there is no such file.

    Raises:
        UsageError: The file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{file}' is no JSON ({error}): copy or download the folder again") from error
    if not isinstance(content, dict):
        raise UsageError(f"'{file}' holds no JSON object: copy or download the folder again")
    return content


def _of_head(key: str, backbone: PreTrainedModel) -> bool:
    """Whether a weight that a transformer has no place for belongs to a head on it, not to the transformer."""
    first, _, rest = key.partition(".")
    if "lm_head" in key.split("."):  # of some models of texts and images, inside their language model
        return True
    if first == backbone.base_model_prefix:
        return False
    return first not in dict(backbone.named_children()) and bool(rest)


def _damaged(folder: Path) -> str:
    """Names the first safetensors file of a folder that cannot be read; empty if there is none."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"the weights in '{file}' cannot be read ({error}): the file is cut off or damaged, so copy it again"
    return ""


def _only_pickled(folder: Path) -> Path | None:
    """The first file of pickled weights in a folder without safetensors files."""
    pickles = sorted(folder.glob("*model*.bin"))
    return pickles[0] if pickles and not any(folder.glob("*.safetensors")) else None


def _finite(weight: Tensor) -> bool:
    """Whether no number is infinite or NaN. Read once, without a mask of the same size; quantised ones are finite."""
    if weight.is_meta or weight.itemsize < 2:
        return True
    return bool(weight.detach().sum(dtype=at_least_float32(weight.dtype)).isfinite())


def _shape(sizes: Collection[int]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def generation_config(engine: RolloutEngine, eos_ids: list[int], pad_id: int, bos_id: int | None) -> GenerationConfig:
    """Returns a generation config with which ``generate`` samples as the engine did.

    The settings of the initial model (penalties, minimum lengths, forced or suppressed tokens) are dropped.
    ``stop_strings`` are left out, since ``generate`` needs a tokenizer for them.

    Args:
        engine: Engine that sampled the completions.
        eos_ids: All end tokens.
        pad_id: Padding token.
        bos_id: First token of a text without a prompt; None = none.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if engine.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": engine.temperature,
            "top_p": engine.top_p,
            "top_k": engine.top_k or 0,  # without it, 50
        }
    ends = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    return GenerationConfig(
        bos_token_id=bos_id, eos_token_id=ends, pad_token_id=pad_id, max_new_tokens=engine.max_new_tokens, **sampling
    )


def save_as_trained(model: Any, folder: Path, engine: RolloutEngine, eos_ids: list[int], pad_id: int) -> None:
    """Saves a causal language model whose generation config, end and padding tokens are those of its training.

    The model in memory stays as it is.

    Args:
        model: In the Hugging Face form, without an adapter.
        folder: Output folder.
        engine: Engine that sampled the completions.
        eos_ids: All end tokens.
        pad_id: Padding token.
    """
    before = model.generation_config
    bos_id = getattr(before, "bos_token_id", None)
    if bos_id is None:
        bos_id = getattr(model.config, "bos_token_id", None)
    trained_config = generation_config(engine, eos_ids, pad_id, bos_id)
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    names = ("eos_token_id", "pad_token_id")
    tokens = [(config, name, getattr(config, name, None)) for config in configs.values() for name in names]
    try:
        model.generation_config = trained_config
        for config, name, _ in tokens:
            setattr(config, name, getattr(trained_config, name))
        model.save_pretrained(folder)
    finally:
        model.generation_config = before
        for config, name, value in tokens:
            setattr(config, name, value)
