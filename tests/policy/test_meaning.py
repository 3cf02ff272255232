"""A policy's checkpoint is never used as something that it was not trained as, and goes on with its own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moslim.data.sources.workbench import Workbench
from moslim.generation.torch_engine import TorchEngine
from moslim.instructions import PreferenceInstruction, SystemMessage, Tags, Template
from moslim.ops.lora import LoraOptions
from moslim.preferences import Preference, PreferenceSet
from moslim.reward.scorer import Scorer
from moslim.utils.errors import UsageError
from tests.helpers.policy_models import save_classifier
from tests.helpers.policy_runs import BATCH, LIMIT, LORA, Traced, data, make, trainer

WORDS = Template("{preferences} {question}")
CHAT = """{%- set day = strftime_now('%d.%m.%Y') %}{{ day }} {% for m in messages %}{{ m.content }} {% endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}calmly {% endif %}"""


class Marks(PreferenceInstruction):
    """One of the user's own, which keeps nothing under the name of its argument."""

    def __init__(self, mark: str) -> None:
        self.render = (
            lambda messages, preference, preferences: [  # type: ignore[method-assign]
                *messages[:-1],
                {"role": "user", "content": messages[-1]["content"] + mark * sum(preference.levels.values())},
            ]
        )

    def render(self, messages: Any, preference: Any, preferences: Any) -> Any:
        raise NotImplementedError


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"max_new_tokens": LIMIT, **options})


@pytest.fixture(scope="module")
def trained(preferences: PreferenceSet, lm: str, classifier: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint within a rollout of a run with ``SystemMessage``."""
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, max_steps=1)
    run.fit(
        make(preferences, lm, classifier, lora=LORA, num_iterations=2), data(preferences, instruction=SystemMessage())
    )
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def again(preferences: PreferenceSet, lm: str, classifier: str, **options: Any) -> Traced:
    return make(preferences, lm, classifier, **{"lora": LORA, "num_iterations": 2, **options})


@pytest.mark.parametrize("command", ["test", "validate", "fit", "export", "generate", "replay"])
def test_no_command_takes_it_with_another_instruction(
    command: str, preferences: PreferenceSet, lm: str, classifier: str, trained: Path, tmp_path: Path
) -> None:
    options = {"export": {"out": str(tmp_path / "out")}, "generate": {"question": "How do I clean a kettle?"}}
    with pytest.raises(UsageError) as raised:
        getattr(trainer(tmp_path), command)(
            again(preferences, lm, classifier),
            datamodule=data(preferences, instruction=Tags()),
            ckpt_path=str(trained),
            **options.get(command, {}),
        )
    assert 'data.instruction: class saved "SystemMessage", now "Tags"' in str(raised.value)
    assert "[[Preferences]] warmth: icy" in str(raised.value) and "[[warmth: icy]]" in str(raised.value)
    assert not (tmp_path / "out").exists()


TURNED = {"verbosity": 0, "warmth": 0}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "max_new_tokens": ({"engine": engine(max_new_tokens=9)}, {}, r"engine\.max_new_tokens: saved 8, now 9"),
    "temperature": ({"engine": engine(temperature=0.5)}, {}, r"engine\.temperature: saved 1\.0, now 0\.5"),
    "top_k": ({"engine": engine(top_k=5)}, {}, r"engine\.top_k: saved null, now 5"),
    "top_p": ({"engine": engine(top_p=0.5)}, {}, r"engine\.top_p: saved 1\.0, now 0\.5"),
    "stop_strings": ({"engine": engine(stop_strings=["x"])}, {}, r"engine\.stop_strings: saved \[\], now \[\"x\"\]"),
    "stop_ids": ({"engine": engine(stop_ids=[7])}, {}, r"engine\.stop_ids: "),
    "max_length": ({}, {"max_length": 30}, r"data\.max_length: saved null, now 30"),
    "alpha": ({"lora": LoraOptions(4, 9.0, 0.0, LORA.target_modules)}, {}, r"model\.lora: .*alpha saved 8\.0, now 9"),
    "samples": ({"num_generations": 2}, {}, r"model\.num_generations: saved 3, now 2"),
    "minibatches": ({"minibatches": 2}, {}, r"model\.minibatches: saved 1, now 2"),
    "num_iterations": ({"num_iterations": 1}, {}, r"model\.num_iterations: saved 2, now 1"),
    "batch_size": ({}, {"batch_size": 2}, r"data\.batch_size: of all processes saved 4, now 2"),
    "rows": ({}, {"source": Workbench(policy_rows=5 * BATCH)}, r"data\.source: saved \"24 rows, .* now \"20 rows"),
    "seed": ({"seed": 3}, {}, r"model\.seed: saved 0, now 3"),
}
OF_RUNS = ("samples", "minibatches", "num_iterations", "batch_size", "rows", "seed")


@pytest.mark.parametrize("kind", CHANGES)
def test_what_it_was_trained_under_is_compared(
    kind: str, preferences: PreferenceSet, lm: str, classifier: str, trained: Path, tmp_path: Path
) -> None:
    options, served, message = CHANGES[kind]
    served = {"instruction": SystemMessage(), **served}
    command = "fit" if kind in OF_RUNS else "generate"
    more = {"question": "How do I clean a kettle?"} if command == "generate" else {}
    with pytest.raises(UsageError, match=message):
        getattr(trainer(tmp_path, max_steps=2), command)(
            again(preferences, lm, classifier, **options),
            datamodule=data(preferences, **served),
            ckpt_path=trained,
            **more,
        )


def test_levels_and_dimensions_in_another_order(
    preferences: PreferenceSet, lm: str, classifier: str, trained: Path, tmp_path: Path
) -> None:
    turned = PreferenceSet(dict(reversed(preferences.to_dict().items())))
    with pytest.raises(UsageError, match=r"preferences: saved \[\[\"warmth\".*, now \[\[\"verbosity\""):
        trainer(tmp_path).test(again(turned, lm, classifier), data(turned, instruction=SystemMessage()), str(trained))
    down = PreferenceSet({name: levels[::-1] for name, levels in preferences.to_dict().items()})
    with pytest.raises(UsageError, match=r"'warmth' has the levels \['glowing'.* but \['icy'"):
        again(down, lm, classifier)


def test_an_instruction_of_the_user_s_own_is_known_by_its_prompts(
    preferences: PreferenceSet, lm: str, classifier: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(again(preferences, lm, classifier), data(preferences, instruction=Marks("!")))
    run.save_checkpoint(tmp_path / "a.ckpt")
    for mark, accepted, refused in (("?", [], True), ("?", ["prompts"], False), ("!", [], False)):
        module = again(preferences, lm, classifier, accept_changes=accepted)
        served = data(preferences, instruction=Marks(mark))
        options: dict[str, Any] = {"question": "Why?", "levels": {"warmth": 2}, "ckpt_path": str(tmp_path / "a.ckpt")}
        if refused:
            with pytest.raises(UsageError, match=r"prompts: \{'warmth': 1\} saved .*tea\?!.*, now .*tea\?\?"):
                trainer(tmp_path).generate(module, served, **options)
        else:
            assert len(trainer(tmp_path).generate(module, served, **options)) == 1


@pytest.mark.parametrize("kind", ["samples", "num_iterations", "rows", "temperature"])
def test_on_purpose_it_goes_on_with_a_new_rollout(
    kind: str, preferences: PreferenceSet, lm: str, classifier: str, trained: Path, tmp_path: Path
) -> None:
    options, served, message = CHANGES[kind]
    name = message.partition(":")[0].replace("\\", "")
    accepted = [name if name.startswith(("model", "data")) else f"model.{name}"]
    module = again(preferences, lm, classifier, **options, accept_changes=accepted)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(preferences, **{"instruction": SystemMessage(), **served}), ckpt_path=trained)
    assert module.trace[0]["new"] and run.global_step == 2
    assert len(module.rollout.rewards) == BATCH * module.num_generations
    plain = again(preferences, lm, classifier)
    trainer(tmp_path, max_steps=2).fit(plain, data(preferences, instruction=SystemMessage()), ckpt_path=trained)
    assert not plain.trace[0]["new"]


# --- the chat template


@pytest.fixture
def dated(lm: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> tuple[str, str]:
    """A start and a classifier whose template writes today's date."""
    from transformers import AutoModelForCausalLM

    own = AutoTokenizer.from_pretrained(lm)
    own.chat_template = CHAT
    AutoModelForCausalLM.from_pretrained(lm).save_pretrained(tmp_path / "lm")
    own.save_pretrained(tmp_path / "lm")
    (tmp_path / "scorer").mkdir()
    return str(tmp_path / "lm"), save_classifier(tmp_path / "scorer", own, seed=7)


@pytest.mark.slow
def test_prompts_and_the_exported_folder_keep_the_date_of_the_run(
    dated: tuple[str, str], preferences: PreferenceSet, tmp_path: Path
) -> None:
    lm, classifier = dated
    module = again(preferences, lm, classifier)
    first = data(preferences, template_args={"enable_thinking": False}, template_date="2024-02-09")
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, first)
    run.save_checkpoint(tmp_path / "a.ckpt")
    prompts = module.tokenizer.batch_decode(module.rollout.input_ids[:, : -module.rollout.mask.shape[1]])
    assert module.scorer.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)[:10] == (
        "09.02.2024"
    )

    later = again(preferences, lm, classifier)  # started on another day
    served = data(preferences, template_args={"enable_thinking": False})
    second = trainer(tmp_path, max_steps=2)
    second.fit(later, served, ckpt_path=tmp_path / "a.ckpt")
    assert not later.trace[0]["new"]
    assert later.tokenizer.chat_template == module.tokenizer.chat_template
    assert later.scorer.tokenizer.chat_template == module.scorer.tokenizer.chat_template

    exported = again(preferences, lm, classifier)
    trainer(tmp_path).export(exported, served, str(tmp_path / "out"), ckpt_path=str(tmp_path / "a.ckpt"))
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    renderer = first.renderer(module.tokenizer)
    messages = renderer.messages("How do I clean a kettle?", Preference({"warmth": 1}))
    text = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("09.02.2024 ") and text.endswith("calmly ")
    assert plain(text, add_special_tokens=False)["input_ids"] == renderer.ids(
        "How do I clean a kettle?", Preference({"warmth": 1})
    )
    assert plain.apply_chat_template(messages, tokenize=False, enable_thinking=True).rstrip().endswith("kettle?")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2024-02-09" in card and "enable_thinking" in card
    assert prompts

    for options in ({}, {"template_args": {"enable_thinking": True}}):
        with pytest.raises(UsageError, match=r"data\.template_args: enable_thinking saved false, now "):
            trainer(tmp_path).generate(
                again(preferences, lm, classifier),
                data(preferences, **options),
                "Why?",
                ckpt_path=str(tmp_path / "a.ckpt"),
            )


def test_a_folder_with_a_date_keeps_it_in_the_next_run(dated: tuple[str, str], preferences: PreferenceSet) -> None:
    lm, _ = dated
    tokenizer = AutoTokenizer.from_pretrained(lm)
    data(preferences, template_date="2024-02-09").pin(tokenizer)
    pinned = tokenizer.chat_template
    data(preferences).pin(tokenizer)
    assert tokenizer.chat_template == pinned
    data(preferences, template_args={"enable_thinking": True}).pin(tokenizer)
    assert "2024" in tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)


def test_the_scorer_of_a_dated_classifier_reads_the_saved_date(
    dated: tuple[str, str], preferences: PreferenceSet
) -> None:
    scorer = Scorer(dated[1])
    data(preferences, template_date="2024-02-09").pin(scorer.tokenizer)
    assert torch.is_tensor(scorer.probabilities(["How?"], ["So."]))
