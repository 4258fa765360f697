import pytest

from polyscale.utils.outputs import check_output, only_writer


def test_one_writes_at_a_time(tmp_path):
    with only_writer(tmp_path / "out", "out", "conversion"):
        with (
            pytest.raises(ValueError, match=r"`out` .* is being written by another conversion. Wait for it"),
            only_writer(tmp_path / "out", "out", "conversion"),
        ):
            pass
        with only_writer(tmp_path / "other", "out", "conversion"):
            pass
    with only_writer(tmp_path / "out", "out", "conversion"):
        pass


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"`out` .*link is a link to nothing: make the folder it points to"):
        check_output(tmp_path / "link", "out", folder=True)
    (tmp_path / "folder").mkdir()
    assert check_output(tmp_path / "link", "out", folder=True) == tmp_path / "link"


def test_a_user_may_have_no_home(tmp_path, monkeypatch):
    def unknown(_):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with only_writer(tmp_path / "out", "out", "conversion"):
        (tmp_path / "out").touch()
    assert (tmp_path / "out").exists()
