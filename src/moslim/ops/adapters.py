"""Adapter folders as peft saves them: loading of the base model and merging of the adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from moslim.ops.loading import first_few, named, read_json, untie
from moslim.ops.lora import PEFT_PREFIX
from moslim.ops.transformers_compat import found_file, matching_pattern
from moslim.training.distributed import inform
from moslim.utils.errors import MissingFileError, UsageError
from moslim.utils.folders import check_files

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


@dataclass
class AdapterFolder:
    """An adapter and the place of its base model.

    Args:
        path: Folder or Hub name of the adapter.
        base: Folder or Hub name of the base model.
    """

    path: str
    base: str

    @classmethod
    def find(cls, path: str | Path, base: str | Path | None = None) -> AdapterFolder | None:
        """Returns the adapter in a folder or under a Hub name; None where a whole model is.

        Args:
            path: Folder or Hub name.
            base: Base model, where it is not at the place that the adapter names.

        Raises:
            UsageError: A base is given for a whole model, the folder holds a whole model beside the adapter, or the
                adapter names no base or itself as base.
        """
        with named(path):
            file = find_adapter_config_file(str(path))
        if file is None:
            _refuse_inner(Path(path))
            if base is not None:
                raise UsageError(
                    f"'{path}' is no adapter: it has no {_CONFIG} and needs no base, so leave out base = '{base}'"
                )
            return None
        folder = Path(path)
        if folder.is_dir() and any(folder.glob("model*.safetensors")):
            raise UsageError(
                f"'{path}' holds a whole model and an adapter ({_CONFIG}): move one of them to a folder of its own"
            )
        named_base = read_json(Path(file)).get("base_model_name_or_path")
        place = str(base or named_base or "")
        if not place:
            raise UsageError(f"'{file}' names no base model (base_model_name_or_path): give its folder as model.base")
        if base is None and not Path(place).is_dir() and (folder / place).is_dir():
            place = str(folder / place)
        if Path(place).is_dir() and Path(place).resolve() == folder.resolve():
            raise UsageError(f"the adapter in '{path}' names itself as its base model: give that as model.base")
        return cls(str(path), place)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with the adapter."""
        return any(found_file(self.path, file) is not None for file in ("tokenizer_config.json", "tokenizer.json"))

    def merged(self, load_base: Callable[[str], PreTrainedModel], backbone_only: bool = False) -> PreTrainedModel:
        """Loads the base model and merges the adapter into it.

        Args:
            load_base: Loads a model, which may be an adapter on another base.
            backbone_only: Whether it is a transformer without head, so that what an adapter changes in a head is left
                out.

        Raises:
            MissingFileError: The base model or the adapter's weights are missing.
            UsageError: The adapter does not fit the base model, or is of a kind that cannot be merged.
        """
        from peft import get_peft_model

        options, tensors = self._read()
        try:
            model = load_base(self.base)
        except MissingFileError as error:
            raise MissingFileError(
                f"the adapter in '{self.path}' belongs on the base model '{self.base}', which cannot be loaded "
                f"({error}): give the base's folder as model.base, or set base_model_name_or_path in {_CONFIG} to it"
            ) from error
        if backbone_only:
            whole, prefix = tensors, f"{model.base_model_prefix}."
            tensors = _on_backbone(whole, model)
            _aim_at_backbone(options, tensors, model, prefix if any(key.startswith(prefix) for key in whole) else "")
        self._fit_embeddings(model, options, tensors)
        embeddings = _embeddings(model)
        try:
            adapted: Any = get_peft_model(model, options)
        except (ValueError, KeyError) as error:
            first = str(error).partition("\n")[0]  # the rest may be a whole model in print
            raise UsageError(f"the adapter in '{self.path}' does not fit the model '{self.base}': {first}") from error
        self._put(adapted, tensors, embeddings)
        try:
            result: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(
                f"the adapter in '{self.path}' (peft_type {options.peft_type.value}) cannot be merged into its base "
                f"model, so that a run cannot start from it: {error}"
            ) from error
        inform(f"The adapter '{self.path}' is merged into its base model '{self.base}'.")
        return result.requires_grad_(True).eval()

    def _read(self) -> tuple[Any, dict[str, Tensor]]:
        """The adapter's options and its weights, by name in the base model."""
        from peft import PeftConfig

        with named(self.path):
            options: Any = PeftConfig.from_pretrained(self.path)
            file = found_file(self.path, _WEIGHTS)
            if file is None:
                raise MissingFileError(
                    f"the adapter in '{self.path}' has no {_WEIGHTS}: save it as safetensors; files of pickled weights "
                    "are not read"
                )
            tensors = load_file(file)
        check_files(self.path)
        if options.is_prompt_learning:
            raise UsageError(
                f"the adapter in '{self.path}' is of the kind {options.peft_type.value}, which adds to the prompt and "
                "cannot be merged into weights: train with LoRA, or name its base model"
            )
        options.inference_mode, options.task_type = True, None
        foreign = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
        if foreign:
            raise UsageError(
                f"'{self.path}/{_WEIGHTS}' (peft_type {options.peft_type.value}) has weights that belong to no "
                f"module of a model: {first_few(foreign)}. Merge it yourself (PeftModel.merge_and_unload) and name the "
                "result"
            )
        return options, {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}

    def _fit_embeddings(self, model: PreTrainedModel, options: Any, tensors: Mapping[str, Tensor]) -> None:
        """Gives the base model as many token embeddings as the adapter was trained with, and untied ones if need be."""
        names = _embeddings(model)
        tied = len({id(model.get_parameter(f"{name}.weight")) for name in names}) < len(names)
        rows = len(model.get_parameter(f"{names[0]}.weight"))
        saved_sizes = {name: len(tensors[key]) for name in names for key in _plain(name) if key in tensors}
        added = _trained_tokens(options)
        sizes = {*saved_sizes.values(), *({max(added) + 1} if max(added, default=0) >= rows else ())}
        if sizes - {rows}:
            needed = max(sizes)
            new = set(range(rows, needed))
            whole = {name for name, size in saved_sizes.items() if size == needed}
            if new <= added:
                whole.add(names[0])
            if lacking := set() if not new else set(names[:1] if tied else names) - whole:
                raise UsageError(
                    f"the adapter in '{self.path}' was trained with {needed} token embeddings, '{self.base}' has {rows}"
                    f", and the adapter does not hold all new ones of {first_few(lacking)}: save it again with "
                    "save_embedding_layers=True, or merge it yourself and name the result"
                )
            model.resize_token_embeddings(needed, mean_resizing=False)
        apart = [key for key in tensors for name in names if key.startswith(f"{name}.lora_")]
        saved = [name for name in names for kept in options.modules_to_save or () if f".{name}".endswith(f".{kept}")]
        if tied and (apart or saved):  # in training the two layers were not the same any more
            layer: Any = model.get_output_embeddings()
            layer.weight = nn.Parameter(layer.weight.detach().clone())
            untie(model)

    def _put(self, adapted: Any, tensors: dict[str, Tensor], embeddings: Collection[str]) -> None:
        """Puts the adapter's weights into their places; each must have one, and none may be missing."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        places = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        shapes = {key.removeprefix(PEFT_PREFIX): tensor.shape for key, tensor in places.items()}
        spare = {key for name in embeddings for key in _plain(name)}
        missing, surplus = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys() - spare
        reshaped = [
            f"{key} ({tuple(tensors[key].shape)} instead of {tuple(shape)})"
            for key, shape in shapes.items()
            if key in tensors and tensors[key].shape != shape
        ]
        if missing or surplus or reshaped:
            faults = {"lacks": missing, "has no place for": surplus, "has in another shape": reshaped}
            reasons = " and ".join(f"{fault} {first_few(keys)}" for fault, keys in faults.items() if keys)
            raise UsageError(
                f"the adapter in '{self.path}' does not fit the base model '{self.base}', loaded as "
                f"{type(adapted.get_base_model()).__name__}: it {reasons}. Give the base that it was trained on as "
                "model.base, or merge it yourself (PeftModel.merge_and_unload) and name the result"
            )
        set_peft_model_state_dict(adapted, {PEFT_PREFIX + key: tensor for key, tensor in tensors.items()})


def _refuse_inner(folder: Path) -> None:
    """Raises where a folder holds no model itself, but adapters in folders of their own, as peft saves named ones."""
    inner = sorted(folder.glob(f"*/{_CONFIG}")) if folder.is_dir() and not (folder / "config.json").exists() else []
    if inner:
        raise UsageError(
            f"'{folder}' holds no model itself, but adapters: name one of their folders, "
            + ", ".join(f"'{file.parent}'" for file in inner)
        )


def adapter_base(path: str | Path, base: str | Path | None = None) -> str | None:
    """The place of an adapter's base model; None for a whole model."""
    adapter = AdapterFolder.find(path, base)
    return None if adapter is None else adapter.base


def _plain(name: str) -> list[str]:
    """Names under which a file may hold a layer's own weight, without and under an adapter."""
    wrappers = ("", "base_layer.", "original_module.", "modules_to_save.", "token_adapter.base_layer.")
    return [f"{name}.{wrapper}weight" for wrapper in wrappers]


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Names of a model's token embeddings and, after it, of the layer that predicts tokens, as far as it has one."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers if layer is not None]


def _trained_tokens(options: Any) -> set[int]:
    """Tokens whose embeddings an adapter has rows of."""
    indices = getattr(options, "trainable_token_indices", None) or getattr(options, "token_indices", None) or []
    return set(chain.from_iterable(indices.values()) if isinstance(indices, dict) else indices)


def _on_backbone(tensors: Mapping[str, Tensor], backbone: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of an adapter, by name in the transformer under the model that it was trained on; those of heads go."""
    prefix = f"{backbone.base_model_prefix}."
    inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    children = dict(backbone.named_children())
    return inside or {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] in children}


def _aim_at_backbone(options: Any, tensors: Mapping[str, Tensor], backbone: PreTrainedModel, prefix: str) -> None:
    """Changes an adapter's options to name modules of a transformer without head, those that it has weights for.

    ``prefix`` is what stood before these names where the adapter was trained.
    """
    modules, weights = dict(backbone.named_modules()), backbone.state_dict().keys()
    owners = {_owner(key, modules) for key in tensors if key not in weights}
    kept = options.modules_to_save or []
    options.modules_to_save = [
        name for name in kept if any(f".{module}".endswith(f".{name}") for module in modules)
    ] or None
    if getattr(options, "target_modules", None) is not None:
        options.target_modules = sorted(owners)
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(options, setting):
            setattr(options, setting, None)
    for setting in ("rank_pattern", "alpha_pattern"):
        if given := getattr(options, setting, None):  # patterns of names in the whole model
            whole = {name: f"{prefix}{name}" for name in owners}
            patterns = {name: matching_pattern(given.keys(), place) for name, place in whole.items()}
            values = {f"^{re.escape(name)}": given[key] for name, key in patterns.items() if key in given}
            setattr(options, setting, values)


def _owner(key: str, modules: Mapping[str, Any]) -> str:
    """Name of the innermost module of a model that a weight of an adapter belongs to."""
    name = key
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
