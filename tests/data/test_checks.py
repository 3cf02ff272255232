import json
import warnings

import lightning.pytorch as pl
import pytest
import torch

from moslim.data.data_module import PreferenceDataModule
from moslim.data.sources.table import Table
from moslim.data.views import InstructedTextView, PolicyView, RewardView, ServedModule, TextView
from tests.helpers.chats import WITH_SYSTEM, build_tokenizer

VIEWS = [PolicyView(), TextView(), InstructedTextView(), RewardView()]
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'user' and not loop.first and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + WITH_SYSTEM
)
STRICT = "{% for m in messages %}{% if not m.content.strip() %}{{ 1 / 0 }}{% endif %}{% endfor %}" + ALTERNATING
LAST_ONLY = "<|user|>{{ messages[-1].content }}<|end|><|assistant|>"


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


ASSISTANT = {"role": "assistant", "content": "boil"}
BAD = {
    "empty": (WITH_SYSTEM, [user(""), ASSISTANT, user("a")], "message 0, a user turn, is empty"),
    "blank": (WITH_SYSTEM, [system("a"), user(" \n\u200b")], "message 1, a user turn, is empty"),
    "nothing left": (WITH_SYSTEM, "<|end|> <|user|>", "the question is empty once what reads as a control token"),
    "twice": (ALTERNATING, [user("a"), user("b")], r"refuses messages with roles \['user', 'user'\]: roles must alt"),
    "in python": (STRICT, [{**ASSISTANT, "content": " "}, user("b")], "refuses messages .*division by zero"),
    "not shown": (LAST_ONLY, [user("a"), ASSISTANT, user("b")], "does not show message 0, a user turn"),
    "no room": (WITH_SYSTEM, [system("a " * 40), user("b")], "already takes .* of max_length = 24"),
}


class Module(pl.LightningModule, ServedModule):
    """Takes batches of a view and does nothing with them."""

    def __init__(self, view, template):
        super().__init__()
        self.batch_view, self.tokenizer = view, build_tokenizer(template)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps = 0

    def training_step(self, batch, i):
        self.steps += 1
        return self.weight * 0

    def validation_step(self, batch, i):
        self.log("loss", 0.0, batch_size=1)

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


def run(command, module, data, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        **quiet,
        enable_checkpointing=False,
        max_steps=4,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )
    getattr(trainer, command)(module, datamodule=data)


def table(path, questions):
    rows = [{"question": question, "answer": "boil", "size": 1, "heat": 0} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


GOOD = [f"{a} {b}" for a in "abcd" for b in "efgh"]
pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_before_the_first_step(tmp_path, preferences, view, name):
    template, question, fault = BAD[name]
    source = Table(table(tmp_path / "rows.jsonl", [*GOOD[:9], question, *GOOD[9:]]))
    module, data = Module(view, template), PreferenceDataModule(preferences, source, batch_size=2, max_length=24)
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 10: .*{fault}") as error:
        run("fit", module, data)
    assert module.steps == 0
    assert "1 of 17 train rows cannot be used" in str(error.value) and "data.skip_bad_rows = 0.0" in str(error.value)


@pytest.mark.parametrize("view", VIEWS)
def test_a_share_of_bad_rows_is_left_out_and_counted(tmp_path, preferences, view):
    bad = [user("a"), user("b")]
    source = Table(table(tmp_path / "rows.jsonl", [bad, *GOOD, bad]))
    data = PreferenceDataModule(preferences, source, batch_size=16, skip_bad_rows=0.12)
    module = Module(view, ALTERNATING)
    # the policy view takes a question once
    with pytest.warns(
        UserWarning, match=r"[12] of 1[78] train rows cannot be used and are left out.*line 1: .*alternate"
    ):
        run("fit", module, data)
    assert module.steps == 4  # full batches of the other rows
    with pytest.raises(ValueError, match=r"skip_bad_rows = 0.05"):
        run("fit", Module(view, ALTERNATING), PreferenceDataModule(preferences, source, skip_bad_rows=0.05))
    with pytest.raises(ValueError, match=r"skip_bad_rows is 1\.5: give a share"):
        PreferenceDataModule(preferences, source, skip_bad_rows=1.5)


@pytest.mark.parametrize("view", VIEWS)
def test_a_bad_validation_row_is_named_before_the_first_step(tmp_path, preferences, view):
    validation = table(tmp_path / "validation.jsonl", ["a b c d", [user("a"), user("b")]])
    source = Table(table(tmp_path / "rows.jsonl", GOOD), validation=validation)
    module, data = Module(view, ALTERNATING), PreferenceDataModule(preferences, source, batch_size=2)
    with pytest.raises(ValueError, match=r"validation.jsonl, line 2: .*alternate"):
        run("fit", module, data, check_val_every_n_epoch=3)
    assert module.steps == 0
    run("fit", module, data, limit_val_batches=0)
    assert module.steps == 4


@pytest.mark.parametrize("view", VIEWS)
def test_predict_leaves_no_row_out(tmp_path, preferences, view):
    source = Table(predict=table(tmp_path / "predict.jsonl", ["a", "b", [user("a"), user("b")]]))
    data = PreferenceDataModule(preferences, source, skip_bad_rows=0.9)
    with pytest.raises(ValueError, match=r"predict.jsonl, line 3: .*alternate"):
        run("predict", Module(view, ALTERNATING), data)


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_taken_out_is_counted_and_said_once(tmp_path, preferences, view):
    forged = ["a <|end|> b", "[[ Heat : WARM ]] c", "det [[1, 2], [3, 4]]"]
    source = Table(table(tmp_path / "rows.jsonl", [*GOOD, *forged]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(
            "fit",
            Module(view, WITH_SYSTEM),
            PreferenceDataModule(preferences, source, batch_size=4),
            limit_val_batches=0,
        )
    texts = [str(warning.message) for warning in said if "taken out" in str(warning.message)]
    assert len(texts) == 1
    assert "train rows: something was taken out of 2 texts" in texts[0] and "rows.jsonl, line 17" in texts[0]


def test_a_long_question_is_cut_where_the_template_refuses_an_empty_turn(tmp_path, preferences):
    question = [user("a " * 50), ASSISTANT, user("b " * 50)]
    source = Table(table(tmp_path / "rows.jsonl", [*GOOD, question]))
    for view in VIEWS:
        module = Module(view, STRICT)
        with pytest.warns(UserWarning, match="is cut from its start"):
            run("fit", module, PreferenceDataModule(preferences, source, batch_size=17, max_length=26))
        assert module.steps == 4
