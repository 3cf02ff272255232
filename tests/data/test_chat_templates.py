"""Chat templates with arguments and a date of their own; every comparison renders with plain transformers."""

from datetime import date, datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moslim.data.chat_templates import Pins, asks_for_date, pin_tokenizer, pinned, pins
from moslim.utils.errors import UsageError

CHAT = [{"role": "user", "content": "hi"}]
FORMATS = [
    "%d %b %Y",
    "%Y-%m-%d",
    "%A, %-d. %B",
    "100%% of %j",
    "%%d%%%d%",
    "%I%p %H:%M:%S.%f",
    "no date",
    "",
    "%e|%_d|%^a",
]
WAYS = {
    "literal": "{{ strftime_now('%d %b %Y') }}",
    "set": "{%- set today = strftime_now('%Y-%m-%d') %}{{ today }}",
    "macro": "{%- macro head(form) %}On {{ strftime_now(form) }}{% endmacro %}{{ head('%A %d') }}",
    "computed": "{{ strftime_now(['%d', '%B'] | join(' of ')) }}",
    "another name": "{%- set now = strftime_now %}{{ now('%Y') | int + 1 }}",
    "in a loop": "{% for message in messages %}{{ strftime_now(format='%d.%m.') }}{{ message.content }}{% endfor %}",
    "guarded": "{%- if strftime_now is defined %}{%- set day = strftime_now('%b') %}{%- else %}{%- set day = '?' %}"
    "{%- endif %}{{ day }}",
    "generation": "{% for m in messages %}{% generation %}{{ strftime_now('%y') }}{% endgeneration %}{% break %}"
    "{% endfor %}",
}
DAY = "2024-02-09"


def tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = template
    return fast


def render(template: str, **variables: object) -> str:
    return tokenizer(template).apply_chat_template(CHAT, tokenize=False, **variables)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}y{% endif %}\n"])
def test_today_s_prompt_stays_as_it_is_today(way: str, start: str) -> None:
    """Against transformers' own clock; only these templates leave the time of day out."""
    template = start + WAYS[way]
    before = datetime.now().date().isoformat()
    expected = render(template)
    today = datetime.now().date().isoformat()
    if today == before:
        assert render(pinned(template, {}, today)) == expected


@pytest.mark.parametrize("text", FORMATS)
def test_every_format_is_python_s(text: str) -> None:
    template = pinned("{{ strftime_now(text) }}", {}, DAY)
    assert render(template, text=text) == datetime(2024, 2, 9).strftime(text)


def test_other_days_are_other_prompts_and_a_saved_tokenizer_keeps_its_own(tmp_path: Path) -> None:
    fast = tokenizer(WAYS["macro"])
    pin_tokenizer(fast, {}, None, today=DAY)
    assert fast.apply_chat_template(CHAT, tokenize=False) == "On Friday 09"
    fast.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    pin_tokenizer(again, {}, None, today="2031-01-01")  # it has a date already
    assert again.chat_template == fast.chat_template and not asks_for_date(again.chat_template)
    pin_tokenizer(again, {}, "2031-01-01")
    assert again.apply_chat_template(CHAT, tokenize=False) == "On Wednesday 01"
    assert pins(again.chat_template) == (Pins({}, "2031-01-01"), WAYS["macro"])


THINKING = "{{ messages[0].content }}{% if enable_thinking is defined and enable_thinking is false %} <none>{% endif %}"


def test_arguments_become_defaults_that_a_call_overrides() -> None:
    fast = tokenizer(THINKING)
    pin_tokenizer(fast, {"enable_thinking": False}, None)
    assert fast.apply_chat_template(CHAT, tokenize=False) == "hi <none>"
    assert fast.apply_chat_template(CHAT, tokenize=False, enable_thinking=True) == "hi"
    pin_tokenizer(fast, {"enable_thinking": True}, None)
    assert fast.apply_chat_template(CHAT, tokenize=False) == "hi" and pins(fast.chat_template)[1] == THINKING


@pytest.mark.parametrize(
    "value", [True, None, 3, -1.5, 'a "quote", {% if %} #} \n é 😀 \\', ["a", 1, [None]], {"a": {"b": False}}], ids=repr
)
def test_values_come_back_as_they_were(value: object) -> None:
    template = "{{ given | tojson }}"
    now = pinned(template, {"given": value}, None)
    assert render(now) == render(template, given=value)
    assert pins(now) == (Pins({"given": value}), template)
    assert pinned(now, {}, None) == now


def test_a_date_in_a_value_works_with_the_clock() -> None:
    assert render(pinned("{{ strftime_now(form) }}", {"form": "%d/%m"}, DAY)) == "09/02"


@pytest.mark.parametrize(
    ("template", "arguments", "day", "message"),
    [
        (THINKING, {"enable_thinkin": False}, None, "gives enable_thinkin, .* does not read; .* are: enable_thinking$"),
        (THINKING, {"messages": 1}, None, "gives messages, .* are: enable_thinking$"),
        ("{{ eos_token }}{{ range(a) }}", {"eos_token": "x"}, None, "gives eos_token, .* are: a$"),
        ("{{ range(a) }}", {"range": "x"}, None, "gives range, .* are: a$"),
        ("{% set a = 1 %}{{ a }}", {"a": 2}, None, "gives a, .* are: none$"),
        ("{{ date_string }}", {}, DAY, "data.template_date is 2024-02-09, .* not ask for the date .* set: date_string"),
        ("{{ a }}", {"a": float("nan")}, None, r"data\.template_args\.a is nan: give plain data"),
        ("{{ a }}", {"a": date(2024, 1, 1)}, None, r"data\.template_args\.a is datetime.*give plain data"),
        ("{% if %}", {"a": 1}, None, "no valid Jinja template"),
        (None, {"a": 1}, None, "has no chat template"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    template: str | None, arguments: dict[str, object], day: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pin_tokenizer(tokenizer(template), arguments, day)


def test_of_several_templates_the_one_that_writes_prompts_is_pinned() -> None:
    fast = tokenizer({"default": WAYS["literal"], "rag": "{{ documents }}"})
    pin_tokenizer(fast, {}, None, today=DAY)
    assert fast.apply_chat_template(CHAT, tokenize=False) == "09 Feb 2024"
    assert fast.chat_template["rag"] == "{{ documents }}"


def test_a_template_that_asks_for_nothing_is_left_alone() -> None:
    fast = tokenizer(THINKING)
    pin_tokenizer(fast, {}, None, today=DAY)
    assert fast.chat_template == THINKING
