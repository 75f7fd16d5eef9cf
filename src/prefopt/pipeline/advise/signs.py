"""The conditions of the rules: each reads the facts, and gives the figures by which it holds, in words; empty where it does not hold."""

from collections.abc import Callable

from prefopt.data.settings import DataSettings
from prefopt.methods.kto import STILL_BALANCED
from prefopt.pipeline.advise.choices import default, steps_of_default
from prefopt.pipeline.advise.facts import Count, Facts, Way, percent
from prefopt.pipeline.advise.gauge import FEW
from prefopt.training.watching.start import ENOUGH_STEPS, UNKNOWN_TEXT

Sign = Callable[[Facts], str]

MANY = 10_000
"""Pairs from which on there are many: the papers that tuned SimPO had 60,000."""

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

LONGER = 0.6
"""Share of pairs won by the longer answer that is a strong bias, if chance does not explain it (three standard errors)."""

TIMES_AS_LONG = 3.0
"""Median ratio of the lengths of a pair's answers that is much: sums of log-probabilities then differ by length above all."""

STRANGE = 1.0
"""Nats per token by which good answers are less likely than the model's own: they come from somebody who writes otherwise."""

OWN = 0.2
"""The same for answers that may well be its own."""

DOUBTFUL = 0.01
"""Share of rows or examples from which on copies are worth removing."""


def is_pairs(facts: Facts) -> str:
    """Two answers, or more, of which one is better."""
    if facts.kind == "pair":
        return f"{facts.num_examples:,} pairs"
    return f"{facts.num_examples:,} rankings" if facts.kind == "ranked" else ""


def is_ranked(facts: Facts) -> str:
    """Three answers or more with their ranks, for as good as all prompts that are ranked."""
    several = sum(number for answers, number in facts.counts.branches.items() if answers > 2)
    of = facts.counts.branches.total()
    return f"{Count(several, of):prompts} have three ranked answers or more" if facts.kind == "ranked" and 2 * several >= of else ""


def is_thumbs(facts: Facts) -> str:
    """Single answers with thumbs of both kinds."""
    up, down = facts.counts.num_up, facts.counts.num_down
    return f"{up:,} thumbs up, {down:,} down" if facts.kind == "thumbs" and up and down else ""


def is_all_up(facts: Facts) -> str:
    """Thumbs up alone."""
    return f"{facts.counts.num_up:,} thumbs up, none down" if facts.kind == "thumbs" and not facts.counts.num_down else ""


def is_all_down(facts: Facts) -> str:
    """Thumbs down alone."""
    return f"{facts.counts.num_down:,} thumbs down, none up" if facts.kind == "thumbs" and not facts.counts.num_up else ""


def is_demonstrations(facts: Facts) -> str:
    """One answer to each prompt, of which nothing is said."""
    return f"{facts.num_examples:,} single answers, and nothing that says better or worse" if facts.kind == "demonstration" else ""


def is_prompts(facts: Facts) -> str:
    """Questions that nobody has answered."""
    return f"{facts.num_examples:,} prompts, and no answers" if facts.kind == "prompts" else ""


def can_be_checked(facts: Facts) -> str:
    """A program could tell right answers from wrong."""
    found = facts.content
    if found.numeric.share >= MOSTLY:
        return f"{found.numeric:good answers} end in a final answer that could be checked"
    if found.tests.share >= MOSTLY:
        return f"{found.tests:rows} bring tests"
    if found.instructions.share >= MOSTLY:
        return f"{found.instructions:rows} name constraints that a program can check"
    if found.truths.share >= MOSTLY:
        return f"{found.truths:rows} bring the right answer, which others can be compared with"
    if "checker" in facts.have:
        return "there is a checker, as you say"
    return ""


def has_reward_model(facts: Facts) -> str:
    """The user has a strong reward model."""
    return "there is a strong reward model and time to sample, as you say" if "reward-model" in facts.have else ""


def needs_shaping(facts: Facts) -> str:
    """The user needs rewards of another form than better and worse."""
    return "rewards are shaped, as you say" if "shaped-rewards" in facts.have else ""


def is_edited(facts: Facts) -> str:
    """The two answers are the same but for a few words."""
    return f"in {facts.alike:pairs} the two answers share most of their wording" if facts.alike.share >= EDITED else ""


def is_noise_known(facts: Facts) -> str:
    """Verdicts are wrong at a rate that can be told."""
    found = facts.agreement
    if not is_pairs(facts) or found.couples < TOLD_TWICE or found.error < NOISY or found.share < BY_CHANCE:
        return ""
    who = "annotators" if facts.voters else "verdicts on the same answers"
    return f"{who} agree in {Count(found.agree, found.couples):couples}, so about {percent(found.error)} of the verdicts are wrong"


def is_noise_seen(facts: Facts) -> str:
    """There are verdicts both ways, too few to tell a rate."""
    found = facts.agreement
    if not is_pairs(facts) or facts.voters or is_noise_known(facts) or not found.contradicted:
        return ""
    pairs = Count(found.contradicted, facts.sampled)
    return f"{pairs:pairs} stand against another with the same answers" if pairs.share >= CONTRADICTED else ""


def is_chance(facts: Facts) -> str:
    """Verdicts agree hardly more often than coins."""
    found = facts.agreement
    if found.couples < TOLD_TWICE or found.share >= BY_CHANCE:
        return ""
    return f"verdicts on the same answers agree in {Count(found.agree, found.couples):couples}; coins would in half of them"


def is_few(facts: Facts) -> str:
    """Few examples."""
    return f"{facts.num_examples:,} examples, fewer than {FEW:,}" if facts.kind != "prompts" and facts.num_examples < FEW else ""


def is_short(facts: Facts) -> str:
    """Too few examples for some tens of steps of the default batch."""
    steps = steps_of_default(facts)
    if facts.kind == "prompts" or steps >= ENOUGH_STEPS:
        return ""
    return f"{facts.num_examples:,} examples make {steps} steps of a batch of {default('batch_size')}"


def are_few_pairs(facts: Facts) -> str:
    """Few pairs, or rankings."""
    return is_few(facts) if is_pairs(facts) else ""


def is_longer_better(facts: Facts) -> str:
    """The longer answer wins, more often than chance would have it."""
    found = facts.lengths.longer_chosen
    is_sure = found.of > 0 and (found.share - 0.5) * 2 * found.of**0.5 >= 3
    return f"the chosen answer is the longer one in {found:pairs of different length}" if found.share >= LONGER and is_sure else ""


def is_own_and_longer(facts: Facts) -> str:
    """The longer answer wins, the pairs are many, and a tuned model may have written them itself."""
    said = facts.said
    if not is_longer_better(facts) or said is None or facts.num_examples < MANY or is_untuned(facts) or said.surprise > OWN:
        return ""
    return (
        f"{is_longer_better(facts)}; a token of theirs costs the model {said.good:.2f} nats, and one of its own {said.own:.2f}; "
        f"{facts.num_examples:,} pairs"
    )


def is_uneven(facts: Facts) -> str:
    """One answer is much longer, whichever wins."""
    if not is_pairs(facts) or facts.lengths.ratio < TIMES_AS_LONG:
        return ""
    return f"the longer answer of a pair is {facts.lengths.ratio:.1f} times as long as the other (median)"


def is_untuned(facts: Facts) -> str:
    """The model was not fine-tuned on anything like this, as far as can be told."""
    model = facts.model
    if model is None or facts.kind in ("demonstration", "prompts"):
        return ""
    if model.said is not None and model.said.good >= UNKNOWN_TEXT:
        return f"a token of the good answers costs the model {model.said.good:.2f} nats ({model.said.num} examples)"
    if not model.has_template and facts.content.raw.share < MOSTLY:
        chats = Count(facts.content.raw.of - facts.content.raw.num, facts.content.raw.of)
        return f"its tokenizer brings no chat template, and {chats:examples} are chats"
    return ""


def is_model_unknown(facts: Facts) -> str:
    """No model was given."""
    return "no model was given" if facts.model is None and facts.kind not in ("demonstration", "prompts") else ""


def is_strange(facts: Facts) -> str:
    """Good answers are not what the model would write."""
    said = facts.said
    if said is None or said.surprise < STRANGE or facts.kind in ("demonstration", "prompts"):
        return ""
    return f"a token of the good answers costs the model {said.good:.2f} nats, and one of its own {said.own:.2f} ({said.num} examples)"


def is_unbalanced(facts: Facts) -> str:
    """Thumbs up and down weigh differently."""
    up, down = facts.counts.num_up, facts.counts.num_down
    if not is_thumbs(facts) or STILL_BALANCED[0] <= up / down <= STILL_BALANCED[1]:
        return ""
    return f"{up:,} up and {down:,} down: up weighs {up / down:.2g} times what down weighs"


def is_faulty(facts: Facts) -> str:
    """Some rows cannot be used."""
    if not facts.num_faults:
        return ""
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in sorted(facts.faults.items(), key=lambda entry: -entry[1]))
    return f"{Count(facts.num_faults, facts.num_rows):rows} cannot be used: {reasons}"


def is_raw_for_chats(facts: Facts) -> str:
    """Plain text for a model that was tuned on chats."""
    raw = facts.content.raw
    if facts.model is None or not facts.model.has_template or raw.share < MOSTLY or not facts.lengths.prompt.median:
        return ""
    return f"{raw:examples} are plain text, and the model has a chat template"


def has_leaks(facts: Facts) -> str:
    """Near copies stand on both sides of the held-out split."""
    found = facts.copies.leaks
    if found.share < DOUBTFUL:
        return ""
    return f"{found:held-out examples} ({facts.copies.held_out}) open like one that is trained on"


def has_copies(facts: Facts) -> str:
    """Examples that are there several times."""
    repeated, near = facts.copies.repeated, facts.copies.near
    if max(repeated.share, near.share) < DOUBTFUL:
        return ""
    return f"{repeated:examples} repeat an earlier one, and {near:different ones} are near copies of one"


def is_broken(facts: Facts) -> str:
    """Texts whose characters were lost or mistaken."""
    found = facts.content.broken
    return f"{found:texts} have characters that were lost, or UTF-8 that was read as something else" if found.num else ""


def is_too_long(facts: Facts) -> str:
    """More than one example in a hundred is longer than the run would take."""
    most = DataSettings.model_fields["max_length"].default
    context = facts.model.context if facts.model is not None else None
    found = facts.lengths.too_long
    if found.share < DOUBTFUL or (context is not None and context <= most):
        return ""
    return f"{found:examples} have more than {most:,} tokens, and one in a hundred about {facts.lengths.uncut:,} or more"


def is_nothing_fitting(facts: Facts) -> str:
    """There is no room for any way of training it."""
    model = facts.model
    if model is None or model.chosen or not model.ways:
        return ""
    return f"{', '.join(f'{way.name} takes {way.peak}' for way in model.ways)}; {model.room}"


def is_adapter(facts: Facts) -> str:
    """The model is an adapter already."""
    model = facts.model
    return f"{model.name} is an adapter; {model.chosen} fits" if model is not None and model.is_adapter and model.chosen else ""


def is_full_too_large(facts: Facts) -> str:
    """Training all weights does not fit, an adapter does."""
    model = facts.model
    if model is None or not model.chosen or model.is_adapter or model.chosen == "full":
        return ""
    return f"training all weights takes {model.ways[0].peak}, {model.chosen} {way_of(facts, model.chosen).peak}; {model.room}"


def is_large_for_few(facts: Facts) -> str:
    """All weights would fit, but the examples are few for a large model."""
    model = facts.model
    if model is None or model.chosen != "full" or model.num_parameters < 1_000_000_000 or not is_few(facts):
        return ""
    return f"{is_few(facts)}, for a model of {model.num_parameters / 1e9:.1f} billion weights"


def is_full_fitting(facts: Facts) -> str:
    """All weights fit."""
    model = facts.model
    if model is None or model.chosen != "full":
        return ""
    return f"training all {model.num_parameters / 1e6:,.1f} million weights takes {model.ways[0].peak}; {model.room}"


def way_of(facts: Facts, name: str) -> Way:
    """The way of that name."""
    assert facts.model is not None
    return next(way for way in facts.model.ways if way.name == name)
