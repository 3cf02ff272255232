"""Keys and values of prompts that several answers go on from."""

from __future__ import annotations

import inspect
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def continues(trunk: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether answers can go on from a prompt's keys and values, with a gradient.

    Not with layers that keep a recurrent state, nor in an encoder-decoder.

    Args:
        trunk: The transformer.
        config: Its configuration.
    """
    if "past_key_values" not in inspect.signature(trunk.forward).parameters or config.is_encoder_decoder:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def branch(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache that begins with some rows of another, which stays as it is; gradients flow into that.

    Args:
        cache: Keys and values of ``G`` prompts.
        rows: ``[C]`` which of them each row is to have.
    """
    result = copy(cache)
    layers: list[Any] = [copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
    result.layers = layers
    return result
