import time

import pytest

from moslim import template_limits
from moslim.models import load_tokenizer
from tests.data.conftest import WITH_SYSTEM, build_tokenizer

ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(24) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
]


@pytest.mark.parametrize("start", ENDLESS)
def test_a_template_without_end_is_refused_by_name(tmp_path, monkeypatch, start):
    monkeypatch.setattr(template_limits, "SECONDS", 3)
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
