"""Settings as flags: help, parsing and values all come from the fields of `Settings` classes.

cyclopts finds the command and draws the help. The words after the command are cut into flags and values here and
go to `prefopt.config.check` as they are, so that every mistake, in flags and in a YAML file alike, is reported at once.

    --batch-size 8           a value
    --data a.jsonl b.jsonl   several; also --data a.jsonl --data b.jsonl
    --columns chosen=best    pairs; also --columns.chosen best
    --resume                 on; also --resume on, --resume off
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, get_args, get_origin

from cyclopts import App, Group, Parameter
from pydantic.fields import FieldInfo

from prefopt.cli.words import choices_of, default_of, flag_of, is_switch, metavar_of, plain_type
from prefopt.config import Settings, check, from_yaml, nearest, printable, report, shown
from prefopt.errors import ConfigError

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Panel:
    """Settings that the help shows together.

    Attributes:
        title: stands above them.
        fields: name -> definition.
        defaults: name -> what the help says in place of the definition's default.
        hint: says of a name that none of them has where it is known, as the end of a sentence; empty where it is not.
    """

    title: str
    fields: Mapping[str, FieldInfo]
    defaults: Mapping[str, str] = field(default_factory=dict)
    hint: Callable[[str], str] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What was given, before any of it is checked.

    Attributes:
        values: name of a setting -> its words.
        mistakes: name, or the word itself where it names nothing -> what is wrong with it.
        spelled: name -> how it is written where the user gave it, or would give it.
        source: where the values come from.
    """

    values: dict[str, Any]
    mistakes: dict[str, str]
    spelled: dict[str, str]
    source: str = "the command line"

    def over(self, values: Mapping[str, Any], source: str) -> "Given":
        """These values on top of others: a flag replaces the key of a file."""
        in_file = values.keys() - self.values.keys()
        spelled = {name: spelling for name, spelling in self.spelled.items() if name not in in_file}
        where = f"{source} and the command line" if self.values or self.mistakes else source
        return Given({**values, **self.values}, self.mistakes, spelled, where)

    def check(self, kind: type[S]) -> S:
        """As settings of that kind.

        Raises:
            ConfigError: names every mistake.
        """
        return check(kind, self.values, source=self.source, spelled=self.spelled, mistakes=self.mistakes)

    def refuse_mistakes(self) -> None:
        """For values that are checked elsewhere.

        Raises:
            ConfigError: names every mistake in the words themselves.
        """
        if self.mistakes:
            raise ConfigError(
                report([f"{self.spelled.get(name, name)}: {message}" for name, message in self.mistakes.items()], self.source)
            )


def command(
    run: Callable[[Given], object], panels: Sequence[Panel], *, positional: str | None = None, word: str = "FILE"
) -> Callable[..., object]:
    """A function that cyclopts takes as a command: it shows one flag per setting, and calls `run` with what was given.

    Args:
        run: the command.
        panels: its settings.
        positional: the setting that takes the words which belong to no flag.
        word: what help calls such a word.
    """

    def call(*words: str) -> object:
        return run(parse(words, panels, positional=positional))

    parameters = [
        shown_flag(name, info, panel, Group(panel.title, sort_key=place))
        for place, panel in enumerate(panels)
        for name, info in panel.fields.items()
        if name != positional
    ]
    # cyclopts reads signatures; this one shows the settings, while all words go to `parse`.
    call.__signature__ = inspect.Signature([all_words(panels, positional, word), *parameters])  # type: ignore[attr-defined]  # functions have it unnamed
    call.__annotations__ = {}
    return call


def all_words(panels: Sequence[Panel], positional: str | None, word: str) -> inspect.Parameter:
    """The parameter that takes every word of the command line, flags too; help shows it where words may stand alone."""
    info = next((info for panel in panels for name, info in panel.fields.items() if name == positional), None)
    parameter = Parameter(allow_leading_hyphen=True, show=False)
    if info is not None:
        parameter = Parameter(allow_leading_hyphen=True, name=word, metavar="", help=sentence(info))
    return inspect.Parameter("words", inspect.Parameter.VAR_POSITIONAL, annotation=Annotated[str, parameter])


def shown_flag(name: str, info: FieldInfo, panel: Panel, group: Group) -> inspect.Parameter:
    """A setting as help shows it."""
    default = panel.defaults.get(name) or default_of(info)
    parameter = Parameter(
        name=flag_of(name),
        help=sentence(info),
        group=group,
        metavar=metavar_of(info),
        choices=choices_of(info),
        show_default=default or False,
        negative=(),
        parse=False,
        show=True,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="", annotation=Annotated[str, parameter])


def sentence(info: FieldInfo) -> str:
    """What a setting does, and whether it must be given."""
    return f"{info.description} [required]" if info.is_required() else str(info.description)


def parse(words: Sequence[str], panels: Sequence[Panel], *, positional: str | None = None) -> Given:
    """The values that the words give, and what is wrong with the words themselves."""
    fields = {name: info for panel in panels for name, info in panel.fields.items()}
    given, unknown, alone = cut(words, fields)
    if positional and alone:
        given[positional] = [*given.get(positional, []), *alone]
    values: dict[str, Any] = {}
    mistakes: dict[str, str] = {}
    for name, texts in given.items():
        try:
            values[name] = value_of(fields[name], texts)
        except ValueError as error:
            mistakes[name] = str(error)
    for flag in unknown:
        name = flag.lstrip("-").replace("-", "_")
        hints = [hint for panel in panels if name not in fields and panel.hint and (hint := panel.hint(name))]
        mistakes[flag] = f"no such flag{hints[0] if hints else nearest(name, fields, flag_of)}"
    if alone and not positional:
        # In quotes where it would be taken for nothing, or for the setting of that name.
        words_alone = " ".join(alone)
        mistakes[repr(words_alone) if not words_alone.strip() or words_alone in fields else words_alone] = "belongs to no flag"
    return Given(values, mistakes, {name: flag_of(name) for name in fields})


def cut(words: Sequence[str], fields: Mapping[str, FieldInfo]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """The words by the setting whose flag they follow; flags of no setting; words that follow no flag."""
    given: dict[str, list[str]] = {}
    unknown: list[str] = []
    alone: list[str] = []
    takes, room, prefix = alone, 0.0, ""  # whose words come next, how many of them, and what stands before each
    for word in words:
        if not is_flag(word):
            (takes if room else alone).append(prefix + word if room else word)
            room = max(room - 1, 0)
            continue
        flag, equals, value = word.partition("=")
        name, key = setting_of(flag, fields)
        if name is None:
            unknown.append(flag)
            takes, room, prefix = [], math.inf, ""  # the words after it were meant for it, whatever it is
            continue
        several = get_origin(plain_type(fields[name])) in (list, dict) and not key
        takes, room, prefix = given.setdefault(name, []), math.inf if several else 1, f"{key}=" if key else ""
        if equals:
            takes.append(prefix + value)
            room = 0
    return given, unknown, alone


def setting_of(flag: str, fields: Mapping[str, FieldInfo]) -> tuple[str | None, str]:
    """The setting that a flag names, and the key in it: `--columns.chosen` is a key of `columns`."""
    written, _, key = flag.partition(".")
    for name, info in fields.items():
        if flag_of(name) == written and (not key or get_origin(info.annotation) is dict):
            return name, key
    return None, ""


def is_flag(word: str) -> bool:
    """Whether a word is written as a flag: `-` is standard input, and -1e-6 a number."""
    return re.match(r"-{1,2}[a-zA-Z]", word) is not None


def value_of(info: FieldInfo, given: list[str]) -> Any:
    """The words given to a setting, as a value that the settings class can check.

    Raises:
        ValueError: too few or too many words, a pair without its `=`, or a name twice.
    """
    kind = plain_type(info)
    if not given and is_switch(info):
        return True
    if not given:
        raise ValueError(f"needs a value ({info.description})")
    if get_origin(kind) is list:
        return given
    if get_origin(kind) is dict:
        pairs = [pair(text, as_yaml=get_args(kind)[1] is Any) for text in given]
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"gives {printable(twice)} twice")
        return dict(pairs)
    if len(given) > 1:
        raise ValueError(f"takes one value (given: {' '.join(given)})")
    return given[0]


def pair(text: str, *, as_yaml: bool) -> tuple[str, Any]:
    """`key=value`; where values may be of any type they are read as YAML: `enable_thinking=false`.

    Raises:
        ValueError: there is no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"takes pairs written name=value (given: {text})")
    try:
        return key, from_yaml(value) if as_yaml else value
    except ValueError:
        raise ValueError(f"the value of {key} is not YAML (given: {shown(value)})") from None


def settings_app(
    name: str,
    kind: type[S],
    run: Callable[[S], object],
    *,
    usage: str,
    positional: str | None = None,
    word: str = "FILE",
    without: Sequence[str] = (),
) -> App:
    """A command whose flags are the settings of one class, without those that it does not read."""
    fields = {setting: info for setting, info in kind.model_fields.items() if setting not in without}
    app = App(name=name, usage=f"Usage: prefopt {usage}")
    app.default(command(lambda given: run(given.check(kind)), [Panel("Settings", fields)], positional=positional, word=word))
    return app
