"""Whatever the files of a folder hold, there is a page and a card, or one sentence that says why not."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.report.made import make_run

from prefopt.report.card import model_card
from prefopt.report.page import report_html

KEYS = st.sampled_from(
    [
        *(
            "state",
            "step",
            "num_steps",
            "pid",
            "started",
            "updated",
            "message",
            "prefopt",
            "method",
            "settings",
            "resolved",
            "learning_rate",
        ),
        *("usual_learning_rate", "precision", "engine", "max_length", "model", "name", "architecture", "num_parameters", "num_trained"),
        *("adapter", "data", "fingerprint", "summary", "num_train", "num_held_out", "environment", "resumed", "differences", "time"),
        *("before", "after", "eval/loss", "rewards/margin", "rewards/accuracy", "logps/chosen", "kl", "loss", "samples/length", "beta"),
        *("reference", "lora_rank", "batch_size", "epochs", "max_steps", "lr_schedule", "warmup_ratio", "seed", "samples", "kl_budget"),
        *("early_stop", "sources", "dropped", "notes", "num_rows", "mean_answer", "prompt_share", "template", "model_step", "best"),
        *("training_seconds", "device", "versions", "row", "prompt", "completions", "lengths", "weight", "text", "ended", "num_tokens"),
        *("repetition", "entropy", "rule", "severity", "what", "do", "values", "figures", "host"),
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["running", "failed", "finished", "2026-11-21"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=6),
    max_leaves=12,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=12)
SINGLE = ("manifest.json", "status.json", "summary.json", ".lock", "config.yaml")
LINES = ("metrics.jsonl", "held_out.jsonl", "samples.jsonl", "watch.jsonl", "bad_batch.jsonl")


@given(
    single=st.dictionaries(st.sampled_from(SINGLE), OBJECTS), lines=st.dictionaries(st.sampled_from(LINES), st.lists(OBJECTS, max_size=3))
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_keeps_page_or_card_from_being_made(
    tmp_path_factory: pytest.TempPathFactory, single: dict[str, Any], lines: dict[str, list[Any]]
):
    run = make_run(tmp_path_factory.mktemp("fuzz") / "run", num_steps=4, every=2, num_held_out=3, samples=1)
    for name, value in single.items():
        (run / name).write_text(json.dumps(value), encoding="utf-8")
    for name, rows in lines.items():
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        if "metrics.jsonl" not in lines:  # drawing takes most of the time, and only these are drawn
            patch.setattr("prefopt.report.page.drawn_groups", lambda record: [])
        patch.setattr("prefopt.report.draw.draw_spread", lambda spread: "")
        assert report_html(run, now=datetime(2026, 11, 21, 12, tzinfo=UTC)).endswith("</html>")
    assert model_card(run).startswith("---\n")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "\x00" * 100, "!!python/object:os.system", "&a [*a]"])
def test_nothing_is_too_odd_to_be_passed_over(tmp_path: Path, content: str):
    run = make_run(tmp_path / "run", num_steps=4, every=2, num_held_out=3)
    for name in (*SINGLE, *LINES):
        (run / name).write_text(content, encoding="utf-8")
    assert "Unknown" in report_html(run, now=datetime(2026, 11, 21, 12, tzinfo=UTC))
    assert model_card(run).startswith("---\n")
