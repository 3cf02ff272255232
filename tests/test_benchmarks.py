"""What decides which cells of the ablation are run, and what is concluded from them."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("cells")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("sections.ablation")


@pytest.mark.parametrize("changed", [False, True])
def test_the_page_has_no_figures_of_earlier_configs(changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common, report = importlib.import_module("common"), importlib.import_module("report")
    section = f"\n## Some title\n\n`some command`\n{common.outdated('a', 'b' if changed else 'a')}| 0.5 |\n"
    shown = report.current(section, "some")
    if changed:
        assert "## Some title" in shown and "`python benchmarks/some.py`" in shown and "0.5" not in shown
    else:
        assert shown == section


def every(cells: ModuleType, seed: int = 0, fold: int = 0, rollouts: int | None = None) -> list:
    names = [cells.DEFAULT, *(arm for arms in cells.arms().values() for arm in arms)]
    return [cells.Cell(arm, cells.World(seed, fold), "some", rollouts) for arm in names]


def test_arms_are_the_files_of_configs(cells: ModuleType) -> None:
    files = {path for path in (ROOT / "configs/experiment").rglob("*.yaml") if path.name != "sweep.yaml"}
    assert {ROOT / cell.layers[-1] for cell in every(cells)[1:]} == files


@pytest.mark.slow
@pytest.mark.parametrize("rollouts", [None, 88])
def test_every_arm_makes_as_many_answers_as_the_quickstart(cells: ModuleType, rollouts: int | None) -> None:
    policy = cells.read(cells.POLICY)
    each = policy["data"]["init_args"]["batch_size"] * policy["model"]["init_args"]["num_generations"]
    whole = policy["trainer"]["max_steps"] // policy["model"]["init_args"]["minibatches"]
    for cell in every(cells, rollouts=rollouts):
        assert cell.answers == each * (rollouts or whole), cell.arm


@pytest.mark.slow
def test_a_cell_is_kept_until_what_it_depends_on_changes(
    cells: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, *others = every(cells, seed=1, fold=1, rollouts=88)
    assert len({one.file for one in (cell, *others)}) == len(others) + 1
    others += [every(cells, *place)[0] for place in ((2, 1, 88), (1, 0, 88), (1, 1, 87))]
    assert len({one.key for one in (cell, *others)}) == len(others) + 1
    assert cell.kept is None
    cells.write(cell.file, {"key": cell.key, "mean": 1})
    assert cell.file.is_relative_to(tmp_path)
    assert cell.kept == {"key": cell.key, "mean": 1}

    monkeypatch.setattr(cells, "ROOT", tmp_path)
    for name in (cells.STARTER, cells.REWARD, cells.PREFERENCES, cells.POLICY):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# another comment\n" + (ROOT / name).read_text())
    weights = tmp_path / cell.world.folder / "reward/classifier/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"some")
    cells.write(cell.file, {"key": cell.key, "world": cell.world.mark})
    assert cell.stands
    weights.write_bytes(b"those of another machine")
    assert cell.kept is not None and not cell.stands
    policy = (tmp_path / cells.POLICY).read_text()
    (tmp_path / cells.POLICY).write_text(policy.replace("max_steps:", "max_steps: 1"))
    assert cell.kept is not None  # its length is given
    (tmp_path / cells.REWARD).write_text((ROOT / cells.REWARD).read_text().replace("lr: 1.2e-3", "lr: 1.3e-3"))
    assert cell.kept is None


def test_differences_are_paired_by_seed(ablation: ModuleType) -> None:
    def runs(*spearman: float) -> dict:
        return {str(seed): {"spearman": value} for seed, value in enumerate(spearman)}

    default = runs(0.5, 0.7, 0.9)
    change, half = ablation.difference(runs(0.6, 0.8, 1.0), default)
    assert change == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-12)
    change, half = ablation.difference(runs(0.5, 0.8, 1.1), default)
    assert change == pytest.approx(0.1) and half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert ablation.difference(runs(0.9), default) is None

    factors = {"default": {"default": default}, "kl": {"kl/none": runs(0.4, 0.6, 0.8), "kl/b": runs(0.5, 0.8, 1.1)}}
    factors["kl"]["kl/not_run"] = {}
    assert ablation.verdict(factors).startswith("Significantly better than the default: none. Better with every seed")
    assert "Significantly worse: `kl/none`." in ablation.verdict(factors)
    factors["kl"]["kl/c"] = runs(0.6, 0.8, 1.0)
    factors["kl"]["kl/d"] = runs(0.6, 0.8, 1.3)
    said = ablation.verdict(factors)
    assert "default: `kl/c`. Better with every seed, perhaps by chance: `kl/c`, `kl/d`. Significantly" in said


def test_results_of_two_checkouts_are_compared_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    unchanged = importlib.import_module("unchanged")
    monkeypatch.setattr(unchanged, "RENAMES", ((r"\bold\b", "new"),))
    runs = tmp_path / "algorithms/outputs/rloo/version_0"
    (runs / "checkpoints").mkdir(parents=True)
    weights = {"a.old": torch.tensor([0.1, 0.2]), "half": torch.ones(2, 2, dtype=torch.bfloat16), "none": torch.ones(0)}
    torch.save({"state_dict": weights}, runs / "checkpoints/last.ckpt")
    (runs / "metrics.csv").write_text("step,old,time/step,rare\n0,0.1,3,\n1,nan,4,0.3\n")
    side = unchanged.Side(ROOT, tmp_path, unchanged.BEFORE, tmp_path, 0)
    before = side.values("algorithms")
    named = {"old at 0": [0.1], "rare at 1": [0.3]}
    assert {f"rloo/metrics.csv: {name}": value for name, value in named.items()}.items() <= before.items()
    assert len(before) == 6  # without the time

    after = {unchanged.renamed(name): list(values) for name, values in before.items()}
    equal = unchanged.compare(before, after)
    assert (equal["numbers"], equal["different"], equal["only_before"], equal["only_after"]) == (9, [], [], [])
    after["rloo/metrics.csv: new at 0"] = [0.1 + 2**-56]
    after["rloo/metrics.csv: more at 0"] = after.pop("rloo/metrics.csv: rare at 1")
    weights["a.old"][1] += 2**-25
    torch.save({"state_dict": weights}, runs / "checkpoints/last.ckpt")
    after["rloo/last.ckpt: a.new"] = side.values("algorithms")["rloo/last.ckpt: a.old"]
    found = unchanged.compare(before, after)
    assert [one["name"] for one in found["different"]] == ["rloo/last.ckpt: a.new", "rloo/metrics.csv: new at 0"]
    assert found["only_before"] == ["rloo/metrics.csv: rare at 1"]
    assert found["only_after"] == ["rloo/metrics.csv: more at 0"]


def test_sections_and_results_belong_to_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    listed = set(importlib.import_module("report").BENCHMARKS)
    assert {path.stem for path in (ROOT / "benchmarks/sections").glob("[!_]*.py")} <= listed
    assert {name for name in listed if not (ROOT / f"benchmarks/{name}.py").exists()} == set()
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        assert path.stem in listed
        assert {"command", "versions", "machine"} <= json.loads(path.read_text()).keys(), path.name
