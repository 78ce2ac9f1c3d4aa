import errno

import pytest

from hf_rft.utils.files import check_writable, replacing, write_text


def test_a_file_is_replaced_once_the_block_has_ended(tmp_path):
    path = tmp_path / "curve.png"
    path.write_text("old")
    with replacing(path) as scratch:
        scratch.write_text("new")
        assert scratch.suffix == ".png"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        with replacing(path) as scratch:
            scratch.write_text("half of the n")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "text", "ε ≤ 8/255\n")
    assert (tmp_path / "text").read_bytes().decode("utf-8") == "ε ≤ 8/255\n"


def test_a_folder_is_tried_without_a_trace(tmp_path):
    check_writable("output_dir", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.safetensors").write_text("of the user")
    check_writable("output_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_too_little_space_is_noticed_before(tmp_path):
    with pytest.raises(OSError, match=r"`output_dir=.*` has [\d.]+ MB free, but at least .* MB will be written"):
        check_writable("output_dir", tmp_path, needed_bytes=10**18)
