"""Question: do RLOO, GRPO and Online DPO compute what TRL's own code computes, given the same tensors?

    pip install trl -c constraints.txt
    python benchmarks/trl_parity.py

TRL is no dependency: without it the script says so. TRL's trainers are built as users build them, on a tiny model; then
their own methods for advantages and loss are called, where only sampling, rewards and log-probabilities are replaced by
random tensors in double precision. Ours get the same tensors. Figures are the largest absolute differences over all
draws; Online DPO has no advantages to compare.
Last result: benchmarks/results/trl_parity.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write
from torch import Tensor

from moslim.algorithms import GRPO, RLOO, AdvantageInputs, LossInputs, LossOutput, OnlineDPO, PolicyOptimizer
from moslim.algorithms.functional import k1
from moslim.ops import Architecture, WorkbenchTokenizer

PROMPTS, LENGTH = 6, 12
WANTED = 1e-6


@dataclass
class Draw:
    """Random answers: ``N`` rows of ``T`` tokens, those of one prompt adjacent."""

    num_generations: int
    mask: Tensor
    rewards: Tensor
    old_logprobs: Tensor
    now: Tensor
    ref_logprobs: Tensor
    entropy: Tensor

    @classmethod
    def random(cls, num_generations: int, seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)
        rows = PROMPTS * num_generations
        lengths = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
        lengths[0] = LENGTH  # so that both sides pad to the same width
        mask = torch.arange(LENGTH) < lengths[:, None]
        double = {"generator": generator, "dtype": torch.float64}
        old_logprobs = -3 * torch.rand(rows, LENGTH, **double) * mask
        moved, drift = (0.1 * torch.randn(rows, LENGTH, **double) * mask for _ in range(2))
        rewards = torch.randn(rows, **double)
        entropy = torch.rand(rows, LENGTH, **double)
        return cls(
            num_generations,
            mask,
            rewards,
            old_logprobs,
            (old_logprobs + moved).requires_grad_(),
            old_logprobs + drift,
            entropy,
        )

    def ours(self, optimizer: PolicyOptimizer) -> tuple[Tensor, LossOutput]:
        """Advantages and loss by this project."""
        shape = (PROMPTS, self.num_generations)
        total = self.rewards.reshape(shape)
        kl = (k1(self.old_logprobs, self.ref_logprobs) * self.mask).reshape(*shape, LENGTH)
        given = AdvantageInputs(total, total[..., None], torch.zeros(shape), kl, self.mask.reshape(*shape, LENGTH))
        advantages = optimizer.advantages(given).flatten()
        mask = self.mask & optimizer.used(given).flatten()[:, None]
        entropy = self.entropy if optimizer.needs_entropy else None
        tensors = (
            self.now,
            self.old_logprobs,
            advantages,
            mask,
            LENGTH,
            self.num_generations,
            self.ref_logprobs,
            entropy,
        )
        return advantages, optimizer.loss(LossInputs(*tensors))

    @property
    def tokens(self) -> list[list[int]]:
        """Some token ids, as many per answer as it has tokens."""
        return [[9] * int(max_completion_length) for max_completion_length in self.mask.sum(dim=1)]


@dataclass
class Difference:
    """Largest absolute differences of one setting."""

    advantages: float | None = None
    loss: float = 0.0
    gradient: float = 0.0

    def note(self, advantages: tuple[Tensor, Tensor] | None, losses: tuple[Tensor, Tensor], now: Tensor) -> None:
        """Compares ours with theirs; the gradient is that of the loss in the current log-probabilities."""
        gradients = [torch.autograd.grad(loss, now)[0] for loss in losses]
        if advantages is not None:
            self.advantages = max(self.advantages or 0.0, _distance(*advantages))
        self.loss = max(self.loss, _distance(*losses))
        self.gradient = max(self.gradient, _distance(*gradients))


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())


def group_trainer(kind: str, folder: str, num_generations: int, **options: Any) -> Any:
    """TRL's RLOO or GRPO trainer on a tiny model."""
    import trl
    from datasets import Dataset

    config = getattr(trl, f"{kind}Config")(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * num_generations,
        num_generations=num_generations,
        max_completion_length=LENGTH,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    prompts = Dataset.from_list([{"prompt": "How do I clean the kettle?"}] * PROMPTS)
    tokenizer = WorkbenchTokenizer().load()
    arguments = {"args": config, "train_dataset": prompts, "processing_class": tokenizer}
    trainer = getattr(trl, f"{kind}Trainer")(folder, reward_funcs=lambda completions, **_: [0.0], **arguments)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def theirs(trainer: Any, draw: Draw) -> tuple[Tensor, Tensor]:
    """Advantages and loss by TRL's ``_generate_and_score_completions`` and ``_compute_loss``."""
    completions = [""] * len(draw.rewards)
    prompts = [[7, 8]] * len(completions)
    if type(trainer).__name__ == "GRPOTrainer":
        generated: tuple[Any, ...] = (prompts, draw.tokens, None, completions, None, {}, None, None)
    else:
        generated = (prompts, draw.tokens, completions)
    policy = draw.old_logprobs

    def logprobs(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return (draw.ref_logprobs if model is trainer.ref_model else policy), draw.entropy, None

    trainer._generate = lambda _: generated
    trainer._calculate_rewards = lambda *_: draw.rewards[:, None]
    trainer._get_per_token_logps_and_entropies = logprobs
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * len(completions))
    inputs["old_per_token_logps"] = draw.old_logprobs  # GRPO leaves it out where it believes itself on policy
    policy = draw.now
    return inputs["advantages"], trainer._compute_loss(trainer.model, inputs)


def compare_groups(kind: str, folder: str, draws: int, optimizer: PolicyOptimizer, **options: Any) -> Difference:
    """RLOO or GRPO over several draws."""
    num_generations, found = 4, Difference()
    trainer = group_trainer(kind, folder, num_generations, **options)
    for seed in range(draws):
        draw = Draw.random(num_generations, seed)
        advantages, parts = draw.ours(optimizer)
        their_advantages, loss = theirs(trainer, draw)
        found.note((advantages, their_advantages), (parts.loss, loss), draw.now)
    return found


def compare_pairs(folder: str, draws: int, optimizer: OnlineDPO) -> Difference:
    """Online DPO over several draws: TRL computes the loss in ``training_step``."""
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    config = OnlineDPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS,
        beta=optimizer.beta,
        loss_type=optimizer.loss_type,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    question = {"prompt": "How do I clean the kettle?"}
    trainer: Any = OnlineDPOTrainer(
        folder,
        reward_funcs=lambda completions, **_: [0.0],
        args=config,
        train_dataset=Dataset.from_list([question] * PROMPTS),
        processing_class=WorkbenchTokenizer().load(),
    )
    found, losses = Difference(), list[Tensor]()
    trainer.accelerator.backward = lambda loss: losses.append(loss)
    for seed in range(draws):
        draw = Draw.random(2, seed)
        halves = torch.arange(2 * PROMPTS).reshape(PROMPTS, 2).T.flatten()  # TRL: all first answers, then all second
        mask, tokens = draw.mask[halves], torch.full((2 * PROMPTS, LENGTH), 9)
        prompts = torch.full((2 * PROMPTS, 2), 7)
        trainer._generate = lambda *_, t=tokens, m=mask, p=prompts: (p, torch.ones_like(p), t, m.long(), None)
        trainer._calculate_rewards_from_functions = lambda d=draw, h=halves, **_: d.rewards[h]
        trainer._forward = lambda model, *_, d=draw, h=halves: (
            d.ref_logprobs[h] if model is trainer.ref_model else d.now[h]
        )
        trainer.training_step(trainer.model, {"prompt": [question["prompt"]] * PROMPTS})
        found.note(None, (draw.ours(optimizer)[1].loss, losses.pop()), draw.now)
    return found


def comparisons(folder: str, draws: int) -> Iterator[tuple[str, Difference]]:
    """Every setting that both sides have."""
    clip = {"epsilon": 0.2, "epsilon_high": 0.28}
    for beta in (0.0, 0.05):
        optimizer = RLOO(kl_coef=beta, importance_sampling_level="sequence", epsilon_high=0.28)
        yield f"RLOO, beta {beta}", compare_groups("RLOO", folder, draws, optimizer, beta=beta, **clip)
    reductions = {"grpo": "grpo", "dapo": "token_mean", "dr_grpo": "constant"}
    for loss_type, scale in itertools.product(reductions, ("group", "batch", "none")):
        grpo = GRPO(
            kl_coef=0.04,
            loss_agg_mode=reductions[loss_type],  # type: ignore[arg-type]
            scale=scale,  # type: ignore[arg-type]
            epsilon_high=0.28,
            std_floor=0.0,
            entropy_coef=0.01,
        )
        options = {"loss_type": loss_type, "scale_rewards": scale, "beta": 0.04, "entropy_coef": 0.01, **clip}
        found = compare_groups("GRPO", folder, draws, grpo, use_bias_correction_kl=True, **options)
        yield f"GRPO, {loss_type}, scale {scale}", found
    for loss_type in ("sigmoid", "ipo"):
        dpo = OnlineDPO(beta=0.1, loss_type=loss_type)  # type: ignore[arg-type]
        yield f"Online DPO, {loss_type}", compare_pairs(folder, draws, dpo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "trl_parity.json")
    parser.add_argument("--draws", type=int, default=20, help="random draws per setting")
    options = parser.parse_args()
    try:
        versions = {name: version(name) for name in ("trl", "accelerate")}
    except PackageNotFoundError:
        raise SystemExit("TRL is not installed: pip install trl -c constraints.txt") from None
    settings = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        tokenizer = WorkbenchTokenizer().load()
        Architecture("llama", WorkbenchTokenizer(), sizes).build(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, found in comparisons(folder, options.draws):
            settings[name] = vars(found)
            print(f"{name}: {settings[name]}", flush=True)
    largest = max(value for found in settings.values() for value in found.values() if value is not None)
    result = circumstances()
    result["versions"] |= versions
    write(
        options.out,
        {**result, "draws": options.draws, "wanted": WANTED, "largest": largest, "settings": settings},
    )
    if largest > WANTED:
        raise SystemExit(f"the largest difference is {largest:.2e}, wanted at most {WANTED:.0e}")


if __name__ == "__main__":
    main()
