"""Rules about learning: it fails, it breaks, or it is learning by heart."""

import math
from collections.abc import Sequence
from statistics import fmean, median

from prefopt.training.watching.watched import SURE, WINDOW, Figures, Finding, History, mean_and_error, said, values

NEAR_HALF = 0.55
"""Reward accuracy that counts as stuck when the true one is below it, two standard errors included. People agree with each
other on 60 to 75 of 100 pairs of the well-known sets, and DPO reaches 0.6 and more on them within one epoch."""

WRONG_WAY = 0.45
"""Reward accuracy on training pairs below which, two standard errors included, the opposite of the labels is learned. Labels
that are all swapped do not show so: the policy learns them as they are."""

HALF_WAY = 0.5
"""Share of the steps after warm-up that must be done before a lack of progress counts: with a cosine half of all movement is over."""

MIN_STEPS = 5
"""Steps that there must be at all before a lack of progress counts."""

ACCURACY_ROWS = 500
"""Steps that the accuracy is averaged over at most, so that a look stays cheap."""

HARDLY_MOVED_KL = 0.01
"""Nats per completion: the log-probabilities of its tokens have changed by √(2·0.01) = 0.14 in all (root of the sum of
squares). Samples of the two models then differ in about 7 of 100 cases at most (Pinsker: √(KL/2))."""

HARDLY_MOVED_MARGIN = 0.15
"""Nats: the odds of the chosen against the rejected answer have changed by 16 %."""

NO_FALL = 0.01
"""Share by which the loss of SFT must have fallen half-way. Less is a change of one hundredth of the perplexity's logarithm,
which nobody sees in what the model writes."""

TOO_EASY, TOO_EASY_PAIRS = 0.98, 200
"""Accuracy on pairs not seen before, and how many of them. On pairs that people or a reward model ranked by quality 0.7 to
0.9 is reached; at 0.98 ± 0.01 something simpler tells the two sides apart."""

BY_HEART = 0.15
"""Rise of the training accuracy from pairs seen for the first time to pairs seen again, beyond two standard errors. What a
model learns for all pairs it also shows on new ones; the jump is what it learned of these alone. HH on a small model, where the
held-out loss rose, went from 0.65 to 0.88; the quickstart, where it did not, from 0.87 to 0.92."""

RISE, CLEAR_RISE = 0.01, 0.05
"""Rise of the held-out loss over its lowest value, as a share of it and at least as much in nats: the smaller one at two
evaluations in a row, which is no passing wobble, the larger at one."""

AHEAD = 2.5
"""Standard errors by which the accuracy on pairs seen before must be above that on held-out ones. Without it some tens of
held-out pairs, a few of them labelled wrong, look like overfitting. In the first epoch there is none: what it trains on is new."""

MARGIN_FALL = 0.1
"""Share by which the held-out margin must have fallen, and the training margin risen, at two evaluations in a row."""

STILL_FALLING = 0.02
"""Share by which the training loss must have fallen meanwhile: when both rise it is not overfitting."""

SPIKE_WINDOW, SPIKE_ROWS = 50, 20
"""Steps that a spike is compared with, and how many there must be."""

SPIKE = 10.0
"""Times the median gradient. Norms of healthy runs are spread too: the quickstart's reach 7.4 times their median."""

SPIKE_SPREAD = 6.0
"""Robust standard deviations of the norm's logarithm that a spike must be above the median: where norms are widely spread by
nature, as with small batches, ten times the median is not rare."""

SPIKE_OVER_START = 3.0
"""Times the median of the first steps. Norms fall as a model learns, and ten times little is nothing to speak of."""

LOSS_SPIKE = 0.2
"""Share of the median by which the last three losses must all be above it, and at least 0.05 nats and eight robust standard
deviations. A single odd batch cannot do that; weights that were thrown off do."""

DIVERGED, DIVERGED_NOISY = 0.1, 0.25
"""Share by which the mean loss must be above the first one, and two standard errors: for DPO 0.76 against log 2, worse than before
training. Where the first loss depends on its examples, as in SFT, each of the newest must be above it by the second share."""

NORMAL_SPREAD = 1.4826
"""Median absolute deviation to standard deviation, for normal noise."""


def accuracy_near_half(history: History) -> Finding | None:
    """The policy ranks training pairs hardly better than chance."""
    run, step = history.run, history.step
    if (found := _accuracy_below(NEAR_HALF, history)) is None or wrong_way(history) is not None:
        return None
    accuracy, error, num_pairs = found.values()
    kls = history.last(WINDOW, "kl")
    moved = f", although it has moved by {said(fmean(kls))} nats (KL)" if kls else ""
    what = (
        f"The policy still ranks only {accuracy:.1%} ± {error:.1%} of the pairs as they are labelled (the last {num_pairs:,} that it was "
        f"trained on){moved}: the labels say little that it can learn, because they are noisy, because the two answers hardly differ, "
        "or because in part of the data chosen and rejected are swapped."
    )
    smoothing = "set --label-smoothing to the share of labels that may be wrong, " if "label_smoothing" in run.settings else ""
    do = (
        "Read twenty pairs with your own eyes, leave out those that you could not rank yourself, "
        f"{smoothing}and only then try a higher --learning-rate (now {run.learning_rate:g})."
    )
    return Finding("accuracy_near_half", step, "warning", what, do, found)


def wrong_way(history: History) -> Finding | None:
    """The policy has moved from its reference, and ranks training pairs worse than chance."""
    run, step = history.run, history.step
    of_pairs = history.last(1, "rewards/margin")  # which share of thumbs lies above a point says less
    if not (run.has_reference and run.begins_at_reference and of_pairs) or (found := _accuracy_below(WRONG_WAY, history)) is None:
        return None
    accuracy, error, num_pairs = found.values()
    what = (
        f"The policy ranks only {accuracy:.1%} ± {error:.1%} of the pairs as they are labelled (the last {num_pairs:,} that it was "
        "trained on), fewer than chance would: it learns the opposite of what they say."
    )
    if run.method == "discopop":
        do = (
            f"Give a higher --beta (now {run.beta:g}) or --learning-rate (now {run.learning_rate:g}): the slope of this loss points the "
            "wrong way at margins about 0, and training has to be carried over that."
        )
    else:
        do = f"Give a lower --learning-rate (now {run.learning_rate:g}): the steps are so large that they undo what they teach."
    return Finding("wrong_way", step, "warning", what, do, found)


def _accuracy_below(limit: float, history: History) -> dict[str, float] | None:
    """`accuracy` on the pairs of the second half so far, its standard `error`, and `num_pairs`, where half-way the policy has moved and
    the accuracy is surely below the limit."""
    accuracies = history.last(min(history.step // 2, ACCURACY_ROWS), "rewards/accuracy") if _is_half_way(history) else ()
    if not accuracies:
        return None
    num_pairs = len(accuracies) * history.run.batch_size
    accuracy, error = fmean(accuracies), 0.5 / math.sqrt(num_pairs)
    if accuracy + SURE * error >= limit or _hardly_moved(history) is not None:
        return None
    return {"accuracy": accuracy, "error": error, "num_pairs": num_pairs}


def _is_half_way(history: History) -> bool:
    warm_up = float(history.run.settings.get("warmup_ratio", 0.0))
    return history.step >= max(MIN_STEPS, (warm_up + HALF_WAY * (1 - warm_up)) * history.run.num_steps)


def no_progress(history: History) -> Finding | None:
    """Half-way the model is still what it was."""
    run, step = history.run, history.step
    if not _is_half_way(history):
        return None
    if (moved := _hardly_moved(history)) is not None:
        found = moved
        sign = f"KL from the reference {said(moved['kl'])} nats, margin {said(moved['margin'])} nats between chosen and rejected"
    elif run.has_reference or (fall := _no_fall_of_loss(history)) is None:
        return None
    else:
        found = fall
        sign = f"loss {said(fall['first'])} at first and {said(fall['now'])} now"
    what = f"After {step:,} of {run.num_steps:,} steps the model is almost what it was before ({sign}), so its answers will be too."
    if run.learning_rate < run.usual_learning_rate:
        rate = f"a higher --learning-rate (now {run.learning_rate:g}, usual {run.usual_learning_rate:g})"
    else:
        rate = f"a --learning-rate some times higher (now {run.learning_rate:g})"
    lower = run.with_beta(", or a lower --beta")
    do = f"Give {rate}, or more steps (--epochs, or a smaller --batch-size){lower}."
    return Finding("no_progress", step, "warning", what, do, found)


def _hardly_moved(history: History) -> dict[str, float] | None:
    """KL and margin, where both say that the policy is still its reference."""
    beta, num = history.run.beta, max(1, min(WINDOW, history.step // 2))
    kls, margins = history.last(num, "kl"), history.last(num, "rewards/margin")
    if not kls or not margins or not beta:
        return None
    kl, margin = fmean(kls), fmean(margins) / beta
    return {"kl": kl, "margin": margin} if kl < HARDLY_MOVED_KL and abs(margin) < HARDLY_MOVED_MARGIN else None


def _no_fall_of_loss(history: History) -> dict[str, float] | None:
    """The loss at first and now, where it is sure to have fallen by less than `NO_FALL`: on the same examples, or by its noise."""
    first, now = history.before("eval/loss"), history.now("eval/loss")
    error = 0.0
    if first is None or now is None:
        begin, recent = values(history.rows[:WINDOW], "loss"), history.last(WINDOW, "loss")
        if history.step < 2 * WINDOW or not begin or not recent:
            return None
        (first, first_error), (now, now_error) = mean_and_error(begin), mean_and_error(recent)
        error = SURE * math.hypot(first_error, now_error)
    if first - now + error >= NO_FALL * first or now > (1 + STILL_FALLING) * first:  # a rise is another matter
        return None
    return {"first": first, "now": now}


def too_easy(history: History) -> Finding | None:
    """Pairs that were never seen before are ranked right almost without fail."""
    run, step = history.run, history.step
    num_rows = -(-TOO_EASY_PAIRS // run.batch_size)
    if step < num_rows or step * run.batch_size > run.num_train:
        return None
    accuracies = history.last(num_rows, "rewards/accuracy")
    if len(accuracies) < num_rows or (accuracy := fmean(accuracies)) < TOO_EASY:
        return None
    seen = step * run.batch_size
    what = (
        f"After {seen:,} pairs the policy ranks {accuracy:.1%} of pairs right that it has not seen before: something simple tells chosen "
        "from rejected (a phrase, a form, the length, the model that wrote them), and that is what it learns, rather than what is good."
    )
    do = (
        "Look at ten pairs for what all chosen answers share and no rejected one has; if it is not what you want to teach, mend the data, "
        f"and otherwise stop early (--max-steps {step}), since more steps only push the two further apart."
    )
    return Finding("too_easy", step, "note", what, do, {"accuracy": accuracy, "num_pairs": num_rows * run.batch_size})


def by_heart(history: History) -> Finding | None:
    """Nothing is held out, and pairs seen again are ranked far better than new ones were."""
    run, step = history.run, history.step
    first_epoch = run.num_train // run.batch_size
    if run.num_held_out or first_epoch < 1 or step < first_epoch + WINDOW:
        return None
    new, again = (
        values(history.rows[max(0, first_epoch - WINDOW) : first_epoch], "rewards/accuracy"),
        history.last(WINDOW, "rewards/accuracy"),
    )
    if not new or not again:
        return None
    before, now = fmean(new), fmean(again)
    error = math.sqrt(_variance(before, len(new) * run.batch_size) + _variance(now, len(again) * run.batch_size))
    if now - before - SURE * error < BY_HEART:
        return None
    what = (
        f"The policy ranked {before:.0%} of the pairs right when it saw them for the first time and ranks {now:.0%} right now that it sees "
        "them again: the difference is learned by heart, and helps with no other prompt."
    )
    do = (
        f"Give fewer --epochs (now {said(run.num_epochs)}) or a lower --learning-rate, and hold some pairs out (--eval-fraction 0.1 with "
        "--eval-every-steps) to see when the model stops getting better."
    )
    return Finding("by_heart", step, "note", what, do, {"new": before, "again": now})


def _variance(share: float, num: int) -> float:
    """Of a share of that many, with one imagined hit and miss so that a share of 1 has some."""
    smoothed = (min(max(share, 0.0), 1.0) * num + 1) / (num + 2)
    return smoothed * (1 - smoothed) / num


def overfitting(history: History) -> Finding | None:
    """The held-out figures get worse while those of training get better."""
    if not _knows_its_examples(history):
        return None
    looks = [row for row in history.evaluations if "eval/loss" in row]
    return _loss_rises(history, looks) or _margin_falls(history, looks)


def _knows_its_examples(history: History) -> bool:
    """Whether it has seen them before, and ranks them better than held-out ones by more than chance, where it ranks."""
    run, held_out = history.run, history.now("eval/rewards/accuracy")
    if history.step * run.batch_size <= run.num_train:
        return False
    accuracies = history.last(WINDOW, "rewards/accuracy")
    if held_out is None or not accuracies or not run.num_held_out:
        return True
    accuracy = fmean(accuracies)
    error = math.sqrt(_variance(accuracy, len(accuracies) * run.batch_size) + _variance(held_out, run.num_held_out))
    return accuracy - held_out > AHEAD * error


def _loss_rises(history: History, looks: Sequence[Figures]) -> Finding | None:
    losses = values(looks, "eval/loss")
    if len(losses) != len(looks) or len(losses) < 2:
        return None
    place = losses.index(min(losses))
    best, now, then = losses[place], losses[-1], int(looks[place].get("step", 0))
    limit = best + RISE * max(1.0, best)
    twice = len(losses) - place > 2 and min(losses[-2:]) >= limit
    if not twice and now < best + CLEAR_RISE * max(1.0, best):
        return None
    before, after = _training(history, then, "loss"), _training(history, history.step, "loss")
    if before is None or after is None or after > (1 - STILL_FALLING) * before:
        return None
    where = f"step {then}" if then else "before training"
    what = (
        f"The held-out loss has risen from {best:.4f} ({where}) to {now:.4f} while the training loss fell from {before:.4f} to "
        f"{after:.4f}: the run learns its {history.run.num_train:,} examples by heart, and gets worse on others."
    )
    found = {"best": best, "best_step": then, "now": now, "training_before": before, "training_now": after, "limit": limit}
    return Finding("overfitting", history.step, "warning", what, _remedy(history, then), found)


def _margin_falls(history: History, looks: Sequence[Figures]) -> Finding | None:
    margins = values(looks, "eval/rewards/margin")
    if len(margins) != len(looks) or len(margins) < 3:
        return None
    place = margins.index(max(margins))
    best, now, then = margins[place], margins[-1], int(looks[place].get("step", 0))
    limit = (1 - MARGIN_FALL) * best
    if best <= 0 or len(margins) - place < 3 or max(margins[-2:]) > limit:
        return None
    before, after = _training(history, then, "rewards/margin"), _training(history, history.step, "rewards/margin")
    if before is None or after is None or after < (1 + MARGIN_FALL) * before or after <= 0:
        return None
    what = (
        f"The held-out margin has fallen from {said(best)} (step {then}) to {said(now)} while the training margin rose from "
        f"{said(before)} to {said(after)}: the run learns its {history.run.num_train:,} examples by heart, and gets worse on others."
    )
    found = {"best": best, "best_step": then, "now": now, "training_before": before, "training_now": after, "limit": limit}
    return Finding("overfitting", history.step, "warning", what, _remedy(history, then), found)


def _training(history: History, step: int, name: str) -> float | None:
    """A training metric around a step: its mean over the steps up to it, or over the first few where it is the start."""
    rows = history.rows[max(0, step - WINDOW) : step] if step else history.rows[:3]
    found = values(rows, name)
    return fmean(found) if found else None


def _remedy(history: History, best_step: int) -> str:
    run = history.run
    smoothing = ", --label-smoothing 0.1 if labels are noisy" if "label_smoothing" in run.settings else ""
    if not best_step:
        stop = "No step was better than none, so begin anew"
    elif run.settings.get("early_stop"):
        stop = f"The run will take the model of step {best_step} by itself, once --early-stop has waited long enough"
    else:
        every = run.settings.get("eval_every_steps") or best_step
        stop = f"Stop about step {best_step} (--max-steps {best_step}, or --early-stop 2 with --eval-every-steps {every})"
    return f"{stop}; beyond that help more data, fewer --epochs (now {said(run.num_epochs)}), a lower --learning-rate{smoothing}."


def gradient_spike(history: History) -> Finding | None:
    """One gradient that is far longer than those before it."""
    norm, before = history.now("grad_norm"), values(history.rows[-SPIKE_WINDOW - 1 : -1], "grad_norm")
    if norm is None or len(before) < SPIKE_ROWS:
        return None
    usual = median(before)
    if usual <= 0 or norm <= SPIKE * usual or norm <= SPIKE_OVER_START * median(values(history.rows[:SPIKE_ROWS], "grad_norm") or [0.0]):
        return None
    logs = [math.log(value) for value in before if value > 0]
    if math.log(norm / usual) <= SPIKE_SPREAD * _robust_spread(logs):
        return None
    step, longest = history.step, float(history.run.settings.get("max_grad_norm", math.inf))
    cut = f"; it was scaled down to {longest:g}, but its direction is that of few examples" if norm > longest else ""
    what = (
        f"The gradient of step {step:,} was {said(norm)} long, {said(norm / usual)} times the median of the {len(before)} before it{cut}."
    )
    do = (
        "Do nothing if loss and samples are as before; if they are not, or if it happens again, look at the longest and oddest examples, "
        f"lower --learning-rate (now {history.run.learning_rate:g}) or --max-grad-norm, or make --batch-size larger."
    )
    return Finding("gradient_spike", step, "note", what, do, {"grad_norm": norm, "median": usual})


def loss_spike(history: History) -> Finding | None:
    """The loss jumped and did not come back."""
    newest, before = history.last(3, "loss"), values(history.rows[-SPIKE_WINDOW - 3 : -3], "loss")
    if len(newest) < 3 or len(before) < SPIKE_ROWS:
        return None
    usual = median(before)
    lowest = min(newest)
    if lowest <= usual + max(0.05, LOSS_SPIKE * abs(usual)) or lowest <= usual + 8 * _robust_spread(before):
        return None
    step = history.step
    what = (
        f"The loss jumped from about {said(usual)} to {said(fmean(newest))} at step {step - 2:,} and stayed there for three steps: the "
        "weights were thrown off, most likely by steps that are too large."
    )
    do = (
        f"If it does not come back within some tens of steps, begin anew with a lower --learning-rate (now {history.run.learning_rate:g}) "
        f"or a lower --max-grad-norm (now {history.run.settings.get('max_grad_norm', 1.0):g})."
    )
    return Finding("loss_spike", step, "warning", what, do, {"median": usual, "loss": fmean(newest)})


def diverged(history: History) -> Finding | None:
    """The loss is above where it began."""
    run, step = history.run, history.step
    first, recent = values(history.rows[:1], "loss"), history.last(WINDOW, "loss")
    if step <= WINDOW or not first or len(recent) < WINDOW:
        return None
    began, (now, error) = first[0], mean_and_error(recent)
    if run.has_reference and run.begins_at_reference:  # the first loss is that of margin 0, the same for every pair
        is_sure = now - SURE * error > (1 + DIVERGED) * began
    else:
        is_sure = min(recent) > (1 + DIVERGED_NOISY) * began
    if not is_sure:
        return None
    what = (
        f"The training loss is {said(now)}, above the {said(began)} that it began with: the model is worse at this than before training, "
        "which steps that are too large do."
    )
    lower = min(run.learning_rate / 3, run.usual_learning_rate)
    do = f"Stop and begin anew with --learning-rate {lower:.2g} (now {run.learning_rate:g}), or with a longer --warmup-ratio."
    return Finding("diverged", step, "warning", what, do, {"first": began, "now": now})


def _robust_spread(numbers: Sequence[float]) -> float:
    """The standard deviation, from the median of the distances to the median: a few spikes do not move it."""
    middle = median(numbers)
    return NORMAL_SPREAD * median(abs(number - middle) for number in numbers)
