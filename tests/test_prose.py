"""The repository's prose avoids the phrases that scripts/check_prose.py lists, and the check finds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.check_prose import check_file, tracked_files

BAD = "who" + "le"  # so that this file passes its own check


def found(path: Path, text: str) -> list[tuple[int, str]]:
    """Return line and phrase of each finding in a file with this text."""
    path.write_text(text, encoding="utf-8")
    lines = [line.removeprefix(f"{path}:").split(": ") for line in check_file(path)]
    return [(int(line[0]), line[1].strip("'\"")) for line in lines]


def test_no_file_holds_an_avoided_phrase() -> None:
    files = tracked_files()
    findings = [line for path in files for line in check_file(path)]
    assert files and not findings, "\n".join(findings)


@pytest.mark.parametrize(
    "text",
    [
        f'"""The {BAD} sequence."""',
        f"x = 1  # the {BAD} sequence",
        f'raise ValueError(f"the {BAD} sequence of {{x}} tokens")',
        f'def f():\n    """The {BAD} sequence."""',
    ],
    ids=["docstring", "comment", "message", "docstring of a function"],
)
def test_python_docstrings_comments_and_messages_are_read(text: str, tmp_path: Path) -> None:
    assert [phrase for _, phrase in found(tmp_path / "file.py", text)] == [BAD]


@pytest.mark.parametrize("text", [f"{BAD} = 1", f"call('{BAD}')", f"def {BAD}(): pass", f'"""Read `{BAD}` from it."""'])
def test_names_keys_and_code_in_backticks_are_not_read(text: str, tmp_path: Path) -> None:
    assert found(tmp_path / "file.py", text) == []


def test_a_phrase_is_found_across_the_lines_of_a_comment(tmp_path: Path) -> None:
    lines = ["x = 1", "# The ranks go", "# on from here."]
    assert found(tmp_path / "file.py", "\n".join(lines)) == [(2, " ".join(["go", "on"]))]


@pytest.mark.parametrize("opening", ["Of", "As", "What", "Those", "Whether", "Which", "How", "Where"])
def test_docstrings_open_with_a_verb_or_a_noun(opening: str, tmp_path: Path) -> None:
    assert found(tmp_path / "file.py", f'"""{opening} the ranks exchange."""') == [(1, opening)]
    assert found(tmp_path / "file.py", '"""Exchange what the ranks hold."""') == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("file.md", f"# Title\n\nThe {BAD} file.\n", 3),
        ("file.md", f"```python\n{BAD}()\nx = 1  # the {BAD} file\n```\n", 3),
        ("file.sh", f'{BAD}=1\necho "the {BAD} file"\n', 2),
        ("file.yaml", f"key: 1 # the {BAD} file\n", 1),
    ],
    ids=["Markdown", "Markdown code", "shell", "YAML"],
)
def test_other_kinds_of_files_are_read(name: str, text: str, line: int, tmp_path: Path) -> None:
    assert found(tmp_path / name, text) == [(line, BAD)]


@pytest.mark.parametrize(
    "phrase", ["twice as many tokens", "nothing else.", "a Llama-3-class model", "Llama-3.2-1B", "analysis"]
)
def test_good_english_is_left_alone(phrase: str, tmp_path: Path) -> None:
    assert found(tmp_path / "file.md", phrase) == []
