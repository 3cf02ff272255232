"""Models of the quickstart's shapes with random weights, where its configs look for them."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from common import ROOT

from moslim import PreferenceSet
from moslim.ops import Architecture, WorkbenchTokenizer
from moslim.reward import PreferenceClassifier
from moslim.workbench.grammar import LEVELS

STARTER, CLASSIFIER = Path("outputs/quickstart/starter/model"), Path("outputs/quickstart/reward/classifier")


def save_random_models(folder: Path, seed: int = 0) -> None:
    """Writes a starter and a classifier below a folder."""
    config = yaml.safe_load((ROOT / "configs/quickstart/starter.yaml").read_text(encoding="utf-8"))
    options = config["model"]["init_args"]["architecture"]["options"]
    tokenizer = WorkbenchTokenizer().load()
    torch.manual_seed(seed)
    starter = Architecture("llama", WorkbenchTokenizer(), options).build(tokenizer)
    classifier = PreferenceClassifier.from_backbone(starter, PreferenceSet(LEVELS))
    for model, place in ((starter, STARTER), (classifier, CLASSIFIER)):
        model.save_pretrained(folder / place)
        tokenizer.save_pretrained(folder / place)
