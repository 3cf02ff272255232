"""The probe on starters that follow a rule written down here, so that every figure is known beforehand."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from moslim.callbacks.guards import Gate, GateError
from moslim.callbacks.monitors import StyleProbe
from moslim.data.data_module import PreferenceDataModule
from moslim.data.sources.workbench import Workbench
from moslim.data.types import Example, Source
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.models import Architecture, WorkbenchTokenizer
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError
from moslim.workbench.grammar import COARSE, ENCOURAGEMENTS, LEVELS, QUESTIONS, topic_of, topics_in

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


class RuleFollower(SupervisedTrainer):
    """Follows the words of verbosity, warmth half-way, formality the wrong way round, and knows no facts."""

    RULES = {
        "short": "Results vary.",
        "long": "One. Two. Three. Four. Five.",
        "reserved": "",
        "friendly": " ".join(ENCOURAGEMENTS[:2]),
        "casual": "Greetings reader, observe this. Regards.",
        "formal": "Hey pal, check this. Regards.",
    }

    def __init__(self) -> None:
        super().__init__(architecture=Architecture("llama", WorkbenchTokenizer(), SIZES), engine=TorchEngine(8))
        self.asked: list[str] = []

    def answers(self, questions: list, keys: list, temperature: float) -> list[str]:
        assert temperature == 1.0 and len(set(keys)) == len(questions)
        self.asked += questions
        return [self.RULES.get(question.split()[-1].rstrip("."), "") for question in questions]


def trainer(folder: Path, *callbacks: object, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {"enable_checkpointing": False, "limit_val_batches": 0, "use_distributed_sampler": False, "max_steps": 1}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **plain, **options})


def data(source: Source | None = None) -> PreferenceDataModule:
    return PreferenceDataModule(PreferenceSet(LEVELS), source or Workbench(corpus_rows=8), batch_size=4)


def test_each_figure_is_the_high_word_s_mean_level_less_the_low_word_s(tmp_path: Path) -> None:
    run = trainer(tmp_path, StyleProbe())
    run.fit(RuleFollower(), data())
    found = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("style/")}
    assert found == {"style/verbosity": 4.0, "style/formality": -3.0, "style/warmth": 2.0, "style/helpfulness": 0.0}


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_all_training_topics_are_asked_about_in_all_forms_with_one_style_word(fold: int, tmp_path: Path) -> None:
    source = Workbench(fold=fold, corpus_rows=8)
    model = RuleFollower()
    trainer(tmp_path, StyleProbe(questions=48)).fit(model, data(source))
    words = Counter(question.rsplit(" Make it ")[1] for question in model.asked)
    assert words == {f"{word}.": 48 for pair in COARSE.values() for word in pair}
    assert Counter(map(topic_of, model.asked)) == dict.fromkeys(source.topics(held_out=False), 8)
    forms = {question.split(" Make it ")[0].split()[0] for question in model.asked}
    assert forms == {form.split()[0] for form in QUESTIONS}
    assert all(len(topics_in(question)) == 1 for question in model.asked)


def test_a_gate_behind_it_compares_and_loggers_get_the_figures(tmp_path: Path) -> None:
    wanted = {"style/verbosity": 0.7, "style/warmth": 0.7}
    logger = CSVLogger(tmp_path, name="")
    trainer(tmp_path, StyleProbe(8), Gate(wanted), logger=logger).fit(RuleFollower(), data())
    assert "style/verbosity" in (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()[0]
    with pytest.raises(GateError, match=r"style/formality: -3, required >= 0.7"):
        trainer(tmp_path, StyleProbe(8), Gate({**wanted, "style/formality": 0.7})).fit(RuleFollower(), data())


def test_a_real_model_is_probed_the_same_way_every_time(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = SupervisedTrainer(
            architecture=Architecture("llama", WorkbenchTokenizer(), SIZES), engine=TorchEngine(8)
        )
        run = trainer(tmp_path, StyleProbe(8))
        run.fit(model, data())
        found.append({name: float(v) for name, v in run.callback_metrics.items() if name.startswith("style/")})
    assert found[0] == found[1] and len(found[0]) == 4
    assert all(-4 <= value <= 4 for value in found[0].values())


def test_a_dry_run_is_not_probed(tmp_path: Path) -> None:
    model = RuleFollower()
    trainer(tmp_path, StyleProbe(), fast_dev_run=True).fit(model, data())
    assert not model.asked


def test_other_modules_and_other_data_are_refused(tmp_path: Path) -> None:
    class Other(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.weight**2

    class Rows(Source):
        def rows(self, *_: object) -> list[Example]:
            return [Example("How do I clean the kettle?", "Good luck.")] * 4

    with pytest.raises(UsageError, match="measures a SupervisedTrainer, not a Other"):
        trainer(tmp_path, StyleProbe()).fit(Other(), [torch.zeros(1)])
    with pytest.raises(UsageError, match=r"the embedded world, but data.source is a Rows"):
        trainer(tmp_path, StyleProbe()).fit(RuleFollower(), data(Rows()))
