"""The engine against a server that speaks vLLM's routes and computes with Hugging Face models."""

import json
from copy import deepcopy

import pytest
import torch

from moslim.experimental import OneStepOff
from moslim.generation.torch_engine import TorchEngine
from moslim.generation.vllm_client import ServerError
from moslim.generation.vllm_engine import ParityError, VLLMEngine, own_servers
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.lora import add_lora
from moslim.ops.numerics import derive_seed
from tests.helpers.policy_models import ENDS, build_model
from tests.helpers.policy_runs import BATCH, LORA, data, make, trainer, weights
from tests.helpers.small_server import SmallServer

PAD, END = 0, 2
EOS = [END, *ENDS]
LIMIT = 6


@pytest.fixture(scope="module")
def started(lm):
    server = SmallServer(lm)
    yield server
    server.stop()


@pytest.fixture
def server(started):
    """As if just started."""
    started.forget()
    started.requests.clear()
    started.failures, started.key = iter(()), None
    return started


@pytest.fixture
def engine(server, tmp_path):
    return VLLMEngine(LIMIT, urls=[server.url], folder=str(tmp_path / "weights"), tolerance=2e-5, patience=5.0)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model("grouped", tokenizer)


@pytest.fixture
def adapted(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return learn(add_lora(deepcopy(model), LORA, name="policy").eval())


def learn(model):
    """Changes what is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def seeds(rows, samples, seed=5):
    return torch.tensor([[derive_seed(seed, row, sample) for sample in range(samples)] for row in range(rows)])


def sample(engine, model, prompts, samples=2, **options):
    own = seeds(len(prompts[0]), samples, **options)
    return engine.sample(model, *prompts, own, EOS, PAD)


def loads(server):
    return [body["lora_name"] for body in server.bodies("/v1/load_lora_adapter")]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_the_server_s_and_logprobs_those_of_the_model(server, tmp_path, model, prompts, temperature):
    engine = VLLMEngine(LIMIT, temperature, [server.url], str(tmp_path))
    found = sample(engine, model, prompts, samples=3)
    ids, mask = (x.repeat_interleave(3, dim=0) for x in prompts)
    rows = torch.cat([ids, found.tokens], dim=1), torch.cat([mask, found.mask.long()], dim=1)
    fresh = completion_logprobs(model, CompletionBatch(*rows, found.mask), temperature, ForwardConfig())
    torch.testing.assert_close(found.logprobs, fresh, atol=1e-5, rtol=0)
    assert (found.tokens[~found.mask] == PAD).all() and (found.logprobs[~found.mask] == 0).all()
    lengths = found.mask.sum(dim=1)
    last = found.tokens[torch.arange(15), lengths - 1]
    assert torch.equal(found.ended, torch.isin(last, torch.tensor(EOS))) and 0 < found.ended.sum() < 15
    sent = {tuple(body["prompt"]) for body in server.bodies("/v1/completions")}
    assert sent == {tuple(row[keep.bool()].tolist()) for row, keep in zip(*prompts, strict=True)}  # without padding
    assert engine.difference < 1e-5


def test_greedy_answers_are_those_of_the_engine_in_this_process(server, tmp_path, model, prompts):
    found = sample(VLLMEngine(LIMIT, 0, [server.url], str(tmp_path)), model, prompts)
    expected = sample(TorchEngine(LIMIT, 0), model, prompts)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)
    assert {body["n"] for body in server.bodies("/v1/completions")} == {1}  # vLLM refuses more of the same


def test_an_answer_depends_on_its_prompt_and_seed_alone(engine, model, prompts):
    whole = sample(engine, model, prompts)
    again = sample(engine, model, prompts)
    assert torch.equal(whole.tokens, again.tokens) and torch.equal(whole.logprobs, again.logprobs)
    ids, mask = prompts
    own = seeds(5, 2)
    part = engine.sample(model, ids[3:], mask[3:], own[3:], EOS, PAD)
    width = part.tokens.shape[1]
    assert torch.equal(whole.tokens[6:, :width], part.tokens)
    assert not torch.equal(whole.tokens, sample(engine, model, prompts, seed=6).tokens)
    assert not torch.equal(whole.tokens[0], whole.tokens[1])  # samples of one prompt


@pytest.mark.slow
def test_an_adapter_gets_a_new_name_and_folder_when_it_has_changed(engine, server, adapted, prompts, tmp_path):
    for _ in range(4):
        sample(engine, adapted, prompts)
        sample(engine, adapted, prompts)  # nothing has changed
        assert {body["model"] for body in server.bodies("/v1/completions")[-5:]} == set(server.adapters)
        assert len(server.adapters) == 1  # the one before was unloaded
        learn(adapted)
    names = loads(server)
    assert len(names) == len(set(names)) == 4
    assert {path.name for path in (tmp_path / "weights").iterdir()} == set(names[-2:])
    config = json.loads((tmp_path / "weights" / names[-1] / "adapter_config.json").read_text())
    assert config["r"] == LORA.rank


def test_an_adapter_that_is_switched_off_is_the_base(engine, server, adapted, model, prompts):
    on = sample(engine, adapted, prompts)
    with adapted.disable_adapter():
        off = sample(engine, adapted, prompts)
    assert {body["model"] for body in server.bodies("/v1/completions")[-5:]} == {"base"}
    assert torch.equal(off.tokens, sample(engine, model, prompts).tokens) and not torch.equal(on.tokens, off.tokens)
    assert len(loads(server)) == 1


def test_whole_weights_are_reloaded_and_the_prefix_cache_is_emptied(engine, server, model, prompts):
    policy = learn(deepcopy(model))
    for _ in range(2):
        sample(engine, policy, prompts)
        routes = [route for route, _ in server.requests]
        order = ["/v1/models", "/collective_rpc", "/reset_prefix_cache", *["/v1/completions"] * 5]
        assert routes[-8:] == order
        learn(policy)
    sample(engine, model, prompts)  # the reference takes its turn


def test_weights_are_found_under_the_server_s_own_path(server, adapted, prompts, tmp_path):
    (tmp_path / "mounted").symlink_to(tmp_path / "weights")
    engine = VLLMEngine(LIMIT, 1.0, [server.url], str(tmp_path / "weights"), str(tmp_path / "mounted"))
    sample(engine, adapted, prompts)
    assert server.bodies("/v1/load_lora_adapter")[0]["lora_path"].startswith(str(tmp_path / "mounted"))


def test_weights_that_the_server_cannot_see_are_an_error_that_says_so(server, adapted, model, prompts, tmp_path):
    engine = VLLMEngine(LIMIT, 1.0, [server.url], str(tmp_path), "/nowhere")
    with pytest.raises(ServerError, match=r"must see the folder /nowhere/moslim-\w+ \(engine.server_folder\)"):
        sample(engine, adapted, prompts)
    with pytest.raises(ServerError, match=r"must see the folder /nowhere/moslim-\w+ .* VLLM_SERVER_DEV_MODE"):
        sample(engine, model, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("failures", [[503], [None, 0], [None, None, 0, 502, 0], [None, None, None, 500, 429]])
def test_what_passes_is_tried_again(engine, server, adapted, prompts, failures):
    expected = sample(engine, adapted, prompts)
    server.forget()
    server.failures = iter(failures)
    with pytest.warns(UserWarning, match="waiting up to 5 s"):
        found = sample(engine, adapted, prompts)
    assert torch.equal(found.tokens, expected.tokens)


def test_answers_that_a_server_breaks_off_are_sampled_anew(engine, server, adapted, prompts):
    expected = sample(engine, adapted, prompts)
    broken = iter([True])

    def end(route, found):
        if route == "/v1/completions" and next(broken, False):
            found["choices"][0] |= {"token_ids": [], "finish_reason": "abort", "logprobs": None}
        return found

    server.change = end
    with pytest.warns(UserWarning, match="waiting up to .* aborted a completion"):
        found = sample(engine, adapted, prompts)
    server.change = None
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("kind", ["adapter", "whole weights"])
def test_a_server_that_is_restarted_while_it_samples_gets_the_weights_again(
    engine, server, adapted, model, prompts, kind
):
    policy = adapted if kind == "adapter" else learn(deepcopy(model))
    expected = sample(engine, policy, prompts)
    learn(policy)

    def restart():
        yield from [None] * 5  # weights have been pushed, some prompts are answered
        server.forget()
        yield 0

    server.failures = restart()
    with pytest.warns(UserWarning, match="waiting up to"):
        found = sample(engine, policy, prompts)
    assert not torch.equal(found.tokens, expected.tokens)
    server.restart()  # between two rollouts, unnoticed
    assert torch.equal(sample(engine, policy, prompts).tokens, found.tokens)
    pushes = server.bodies("/v1/load_lora_adapter" if kind == "adapter" else "/collective_rpc")
    assert len(pushes) == 4


def test_a_server_that_was_never_there_is_an_error_at_once(model, prompts, tmp_path):
    engine = VLLMEngine(LIMIT, urls=["http://127.0.0.1:9"], folder=str(tmp_path), patience=1000.0)
    with pytest.raises(ServerError, match=r"no inference server at http://127.0.0.1:9: .*refused.*docs/vllm.md"):
        sample(engine, model, prompts)


def test_a_server_that_stays_away_ends_the_run(engine, server, adapted, prompts):
    engine.servers[0].client.patience = 0.5
    sample(engine, adapted, prompts)
    server.failures = iter([503] * 1000)
    with (
        pytest.warns(UserWarning, match="waiting up to"),
        pytest.raises(ServerError, match=r"away for more than engine.patience = 0.5 s: .*status 503"),
    ):
        sample(engine, adapted, prompts)


def test_a_key_is_read_from_the_environment(server, adapted, prompts, tmp_path, monkeypatch):
    server.key = "sesame"
    engine = VLLMEngine(LIMIT, urls=[server.url], folder=str(tmp_path), api_key_env="MY_KEY")
    with pytest.raises(ServerError, match="wants a key: set the environment variable MY_KEY"):
        sample(engine, adapted, prompts)
    monkeypatch.setenv("MY_KEY", "guess")
    with pytest.raises(ServerError, match="refused the key in the environment variable MY_KEY"):
        sample(engine, adapted, prompts)
    monkeypatch.setenv("MY_KEY", "sesame")
    assert sample(engine, adapted, prompts).mask.any()


def test_a_server_of_another_model_stops_the_run(server, adapted, tokenizer, prompts, tmp_path):
    server.model, right = str(tmp_path / "other"), server.model
    other = build_model("grouped", tokenizer, seed=1)
    other.save_pretrained(server.model)
    try:
        server.forget()
        engine = VLLMEngine(LIMIT, urls=[server.url], folder=str(tmp_path / "weights"))
        with pytest.raises(ParityError, match=rf"trainer and {server.url} differ by [\d.]+ .*tolerance is 0.001"):
            sample(engine, adapted, prompts)
    finally:
        server.model = right


def test_servers_share_the_prompts(engine, server, lm, adapted, prompts, tmp_path):
    expected = sample(engine, adapted, prompts)
    second = SmallServer(lm)
    try:
        both = VLLMEngine(LIMIT, urls=[server.url, second.url], folder=str(tmp_path / "weights"))
        server.requests.clear()
        assert torch.equal(sample(both, adapted, prompts).tokens, expected.tokens)
        assert [len(one.bodies("/v1/completions")) for one in (server, second)] == [2, 3]
    finally:
        second.stop()


def test_processes_share_the_servers():
    assert [own_servers(list("abcde"), 2, rank, adapted=False) for rank in range(2)] == [["a", "c", "e"], ["b", "d"]]
    assert [own_servers(list("ab"), 3, rank, adapted=True) for rank in range(3)] == [["a"], ["b"], ["a"]]
    with pytest.raises(ValueError, match=r"3 processes train all weights, but engine\.urls names 2 servers"):
        own_servers(list("ab"), 3, 0, adapted=False)


@pytest.mark.parametrize("arguments", [{"urls": []}, {"urls": ["localhost:8000"]}, {"parity_completions": 0}])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=f"engine.{next(iter(arguments))}"):
        VLLMEngine(**arguments)


@pytest.mark.slow
def test_a_run_pushes_every_update_and_is_resumed_as_if_uninterrupted(server, preferences, lm, classifier, tmp_path):
    def policy():
        engine = VLLMEngine(LIMIT, urls=[server.url], folder=str(tmp_path / "weights"), tolerance=2e-5)
        return make(preferences, lm, classifier, engine=engine, lora=LORA)

    whole = policy()
    trainer(tmp_path, max_steps=3).fit(whole, data(preferences))
    assert len(set(loads(server))) == 3 and len(server.adapters) == 1

    first, second = policy(), policy()
    short = trainer(tmp_path, max_steps=2)
    short.fit(first, data(preferences))
    short.save_checkpoint(tmp_path / "two.ckpt")
    server.restart()
    trainer(tmp_path, max_steps=3).fit(second, data(preferences), ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(second.trace[-1]["tokens"], whole.trace[-1]["tokens"])
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value)


@pytest.mark.slow
def test_a_server_samples_ahead_with_the_weights_before_the_update(server, preferences, lm, classifier, tmp_path):
    engine = VLLMEngine(LIMIT, urls=[server.url], folder=str(tmp_path / "weights"), tolerance=2e-5)
    module = make(preferences, lm, classifier, engine=engine, lora=LORA)
    trainer(tmp_path, max_steps=3, callbacks=[OneStepOff()]).fit(module, data(preferences))
    assert len(server.bodies("/v1/completions")) == 4 * BATCH  # those of three steps, and of the next
    assert len(set(loads(server))) == 3  # the start, for two batches, and two updates
    assert engine.difference < 1e-5  # with the weights that the server was given, not with those learnt meanwhile
    assert module.rollout.behavior_logprobs is not None
