"""Small and plain is a promise like any other: the top level, lines, density."""

import collections
import io
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
# As the user ordered. These numbers may only fall.
LINES = dict.fromkeys(("dataset.py", "lora.py", "trainer.py", "validate_pipeline.py"), 300)
TOKENS_A_LINE, DENSE_LINES, DENSE = 11.1, 0.275, 15  # a line with more than 15 tokens is dense


def code_lines(source):
    """Tokens of each line that holds code, {line number: tokens}; comments and docstrings are no code."""
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines, before, in_fstring = collections.Counter(), tokenize.INDENT, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        in_fstring -= kind == "FSTRING_END"  # from Python 3.12 on, an f-string is many tokens: count one
        is_docstring = token.type == tokenize.STRING and before in layout
        if token.type not in layout and not is_docstring and not in_fstring:
            lines.update(dict.fromkeys(range(token.start[0], token.end[0] + 1), 0))
            lines[token.start[0]] += kind != "FSTRING_END"
        in_fstring += kind == "FSTRING_START"
        before = token.type
    return lines


def test_four_files_and_no_other_module():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.partition("/")[0] for name in tracked} or {path.name for path in ROOT.iterdir()}
    if tracked:
        others = {"requirements.txt", "README.md", "tests", "LICENSE", "pyproject.toml"}
        assert {name for name in top if not name.startswith(".")} == others | LINES.keys()
    tokens = []  # of each code line
    for name, limit in LINES.items():
        source = (ROOT / name).read_text()
        assert len(source.splitlines()) <= limit, name
        tokens += code_lines(source).values()
    dense = sum(number > DENSE for number in tokens) / len(tokens)
    print(f"{sum(tokens) / len(tokens):.2f} tokens a code line, {dense:.1%} over {DENSE}")
    assert sum(tokens) / len(tokens) <= TOKENS_A_LINE and dense <= DENSE_LINES
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190
