"""The pages of the documentation, as tests read them: code blocks, links, settings that they name.

A block's language is the first word behind its three backticks:

    python        runs; all blocks of a page share one namespace and one folder, from top to bottom
    sh            lines of a terminal; each `prefopt ...` in it must be a command line that prefopt takes
    yaml          settings, of the method that it names or of any
    text output   what the block above it prints, number by number
    text like     the same but for its numbers: those of a machine, or of the time it took
    text sample   the same but for the words of a model, which stand behind a colon or alone on their line
    text          anything else

Blocks without a language are taken for `sh`.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Those that users read: their examples must work."""

LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
"""Those whose links must lead somewhere."""

GENERATED = {"settings.md", "cli.md", "architectures.md"}
"""Pages that are made from the code; what they name is there by construction."""

FENCE = re.compile(r"^( *)```+ *(.*)$")
NUMBER = re.compile(r"[-+−]?\d[\d,.:]*(?:e[-+]?\d+)?")
PRECISION = re.compile(r"float32(?! twin)|bf16, trained weights in float32")


@dataclass(frozen=True)
class Block:
    """A block of code: the page, the line on which it begins, what kind it is, its text."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    inside: list[str] | None = None
    kind, start, indent = "", 0, 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            kind, start, indent, inside = fence[2].strip() or "sh", number, len(fence[1]), []
        elif inside is not None and fence and not fence[2]:
            found.append(Block(page, start, kind, "\n".join(inside) + "\n"))
            inside = None
        elif inside is not None:
            inside.append(line[indent:])
    assert inside is None, f"{name_of(page)}:{start}: a block that does not end"
    return found


def blocks_of(kind: str, pages: Iterable[Path] = PAGES) -> list[Block]:
    return [block for page in pages for block in blocks(page) if block.kind == kind]


def prose(page: Path) -> str:
    """The page without its blocks of code; the lines stay where they were."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        is_fence = FENCE.match(line) is not None
        lines.append("" if inside or is_fence else line)
        inside = inside != is_fence
    return "\n".join(lines)


def spans(page: Path) -> Iterator[str]:
    """What stands between single backticks."""
    return (span[1] for span in re.finditer(r"`([^`\n]+)`", prose(page)))


def links(page: Path) -> list[str]:
    """Targets of links and images, but for the web's."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.MULTILINE)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the web pages of repositories make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def commands(block: Block) -> list[list[str]]:
    """The command lines of prefopt in a block: their words behind the name, comments and pipes left out."""
    found = []
    for line in joined(block.text):
        words = shlex.split(line, comments=True)
        for stop in ("|", ">", "2>", "&&", "&"):
            words = words[: words.index(stop)] if stop in words else words
        if "prefopt" in words and (words[0] not in ("pip", "git") and words[:2] != ["python", "-c"]):
            found.append(words[words.index("prefopt") + 1 :])
    return found


def joined(text: str) -> list[str]:
    """Lines, those that end in a backslash put together with the next."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def without_numbers(line: str) -> str:
    """A line of output with a mark for each number, and for what differs between machines."""
    return " ".join(NUMBER.sub("#", PRECISION.sub("(precision)", line)).split())


def without_words(line: str) -> str:
    """A line of output up to what a model says."""
    head, colon, _ = line.partition(": ")
    return head if colon and head.islower() else ""


CLEANED: dict[str, Callable[[str], str]] = {"text output": str.rstrip, "text like": without_numbers, "text sample": without_words}
"""What of a line of output must be as the page shows it, by the kind of block."""


def shows(shown: str, printed: str, kind: str) -> str | None:
    """Whether lines of a page stand, in their order, in what was printed; the first that does not, else None.

    A page shows what matters: lines may be left out, and one that ends in dots goes on.
    """
    clean = CLEANED[kind]
    lines = iter([clean(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        begin, dots, _ = line.rstrip().partition("...")
        wanted = clean(begin)
        if not wanted:
            continue
        if not any(candidate.startswith(wanted) if dots else candidate == wanted for candidate in lines):
            return line
    return None
