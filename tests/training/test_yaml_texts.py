from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from moslim.data.sources.table import Table
from moslim.data.types import Source
from moslim.preferences import PreferenceSet
from moslim.training.config_files import install, quote_texts


@pytest.fixture
def parser() -> ArgumentParser:
    install()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    parser.add_argument("--preferences", type=PreferenceSet, sub_configs=True)
    parser.add_argument("--flag", type=bool, default=None)
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--config", action="config")
    return parser


def test_texts_of_a_config_are_what_is_written(parser, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "source:\n"
        "  class_path: moslim.data.Table\n"
        "  init_args:\n"
        "    where: {lang: [no, on], version: [1.10, 010, 1_000, 12:30, 2024-01-01], 1: yes}\n"
        "    constants: {lesson: off}\n"
        "    rejected: second\n"
        "    comparison_dimensions: [yes, 2]\n"
        "    scales:\n"
        "      size: &scale\n"
        "        values: {no: 0, true: 1, 1: 1, 1.50: 1, null: 0}  # levels\n"
        "        missing: [n, ~, 0]\n"
        "      heat: *scale\n"
        "preferences: {dimensions: {yes: [no, off], 2: [1, 2.50]}}\n"
        "flag: no\ncount: 1_000\nrate: 1e-4\n"
    )
    found = parser.parse_args(["--config", str(file)])
    made = parser.instantiate_classes(found)
    assert made.source.where == {
        "lang": ["no", "on"],
        "version": ["1.10", "010", "1_000", "12:30", "2024-01-01"],
        "1": ["yes"],
    }
    assert made.source.constants == {"lesson": "off"}
    assert made.source.comparisons.comparison_dimensions == ["yes", "2"]
    for scale in made.source.labels.scales.values():
        assert scale.values == {"no": 0, "true": 1, "1": 1, "1.50": 1, "null": 0}
        assert scale.missing == ["n", "~", "0"]
    assert made.preferences.to_dict() == {"yes": ["no", "off"], "2": ["1", "2.50"]}
    assert (found.flag, found.count, found.rate) == (False, 1000, 1e-4)


TABLE = "--source=moslim.data.Table"


def test_options_are_read_so_too(parser):
    def table(*options: str) -> Table:
        made: Any = parser.instantiate_classes(parser.parse_args([TABLE, *options]))
        return made.source

    assert table("--source.where.lang=no").where == {"lang": ["no"]}
    assert table("--source.where.code=010").where == {"code": ["010"]}
    assert table("--source.where={code: [010, 7]}").where == {"code": ["010", "7"]}
    assert table('--source.where={lang: ["no"]}').where == {"lang": ["no"]}
    assert table("--source.where.lang=[null, yes no]").where == {"lang": ["null", "yes no"]}
    scales = table("--source.scales={heat: {values: {no: 0, 3: 1}, missing: [no idea, 0]}}").labels.scales
    assert scales["heat"].values == {"no": 0, "3": 1}


@pytest.mark.parametrize("value", ["no", "true", "1.50"])
def test_what_yaml_has_lost_is_refused_with_the_remedy(parser, value):
    for option in (f"--source.where.lang=[{value}]", f"--source.where={{lang: [{value}]}}"):
        with pytest.raises((ArgumentError, ValueError), match="put it in quotes"):
            parser.instantiate_classes(parser.parse_args([TABLE, option]))
    with pytest.raises((ArgumentError, ValueError), match="put it in quotes"):
        parser.instantiate_classes(parser.parse_args([f"--preferences.dimensions.size=[{value}, high]"]))


def test_a_key_given_twice_is_refused(parser, tmp_path):
    (tmp_path / "c.yaml").write_text("preferences:\n  dimensions: {size: [a, b], size: [c, d]}\n")
    with pytest.raises(ArgumentError, match="key 'size' is given twice in one mapping"):
        parser.parse_args(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [1, 2.5, true, null]\nc: {d: no}\n",
        "rate: 1.0e-5  # no: comment\ntext: 'where: {a: [no]}'\n",
        "where: null\nmissing: 3\n",
        "x: &y {a: 1}\nz:\n  <<: *y\n  a: 2\n",
        "broken: [",
        "",
    ],
)
def test_all_else_stays_as_it_is(text):
    assert quote_texts(text) == text


def test_quotes_keep_the_text():
    text = 'where: {"é": [no, \'on\', "off", yes yes, !!str 1, &a 010, *a]}\n'
    assert yaml.safe_load(quote_texts(text))["where"]["é"][:4] == ["no", "on", "off", "yes yes"]
