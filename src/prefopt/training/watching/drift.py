"""Rules about how far the policy has gone from where it began, and what its answers have become."""

import math
from statistics import fmean

from prefopt.training.watching.watched import SURE, WINDOW, Finding, History, Severity, WatchedRun, mean_and_error, said

MIN_ROWS = 5
"""Steps that such a mean needs."""

FALL_PER_TOKEN, BAD_FALL_PER_TOKEN = 0.1, 0.3
"""Nats per token by which the chosen answers must have lost: every token of a good answer a tenth less likely, so that their
perplexity is up by a tenth; from the second on, by a third, and a warning. Runs whose answers got better lose less: the
quickstart 0.05 to 0.07. A small model on noisy pairs, whose held-out loss rose, lost 0.14."""

FALL = 2.0
"""Nats by which a whole chosen answer must have lost, seven times less likely: answers of a few tokens wobble by less."""

KL_BUDGET, KL_BUDGET_PER_TOKEN = 20.0, 0.1
"""The budget where --kl-budget gives none: nats per completion, and per token for long ones; the larger holds. The frontier of
reward and KL in the DPO paper (2305.18290, figure 2) ends at about 20 nats and has nearly all its reward before; at higher KL
the quality of direct methods falls again (2406.02900). Answers of more than 200 tokens get more: 0.1 nats per token is a typical
change of each token's log-probability by √0.2 = 0.45."""

LENGTH_FACTOR = 1.5
"""Factor by which answers must have become longer or shorter. Less than half more is what better answers may need."""

LENGTH_SPREAD = 0.6
"""Standard deviation of the logarithm of a model's answer lengths, about a factor of 1.8. That prompts and random numbers are the
same at each evaluation helps little once two answers differ by a word: four samples of a small model on HH had 30 tokens before
training, then 57, 68, 44 and 17, while nothing was wrong."""

FEWER_END = 2.5
"""Standard errors by which the share of answers that end must have fallen: four of four to none of four is 2.8."""

SAMPLES_SURE = 2.5
"""Standard errors that a change in lengths must be beyond: a look at few answers is taken every so often, and each could err."""

REPETITION_RISE, REPETITION_NOISE = 0.15, 0.75
"""Rise of the share of repeated stretches that shows, and the rise that it takes with a single sample; it shrinks with the root
of their number (four samples: 0.38). An answer caught in a loop has 0.7 and more, prose below 0.1."""

NARROWER = 2.0
"""Factor by which the entropy of the answers must have fallen. A policy that prefers gives up some of it (the quickstart a
tenth); at half of it the effective number of choices per token is down to its square root."""

WIDER, WIDER_BY = 3.0, 0.5
"""Factor and nats per token by which it must have risen. A policy that was sure of worse answers may gain some: runs of small
models whose held-out accuracy rose went up to twice as high. Those that fell apart went up by 4 to 6 times."""

ENTROPY_SPREAD = 0.9
"""Three standard deviations of the logarithm of an answer's mean entropy: the change that it takes with two samples; it shrinks
with the root of half their number."""

SMALL_SET, MANY_EPOCHS = 500, 3.0
"""Examples below which, and passes from which on, spiky samples are put down to them."""


def displacement(history: History) -> Finding | None:
    """The chosen answers have become less likely than under the reference."""
    run = history.run
    held_out = history.now("eval/logps/chosen") is not None and history.before("eval/logps/chosen") is not None
    lost = _lost_held_out(history) if held_out else _lost_in_training(history)
    length = run.answer_length(held_out=held_out)
    if lost is None or length is None:
        return None
    chosen, rejected, error = lost
    sure = chosen - SURE * error
    bound = max(FALL, FALL_PER_TOKEN * length)
    if sure < bound:
        return None
    severity: Severity = "warning" if sure >= BAD_FALL_PER_TOKEN * length else "note"
    others = said(rejected) if rejected > 0 else "nothing"
    what = (
        f"The chosen answers have lost {said(chosen)} nats of log-probability each ({said(chosen / length)} per token), the rejected ones "
        f"{others}: the loss counts only the gap between the two, pushing a rejected answer down pushes down what resembles it, and what "
        "the chosen one loses goes to answers that nobody ranked."
    )
    beta = run.with_beta(", or raise --beta")
    do = (
        "Read the samples; if they have suffered, or if the chosen answers are what the model should say and not just the better one of "
        "two, run SFT on the chosen answers first, take fewer steps (--max-steps, --epochs) or a lower "
        f"--learning-rate (now {run.learning_rate:g}){beta}."
    )
    found = {"chosen": -chosen, "rejected": -rejected, "per_token": -chosen / length, "limit": -bound}
    return Finding("displacement", history.step, severity, what, do, found)


def _lost_held_out(history: History) -> tuple[float, float, float] | None:
    """What chosen and rejected answers have lost since before training, in nats: the same ones each time, so without an error."""
    lost = []
    for name in ("eval/logps/chosen", "eval/logps/rejected"):
        before, now = history.before(name), history.now(name)
        if before is None or now is None:
            return None
        lost.append(before - now)
    return lost[0], lost[1], 0.0


def _lost_in_training(history: History) -> tuple[float, float, float] | None:
    """The same by the rewards of the newest training steps, which begin at 0 where the reference is the start."""
    run = history.run
    if not run.has_reference or not run.begins_at_reference or run.reference_moves or not run.beta:
        return None
    chosen, rejected = history.last(WINDOW, "rewards/chosen"), history.last(WINDOW, "rewards/rejected")
    if min(len(chosen), len(rejected)) < MIN_ROWS:
        return None
    mean, error = mean_and_error(chosen)
    return -mean / run.beta, -fmean(rejected) / run.beta, error / run.beta


def kl(history: History) -> Finding | None:
    """The policy is farther from the reference than the budget allows."""
    run = history.run
    if not run.has_reference or not (run.begins_at_reference or run.settings.get("kl_budget")):
        return None  # the distance of another model was there before
    measured = _measured_kl(history)
    if measured is None:
        return None
    now, where, budget = measured
    if now <= budget:
        return None
    what = (
        f"The policy is {now:.4g} nats per completion from the reference (KL {where}), beyond the {said(budget)} "
        f"{'of --kl-budget' if run.settings.get('kl_budget') else 'up to which most is gained'}: from here on more margin is mostly "
        "bought with worse answers, which the loss does not see."
    )
    beta = run.with_beta(" and a higher --beta")
    do = (
        f"Read the samples; if they have suffered, take a model from before step {history.step:,} (--max-steps) or give a lower "
        f"--learning-rate (now {run.learning_rate:g}){beta}; if they have not, set --kl-budget to what you are ready to spend."
    )
    return Finding("kl", history.step, "warning", what, do, {"kl": now, "budget": budget})


def _measured_kl(history: History) -> tuple[float, str, float] | None:
    """The KL, on what it was measured, and the budget for answers of their length.

    On the policy's own answers it is what it says. On the data's it also counts answers that the model never gives, so where the
    next evaluation will draw some it is not asked in between.
    """
    run = history.run
    of_samples = history.now("samples/kl")
    if of_samples is not None:
        shown = "its own answers" if run.num_samples == 1 else f"{run.num_samples} of its own answers"
        length = min(run.answer_length(held_out=True) or 0.0, float(run.settings.get("sample_tokens", math.inf)))
        return of_samples, f"on {shown}", kl_budget(run, length)
    if history.before("samples/kl") is not None and run.settings.get("eval_every_steps"):
        return None
    of_held_out = history.now("eval/kl")
    if of_held_out is not None:
        return of_held_out, "as estimated on held-out pairs", kl_budget(run, run.answer_length(held_out=True))
    recent = history.last(WINDOW // 2, "kl")
    if len(recent) < MIN_ROWS:
        return None
    mean, error = mean_and_error(recent)
    return mean - SURE * error, "as estimated on the pairs of the last steps", kl_budget(run, run.answer_length())


def kl_budget(run: WatchedRun, length: float | None) -> float:
    """The KL beyond which the rule speaks, in nats per completion of that many tokens."""
    given = run.settings.get("kl_budget")
    return float(given) if given else max(KL_BUDGET, KL_BUDGET_PER_TOKEN * (length or 0.0))


def lengths(history: History) -> Finding | None:
    """Sampled answers have become much longer or shorter."""
    run = history.run
    compared = _lengths_compared(history)
    if not history.ranks_answers or compared is None:
        return None
    who, before, now, num = compared
    growth = math.log(now) - math.log(before)
    bound = max(math.log(LENGTH_FACTOR), SAMPLES_SURE * LENGTH_SPREAD * math.sqrt(2 / num))
    if abs(growth) < bound:
        return None
    change = "longer" if growth > 0 else "shorter"
    times = said(max(now, before) / min(now, before))
    why, first, of_data = _asked_for(run, growth)
    what = f"{who} are {times} times {change} than before ({said(now)} tokens, {said(before)} before): {why}."
    beta = run.with_beta(", raise --beta")
    do = f"Read whether the {change} answers say more, or less; if not, {first}{beta} or take fewer steps (--max-steps, --epochs)."
    found = {"before": before, "now": now, "limit": before * math.exp(math.copysign(bound, growth))}
    return Finding("lengths", history.step, "warning", what, do, found | of_data)


def _asked_for(run: WatchedRun, growth: float) -> tuple[str, str, dict[str, float]]:
    """Why lengths have changed, as far as the data say; what to do first; and the data's lengths, where they are known."""
    summary = run.data.get("summary") or {}
    chosen, rejected = summary.get("mean_chosen"), summary.get("mean_rejected")
    if not chosen or not rejected:
        return "nothing is known of the data's lengths that would explain it", f"lower --learning-rate (now {run.learning_rate:g})", {}
    data = f"in the data chosen answers have {chosen:.3g} tokens, rejected ones {rejected:.3g}"
    found = {"mean_chosen": chosen, "mean_rejected": rejected}
    if (chosen - rejected) * growth > 0:
        why = "the gap between chosen and rejected grows most easily by what counts at every token, and length does"
        return f"{why} ({data})", "leave out pairs whose chosen answer wins by its length", found
    why = "the pairs do not ask for it"
    first = f"lower --learning-rate (now {run.learning_rate:g})"
    return f"{why} ({data}), so it is a side effect of how far the policy was moved", first, found


def _lengths_compared(history: History) -> tuple[str, float, float, float] | None:
    """Whose lengths, before training and now, and of how many answers.

    Where fewer answers end than before, only those that end are compared: one that is cut at the limit has no length of its own,
    and has lost its end rather than grown, which is the matter of another rule. Nor can those that are left say that answers became
    shorter: the long ones are missing.
    """
    run, who, num = history.run, "Sampled answers", float(history.run.num_samples)
    before, now = history.before("samples/length"), history.now("samples/length")
    ended_before, ended_now = history.before("samples/ended"), history.now("samples/ended")
    if before is None or now is None:
        return None
    if ended_before is not None and ended_now is not None and ended_now < ended_before:
        cut = float(run.settings.get("sample_tokens", 0))
        if ended_now <= 0 or cut <= 0:
            return None
        before, now = ((mean - (1 - ended) * cut) / ended for mean, ended in ((before, ended_before), (now, ended_now)))
        who, num = "Sampled answers that end", num * ended_now
        if now <= before:
            return None
    return (who, before, now, num) if min(before, now, num) > 0 else None


def endings(history: History) -> Finding | None:
    """Sampled answers no longer end."""
    run, num = history.run, history.run.num_samples
    before, now = history.before("samples/ended"), history.now("samples/ended")
    if before is None or now is None or not num or not _is_fewer(before, now, num):
        return None
    if history.ranks_answers:
        why = "what training has pushed down took the end of an answer with it"
        do = (
            f"Give a lower --learning-rate (now {run.learning_rate:g}) or fewer steps (--max-steps), and look in --data whether both "
            "answers of a pair close"
        )
    else:
        why = "the answers that it learns from have no end, or training has broken it"
        do = (
            "Look at the first example that the run shows: whether its answer closes, and whether answers were cut (--max-length); if "
            f"they do close and were not, give a lower --learning-rate (now {run.learning_rate:g})"
        )
    what = (
        f"Of {num} sampled answers {before * num:.0f} ended by themselves before training and {now * num:.0f} do now: the model no longer "
        f"finds an end, because {why}."
    )
    limit = max([now, *(ended / num for ended in range(num) if _is_fewer(before, ended / num, num))])
    return Finding("endings", history.step, "warning", what, f"{do}.", {"before": before, "now": now, "limit": limit})


def _is_fewer(before: float, now: float, num: int) -> bool:
    """Whether of that many answers so much fewer end that it is hardly chance."""
    pooled = (before + now) / 2
    return now < before and before - now >= FEWER_END * math.sqrt(pooled * (1 - pooled) * 2 / num)


def repetition(history: History) -> Finding | None:
    """Sampled answers repeat themselves."""
    before, now = history.before("samples/repetition"), history.now("samples/repetition")
    num = history.run.num_samples
    if before is None or now is None or not num:
        return None
    limit = before + max(REPETITION_RISE, REPETITION_NOISE / math.sqrt(num))
    if now < limit:
        return None
    what = (
        f"Sampled answers repeat themselves ({now:.0%} of their stretches of four tokens have been there before in the same answer, "
        f"{before:.0%} before training): a model that is too sure of what comes next goes round in circles{_spiky(history)}."
    )
    return Finding("repetition", history.step, "warning", what, _calmer(history), {"before": before, "now": now, "limit": limit})


def entropy(history: History) -> Finding | None:
    """The policy has become nearly certain of every token, or lost in them."""
    before, now = history.before("samples/entropy"), history.now("samples/entropy")
    num = history.run.num_samples
    if not history.ranks_answers or before is None or now is None or min(before, now) <= 0 or not num:
        return None
    noise = ENTROPY_SPREAD * math.sqrt(2 / num)
    low = before * math.exp(-max(math.log(NARROWER), noise))
    high = max(before * math.exp(max(math.log(WIDER), noise)), before + WIDER_BY)
    if low < now < high:
        return None
    if now < before:
        how = "the model has come to draw each token from a far narrower choice"
        end = f"{_spiky(history)}, so it will say the same in the same words again and again"
    else:
        how = "the model has come to draw each token from a far wider choice"
        end = ", because what was taken from the ranked answers went to anything else, so its answers turn to noise"
    what = f"With training {how} (entropy of its answers {said(before)} nats per token before, {said(now)} now){end}."
    found = {"before": before, "now": now, "limit": low if now < before else high}
    return Finding("entropy", history.step, "warning", what, _calmer(history), found)


def _spiky(history: History) -> str:
    """What it is a sign of, where the run is like that."""
    run = history.run
    if run.num_train >= SMALL_SET and run.num_epochs < MANY_EPOCHS:
        return ""
    return f", a sign of many passes over few examples (here {said(run.num_epochs)} over {run.num_train:,})"


def _calmer(history: History) -> str:
    run = history.run
    beta = run.with_beta(", a higher --beta")
    return (
        f"Give more data or fewer --epochs (now {said(run.num_epochs)}), a lower --learning-rate (now {run.learning_rate:g}){beta}, "
        f"and compare the samples of earlier evaluations to see from which step on (--max-steps)."
    )
