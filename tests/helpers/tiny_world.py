"""For tests that run whole commands: tiny models where the quickstart's configs look for them, and small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moslim.ops.models import Architecture, WorkbenchTokenizer
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier
from moslim.workbench.grammar import LEVELS

FEW_STEPS = """--trainer.accelerator cpu --trainer.max_steps 2 --trainer.val_check_interval 2
    --trainer.check_val_every_n_epoch null --trainer.limit_val_batches 1 --trainer.limit_test_batches 1
    --trainer.limit_predict_batches 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false
    --trainer.log_every_n_steps 1"""
"""Options that make any command short."""
SMALL_POLICY = """--model.engine.max_new_tokens 6 --model.num_generations 2 --model.eval_num_generations 1
    --model.forward_config.tokens 128
    --data.batch_size 4 --data.eval_batch_size 64 --data.validation_questions 1 --data.test_questions 1"""
"""Options that make rollouts and sweeps small."""
ONE_EACH = "--model.minibatches 1"
"""Makes every step one on a rollout of its own."""

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_world(folder: Path) -> None:
    """Writes ``outputs/quickstart`` of a run that has its starter, its samples and its classifier."""
    tokenizer = WorkbenchTokenizer().load()
    torch.manual_seed(0)
    starter = Architecture("llama", WorkbenchTokenizer(), SIZES).build(tokenizer)
    classifier = PreferenceClassifier.from_backbone(starter, PreferenceSet(LEVELS))
    quickstart = folder / "outputs" / "quickstart"
    for model, place in ((starter, "starter/model"), (classifier, "reward/classifier")):
        model.save_pretrained(quickstart / place)
        tokenizer.save_pretrained(quickstart / place)
    things = "basil fern pepper rose tomato tulip chair clock fence radio".split()  # a repeated row would not be fresh
    rows = [{"question": f"How do I find the {thing}?", "answer": "Hey pal, check this. Cheers."} for thing in things]
    (quickstart / "starter/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
