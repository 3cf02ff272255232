"""A tokenizer and dimensions for the tests of data."""

import pytest
from transformers import PreTrainedTokenizerFast

from moslim.preferences import PreferenceSet
from tests.helpers.chats import WITH_SYSTEM, build_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template has a system role."""
    return build_tokenizer(WITH_SYSTEM)


@pytest.fixture
def preferences() -> PreferenceSet:
    return PreferenceSet({"size": ["low", "mid", "high"], "heat": ["short", "warm"]})
