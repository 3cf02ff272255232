"""Two processes on halves of a batch do what one does on the whole of it."""

import json
import os
import signal
from itertools import pairwise, product

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moslim.algorithms.functional import AdaptiveKL
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.rloo import RLOO
from moslim.callbacks.guards import kl_fault
from moslim.callbacks.monitors import StepCheckpoint
from moslim.mapping import TargetProbability
from moslim.training.distributed import averaged, gathered, mean_over_processes, process_count
from tests.helpers.forked import in_two, sharded
from tests.helpers.policy_runs import BATCH, LORA, data, make, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

TWO = {"strategy": "ddp_fork", "devices": 2}


class SaveEachStep(Callback):
    """Saves in every process, as checkpoints must be, and what the first one logs."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            torch.save(dict(trainer.callback_metrics), self.folder / f"{trainer.global_step}.metrics")


def test_alone_there_is_nothing_to_tell():
    assert process_count() == 1 and gathered({"a": 1}) == [{"a": 1}]
    number = torch.tensor(3, requires_grad=False)
    assert mean_over_processes(number).item() == 3 and mean_over_processes(number).dtype == torch.float32
    assert averaged({"a": number}) == {"a": number}


def own_metrics(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(averaged({"both": torch.tensor(2.0 * rank), f"own/{rank}": 5.0}), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_are_means_over_the_processes_that_have_them(tmp_path):
    in_two(own_metrics, tmp_path)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == {"both": 1.0, "own/0": 5.0, "own/1": 5.0}


def own_divergence(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    old = torch.full((2, 3), 1.0 + 3 * rank)  # 3 and 12 nats per answer
    (folder / f"{rank}").write_text(str(kl_fault(old, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 7.4)))
    torch.distributed.destroy_process_group()


def test_the_divergence_that_a_guard_limits_is_that_of_all_processes(tmp_path):
    in_two(own_divergence, tmp_path)
    assert (tmp_path / "0").read_text() == "None"  # the step to look at is the other's
    assert "is 7.5 nats" in (tmp_path / "1").read_text()


PARTS = {
    # Answers of unequal length, and prompts without instruction that fall on one process more than on the other.
    "running statistics, token mean": lambda: {
        "mapping": TargetProbability(scope="running", min_count=6),
        "policy_optimizer": GRPO(kl_coef=0.5, loss_agg_mode="token_mean"),
        "default_kl_coef": 2.0,
    },
    "critic, whitening, controller": lambda: {
        "mapping": TargetProbability(scope="batch"),
        "policy_optimizer": PPO(kl_coef=0.1, kl_controller=AdaptiveKL(target=0.1), entropy_coef=0.01),
        "default_kl_coef": 0.5,
    },
    "pairs": lambda: {"mapping": TargetProbability(scope="batch"), "policy_optimizer": OnlineDPO(min_margin=0.5)},
    "a single pair, fewer than processes": lambda: {
        "mapping": TargetProbability(scope="batch"),
        "policy_optimizer": OnlineDPO(min_margin=1.5),
    },
    "groups left out": lambda: {
        "mapping": TargetProbability(scope="batch"),
        "policy_optimizer": GRPO(min_spread=0.6, scale="batch", loss_agg_mode="grpo"),
    },
    "minibatches": lambda: {
        "mapping": TargetProbability(scope="batch"),
        "policy_optimizer": GRPO(kl_coef=0.5, loss_agg_mode="token_mean"),
        "minibatches": 2,
    },
    "batch statistics, sequence": lambda: {
        "mapping": TargetProbability(scope="batch"),
        "policy_optimizer": RLOO(kl_coef=0.1),
    },
}


def steps(folder, kind, preferences, lm, classifier, batch_size, strategy="auto", **options):
    """Two steps of plain gradient descent: each is the gradient, neither more nor less."""
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    module = make(preferences, lm, classifier, **PARTS[kind](), **sgd)
    run = trainer(folder, max_steps=2, callbacks=[SaveEachStep(folder)], strategy=strategy, **options)
    run.fit(module, data(preferences, batch_size=batch_size))


def sharded_steps(*arguments):
    steps(*arguments, strategy=sharded(), devices=2)


@pytest.mark.parametrize("kind", PARTS)
def test_two_processes_equal_one_on_the_same_global_batch(kind, preferences, lm, classifier, tmp_path):
    start = make(preferences, lm, classifier, **PARTS[kind]()).state_dict()
    parts = (kind, preferences, lm, classifier)
    steps(tmp_path / "one", *parts, BATCH)
    steps(tmp_path / "ddp", *parts, BATCH // 2, strategy="ddp_fork", devices=2)
    in_two(sharded_steps, tmp_path / "fsdp", *parts, BATCH // 2)
    found = {
        name: [torch.load(tmp_path / name / f"{step}.ckpt", weights_only=True) for step in (1, 2)]
        for name in ("one", "ddp", "fsdp")
    }
    for run, step in product(("ddp", "fsdp"), (1, 2)):
        whole, shared = (torch.load(tmp_path / which / f"{step}.metrics") for which in ("one", run))
        for metric in ("train/loss", "train/length", "train/truncated"):
            torch.testing.assert_close(shared[metric], whole[metric], atol=1e-5, rtol=1e-4)
    unequal = 0
    for name, one, two in [(n, *both) for n in ("ddp", "fsdp") for both in zip(found["one"], found[n], strict=True)]:
        ((whole,), halves) = (saved["policy_run"]["rollouts"] for saved in (one, two))
        assert len(halves) == 2
        assert whole["completion_texts"] == halves[0]["completion_texts"] + halves[1]["completion_texts"], name
        for part in ("rewards", "advantages", "probs"):
            torch.testing.assert_close(torch.cat([half[part] for half in halves]), whole[part], atol=1e-5, rtol=1e-4)
        unequal += abs(len(halves[0]["mask"].nonzero()) - len(halves[1]["mask"].nonzero()))
        assert two["state_dict"].keys() == one["state_dict"].keys()
        for weight, value in one["state_dict"].items():
            moved = (value - start[weight]).abs().max()
            assert moved > 0 and (two["state_dict"][weight] - value).abs().max() < 1e-4 * moved, (name, weight)
        assert one["callbacks"].keys() == two["callbacks"].keys()
        for key, state in one["callbacks"].items():
            if "factor" in state:
                assert two["callbacks"][key]["factor"] == pytest.approx(state["factor"], abs=1e-6)
            for level, statistics in state.get("running", {}).items():
                assert two["callbacks"][key]["running"][level] == pytest.approx(statistics, abs=1e-6), level
    assert unequal > 0


def some_steps(folder, resumed, lora, preferences, lm, classifier, strategy="ddp_fork"):
    options = {"lora": lora, "num_iterations": 2, "mapping": TargetProbability(scope="running", min_count=6)}
    if lora:  # whose critic is a parameter group with a rate of its own
        options["policy_optimizer"] = PPO(critic_lora=LORA, critic_lr=3e-3)
    run = trainer(folder, max_steps=3, callbacks=[SaveEachStep(folder)], strategy=strategy, devices=2)
    module = make(preferences, lm, classifier, **options)
    run.fit(module, data(preferences, batch_size=BATCH // 2), ckpt_path=resumed, weights_only=True)


def sharded_some_steps(*arguments):
    some_steps(*arguments, strategy=sharded())


@pytest.mark.parametrize(("strategy", "lora"), [("ddp", None), ("fsdp", None), ("fsdp", LORA)])
def test_resuming_two_processes_gives_each_its_own_rollout(strategy, lora, preferences, lm, classifier, tmp_path):
    for name, resumed in (("whole", None), ("resumed", tmp_path / "whole" / "1.ckpt")):
        arguments = (tmp_path / name, resumed, lora, preferences, lm, classifier)
        some_steps(*arguments) if strategy == "ddp" else in_two(sharded_some_steps, *arguments)
    assert not (tmp_path / "resumed" / "1.ckpt").exists()
    for step in (2, 3):
        files = (tmp_path / name / f"{step}.ckpt" for name in ("whole", "resumed"))
        whole, again = (torch.load(file, weights_only=True) for file in files)
        for name, value in whole["state_dict"].items():
            assert torch.equal(again["state_dict"][name], value), (step, name)
        for mine, theirs in zip(again["policy_run"]["rollouts"], whole["policy_run"]["rollouts"], strict=True):
            assert mine["completion_texts"] == theirs["completion_texts"] and mine["key"] == theirs["key"]
            assert torch.equal(mine["advantages"], theirs["advantages"])
        assert again["callbacks"] == whole["callbacks"]
        ((mine,), (theirs,)) = again["optimizer_states"], whole["optimizer_states"]
        assert mine["state"].keys() == theirs["state"].keys()
        rates = [[group["lr"] for group in saved["param_groups"]] for saved in (mine, theirs)]
        assert rates[0] == rates[1] and rates[0][1:] == ([3e-3] if lora else [])
        for number, state in theirs["state"].items():
            assert all(torch.equal(mine["state"][number][key], value) for key, value in state.items())


class Watch(Callback):
    """Writes down, in each process, the mapping's statistics after every stage of a fit."""

    def __init__(self, folder, mapping):
        self.folder, self.mapping, self.seen = folder, mapping, []

    def _note(self, stage):
        self.seen.append((stage, self.mapping.state_dict()))

    def on_sanity_check_end(self, *_):
        self._note("sanity")

    def on_train_batch_end(self, *_):
        self._note("train")

    def on_validation_end(self, trainer, *_):
        self._note("validation")
        torch.save(self.seen, self.folder / f"seen-{trainer.global_rank}.pt")


def watched_steps(folder, preferences, lm, classifier, batch_size, **options):
    folder.mkdir()
    mapping = TargetProbability(scope="running", min_count=6)
    watch = Watch(folder, mapping)
    checks = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 1}
    run = trainer(folder, max_steps=2, callbacks=[watch, SaveEachStep(folder)], **checks, **options)
    run.fit(make(preferences, lm, classifier, mapping=mapping), data(preferences, batch_size=batch_size))


def test_statistics_of_two_processes_are_one_and_change_in_training_alone(preferences, lm, classifier, tmp_path):
    watched_steps(tmp_path / "one", preferences, lm, classifier, BATCH)
    watched_steps(tmp_path / "two", preferences, lm, classifier, BATCH // 2, **TWO)
    (whole,) = (torch.load(file, weights_only=True) for file in (tmp_path / "one").glob("seen-*.pt"))
    first, second = (torch.load(tmp_path / "two" / f"seen-{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    stages = [stage for stage, _ in whole]
    assert [stage for stage, _ in first] == stages and stages.count("train") == 2 and "sanity" in stages
    for (before, after), stage in zip(pairwise(first), stages[1:], strict=True):
        assert (before[1] != after[1]) == (stage == "train"), stage
    for (_, mine), (_, theirs) in zip(first, whole, strict=True):
        for level, statistics in theirs["running"].items():
            assert mine["running"][level] == pytest.approx(statistics, abs=1e-6)


def refused(folder, path, preferences, lm, classifier):
    """Goes on with another mapping than the checkpoint's, which both processes must refuse."""
    module = make(preferences, lm, classifier)
    run = trainer(folder, max_steps=3, strategy="ddp", devices=2)
    with pytest.raises(ValueError, match=r"TargetProbability.*ExpectedDistance.*model\.reset_state"):
        run.fit(module, data(preferences, batch_size=BATCH // 2), ckpt_path=path, weights_only=True)
    (folder / f"refused-{run.global_rank}").touch()


def stopped(folder, at, ckpt_path, preferences, lm, classifier):
    """Three steps in each of two processes; with ``at``, the second one is sent SIGTERM in its step of that number."""

    class Terminated(Callback):
        def on_before_backward(self, trainer, *_):
            if trainer.global_step == at and trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    save = StepCheckpoint(folder, "stopped", save_on_exception=True, every_n_train_steps=100)
    controlled = RLOO(kl_coef=0.1, kl_controller=AdaptiveKL(target=0.1))
    mapping = TargetProbability(scope="running", min_count=6)
    kind = {"mapping": mapping, "policy_optimizer": controlled, "num_iterations": 2}
    steps = SaveEachStep(folder) if at is None else Terminated()
    run = trainer(folder, max_steps=3, strategy="ddp", devices=2, callbacks=[save, steps], enable_checkpointing=True)
    module = make(preferences, lm, classifier, **kind)
    try:
        run.fit(module, data(preferences, batch_size=BATCH // 2), ckpt_path=ckpt_path, weights_only=True)
    except SIGTERMException:
        (folder / f"stopped-{run.global_rank}").touch()


def test_sigterm_at_one_of_two_processes_stops_both_and_the_rest_is_that_of_the_whole_run(
    preferences, lm, classifier, tmp_path
):
    names = ("whole", "cut", "rest")
    for name in names:
        (tmp_path / name).mkdir()
    world = (preferences, lm, classifier)
    in_two(stopped, tmp_path / "whole", None, None, *world)
    in_two(stopped, tmp_path / "cut", 0, None, *world)
    assert {file.name for file in (tmp_path / "cut").iterdir()} >= {"stopped-0", "stopped-1", "stopped.ckpt"}
    in_two(stopped, tmp_path / "rest", None, tmp_path / "cut" / "stopped.ckpt", *world)
    assert not (tmp_path / "rest" / "1.ckpt").exists()
    whole, rest = (torch.load(tmp_path / name / "3.ckpt", weights_only=True) for name in ("whole", "rest"))
    assert all(torch.equal(rest["state_dict"][name], value) for name, value in whole["state_dict"].items())
    assert rest["callbacks"].keys() == whole["callbacks"].keys()
    parts = [key for key in whole["callbacks"] if key.startswith(("mapping:", "kl_controller.0:"))]
    assert len(parts) == 2 and all(rest["callbacks"][key] == whole["callbacks"][key] for key in parts)
    in_two(refused, tmp_path / "rest", tmp_path / "cut" / "stopped.ckpt", *world)
    assert {f"refused-{rank}" for rank in range(2)} <= {file.name for file in (tmp_path / "rest").iterdir()}


def report(folder, preferences, lm, classifier, **options):
    module = make(preferences, lm, classifier)
    trainer(folder, **options).test(module, data(preferences, eval_batch_size=7), verbose=False)


def sharded_report(*arguments):
    report(*arguments, strategy=sharded(), devices=2)


def test_two_processes_write_the_report_that_one_writes(preferences, lm, classifier, tmp_path):
    report(tmp_path / "one", preferences, lm, classifier)
    report(tmp_path / "ddp", preferences, lm, classifier, **TWO)
    in_two(sharded_report, tmp_path / "fsdp", preferences, lm, classifier)
    results = [json.loads((tmp_path / name / "steerability.json").read_text()) for name in ("one", "ddp", "fsdp")]
    rewards = [result.pop("reward") for result in results]
    assert results[0] == results[1] == results[2]
    for reward in rewards[1:]:
        assert reward["gold"] == rewards[0]["gold"]
        assert reward["proxy"] == pytest.approx(rewards[0]["proxy"], abs=2e-6)
