"""Policy and classifier on one base: everything is as in the separate form, and what cannot share is refused."""

import csv
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from moslim.algorithms.functional import CriticOptions
from moslim.algorithms.ppo import PPO
from moslim.algorithms.rloo import RLOO
from moslim.callbacks.monitors import FILE, RoleMemory
from moslim.cli import run
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import completion_logprobs
from moslim.ops.lora import LoraOptions, add_lora, merged
from moslim.ops.models import load_causal_lm
from moslim.policy.policy_models import PolicyModels, evaluating
from moslim.policy.shared_backbone import load_scorer, resident_weights
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import save_adapter, save_merged
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.scorer import Scorer
from moslim.workbench.grammar import LEVELS
from tests.helpers.policy_models import build_model
from tests.helpers.policy_runs import LORA, PLAIN, data, make, trainer, weights
from tests.helpers.tiny_world import FEW_STEPS, SMALL_POLICY, save_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]

ROOT = Path(__file__).parents[2]
OTHER_LAYERS = LoraOptions(rank=2, alpha=8.0, target_modules=["k_proj", "v_proj", "up_proj"])
QUESTIONS = ["How do I clean the kettle?", "Why?", "How do I find the clock?"]
ANSWERS = ["Hey pal, check this. Cheers.", "Greetings reader.", "Wipe it. Then rinse it. Cheers."]


def trained_classifier(base: str, folder: Path, kind: str = "llama", **options) -> str:
    """A classifier in the adapter form whose adapter and heads say something; in the merged form under ``merged``."""
    classifier = PreferenceClassifier.from_backbone(base, PreferenceSet(LEVELS), **options).eval()
    layers = LoraOptions(rank=2, target_modules=["c_attn", "c_proj"]) if kind == "gpt2" else OTHER_LAYERS
    adapted = add_lora(classifier, layers, trained_whole=["head"]).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1 if "lora_" in name else 0.5, generator=generator)
    classifier.config.temperatures = [0.5, 1.0, 2.0, 3.0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    save_adapter(adapted, base, folder)
    save_merged(merged(adapted), folder / "merged")
    for place in (folder, folder / "merged"):
        tokenizer.save_pretrained(place)
    return str(folder)


@pytest.fixture(scope="module")
def shareable(tmp_path_factory, lm):
    return trained_classifier(lm, tmp_path_factory.mktemp("shareable"))


def build(lm, classifier, share=True, lora=LORA, critic=None, checkpointing=False):
    torch.manual_seed(0)  # of the adapter's weights
    models = PolicyModels(load_causal_lm(lm), lora, checkpointing, critic)
    return models, load_scorer(classifier, share, models, AutoTokenizer.from_pretrained(lm))


def trained(models):
    return {name for name, p in models.policy.named_parameters() if p.requires_grad}


def learn(models, batch, steps=2):
    """Moves the policy, and its critic's adapter if there is one."""
    own = [p for p in models.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = completion_logprobs(models.policy, batch, 1.0, PLAIN).sum()
        if models.critic is not None:
            loss = loss + models.values(batch, PLAIN).square().sum()
        loss.backward()
        optimizer.step()


@pytest.fixture
def batch(tokenizer):
    ids = torch.randint(6, len(tokenizer), (5, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3])[:, None]
    return CompletionBatch(ids, torch.cat([torch.ones(5, 5, dtype=torch.long), mask.long()], dim=1), mask)


# --- equal to the separate form


@pytest.mark.parametrize("kind", ["grouped", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"pooling": "mean", "head_hidden": 6, "head_dropout": 0.5}], ids=["", "mlp"])
def test_scores_are_those_of_the_separate_classifier(kind, options, tokenizer, batch, tmp_path):
    base = str(tmp_path / "base")
    build_model(kind, tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    saved = trained_classifier(base, tmp_path / "classifier", kind, **options)
    lora = LoraOptions(rank=2, target_modules=["c_attn"]) if kind == "gpt2" else LORA
    models, scorer = build(base, saved, lora=lora)
    separate = Scorer(saved).probabilities(QUESTIONS, ANSWERS)
    torch.testing.assert_close(scorer.probabilities(QUESTIONS, ANSWERS), separate, atol=1e-5, rtol=0)
    without = scorer.classifier
    assert separate.std(dim=0).max() > 0.01  # it has opinions
    learn(models, batch)
    for mode in (True, False):  # a policy that moved, in any mode, changes nothing
        models.policy.train(mode)
        torch.testing.assert_close(scorer.probabilities(QUESTIONS, ANSWERS), separate, atol=1e-5, rtol=0)
        assert models.policy.training == mode and not without.training


@torch.no_grad()
def test_scoring_in_the_midst_of_another_role_disturbs_nobody(lm, shareable, batch):
    models, scorer = build(lm, shareable, critic=CriticOptions(OTHER_LAYERS))
    with torch.enable_grad():
        learn(models, batch)
    expected = Scorer(shareable).probabilities(QUESTIONS, ANSWERS)
    start = completion_logprobs(AutoModelForCausalLM.from_pretrained(lm), batch, 1.0, PLAIN)
    learnt = completion_logprobs(models.policy, batch, 1.0, PLAIN)
    assert (learnt - start).abs().max() > 1e-3
    for role, own in (("policy", learnt), ("reference", start)):
        with models.activate(role) as model, evaluating(model):
            torch.testing.assert_close(scorer.probabilities(QUESTIONS, ANSWERS), expected, atol=1e-5, rtol=0)
            assert models.active == role and torch.equal(completion_logprobs(model, batch, 1.0, PLAIN), own)
    with pytest.raises(ZeroDivisionError), models.activate("classifier"):
        _ = 1 / 0
    assert models.active == "policy" and torch.equal(completion_logprobs(models.policy, batch, 1.0, PLAIN), learnt)


@pytest.mark.parametrize(
    ("critic", "checkpointing"),  # checkpointing with an adapter as critic is refused, see test_critic
    [
        (None, False),
        (None, True),
        (CriticOptions(), False),
        (CriticOptions(), True),
        (CriticOptions(OTHER_LAYERS), False),
    ],
    ids=["none", "none-checkpointing", "head", "head-checkpointing", "adapter"],
)
def test_scoring_between_forward_and_backward_leaves_the_gradients(lm, shareable, batch, critic, checkpointing):
    found = []
    for share in (False, True):
        models, scorer = build(lm, shareable, share, critic=critic, checkpointing=checkpointing)
        learn(models, batch)
        names = trained(models)
        loss = completion_logprobs(models.policy, batch, 1.0, PLAIN).sum()
        if critic is not None:
            torch.nn.init.ones_(models.critic.linear.weight)
            loss = loss + models.values(batch, PLAIN).sum()
        scorer.probabilities(QUESTIONS, ANSWERS)
        loss.backward()
        assert trained(models) == names and all(".classifier." not in name for name in names)
        found.append({name: p.grad for name, p in models.policy.named_parameters() if p.requires_grad})
    separate, shared = found
    assert separate.keys() == shared.keys() and any(g.abs().max() > 0 for g in shared.values())
    assert all(torch.equal(gradient, shared[name]) for name, gradient in separate.items())


# --- what cannot share


def refused(lm, classifier, reason, lora=LORA):
    """Told to share, it says why it cannot; left to choose, it takes a backbone of its own."""
    with pytest.raises(ValueError, match=rf"(?s)share_backbone is true, but .*{reason}.*set it to false"):
        build(lm, classifier, True, lora)
    for share in ("auto", False):
        models, scorer = build(lm, classifier, share, lora)
        assert not models.shares_classifier and "classifier" not in getattr(models.policy, "peft_config", {})
        assert len(list(scorer.classifier.backbone.parameters()))


def test_a_trained_base_cannot_be_shared(lm, shareable):
    refused(lm, shareable, r"model\.lora is null", lora=None)


def test_merged_weights_cannot_be_shared(lm, shareable):
    refused(lm, f"{shareable}/merged", r"merged.*--form adapter")


def test_other_weights_are_refused(lm, shareable, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(lm)
    other.model.layers[1].mlp.up_proj.weight.data *= 1.5
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(lm).save_pretrained(tmp_path)
    refused(str(tmp_path), shareable, f"was trained on '{lm}', whose weights are not those")


@pytest.mark.parametrize("option", [{"rms_norm_eps": 0.1}, {"num_attention_heads": 2, "head_dim": 16}])
def test_another_architecture_over_the_same_weights_is_refused(lm, shareable, option, tmp_path):
    shutil.copytree(lm, tmp_path / "lm")
    if "head_dim" in option:
        option = {**option, "num_key_value_heads": 1}
    AutoConfig.from_pretrained(lm, **option).save_pretrained(tmp_path / "lm")
    refused(str(tmp_path / "lm"), shareable, f"architecture is not the policy's: .*{next(iter(option))} is")


def test_another_vocabulary_is_refused(lm, shareable, tmp_path):
    shutil.copytree(lm, tmp_path / "lm")
    file = tmp_path / "lm" / "tokenizer.json"
    text = file.read_text()
    assert '"kettle"' in text
    file.write_text(text.replace('"kettle"', '"cauldron"'))
    refused(str(tmp_path / "lm"), shareable, "another vocabulary than the policy: the id of 'cauldron' is None there")


def test_a_damaged_adapter_is_an_error_even_where_one_may_choose(lm, shareable, tmp_path):
    shutil.copytree(shareable, tmp_path / "c")
    file = tmp_path / "c" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = [name for name in tensors if "layers.1.mlp" in name]  # a whole layer's: no name is left that asks for it
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, file)
    with pytest.raises(ValueError, match=r"lacks the weights .*layers\.1\.mlp"):
        build(lm, str(tmp_path / "c"), "auto")


# --- whole runs


def rewards(module):
    return {"probs": module.rollout.probs, "rewards": module.rollout.rewards, "advantages": module.rollout.advantages}


@pytest.mark.parametrize(
    "optimizer",
    [lambda: RLOO(kl_coef=0.05), lambda: PPO(), lambda: PPO(critic_lora=OTHER_LAYERS)],
    ids=["rloo", "ppo", "ppo-adapter"],
)
def test_a_run_is_that_of_the_separate_form(optimizer, preferences, lm, shareable, tmp_path):
    found, checkpoints = [], []
    for share in (False, True):
        module = make(
            preferences,
            lm,
            shareable,
            lora=LORA,
            policy_optimizer=optimizer(),
            share_backbone=share,
            default_kl_coef=0.5,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        runner = trainer(tmp_path / str(share), max_steps=3)
        runner.fit(module, data(preferences))
        assert module.models.shares_classifier == share
        runner.save_checkpoint(tmp_path / f"{share}.ckpt")
        checkpoints.append(torch.load(tmp_path / f"{share}.ckpt", weights_only=True)["state_dict"].keys())
        with torch.no_grad():
            evaluated = [module.score(answers) for answers in sampled(module, data(preferences))]
        found.append((rewards(module), weights(module), evaluated))
    (separate, own, probs), (shared, others, shared_probs) = found
    for name, value in separate.items():
        torch.testing.assert_close(shared[name], value, atol=1e-5, rtol=1e-5)
    assert own.keys() == others.keys()
    for name, value in own.items():
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_probs, probs, atol=1e-5, rtol=1e-5)
    assert checkpoints[0] == checkpoints[1]  # trained weights only, under the same names
    assert all("lora_" in name or name.startswith("critic.") for name in checkpoints[1])
    assert not any(".classifier." in name for name in checkpoints[1])


def sampled(module, datamodule):
    """Answers to a test batch, by the policy and by its reference, scored within the reference's context."""
    datamodule.trainer = module.trainer
    datamodule.setup("test")
    batch = next(iter(datamodule.test_dataloader()))
    keys = [(0, 1, i) for i in range(len(batch.index))]
    yield module.generator(module.policy, batch, keys, 1)
    with module.models.reference() as reference:
        yield module.generator(reference, batch, keys, 1)


def test_resume_export_and_test_of_a_shared_run(preferences, lm, shareable, tmp_path):
    options = {"lora": LORA, "policy_optimizer": PPO(critic_lora=OTHER_LAYERS)}
    whole = make(preferences, lm, shareable, **options)
    trainer(tmp_path, max_steps=4).fit(whole, data(preferences))

    first = make(preferences, lm, shareable, lora=LORA, policy_optimizer=PPO(critic_lora=OTHER_LAYERS))
    runner = trainer(tmp_path, max_steps=2)
    runner.fit(first, data(preferences))
    checkpoint = tmp_path / "two.ckpt"
    runner.save_checkpoint(checkpoint)
    resumed = make(preferences, lm, shareable, lora=LORA, policy_optimizer=PPO(critic_lora=OTHER_LAYERS))
    trainer(tmp_path, max_steps=4).fit(resumed, data(preferences), ckpt_path=checkpoint)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())

    with pytest.raises(ValueError, match=r"shared the policy's base.*share_backbone to true"):
        other = make(preferences, lm, shareable, share_backbone=False, **options)
        trainer(tmp_path, max_steps=4).fit(other, data(preferences), ckpt_path=checkpoint)

    resumed.export(str(tmp_path / "export"))
    resumed.tokenizer.save_pretrained(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    rows = (resumed.rollout.batch, 1.0, PLAIN)
    with torch.no_grad():
        learnt = completion_logprobs(resumed.policy, *rows)
        torch.testing.assert_close(completion_logprobs(exported, *rows), learnt, atol=1e-5, rtol=0)
        assert (resumed.models.ref_logprobs(*rows) - learnt).abs().max() > 1e-3
    assert not any("lora" in name for name, _ in AutoModel.from_pretrained(tmp_path / "export").named_parameters())


def test_the_commands_of_the_page_share_a_base(tmp_path, monkeypatch):
    page = re.sub(r" \\\n +", " ", (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"))
    commands = [shlex.split(line) for line in re.findall(r"^    python main\.py (.+)$", page, re.MULTILINE)]
    save_world(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    small = "--data.source.reward_rows 64 --data.source.bare_rows 16 --data.batch_size 8"
    sizes = {"reward": small, "policy": SMALL_POLICY}
    for command in commands:
        kind = next(name for name in sizes if f"configs/quickstart/{name}.yaml" in command)
        cli = run([*command, *shlex.split(f"{FEW_STEPS} {sizes[kind]}"), "--trainer.callbacks", "null"])
    assert len(commands) == 3 and cli.model.models.shares_classifier
    assert (cli.model.run_folder / FILE).exists()


# --- memory


def table(models, scorer):
    return {own.role: own for own in resident_weights(models, scorer)}


def nbytes(parameters):
    return sum(p.nbytes for p in parameters)


def test_resident_weights_are_counted_once(lm, shareable):
    models, scorer = build(lm, shareable, critic=CriticOptions(OTHER_LAYERS))
    base = nbytes(AutoModelForCausalLM.from_pretrained(lm).parameters())
    policy, critic, classifier = (nbytes(models.adapter(role)) for role in ("policy", "critic", "classifier"))
    heads, value_head = nbytes(scorer.classifier.parameters()), nbytes(models.critic.parameters())
    assert min(policy, critic, classifier, heads, value_head) > 0
    found = table(models, scorer)
    assert {role: own.added for role, own in found.items()} == {
        "policy": base + policy,
        "reference": 0,
        "classifier": classifier + heads,
        "critic": critic + value_head,
    }
    assert {role: own.alone for role, own in found.items()} == {
        "policy": base + policy,
        "reference": base,
        "classifier": base + classifier + heads,
        "critic": base + critic + value_head,
    }
    assert {role: 4 * own.trained for role, own in found.items()} == {
        "policy": policy,
        "reference": 0,
        "classifier": 0,
        "critic": critic + value_head,
    }


def test_a_copy_is_counted_as_one(lm, shareable):
    models, scorer = build(lm, shareable, "auto", lora=None)
    base = nbytes(AutoModelForCausalLM.from_pretrained(lm).parameters())
    found = table(models, scorer)
    assert list(found) == ["policy", "reference", "classifier"]
    assert found["policy"].added == found["reference"].added == base == 4 * found["policy"].trained
    assert found["classifier"].added == found["classifier"].alone == nbytes(scorer.classifier.parameters())


@pytest.mark.parametrize("lora", [LORA, None], ids=["shared", "full"])
def test_the_file_names_weights_and_peaks_of_all_roles(lora, preferences, lm, shareable, tmp_path):
    module = make(preferences, lm, shareable, lora=lora, policy_optimizer=PPO())
    trainer(tmp_path, max_steps=2, callbacks=[RoleMemory()]).fit(module, data(preferences))
    with (tmp_path / FILE).open() as file:
        rows = {row["role"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["policy", "reference", "classifier", "critic"]
    expected = table(module.models, module.scorer)
    total = sum(own.added for own in expected.values())
    for role, row in rows.items():
        assert (int(row["alone"]), int(row["added"])) == (expected[role].alone, expected[role].added)
        assert int(row["peak"]) > total
    for model in (module.scorer.classifier, *module.policy.modules()):
        assert not model._forward_pre_hooks  # the watch is over
