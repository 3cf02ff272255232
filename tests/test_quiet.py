import warnings

from moslim.cli import leave_out_noise, plain_warnings, run
from tests.helpers.cli_folder import PARTS, folder  # noqa: F401  # a working folder for each test


def test_only_what_matters_is_said(caplog, recwarn):
    leave_out_noise()
    caplog.set_level("INFO")
    run(
        [
            "fit",
            "--config",
            "config.yaml",
            "--model",
            f"{PARTS}.PartlyInEval",
            "--trainer.limit_train_batches",
            "2",
        ]
    )
    said = [record.getMessage() for record in caplog.records] + [str(one.message) for one in recwarn]
    assert said == ["`Trainer.fit` stopped: `max_epochs=1` reached."]


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    plain_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        print(warnings.formatwarning("rows.csv: 3 rows are skipped", UserWarning, "loader.py", 7), end="")
    assert capsys.readouterr().out == "warning: rows.csv: 3 rows are skipped\n"
