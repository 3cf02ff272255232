"""The classes and commands of ``docs/extending.md``, taken from the page and run as they stand there."""

import contextlib
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moslim import PolicyTrainer, RewardClassifier, Scorer
from moslim.algorithms.base import AdvantageInputs, LossInputs
from moslim.cli import MoslimCLI, run
from moslim.data import Example, RowKind, Split
from moslim.data.batches import one_hot
from moslim.data.loader import Draw
from moslim.evaluation.steerability_report import scalars
from moslim.instructions import level_words
from moslim.preferences import Preference, PreferenceSet
from moslim.reward.losses import CrossEntropy
from moslim.workbench.grammar import LEVELS
from tests.helpers.tiny_world import FEW_STEPS, ONE_EACH, SMALL_POLICY, save_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n# (my_lab\.\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    python main\.py (.+?)$", re.sub(r" \\\n +", " ", PAGE), re.MULTILINE)
SMALL = {
    "configs/quickstart/policy.yaml": f"{SMALL_POLICY} {ONE_EACH}",
    "configs/quickstart/starter.yaml": "--data.source.reward_rows 8 --data.batch_size 4 --data.eval_batch_size 4",
    "configs/quickstart/reward.yaml": "--data.source.reward_rows 64 --data.source.bare_rows 16 --data.batch_size 8",
}
NO_GATE = ["--trainer.callbacks", "null"]  # nothing here is trained enough to pass one


class Lab:
    """A user's folder with the page's ``my_lab.py`` and ``my_lab.yaml``, and the quickstart's models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, command: str, *options: str) -> MoslimCLI:
        small = SMALL[re.search(r"--config (\S+)", command).group(1)]
        with contextlib.chdir(self.folder):
            return run([*shlex.split(command), *shlex.split(f"{FEW_STEPS} {small}"), *NO_GATE, *options])

    def documented(self, name: str, *options: str) -> MoslimCLI:
        """Runs the page's only command that holds this text."""
        (command,) = [command for command in COMMANDS if name in command]
        return self.run(command, *options)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    for _, file, code in BLOCKS:
        with (folder / file).open("a") as stream:
            stream.write(code)
    (folder / "configs").symlink_to(ROOT / "configs")
    save_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(sys, "argv", ["main.py"])
        patch.delitem(sys.modules, "my_lab", raising=False)
        yield Lab(folder)
        sys.modules.pop("my_lab", None)


@pytest.fixture(scope="module")
def classes(lab: Lab) -> Any:
    """The module ``my_lab``, as the command line imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(lab.folder)
        return importlib.import_module("my_lab")


# --- the page


def test_every_class_of_the_page_is_used_by_one_of_its_commands() -> None:
    defined = set(re.findall(r"^class (\w+)\(", PAGE, re.MULTILINE))
    assert {"Narrowing", "RankReinforce"} <= defined
    named = {name for command in COMMANDS for name in re.findall(r"my_lab\.([A-Z]\w+)", command)}
    assert defined == {*named, "ScoredText"}  # which SteerLM makes


def test_every_base_class_of_the_table_exists_with_what_is_to_be_written() -> None:
    rows = re.findall(r"^\| .* \| `((?:model|data)\.[\w.]+)` \| `(\S+)\.(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert {"MappingFunction", "PolicyOptimizer"} <= {name for _, _, name, _ in rows}
    for _, module, name, written in rows:
        base = getattr(importlib.import_module(module), name)
        attributes = re.findall(r"`(\w+)`", written)
        assert base.__abstractmethods__ <= set(attributes)
        assert all(hasattr(base, a) or a in base.__annotations__ for a in attributes)


# --- a mapping function


def test_the_mapping_pays_for_nearness(classes: Any) -> None:
    mapping = classes.Narrowing(width=1.0)
    probs = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]])
    rewards = mapping(probs, torch.tensor([[1, 2]]), torch.tensor([0]))
    near = 0.6065307  # exp(-1/2)
    assert rewards.per_dimension.tolist() == [[pytest.approx(near), pytest.approx((near + 1) / 2)]]
    assert rewards.total.item() == pytest.approx((near + (near + 1) / 2) / 2)
    alone = mapping(probs, torch.tensor([[-1, 2]]), torch.tensor([0]))
    assert alone.per_dimension[0, 0].isnan() and alone.total.item() == pytest.approx((near + 1) / 2)


def test_the_mapping_runs_and_its_state_survives_a_resumed_run(lab: Lab) -> None:
    folder = ["--trainer.default_root_dir", "outputs/narrowing"]
    first = lab.documented("my_lab.Narrowing --model.mapping.width 3", *folder)
    assert type(first.model.mapping).__name__ == "Narrowing"
    assert first.model.mapping.width == pytest.approx(3 * 0.99**2)  # two rollouts
    resumed = lab.documented("my_lab.Narrowing", *folder, "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert resumed.trainer.global_step == 3
    assert resumed.model.mapping.width == pytest.approx(3 * 0.99**3)
    saved = torch.load(Path(lab.folder, resumed.trainer.checkpoint_callback.last_model_path), weights_only=True)
    assert saved["callbacks"]["mapping:my_lab.Narrowing"] == {"width": resumed.model.mapping.width}
    assert "mapping:my_lab.Narrowing" in [callback.state_key for callback in resumed.trainer.callbacks]


# --- a reward function


def test_a_reward_function(lab: Lab, classes: Any) -> None:
    cli = lab.documented("my_lab.terse")
    rollout, names = cli.model.rollout, cli.model.preferences.names
    assert cli.model.reward_functions.names == ["terse"] and cli.model.reward_functions.functions[0].weight == 0.5
    found, spared = rollout.per_dimension[:, len(names)], rollout.targets[:, names.index("verbosity")] >= 0
    assert torch.equal(found.isnan(), spared) and not spared.all()
    assert "train/reward/terse" in cli.trainer.callback_metrics
    assert classes.terse(["One two. Three four.", "One."], [{}, {"verbosity": 1}]) == [-0.2, None]


def test_a_reward_function_with_arguments(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    (lab.folder / "rewards.py").write_text(
        "class Brief:\n"
        "    def __init__(self, limit: int = 3) -> None:\n"
        "        self.limit = limit\n\n"
        "    def __call__(self, completion_ids: list, **columns: object) -> list:\n"
        "        return [float(len(ids) <= self.limit) for ids in completion_ids]\n"
    )
    command = "fit --config configs/quickstart/policy.yaml --trainer.fast_dev_run true --model.reward_functions"
    given = "'[{function: {class_path: rewards.Brief, init_args: {limit: 4}}, name: brief}]'"
    cli = lab.run(f"{command} {given}")
    assert cli.model.reward_functions.names == ["brief"]
    expected = (cli.model.rollout.mask.sum(dim=1) <= 4).float()
    assert torch.equal(cli.model.rollout.per_dimension[:, -1], expected)
    with pytest.raises(SystemExit):
        lab.run(f"{command} '[{{function: rewards.Brief, wieght: 2}}]'")
    assert "wieght" in capsys.readouterr().err


# --- a policy optimizer


def test_the_optimizer_ranks(classes: Any) -> None:
    optimizer = classes.RankReinforce(kl_coef=0.0)
    total = torch.tensor([[0.1, 500.0, -3.0], [7.0, 7.0, 8.0]])
    nothing = torch.zeros_like(total)
    scores = AdvantageInputs(total, total[..., None], nothing, nothing[..., None], nothing[..., None] == 0)
    assert optimizer.advantages(scores).tolist() == [[0.0, 1.0, -1.0], [-0.5, -0.5, 1.0]]


def test_the_optimizer_s_loss(classes: Any) -> None:
    optimizer = classes.RankReinforce(kl_coef=0.0)
    old = torch.full((2, 2), -1.0)
    logprobs = (old + torch.tensor([[0.0, 0.0], [1.0, 0.0]])).requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    parts = optimizer.loss(
        LossInputs(logprobs, old, torch.tensor([1.0, -1.0]), mask, max_completion_length=4, num_generations=2)
    )
    # Ratios 1, 1 and e; the last, with a negative advantage, is not clipped: -(1 + 1)/4 and +e/4, averaged.
    assert parts.loss.item() == pytest.approx((-2 + 2.7182818) / 4 / 2)
    assert parts.metrics["clip_fraction"].item() == 0
    parts.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -1.0], [2.7182818, 0.0]]) / 8)


def test_the_optimizer_runs_with_the_options_of_its_base(lab: Lab) -> None:
    options = ["--trainer.default_root_dir", "outputs/ranks", "--model.policy_optimizer.kl_coef", "0.005"]
    cli = lab.documented("--model.policy_optimizer my_lab.RankReinforce", *options)
    assert type(cli.model.policy_optimizer).__name__ == "RankReinforce"
    assert cli.model.policy_optimizer.kl_coef == 0.005
    assert set(cli.model.rollout.advantages.tolist()) <= {-1.0, 0.0, 1.0}
    assert {"train/clip_fraction", "train/kl"} <= cli.trainer.callback_metrics.keys()


def test_both_in_a_config_layered_over_the_quickstart(lab: Lab) -> None:
    cli = lab.documented("--config my_lab.yaml", "--trainer.fast_dev_run", "true")
    assert type(cli.model.policy_optimizer).__name__ == "RankReinforce"
    assert type(cli.model.mapping).__name__ == "Narrowing" and cli.model.mapping.width == pytest.approx(3 * 0.99)
    later = lab.documented("--config my_lab.yaml", "--trainer.fast_dev_run", "true", "--model.mapping.least", "2.9")
    assert later.model.mapping.least == 2.9


# --- data, instructions, samplers


def test_a_source_an_instruction_and_a_sampler(lab: Lab) -> None:
    cli = lab.documented("my_lab.Greetings", "--trainer.fast_dev_run", "true")
    rollout, tokenizer = cli.model.rollout, cli.model.tokenizer
    names = {re.fullmatch(r"Greet (\w+)!", question).group(1) for question in rollout.questions}
    assert names <= {"Alan", "Kurt", "Emmy", "Sofia", "Carl", "Henri"}
    for target in rollout.targets:
        (level,) = cli.datamodule.preferences.decode(target).levels.values()
        assert level in (0, 4)
    renderer = cli.datamodule.renderer(tokenizer)
    preference = cli.datamodule.preferences.decode(torch.tensor([0, -1, 4, -1]))
    (message,) = renderer.messages("Greet me! Wanted: warmth icy", preference)
    assert message["content"] == "Greet me!  warmth icy\nWanted: verbosity minimal, warmth glowing"
    assert renderer.ids(rollout.questions[0], cli.datamodule.preferences.decode(rollout.targets[0]))


def test_a_sampler_that_learns(lab: Lab) -> None:
    options = ["--trainer.default_root_dir", "outputs/errors", "--trainer.max_steps", "3"]
    cli = lab.documented("moslim.data.ErrorWeighted", *options, "--trainer.limit_train_batches", "1")
    shares = cli.datamodule.sampler.metrics()
    assert len(shares) == 20 and sum(shares.values()) == pytest.approx(1)
    assert "sampler/warmth/glowing" in cli.trainer.callback_metrics and len(set(shares.values())) > 4


def test_the_source_serves_a_classifier_and_a_test_as_well(lab: Lab, classes: Any) -> None:
    command = "fit --config configs/quickstart/reward.yaml --data.source my_lab.Greetings"
    with contextlib.chdir(lab.folder):
        cli = run([*shlex.split(command), *shlex.split(FEW_STEPS), *NO_GATE, "--data.batch_size", "6"])
    assert cli.trainer.global_step == 2
    assert "train/formality/loss" in cli.trainer.callback_metrics
    assert "train/warmth/loss" not in cli.trainer.callback_metrics  # nobody labelled it
    asked = [row.question for row in classes.Greetings().rows(RowKind.PROMPTS, Split.TEST, PreferenceSet(LEVELS), 0)]
    assert set(asked) == {"Greet Ada!", "Greet Grace!"}


# --- batch views and kinds of requests


def _check_prompts(cli: MoslimCLI, rows: list[Example], levels: list[dict[str, int]]) -> None:
    """Checks that the prompts trained on name these levels, and that the loss is on the answers alone."""
    view, data, model = cli.model.batch_view, cli.datamodule, cli.model
    examples = view.examples(data, list(enumerate(rows)), Split.TRAIN)
    batch = view.collate(data, Split.TRAIN)([examples[Draw(0, i)] for i in range(len(rows))])
    renderer = data.renderer(model.tokenizer)
    for i, (row, wanted) in enumerate(zip(rows, levels, strict=True)):
        preference = Preference(wanted)
        text = model.tokenizer.decode(batch.input_ids[i, batch.labels[i] == -100])
        prompt = renderer.ids(row.question, preference)
        assert batch.input_ids[i, : len(prompt)].tolist() == prompt
        assert (batch.labels[i, : len(prompt)] == -100).all() and batch.labels[i, len(prompt)] != -100
        for name, level in level_words(preference, data.preferences):
            assert f"{name}: {level}" in text or f"{name} : {level}" in text


def test_a_conditional_method(lab: Lab) -> None:
    cli = lab.documented("my_lab.SteerLM")
    assert type(cli.model.batch_view).__name__ == "InstructedTextView" and cli.trainer.global_step == 2
    rows = [row for _, row in cli.datamodule.usable_rows(Split.TRAIN)]
    assert all(set(row.levels) == set(LEVELS) for row in rows)  # the embedded world labels whole answers
    _check_prompts(cli, rows[:3], [dict(row.levels) for row in rows[:3]])
    partial = [replace(rows[0], levels={"warmth": 4}), replace(rows[1], levels={})]
    _check_prompts(cli, partial, [{"warmth": 4}, {}])


def test_a_conditional_method_with_levels_of_a_classifier(lab: Lab) -> None:
    classifier = "outputs/quickstart/reward/classifier"
    options = ["--model.scorer", classifier]
    with contextlib.chdir(lab.folder):
        cli = lab.documented("my_lab.SteerLM", *options)
        view, data = cli.model.batch_view, cli.datamodule
        plain = [replace(row, levels={"warmth": 0}) for row in data.rows(RowKind.LABELLED, Split.TRAIN)[:4]]
        data._rows[RowKind.LABELLED, Split.TRAIN] = plain
        rows = [row for _, row in view.rows(data, Split.TRAIN)]
        expected = Scorer(classifier).score([(row.question, row.answer) for row in plain])
    for row, scores in zip(rows, expected, strict=True):
        found = {name: LEVELS[name].index(level) for name, level in scores.levels.items()}
        assert row.levels == {**found, "warmth": 0}  # a label that a row has stays


def test_a_conditional_model_is_asked_for_levels(lab: Lab) -> None:
    lab.documented("my_lab.SteerLM")
    command = (
        "predict --config configs/quickstart/starter.yaml --model.class_path my_lab.SteerLM --model.architecture null"
    )
    given = ["--model.model", "outputs/steerlm", "--model.predictions", "outputs/steered.jsonl", "--ckpt_path", "none"]
    lab.run(command, *given, "--data.eval_batch_size", "4")
    lines = (lab.folder / "outputs/steered.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert any(json.loads(line)["requested"] for line in lines)


def test_a_kind_of_request(lab: Lab, classes: Any) -> None:
    lab.run("fit --config configs/quickstart/policy.yaml")
    cli = lab.documented("my_lab.Opposites")
    result = json.loads((lab.folder / cli.model.report / "steerability.json").read_text())
    assert list(result["combinations"]) == ["seen", "unseen", "opposites"]
    reachable = classes.Opposites().preferences(cli.datamodule.preferences, cli.datamodule.source, 0)
    assert result["combinations"]["opposites"]["n_answers"] == len(reachable) > 0
    assert "steerability/opposites/mae" in scalars(result)
    assert "| opposites |" in (lab.folder / cli.model.report / "report.md").read_text()


# --- losses and judges


def test_a_loss(lab: Lab, classes: Any) -> None:
    cli = lab.documented("my_lab.Focal", "--trainer.fast_dev_run", "true")
    assert type(cli.model.loss).__name__ == "Focal" and cli.model.loss.gamma == 1.0
    logits, targets = torch.randn(4, 2, 3), one_hot(torch.tensor([[0, 1], [1, -1], [1, 1], [-1, 0]]), 3)
    logits[:, 0, 2] = -torch.inf
    plain, _ = CrossEntropy()(logits, targets, (2, 3))
    unfocused, _ = classes.Focal(gamma=0.0)(logits, targets, (2, 3))
    focused, _ = classes.Focal(gamma=2.0)(logits, targets, (2, 3))
    assert unfocused.item() == pytest.approx(plain.item(), rel=1e-6)
    assert 0 < focused < plain
    one = classes.Focal().cells(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), (2,))
    assert one.item() == pytest.approx(0.25 * 0.6931472)


def test_a_judge(lab: Lab, classes: Any) -> None:
    lab.run("fit --config configs/quickstart/policy.yaml")
    cli = lab.documented("my_lab.Counting")
    judge = classes.Counting()
    judge.setup(cli.model.preferences)
    found = judge.levels(["q"] * 3, ["", "word " * 25, "word " * 99])
    assert found[:, 0].tolist() == [0.0, 2.0, 4.0] and found[:, 1:].isnan().all()
    result = json.loads((lab.folder / cli.model.report / "steerability.json").read_text())
    assert "word count" in json.dumps(result["judge"])
    assert result["dimensions"]["verbosity"]["mae"] is not None
    assert result["dimensions"]["warmth"]["mae"] is None


# --- modules


def test_a_subclass_of_the_policy(lab: Lab) -> None:
    patient = lab.documented("my_lab.StopsWhenGoodEnough", "--trainer.default_root_dir", "outputs/patient")
    assert isinstance(patient.model, PolicyTrainer) and patient.model.enough == 0.8
    assert patient.trainer.global_step == 2
    assert patient.model.default_kl_coef == 1.0  # the quickstart's
    content = lab.documented("my_lab.StopsWhenGoodEnough", "--model.enough", "0.0", "--trainer.max_steps", "9")
    assert content.trainer.global_step == 1


def test_a_subclass_of_the_classifier(lab: Lab) -> None:
    cli = lab.documented("my_lab.FrozenEmbeddings", "--model.output", "outputs/frozen")
    assert isinstance(cli.model, RewardClassifier) and cli.trainer.global_step == 2
    start = torch.load(Path(lab.folder, cli.trainer.checkpoint_callback.last_model_path), weights_only=True)
    assert not any("embed_tokens" in name for name in start["state_dict"])  # frozen weights are not saved
    again = lab.documented("my_lab.FrozenEmbeddings", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert again.trainer.global_step == 3


@pytest.mark.parametrize("name", ["Greetings", "Extremes", "LastLine", "Focal", "Counting"])
def test_a_misspelt_option_of_one_s_own_class_is_named(name: str, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"Focal": "model.loss", "Counting": "model.judge"}
    keys |= {"Greetings": "data.source", "Extremes": "data.sampler", "LastLine": "data.instruction"}
    with pytest.raises(SystemExit):
        lab.documented(f"my_lab.{name}", f"--{keys[name]}.colour", "red")
    assert "colour" in capsys.readouterr().err
