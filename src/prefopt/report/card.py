"""The model card: what stands in the README of a trained model, for whoever gets it.

A card travels further than the machine that it was made on, so no path of that machine is in it: of folders and files
only the last name, and of free text whatever looks like a path is shortened the same way. What was not measured is said.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefopt.methods.table import METHODS
from prefopt.report.facts import data_notes, data_rows, key_settings, manifest_rows, source_rows, worded
from prefopt.report.figures import Change, changes
from prefopt.report.files import read_json
from prefopt.report.findings import passed
from prefopt.report.record import RunRecord, listed, mapping, read_run
from prefopt.report.state import RunState
from prefopt.report.text import count, integer, model_label, one_line, visible
from prefopt.report.verdict import FEW, judge, what_it_cost, what_was_learned

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""How names on the hub are written; a folder may be named so too."""

PATH = re.compile(r"(?<![\w:/\\])(?:~|\.{1,2}|[A-Za-z]:)?(?:[\\/][^\s\\/:*?\"<>|'`,;()]+)+[\\/]?")
"""A path in free text: it begins with a slash, or with what stands for a folder."""

PLACES = ("model", "adapter", "reference", "data", "eval_data", "out", "cache_dir", "chat_template")
"""Settings that hold paths: what they say is looked for in free text as it stands, for paths may hold spaces."""

LEFT_OUT = frozenset({"out", "cache_dir", "resume", "overwrite", "data_workers", "device", "report", "report_to", "memory_check"})
"""Settings that say nothing of the model."""

CARD_ROWS = 40
"""Sources that are listed one by one."""


def model_card(folder: Path, *, merged: str = "") -> str:
    """The card of a run's model.

    Args:
        folder: of the run. Its `summary.json` should be there: without it the figures are those of the newest evaluation.
        merged: where the card is that of base and adapter as one model: how they were merged, in Markdown.

    Returns:
        Markdown, with the front matter that the hub reads.

    Raises:
        ConfigError: the folder holds no run.
    """
    record = read_run(folder)
    adapter = record.is_adapter and not merged
    parts = [
        f"---\n{yaml.safe_dump(front_matter(record, adapter=adapter), sort_keys=False, allow_unicode=True)}---\n",
        f"# {escaped(title(record))}\n",
        *what_it_is(record, adapter=adapter, of_two=bool(merged)),
        *(["## How it was merged\n", merged] if merged else []),
        "## How to load it\n",
        *loading(record, adapter=adapter),
        "## Training data\n",
        *data_part(record),
        "## Settings\n",
        *settings_part(record),
        "## Results\n",
        *results(record),
        "## What the watch found\n",
        *watch_part(record),
        "## Versions\n",
        table(
            ("what", "value"), [row for row in manifest_rows(record, unknown_state()) if row[0] not in ("model", "last written")], record
        ),
        "## Limits\n",
        *limits(record),
    ]
    return "\n".join(parts)


def unknown_state() -> RunState:
    """A state that says nothing: a card is about a model, and its times are those of the manifest."""
    return RunState("unknown", 0, None)


def title(record: RunRecord) -> str:
    """The model's name, as far as there is one."""
    base = base_of(record)
    return f"{base}, trained with {record.method.upper()}" if base else f"A model trained with {record.method.upper()}"


def base_of(record: RunRecord) -> str:
    """The name of the model that training began with: a hub name whole, of a folder the last name."""
    name = record.base_name
    return name if name and name == hub_base(record) else model_label(name).split("/")[-1]


def hub_base(record: RunRecord) -> str:
    """The base's name where others find it on the hub, else empty."""
    return hub_name(noted_base(record) or record.base_name)


def noted_base(record: RunRecord) -> str:
    """What the trained adapter itself names as its base; empty where it names none, or none was trained.

    Of a folder it has the whole path; a relative one, as it was given, looks like a name of the hub to whoever stands elsewhere.
    """
    return str((read_json(record.files.model / "adapter_config.json") or {}).get("base_model_name_or_path") or "")


def hub_name(name: str) -> str:
    """The name where it is one of the hub; empty where it is a folder's, or could be nothing else."""
    try:
        is_here = Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return ""
    return name if HUB_NAME.fullmatch(name) and not is_here else ""


def front_matter(record: RunRecord, *, adapter: bool) -> dict[str, Any]:
    """What the hub reads of a card."""
    base = hub_base(record)
    datasets = [name for entry in listed(record.settings.get("data")) if (name := hub_name(str(entry).partition(":")[0]))]
    tags = [
        "prefopt",
        *([record.method] if record.method else []),
        *(["preference-optimization"] if record.is_pairs or record.is_thumbs else []),
    ]
    return {
        "library_name": "peft" if adapter else "transformers",
        **({"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"} if base else {}),
        "pipeline_tag": "text-classification" if record.is_reward_model else "text-generation",
        **({"datasets": sorted(set(datasets))} if datasets else {}),
        "tags": [*tags, *(["reward-model"] if record.is_reward_model else []), *(["lora"] if adapter else [])],
    }


def what_it_is(record: RunRecord, *, adapter: bool, of_two: bool) -> list[str]:
    """What the model is, in a few sentences; `adapter`: it needs its base; `of_two`: base and adapter in one."""
    idea = next((row.summary for row in METHODS if row.name == record.method), "")
    what = "An adapter for" if adapter else "One model of a trained adapter and its base" if of_two else "All weights of"
    base = f"`{base_of(record)}`" if base_of(record) else "a model"
    architecture = str(mapping(record.manifest.get("model")).get("architecture") or "")
    shape = f" ({architecture})" if architecture else ""
    packed = packed_base(record)
    held = f" In training the base was held in {packed}." if packed else ""
    return [f"{what} {base}{shape}, trained with prefopt. {escaped(idea)}{held}\n"]


def packed_base(record: RunRecord) -> str:
    """How the base was compressed while the adapter was trained, in words; empty: not at all."""
    return str(mapping(record.manifest.get("model")).get("quantisation") or "")


def loading(record: RunRecord, *, adapter: bool) -> list[str]:
    """The code that loads it, and what a prompt must look like."""
    if record.is_reward_model:
        return loading_reward(record, adapter=adapter)
    imports, model, remark = loader(record, adapter=adapter)
    is_chat = bool(mapping(record.data.get("summary")).get("template"))
    ask = (
        ['messages = [{"role": "user", "content": "How do I boil an egg?"}]',
         'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)']
        if is_chat
        else ['prompt = tokenizer("How do I boil an egg?", return_tensors="pt")']
    )  # fmt: skip
    code = [
        *imports,
        "",
        'folder = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *model,
        *ask,
        "answer = model.generate(**prompt, max_new_tokens=100)",
        'print(tokenizer.decode(answer[0][prompt["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    words = [f"```python\n{chr(10).join(code)}\n```\n"]
    if remark:
        words.append(f"{remark}\n")
    if adapter and packed_base(record):
        words.append(
            "This loads the base unquantised, which is close to what the adapter was trained on, not the same. As in training: "
            '`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)` where '
            "the base is loaded.\n"
        )
    if not is_chat:
        words.append(
            "It was trained on prompts as plain text, without a chat template; give them to it in the form of the training data.\n"
        )
    return words


def loader(record: RunRecord, *, adapter: bool) -> tuple[list[str], list[str], str]:
    """The lines that import what loads the model, those that load it, and what is to be known about that; the last may be empty."""
    if not adapter:
        whole = "model = AutoModelForCausalLM.from_pretrained(folder)"
        return ["from transformers import AutoModelForCausalLM, AutoTokenizer"], [whole], ""
    one_model = "`prefopt merge` makes one model of both"
    if base := hub_base(record):
        both = "model = AutoPeftModelForCausalLM.from_pretrained(folder)"
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        return imports, [both], f"It is an adapter: peft loads its base, `{base}`, too. {one_model}."
    # The adapter's own note of its base is a folder of the machine that it was trained on, and peft would look for it there.
    lines = ['base = AutoModelForCausalLM.from_pretrained("path/to/base")', "model = PeftModel.from_pretrained(base, folder)"]
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    name = model_label(noted_base(record) or record.base_name).split("/")[-1].replace("`", "'")
    remark = (
        f"It is an adapter, and its base{f' `{name}`' if name else ''} is not in this folder: it was read from another one when this was "
        "trained. Whoever gets the adapter needs that very model too, and writes its place for `path/to/base`. "
        f"{one_model}, which needs nothing else."
    )
    return imports, lines, remark


def loading_reward(record: RunRecord, *, adapter: bool) -> list[str]:
    """The same of a reward model."""
    is_chat = bool(mapping(record.data.get("summary")).get("template"))
    scored = (
        ['answers = ["Eight minutes in boiling water.", "I do not know."]',
         'chats = [[{"role": "user", "content": "How do I boil an egg?"}, {"role": "assistant", "content": answer}] for answer in answers]',
         "# rstrip: the score is read at the token that ends an answer, and some templates write a line break behind it",
         "texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip() for chat in chats]",
         'batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")']
        if is_chat
        else ['texts = ["How do I boil an egg? Eight minutes in boiling water.", "How do I boil an egg? I do not know."]',
              'batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")']
    )  # fmt: skip
    model = ["model = AutoModelForSequenceClassification.from_pretrained(folder)"]
    imports = ["from transformers import AutoModelForSequenceClassification, AutoTokenizer"]
    if adapter:
        base = hub_base(record) or "path/to/base"
        imports.insert(0, "from peft import PeftModel")
        model = [
            f'base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1)',
            "base.config.pad_token_id = tokenizer.pad_token_id",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    code = [
        *("import torch", *imports, "", 'folder = "path/to/this/folder"', "tokenizer = AutoTokenizer.from_pretrained(folder)"),
        *(*model, *scored, "with torch.no_grad():", "    print(model(**batch).logits.squeeze(-1))"),
    ]
    words = (
        "It is a reward model: it gives one score to a prompt with an answer, and cannot write. Only differences of scores mean something, "
        "and those between answers to the same prompt most. The score is read at the last token that is not padding, which must be the one "
        "that ends an answer: pad with this tokenizer, whose padding token ends none.\n"
    )
    if adapter:
        words += "\nIt is an adapter with a score layer; `prefopt merge` makes one model of it and its base.\n"
    return [f"```python\n{chr(10).join(code)}\n```\n", words]


def data_part(record: RunRecord) -> list[str]:
    """What it was trained on."""
    summary = mapping(record.data.get("summary"))
    sources = [(name, rows, read_as) for name, rows, read_as, _ in source_rows(summary)]
    parts = [table(("source", "rows", "read as"), sources[:CARD_ROWS], record)] if sources else []
    if len(sources) > CARD_ROWS:
        parts.append(f"and {count(len(sources) - CARD_ROWS)} more sources\n")
    parts.append(table(("what", "value"), data_rows(record), record))
    parts += [f"- {escaped(scrubbed(note, record))}" for note in data_notes(record)]
    return [*parts, ""] if data_notes(record) else parts


def settings_part(record: RunRecord) -> list[str]:
    """Those that decide most as a table, and all of them."""
    decisive = [(name, value) for name, value in key_settings(record) if name != "model"]
    lines = [
        f"{name}: {one_line(scrubbed(worded(named(name, value)), record), 200)}"
        for name, value in record.settings.items()
        if name not in LEFT_OUT
    ]
    every = "\n".join(line.replace("`", "'") for line in lines)
    return [
        table(("setting", "value"), decisive, record),
        f"<details><summary>All settings</summary>\n\n```text\n{visible(every)}\n```\n\n</details>\n",
    ]


def named(name: str, value: Any) -> Any:
    """A setting's value without folders."""
    if name not in PLACES or value is None:
        return value
    return [shared_name(str(entry)) for entry in value] if isinstance(value, list) else shared_name(str(value))


def shared_name(name: str) -> str:
    """A hub name whole, of a path the last name; a template is no path."""
    if "\n" in name or "{" in name:
        return name
    return name if hub_name(name.partition(":")[0]) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def results(record: RunRecord) -> list[str]:
    """Held-out figures before and after."""
    figures = changes(record)
    rows = [result_row(change) for change in figures.values() if change.after is not None]
    sentences = [what_was_learned(record, figures, judge(figures)), what_it_cost(record, figures)]
    words = [f"{escaped(scrubbed(sentence, record))}\n" for sentence in sentences if sentence]
    if not rows:
        return words
    about = "± is the standard error of the figure after training, over the held-out examples; where there is none it is not known.\n"
    return [*words, table(("held out", "before", "after", "±", "examples"), rows, record), about]


def result_row(change: Change) -> Sequence[str]:
    """A row of the results' table."""
    unit = f" ({change.metric.unit})" if change.metric.unit else ""
    error = change.shown_error() if change.error else "–"
    return (f"{change.metric.label}{unit}", change.shown_before(), change.shown_after(), error, count(change.num) if change.num else "–")


def watch_part(record: RunRecord) -> list[str]:
    """What was found while it trained."""
    if not record.findings:
        looked = (
            "The rules that watched the training found nothing." if record.manifest else "Nothing is known: no watch looked at this run."
        )
        return [f"{looked}\n"]
    lines, figures = [], changes(record)
    for finding in record.findings:
        when = f"after step {finding.step:,}" if finding.step else "before the first step"
        kind = "Warning" if finding.is_warning else "Note"
        what, do = (escaped(scrubbed(one_line(words, 1000), record), code=True) for words in (finding.what, finding.do))
        over = f" {words}" if (words := passed(finding, record, figures)) else ""
        lines.append(f"- **{kind}**, {when}: {what}{over} *{do}*")
    return [*lines, ""]


def limits(record: RunRecord) -> list[str]:
    """What the figures do not say."""
    lines = []
    if record.num_held_out:
        few = f", and {record.num_held_out} examples are few" if record.num_held_out < FEW else ""
        lines.append(
            f"The figures are about {count(record.num_held_out)} held-out examples of the same kind{few}; on others nothing was measured."
        )
    else:
        lines.append("Nothing was held out: there are no figures on prompts that it was not trained on.")
    if record.is_reward_model:
        lines.append(
            "Accuracy says how often it ranks two given answers as the data does. Answers unlike those of the data, a policy's that is "
            "trained on these scores above all, it may score high for no good reason."
        )
    elif record.is_pairs:
        lines.append(
            "Accuracy says how often it ranks two given answers as the data does. That is no proof that its own answers are better: "
            "nobody has compared those."
        )
    elif record.is_thumbs:
        lines.append(
            "Accuracy says how often its reward of a given answer agrees with the thumb. That is no proof that its own answers are better: "
            "nobody has judged those."
        )
    lines.append(
        "No evaluation of safety, truthfulness or bias was run, and no benchmark. It may repeat what its data and its base model hold."
    )
    if (longest := integer(record.resolved.get("max_length"))) is not None:
        lines.append(f"Prompts with answers had at most {count(longest)} tokens in training.")
    lines.append("The licences of the base model and of the data hold for it too; this card does not know them.")
    return [f"- {line}" for line in lines] + [""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], record: RunRecord) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(escaped(scrubbed(one_line(cell, 300), record)) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def scrubbed(text: str, record: RunRecord) -> str:
    """The text without paths: those that the settings name, and whatever else looks like one, are cut to their last name."""
    for place in sorted(known_places(record.settings), key=len, reverse=True):
        text = text.replace(place, shared_name(place))
    return PATH.sub(lambda found: re.split(r"[\\/]", found.group().rstrip("\\/"))[-1], text)


def known_places(settings: Mapping[str, Any]) -> set[str]:
    """The paths that the settings name; hub names are none."""
    given = [settings.get(name) for name in PLACES]
    values = [entry for value in given for entry in (value if isinstance(value, list) else [value])]
    return {str(entry) for entry in values if isinstance(entry, str) and shared_name(entry) not in ("", entry)}


def escaped(text: str, *, code: bool = False) -> str:
    """The text as Markdown shows it, without markup of its own.

    Args:
        text: in one line.
        code: keep `code`.
    """
    marks = r"\*_[]<>|#~" if code else r"\`*_[]<>|#~"
    pieces = re.split(r"(`[^`]*`)", visible(text)) if code else [visible(text)]
    return "".join(
        piece.replace("|", "\\|").replace("<", "&lt;") if code and place % 2 else re.sub(f"([{re.escape(marks)}])", r"\\\1", piece)
        for place, piece in enumerate(pieces)
    )
