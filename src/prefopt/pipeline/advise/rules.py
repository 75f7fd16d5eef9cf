"""The decision tree, as one table: a condition, what is advised then, why, and who says so.

    warnings   every row that holds is said above the advice: what may make it wrong
    first      every row that holds is said: what comes before the method
    method     the first row that holds decides. A row of methods that are not in prefopt yet is said, and the next one decides what
               to do until they are
    settings   every row that holds sets something; of all weights or an adapter one row holds at most

Conditions are in `signs`, values in `choices`. docs/choosing.md shows this table: `make docs` writes it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prefopt.methods.table import METHODS, MethodRow
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.choices import batch_size, epochs, error_rate, evaluated, max_length, what_fits
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.signs import Sign

Topic = Literal["warnings", "first", "method", "settings"]

Values = Callable[[Facts], Mapping[str, Any]]

OURS = "our own choice"
ONLINE = "arXiv 2203.02155; arXiv 2402.03300"
"""PPO and GRPO."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row.

    Attributes:
        sign: gives the figures by which it holds; its docstring is the condition in words.
        then: what is advised.
        why: the reason.
        source: who says so: a page of the docs, a paper, or we.
        methods: those that would do, the best first; empty: it is about no method, or no method will do.
        settings: of the run, name -> value, by the facts.
    """

    sign: Sign
    then: str
    why: str
    source: str
    methods: tuple[str, ...] = ()
    settings: Values = field(default=lambda facts: {})

    @property
    def when(self) -> str:
        """The condition in words, with its thresholds."""
        return (inspect.getdoc(self.sign) or "").format_map(vars(signs)).replace("%", " %").rstrip(".")

    @property
    def method(self) -> str | None:
        """The first of its methods that prefopt has."""
        return next((name for name in self.methods if row_of(name) is not None), None)

    @property
    def advice(self) -> str:
        """What is advised, and whether it cannot be done yet."""
        return f"{self.then} (not in prefopt yet)" if self.methods and self.method is None else self.then

    @property
    def said_by(self) -> str:
        """Who says so, in Markdown."""
        return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", self.source)


def row_of(name: str) -> MethodRow | None:
    """The method's row, where there is such a method."""
    return next((row for row in METHODS if row.name == name), None)


def to(**values: Any) -> Values:
    """Settings: a function is asked what follows from the facts, anything else is the value itself."""
    return lambda facts: {name: value(facts) if callable(value) else value for name, value in values.items()}


RULES: Mapping[Topic, tuple[Rule, ...]] = {
    "warnings": (
        Rule(
            signs.has_unread_verdicts,
            "a column looks like a verdict and is not read: rename or rewrite it, and ask again",
            "SFT would learn bad answers as well as good ones",
            "[data](data.md)",
        ),
        Rule(
            signs.is_contrary,
            "see whether chosen and rejected, or the scores, are the wrong way round: the order counts, not the scores",
            "Trained on pairs the wrong way round, a model learns what is worse",
            "[data](data.md)",
        ),
        Rule(
            signs.is_one_opening,
            "held-out data from elsewhere (`--eval-data`), and other prompts to learn from",
            "Rows that open alike are held out together or not at all, and of one prompt a model learns that prompt",
            "[data](data.md)",
        ),
        Rule(
            signs.is_nothing_fitting,
            "a smaller model, or more memory: nothing fits",
            "`prefopt plan` says what it tried",
            "[plan](plan.md)",
        ),
    ),
    "first": (
        Rule(signs.are_too_few, "collect more: a few hundred clean ones", "So few say little, and none of them can be held out", OURS),
        Rule(
            signs.is_untuned,
            "SFT on the good answers (`stages: [sft, ...]`)",
            "The reference is to be a model that can do the task: DPO without SFT 4.76 on MT-Bench, SFT 6.64, SFT and DPO 7.00 (Zephyr)",
            "arXiv 2310.16944; [sft](methods/sft.md)",
        ),
        Rule(
            signs.is_untuned_for_pairs,
            "or, in the place of both, `orpo`, which does them in one run",
            "Its loss holds that of SFT, and it needs no reference",
            "[orpo](methods/orpo.md)",
        ),
        Rule(
            signs.is_model_unknown,
            "make sure that the model had SFT on this task; `--model MODEL` looks",
            "The reference is to be a model that can do the task",
            "[dpo](methods/dpo.md)",
        ),
        Rule(
            signs.are_beside,
            "SFT on all good answers, then the method on what is judged (`stages: [sft, ...]`)",
            "Preference methods cannot read answers of which nothing is said, and SFT learns from both",
            "[sft](methods/sft.md)",
        ),
        Rule(
            signs.has_strays,
            "a file for each kind, all of them together",
            "A file is read as the kind that most of its first hundred rows have, and the rest of it is lost",
            "[data](data.md)",
        ),
        Rule(
            signs.has_copies,
            "keep one of each, but not of verdicts: two on the same answers are two, whether or not they agree",
            "An example that is there n times counts n times, and is learned by heart first",
            "arXiv 2107.06499",
        ),
        Rule(
            signs.is_judged_already,
            "that there is no judge does not matter here: what is judged already is used",
            "A judge is for answers that nobody has judged",
            OURS,
        ),
        Rule(
            signs.may_be_verdicts,
            "add a column that says who judged, which tells verdicts from copies; until then keep all of them",
            "How many verdicts are wrong follows from how often two agree, and without such a column two that agree look like a copy",
            "[data](data.md)",
        ),
        Rule(
            signs.is_chance,
            "look at the verdicts before you train on them",
            "What people do not agree on cannot be learned",
            "[robust](methods/robust.md)",
        ),
    ),
    "method": (
        Rule(
            signs.is_weightless,
            "weights above 0 for what is to be learned",
            "An example of weight 0 adds nothing to the loss: nothing would be learned",
            "[data](data.md)",
        ),
        Rule(
            signs.needs_shaping,
            "not DPO or its kin: PPO or GRPO, with the rewards as they are",
            "A pair says which answer is better and nothing else; the reward that DPO implies cannot be shaped",
            ONLINE,
            ("ppo", "grpo"),
        ),
        Rule(
            signs.needs_shaping_of_pairs,
            "`reward`, a reward model of the pairs, as one of the rewards",
            "A pair is one judgement on a whole answer, and so is this reward: what is shaped is added to it",
            "[reward](methods/reward.md)",
            ("reward",),
        ),
        Rule(
            signs.needs_shaping_of_thumbs,
            "keep the thumbs as one of the rewards",
            "KTO is of DPO's kin, and a reward model here learns from pairs",
            "[kto](methods/kto.md); [reward](methods/reward.md)",
        ),
        Rule(
            signs.has_reward_model,
            "PPO or GRPO against the reward model",
            "It judges answers that the model gives now, where pairs judge those that were collected once",
            ONLINE,
            ("ppo", "grpo"),
        ),
        Rule(
            signs.can_be_checked,
            "PPO or GRPO with a checker as the reward",
            "A checker judges as many answers as there is time to sample, and alike each time",
            "arXiv 2402.03300",
            ("grpo", "ppo"),
        ),
        Rule(
            signs.has_no_judge,
            "no preference method: `sft` on good answers, of people or of a better model; `kto` once users leave thumbs",
            "All of them learn from answers of which some are known to be better: what is not judged has nothing for them",
            "[sft](methods/sft.md); [kto](methods/kto.md)",
            ("sft",),
        ),
        Rule(
            signs.is_prompts,
            "answers first: let a model answer each prompt several times (`prefopt generate`) and have them judged, or write good ones",
            "Every method here learns from answers that somebody or something has judged",
            OURS,
        ),
        Rule(
            signs.is_all_down,
            "good answers first: then `kto`",
            "With thumbs down alone nothing says what to do in the place of what is shown",
            "[kto](methods/kto.md)",
        ),
        Rule(
            signs.is_all_up,
            "`sft` on the answers with a thumb up",
            "With one kind of thumbs nothing tells good from bad: these are demonstrations",
            "[kto](methods/kto.md)",
            ("sft",),
        ),
        Rule(
            signs.is_graded,
            "`kto` on all as they are; or pairs of a good and a bad answer to one prompt (`recipes/graded_pairs.py`), and `dpop` with "
            "`penalty` 5 (`recipes/code.yaml`)",
            "KTO leads because it reads all thumbs as they are, those that find no partner among them; no difference was told apart. "
            "Of 195 held-out GSM8K pairs KTO on all thumbs was right in 54 %, DPO-Positive on "
            "the pairs in 55 %, DPO in 60 % (standard error 4 %), and the right answers lost 9.5 nats, gained 0.3 and lost 2.7",
            "[dpop](methods/dpop.md); [kto](methods/kto.md); [experiments](experiments.md)",
            ("kto",),
        ),
        Rule(signs.is_thumbs, "`kto`", "It learns from thumbs as they are, without pairs", "[kto](methods/kto.md)", ("kto",)),
        Rule(
            signs.is_demonstrations,
            "`sft`; for a preference method, let the model answer each prompt several times (`prefopt generate`) and have them judged",
            "Preference methods need answers that are worse, too",
            "[sft](methods/sft.md)",
            ("sft",),
        ),
        Rule(
            signs.is_ranked,
            "`dpo --plackett-luce`",
            "A whole order says more than its pairs, and every answer is run once",
            "[dpo](methods/dpo.md); arXiv 2305.18290",
            ("dpo",),
            to(plackett_luce=True),
        ),
        Rule(
            signs.is_edited,
            "`dpop` with `penalty` 5",
            "Where two answers differ in few tokens, DPO takes the chosen one down with the other: on GSM8K pairs by 3.5 nats, where a "
            "penalty of 5 kept it (+0.6) and was right no less often (74 % of 98, DPO 70 %, the paper's penalty of 50 64 %)",
            "[dpop](methods/dpop.md); [experiments](experiments.md)",
            ("dpop",),
            to(penalty=5.0),
        ),
        Rule(
            signs.is_noise_known,
            "`robust` with the rate as `label_smoothing`",
            "Its loss is right on average under labels that are wrong at that rate",
            "[robust](methods/robust.md)",
            ("robust",),
            to(label_smoothing=error_rate),
        ),
        Rule(
            signs.is_noise_seen,
            "conservative DPO: `dpo --label-smoothing 0.1`; have some pairs judged twice, with a column that says who judged, and `robust` "
            "can be told the rate",
            "Some verdicts are wrong, and there is no rate to tell robust DPO",
            "[dpo](methods/dpo.md); [robust](methods/robust.md)",
            ("dpo",),
            to(label_smoothing=0.1),
        ),
        Rule(
            signs.are_few_pairs,
            "`ipo`",
            "DPO overfits to few pairs; IPO's margin stops growing",
            "[ipo](methods/ipo.md); [experiments](experiments.md)",
            ("ipo",),
        ),
        Rule(
            signs.is_longer_better,
            "`dpo`, and look at the length of what it writes; `rdpo` where answers are not to grow longer",
            "DPO learns the taste for length. R-DPO does not, and was right less often on UKP's arguments: 65 % of 716 held-out pairs, DPO "
            "70 %; where the shorter one was chosen 64 %, DPO 60 %",
            "[rdpo](methods/rdpo.md); [experiments](experiments.md)",
            ("dpo", "rdpo"),
        ),
        Rule(
            signs.is_pairs,
            "`dpo`, for chat, style and safety; `ipo` where its margins run away",
            "Pairs are what it is made for, and most is known about it",
            "[dpo](methods/dpo.md)",
            ("dpo",),
        ),
    ),
    "settings": (
        Rule(signs.is_adapter, "go on with the adapter", "It is the model as it is", "[plan](plan.md)", settings=what_fits),
        Rule(signs.is_full_too_large, "LoRA, or QLoRA", "It is what fits", "[plan](plan.md)", settings=what_fits),
        Rule(signs.is_full_fitting, "all weights", "They fit, and nothing is given up", "[plan](plan.md)", settings=what_fits),
        Rule(
            signs.is_few,
            "several epochs, and the model of the best evaluation",
            "One pass teaches little of few examples; held-out loss says when it has been enough",
            "[watch](watch.md); [ipo](methods/ipo.md)",
            settings=lambda facts: {"epochs": epochs(facts), **evaluated(facts, early_stop=2)},
        ),
        Rule(
            signs.is_short,
            "a smaller batch",
            "A step of AdamW moves a weight by the learning rate at most: few steps change nothing",
            "[watch](watch.md)",
            settings=to(batch_size=batch_size),
        ),
        Rule(
            signs.is_unbalanced, "`balance`", "It raises the weight of the rarer thumb", "[kto](methods/kto.md)", settings=to(balance=True)
        ),
        Rule(
            signs.is_faulty,
            "`on_bad_row: drop`",
            "Otherwise the run stops at the first; dropped.jsonl beside the run names each",
            "[data](data.md)",
            settings=to(on_bad_row="drop"),
        ),
        Rule(
            signs.is_raw_for_chats,
            "`text_as: chat`",
            "The model answers in its template; the same text without it is another task",
            "[data](data.md)",
            settings=to(text_as="chat"),
        ),
        Rule(
            signs.is_too_long,
            "a longer `max_length`",
            "Prompts are cut from the left to fit, and what still does not fit is left out",
            "[data](data.md)",
            settings=to(max_length=max_length),
        ),
    ),
}
"""The decision tree."""
