from moslim.option_errors import shortened

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'moslim.reward.module.RewardClassifier':
        Parser key "lora":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'moslim.lora.LoraOptions'>, <class 'NoneType'>]
          Errors:
            - Problem with given class_path 'moslim.lora.LoraOptions':
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


def test_the_innermost_key_says_what_is_wrong():
    assert shortened(NESTED) == "model.lora.rank (of moslim.lora.LoraOptions): expected int, not abc"


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
