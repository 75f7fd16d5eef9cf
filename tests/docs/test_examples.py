"""Every Python example of the docs runs, and prints what the page says it prints."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import CLEANED, PAGES, ROOT, Block, blocks, name_of, shows

TUTORIAL = ROOT / "docs" / "tutorial.md"
"""Its blocks need each other's files and the commands between them: `test_tutorial.py` runs all of it."""

KINDS = {"python", "sh", "yaml", "json", "text", *CLEANED}

WITH_PYTHON = [page for page in PAGES if page != TUTORIAL and any(block.kind == "python" for block in blocks(page))]


def run_block(block: Block, namespace: dict[str, Any]) -> str:
    """What it prints. What it raises comes with the page's name and line."""
    printed = StringIO()
    code = compile("\n" * block.line + block.text, block.place, "exec")
    with redirect_stdout(printed), redirect_stderr(printed):
        exec(code, namespace)
    return printed.getvalue()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_examples_run(page: Path, workshop: Path):
    namespace: dict[str, Any] = {"__name__": "example"}
    printed = ""
    for block in blocks(page):
        if block.kind == "python":
            printed = run_block(block, namespace)
        elif block.kind in CLEANED:
            missing = shows(block.text, printed, block.kind)
            assert missing is None, f"{block.place} shows {missing!r}; the block above prints:\n{printed}"
            assert block.text.strip(), f"{block.place} shows nothing; the block above prints:\n{printed}"


def test_blocks_are_of_a_known_kind():
    """A block with a misspelt language would be one that nothing looks at."""
    unknown = [f"{block.place}: {block.kind}" for page in PAGES for block in blocks(page) if block.kind not in KINDS]
    assert unknown == []


def test_python_is_not_hidden_in_blocks_of_another_kind():
    """Text that imports something is Python that does not run. Scripts for other libraries say so in their first line."""
    hidden = [
        block.place
        for page in PAGES
        for block in blocks(page)
        if block.kind not in ("python", "yaml", "json")
        and not block.text.startswith("# TRL")
        and any(line.startswith(("import ", "from ", ">>> ")) for line in block.text.splitlines())
    ]
    assert hidden == []


def test_an_example_that_fails_fails_with_its_line():
    block = Block(ROOT / "README.md", 7, "python", "a = 1\nb = nothing\n")
    with pytest.raises(NameError) as caught:
        run_block(block, {})
    assert caught.traceback[-1].lineno == 8  # counted from 0: the second line of a block that opens on line 7


@pytest.mark.parametrize(
    ("kind", "shown", "printed", "missing"),
    [
        ("text output", "a 1\nb 2\n", "a 1\nc\nb 2\n", None),
        ("text output", "a 1\n", "a 2\n", "a 1"),
        ("text output", "b\na\n", "a\nb\n", "a"),
        ("text like", "loss 0.69  tok/s 1,024 ...\n", "loss 0.71 tok/s 9 and more\n", None),
        ("text like", "step 20, warning: KL\n", "step 3, warning: length\n", "step 20, warning: KL"),
        ("text sample", "policy: Yes.\nfree words\n", "policy: No.\n", None),
        ("text sample", "policy: Yes.\n", "reference: Yes.\n", "policy: Yes."),
    ],
)
def test_what_a_page_shows_is_compared(kind: str, shown: str, printed: str, missing: str | None):
    assert shows(shown, printed, kind) == missing
