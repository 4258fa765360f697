import pytest

from polyscale.utils.outputs import only_writer


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
