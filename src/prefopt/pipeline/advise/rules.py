"""The decision tree, as one table: a condition, what is advised then, why, and who says so.

    method     the first row that holds decides. A row of methods that are not in prefopt yet is said, and the next one decides what
               to do until they are
    before     what comes before the method
    weights    the first that holds decides: all weights, or an adapter
    settings   every row that holds sets something
    data       every row that holds is said: what to do with the data first

Numbers that belong to a method are read from it, and so is what it is good for; thresholds are in `signs` and `gauge`, each with its
reason. docs/choosing.md shows this table: `make docs` writes it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

from prefopt.methods.kto import STILL_BALANCED
from prefopt.methods.table import METHODS, MethodRow
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.choices import batch_size, epochs, error_rate, eval_every, held_out, max_length, ways_changes
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.signs import Sign
from prefopt.pipeline.plan_settings import PlanSettings

Topic = Literal["method", "before", "weights", "settings", "data"]
TOPICS: tuple[Topic, ...] = get_args(Topic)

Values = Callable[[Facts], Mapping[str, Any]]

OURS = "our own choice"
INSTRUCT = "arXiv 2203.02155"
GRPO = "arXiv 2402.03300"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row.

    Attributes:
        topic: what it is about.
        sign: gives the figures by which it holds; its docstring is the condition in words.
        then: what is advised; `{later}` stands for a remark on methods that are not in prefopt yet.
        why: the reason; empty: what the method's own file says it is good for.
        source: who says so; empty: the method's page.
        methods: those that would do, the best first; of the topic `method` alone. None: it is about no method; empty: no method will do.
        settings: of the run, name -> value, by the facts.
    """

    topic: Topic
    sign: Sign
    then: str
    why: str = ""
    source: str = ""
    methods: tuple[str, ...] | None = None
    settings: Values = field(default=lambda facts: {})

    @property
    def name(self) -> str:
        """What it is called: its condition, and its method."""
        return "-".join([self.topic, self.sign.__name__.removeprefix("is_"), *(self.methods or ())[:1]]).replace("_", "-")

    @property
    def when(self) -> str:
        """The condition in words."""
        words = (inspect.getdoc(self.sign) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
        return words[:1].lower() + words[1:]

    @property
    def method(self) -> str | None:
        """The first of its methods that prefopt has."""
        return next((name for name in self.methods or () if row_of(name) is not None), None)

    @property
    def advice(self) -> str:
        """What is advised, with what is not there yet."""
        missing = [name for name in self.methods or () if row_of(name) is None]
        later = f" ({' and '.join(missing)}: not in prefopt yet)" if missing else ""
        return self.then.replace("{later}", later)

    @property
    def reason(self) -> str:
        """Why."""
        return self.why or good_for(self.method or "dpo")

    @property
    def said_by(self) -> str:
        """Who says so, in Markdown."""
        if self.source:
            return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", self.source)
        return f"[{self.method}](methods/{self.method}.md)"


def row_of(name: str) -> MethodRow | None:
    """The method's row, where there is such a method."""
    return next((row for row in METHODS if row.name == name), None)


def good_for(name: str) -> str:
    """When to use the method, as its own file says."""
    row = row_of(name)
    assert row is not None, name
    found = re.search(r"^When to use it: (.*?)(?=^\S[^:\n]*: |\n\n)", import_module(row.module).__doc__ or "", re.MULTILINE | re.DOTALL)
    assert found is not None, f"{name} does not say when to use it"
    return " ".join(found[1].split()).rstrip(".")


def default_of(name: str, setting: str) -> Any:
    """The default that a method has for a setting of its own."""
    row = row_of(name)
    assert row is not None, name
    return row.load().settings_class.model_fields[setting].default


def to(**values: Any) -> Values:
    """Settings: a function is asked what follows from the facts, anything else is the value itself."""
    return lambda facts: {name: value(facts) if callable(value) else value for name, value in values.items()}


RULES: tuple[Rule, ...] = (
    Rule(
        "method",
        signs.needs_shaping,
        "not DPO or its kin: PPO or GRPO, with the rewards as they are{later}",
        "A pair says which answer is better and nothing else: the reward that DPO implies comes from the pairs alone, and cannot be shaped",
        f"{INSTRUCT}; {GRPO}",
        ("ppo", "grpo"),
    ),
    Rule(
        "method",
        signs.has_reward_model,
        "PPO or GRPO against the reward model{later}",
        "A strong reward model judges answers that the model gives now, where pairs judge those that were collected once",
        f"{INSTRUCT}; {GRPO}",
        ("ppo", "grpo"),
    ),
    Rule(
        "method",
        signs.can_be_checked,
        "PPO or GRPO with a checker as the reward{later}",
        "A checker judges as many answers as there is time to sample, and alike each time; pairs or thumbs say which of a few were right",
        GRPO,
        ("grpo", "ppo"),
    ),
    Rule(
        "method",
        signs.is_prompts,
        "no method yet: let a model answer each prompt several times (`prefopt generate`), have the answers judged, and come back with "
        "pairs, rankings or thumbs; or write good answers, for `sft`",
        "Every method of this family learns from answers that somebody or something has judged",
        OURS,
        (),
    ),
    Rule(
        "method",
        signs.is_all_down,
        "no method yet: find good answers too",
        "With thumbs down alone a model learns to avoid everything that it is shown, and nothing says what to do in its place",
        "[kto](methods/kto.md)",
        (),
    ),
    Rule(
        "method",
        signs.is_all_up,
        "`sft` on the answers with a thumb up",
        "With one kind of thumbs nothing tells good from bad: these are demonstrations",
        "[kto](methods/kto.md)",
        ("sft",),
    ),
    Rule("method", signs.is_thumbs, "`kto`", methods=("kto",)),
    Rule(
        "method",
        signs.is_demonstrations,
        "`sft`; then, for a preference method, pairs: let the model answer each prompt several times (`prefopt generate`) and have the "
        "answers judged",
        "Nothing here says what is worse. Where pairs cannot be made, SFT on the best answers is all that offline data gives",
        "[sft](methods/sft.md)",
        ("sft",),
    ),
    Rule(
        "method",
        signs.is_ranked,
        "`dpo --plackett-luce`",
        "A whole order says more than its pairs, and every answer is run once",
        "[dpo](methods/dpo.md); arXiv 2305.18290",
        ("dpo",),
        to(plackett_luce=True),
    ),
    Rule("method", signs.is_edited, "`dpop`", methods=("dpop",)),
    Rule(
        "method",
        signs.is_noise_known,
        "`robust` with the rate as `label_smoothing`",
        methods=("robust",),
        settings=to(label_smoothing=error_rate),
    ),
    Rule(
        "method",
        signs.is_noise_seen,
        "conservative DPO: `dpo --label-smoothing`; have some pairs judged twice, and `robust` can be told the rate",
        "Some verdicts are wrong, and two verdicts on the same answers are too rare to tell how many",
        "[dpo](methods/dpo.md); [robust](methods/robust.md)",
        ("dpo",),
        to(label_smoothing=lambda facts: default_of("robust", "label_smoothing")),
    ),
    Rule("method", signs.are_few_pairs, "`ipo`", methods=("ipo",)),
    Rule("method", signs.is_own_and_longer, "`simpo`", methods=("simpo",)),
    Rule("method", signs.is_longer_better, "`rdpo`", methods=("rdpo",)),
    Rule("method", signs.is_uneven, "`ln-dpo`", methods=("ln-dpo",)),
    Rule("method", signs.is_pairs, "`dpo`, for chat, style and safety; `ipo` where its margins run away", methods=("dpo",)),
    Rule(
        "before",
        signs.is_untuned,
        "SFT on the good answers first (`stages: [sft, ...]`), or `orpo` on pairs, which does both in one run",
        "The reference is to be a model that can do the task. Zephyr on MT-Bench: DPO without SFT 4.76, SFT 6.64, DPO after SFT 7.00",
        "arXiv 2310.16944; [sft](methods/sft.md); [orpo](methods/orpo.md)",
    ),
    Rule(
        "before",
        signs.is_strange,
        "pairs of the model's own answers (`prefopt generate`, judged) would teach more; else SFT on the good answers first",
        "A preference method moves probability among answers that the model gives; those that it never gives hardly matter to it",
        "arXiv 2404.14367; [sft](methods/sft.md)",
    ),
    Rule(
        "before",
        signs.is_model_unknown,
        "make sure that the model had SFT on this task; with `--model` its answers, its learning rate and the memory are looked at",
        "The reference is to be a model that can do the task",
        "[dpo](methods/dpo.md)",
    ),
    Rule("weights", signs.is_nothing_fitting, "a smaller model, or more memory: nothing fits", "`prefopt plan` says what it tried", OURS),
    Rule(
        "weights",
        signs.is_adapter,
        "go on with the adapter",
        "It is the model as it is, and its reference too",
        "[plan](plan.md)",
        settings=ways_changes,
    ),
    Rule(
        "weights",
        signs.is_full_too_large,
        "an adapter (LoRA, or QLoRA)",
        "It is what fits",
        "[plan](plan.md)",
        settings=ways_changes,
    ),
    Rule(
        "weights",
        signs.is_large_for_few,
        "an adapter (LoRA), though all weights would fit",
        "So few examples settle little of so many weights; an adapter is small, and as easily thrown away",
        OURS,
        settings=to(lora_rank=PlanSettings.model_fields["lora_rank"].default),
    ),
    Rule("weights", signs.is_full_fitting, "all weights", "Nothing is given up, and it fits", "[plan](plan.md)", settings=ways_changes),
    Rule(
        "settings",
        signs.is_few,
        "several epochs, a tenth held out, and the model of the best evaluation",
        "One pass teaches little of few examples, and several may be too many: held-out loss says when it has been enough",
        "[watch](watch.md); [ipo](methods/ipo.md)",
        settings=to(epochs=epochs, early_stop=2),
    ),
    Rule(
        "settings",
        signs.is_short,
        "a smaller batch, for some tens of steps",
        "A step of AdamW moves a weight by the learning rate at most: few steps change nothing",
        "[watch](watch.md)",
        settings=to(batch_size=batch_size),
    ),
    Rule(
        "settings",
        signs.is_unbalanced,
        "`balance`",
        f"Up should weigh {STILL_BALANCED[0]:g} to {STILL_BALANCED[1]:g} times what down weighs",
        "[kto](methods/kto.md)",
        settings=to(balance=True),
    ),
    Rule(
        "settings",
        signs.is_faulty,
        "`on_bad_row: drop`, which names each in dropped.jsonl beside the run",
        "Otherwise the run stops at the first, which is right while you can still mend them",
        "[data](data.md)",
        settings=to(on_bad_row="drop"),
    ),
    Rule(
        "settings",
        signs.is_raw_for_chats,
        "`text_as: chat`",
        "The model answers questions in its template; the same text without it is another task",
        "[data](data.md)",
        settings=to(text_as="chat"),
    ),
    Rule(
        "settings",
        signs.is_too_long,
        "a longer `max_length`",
        "Prompts are cut from the left to fit, and what still does not fit is left out",
        "[data](data.md)",
        settings=to(max_length=max_length),
    ),
    Rule(
        "data",
        signs.is_chance,
        "look at the verdicts before you train on them",
        "What people do not agree on cannot be learned",
        "[robust](methods/robust.md)",
    ),
    Rule(
        "data",
        signs.has_copies,
        "keep one of each; where several people judged the same answers, the verdict of most",
        "An example that is there n times counts n times, and is learned by heart first",
        "arXiv 2107.06499",
    ),
    Rule(
        "data",
        signs.has_leaks,
        "hold out examples of your own (`eval_data`), or remove near copies first",
        "Held-out figures are too good where the model has seen the question; prefopt keeps equal openings on one side, not similar ones",
        "[data](data.md)",
    ),
    Rule(
        "data",
        signs.is_broken,
        "look at some of them, and mend the encoding",
        "The model learns to write what it reads",
        OURS,
    ),
)
"""The decision tree."""

ALWAYS = to(eval_fraction=held_out, eval_every_steps=eval_every)
"""Settings that every run of a method gets."""
