import time

import pytest

from moslim.data import chat_templates as template_limits
from moslim.data.chat_templates import check_template, time_limit
from moslim.data.prompts import PairEncoder
from moslim.ops.models import load_tokenizer
from tests.helpers.chats import WITH_SYSTEM, build_tokenizer

pytestmark = pytest.mark.slow

ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 11) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ 'ab'|center(9999999999) }}",
    "{{ messages|batch(9999999999, 'x')|list|length }}",
    "{% if tools is none %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
    "{% generation %}{% for i in 'a'.ljust(10 ** 9) %}{{ i }}{% endfor %}{% endgeneration +%}",
    "{% if messages[-1].content|length > 99 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(24) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
]


@pytest.mark.parametrize("start", ENDLESS)
def test_a_template_without_end_is_refused_by_name(tmp_path, monkeypatch, start):
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    build_tokenizer(start + WITH_SYSTEM).save_pretrained(tmp_path)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=f"chat template of the tokenizer '{tmp_path}' does not end"):
        load_tokenizer(str(tmp_path))
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    "start", ["", "{% set x = 3 * 4 %}", "{% for i in range(50) %}{{ x }}{% endfor %}", "{{ 1 / 0 }}{% set x = 1 %}"]
)
def test_other_templates_load(tmp_path, start):
    build_tokenizer(start + WITH_SYSTEM).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == start + WITH_SYSTEM


def test_a_template_that_loops_for_some_chats_only_stops_the_run(monkeypatch):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = build_tokenizer("{% if 'warm' in messages[-1].content %}" + loops + "{% endif %}" + WITH_SYSTEM)
    check_template(tokenizer, "tokenizer")
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    begin = time.perf_counter()
    encoder = PairEncoder(tokenizer)
    assert encoder.check("how to brew tea", "boil") is False
    for _ in range(100):  # it is not tried again
        with pytest.raises(ValueError, match="chat template does not end: for a chat it takes more than 1 sec"):
            encoder.check("warm", "boil")
    assert time.perf_counter() - begin < 20


def test_a_time_limit_ends_with_its_block():
    with pytest.raises(TimeoutError), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with time_limit(60), time_limit(0.01):  # the outer one stays
        time.sleep(0.05)
