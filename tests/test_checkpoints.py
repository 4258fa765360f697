import pytest

from polyscale.checkpoints import available_checkpoints, bundled_checkpoint, resolve_checkpoint


def test_a_bundled_checkpoint_is_a_folder_with_a_config():
    for name in available_checkpoints():
        assert (bundled_checkpoint(name) / "config.json").is_file()


def test_an_unknown_name_is_refused_and_those_there_are_named():
    with pytest.raises(ValueError, match="`name` must be one of") as error:
        bundled_checkpoint("no-such-checkpoint")
    assert "no-such-checkpoint" in str(error.value)
    assert all(name in str(error.value) for name in available_checkpoints())


def test_a_name_cannot_leave_the_folder():
    with pytest.raises(ValueError, match="`name` must be one of"):
        bundled_checkpoint("../checkpoints")


def test_resolve_prefers_local_folders_and_leaves_hub_names_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    for name in available_checkpoints():
        assert resolve_checkpoint(name) == str(bundled_checkpoint(name))
        (tmp_path / name).mkdir()
        assert resolve_checkpoint(name) == name
