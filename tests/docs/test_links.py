"""Links in the docs lead somewhere."""

from pathlib import Path

import pytest
from tests.docs.pages import LINKED, PAGES, ROOT, anchors, links, name_of


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path):
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        if not found.exists() or (anchor and (found.suffix != ".md" or anchor not in anchors(found))):
            broken.append(target)
    assert broken == []


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs" / "README.md"
    reached = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert {page for page in PAGES if page.parent == index.parent and page != index} <= reached


def test_the_index_is_reached_from_the_readme():
    assert "docs/README.md" in links(ROOT / "README.md")


def test_anchors_are_those_of_headings(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# What *it* is\n\n## `--resume` and [links](x.md)\n\n```sh\n# no heading\n```\n\n## 3. A step\n\n## 3. A step\n")
    assert anchors(page) == {"what-it-is", "--resume-and-links", "3-a-step", "3-a-step-1"}
