"""Find words and phrases in prose that this project avoids: python scripts/check_prose.py [FILE ...]

Without arguments all tracked files are read. In Python the docstrings, comments and messages (strings of three words or
more) are read, in Markdown and notebooks the text and the comments of code blocks, elsewhere comments and strings.
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

AVOIDED = {  # pattern (a space matches any white space): what to write instead
    r"wholes?|wholly": "complete, full, entire, all of",
    r"anew": "again, from the start",
    r"so many|(?<!twice\s)(?<!half\s)(?<!times\s)as many": "the same number of; a number",
    r"(an? [\w-]+|rows|documents|none) of (its|their|your) own": "a separate ..., its own ...",
    r"(is|are|was|were|be) told": "receives, knows; is given",
    r"hears?": "receives, learns",
    r"mends?|mended": "fix, repair",
    r"(go|goes|going|went) on(?!\s(top|a|the)\b)": "continue",
    r"lays": "puts, places, concatenates",
    r"nobody's": "nobody owns, never a target",
    r"beside": "next to; besides, in addition to",
    r"likewise": "also, in the same way; repeat the reason",
    r"but for": "except, apart from",
    r"(would|could|will|may|must|can|might) else|(?<=\w;\s)else"
    r"|(?<!thing\s)(?<!one\s)(?<!or\s)(?<!body\s)(?<!where\s)else(?=[.;])": "otherwise",
    r"(is|are|be) no (JSON|multiple|power|text|prefix|patch|Triton|number|model)": "is not a",
    r"(was|is|were) got": "the value, received",
    r"tells? that": "says that, states that",
    r"one's own|of one's|oneself": "your own, yourself",
    r"(?-i:Llama-3(?![-.\\\w/])|(?<![\w-])Llama3)": "Llama 3",
    r"\w*(normal|initial|optim|synchron|serial|material|summar|util|parallel|quant|recogn|organ|general|special|token"
    r"|minim|maxim|local|critic|emphas|categor|custom|final|stabil|regular|real)"
    r"is(e|es|ed|ing|ation|ations|er|ers)": "-ize",
    r"\w*(behaviour|colour|neighbour|favour|honour)\w*": "American spelling: -or",
    r"licences?|centred?|metres?|labell(ed|ing)|modell(ed|ing)|cancell(ed|ing)|travell(ed|ing)|analys(e|ed|es|ing)"
    r"|artefacts?|programmes?|judgements?|whilst|grey": "American spelling",
}
OPENING = re.compile(r"\s*(Of|As|What|Those|That|Whether|Which|How|Where|Who|Whose|Why)\b")
PATTERN = re.compile(
    "|".join(rf"(?P<p{i}>(?<!\w)({words.replace(' ', chr(92) + 's+')})(?!\w))" for i, words in enumerate(AVOIDED)),
    re.IGNORECASE,
)
CODE = re.compile(r"``[^`]*``|`[^`\n]*(?:\n[^`\n]+)?`|https?://\S+|\]\([^)]*\)")
SUFFIXES = {".py", ".md", ".ipynb", ".sh", ".yaml", ".yml", ".toml", ".cff"}
HERE = Path(__file__).resolve()

Finding = tuple[int, str, str]  # line, what was found, what to write instead


def check_text(text: str, first_line: int = 1) -> Iterator[Finding]:
    """Yield what `text` should not say; code in backticks, addresses and targets of links are left out."""
    text = CODE.sub(lambda code: re.sub(r"\S", "_", code[0]), text)
    for match in PATTERN.finditer(text):
        advice = list(AVOIDED.values())[int(match.lastgroup[1:])] if match.lastgroup else ""
        line = first_line + text.count("\n", 0, match.start())
        yield line, " ".join(match[0].split()), advice


def check_python(source: str) -> Iterator[Finding]:
    """Yield findings in docstrings, comments and strings of three words or more."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in nodes if isinstance(node, documented) and ast.get_docstring(node)]
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if len(re.findall(r"[A-Za-z]{2,}(?=[ \n])", text)) >= 2:
            yield from check_text(text, node.lineno)
    for owner in owners:
        if opening := OPENING.match(ast.get_docstring(owner) or ""):
            yield owner.body[0].lineno, opening[0].strip(), "open a docstring with a verb or a noun"
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    ]
    yield from check_lines({token.start[0]: token.string for token in comments})


def check_lines(lines: dict[int, str]) -> Iterator[Finding]:
    """Yield findings in comments by line number; comments on consecutive lines are one text."""
    block: list[str] = []
    for number in sorted(lines):
        block.append(lines[number].lstrip("#"))
        if number + 1 not in lines:
            yield from check_text("\n".join(block), number + 1 - len(block))
            block = []


def check_shell(source: str) -> Iterator[Finding]:
    """Yield findings in comments and in double-quoted strings."""
    lines = {}
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.search(r"(^|\s)#.*", line)
        quoted = re.findall(r'"[^"]*"', line[: comment.start()] if comment else line)
        if text := " ".join([*quoted, comment[0].strip() if comment else ""]).strip():
            lines[number] = text
    yield from check_lines(lines)


def check_markdown(source: str) -> Iterator[Finding]:
    """Yield findings in the text, and in comments inside code blocks."""
    lines, fenced = [], False
    for line in source.splitlines():
        if line.lstrip().startswith("```"):
            fenced, line = not fenced, ""
        elif fenced:
            line = line.partition("#")[2]
        lines.append(line)
    yield from check_text("\n".join(lines))


def check_notebook(source: str) -> Iterator[Finding]:
    """Yield findings in the cells, with the number of the cell for a line."""
    for number, cell in enumerate(json.loads(source)["cells"], 1):
        check = check_python if cell["cell_type"] == "code" else check_markdown
        yield from ((number, found, advice) for _, found, advice in check("".join(cell["source"])))


CHECKS = {".py": check_python, ".md": check_markdown, ".ipynb": check_notebook, ".sh": check_shell}


def check_file(path: Path) -> list[str]:
    """Return one line for each finding in a file; none for this script and for kinds of files without prose."""
    if path.suffix not in SUFFIXES or path.resolve() == HERE:
        return []
    check = CHECKS.get(path.suffix, check_text)
    findings = sorted(set(check(path.read_text(encoding="utf-8"))))
    return [f"{path}:{line}: {found!r}: {advice}" for line, found, advice in findings]


def tracked_files() -> list[Path]:
    """Return the repository's files, without links."""
    root = HERE.parents[1]
    names = subprocess.run(
        ["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [root / name for name in names if (root / name).is_file() and not (root / name).is_symlink()]


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or tracked_files()
    problems = [line for path in paths for line in check_file(path)]
    print(*problems, sep="\n", end="\n" if problems else "")
    sys.exit(bool(problems))
