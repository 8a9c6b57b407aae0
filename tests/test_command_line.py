"""What all commands refuse before they work: folders and files that could not be written afterwards."""

import errno
import os

import pytest
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from accelerator_setup import BelowOne
from command_line import check_output_file, check_output_folder, counted, make_parser, run
from tests.conftest import run_command

STAGE0 = ("--slides", "SLIDE")
COMMANDS = [
    ("stage0_tiling/survey.py", *STAGE0, "--output_dir"),
    ("stage0_tiling/tile.py", *STAGE0, "--output_dir"),
    ("stage0_tiling/encode.py", *STAGE0, "--encoder", "resnet18", "--output_dir"),
    ("stage0_tiling/encode_slides.py", "--features_dir", ".", "--slide_encoder", "mean", "--output_dir"),
    ("stage0_encoder/compare_encoders.py", "--config", "recipes/compare_encoders_demo.yaml", "--output_dir"),
    ("stage0_encoder/embed.py", "--model", "M", "--records", "R.json", "--output_dir"),
    ("stage1_projector/train.py", "--train_json", "T.json", "--llm_name", "L", "--features_dir", ".", "--output_dir"),
    ("stage2_finetune/train.py", "--train_json", "T.json", "--stage1_projector_path", "S", "--output_dir"),
    ("stage2_finetune/compare_peft.py", "--train_json", "T.json", "--stage1_projector_path", "S", "--output_dir"),
    ("inference/generate.py", "--model", "M", "--features", "F.h5", "--evidence"),
    ("inference/judge_evidence.py", "--model", "M", "--test_json", "T.json", "--features_dir", ".",
     "--lesions_dir", ".", "--output_dir"),
    ("evaluation/score.py", "--predictions", "P.json", "--references", "R.json", "--output_dir"),
    ("evaluation/plots.py", "--runs", ".", "--output_dir"),
    ("offline_kit.py", "pack", "--models", "org/name", "--output_dir"),
    ("slide_reports/split.py", "--train_json", "T.json", "--output"),
    ("inference/predict.py", "--model", ".", "--test_json", "T.json", "--output"),
]  # fmt: skip


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc, where nobody can write, is Linux's")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_refuses_a_place_where_nothing_can_be_written(command, tmp_path):
    (tmp_path / "slide.tiff").write_bytes(b"no slide")
    words = [str(tmp_path / "slide.tiff") if word == "SLIDE" else word for word in command]
    done = run_command(*words, "/proc/x/y", status=2)
    told = f"error: {command[-1]} /proc/x/y: nothing can be written there (No such file or directory in /proc); name an"
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1


def test_a_folder_may_be_there_or_made_and_is_not_made_yet(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_output_folder(folder)
    check_output_file(tmp_path / "a" / "file.json")
    check_output_file(None)
    assert list(tmp_path.iterdir()) == []


def test_names_that_no_folder_can_have_are_told(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    for folder, told in (
        ("  ", "--evidence '  ': name a folder"),
        (tmp_path / "file", f"--evidence {tmp_path}/file: {tmp_path}/file is a file; name a folder"),
        (tmp_path / "file" / "run", f"--evidence {tmp_path}/file/run: {tmp_path}/file is a file; name a folder"),
        (tmp_path / "link" / "run", f"{tmp_path}/link is a link to nothing; name a folder"),
        (
            tmp_path / "new" / ("x" * 300),
            f"nothing can be written there (File name too long in {tmp_path}); name another",
        ),
        ("~nobody_of_this_name/run", "nobody has a home folder of that name here; name another"),
        (tmp_path / ("x" * 300), f"nothing can be written there (File name too long in {tmp_path}); name another"),
    ):
        with pytest.raises((ValueError, OSError)) as refused:
            check_output_folder(folder, "--evidence")
        assert told in str(refused.value)
    with pytest.raises(NotADirectoryError, match="--output .*/file/p.json: .*/file is a file"):
        check_output_file(tmp_path / "file" / "p.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ((errno.ENOSPC, "full"), "no space left on the disk; free some, then run again"),
        ((errno.EDQUOT, "full", "out/x.csv"), "no space left on the disk of out/x.csv; free some, then run again"),
        (
            (errno.EACCES, "Permission denied", "a/b.json"),
            "a/b.json: Permission denied; get access to it, or name another",
        ),
        (("--flag x: ours",), "--flag x: ours"),
    ],
)
def test_what_the_system_refuses_is_told_with_its_mend(error, told, capsys):
    def main():
        raise OSError(*error)

    with pytest.raises(SystemExit, match="2"):
        run(main)
    assert capsys.readouterr().err == f"error: {told}\n"


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (PositiveInt, "two", "expected a whole number above 0, found 'two'"),
        (PositiveInt, "0", "expected a whole number above 0, found 0"),
        (NonNegativeInt, "1.5", "expected a whole number from 0, found '1.5'"),
        (PositiveFloat, "-1e-3", "expected a number above 0, found -1e-3"),
        (ClosedUnitInterval, "half", "expected a number from 0 to 1, found 'half'"),
        (BelowOne, "1", "expected a number from 0 to below 1, found 1"),
    ],
)
def test_a_number_that_a_flag_does_not_take_is_told_in_plain_words(kind, given, told, capsys):
    parser = make_parser("A command.")
    parser.add_argument("--size", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--size={given}"])
    assert capsys.readouterr().err.startswith(f"error: --size: {told}; see --help")


def test_numbers_agree_with_their_nouns():
    assert [counted(number, "slide") for number in (0, 1, 2048)] == ["0 slides", "1 slide", "2,048 slides"]
