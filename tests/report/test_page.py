"""report.html: of a run in every state, and with whatever text data and models hold."""

import errno
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report.made import FINDINGS, make_run

from prefopt.errors import ConfigError, RunError
from prefopt.report.page import PARTS, report_html, sizes, write_report

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
VOID = {"meta", "br", "link", "img", "input", "hr"}
NO_PROCESS = 2**22 + 1


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and text by the element that it stands in."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.mistakes: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split()).replace(" ,", ",").replace(" .", ".")

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def attributes(self) -> list[tuple[str, str, str]]:
        return [(tag, name, value or "") for tag, attributes in self.elements for name, value in attributes.items()]

    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes() if name == "id"]


def page_of(run: Path) -> Page:
    page = Page(report_html(run, now=NOW))
    assert page.mistakes == []
    assert page.open == []
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {value for tag, name, value in page.attributes() if tag == "a" and name == "href"}
    return page


STATES: dict[str, dict[str, Any]] = {
    "finished": {"findings": FINDINGS},
    "finished sft": {"method": "sft"},
    "finished without held-out data": {"num_held_out": 0},
    "finished without samples": {"samples": 0},
    "running": {"state": "running", "done": 50, "pid": os.getpid()},
    "killed": {"state": "running", "done": 50, "pid": NO_PROCESS},
    "stopped": {"state": "stopped", "done": 50, "message": "stopped after step 50 of 120, as asked"},
    "failed": {"state": "failed", "done": 50, "message": "the loss of step 51 is nan; the weights were not changed."},
    "no step done": {"state": "running", "done": 0, "pid": os.getpid()},
    "one step done": {"state": "running", "done": 1, "pid": os.getpid()},
}


PageOf = Callable[[str], Page]


@pytest.fixture(scope="module")
def in_state(tmp_path_factory: pytest.TempPathFactory) -> PageOf:
    """in_state("failed"): the page of such a run, made once."""

    @cache
    def page(state: str) -> Page:
        return page_of(make_run(tmp_path_factory.mktemp("runs") / "run", **STATES[state]))

    return page


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a page's time: this is for tests of other things."""
    monkeypatch.setattr("prefopt.report.page.drawn_groups", lambda record: [])


@pytest.mark.parametrize("state", STATES)
def test_a_page_is_made_of_a_run_in_every_state(in_state: PageOf, state: str):
    page = in_state(state)
    assert set(page.ids()) >= set(PARTS) - {"error"}
    assert "NaN" not in page.text
    assert "None" not in re.sub(r"None were sampled", "", page.text)


def test_a_finished_run_shows_all_that_is_asked_for(in_state: PageOf):
    text = in_state("finished").text
    for words in (
        "DPO: qwen-small on pairs.jsonl",
        "Finished step 120 of 120",
        "It learned what it was shown, with 1 warning",
        "Accuracy, held out 73 % ± 6 % before: 50 %",
        "Warning, after step 60 (displacement)",
        "Note, before the first step (learning_rate)",
        "44 of 60 pairs (73.3 %) have a margin above 0",
        "Learned best: largest margin",
        "Learned worst: smallest margin",
        "Before training: the reference",
        "After step 120",
        "Over time, 7 answers",
        "rows left out 12: too_long 10, same_answers 2",
        "learning rate 2e-5 (usual here: 5e-7)",
        "kl_budget not set",
        "transformers 5.23.0",
        "8177db1f36aa0eeba19f7bbf46630720044eb568",
        "/run/config.yaml --out NEW_FOLDER",
        "2026-11-21 12:00 UTC",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("state", "says", "says_not"),
    [
        ("running", ["Running step 50 of 120", "found nothing so far"], ["--resume"]),
        ("killed", ["Broken off", "Ended without a word after step 50 of 120", "no checkpoint was saved"], ["--resume"]),
        ("stopped", ["Stopped after step 50 of 120", "/config.yaml --resume"], ["How it ended"]),
        ("failed", ["Failed after step 50 of 120", "How it ended", "the loss of step 51 is nan; the weights", "--resume"], []),
        ("finished without held-out data", ["Nothing was held out"], ["--resume", "chosen, held out"]),
        ("finished without samples", ["None were sampled: the setting samples is 0."], []),
        ("finished sft", ["Perplexity, held out 12.8 before: 70.1", "likelihood per token that rose most"], ["Margin", "Rewards"]),
        ("no step done", ["No step is done yet", "It has seen no step yet"], []),
    ],
)
def test_each_state_is_told_as_it_is(in_state: PageOf, state: str, says: list[str], says_not: list[str]):
    text = in_state(state).text
    for words in says:
        assert words in text, words
    for words in says_not:
        assert words not in text, words


@pytest.mark.usefixtures("no_charts")
def test_the_examples_of_a_step_that_failed_are_shown(tmp_path: Path):
    run = make_run(tmp_path / "run", **STATES["failed"])
    line = {"step": 51, "row": "pairs.jsonl:39", "prompt": "Who?", "completions": ["He.", "She."], "figures": {"loss": "nan", "kl": "inf"},
            "prompt_ids": [44, 86]}  # fmt: skip
    (run / "bad_batch.jsonl").write_text(json.dumps(line) + "\n")
    text = page_of(run).text
    assert "The examples of the step that failed (1 example) pairs.jsonl:39 loss nan, kl inf prompt Who? chosen He. rejected She." in text
    assert "It ended in an error at the examples that are listed below" in text


@pytest.mark.usefixtures("no_charts")
def test_a_run_of_an_old_version_has_a_page_that_says_what_is_missing(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for name in ("manifest.json", "status.json", "held_out.jsonl", "samples.jsonl"):
        (run / name).unlink()
    text = page_of(run).text
    assert "made by a version without one" in text
    assert "This run left no manifest.json" in text
    assert "Accuracy, held out 73 % ± 6 %" in text


@pytest.mark.parametrize(
    "name", ["manifest.json", "status.json", "summary.json", "config.yaml", "metrics.jsonl", "held_out.jsonl", "samples.jsonl"]
)
@pytest.mark.parametrize(
    "content", [b"", b'{"step": 5, "lo', b"\xff\xfe\x00", b'{"data": [1], "model": 7, "resolved": [], "before": 3, "resumed": [4]}']
)
def test_no_broken_file_keeps_the_page_from_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes):
    run = make_run(tmp_path / "run", num_steps=40)
    (run / name).write_bytes(content)
    if name != "metrics.jsonl":  # drawing takes most of a page's time, and only these are drawn
        monkeypatch.setattr("prefopt.report.page.drawn_groups", lambda record: [])
    page_of(run)


@pytest.mark.usefixtures("no_charts")
def test_a_run_that_ended_early_says_so_and_one_that_did_not_does_not(tmp_path: Path):
    early = page_of(make_run(tmp_path / "early", done=80, settings={"early_stop": 3})).text
    assert "Finished step 80 of 120 ended early: the held-out loss fell no more" in early
    assert "ended early" not in page_of(make_run(tmp_path / "whole", settings={"early_stop": 3})).text


@pytest.mark.usefixtures("no_charts")
def test_lines_that_could_not_be_read_are_counted(tmp_path: Path):
    run = make_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{broken\n" + text + '{"step": 121, "lo')
    assert "Not in the charts, because they could not be read: 1 line of metrics.jsonl." in page_of(run).text


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "'><svg onload=alert(4)>",
    "</div></details></section></main><h1>taken over</h1>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- ]]> &lt;b&gt; &amp;",
    "`code <b>bold</b>` and --flag<i>",
    "http://evil.example/track.png",
]


def hostile_run(path: Path, text: str) -> Path:
    """A run that holds the text wherever text can come from."""
    run = make_run(
        path,
        state="failed",
        message=text,
        texts=[text],
        findings=[{"rule": text, "step": 60, "severity": "warning", "what": text, "do": text, "values": {text: 1.0}}],
        settings={"model": text, text: text, "reference": text, "chat_template": text, "data": [text]},
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, text: 1.0, f"eval/{text}": 2.0}) + "\n" for row in rows))
    (run / "bad_batch.jsonl").write_text(json.dumps({"row": text, "prompt": text, "completions": [text], "figures": {text: text}}) + "\n")
    manifest = json.loads((run / "manifest.json").read_text())
    summary = manifest["data"]["summary"]
    summary["sources"][0] |= {"name": text, "format": text, "says": text, "because": text, "unread_columns": [text]}
    summary |= {"notes": [text], "dropped": {text: 3}}
    manifest |= {"method": text, "environment": {text: text, "device": text}, "resumed": [{"step": 3, "differences": [text]}]}
    manifest["model"] |= {"name": text, "architecture": text}
    manifest["data"]["fingerprint"] = text
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(hostile_run(tmp_path_factory.mktemp("harmless") / "run", "harmless"))


def outside_of_charts(page: Page) -> list[str]:
    """The page's elements in order: those of charts go by the figures, and code by what looks like it."""
    return [tag for tag, _ in page.elements if tag not in ("path", "text", "rect", "title", "code")]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_data_and_models_shows_as_text(tmp_path: Path, harmless: Page, text: str):
    page = page_of(hostile_run(tmp_path / "run", text))
    assert page.tags() - {"code"} == harmless.tags() - {"code"}
    assert outside_of_charts(page) == outside_of_charts(harmless)
    assert {name for _, name, _ in page.attributes()} == {name for _, name, _ in harmless.attributes()}
    assert not page.tags() & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    shown = " ".join(text.replace("`", "").split())
    assert page.text.replace("`", "").count(shown) >= 15


def test_control_and_bidi_characters_are_visible_and_scripts_keep_their_joiners(tmp_path: Path):
    text = "a\u202eb\u2066c\x00d\x1be\ud800f می\u200cخواهم 👩\u200d🚀"
    raw = report_html(hostile_run(tmp_path / "run", text), now=NOW)
    assert not [char for char in "\u202e\u2066\x00\x1b\ud800" if char in raw]
    assert r"a\u202eb\u2066c\x00d\x1be\ud800f می" in raw
    assert "می\u200cخواهم 👩\u200d🚀" in raw
    path = write_report(tmp_path / "run")
    assert path.read_bytes().decode("utf-8")


def test_the_page_needs_nothing_from_elsewhere_and_forbids_it(tmp_path: Path):
    raw = report_html(make_run(tmp_path / "run", findings=FINDINGS), now=NOW)
    page = Page(raw)
    assert "http:" not in raw
    assert "https:" not in raw
    assert "url(" not in raw
    assert "@import" not in raw
    assert not {name for _, name, _ in page.attributes()} & {"src", "srcset", "action", "data", "poster", "ping"}
    assert not [name for _, name, _ in page.attributes() if name.startswith("on")]
    assert all(value.startswith("#") for _, name, value in page.attributes() if name == "href")
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    # Before anything that it is to hold for.
    assert raw.index("Content-Security-Policy") < raw.index("<style")


@pytest.mark.usefixtures("no_charts")
def test_long_texts_are_cut_with_a_word(tmp_path: Path):
    raw = report_html(make_run(tmp_path / "run", texts=["word " * 1600]), now=NOW)
    assert "more characters]" in raw
    assert len(raw) < 600_000


def test_a_usual_page_is_small_and_a_run_of_many_steps_too(tmp_path: Path):
    assert len(report_html(make_run(tmp_path / "usual", findings=FINDINGS), now=NOW)) < 300_000
    run = make_run(tmp_path / "long", num_steps=20_000, every=2000)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows[7776] = json.dumps(json.loads(rows[7776]) | {"loss": 3.25})
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    raw = report_html(run, now=NOW)
    assert len(raw) < 700_000
    assert "Beyond the axis: 3.250 at step 7,777." in raw


def test_the_same_folder_gives_the_same_page(tmp_path: Path):
    run = make_run(tmp_path / "run", findings=FINDINGS)
    assert report_html(run, now=NOW) == report_html(run, now=NOW)


@pytest.mark.usefixtures("no_charts")
def test_the_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run", num_steps=20)
    path = write_report(run)
    assert path == run / "report.html"
    whole = path.read_bytes()

    def full(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(run)
    assert path.read_bytes() == whole
    assert not [name for name in os.listdir(run) if name.endswith(".new")]


@pytest.mark.usefixtures("no_charts")
def test_a_disk_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There the draft can be neither written nor removed; the page can be put elsewhere."""
    run = make_run(tmp_path / "run", num_steps=20)
    write, unlink = Path.write_text, Path.unlink

    def guarded(original: Any) -> Any:
        def guard(self: Path, *values: Any, **settings: Any) -> Any:
            if self.is_relative_to(run):
                raise OSError(errno.EROFS, "Read-only file system")
            return original(self, *values, **settings)

        return guard

    monkeypatch.setattr(Path, "write_text", guarded(write))
    monkeypatch.setattr(Path, "unlink", guarded(unlink))
    with pytest.raises(RunError, match=r"cannot write .*report\.html: Read-only file system\. Give another place with --out"):
        write_report(run)
    assert write_report(run, tmp_path / "page.html").is_file()


@pytest.mark.usefixtures("no_charts")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=20)
    with pytest.raises(RunError, match=r"cannot write .*nowhere/page\.html: No such file"):
        write_report(run, tmp_path / "nowhere" / "page.html")
    with pytest.raises(RunError, match="Is a directory"):
        write_report(run, tmp_path)
    for odd in (Path(), Path("/"), run / "config.yaml" / "page.html", tmp_path / ("a" * 300)):
        with pytest.raises(RunError, match="cannot write"):
            write_report(run, odd)
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


def test_no_row_of_charts_has_a_hole():
    widths = {"half": 3, "third": 2, "alone": 6}
    for num in range(1, 14):
        found = [widths[size] for size in sizes(num)]
        assert len(found) == num
        assert sum(found) % 6 == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme: str):
    css = (Path(__file__).parents[2] / "src/prefopt/report/page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in re.findall(r":root \{(.*?)\n\s*\}", css, re.DOTALL))
    colours = light | (dark if theme == "dark" else {})
    for name in ("ink", "muted", "train", "held", "chosen", "rejected", "good", "warning", "note", "open", "mixed"):
        for ground in ("card", "page", "well"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    """The ratio that the accessibility guidelines of the web define: 4.5 is enough for text."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
