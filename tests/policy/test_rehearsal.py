"""Rehearsal: the KL to the reference on given texts."""

import pytest
import torch

from moslim.algorithms.rloo import RLOO
from moslim.data.sources.workbench import Workbench
from moslim.data.types import RowKind, Source, Split
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rehearsal import Rehearsal, RehearsalTexts, rehearsal_kl
from moslim.policy.update import PolicyUpdate
from moslim.utils.errors import UsageError
from tests.helpers.policy_models import build_model
from tests.helpers.policy_runs import LORA, PLAIN, data, make, trainer, weights
from tests.helpers.rollouts import rollout

TEXTS = Workbench(corpus_rows=40, echo_share=1.0)


@pytest.fixture(params=[None, LORA], ids=["full", "lora"])
def models(request, tokenizer):
    """A policy that has moved away from its reference."""
    models = PolicyModels(build_model("grouped", tokenizer), request.param)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in models.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return models


@pytest.fixture
def batch(tokenizer):
    """Three texts with prompts of 2 to 4 tokens and answers of 1 to 3."""
    ids = torch.randint(6, len(tokenizer), (3, 7), generator=torch.Generator().manual_seed(1))
    attention = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]])
    return CompletionBatch(ids, attention, attention[:, 4:].bool())


@pytest.mark.parametrize("forward_config", [PLAIN, ForwardConfig(), ForwardConfig(tokens=8, share_prefixes="always")])
def test_the_exact_kl_over_the_vocabulary(models, batch, forward_config):
    kl = rehearsal_kl(models, batch, 0.8, forward_config)
    total, count = torch.zeros(()), 0
    for ids, attention, mask in zip(batch.input_ids, batch.attention_mask, batch.mask, strict=True):
        text, answer = ids[attention.bool()][None], int(mask.sum())
        mine = (models.policy(input_ids=text, use_cache=False).logits[0, -answer - 1 : -1] / 0.8).log_softmax(dim=-1)
        with torch.no_grad(), models.reference() as reference:
            logits = reference(input_ids=text, use_cache=False).logits[0, -answer - 1 : -1]
        theirs = (logits / 0.8).log_softmax(dim=-1)
        total, count = total + (mine.exp() * (mine - theirs)).sum(), count + answer
    assert kl > 0.01
    torch.testing.assert_close(kl, total / count, atol=1e-5, rtol=1e-4)
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    for gradient, expected in zip(
        torch.autograd.grad(kl, trained), torch.autograd.grad(total / count, trained), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_at_the_start_it_is_0(tokenizer, batch):
    models = PolicyModels(build_model("grouped", tokenizer), LORA)
    assert rehearsal_kl(models, batch, 1.0, PLAIN).item() == 0


@pytest.fixture
def fitted(preferences, lm, classifier, tmp_path):
    """Trains a policy for some steps, and keeps the metrics of its losses."""

    def run(folder, steps, **options):
        module = make(preferences, lm, classifier, **options)
        module.logged = []
        module.record_part = lambda metrics, batch_idx: module.logged.append(metrics)
        trainer(tmp_path / folder, max_steps=steps).fit(module, data(preferences))
        return module

    return run


@pytest.mark.slow
def test_it_keeps_the_policy_close_on_the_texts(fitted):
    free = fitted("free", 8, rehearsal=Rehearsal(TEXTS, kl_coef=1e-9))
    kept = fitted("kept", 8, rehearsal=Rehearsal(TEXTS, kl_coef=20.0))
    drift = [module.logged[-1]["train/rehearsal_kl"].item() for module in (free, kept)]
    assert 0 < drift[1] < 0.5 * drift[0]
    assert free.logged[0]["train/rehearsal_kl"] == 0
    assert any(not torch.equal(value, weights(kept)[name]) for name, value in weights(free).items())


def test_batches_depend_on_seed_and_step_only(preferences, lm, classifier, tmp_path):
    module, datamodule = make(preferences, lm, classifier), data(preferences)
    trainer(tmp_path, max_steps=1).fit(module, datamodule)

    def texts(seed=0):
        return RehearsalTexts(Rehearsal(TEXTS, batch_size=5), datamodule, preferences, seed, padding=0)

    first, again = (texts().batch((1, 4), torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids) and len(first.mask) == 5
    others = [texts().batch((1, 5), torch.device("cpu")), texts(seed=1).batch((1, 4), torch.device("cpu"))]
    assert all(
        not torch.equal(first.input_ids, other.input_ids) for other in others if other.mask.shape == first.mask.shape
    )
    tokenizer = module.tokenizer
    row = tokenizer.decode(first.input_ids[0][first.attention_mask[0].bool()])
    answers = {example.answer for example in TEXTS.rows(RowKind.TEXTS, Split.TRAIN, preferences, 0)}
    answer = tokenizer.decode(first.input_ids[0, -first.mask.shape[1] :][first.mask[0]], skip_special_tokens=True)
    assert "".join(answer.split()) in {"".join(text.split()) for text in answers} and "[[" not in row


def test_the_update_adds_it_with_its_weight(models, batch):
    class Texts:
        options = Rehearsal(TEXTS, kl_coef=3.0)

        def batch(self, key, device):
            assert key == (0, 7)
            return batch

    rows = rollout([[1, 1, 1, 1]] * 2)

    def loss(rehearsal):
        update = PolicyUpdate(models, RLOO(), TorchEngine(4), PLAIN, 2, 0.0, importance_clip=None, rehearsal=rehearsal)
        return update.loss(rows, [rows], 1, first=False, batch_idx=7)

    plain, weighted = loss(None), loss(Texts())
    torch.testing.assert_close(weighted.loss - plain.loss, 3 * weighted.metrics["train/rehearsal_kl"])


class Unanswered(Source):
    def rows(self, kind, split, preferences, seed):
        return Workbench().rows(RowKind.PROMPTS, split, preferences, seed)


def test_texts_that_cannot_be_used(preferences):
    with pytest.raises(UsageError, match="Unanswered, has no training rows with question and answer"):
        RehearsalTexts(Rehearsal(Unanswered()), None, preferences, 0, padding=0)
    with pytest.raises(UsageError, match=r"rehearsal.kl_coef is 0.0, batch_size 16"):
        Rehearsal(TEXTS, kl_coef=0.0)
