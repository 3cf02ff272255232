"""Samplers that learn from the run: same draws whatever is cut, prepared ahead or shared out."""

import pytest
import torch
from lightning.pytorch import Callback

from moslim.data.prompt_batches import SampledPrompts
from moslim.data.samplers import Curriculum, ErrorWeighted
from tests.helpers.policy_runs import BATCH, data, make, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
STEPS, EPOCH = 7, {"limit_train_batches": 2}


class SaveEachStep(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


SAMPLERS = {
    "errors": lambda: ErrorWeighted([0.1, 0.6, 0.3], uniform=0.1, decay=0.5),
    "curriculum": lambda: Curriculum([0.1, 0.4, 0.5]),
}


@pytest.fixture
def run(preferences, lm, classifier, tmp_path):
    """Trains a policy; returns the module, its data, and what was asked for in every step."""

    def start(kind, folder, resume=None, size=BATCH, steps=STEPS, workers=0, **options):
        module = make(preferences, lm, classifier, rate=0.03, num_iterations=1)
        module_data = data(preferences, sampler=SAMPLERS[kind](), batch_size=size, workers=workers)
        save = SaveEachStep(tmp_path / folder)
        runner = trainer(tmp_path / folder, max_steps=steps, callbacks=[save], **EPOCH, **options)
        path = tmp_path / resume if resume else None
        runner.fit(module, module_data, ckpt_path=path, weights_only=True)
        return module, module_data

    return start


def asked(tmp_path, folder, step):
    """Targets of the rollout of a step, those of all processes, and the sampler's state."""
    saved = torch.load(tmp_path / folder / f"{step}.ckpt", weights_only=True)
    targets = torch.cat([rollout["targets"] for rollout in saved["policy_run"]["rollouts"]])
    return targets, saved.get("PreferenceDataModule")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_run_resumed_from_any_step_asks_for_the_same_with_any_number_of_workers(kind, run, tmp_path):
    _, module_data = run(kind, "whole")
    for step, workers in ((1, 0), (2, 1), (3, 1), (4, 0)):
        name = f"from {step}"
        run(kind, name, resume=f"whole/{step}.ckpt", workers=workers)
        for later in range(step + 1, STEPS + 1):
            (mine, my_state), (theirs, their_state) = asked(tmp_path, name, later), asked(tmp_path, "whole", later)
            assert torch.equal(mine, theirs) and my_state == their_state, (step, later)
    run(kind, "workers", workers=2)
    for step in range(1, STEPS + 1):
        assert torch.equal(asked(tmp_path, "workers", step)[0], asked(tmp_path, "whole", step)[0])
    if kind == "errors":
        assert module_data.sampler.metrics() == {
            f"sampler/{key}": share for key, share in asked(tmp_path, "whole", STEPS)[1]["sampler"]["shares"].items()
        }


def test_errors_of_one_epoch_are_the_weights_of_the_next(run, tmp_path):
    module, module_data = run("errors", "whole", steps=4)
    shares = [asked(tmp_path, "whole", step)[1]["sampler"]["shares"] for step in (1, 2, 3, 4)]
    assert shares[0] == shares[1] and shares[2] == shares[3] != shares[0]
    again = ErrorWeighted([0.1, 0.6, 0.3], uniform=0.1, decay=0.5)
    for step in (1, 2):
        saved = torch.load(tmp_path / "whole" / f"{step}.ckpt", weights_only=True)["policy_run"]["rollouts"][0]
        again.observe(module.preferences, saved["probs"], saved["targets"])
    again.start_epoch(1, module.preferences)
    assert again.state_dict()["shares"] == shares[2]
    logged = {f"sampler/{key}": share for key, share in shares[3].items()}
    found = {name: value.item() for name, value in module.trainer.callback_metrics.items() if "sampler/" in name}
    assert found == pytest.approx(logged) and module_data.sampler.metrics() == logged


def test_the_curriculum_widens(run, tmp_path):
    run("curriculum", "whole", steps=4)
    most = [(asked(tmp_path, "whole", step)[0] >= 0).sum(dim=1).max() for step in (1, 2, 3, 4)]
    assert max(most[:2]) == 1 and max(most[2:]) == 2


@pytest.mark.slow
def test_two_processes_ask_for_what_one_does(run, tmp_path):
    run("errors", "one", steps=4)
    run("errors", "two", steps=4, size=BATCH // 2, strategy="ddp_fork", devices=2)
    for step in (1, 2, 3, 4):
        (one, state), (two, their_state) = asked(tmp_path, "one", step), asked(tmp_path, "two", step)
        assert torch.equal(one, two)
        assert their_state["sampler"]["shares"] == pytest.approx(state["sampler"]["shares"], abs=1e-5)


def test_another_sampler_than_the_checkpoint_s_starts_anew(run, tmp_path):
    run("errors", "whole", steps=2)
    _, module_data = run("curriculum", "other", resume="whole/2.ckpt", steps=3)
    assert module_data.state_dict() == {}


def test_a_data_set_tells_its_sampler_of_the_epoch(preferences):
    sampler = Curriculum()
    SampledPrompts([], preferences, sampler, None, 0).start_epoch(1)
    assert sampler.metrics() == {"sampler/dimensions": 2}
