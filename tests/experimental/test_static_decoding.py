"""Decoding with a cache of fixed size gives the answers of the default engine, token by token."""

import pytest
import torch

from moslim.experimental import StaticTorchEngine
from moslim.generation.decoding import Decoding
from moslim.generation.torch_engine import TorchEngine
from moslim.utils.errors import UsageError
from tests.generation.test_decoding import PLAIN, assert_same, sampled
from tests.helpers.policy_models import ARCHITECTURES, EOS, PAD, seeds
from tests.policy.test_recurrent import build


def static(model, prompts, decoding=None, temperature=1.0, samples=3, **options):
    engine = StaticTorchEngine(12, temperature, decoding=decoding, **options)
    return engine.sample(model, *prompts, seeds(len(prompts[0]), samples), EOS, PAD)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "sliding"])
@pytest.mark.parametrize("share", [True, False], ids=["prompts shared", "prompts computed for every answer"])
def test_answers_are_those_of_the_default_engine(models, prompts, share, kind, temperature):
    plain = sampled(models[kind], prompts, PLAIN, temperature)
    assert len(plain.mask.sum(dim=1).unique()) > 1  # some end before others
    assert_same(static(models[kind], prompts, Decoding(share_prompts=share), temperature), plain)


def test_a_cache_is_used_again_and_forgets_what_it_held(models, prompts):
    ids, mask = prompts
    first = static(models["llama"], prompts)
    static(models["llama"], (ids[1:3, -7:], mask[1:3, -7:]))
    assert_same(static(models["llama"], prompts), first)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_answers(models, prompts):
    engine = StaticTorchEngine(12, compiled=True)
    assert not engine.decoding.pack_head  # a graph holds addresses of weights
    assert_same(static(models["grouped"], prompts, compiled=True), sampled(models["grouped"], prompts, PLAIN))


def test_completions_can_take_part_in_a_loss(models, prompts):
    found = static(models["llama"], prompts)
    assert not any(value.is_inference() for value in vars(found).values() if value is not None)


def test_models_that_do_not_attend_to_everything_are_refused(models, prompts):
    with pytest.raises(UsageError, match=r"mistral.* take TorchEngine"):
        static(models["sliding"], prompts)
    for kind in ("mamba", "rwkv"):
        with pytest.raises(UsageError, match=rf"{kind}.* take TorchEngine"):
            StaticTorchEngine(4).sample(build(kind), *prompts, torch.zeros(5, 1, dtype=torch.long), [2], 0)


def test_options_of_the_default_engine_are_kept():
    engine = StaticTorchEngine(5, 0.5, ["x"], [7], 3, 0.9)
    default = TorchEngine(5, 0.5, ["x"], [7], 3, 0.9)
    assert {**vars(default), "compiled": False} == vars(engine)
