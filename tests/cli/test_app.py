"""What all commands have in common."""

import sys

from typer.testing import CliRunner

from hf_accel.cli import app


def test_a_package_that_is_missing_is_named(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("hf_accel.compare"):
            monkeypatch.delitem(sys.modules, name)
    for name in ["scipy", *(name for name in sys.modules if name.startswith("scipy."))]:
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(app, ["compare", "InfoBatch()", "--workload", "digits"])
    assert result.exit_code == 2 and "Install it with: pip install 'hf-accel[compare]'" in result.output


def test_a_file_in_the_place_of_a_folder_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for options in (["--out", str(tmp_path / "file")], ["--record", str(tmp_path)]):
        result = CliRunner().invoke(app, ["compare", "InfoBatch()", "--workload", "digits", *options])
        assert result.exit_code == 2 and options[0] in result.output
