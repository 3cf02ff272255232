"""Dimensions and a backbone for the task of nine words."""

import pytest

from moslim.preferences import PreferenceSet
from tests.helpers.word_task import save_backbone


@pytest.fixture
def preferences() -> PreferenceSet:
    return PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random causal language model with dropout, and of its tokenizer."""
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone(folder, seed=0)
    return str(folder)
