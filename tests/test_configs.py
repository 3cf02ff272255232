"""Every YAML under ``configs`` is run by the commands in its own first lines, on models small enough for a test.

The configs are taken as they are: in a folder of its own, ``Qwen/Qwen2.5-0.5B-Instruct`` and ``nvidia/HelpSteer2`` are
local folders of the same architecture, chat template and schema. Only sizes are overridden.
"""

import contextlib
import gzip
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.callbacks.guards import GateError
from moslim.cli import MoslimCLI, run
from moslim.data.types import RowKind, Split
from moslim.reward.scorer import Scorer
from moslim.utils.errors import UsageError
from tests.helpers.forked import in_two
from tests.helpers.tiny_world import FEW_STEPS, SMALL_POLICY, save_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
PREFERENCES = [path for path in CONFIGS if path.startswith("configs/preferences/")]
PRESETS = [path for path in CONFIGS if path.startswith("configs/data/")]  # run in tests/data/test_presets.py
VLLM = "configs/engine/vllm.yaml"  # needs a server: run in tests/generation/test_vllm_config.py
TRAINERS = [path for path in CONFIGS if path.startswith("configs/trainer/")]
SWEEP = "configs/experiment/sweep.yaml"  # of `wandb sweep`, not of main.py
RUNNABLE = [path for path in CONFIGS if path not in (*PREFERENCES, *PRESETS, *TRAINERS, VLLM, SWEEP)]
EXPERIMENTS = [path for path in RUNNABLE if path.startswith("configs/experiment/")]
FIT_ONLY = [path for path in EXPERIMENTS if "/optimizer/" not in path]  # what they change has no part in the test

SMALL = {  # by the config that a command names first
    "configs/quickstart/starter.yaml": """--model.architecture.options.hidden_size 16
        --model.architecture.options.intermediate_size 16 --model.engine.max_new_tokens 6
        --data.source.corpus_rows 64 --data.source.reward_rows 8 --data.eval_batch_size 8""",
    "configs/quickstart/reward.yaml": "--data.source.reward_rows 64 --data.source.bare_rows 16 --data.batch_size 8",
    "configs/quickstart/policy.yaml": f"{SMALL_POLICY} --data.batch_size 8 --data.source.policy_rows 64",
    "configs/reward/helpsteer2.yaml": "--trainer.accumulate_grad_batches 1 --data.batch_size 4",
    "configs/policy/helpsteer2_rloo.yaml": SMALL_POLICY,
}
NEEDS = {
    "configs/policy/helpsteer2_rloo.yaml": "configs/reward/helpsteer2.yaml",
    "configs/reward/refresh.yaml": "configs/reward/helpsteer2.yaml",
    "configs/reward/extend.yaml": "configs/reward/helpsteer2.yaml",
    "configs/quickstart/refresh.yaml": "configs/quickstart/policy.yaml",
}

HELPSTEER = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def commands(path: str) -> list[list[str]]:
    """The commands in the comment that a config opens with, those of them that are run here; see ``opening``."""
    return [command for command in opening(path) if command[0] == "fit" or path not in FIT_ONLY]


def opening(path: str) -> list[list[str]]:
    """The commands in the comment that a config opens with; remarks in brackets behind them are left out."""
    lines = (ROOT / path).read_text().splitlines()
    remark = itertools.takewhile(lambda line: line.startswith("#"), lines)
    found = [line.removeprefix("# python main.py ").split("  (")[0] for line in remark if "python main.py" in line]
    return [shlex.split(command) for command in found]


# --- small stand-ins


def ratings(count: int) -> list[dict]:
    """Rows in HelpSteer2's schema: two answers to each prompt; every third prompt is a chat in its notation."""
    rows = []
    for i in range(count):
        number = 34 if i // 2 == 22 else i // 2  # a question that `validation_share: 0.02` selects
        prompt = f"What is {number} plus {number}?"
        if number % 3 == 2:
            prompt += f"\n<extra_id_1>Assistant\nIt is {2 * number}.\n<extra_id_1>User\nWhy?"
        levels = {name: (i + d) % 5 for d, name in enumerate(HELPSTEER)}
        rows.append({"prompt": prompt, "response": "Because it is so. " * (1 + i % 3), **levels})
    return rows


def save_ratings(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", 48), ("validation", 8)):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in ratings(count))


def save_polite(path: Path) -> None:
    """Answers with labels on a dimension that no classifier here knows yet."""
    rows = [{"question": f"What is {i}?", "answer": "so " * (1 + i % 3), "politeness": i % 3} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_labelled(file: Path) -> None:
    """A policy's answers with people's labels, in the schema that ``configs/reward/refresh.yaml`` reads."""
    rows = [
        {"question": f"Why {i}?", "answer": "So.", "requested": {"verbosity": i % 5}, **dict.fromkeys(HELPSTEER, i % 3)}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_qwen(folder: Path) -> None:
    """A tiny Qwen2 with byte-level pair encoding and two tokens that end an answer, as the Instruct models have."""
    bytes_and_pairs = Tokenizer(models.BPE())
    bytes_and_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_pairs.decoder = decoders.ByteLevel()
    texts = [f"{QWEN_TEMPLATE} {row['prompt']} {row['response']}" for row in ratings(8)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_and_pairs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    trained = json.loads(bytes_and_pairs.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 9,  # padded, as the real one is
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.to(torch.bfloat16).save_pretrained(folder)


def run_small(folder: Path, command: list[str], *options: str) -> MoslimCLI | None:
    """Runs one command; None where a gate stopped it, which it must do for want of quality alone."""
    small = SMALL[command[command.index("--config") + 1]]
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(sys, "argv", ["main.py"])
        try:
            return run([*command, *shlex.split(FEW_STEPS), *shlex.split(small), *options])
        except GateError as failure:
            assert ", required " in str(failure)
            assert "no such metric" not in str(failure) and "no metrics were logged" not in str(failure)
            return None


class RunFolder:
    """A folder in which every config finds what it names. Each config is run once, after those that it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[str, list[MoslimCLI | None]] = {}

    def run(self, command: list[str], *options: str) -> MoslimCLI | None:
        return run_small(self.folder, command, *options)

    def launched(self, path: str) -> list[MoslimCLI | None]:
        """Runs a config's own commands, if that was not done yet."""
        if path not in self._done:
            if path in NEEDS:
                self.launched(NEEDS[path])
            self._done[path] = [self.run(command) for command in commands(path)]
        return self._done[path]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    folder = tmp_path_factory.mktemp("run_folder")
    (folder / "configs").symlink_to(ROOT / "configs")
    save_world(folder)
    save_ratings(folder / "nvidia/HelpSteer2")
    save_labelled(folder / "labelled.jsonl")
    save_polite(folder / "politeness.jsonl")
    save_qwen(folder / "Qwen/Qwen2.5-0.5B-Instruct")
    yield RunFolder(folder)
    import wandb

    wandb.finish()


# --- every config


@pytest.mark.parametrize("path", RUNNABLE)
def test_a_config_opens_with_commands_that_name_it(path: str) -> None:
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# python main.py fit --config ")
    found = opening(path)
    assert all(path in command for command in found)
    assert all(command[command.index("--config") + 1] in SMALL for command in found), f"give {path} sizes in SMALL"


@pytest.mark.parametrize("path", CONFIGS)
def test_classes_are_named_by_full_path(path: str) -> None:
    """Short names depend on what happens to be imported."""

    def named(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["class_path"]] if "class_path" in node else [])
            for value in node.values():
                yield from named(value)
        elif isinstance(node, list):
            for value in node:
                yield from named(value)

    for name in named(yaml.safe_load((ROOT / path).read_text())):
        module, _, cls = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[cls]), cls)


@pytest.mark.parametrize("path", RUNNABLE)
def test_a_config_runs_by_its_own_commands(path: str, run_folder: RunFolder) -> None:
    results = run_folder.launched(path)
    assert len(results) == len(commands(path)) > 0
    for command, cli in zip(commands(path), results, strict=True):
        if cli is not None and command[0] == "fit":
            assert cli.trainer.global_step == 2
        assert cli is not None or "quickstart" in path  # only the quickstart has gates


@pytest.mark.parametrize("path", PREFERENCES)
def test_preferences_train_a_classifier(path: str, run_folder: RunFolder, tmp_path: Path) -> None:
    dimensions = yaml.safe_load((ROOT / path).read_text())["dimensions"]
    rows = [
        {"question": "q", "answer": "a b", **{name: i % len(levels) for name, levels in dimensions.items()}}
        for i in range(10)
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(run_folder.folder):
        cli = run(
            shlex.split(
                f"fit --model moslim.RewardClassifier --model.backbone outputs/quickstart/starter/model "
                f"--data moslim.PreferenceDataModule --data.source moslim.data.Table "
                f"--data.source.path {table} --data.source.test rows.jsonl --data.batch_size 4 --preferences {path} "
                "--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.logger false"
            )
        )
    assert cli.model.preferences.to_dict() == dimensions
    assert cli.model.classifier.preferences.names == tuple(dimensions)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("path", ["configs/trainer/ddp.yaml", "configs/trainer/fsdp.yaml"])
def test_two_processes_train_by_a_strategy_s_own_command_and_one_exports(path: str, run_folder: RunFolder) -> None:
    (command,) = commands(path)
    place = ["--trainer.default_root_dir", f"outputs/{Path(path).stem}"]
    in_two(run_small, run_folder.folder, command, *place)
    export = ["export", *command[1 : command.index(path) - 1], "--ckpt_path", "last", "--out", f"{Path(path).stem}-lm"]
    run_folder.run(export, *place)
    exported = AutoModelForCausalLM.from_pretrained(run_folder.folder / f"{Path(path).stem}-lm").state_dict()
    newest = max(
        run_folder.folder.glob(f"{place[1]}/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime_ns
    )
    kept = torch.load(newest, weights_only=True)
    assert kept["global_step"] == 2 and len(kept["policy_run"]["rollouts"]) == 2
    assert all(torch.equal(exported[name.removeprefix("policy.")], value) for name, value in kept["state_dict"].items())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_model_with_one_tensor_for_words_in_and_out_is_sharded(run_folder: RunFolder) -> None:
    run_folder.launched(NEEDS["configs/policy/helpsteer2_rloo.yaml"])
    command = ["fit", "--config", "configs/policy/helpsteer2_rloo.yaml", "--config", "configs/trainer/fsdp.yaml"]
    options = ["--trainer.default_root_dir", "outputs/tied", "--model.lora", "null", "--model.dtype", "float32"]
    in_two(run_small, run_folder.folder, command, *options, "--trainer.accumulate_grad_batches", "1")
    export = ["export", *command[1:3], "--ckpt_path", "last", "--out", "tied-lm"]
    run_folder.run(export, *options)
    start, end = (
        AutoModelForCausalLM.from_pretrained(run_folder.folder / name, dtype=torch.float32)
        .get_input_embeddings()
        .weight
        for name in ("Qwen/Qwen2.5-0.5B-Instruct", "tied-lm")
    )
    assert not torch.equal(start, end)


def test_deepspeed_s_command_is_understood_and_needs_what_lightning_asks_for(run_folder: RunFolder) -> None:
    """It runs on CUDA devices only, so that no more than this can be tested here."""
    (command,) = commands("configs/trainer/deepspeed.yaml")
    with pytest.raises(UsageError, match=r"^trainer: .*(only supported on CUDA|must have DeepSpeed)"):
        run_folder.run(command)


def test_loggers_are_layered_over_any_config(run_folder: RunFolder) -> None:
    (plain,) = run_folder.launched("configs/logger/csv.yaml")
    (both,) = run_folder.launched("configs/logger/wandb.yaml")
    assert [type(logger) for logger in plain.trainer.loggers] == [CSVLogger]
    assert [type(logger) for logger in both.trainer.loggers] == [CSVLogger, WandbLogger]
    assert list((run_folder.folder / "outputs/wandb").glob("offline-run-*"))


def test_the_quickstart_s_gates_ask_for_metrics_that_are_there(run_folder: RunFolder) -> None:
    """Untrained models do not pass; that the gate closes for want of quality alone is checked where it closes."""
    assert run_folder.launched("configs/quickstart/starter.yaml")[0] is None
    assert run_folder.launched("configs/quickstart/reward.yaml")[0] is None


@pytest.mark.parametrize("path", ["configs/quickstart/policy.yaml", "configs/policy/helpsteer2_rloo.yaml"])
def test_a_policy_s_training_that_is_stopped_can_go_on(path: str) -> None:
    config = yaml.safe_load((ROOT / path).read_text())
    every = config.get("checkpoint", {}).get("every_n_train_steps") or config["trainer"]["val_check_interval"]
    assert 5 * every <= config["trainer"]["max_steps"]


def leaves(node: object, key: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {key: node}
    inner = [leaves(value, key if name == "init_args" else f"{key}.{name}") for name, value in node.items()]
    return {name.lstrip("."): value for part in inner for name, value in part.items()}


def changes(path: str, run_folder: RunFolder) -> dict[str, object]:
    """Options that a layer over the quickstart's policy changes, with their new values."""
    files = ("configs/quickstart/policy.yaml", path)
    default, found = (leaves(run_folder.launched(one)[0].config_dump) for one in files)
    return {key: found.get(key) for key in found.keys() | default.keys() if found.get(key) != default.get(key)}


def test_the_control_differs_from_the_policy_in_its_targets_and_folders_only(run_folder: RunFolder) -> None:
    folder = "outputs/quickstart/scrambled"
    folders = {"trainer.default_root_dir": folder, "model.report": f"{folder}/report"}
    assert changes("configs/quickstart/scrambled.yaml", run_folder) == {"data.scramble": True, **folders}


@pytest.mark.parametrize(
    ("path", "kind"),
    [("reinforce_plus_plus", ReinforcePlusPlus), ("grpo", GRPO), ("ppo", PPO), ("online_dpo", OnlineDPO)],
)
def test_the_quickstart_with_another_optimizer_keeps_its_rewards(path: str, kind: type, run_folder: RunFolder) -> None:
    found = run_folder.launched(f"configs/experiment/optimizer/{path}.yaml")[0].model.policy_optimizer
    assert type(found) is kind
    assert (found.aggregation, found.std_floor) == ("normalize_then_sum", 0.3)
    if kind is not OnlineDPO:
        assert found.kl_coef == 0.02
        assert (found.kl_in, found.kl) == (("loss", "k3") if kind is GRPO else ("reward", "k1"))


FACTORS = {
    "aggregation": ["model.policy_optimizer.aggregation"],
    "joint": [
        *("data.sampler", "model.hindsight", "model.rehearsal", "model.policy_optimizer", "model.minibatches"),
        *("model.optimizer.lr", "model.lr_scheduler.final", "trainer.max_steps"),
    ],
    "kl": ["model.policy_optimizer.kl"],
    "mapping": ["model.mapping", "model.policy_optimizer.aggregation"],
    "minibatches": ["model.minibatches", "model.optimizer.lr", "trainer.max_steps"],
    "optimizer": ["model.policy_optimizer", "model.num_iterations", "model.minibatches"],
    "sampler": ["data.sampler", "trainer.limit_train_batches"],
    "samples": [],  # the small sizes go over them; tests/test_benchmarks.py counts answers
    "scope": ["model.mapping"],
}
"""What may differ from the quickstart, by the experiment's folder; beginnings of keys."""


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_an_experiment_changes_one_factor(path: str, run_folder: RunFolder) -> None:
    fit, test = opening(path)
    assert test == ["test", *fit[1:], "--ckpt_path", "last"]
    changed = changes(path, run_folder)
    folder = path.removeprefix("configs/").removesuffix(".yaml")
    assert changed.pop("trainer.default_root_dir") == f"outputs/{folder}"
    assert changed.pop("model.report") == f"outputs/{folder}/report"
    own = tuple(FACTORS[folder.split("/")[1]])
    assert [key for key in changed if not key.startswith(own)] == []
    assert any(key.startswith(own) for key in changed) or not own


def test_the_sweep_s_commands_are_those_of_all_experiments(
    run_folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    sweep = load_sweep_config(str(ROOT / SWEEP))
    assert (sweep["method"], sweep["program"], sweep["metric"]["name"]) == ("grid", "main.py", "train/gold")
    values = {name: parameter["values"] for name, parameter in sweep["parameters"].items()}
    assert sorted(values["config"]) == sorted([*EXPERIMENTS, "configs/quickstart/policy.yaml"])
    chosen = {"config": "configs/experiment/kl/strong.yaml", "seed_everything": values["seed_everything"][-1]}
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    env, interpreter, program, *command = create_sweep_command(sweep["command"])
    assert (env, interpreter, program, command.pop()) == ("${env}", "${interpreter}", "${program}", "${args}")
    with contextlib.chdir(run_folder.folder), pytest.raises(SystemExit) as done:
        run([*command, *arguments["args"], "--print_config"])
    assert not done.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["seed_everything"] == 2
    assert config["model"]["init_args"]["policy_optimizer"]["init_args"]["kl_coef"] == 0.1
    assert config["trainer"]["default_root_dir"] == "outputs/experiment/kl/strong"
    assert config["trainer"]["logger"]["init_args"]["offline"] is False


def test_the_kl_s_options_on_the_command_line(run_folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config", "configs/quickstart/policy.yaml"]
    key = "--model.policy_optimizer"
    adaptive = [
        f"{key}.kl_controller",
        "moslim.algorithms.AdaptiveKL",
        f"{key}.kl_controller.target",
        "1e-3",
    ]
    cli = run_folder.run(command, *adaptive, "--trainer.default_root_dir", "outputs/adaptive")
    assert cli.model.policy_optimizer.kl_controller.target == 1e-3
    assert cli.trainer.callback_metrics["train/kl_coef"] != 0.02
    with pytest.raises((SystemExit, ValueError)) as refused:
        run_folder.run(command, f"{key}.kl_in", "loss")
    assert "k1 in the loss has an expected gradient of zero" in capsys.readouterr().err + str(refused.value)


def test_tests_write_their_report_where_the_config_says(run_folder: RunFolder) -> None:
    for path in RUNNABLE:
        for command, cli in zip(commands(path), run_folder.launched(path), strict=True):
            if command[0] == "test" and is_overridden("test_step", cli.model) and getattr(cli.model, "report", None):
                assert (run_folder.folder / cli.model.report / "steerability.json").exists(), path


@pytest.mark.parametrize("path", ["configs/quickstart/refresh.yaml", "configs/reward/refresh.yaml"])
def test_a_refreshed_classifier_is_tested_on_what_was_requested(path: str, run_folder: RunFolder) -> None:
    fitted, tested = run_folder.launched(path)
    found = {name for name in tested.trainer.callback_metrics if name.startswith("test/requests/")}
    assert {"test/requests/mean/proxy", "test/requests/mean/gold", "test/requests/mean/gap"} <= found
    assert fitted is None or fitted.model.start == "outputs/helpsteer2/reward/classifier"


# --- a real model's and data set's code path


@pytest.mark.filterwarnings("ignore:fewer than 30 validation rows")
def test_a_head_is_added_to_a_classifier(run_folder: RunFolder) -> None:
    (added,) = run_folder.launched("configs/reward/extend.yaml")
    before = Scorer(run_folder.folder / "outputs/helpsteer2/reward/classifier")
    after = Scorer(run_folder.folder / added.model.run_folder / "classifier")
    assert after.preferences.names == (*before.preferences.names, "politeness")
    old, new = (scorer.probabilities(["What is 1?"], ["so so"]) for scorer in (before, after))
    assert torch.equal(new[:, : old.shape[1]], old)
    weights = after.classifier.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.classifier.state_dict().items())


def test_helpsteer2_trains_five_heads_on_ratings(run_folder: RunFolder) -> None:
    fitted, tested = run_folder.launched("configs/reward/helpsteer2.yaml")
    table, preferences = fitted.datamodule.source, fitted.datamodule.preferences
    with contextlib.chdir(run_folder.folder):
        splits = {split: table.rows(RowKind.LABELLED, split, preferences, 0) for split in Split}
    expected = ratings(48)
    assert len(splits[Split.TRAIN]) + len(splits[Split.VALIDATION]) == 48 and len(splits[Split.TEST]) == 8
    texts = {row.question for row in splits[Split.TRAIN] if isinstance(row.question, str)}
    chats = [row.question for row in splits[Split.TRAIN] if not isinstance(row.question, str)]
    assert texts <= {row["prompt"] for row in expected} and len(chats) > 8
    assert {tuple(turn["role"] for turn in chat) for chat in chats} == {("user", "assistant", "user")}
    assert splits[Split.TEST][0].levels == {name: expected[0][name] for name in HELPSTEER}
    assert {f"test/{name}/kappa" for name in HELPSTEER} <= tested.trainer.callback_metrics.keys()

    folder = run_folder.folder / "outputs/helpsteer2/reward/classifier"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.backbone.model_type == "qwen2" and classifier.config.pair_length == 1024
    assert classifier.preferences.names == tuple(HELPSTEER) and set(classifier.preferences.sizes) == {5}
    before = AutoModelForCausalLM.from_pretrained(run_folder.folder / "Qwen/Qwen2.5-0.5B-Instruct", dtype=torch.float32)
    start, end = before.model.embed_tokens.weight, classifier.backbone.embed_tokens.weight
    assert end.dtype == torch.float32 and not torch.equal(start, end)
    probs = Scorer(folder).probabilities(["What is 1 plus 1?"], ["Two."])
    assert probs.shape == (1, 5, 5) and torch.allclose(probs.sum(-1), torch.ones(1, 5))


def test_helpsteer2_trains_a_policy_on_instructions_in_the_system_message(run_folder: RunFolder) -> None:
    fitted = run_folder.launched("configs/policy/helpsteer2_rloo.yaml")[0]
    model, rollout = fitted.model, fitted.model.rollout
    assert [logger for logger in fitted.trainer.loggers if isinstance(logger, CSVLogger)]
    prompts = [
        model.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)
    ]
    for prompt, nothing_asked in zip(prompts, rollout.uninstructed, strict=True):
        system = "You are Qwen. You are a helpful assistant." if nothing_asked else "[[Preferences]] "
        assert prompt.startswith(f"<|im_start|>system\n{system}")
        assert "<|im_start|>assistant\n" in prompt
    asked = [fitted.datamodule.preferences.decode(target) for target in rollout.targets]
    assert all(fitted.datamodule.source.reachable(preference) for preference in asked if preference)
    assert not any("[[" in str(question) for question in rollout.questions)
    assert model.generator.eos_ids == sorted(
        [model.tokenizer.eos_token_id, model.tokenizer.pad_token_id]
    )  # both that the model's generation config names

    trained = {name for name, p in model.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == set(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    frozen = next(p for name, p in model.policy.named_parameters() if name not in trained)
    assert frozen.dtype == torch.bfloat16


def test_helpsteer2_s_policy_is_tested_by_proxy_generates_and_is_exported(run_folder: RunFolder) -> None:
    run_folder.launched("configs/policy/helpsteer2_rloo.yaml")
    result = json.loads((run_folder.folder / "outputs/helpsteer2/report/steerability.json").read_text())
    assert list(result["dimensions"]) == HELPSTEER and result["n_questions"] == 1
    assert "proxy" in json.dumps(result["judge"])
    report = (run_folder.folder / "outputs/helpsteer2/report/report.md").read_text()
    assert "proxy" in report

    folder = run_folder.folder / "outputs/helpsteer2/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "[[Preferences]] verbosity: terse"}, {"role": "user", "content": "Why?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_helpsteer2_s_variants_in_the_comments_work(run_folder: RunFolder) -> None:
    lora = ["--model.lora.rank", "4", "--model.optimizer.lr", "1.0e-4", "--trainer.precision", "32-true"]
    reward = run_folder.run(
        ["fit", "--config", "configs/reward/helpsteer2.yaml"], *lora, "--model.output", "outputs/other"
    )
    assert reward.model.lora.rank == 4 and reward.trainer.optimizers[0].defaults["lr"] == 1e-4
    policy = run_folder.run(
        ["test", "--config", "configs/policy/helpsteer2_rloo.yaml", "--ckpt_path", "none"],
        *["--model.dtype", "float32", "--model.judge", "moslim.evaluation.ClassifierJudge"],
        *["--model.judge.path", "outputs/other", "--model.report", "outputs/judged"],
    )
    assert policy.model.dtype == torch.float32
    judged = json.loads((run_folder.folder / "outputs/judged/steerability.json").read_text())
    assert "classifier" in json.dumps(judged["judge"])
