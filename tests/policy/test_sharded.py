"""What a policy in shards can do besides plain training: adapters, clipping, guards, validation, export; refusals."""

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from moslim.algorithms.ppo import PPO
from moslim.callbacks.guards import Guards
from moslim.generation.vllm_engine import VLLMEngine
from moslim.mapping import TargetProbability
from moslim.training.distributed import shard
from tests.helpers.forked import in_two, sharded
from tests.helpers.policy_runs import BATCH, LORA, data, make, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def adapted(preferences, lm, classifier):
    """An adapter for the policy and one for the critic, on a base in shards."""
    critic = PPO(kl_coef=0.1, critic_lora=LORA)
    options = {"mapping": TargetProbability(scope="batch"), "default_kl_coef": 0.5}
    options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    return make(preferences, lm, classifier, lora=LORA, policy_optimizer=critic, **options)


def clipped_steps(folder, preferences, lm, classifier, batch_size, **options):
    """Accumulated, clipped steps, with a guard that writes a file in the middle of the first and lets it go on."""
    guards = Guards(truncated="off", identical="off", log_ratio="warn", ratio_tolerance=1e-30)
    several = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "limit_val_batches": 1, "val_check_interval": 2}
    run = trainer(folder, max_steps=3, callbacks=[guards], **several, **options)
    run.fit(adapted(preferences, lm, classifier), data(preferences, batch_size=batch_size))
    run.save_checkpoint(folder / "end.ckpt")


def sharded_clipped_steps(*arguments):
    clipped_steps(*arguments, strategy=sharded(), devices=2)


def test_adapters_accumulation_clipping_and_guards_as_in_one_process(preferences, lm, classifier, tmp_path):
    clipped_steps(tmp_path / "one", preferences, lm, classifier, BATCH)
    in_two(sharded_clipped_steps, tmp_path / "two", preferences, lm, classifier, BATCH // 2)
    assert len(list(tmp_path.glob("two/**/guards/*.ckpt"))) == 1
    one, two = (torch.load(tmp_path / name / "end.ckpt", weights_only=True) for name in ("one", "two"))
    start = adapted(preferences, lm, classifier).state_dict()
    assert two["state_dict"].keys() == one["state_dict"].keys() < start.keys()
    for role in ("policy", "critic"):
        names = [name for name in one["state_dict"] if f".{role}." in name]
        moved = max((one["state_dict"][name] - start[name]).abs().max() for name in names)
        for name in names:
            assert (two["state_dict"][name] - one["state_dict"][name]).abs().max() < 1e-4 * moved, name
    for name in ("one", "two"):
        module = adapted(preferences, lm, classifier)
        trainer(tmp_path).export(
            module, data(preferences), str(tmp_path / f"{name}-lm"), ckpt_path=str(tmp_path / name / "end.ckpt")
        )
    exported = [AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-lm").state_dict() for name in ("one", "two")]
    torch.testing.assert_close(*exported, atol=1e-5, rtol=1e-4)


def refused(folder, preferences, lm, classifier):
    with pytest.raises(ValueError, match="samples with copies of the policy's weights"):
        module = make(preferences, lm, classifier, engine=VLLMEngine(folder=str(folder / "vllm")))
        trainer(folder, max_steps=1, strategy=sharded(), devices=2).fit(module, data(preferences, batch_size=2))
    divided = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="tensor_parallel_size is 2"):
        module = make(preferences, lm, classifier)
        trainer(folder, max_steps=1, strategy=divided, devices=2).fit(module, data(preferences, batch_size=2))
    (folder / f"refused.{torch.distributed.get_rank()}").touch()


def test_what_cannot_be_sharded_is_refused(preferences, lm, classifier, tmp_path):
    in_two(refused, tmp_path, preferences, lm, classifier)
    assert len(list(tmp_path.glob("refused.*"))) == 2


def test_a_model_that_names_no_blocks_is_refused(lm):
    model = AutoModelForCausalLM.from_pretrained(lm)
    model._no_split_modules = set()
    with pytest.raises(ValueError, match="LlamaForCausalLM does not name its blocks"):
        shard(model, None)
