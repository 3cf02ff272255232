from moslim.training.command_errors import NewFolders


def test_what_only_a_start_wrote_is_removed(tmp_path):
    run = tmp_path / "outputs" / "mine" / "version_0"
    folders = NewFolders([run])
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("a: 1")
    folders.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_wrote_stays(tmp_path):
    run = tmp_path / "outputs" / "version_0"
    folders = NewFolders([run])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("a: 1")
    (run / "predictions.jsonl.part").write_text("{}")
    folders.remove()
    assert len(list(run.iterdir())) == 2


def test_what_was_there_before_stays(tmp_path):
    run = tmp_path / "version_0"
    run.mkdir()
    (run / "config.yaml").write_text("a: 1")
    NewFolders([run]).remove()
    assert (run / "config.yaml").exists()
    NewFolders([tmp_path / "version_1"]).remove()  # never made
    assert tmp_path.exists()
