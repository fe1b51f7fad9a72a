"""Small and plain is a promise like any other: the top level, lines, length, density."""

import ast
import io
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = ["dataset.py", "lora.py", "trainer.py", "validate_pipeline.py"]


def code_lines(source):
    """(lines that hold code, tokens on them), without comments and docstrings."""
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines, tokens, before = set(), 0, tokenize.INDENT
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and before in layout
        if token.type not in layout and not is_docstring:
            tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
        before = token.type
    return len(lines), tokens


def test_four_files_that_one_person_reads_in_a_morning():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.partition("/")[0] for name in tracked} or {path.name for path in ROOT.iterdir()}
    if tracked:
        assert sorted(name for name in top if name.endswith(".py")) == MODULES
        assert {name for name in top if not name.startswith(".")} == {
            *MODULES,
            "requirements.txt",
            "README.md",
            "tests",
            "LICENSE",
            "pyproject.toml",
        }
    sources = [(ROOT / name).read_text() for name in MODULES]
    lines = [source.splitlines() for source in sources]
    assert all(len(of_one) <= 400 for of_one in lines)  # 300 when they are rebuilt as the formatter has them
    assert max(len(line) for of_one in lines for line in of_one) <= 110
    code, tokens = map(sum, zip(*map(code_lines, sources), strict=True))
    print(f"{tokens / code:.1f} tokens a code line")
    assert tokens / code < 11
    [main] = [node for node in ast.parse(sources[2]).body if getattr(node, "name", "") == "main"]
    assert main.end_lineno - main.lineno < 80
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
