"""Options of the Trainer mean for a policy what Lightning says they mean."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch.optim.lr_scheduler import LambdaLR

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.rloo import RLOO
from moslim.data.samplers import Curriculum, Reachable
from moslim.generation.torch_engine import TorchEngine
from moslim.mapping.base import MappingFunction
from moslim.ops.logprobs import completion_logprobs
from moslim.utils.errors import UsageError
from tests.helpers.policy_runs import LORA, PLAIN, data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


@pytest.fixture
def policy(preferences, lm, classifier):
    def build(**options):
        return make(preferences, lm, classifier, **options)

    return build


def moved(module, before):
    return torch.cat([(value - before[name]).flatten() for name, value in weights(module).items()])


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights(policy, preferences, tmp_path):
    module, dtypes = policy(), []
    start = copy.deepcopy(module.policy)
    module.policy.lm_head.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    before = weights(module)
    trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(module, data(preferences))
    assert set(dtypes) == {torch.bfloat16}
    assert {value.dtype for value in weights(module).values()} == {torch.float32}
    assert module.rollout.old_logprobs.dtype == torch.float32
    assert (module.logprobs - module.rows.old_logprobs).abs().max() < 0.3  # sampler and update: rounding only
    found = module.rows
    with torch.no_grad():
        exact = completion_logprobs(start, found.batch, 1.0, PLAIN)
    assert 1e-4 < (module.logprobs - exact).abs().max() < 0.3
    assert moved(module, before).abs().max() > 0


@pytest.mark.parametrize(("algorithm", "norm"), [("norm", 2), ("value", torch.inf)])
def test_gradients_are_clipped(algorithm, norm, policy, preferences, tmp_path):
    """With SGD at rate 1 the step is the gradient."""
    steps = {}
    for limit in (None, 0.01):
        module = policy(optimizer=sgd(1.0))
        before = weights(module)
        options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
        trainer(tmp_path, max_steps=1, **options).fit(module, data(preferences))
        steps[limit] = moved(module, before)
    free, clipped = steps[None], steps[0.01]
    assert free.norm(norm) > 0.1
    assert clipped.norm(norm).item() == pytest.approx(0.01, rel=1e-3)
    expected = free * (0.01 / free.norm()) if algorithm == "norm" else free.clamp(-0.01, 0.01)
    torch.testing.assert_close(clipped, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: RLOO(kl_coef=0.05),
        lambda: GRPO(loss_agg_mode="token_mean"),
        lambda: GRPO(loss_agg_mode="grpo", min_spread=0.3),
        lambda: PPO(entropy_coef=0.01),
        lambda: OnlineDPO(min_margin=0.3),
    ],
    ids=["rloo", "token mean", "groups left out", "critic, entropy", "pairs"],
)
@pytest.mark.parametrize("several", [2, 3])
def test_accumulated_minibatches_are_the_whole_rollout(several, optimizer, policy, preferences, tmp_path):
    """Four prompts, also in uneven parts."""
    results = []
    for parts in (1, several):
        module = policy(minibatches=parts, optimizer=sgd(0.1), policy_optimizer=optimizer(), default_kl_coef=0.5)
        run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=parts)
        run.fit(module, data(preferences))
        assert run.global_step == 2 and len(module.trace) == 2 * parts
        results.append(weights(module) | {"loss": run.callback_metrics["train/loss"]})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-4)


def test_windows_follow_the_inner_epochs(policy, preferences, tmp_path):
    """The second epoch's parts are others than the first one's; together they are the same answers again."""
    results = []
    for parts in (1, 2):
        optimizer = GRPO(loss_agg_mode="token_mean", min_spread=0.3)
        module = policy(minibatches=parts, num_iterations=2, optimizer=sgd(0.1), policy_optimizer=optimizer)
        run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=parts)
        run.fit(module, data(preferences))
        assert {step["key"] for step in module.trace} == {(0, 0)} and len(module.trace) == 2 * parts
        results.append(weights(module))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-4)


def test_a_step_over_two_rollouts_takes_the_mean_of_theirs(policy, preferences, tmp_path):
    def change(first_rate, **options):
        module = policy(
            policy_optimizer=GRPO(loss_agg_mode="token_mean"),
            optimizer=sgd(0.1),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: first_rate if step == 0 else 1.0),
        )
        before = weights(module)
        trainer(tmp_path, **options).fit(module, data(preferences))
        return moved(module, before)

    both = change(1.0, max_steps=1, accumulate_grad_batches=2)
    one, other = change(1.0, max_steps=1), change(0.0, max_steps=2)  # that of the second rollout alone
    assert (one - other).norm() > 0.1 * one.norm()
    torch.testing.assert_close(both, (one + other) / 2, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_fast_dev_run_takes_a_step_of_everything_and_writes_nothing(policy, preferences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = policy(num_iterations=2)
    logger = CSVLogger(tmp_path, name="")
    run = trainer(tmp_path, fast_dev_run=2, limit_val_batches=1.0, enable_checkpointing=True, logger=logger)
    run.fit(module, data(preferences))
    assert run.global_step == 2 and [step["new"] for step in module.trace] == [True, False]
    assert "val/spearman" in run.callback_metrics
    run.test(module, data(preferences), verbose=False)
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", [Reachable([0.25, 0.5, 0.25]), Curriculum([0.0, 0.5, 0.5])], ids=["same", "curriculum"]
)
def test_overfit_batches_asks_the_same_in_every_epoch(sampler, policy, preferences, tmp_path):
    class Asked(Callback):
        seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append((batch.input_ids.tolist(), batch.targets.tolist()))

    asked, module = Asked(), policy()
    run = trainer(tmp_path, overfit_batches=2, max_epochs=3, max_steps=-1, callbacks=[asked])
    run.fit(module, data(preferences, sampler=sampler))
    assert run.global_step == 6
    assert asked.seen[0:2] == asked.seen[2:4] == asked.seen[4:6] and asked.seen[0] != asked.seen[1]
    assert len({tuple(step["tokens"].flatten().tolist()) for step in module.trace}) == 6  # answered anew


@pytest.mark.slow
def test_limits_count_training_steps_not_rollouts(policy, preferences, tmp_path):
    module = policy(num_iterations=2)
    run = trainer(tmp_path, max_epochs=2, max_steps=-1, limit_train_batches=3)
    with pytest.warns(UserWarning, match=r"3 batches .* = 2: only 1 of the 2 batches of its last rollout"):
        run.fit(module, data(preferences))
    assert run.num_training_batches == 3 and run.global_step == 6
    assert [step["key"] for step in module.trace] == [(0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]
    half = trainer(tmp_path, max_epochs=1, max_steps=-1, limit_train_batches=0.5)
    half.fit(policy(), data(preferences))
    assert half.global_step == 3  # of six


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_limits_of_evaluation(stage, policy, preferences, tmp_path):
    class Counting(TorchEngine):
        asked = []

        def sample(self, model, input_ids, *args):
            self.asked.append(len(input_ids))
            return super().sample(model, input_ids, *args)

    engine = Counting(4)
    run = trainer(tmp_path, limit_val_batches=1, limit_test_batches=1)
    getattr(run, stage)(policy(engine=engine), data(preferences, eval_batch_size=5), verbose=False)
    assert engine.asked == [5] * (1 if stage == "validate" else 2)  # in a test, what it started from answers too


def test_a_profiler_sees_the_steps(policy, preferences, tmp_path):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    trainer(tmp_path, max_steps=3, profiler=profiler).fit(policy(), data(preferences))
    assert len(profiler.recorded_durations["run_training_batch"]) == 3
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


def test_anomaly_detection(policy, preferences, tmp_path):
    run = trainer(tmp_path, max_steps=1, detect_anomaly=True)
    run.fit(policy(), data(preferences))
    assert run.global_step == 1


def test_metrics_are_written_every_n_steps(policy, preferences, tmp_path):
    logger = CSVLogger(tmp_path, name="")
    trainer(tmp_path, max_steps=6, logger=logger, log_every_n_steps=2).fit(policy(), data(preferences))
    lines = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    steps = [line.split(",")[lines[0].split(",").index("step")] for line in lines[1:]]
    assert steps == ["1", "3", "5"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "several", "limit", "rates"),
    [
        (2, 2, {"limit_train_batches": 3}, [0, 0, 1]),  # half of the second rollout
        (2, 2, {"overfit_batches": 3}, [0, 0, 1]),
        (2, 2, {"limit_train_batches": 0.3}, [0, 0, 1]),  # of twelve
        (1, 4, {}, [0, 0, 0, 0, 1, 1]),  # two of six rollouts
    ],
    ids=["limit", "overfit", "fraction", "rollouts"],
)
def test_the_last_step_of_an_epoch_has_full_scale(parts, several, limit, rates, policy, preferences, tmp_path):
    """Where fewer batches are left than are accumulated, their step is that of a run without accumulation."""

    def change(rates, several):
        module = policy(
            minibatches=parts,
            policy_optimizer=GRPO(loss_agg_mode="token_mean", kl_in="loss", kl="k3", kl_coef=0.1),
            default_kl_coef=0.5,
            optimizer=sgd(0.1),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)]),
        )
        before = weights(module)
        trainer(tmp_path, max_epochs=1, accumulate_grad_batches=several, **limit).fit(module, data(preferences))
        return moved(module, before)

    found = change([0, 1], several)
    total = sum(change([int(i == j) for i in range(len(rates))], 1) for j, rate in enumerate(rates) if rate)
    torch.testing.assert_close(found, total / sum(rates), atol=1e-5, rtol=1e-3)


def test_parts_of_ones_own_compute_in_float32(policy, preferences, tmp_path):
    """In a bf16-mixed run, rewards, advantages and loss of a user's own parts are computed in float32."""
    seen = []

    class Tilted(MappingFunction):
        def per_dimension(self, probs, targets, groups):
            return (probs @ torch.full((probs.shape[-1], 1), 1.001))[..., 0].masked_fill(targets < 0, torch.nan)

    class Own(GRPO):
        def advantages(self, rewards):
            found = super().advantages(rewards)
            seen.append((found @ torch.eye(found.shape[-1])).dtype)
            return found

        def loss(self, batch):
            seen.append((batch.mask.float() @ batch.mask.float().T).dtype)
            return super().loss(batch)

    module = policy(mapping=Tilted(), policy_optimizer=Own())
    trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(module, data(preferences))
    assert seen == [torch.float32, torch.float32]
    sums = module.rollout.probs.sum(-1).masked_fill(module.rollout.targets < 0, torch.nan)
    torch.testing.assert_close(module.rollout.per_dimension, 1.001 * sums, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "precision", "remedy"),
    [
        ("bfloat16", "32-true", "bf16-mixed"),
        ("float16", "32-true", "16-mixed"),
        ("float32", "bf16-true", "bf16-mixed"),
        ("float32", "16-true", "16-mixed"),
    ],
)
def test_weights_in_few_bits_are_not_trained(dtype, precision, remedy, policy, preferences, tmp_path):
    module = policy(dtype=dtype)
    message = rf"held in .* \(such as policy\..*set trainer.precision to {remedy}.*model.lora"
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, max_steps=1, precision=precision).fit(module, data(preferences))
    with pytest.raises(UsageError, match=r"float16 .*loss is not scaled.*16-mixed"):
        trainer(tmp_path, max_steps=1).fit(policy(dtype="float16", lora=LORA), data(preferences))


@pytest.mark.slow
def test_adapters_on_a_bfloat16_base_are_float32_and_learn(policy, preferences, tmp_path):
    """Nearly all weights of policy and critic change in five steps at a small rate."""
    module = policy(
        dtype="bfloat16",
        lora=LORA,
        policy_optimizer=PPO(critic_lora=LORA, critic_lr=1e-4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    trainer(tmp_path, max_steps=5).fit(module, data(preferences))
    after = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert {p.dtype for p in module.policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert any(".critic." in name for name in after) and any("critic.linear" in name for name in after)
    changed = sum((p != before[name]).sum() for name, p in after.items())
    assert changed > 0.9 * sum(p.numel() for p in after.values())


@pytest.mark.parametrize("critic_lora", [None, LORA])
def test_the_critic_has_a_rate_of_its_own(critic_lora, policy, preferences, tmp_path):
    """The first step of Adam is as long as the rate."""

    def steps(optimizer, rate):
        adam = lambda parameters: torch.optim.Adam(parameters, lr=rate)  # noqa: E731
        module = policy(policy_optimizer=optimizer, lora=LORA, optimizer=adam)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, data(preferences))
        run.save_checkpoint(tmp_path / "rates.ckpt")
        moved = {name: (p - before[name]).abs().max().item() for name, p in module.named_parameters()}
        own = [step for name, step in moved.items() if "critic" in name]
        return max(own), max(step for name, step in moved.items() if "critic" not in name)

    found = steps(PPO(critic_lora=critic_lora, critic_lr=3e-3), 1e-3)
    assert found[0] == pytest.approx(3e-3, rel=0.05) and found[1] == pytest.approx(1e-3, rel=0.05)
    found = steps(PPO(critic_lora=critic_lora), 1e-6)  # by default not below 1e-5 ...
    assert found[0] == pytest.approx(1e-5, rel=0.1) and found[1] == pytest.approx(1e-6, rel=0.1)
    groups = torch.load(tmp_path / "rates.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-6, 1e-5]
    found = steps(PPO(critic_lora=critic_lora), 1e-3)  # ... nor below the policy's
    assert found[0] == pytest.approx(1e-3, rel=0.05)
    with pytest.raises(UsageError, match=r"critic_lr is 0: give more than 0"):
        PPO(critic_lr=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"lora": replace(LORA, dropout=0.1)}, "model.lora"), ({"lora": LORA, "policy_optimizer": None}, "critic_lora")],
)
def test_an_adapter_with_dropout_is_refused(options, named, policy):
    if "policy_optimizer" in options:
        options = {**options, "policy_optimizer": PPO(critic_lora=replace(LORA, dropout=0.1))}
    with pytest.raises(UsageError, match=rf"{named}.dropout is 0.1: a policy has no dropout"):
        policy(**options)
