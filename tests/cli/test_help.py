"""Help: complete, quick, and without torch."""

import resource
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from prefopt.cli import main
from prefopt.cli.entry import COMMANDS
from prefopt.cli.words import flag_of
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for

PROMISED = [
    "model",
    "data",
    "out",
    "beta",
    "label-smoothing",
    "batch-size",
    "epochs",
    "learning-rate",
    "lr-schedule",
    "warmup-ratio",
    "weight-decay",
    "max-grad-norm",
    "max-length",
    "max-tokens",
    "precision",
    "max-steps",
    "save-every-steps",
    "eval-data",
    "eval-fraction",
    "eval-every-steps",
    "lora-rank",
    "target-modules",
    "gradient-checkpointing",
    "reference-cache",
    "seed",
    "config",
    "resume",
]
"""The names that people were promised; none may go."""


def help_of(*words: str) -> str:
    page = StringIO()
    assert main([*words, "--help"], console=Console(file=page, width=120)) == 0
    return page.getvalue()


def test_promised_flags_are_there():
    page = help_of("train", "dpo")
    missing = [name for name in PROMISED if f"│ --{name} " not in page and f"│ --{name}\n" not in page]
    assert missing == []


@pytest.mark.parametrize("method", [row.name for row in METHODS])
def test_every_setting_of_a_method_has_its_flag_and_its_sentence(method: str):
    page = " ".join(help_of("train", method).replace("│", " ").split())
    for name, info in settings_for(next(row for row in METHODS if row.name == method).load()).model_fields.items():
        assert f" {flag_of(name)} " in page
        assert info.description, f"{name} needs help"
        assert info.description.replace("`", "").split(" ")[0] in page


def test_defaults_and_choices_are_shown_as_users_write_them():
    page = " ".join(help_of("train", "dpo").replace("│", " ").split())
    assert "[choices: cosine, linear, constant] [default: cosine]" in page
    assert "--reference-cache on|off" in page
    assert "[default: on]" in page
    assert "[default: 5e-07, for an adapter" in page
    assert "starts from. [required]" in page
    assert "None" not in page
    assert "[]" not in page


def test_groups_list_what_is_in_them():
    assert all(f"│ {name} " in help_of() for name in COMMANDS)
    assert all(f"│ {row.name} " in help_of("train") and row.summary[:40] in help_of("train") for row in METHODS)


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[1 : lines.index("")]
    assert [line.split()[0] for line in table if line[0] != " "] == [row.name for row in METHODS]


@pytest.mark.parametrize(
    "words", [(), *((name,) for name in COMMANDS), *(("train", row.name) for row in METHODS), ("--version",), ("methods",)]
)
def test_help_is_quick_and_loads_no_torch(words: tuple[str, ...]):
    # Processor time, which other work on the machine stretches little, and the best of three.
    asked = [*words] if words in (("--version",), ("methods",)) else [*words, "--help"]
    heavy = "sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    code = f"import sys, prefopt.cli; rc = prefopt.cli.main({asked}); print(rc, {heavy}, file=sys.stderr)"
    limit = 0.5 if words in ((), ("train",), ("--version",)) else 2.0  # groups, and single commands
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert ended.stderr.strip() == "0 []"
        if took[-1] < limit:
            return
    pytest.fail(f"{' '.join(asked)} took {min(took):.2f} s, and {limit} s are allowed")


def test_importing_prefopt_loads_no_torch():
    code = """
import sys, prefopt
assert not {"torch", "pydantic"} & set(sys.modules)
assert prefopt.Policy.__name__ == "Policy"
assert prefopt.losses.dpo_loss
assert not {"losses", "Policy", "sweep", "train"} - set(dir(prefopt))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
