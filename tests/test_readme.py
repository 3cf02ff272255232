"""What the README promises is there, and what is there is in the README."""

import inspect
import re
from pathlib import Path

import pytest

import moslim.algorithms.base
import moslim.algorithms.functional
import moslim.evaluation.judges
import moslim.reward.losses
from moslim import PolicyTrainer, PreferenceDataModule, RewardClassifier
from moslim.cli import SUBCOMMANDS
from moslim.data.samplers import PreferenceSampler
from moslim.data.sources.combined import ComparisonsFromRatings, ConcatSource
from moslim.data.sources.table import Table
from moslim.data.sources.workbench import Workbench
from moslim.data.types import Source
from moslim.generation.base import RolloutEngine
from moslim.instructions import PreferenceInstruction
from moslim.mapping import MappingFunction

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
PARTS = [
    MappingFunction,
    PreferenceInstruction,
    PreferenceSampler,
    RolloutEngine,
    Source,
    moslim.evaluation.judges.Judge,
    moslim.algorithms.functional.KLController,
    moslim.algorithms.base.PolicyOptimizer,
    moslim.reward.losses.LevelLoss,
]


def shipped(base: type) -> set[str]:
    """Names of the classes of the package that can be chosen in the place of a base class."""
    below = {kind for one in base.__subclasses__() for kind in [one, *one.__subclasses__()]}
    ours = {kind for kind in below if re.match(r"moslim\.(?!experimental)", kind.__module__)}
    return {kind.__name__ for kind in ours if not inspect.isabstract(kind)}


@pytest.mark.parametrize("base", PARTS, ids=lambda base: base.__name__)
def test_every_shipped_part_is_named(base: type) -> None:
    names = shipped(base)
    assert names and {name for name in names if f"`{name}`" not in PAGE} == set()


def test_every_source_is_found() -> None:
    assert shipped(Source) == {kind.__name__ for kind in (ComparisonsFromRatings, ConcatSource, Table, Workbench)}


def test_every_key_is_an_option() -> None:
    keys = re.findall(r"`(model|data)\.(\w+)(?:\.\w+)?`", PAGE)
    assert {part for part, _ in keys} == {"model", "data"}
    modules = {"model": (PolicyTrainer, RewardClassifier), "data": (PreferenceDataModule,)}
    known = {
        part: {name for kind in kinds for name in inspect.signature(kind).parameters} for part, kinds in modules.items()
    }
    assert [key for part, key in keys if key not in known[part]] == []


def test_every_command_is_named() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(SUBCOMMANDS)


def test_every_page_is_linked() -> None:
    linked = {Path(name).name for name in re.findall(r"\(docs/([\w.]+)\)", PAGE)}
    assert linked == {path.name for path in (ROOT / "docs").iterdir() if path.is_file()}


def test_every_design_note_is_linked_from_the_architecture() -> None:
    linked = re.findall(r"\(design/([\w.]+)\)", (ROOT / "docs/architecture.md").read_text())
    assert set(linked) == {path.name for path in (ROOT / "docs/design").iterdir()}


def test_every_preset_is_in_its_table() -> None:
    page = (ROOT / "docs/data.md").read_text()
    assert [path.stem for path in (ROOT / "configs/data").glob("*.yaml") if f"`{path.stem}`" not in page] == []


def test_every_mapping_is_in_its_table() -> None:
    page = (ROOT / "docs/mappings.md").read_text()
    assert {name for name in shipped(MappingFunction) if f"| `{name}` |" not in page} == set()
