import pytest

from moslim.data.types import Source, Split
from moslim.training.command_errors import shortened
from moslim.training.config_files import MoslimParser, install

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'moslim.RewardClassifier':
        Parser key "lora":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'moslim.ops.LoraOptions'>, <class 'NoneType'>]
          Errors:
            - Problem with given class_path 'moslim.ops.LoraOptions':
                Parser key "rank":
                  Expected a <class 'int'>. Got value: abc
            - Expected a <class 'NoneType'>
          Given value type: <class 'jsonargparse._util.NestedArg'>
          Given value: NestedArg(key='rank', val='abc')
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='lora.rank', val='abc')
"""
NO_CLASS = """Parser key "trainer.logger":

  - Expected a path but {class_path: Nope} either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.loggers.logger.Logger'>, <class 'bool'>, <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: Nope
    - Expected a <class 'bool'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'Nope'}
"""
UNION = """Parser key "trainer.limit_train_batches":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'float'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'float'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: abc
"""
OF_A_CALLABLE = """Parser key "model":
  Problem with given class_path 'moslim.PolicyTrainer':
    Parser key "optimizer":
      Does not validate against any of the Union subtypes
      Subtypes: [typing.Callable[[collections.abc.Iterable], torch.optim.optimizer.Optimizer], <class 'NoneType'>]
      Errors:
        - Type typing.Callable[[collections.abc.Iterable], Optimizer] expects a function or a callable class: {reason}
        - Expected a <class 'NoneType'>
      Given value type: <class 'jsonargparse._util.NestedArg'>
      Given value: NestedArg(key='lr', val='fast')
"""
OPTIONS_OF_A_CALLABLE = OF_A_CALLABLE.format(
    reason="""Parser key "lr":

            - Expected a path but fast either not accessible or invalid
            - Does not validate against any of the Union subtypes
            Subtypes: [<class 'float'>, <class 'torch.Tensor'>]
            Errors:
              - Expected a <class 'float'>
              - Expected a dot import path string: fast
            Given value type: <class 'str'>
            Given value: fast. Got value: Namespace(class_path='torch.optim.AdamW', init_args=Namespace(lr='fast'))"""
)
NOT_GIVEN = """Parser key "preferences":
  Not a valid subclass of PreferenceSet. Got value: None
  Subclass types expect one of:
  - a class path (str)
  - a dict with class_path entry
  - a dict without class_path but with init_args entry (class path given previously)
  - a dict with parameters accepted by the base class (implicit class_path)
"""


def test_the_innermost_key_says_what_is_wrong():
    assert shortened(NESTED) == "model.lora.rank (of moslim.ops.LoraOptions): expected int, not abc"


def test_types_of_one_key_are_listed_once():
    assert shortened(UNION) == "trainer.limit_train_batches: expected int or float, not abc"


def test_an_unknown_class_brings_those_there_are():
    import lightning.pytorch.loggers  # noqa: F401

    said = shortened(NO_CLASS)
    assert said.startswith("trainer.logger: there is no class 'Nope': known are ") and "CSVLogger" in said


def test_another_message_stays_as_it_is():
    assert shortened("unrecognized arguments: --x") == "unrecognized arguments: --x"


def test_a_huge_value_does_not_make_a_huge_message():
    said = shortened(UNION.replace("Given value: abc", f"Given value: {'9' * 10_000}"))
    assert said.startswith("trainer.limit_train_batches: expected int or float, not 999") and len(said) < 400


def test_an_option_of_a_callable_is_named():
    said = shortened(OPTIONS_OF_A_CALLABLE)
    assert said == "model.optimizer.lr (of moslim.PolicyTrainer): expected float, not fast"
    said = shortened(OF_A_CALLABLE.format(reason="No module named 'lab'. Got value: lab.f"))
    assert said == "model.optimizer (of moslim.PolicyTrainer): No module named 'lab'"


def test_a_part_that_is_not_given():
    assert shortened(NOT_GIVEN) == "preferences: expected PreferenceSet, and none is given"


@pytest.mark.parametrize("option", [["--source.validation", "null"], ["--source.validation=null"]])
def test_the_null_of_a_nested_option_is_no_text(option):
    install()
    parser = MoslimParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    given = ["--source=moslim.data.Table", "--source.path=rows.csv", "--source.validation=held.csv"]
    made = parser.instantiate_classes(parser.parse_args([*given, *option]))
    assert made.source.others[Split.VALIDATION] is None and made.source.path == "rows.csv"
