"""Checkpoints know classes of the package by role and name, so that a class can move to another module."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from moslim.algorithms.functional import AdaptiveKL
from moslim.algorithms.grpo import GRPO
from moslim.callbacks.guards import Guards
from moslim.cli import run
from moslim.data.samplers import ErrorWeighted, Uniform
from moslim.mapping import ExpectedDistance, TargetProbability
from moslim.preferences import PreferenceSet
from moslim.reward.losses import SoftOrdinal
from moslim.reward.reward_classifier import RewardClassifier
from moslim.training.identity import class_key
from moslim.training.optim import WarmupDecay
from moslim.utils.errors import UsageError
from moslim.workbench.grammar import LEVELS, build_tokenizer
from tests.helpers import policy_runs
from tests.helpers.policy_models import build_model, save_classifier
from tests.helpers.tiny_world import save_world
from tests.helpers.word_task import ComparedSource, save_backbone, trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

PREFERENCES = PreferenceSet({name: LEVELS[name] for name in ("warmth", "verbosity")})
TONE = PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})


def move(patch: pytest.MonkeyPatch, *kinds: type) -> None:
    """Moves classes to a module of the package that did not exist before."""
    module = ModuleType("moslim.elsewhere")
    patch.setitem(sys.modules, module.__name__, module)
    for kind in kinds:
        patch.delattr(sys.modules[kind.__module__], kind.__name__)
        patch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)


def strings(value: Any) -> Iterator[str]:
    """All texts in a checkpoint, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from strings(inner)


def module_paths(path: Path) -> set[str]:
    """Modules of the package that a checkpoint names."""
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    texts = list(strings(torch.load(path, weights_only=True)))
    assert any("optimizer_states" in text for text in texts)
    return {name for text in texts for name in re.findall(r"\bmoslim\.\w+(?:\.\w+)*", text)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a language model and of a classifier."""
    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("lm")
    build_model("grouped", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), save_classifier(tmp_path_factory.mktemp("classifier"), tokenizer, seed=7)


class SaveEachStep(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def policy(folders: tuple[str, str], **options: Any) -> policy_runs.Traced:
    parts = {
        "mapping": TargetProbability(scope="running", min_count=6),
        "policy_optimizer": GRPO(kl_coef=0.1, kl_controller=AdaptiveKL(target=1e-3)),
        "lr_scheduler": lambda optimizer: WarmupDecay(optimizer, warmup_steps=2, final=0.1),
    }
    return policy_runs.make(PREFERENCES, *folders, **{**parts, **options})


def fit_policy(module: policy_runs.Traced, folder: Path, steps: int, **options: Any) -> tuple[dict[str, Any], Guards]:
    """Trains; returns the state of the data module, and the guards."""
    guards = Guards(truncated="warn", log_ratio="off")
    source = policy_runs.data(PREFERENCES, sampler=options.pop("sampler", None) or ErrorWeighted([0.1, 0.6, 0.3]))
    runner = policy_runs.trainer(
        folder, max_steps=steps, limit_train_batches=2, callbacks=[guards, SaveEachStep(folder)]
    )
    runner.fit(module, source, **options, weights_only=True)
    return source.state_dict(), guards


@pytest.mark.slow
def test_a_policy_s_parts_have_moved(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = policy(folders)
    state, guards = fit_policy(whole, tmp_path, 5)
    assert module_paths(tmp_path / "3.ckpt") == set()
    move(monkeypatch, TargetProbability, GRPO, AdaptiveKL, ErrorWeighted, Guards, WarmupDecay)
    resumed = policy(folders)
    later, later_guards = fit_policy(resumed, tmp_path / "resumed", 5, ckpt_path=tmp_path / "3.ckpt")
    assert [step["loss"] for step in resumed.trace] == [step["loss"] for step in whole.trace[3:]]
    assert resumed.mapping.state_dict() == whole.mapping.state_dict() != TargetProbability("running").state_dict()
    assert resumed.policy_optimizer.kl_controller.factor == whole.policy_optimizer.kl_controller.factor != 1
    assert later == state != {}
    assert later_guards.trips == guards.trips


@pytest.mark.slow
def test_a_class_of_one_s_own_is_known_by_its_path(folders: tuple[str, str], tmp_path: Path) -> None:
    """Two of one name are two classes."""
    kinds = [type("Mine", (ExpectedDistance,), {"__module__": f"lab.{place}"}) for place in ("one", "other")]
    assert [class_key(kind) for kind in kinds] == ["lab.one.Mine", "lab.other.Mine"]
    fit_policy(policy(folders, mapping=kinds[0]()), tmp_path, 1)
    with pytest.raises(UsageError, match=r"mapping:lab\.one\.Mine.*mapping:lab\.other\.Mine"):
        fit_policy(policy(folders, mapping=kinds[1]()), tmp_path, 2, ckpt_path=tmp_path / "1.ckpt")
    state, _ = fit_policy(
        policy(folders, mapping=kinds[0]()), tmp_path, 2, sampler=Uniform(), ckpt_path=tmp_path / "1.ckpt"
    )
    assert state == {}


def test_a_classifier_s_loss_and_source_have_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_backbone(tmp_path / "backbone", seed=0)

    def fit(folder: Path, **options: Any) -> RewardClassifier:
        torch.manual_seed(0)
        module = RewardClassifier(
            TONE,
            str(tmp_path / "backbone"),
            loss=SoftOrdinal(),
            lr_scheduler=lambda optimizer: WarmupDecay(optimizer, warmup_steps=2),
        )
        source = policy_runs.PreferenceDataModule(TONE, ComparedSource(labelled=True), batch_size=12)
        trainer(tmp_path, max_steps=4, callbacks=[SaveEachStep(folder)]).fit(module, source, **options)
        return module

    whole = fit(tmp_path)
    assert module_paths(tmp_path / "2.ckpt") == set()
    move(monkeypatch, SoftOrdinal, WarmupDecay)
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "2.ckpt", weights_only=True)
    assert torch.equal(resumed.classifier.head.weight, whole.classifier.head.weight)


QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 1, "limit_val_batches": 0, "logger": False}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORKBENCH = {"class_path": "moslim.data.Workbench"}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
SCHEDULE = {"class_path": "moslim.training.WarmupDecay", "init_args": {"warmup_steps": 1}}
ADAPTIVE = {"class_path": "moslim.algorithms.AdaptiveKL", "init_args": {"target": 0.1}}
MODELS = {
    "moslim.SupervisedTrainer": {
        "architecture": {
            "model_type": "llama",
            "tokenizer": "moslim.ops.WorkbenchTokenizer",
            "options": SMALL,
        },
        "engine": {"class_path": "moslim.generation.TorchEngine", "init_args": {"max_new_tokens": 4}},
    },
    "moslim.RewardClassifier": {
        "backbone": "outputs/quickstart/starter/model",
        "loss": "moslim.reward.SoftOrdinal",
    },
    "moslim.PolicyTrainer": {
        "model": "outputs/quickstart/starter/model",
        "classifier": "outputs/quickstart/reward/classifier",
        "mapping": "moslim.mapping.TargetProbability",
        "policy_optimizer": {
            "class_path": "moslim.algorithms.RLOO",
            "init_args": {
                "kl_controller": {"class_path": "moslim.algorithms.AdaptiveKL", "init_args": {"target": 0.1}}
            },
        },
        "engine": {"class_path": "moslim.generation.TorchEngine", "init_args": {"max_new_tokens": 4}},
        "judge": "moslim.evaluation.GoldJudge",
        "num_generations": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_run_s_checkpoint_names_public_paths_only(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hyper-parameters that the command line saves name classes as configs do, and load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    save_world(tmp_path)
    options = {**MODELS[kind], "optimizer": ADAMW, "lr_scheduler": SCHEDULE}
    source = {"source": WORKBENCH, "batch_size": 4}
    if kind == "moslim.PolicyTrainer":
        source["sampler"] = "moslim.data.ErrorWeighted"
    config = {
        "preferences": {"dimensions": LEVELS},
        "trainer": {**QUIET, "default_root_dir": "outputs/run"},
        "model": {"class_path": kind, "init_args": options},
        "data": {"class_path": "moslim.PreferenceDataModule", "init_args": source},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    cli = run(["fit", "--config", "run.yaml"])
    cli.trainer.save_checkpoint("saved.ckpt")
    named = module_paths(Path("saved.ckpt"))
    assert kind in named
    for path in named:
        package, _, name = path.rpartition(".")
        assert name in import_module(package).__all__, path
    loaded = type(cli.model).load_from_checkpoint("saved.ckpt", weights_only=True)
    assert type(loaded) is type(cli.model)
