"""Exports over earlier ones, killed at every step, and exported folders that were damaged."""

import json
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moslim.ops.lora import LoraOptions, add_lora
from moslim.ops.models import load_backbone, load_causal_lm
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import is_classifier, load_classifier, save_adapter, save_merged
from moslim.reward.modeling import PreferenceClassifier
from moslim.utils.errors import UsageError
from moslim.utils.folders import check_files, whole_folder

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
PREFERENCES = PreferenceSet({"warmth": ["cold", "warm"]})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return str(folder)


def classifier(start: str, mark: float) -> PreferenceClassifier:
    """One whose temperature, head and backbone all say which it is."""
    made = PreferenceClassifier.from_backbone(start, PREFERENCES)
    made.config.temperatures = [mark]
    with torch.no_grad():
        made.head.weight.fill_(mark)
        next(made.backbone.parameters()).fill_(mark)
    return made


def marks(folder: Path) -> set[float]:
    """Which classifiers a folder is made of."""
    loaded = load_classifier(folder)
    weights = loaded.head.weight, next(loaded.backbone.parameters())
    return {*loaded.config.temperatures, *(float(weight.detach().mean()) for weight in weights)}


def in_a_child(action: Callable[[], object], killed_at: int) -> bool:
    """Runs an action in a fork that is killed just before its n-th change of files; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        count = iter(range(10_000))

        def counting(change: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **options: object) -> object:
                if next(count) == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return counted

        try:
            for name in ("replace", "rename", "unlink", "rmdir"):
                setattr(os, name, counting(getattr(os, name)))
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.mark.slow
def test_an_export_over_another_is_whole_wherever_it_is_killed(start: str, tmp_path: Path) -> None:
    old, new, folder = classifier(start, 2.0), classifier(start, 3.0), tmp_path / "shared"
    save_merged(old, tmp_path / "old")
    found, step, done = [], 0, False
    while not done:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        (folder / "notes.txt").write_text("mine")
        done = in_a_child(lambda: save_merged(new, folder), step)
        found.append(marks(folder))
        assert (folder / "notes.txt").read_text() == "mine"
        step += 1
    assert step > 10
    first = found.index({3.0})
    assert found == [{2.0}] * first + [{3.0}] * (step - first) and 0 < first < step - 1
    assert {path.name for path in folder.iterdir()} == {
        *("backbone", "checksums.json", "config.json", "heads.safetensors", "model.safetensors.index.json", "notes.txt")
    }


@pytest.mark.slow
def test_without_this_package_an_interrupted_exchange_is_no_model_rather_than_a_mixture(
    start: str, tmp_path: Path
) -> None:
    def exported(mark: float) -> LlamaForCausalLM:
        model = LlamaForCausalLM(deepcopy(CONFIG))
        with torch.no_grad():
            model.lm_head.weight.fill_(mark)
        model.config.bos_token_id = int(mark)
        return model

    folder, step, done, kinds = tmp_path / "shared", 0, False, []
    old, new = exported(2.0), exported(3.0)

    def export() -> None:
        with whole_folder(folder, lambda place: True) as part:
            new.save_pretrained(part)

    while not done:
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder)

        done = in_a_child(export, step)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError):
            kinds.append("none")
        else:
            kinds.append(f"{loaded.config.bos_token_id} {loaded.lm_head.weight.detach().mean():.0f}")
        assert float(load_causal_lm(folder).lm_head.weight.detach().mean()) in (2.0, 3.0)
        step += 1
    assert set(kinds) == {"2 2", "none", "3 3"} and sorted(kinds, key=["2 2", "none", "3 3"].index) == kinds


def test_an_exchange_of_a_living_process_is_waited_for(start: str, tmp_path: Path) -> None:
    save_merged(classifier(start, 2.0), tmp_path / "shared")
    save_merged(classifier(start, 3.0), tmp_path / "new")
    child = os.fork()
    if child == 0:
        real = os.replace

        def slow(*args: object) -> None:
            real(*args)
            if str(args[1]).endswith(".exchange.json"):
                (tmp_path / "begun").touch()
            time.sleep(0.05)

        os.replace = slow
        with whole_folder(tmp_path / "shared", is_classifier) as part:
            shutil.copytree(tmp_path / "new", part, dirs_exist_ok=True)
        os._exit(0)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    assert marks(tmp_path / "shared") == {3.0}
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert marks(tmp_path / "shared") == {3.0}
    assert not list((tmp_path / "shared").glob(".*"))


@pytest.mark.parametrize("content", ["{", "[]", '{"part": ".part-a", "old": [], "new": ["../evil"]}', "{}"])
def test_a_journal_that_cannot_be_followed_is_an_error_that_says_what_to_do(
    content: str, start: str, tmp_path: Path
) -> None:
    save_merged(classifier(start, 2.0), tmp_path / "shared")
    (tmp_path / "shared" / ".exchange.json").write_text(content)
    with pytest.raises(UsageError, match=r"an export into .*shared' was interrupted .* delete .exchange.json"):
        load_classifier(tmp_path / "shared")


def flip(file: Path, place: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 4
    file.write_bytes(raw)


@pytest.mark.parametrize("file", ["heads.safetensors", "backbone/model.safetensors"])
@pytest.mark.parametrize("part", [False, True])
def test_a_flipped_bit_in_a_classifier_is_refused(file: str, part: bool, start: str, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    save_merged(classifier(start, 2.0), folder)
    flip(folder / file, -5)
    if part and file.startswith("heads"):
        load_backbone(folder / "backbone")  # which it has nothing to do with
        return
    with pytest.raises(UsageError, match=rf"{file}' is not what was exported \(checksums.json\).*export it anew"):
        load_backbone(folder / "backbone") if part else load_classifier(folder)


@pytest.mark.parametrize("file", ["heads.safetensors", "adapter/adapter_model.safetensors"])
def test_a_flipped_bit_in_an_adapter_is_refused(file: str, start: str, tmp_path: Path) -> None:
    made = classifier(start, 2.0)
    made.backbone = load_backbone(start)
    save_adapter(add_lora(made, LoraOptions(rank=2, target_modules=["q_proj"])), start, tmp_path / "adapter")
    assert load_classifier(tmp_path / "adapter").config.temperatures == [2.0]
    flip(tmp_path / "adapter" / file, -5)
    with pytest.raises(UsageError, match=rf"{file}' is not what was exported"):
        load_classifier(tmp_path / "adapter")


def test_a_flipped_bit_in_a_policy_is_refused_and_an_edited_config_is_said(start: str, tmp_path: Path) -> None:
    with whole_folder(tmp_path / "policy", lambda place: True) as part:
        load_causal_lm(start).save_pretrained(part)
        (part / "README.md").write_text("to be completed")
    (tmp_path / "policy" / "README.md").write_text("complete")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_causal_lm(tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.warns(UserWarning, match=r"config.json' has \d+ bytes .*it was edited, or is damaged"):
        load_causal_lm(tmp_path / "policy")
    flip(tmp_path / "policy" / "model.safetensors", -5)
    with pytest.raises(UsageError, match=r"model.safetensors' is not what was exported"):
        load_causal_lm(tmp_path / "policy")
    (tmp_path / "policy" / "checksums.json").unlink()
    load_causal_lm(tmp_path / "policy")  # on purpose
    (tmp_path / "policy" / "checksums.json").write_text('{"files": [')
    with pytest.raises(UsageError, match=r"checksums.json' is damaged"):
        load_causal_lm(tmp_path / "policy")


def test_files_of_an_earlier_export_go_and_those_of_people_stay(tmp_path: Path) -> None:
    for names in (["a.bin", "config.json"], ["b.bin", "config.json"]):
        with whole_folder(tmp_path, lambda place: True) as part:
            for name in names:
                (part / name).write_text("{}")
        (tmp_path / "mine.txt").write_text("mine")
    assert {path.name for path in tmp_path.iterdir()} == {"b.bin", "config.json", "checksums.json", "mine.txt"}


def test_the_current_folder_can_be_exported_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_folder(Path(), lambda place: True) as part:
        (part / "config.json").write_text("{}")
    assert (tmp_path / "config.json").exists()


def exported(folder: Path, content: str) -> Path:
    with whole_folder(folder, lambda place: True) as part:
        (part / "config.json").write_text(content)
        (part / f"{len(content)}.bin").write_text("")
    return folder / "checksums.json"


LISTED = '{{"files": {{"{}": {{"bytes": {}, "crc32": 0}}}}}}'


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "a/../../b"])
def test_checksums_of_files_elsewhere_are_damaged_ones(name: str, tmp_path: Path) -> None:
    exported(tmp_path / "a", "{}").write_text(LISTED.format(name, 1))
    with pytest.raises(UsageError, match=r"checksums.json' is damaged"):
        check_files(tmp_path / "a")


@pytest.mark.parametrize("content", ["", "{", LISTED.format("config.json", "1e400"), LISTED.format("..", 1)])
def test_an_export_takes_the_place_of_one_with_damaged_checksums(content: str, tmp_path: Path) -> None:
    noted = exported(tmp_path / "a", "{}")
    noted.write_text(content)
    with pytest.raises(UsageError, match=r"checksums.json' is damaged"):
        check_files(tmp_path / "a")
    exported(tmp_path / "a", "{1}")
    check_files(tmp_path / "a")
    assert (tmp_path / "a" / "config.json").read_text() == "{1}"


def test_checksums_of_others_are_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "checksums.json").write_text('{"model.safetensors": "sha256:0"}')
    (tmp_path / "checksums.json").write_text("{ of something else")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_files(tmp_path / "model")


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_file_in_place_of_the_folder_is_said(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match=f"{place}' cannot be a folder"):
        exported(tmp_path / place, "{}")
