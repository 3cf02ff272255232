"""Whole stages: fit, validate, test, predict."""

import json
import math
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import AutoModelForCausalLM, AutoTokenizer

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from moslim.evaluation.judges import GoldJudge
from moslim.generation.torch_engine import TorchEngine
from moslim.instructions import PreferenceInstruction
from moslim.mapping import TargetProbability
from moslim.ops.logprobs import completion_logprobs
from moslim.policy.policy_models import PolicyModels
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.preferences import PreferenceSet, requested_probability
from moslim.reward.scorer import Scorer
from moslim.utils.errors import UsageError
from tests.helpers.policy_runs import BATCH, LIMIT, LORA, PLAIN, SAMPLES, Traced, data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

OPTIMIZERS = {
    "rloo": lambda: RLOO(kl_coef=0.05, importance_sampling_level="sequence"),
    "rloo-token": lambda: RLOO(
        kl_coef=0.05, importance_sampling_level="token", aggregation="normalize_then_sum", std_floor=0.3
    ),
    "grpo": lambda: GRPO(kl_coef=0.05),
    "grpo-constant": lambda: GRPO(kl_coef=0.0, scale="none", loss_agg_mode="constant"),
}


OTHERS = {
    "reinforce++": lambda: ReinforcePlusPlus(entropy_coef=0.01),
    "ppo": lambda: PPO(),
    "online-dpo": lambda: OnlineDPO(),
}
OWN_METRICS = {
    "rloo": {"clip_fraction", "kl"},
    "rloo-token": {"clip_fraction", "kl"},
    "grpo": {"clip_fraction", "kl", "kl_loss"},
    "grpo-constant": {"clip_fraction"},
    "reinforce++": {"clip_fraction", "kl", "entropy_bonus"},
    "ppo": {"clip_fraction", "kl", "value_loss", "value_clip_fraction"},
    "online-dpo": {"kl", "pairs", "accuracy", "margin"},
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", OWN_METRICS)
def test_fit_moves_the_policy_and_logs_what_happens(kind, lora, preferences, lm, classifier, tmp_path):
    module = make(
        preferences,
        lm,
        classifier,
        policy_optimizer=(OPTIMIZERS | OTHERS)[kind](),
        lora=lora,
        judge=GoldJudge(),
        default_kl_coef=0.5,
    )
    before = weights(module)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(preferences))
    assert all(not torch.equal(value, before[name]) for name, value in weights(module).items() if "lora_A" not in name)
    assert [(step["key"], step["new"]) for step in module.trace] == [((0, 0), True), ((0, 1), True)]
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    always = {"loss", "used", "default_kl", "reward", "length", "truncated", "entropy", "proxy", "gold"}
    assert {f"train/{name}" for name in always} <= found.keys()
    assert {"time/sample", "time/reward", "time/reference", "time/forward"} <= found.keys()
    every = set().union(*OWN_METRICS.values())
    assert {name for name in every if f"train/{name}" in found} == OWN_METRICS[kind]
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["train/proxy"] < 1 and found["train/default_kl"] > 0 and 1 <= found["train/length"] <= LIMIT


def test_what_a_rollout_holds(preferences, lm, classifier, tmp_path):
    mapping, penalty, kl_coef = TargetProbability(scope="group"), 0.7, 0.1
    module = make(
        preferences,
        lm,
        classifier,
        mapping=mapping,
        policy_optimizer=RLOO(kl_coef=kl_coef),
        missing_eos_penalty=penalty,
        rate=0.05,
    )
    module_data = data(preferences)
    trainer(tmp_path, max_steps=3).fit(module, module_data)  # by the third the policy has left its reference
    found = module.rollout
    assert found.key == (0, 2) and len(found) == BATCH * SAMPLES and 0 < found.ended.float().mean() < 1

    asked = module.preferences.decode(found.targets[0])
    prompt = found.input_ids[0, : -found.mask.shape[1]][found.attention_mask[0, : -found.mask.shape[1]].bool()]
    assert prompt.tolist() == module_data.renderer(module.tokenizer).ids(found.questions[0], asked)
    assert any("[[" in text for text in module.tokenizer.batch_decode(found.input_ids))  # some are instructed ...
    assert not any("[[" in question for question in found.questions)  # ... which the classifier is not shown

    scorer = Scorer(classifier)
    columns = [scorer.preferences.names.index(name) for name in preferences.names]
    assert columns != sorted(columns)
    expected = scorer.probabilities(found.questions, found.completion_texts)[:, columns]
    torch.testing.assert_close(found.probs, expected)
    groups = torch.arange(len(found)) // SAMPLES
    per_dimension = mapping.per_dimension(expected, found.targets, groups)
    torch.testing.assert_close(found.per_dimension, per_dimension, equal_nan=True)
    torch.testing.assert_close(found.rewards, per_dimension.nanmean(dim=1).nan_to_num())
    assert not requested_probability(expected, found.targets).isnan().all()

    start = AutoModelForCausalLM.from_pretrained(lm)
    with torch.no_grad():
        reference = completion_logprobs(start, found.batch, 1.0, PLAIN)
    torch.testing.assert_close(found.ref_logprobs, reference, atol=1e-5, rtol=0)
    kl = (found.old_logprobs - reference).sum(dim=1)
    assert kl.abs().max() > 0.01
    score = (found.rewards - penalty * (~found.ended).float() - kl_coef * kl).reshape(BATCH, SAMPLES)
    others = (score.sum(dim=1, keepdim=True) - score) / (SAMPLES - 1)
    torch.testing.assert_close(found.advantages.reshape(BATCH, SAMPLES), score - others, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_step_is_the_policy_gradient(kind, preferences, lm, classifier, tmp_path):
    """On policy every ratio is 1, so the step is that of advantage times log-probability."""
    module = make(
        preferences,
        lm,
        classifier,
        policy_optimizer=OPTIMIZERS[kind](),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    )
    before = weights(module)
    trainer(tmp_path, max_steps=1).fit(module, data(preferences))
    found = module.rollout

    start = AutoModelForCausalLM.from_pretrained(lm)
    logprobs = completion_logprobs(start, found.batch, 1.0, PLAIN)
    torch.testing.assert_close((logprobs - found.old_logprobs).exp(), torch.ones_like(logprobs), atol=1e-5, rtol=0)
    per_answer = (logprobs.sum(dim=1) * found.advantages).sum()
    scale = {"rloo": len(found), "grpo": found.mask.sum()}.get(kind, len(found) * LIMIT)
    (-per_answer / scale).backward()  # the KL to the reference has no gradient where both are equal
    gradients = {name: p.grad for name, p in start.named_parameters()}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, value in weights(module).items():
        torch.testing.assert_close(before[name] - value, gradients[name], atol=1e-5, rtol=1e-3)


def test_equal_scores_leave_the_policy_as_it_is(preferences, lm, classifier, tmp_path):
    """A classifier that cannot tell answers apart teaches nothing."""
    options = {"missing_eos_penalty": 0.0, "policy_optimizer": RLOO(kl_coef=0.0)}
    module = make(preferences, lm, classifier, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **options)
    module.scorer.classifier.head.weight.data.zero_()
    before = weights(module)
    trainer(tmp_path, max_steps=2).fit(module, data(preferences))
    assert all((value - before[name]).abs().max() < 1e-6 for name, value in weights(module).items())


def test_inner_epochs_and_minibatches(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, num_iterations=2, minibatches=3)
    assert module.batch_repeats == 6
    run = trainer(tmp_path, max_steps=12)
    run.fit(module, data(preferences))
    assert run.global_step == 12
    assert [step["key"] for step in module.trace] == [(0, 0)] * 6 + [(0, 1)] * 6
    assert [step["new"] for step in module.trace] == ([True] + [False] * 5) * 2
    assert [len(part) for part in module.parts] == [6, 3, 3] * 4  # of four prompts, three answers each
    orders = []
    for epoch in range(4):
        shuffled = torch.cat([part.advantages for part in module.parts[3 * epoch : 3 * epoch + 3]])
        whole = module.trace[3 * epoch]["advantages"]
        assert torch.equal(shuffled.sort().values, whole.sort().values)  # every answer once per inner epoch
        groups = whole.reshape(BATCH, SAMPLES).tolist()
        assert all(group in groups for group in shuffled.reshape(BATCH, SAMPLES).tolist())  # those to a prompt together
        orders.append(shuffled.tolist())
    assert orders[0] != orders[1] and orders[2] != orders[3]


def test_minibatches_keep_pairs_together(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, policy_optimizer=OnlineDPO(), num_iterations=2, minibatches=2)
    trainer(tmp_path, max_steps=4).fit(module, data(preferences))
    assert [len(part) for part in module.parts] == [BATCH * SAMPLES // 2] * 4
    for part in module.parts:
        assert all(len(set(part.questions[i : i + SAMPLES])) == 1 for i in range(0, len(part), SAMPLES))
        assert (part.advantages.reshape(-1, SAMPLES).sum(dim=1) == 0).all()


def test_what_a_rollout_holds_of_a_critic(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, policy_optimizer=PPO(kl_coef=0.0, lam=1.0), num_iterations=2)
    trainer(tmp_path, max_steps=3).fit(module, data(preferences))
    found = module.rollout
    assert found.values.shape == found.returns.shape == found.advantages.shape == found.mask.shape
    assert found.values.abs().max() > 0 and (found.values[~found.mask] == 0).all()
    score = found.rewards - (~found.ended).float()  # with lambda 1 and no KL: of every token, what the answer earns
    learns = found.value_mask.any(dim=1)  # not from prompts that ask for nothing
    assert learns.tolist() == (~found.uninstructed).tolist() and learns.any() and not learns.all()
    torch.testing.assert_close(found.returns[learns], (score[:, None] * found.mask)[learns], atol=1e-5, rtol=0)
    assert found.completion_advantages.shape == (len(found),)


def test_groups_without_spread_take_no_part(preferences, lm, classifier, tmp_path):
    """Prompts without instruction earn nothing; their default behaviour is held all the same."""
    optimizer = GRPO(min_spread=0.1, kl_coef=0.0)
    module = make(preferences, lm, classifier, policy_optimizer=optimizer, default_kl_coef=0.5, missing_eos_penalty=0.0)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(preferences))
    found = module.rollout
    spread = found.rewards.reshape(BATCH, SAMPLES).std(dim=1)
    assert found.used.reshape(BATCH, SAMPLES).all(dim=1).tolist() == (spread > 0.1).tolist()
    assert 0 < run.callback_metrics["train/used"] < 1 and run.callback_metrics["train/default_kl"] > 0
    assert not (found.used & found.uninstructed).any()


def test_more_minibatches_than_prompts_are_refused(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, minibatches=BATCH + 1)
    with pytest.raises(ValueError, match=f"minibatches is {BATCH + 1}, but a rollout has only {BATCH} prompts"):
        trainer(tmp_path, max_steps=1).fit(module, data(preferences))


def test_updates_of_one_rollout_lower_its_loss(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, num_iterations=8, rate=1e-3)
    trainer(tmp_path, max_steps=8).fit(module, data(preferences))
    losses = [step["loss"] for step in module.trace]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("accumulate", [3, 5, 6])
def test_steps_that_would_mix_policies_are_refused(accumulate, preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, num_iterations=2, minibatches=2)
    with pytest.raises(ValueError, match=f"accumulate_grad_batches = {accumulate} must divide .* = 4"):
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate).fit(module, data(preferences))


@pytest.mark.parametrize(("repeats", "accumulate", "steps"), [(4, 2, 4), (1, 2, 2), (2, 4, 1)])
def test_accumulation_within_or_over_whole_rollouts(repeats, accumulate, steps, preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, minibatches=repeats)
    run = trainer(tmp_path, max_steps=steps, accumulate_grad_batches=accumulate)
    run.fit(module, data(preferences))
    assert run.global_step == steps and len(module.trace) == steps * accumulate


def test_two_fits_of_one_module_do_not_share_a_rollout(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, num_iterations=2)
    for _ in range(2):
        trainer(tmp_path, max_steps=1).fit(module, data(preferences))
    assert [step["new"] for step in module.trace] == [True, True]
    assert not torch.equal(module.trace[0]["advantages"], module.trace[1]["advantages"])


def test_validation_logs_a_small_sweep(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (found,) = run.validate(module, data(preferences), verbose=False)
    measures = {"exact", "within_one", "mae", "spearman", "monotonicity", "dynamic_range"}
    assert found.keys() == {f"val/{prefix}{m}" for m in measures for prefix in ("", "warmth/", "verbosity/")}
    assert found["val/mae"] > 0 and -1 <= found["val/spearman"] <= 1

    checkpoint = ModelCheckpoint(tmp_path, monitor="val/spearman", mode="max")
    options = {"enable_checkpointing": True, "callbacks": [checkpoint], "limit_val_batches": 1.0}
    trainer(tmp_path, max_steps=2, val_check_interval=1, **options).fit(module, data(preferences))
    assert checkpoint.best_model_score is not None and checkpoint.best_model_path


@pytest.fixture(scope="module")
def trained(preferences, lm, classifier, tmp_path_factory):
    """Run folder and checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("run")
    logger = CSVLogger(folder, name="")
    run = trainer(folder, max_steps=3, logger=logger, log_every_n_steps=1, enable_checkpointing=True)
    run.fit(make(preferences, lm, classifier, judge=GoldJudge()), data(preferences))
    return run.checkpoint_callback.best_model_path


@pytest.mark.slow
def test_the_test_writes_its_report(preferences, lm, classifier, trained, tmp_path, capsys):
    module = make(preferences, lm, classifier, judge=GoldJudge(), report=str(tmp_path / "copy"))
    run = trainer(tmp_path, logger=CSVLogger(tmp_path, name=""))
    run.test(module, data(preferences, test_questions=2), ckpt_path=trained, weights_only=True, verbose=False)
    for folder in (tmp_path / "version_0", tmp_path / "copy"):
        result = json.loads((folder / "steerability.json").read_text())
        keys = "schema judge dimensions mean base combinations cross_talk reward default_quality n_questions config"
        assert set(keys.split()) <= result.keys()
        assert (folder / "report.md").stat().st_size > 500
        pictures = {path.name for path in folder.glob("*.png")}
        assert pictures == {"requested_achieved.png", "cross_talk.png", "learning_curves.png"}
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    measures = {"exact", "within_one", "mae", "spearman", "monotonicity", "dynamic_range"}
    assert result["judge"] == {"name": "gold", "proxy": False} and result["n_questions"] == 2
    assert result["dimensions"].keys() == set(preferences.names)
    tables = (result["mean"], result["base"]["mean"], *result["dimensions"].values())
    assert all(set(table) == measures for table in tables)
    # Two questions, two samples: ten levels of a sweep, the default, and a combination of either kind.
    assert result["n_answers"] == 2 * 2 * (10 + 1 + 1 + 1)
    assert result["combinations"]["seen"]["n_answers"] == result["combinations"]["unseen"]["n_answers"] == 4
    assert len(result["cross_talk"]) == 2 and set(result["default_quality"]["after"]) == set(preferences.names)
    assert {"proxy", "gold"} <= result["reward"].keys() and result["reward"]["proxy"].keys() == {"before", "after"}
    assert result["mean"] != result["base"]["mean"]
    assert str(tmp_path) not in json.dumps(result) and result["config"]["seed"] == 0
    assert "steerability.json" in capsys.readouterr().out


def test_before_training_policy_and_base_answer_alike_and_the_classifier_judges(preferences, lm, classifier, tmp_path):
    trainer(tmp_path).test(make(preferences, lm, classifier, lora=LORA), data(preferences), verbose=False)
    result = json.loads((tmp_path / "steerability.json").read_text())
    assert result["judge"]["proxy"] is True
    assert result["mean"] == result["base"]["mean"] and result["dimensions"] == result["base"]["dimensions"]
    assert result["default_quality"]["before"] == result["default_quality"]["after"]
    assert not (tmp_path / "learning_curves.png").exists()


@pytest.mark.slow
def test_the_same_run_gives_the_same_figures_whatever_the_batches_of_its_test(preferences, lm, classifier, tmp_path):
    results = []
    for size in (3, 64):
        folder = tmp_path / str(size)
        module = make(preferences, lm, classifier, judge=GoldJudge())
        trainer(folder, max_steps=2).fit(module, data(preferences))
        trainer(folder).test(module, data(preferences, eval_batch_size=size, test_questions=2), verbose=False)
        results.append(json.loads((folder / "steerability.json").read_text()))
    (small, large), rewards = results, [result.pop("reward") for result in results]
    assert small == large  # all that follows from the answers
    assert rewards[0]["gold"] == rewards[1]["gold"]
    assert rewards[0]["proxy"] == pytest.approx(rewards[1]["proxy"], abs=2e-6)  # may be rounded either way


class Silent(PreferenceInstruction):
    """Writes nothing, so that all requests for one question are the same prompt."""

    def render(self, messages, preference, preferences):
        return messages


class Listening(GoldJudge):
    """Remembers what it judged, batch by batch."""

    def setup(self, preferences):
        super().setup(preferences)
        self.heard = []

    def levels(self, questions, answers):
        self.heard.append(answers)
        return super().levels(questions, answers)


def test_every_request_has_noise_of_its_own_which_policy_and_base_share(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, judge=Listening())
    module_data = data(preferences, instruction=Silent())
    trainer(tmp_path).test(module, module_data, verbose=False)
    policy, base = module.judge.heard
    assert policy == base and len(policy) == 2 * (10 + 1 + 1 + 1)
    assert len(set(policy)) > len(policy) / 2


def test_another_seed_gives_other_answers(preferences, lm, classifier, tmp_path):
    found = []
    for seed in (0, 1):
        module = make(preferences, lm, classifier, seed=seed)
        trainer(tmp_path, max_steps=1).fit(module, data(preferences))
        found.append(module.rollout.completion_texts)
    assert found[0] != found[1]


@pytest.mark.slow
def test_predict_answers_the_rows_of_a_file(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, predictions=str(tmp_path / "out" / "answers.jsonl"))
    returned = trainer(tmp_path, limit_predict_batches=4).predict(module, data(preferences, eval_batch_size=50))
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert rows == [record for batch in returned for record in batch] and len(rows) > 50
    assert set(rows[0]) == {"question", "requested", "answer"} and len({row["answer"] for row in rows}) > 10
    again = make(preferences, lm, classifier)
    other = trainer(tmp_path / "again", limit_predict_batches=25).predict(again, data(preferences, eval_batch_size=8))
    assert [record for batch in other for record in batch] == rows
    assert (tmp_path / "again" / "predictions.jsonl").exists()


class Stopping(Traced):
    """Is told to stop while it answers its first batch."""

    def predict_step(self, batch, batch_idx):
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().predict_step(batch, batch_idx)


@pytest.mark.slow
def test_an_interrupted_prediction_goes_on_where_it_stopped(preferences, lm, classifier, tmp_path):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    stopping = make(preferences, lm, classifier, Stopping, engine=TorchEngine(3), predictions=str(file))
    batches = data(preferences, eval_batch_size=40)
    trainer(tmp_path).predict(make(preferences, lm, classifier, engine=TorchEngine(3), predictions=str(whole)), batches)
    with pytest.raises(SIGTERMException):
        trainer(tmp_path).predict(stopping, batches)
    part = tmp_path / "answers.jsonl.part"
    assert part.read_bytes().count(b"\n") == 40
    part.write_text(part.read_text().replace('"answer"', '"kept": 1, "answer"'))
    trainer(tmp_path).predict(make(preferences, lm, classifier, engine=TorchEngine(3), predictions=str(file)), batches)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(record.pop("kept", 0) for record in records) == 40
    assert records == [json.loads(line) for line in whole.read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_exported_policy_answers_as_it_did(lora, preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, lora=lora, engine=TorchEngine(LIMIT, temperature=0))
    module_data = data(preferences)
    trainer(tmp_path, max_steps=2).fit(module, module_data)
    module.export(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (answer,) = module.answer("How do I clean a kettle?", {"warmth": 4})
    messages = module_data.renderer(tokenizer).messages("How do I clean a kettle?", module.preferences.decode(
        torch.tensor([4, -1])
    ))  # fmt: skip
    ids = torch.tensor([module_data.renderer(tokenizer).encoder.prompt(messages)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT)
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == answer
    assert module.models.adapted == (lora is not None) and any(p.requires_grad for p in module.policy.parameters())


def test_answers_to_one_question_are_samples(preferences, lm, classifier, tmp_path):
    module, module_data = make(preferences, lm, classifier), data(preferences)
    trainer(tmp_path).validate(module, module_data, verbose=False)
    found = module.answer("How do I clean a kettle?", {}, samples=4)
    assert len(found) == 4 and len(set(found)) > 1 and module.answer("How do I clean a kettle?", {}, 2) == found[:2]
    with pytest.raises(UsageError, match="colour"):
        module.answer("How do I clean a kettle?", {"colour": 1})


@pytest.mark.parametrize("name", ["num_generations", "eval_num_generations", "num_iterations", "minibatches"])
def test_counts_below_one_are_refused(name, preferences, lm, classifier):
    with pytest.raises(ValueError, match=f"{name}.*give 1 or more"):
        make(preferences, lm, classifier, **{name: 0})


@pytest.mark.parametrize("name", ["default_kl_coef", "missing_eos_penalty"])
def test_negative_weights_are_refused(name, preferences, lm, classifier):
    with pytest.raises(ValueError, match=rf"{name}( is)? -0\.5.*give 0 or more"):
        make(preferences, lm, classifier, **{name: -0.5})


def test_dimensions_are_matched_by_name(lm, classifier):
    with pytest.raises(ValueError, match="'colour' is unknown to the classifier"):
        make(PreferenceSet({"colour": ["red", "blue"]}), lm, classifier)
    with pytest.raises(ValueError, match=r"'warmth' has the levels .* in `preferences`, but .* in the classifier"):
        make(PreferenceSet({"warmth": ["cold", "warm"]}), lm, classifier)


def test_the_default_optimizer_and_its_rate(preferences, lm, classifier, tmp_path):
    for lora, rate in ((None, 1e-6), (LORA, 1e-5)):
        module = make(preferences, lm, classifier, lora=lora, optimizer=None)
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, data(preferences))
        assert run.optimizers[0].param_groups[0]["lr"] == rate


def test_load_from_checkpoint(preferences, lm, classifier, trained):
    parts = {
        "preferences": preferences,
        "mapping": TargetProbability(),
        "policy_optimizer": RLOO(),
        "engine": TorchEngine(LIMIT),
    }
    with pytest.raises(ValueError, match="reset_state"):
        PolicyTrainer.load_from_checkpoint(trained, weights_only=True, **parts)
    module = PolicyTrainer.load_from_checkpoint(trained, weights_only=True, reset_state=True, **parts)
    saved = torch.load(trained, weights_only=True)["state_dict"]
    assert saved and all(torch.equal(module.state_dict()[name], value) for name, value in saved.items())


def test_without_a_divergence_the_reference_makes_no_pass(preferences, lm, classifier, tmp_path, monkeypatch):
    forward_config = []
    ref_logprobs = PolicyModels.ref_logprobs
    monkeypatch.setattr(PolicyModels, "ref_logprobs", lambda *a, **o: forward_config.append(1) or ref_logprobs(*a, **o))
    for coefficient, expected in ((0.1, 2), (0.0, 0)):
        module = make(preferences, lm, classifier, policy_optimizer=RLOO(kl_coef=coefficient))
        trainer(tmp_path, max_steps=2).fit(module, data(preferences))
        assert len(forward_config) == expected and (module.rollout.ref_logprobs is None) == (expected == 0)
        forward_config.clear()
