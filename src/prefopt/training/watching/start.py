"""Rules that look before the first step: settings, the reference, and the model that training starts from."""

import math

from prefopt.training.watching.watched import Finding, History, said, values

RATE_FACTOR = 10.0
"""How far from the usual learning rate is far. The usual rates of full fine-tuning and of an adapter are a factor of ten
apart, those of SFT and DPO a factor of forty: a rate that belongs to the other kind of run is found. Up to ten times the
usual rate people do train with success (5e-5 for DPO on an adapter), so the upper end itself is still allowed."""

SAME_START = 3e-2
"""Nats per token. bf16 products in another order differ by up to 9e-3 per token; another template, adapter or dropout
makes 0.1 and more. It is the wider of the two bounds of the check before the first step."""

UNKNOWN_TEXT = 5.0
"""Nats per token of the chosen answers before training: each token comes as one of e⁵, about 150, equally likely ones. A
pretrained model has 1 to 3 on text in its language, and our model of 9 million weights, made from nothing, had 4.4 after SFT
on it; a model that was not trained has log(vocabulary), 6 to 12."""

ENDS_WITHIN = 3.0
"""If answers were as long as the data's, at most one in three could pass three times their mean length (Markov's
inequality), so that four samples in a row would all do so at most once in 81 times."""

MIN_SAMPLES = 4
"""Fewer samples that do not end can be chance."""

FEW_STEPS = 10
"""A step of AdamW moves each weight by about the learning rate at most, whatever the gradient. The usual rates are made for
hundreds of steps: fewer than ten, of which one is warm-up and the last ones are small, hardly change a model."""

ENOUGH_STEPS = 30
"""What a smaller batch is worked out for."""


def learning_rate(history: History) -> Finding | None:
    """A rate that belongs to another kind of run."""
    run = history.run
    ratio = run.learning_rate / run.usual_learning_rate
    if 1.001 / RATE_FACTOR < ratio < 1.001 * RATE_FACTOR:  # the same decimal number may come out a rounding error apart
        return None
    kind = "an adapter" if run.adapter else "full fine-tuning"
    where = f"the {run.usual_learning_rate:g} that is usual for {run.method} with {kind} on a model of this size"
    if ratio > 1:
        what = f"The learning rate {run.learning_rate:g} is {said(ratio)} times {where}: steps so large break more than they teach."
    else:
        what = (
            f"The learning rate {run.learning_rate:g} is {said(1 / ratio)} times smaller than {where}: "
            f"in {run.num_steps:,} steps the model will hardly change."
        )
    do = f"Leave --learning-rate out or give {run.usual_learning_rate:g}, and go from there in factors of two or three."
    found = {"learning_rate": run.learning_rate, "usual_learning_rate": run.usual_learning_rate}
    return Finding("learning_rate", history.step, "warning", what, do, found)


def beta(history: History) -> Finding | None:
    """A β outside the range that the method declares as usual."""
    run = history.run
    if run.beta is None or "beta" not in run.usual:
        return None
    low, high = run.usual["beta"]
    if low <= run.beta <= high:
        return None
    if run.beta < low:
        why = "the policy is hardly held to the reference, and pays with its language for the last bit of margin"
    else:
        why = "a small margin already counts as learned, so the policy stays close to the reference and its answers change little"
    what = f"β is {run.beta:g}, outside the {low:g} to {high:g} that is usual for {run.method}: {why}."
    do = f"Leave --beta out, or stay within {low:g} to {high:g} and let the KL and the samples say in which direction to go."
    return Finding("beta", history.step, "note", what, do, {"beta": run.beta})


def start_difference(history: History) -> Finding | None:
    """Policy and reference are not the same function at the start; where they should be, the run was stopped before this."""
    run = history.run
    if run.start_difference is None or run.start_difference <= SAME_START:
        return None
    what = f"Before the first step policy and reference differ by {said(run.start_difference)} nats per token, "
    if run.settings.get("reference"):
        what += "because --reference names another model: part of every reward and of the KL was there before training."
        do = (
            "If that model is meant, compare rewards and KL with their values before training; "
            "if not, leave out --reference, and the reference is the model as it is at the start."
        )
    else:
        what += "because the reference's sums came with the data, and were made with other weights, another template or another cut."
        do = (
            "If another model is meant as the reference, all is well; if not, take reference_chosen_logp and reference_rejected_logp "
            "out of --data, and the reference is computed from --model."
        )
    return Finding("start_difference", 0, "note", what, do, {"start_difference": run.start_difference})


def untrained_reference(history: History) -> Finding | None:
    """The model that training starts from, and with it the reference, cannot do the task yet."""
    run = history.run
    if not run.has_reference or not run.begins_at_reference:
        return None
    surprise = _surprise(history)
    if surprise is not None and surprise >= UNKNOWN_TEXT:
        found = {"nats_per_token": surprise}
        choices = said(math.exp(min(surprise, 100.0)))
        sign = f"before training it gives the chosen answers {said(surprise)} nats per token, as if it chose among {choices}"
    elif (unended := _never_ends(history)) is not None:
        found = unended
        sign = (
            f"none of its {unended['samples']:.0f} answers ended within {unended['sample_tokens']:.0f} tokens, "
            f"while the data's have {said(unended['answer_length'])} on average"
        )
    else:
        return None
    what = (
        f"The model does not know how to answer like the data ({sign}), so it was probably not fine-tuned on this task, "
        "and a preference method can only choose among answers that a model gives."
    )
    do = (
        "Run SFT first on the chosen answers (prefopt train sft with the same --data, or a file with stages: [sft, dpo]) "
        "and give its model as --model; if it has had SFT, look whether --chat-template and --text-as are those that it was trained with."
    )
    return Finding("untrained_reference", history.step, "warning", what, do, found)


def _surprise(history: History) -> float | None:
    """Nats per token of the chosen answers before training: of held-out ones, or of those of the first step."""
    logps, length = history.before("eval/logps/chosen"), history.run.answer_length(held_out=True)
    if logps is None:
        logps, length = next(iter(values(history.rows[:1], "logps/chosen")), None), history.run.first_length
    return None if logps is None or length is None else -logps / length


def _never_ends(history: History) -> dict[str, float] | None:
    """The figures, where no answer ended though the data's are far shorter than the limit."""
    run, length = history.run, history.run.answer_length(held_out=True)
    limit = float(run.settings.get("sample_tokens", 0))
    if history.before("samples/ended") != 0 or run.num_samples < MIN_SAMPLES or length is None or limit < ENDS_WITHIN * length:
        return None
    return {"samples": run.num_samples, "sample_tokens": limit, "answer_length": length}


def few_steps(history: History) -> Finding | None:
    """A run too short to change anything, because the batch is large for the data."""
    run = history.run
    if run.num_steps >= FEW_STEPS or run.settings.get("max_steps") is not None:  # steps that were counted by hand are meant
        return None
    what = (
        f"The run has {run.num_steps} step{'s' * (run.num_steps != 1)}, because {run.num_train:,} examples make no more batches of "
        f"{run.batch_size}: too few to change a model at the usual learning rates."
    )
    enough = int(run.num_train * run.settings.get("epochs", 1.0)) // ENOUGH_STEPS
    smaller = f"Give --batch-size {enough}, or more --epochs" if enough >= 2 else "Give more examples, or more --epochs"
    return Finding("few_steps", 0, "note", what, f"{smaller}, so that there are at least some tens of steps.", {"num_steps": run.num_steps})
