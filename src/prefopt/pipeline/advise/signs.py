"""The conditions of the rules: each reads the facts, and gives the figures by which it holds, in words; empty where it does not hold."""

import re
from collections.abc import Callable

from prefopt.data.kinds import PLURAL
from prefopt.data.thumbs import LABELS, WORDS
from prefopt.methods.kto import STILL_BALANCED
from prefopt.pipeline.advise.choices import FEW, TOO_FEW, default, steps_of_default
from prefopt.pipeline.advise.facts import Count, Facts, counted
from prefopt.training.watching.start import ENOUGH_STEPS, UNKNOWN_TEXT

Sign = Callable[[Facts], str]

MOSTLY = 0.5
"""Share from which on data is taken to be of a sort (maths, code) as a whole."""

EDITED = 0.3
"""Share of pairs that differ in few words only from which on it is what the data is about."""

TOLD_TWICE = 50
"""Couples of verdicts on the same answers from which on a rate can be told: of 50, one in ten is 5 with a standard error of 2."""

NOISY = 0.05
"""Rate of wrong verdicts from which on a loss should know about them; below it DPO's own softness does."""

BY_CHANCE = 0.6
"""Agreement below which verdicts are little better than coins: at 0.6 more than one in four is wrong."""

CONTRADICTED = 0.01
"""Share of pairs of answers with verdicts both ways that shows noise where its rate cannot be told."""

BOTH_KINDS = 0.3
"""Share of prompts with a right and a wrong answer from which on pairs of them are worth making."""

LONGER = 0.6
"""Share of pairs won by the longer answer that is a strong bias, if chance does not explain it (three standard errors)."""

MOST_NAMED = 3
"""Files that are named."""

DOUBTFUL = 0.01
"""Share from which on copies are worth removing, a limit of length is worth raising, and scores against the order are no accident."""

LIKE_A_VERDICT = frozenset(
    re.findall(
        r"\w+",
        "label score rating rate rank ranking correct correctness preference preferred vote reward grade thumb feedback verdict winner "
        "quality helpfulness accepted upvote like liked",
    )
)
"""Words in the name of a column that says how good an answer is."""

WHAT_IS_READ = (
    f"read as a thumb is a column {' or '.join(LABELS)} that says 1, 0, -1, {', '.join(word for word in WORDS if word.isalpha())}"
)


def has_unread_verdicts(facts: Facts) -> str:
    """Answers of which nothing is said in what is read, and a column that is not read and is called like a verdict."""
    if facts.kind not in ("demonstration", "prompts"):
        return ""
    found = [column for column in facts.unread if looks_like_a_verdict(column)]
    if not found:
        return ""
    names = ", ".join(found[:MOST_NAMED]) + (" ..." if len(found) > MOST_NAMED else "")
    return f"not read: {names}; {WHAT_IS_READ}"


def looks_like_a_verdict(column: str) -> bool:
    """Whether a column is called like something that says how good an answer is."""
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower())
    return any(word in LIKE_A_VERDICT or word.removesuffix("s") in LIKE_A_VERDICT for word in words)


def is_contrary(facts: Facts) -> str:
    """In {DOUBTFUL:.0%} of rows or more the scores contradict the order: a worse answer has the higher one."""
    found = facts.contrary
    return f"in {found:rows} a worse answer has the higher score" if found.share >= DOUBTFUL else ""


def is_one_opening(facts: Facts) -> str:
    """All rows open with the same, two of them or more."""
    return f"all {facts.num_examples:,} examples open with the same" if facts.one_opening and facts.num_examples > 1 else ""


def is_weightless(facts: Facts) -> str:
    """All weights are 0."""
    return f"the weights of all {facts.num_examples:,} examples are 0" if not facts.weight else ""


def needs_shaping(facts: Facts) -> str:
    """The user needs rewards of another form than better and worse."""
    return "rewards are shaped, as you say" if "shaped-rewards" in facts.have else ""


def needs_shaping_of_pairs(facts: Facts) -> str:
    """The same, and two answers or more, of which one is better."""
    return is_pairs(facts) if needs_shaping(facts) else ""


def needs_shaping_of_thumbs(facts: Facts) -> str:
    """The same, and single answers with thumbs of both kinds."""
    return is_thumbs(facts) if needs_shaping(facts) else ""


def has_reward_model(facts: Facts) -> str:
    """The user has a strong reward model."""
    return "there is a strong reward model, as you say" if "reward-model" in facts.have else ""


def can_be_checked(facts: Facts) -> str:
    """A program could tell right answers from wrong: final answers, tests, constraints, right answers in a column, for {MOSTLY:.0%}."""
    found = facts.content
    if "checker" in facts.have:
        return "there is a checker, as you say"
    for words, count in (
        (f"{found.numeric:good answers} end in a final answer that could be checked", found.numeric),
        (f"{found.tests:examples} bring tests", found.tests),
        (f"{found.constraints:examples} name constraints that a program can check", found.constraints),
        (f"{found.truths:examples} bring the right answer, which others can be compared with", found.truths),
    ):
        if count.share >= MOSTLY:
            return words
    return ""


def has_no_judge(facts: Facts) -> str:
    """The user has nobody and nothing to judge answers: no pairs, and no way to make them."""
    return "nothing can judge answers, as you say" if "no-judge" in facts.have and facts.kind in ("demonstration", "prompts") else ""


def is_judged_already(facts: Facts) -> str:
    """The user has nobody and nothing to judge answers, and there are answers that are judged."""
    if facts.kind == "prompts" or facts.kind == "demonstration" or "no-judge" not in facts.have:
        return ""
    return f"there are {counted(facts.num_examples, PLURAL[facts.kind])}"


def is_prompts(facts: Facts) -> str:
    """Questions that nobody has answered."""
    return f"{counted(facts.num_examples, 'prompts')}, and no answers" if facts.kind == "prompts" else ""


def is_all_down(facts: Facts) -> str:
    """Thumbs down alone."""
    return f"{facts.counts.num_down:,} thumbs down, none up" if facts.kind == "thumbs" and not facts.counts.num_up else ""


def is_all_up(facts: Facts) -> str:
    """Thumbs up alone."""
    return f"{facts.counts.num_up:,} thumbs up, none down" if facts.kind == "thumbs" and not facts.counts.num_down else ""


def is_graded(facts: Facts) -> str:
    """Thumbs up and down on answers to the same prompt, for {BOTH_KINDS:.0%} of prompts or more."""
    found = facts.thumbs
    if not is_thumbs(facts) or found.graded.share < BOTH_KINDS:
        return ""
    return f"{found.graded:prompts} have a good and a bad answer, which gives {counted(found.num_pairs, 'pairs')}"


def is_thumbs(facts: Facts) -> str:
    """Single answers with thumbs of both kinds."""
    up, down = facts.counts.num_up, facts.counts.num_down
    return f"{up:,} thumbs up, {down:,} down" if facts.kind == "thumbs" and up and down else ""


def is_demonstrations(facts: Facts) -> str:
    """One answer to each prompt, of which nothing is said."""
    if facts.kind != "demonstration":
        return ""
    verdicts = "no verdict that is read" if has_unread_verdicts(facts) else "nothing that says better or worse"
    return f"{counted(facts.num_examples, 'single answers')}, and {verdicts}"


def is_ranked(facts: Facts) -> str:
    """Three answers or more with their ranks, for half of the prompts or more."""
    several = sum(number for answers, number in facts.counts.branches.items() if answers > 2)
    of = facts.counts.branches.total()
    return f"{Count(several, of):prompts} have three ranked answers or more" if facts.kind == "ranked" and 2 * several >= of else ""


def is_pairs(facts: Facts) -> str:
    """Two answers, or more, of which one is better."""
    if facts.kind == "pair":
        return counted(facts.num_examples, "pairs")
    return counted(facts.num_examples, "rankings") if facts.kind == "ranked" else ""


def is_edited(facts: Facts) -> str:
    """The two answers are the same but for a few words, in {EDITED:.0%} of pairs or more."""
    found = facts.content.alike
    return f"in {found:pairs} the two answers share most of their wording" if found.share >= EDITED else ""


def is_noise_known(facts: Facts) -> str:
    """{NOISY:.0%} or more of verdicts are wrong, as {TOLD_TWICE} or more couples of verdicts on the same answers tell."""
    found = facts.agreement
    if not is_pairs(facts) or not found.is_rate_known or found.couples < TOLD_TWICE or found.error < NOISY or found.share < BY_CHANCE:
        return ""
    who = "votes for an answer" if found.of_voters else "verdicts on the same answers"
    return f"{who} agree in {Count(found.agree, found.couples):couples}, so about {100 * found.error:.0f} % of the verdicts are wrong"


def is_noise_seen(facts: Facts) -> str:
    """{CONTRADICTED:.0%} of pairs or more have verdicts both ways, and no rate follows from them."""
    found = facts.agreement
    if not is_pairs(facts) or found.of_voters or is_noise_known(facts) or not found.contradicted:
        return ""
    pairs = Count(found.contradicted, found.pairs)
    return f"{pairs:pairs of answers} have verdicts both ways" if pairs.share >= CONTRADICTED else ""


def is_chance(facts: Facts) -> str:
    """Verdicts on the same answers agree less often than {BY_CHANCE:.0%}."""
    found = facts.agreement
    if found.if_verdicts is not None or found.couples < TOLD_TWICE or found.share >= BY_CHANCE:
        return ""
    if found.lacks_agreeing and 2 * found.contradicted < found.pairs:  # most pairs may have had verdicts that agree
        return ""
    return f"verdicts on the same answers agree in {Count(found.agree, found.couples):couples}; coins would in half of them"


def are_too_few(facts: Facts) -> str:
    """Fewer than {TOO_FEW} examples."""
    return f"{counted(facts.num_examples, 'examples')} only" if facts.num_examples < TOO_FEW else ""


def is_few(facts: Facts) -> str:
    """Fewer than {FEW:,} examples."""
    return f"{facts.per_epoch('examples')}, fewer than {FEW:,}" if facts.kind != "prompts" and facts.num_per_epoch < FEW else ""


def are_few_pairs(facts: Facts) -> str:
    """Fewer than {FEW:,} pairs, or rankings."""
    return (
        f"{facts.per_epoch('pairs' if facts.kind == 'pair' else 'rankings')}, fewer than {FEW:,}"
        if is_pairs(facts) and is_few(facts)
        else ""
    )


def is_longer_better(facts: Facts) -> str:
    """The longer answer wins in {LONGER:.0%} or more, and chance does not explain it."""
    found = facts.lengths.longer_chosen
    is_sure = found.of > 0 and (found.share - 0.5) * 2 * found.of**0.5 >= 3
    return f"the chosen answer is the longer one in {found:pairs of different length}" if found.share >= LONGER and is_sure else ""


def are_beside(facts: Facts) -> str:
    """Files that say nothing of which answers are better, or say it in another way, beside those that the method reads."""
    found = facts.beside
    if not found.sources or is_all_up(facts):
        return ""
    judged = "thumbs" if facts.kind == "thumbs" else "pairs" if facts.kind == "pair" else "rankings"
    where = ", ".join(found.sources[:MOST_NAMED]) + (" ..." if len(found.sources) > MOST_NAMED else "")
    return f"{counted(found.num_examples, 'good answers')} in {where}, beside {counted(facts.num_examples, judged)}"


def has_strays(facts: Facts) -> str:
    """Rows of another kind than the others in their file."""
    return f"{' and '.join(counted(number, PLURAL[kind]) for kind, number in facts.strays.items())} are left out" if facts.strays else ""


def has_copies(facts: Facts) -> str:
    """{DOUBTFUL:.0%} of examples or more are copies of another (where something is judged: in every column), or near copies."""
    found = facts.content
    if max(found.repeated.share, found.near.share) < DOUBTFUL or may_be_verdicts(facts):
        return ""
    near = f", and {found.near:others} are near copies of one" if found.near.num else ""
    return f"{found.repeated:examples} repeat an earlier one{near}"


def may_be_verdicts(facts: Facts) -> str:
    """Rows that are the same in every column, beside verdicts both ways: copies, or verdicts that agree."""
    if facts.agreement.if_verdicts is None:
        return ""
    both_ways = Count(facts.agreement.contradicted, facts.agreement.pairs)
    return f"{facts.content.repeated:examples} equal an earlier one, and {both_ways:pairs of answers} have verdicts both ways"


def is_untuned(facts: Facts) -> str:
    """No SFT, as far as can be told: no chat template where data is chats, or answers that cost it {UNKNOWN_TEXT:g} nats a token."""
    model = facts.model
    if model is None or facts.kind in ("demonstration", "prompts"):
        return ""
    if model.nats is not None and model.nats >= UNKNOWN_TEXT:
        return f"a token of the good answers costs the model {model.nats:.1f} nats, as text costs that it has not learned"
    raw = facts.content.raw
    if not model.has_template and raw.share < MOSTLY:
        return f"its tokenizer brings no chat template, and {Count(raw.of - raw.num, raw.of):examples} are chats"
    return ""


def is_untuned_for_pairs(facts: Facts) -> str:
    """The same, and two answers or more, of which one is better; no rewards of another form are needed."""
    return is_pairs(facts) if is_untuned(facts) and not needs_shaping(facts) else ""


def is_model_unknown(facts: Facts) -> str:
    """No model was given."""
    is_asked = facts.model is None and facts.kind not in ("demonstration", "prompts") and not facts.beside.sources
    return "no model was given" if is_asked else ""


def is_nothing_fitting(facts: Facts) -> str:
    """There is no room for any way of training it."""
    model = facts.model
    if model is None or model.way or not model.ways:
        return ""
    if fitting := [way for way in model.ways if way.fits]:
        return f"{fitting[0].name} takes {fitting[0].peak} and needs bitsandbytes, which is not installed: pip install 'prefopt[bits]'"
    return f"{', '.join(f'{way.name} takes {way.peak}' for way in model.ways)}; {model.room}"


def is_adapter(facts: Facts) -> str:
    """The model is an adapter already."""
    model = facts.model
    return f"{model.name} is an adapter; {model.chosen} fits" if model is not None and model.is_adapter and model.way else ""


def is_full_too_large(facts: Facts) -> str:
    """Training all weights does not fit, an adapter does."""
    model = facts.model
    if model is None or model.way is None or model.is_adapter or model.chosen == "full":
        return ""
    return f"all weights take {model.ways[0].peak}, {model.chosen} {model.way.peak}; {model.room}"


def is_full_fitting(facts: Facts) -> str:
    """All weights fit."""
    model = facts.model
    if model is None or model.way is None or model.chosen != "full":
        return ""
    return f"it takes {model.way.peak}; {model.room}"


def is_short(facts: Facts) -> str:
    """Too few examples for {ENOUGH_STEPS} steps of the default batch."""
    steps = steps_of_default(facts)
    if facts.kind == "prompts" or steps >= ENOUGH_STEPS:
        return ""
    return f"{facts.per_epoch('examples')} in batches of {default('batch_size')}: {counted(steps, 'steps')}"


def is_unbalanced(facts: Facts) -> str:
    """Thumbs up weigh less than {STILL_BALANCED[0]:g} or more than {STILL_BALANCED[1]:g} times what thumbs down weigh."""
    up, down = facts.thumbs.up, facts.thumbs.down
    if not (is_thumbs(facts) and up and down) or STILL_BALANCED[0] <= up / down <= STILL_BALANCED[1]:
        return ""
    num_up, num_down = facts.counts.num_up, facts.counts.num_down
    weigh = f"{num_up:,} up and {num_down:,} down"
    if (num_up, num_down) != (up, down):
        weigh = f"{num_up:,} up weigh {up:,.6g}, {num_down:,} down {down:,.6g}"
    return f"{weigh}: up weighs {up / down:.2g} times what down weighs"


def is_faulty(facts: Facts) -> str:
    """Some rows cannot be used."""
    return f"{Count(facts.num_faults, facts.num_rows):rows} cannot be used" if facts.num_faults else ""


def is_raw_for_chats(facts: Facts) -> str:
    """Plain text for a model that was tuned on chats, with prompts that could be a turn."""
    raw = facts.content.raw
    if facts.model is None or not facts.model.has_template or raw.share < MOSTLY or facts.content.unprompted.share >= MOSTLY:
        return ""
    return f"{raw:examples} are plain text, and the model has a chat template"


def is_too_long(facts: Facts) -> str:
    """{DOUBTFUL:.0%} of examples or more are longer than the run would take."""
    limit = facts.lengths.limit
    context = facts.model.context if facts.model is not None else None
    found = facts.lengths.too_long
    if found.share < DOUBTFUL or (context is not None and context <= limit):
        return ""
    return f"{found:examples} have more than {limit:,} tokens, and one in a hundred about {facts.lengths.uncut:,} or more"


ABOUT_WEIGHTS: tuple[Sign, ...] = (is_adapter, is_full_too_large, is_full_fitting)
"""All weights or an adapter: of these one holds at most."""
