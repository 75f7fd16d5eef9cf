"""Folders of runs that never ran, in every state, with texts and figures like those of real ones."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = [
    "How do I keep bread fresh for more than a day?",
    "My neighbour's dog barks every night. What can I say to them without starting a quarrel?",
    "Explain why the sky is blue to a child of six.",
    "Write a short thank-you note to a colleague who covered my shift.",
    "What is the difference between a fork and a branch in git?",
    "Can you tell me a joke about accountants that is not mean?",
    "Is it safe to eat rice that stood in the kitchen overnight?",
    "Suggest three names for a small bakery by the sea.",
]
GOOD = [
    "Keep it in a paper bag inside a bread box, cut side down, and freeze what you will not eat within two days. Toast it from frozen.",
    "Begin with what you share: ask how the dog is doing, say that you have been sleeping badly, and ask whether you can help.",
    "Light from the sun is all colours mixed. The air pushes blue around more than red, so blue comes to us from everywhere.",
    "Rice can hold spores that survive cooking. After a night at room temperature it is safer to throw it away.",
]
BAD = [
    "I don't know, look it up.",
    "Just buy new bread every day, it is cheap, it is cheap, it is cheap, it is cheap, it is cheap.",
    "The sky is blue because it reflects the sea, as everyone knows.",
    "Yes.",
]
FINDINGS = [
    {
        "rule": "displacement",
        "step": 60,
        "severity": "warning",
        "what": "The chosen answers have become less likely than under the reference: both log-probabilities fall, the rejected one "
        "faster, so the margin grows while probability goes to answers that nobody has seen.",
        "do": "Lower the learning rate, raise `beta`, or add a term that holds the chosen answers up; look at the answers below first.",
        "values": {"eval/rewards/chosen": -0.6},
    },
    {
        "rule": "learning_rate",
        "step": 0,
        "severity": "note",
        "what": "The learning rate of 2e-5 is forty times what is usual for dpo on all weights of a model of this size.",
        "do": "Leave `learning_rate` out, or give a reason to yourself.",
        "values": {"learning_rate": 2e-5},
    },
]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    folder: Path,
    *,
    state: str = "finished",
    method: str = "dpo",
    num_steps: int = 120,
    done: int | None = None,
    num_held_out: int = 60,
    every: int = 20,
    samples: int = 4,
    gain: float = 1.0,
    findings: Sequence[Mapping[str, Any]] = (),
    message: str = "",
    pid: int = 1,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
) -> Path:
    """A run's folder.

    Args:
        folder: to write it into; its parents are made.
        state: of the run.
        method: dpo, or sft, which has no pairs and no reference.
        num_steps, done: of the run, and how many are done; all of them by default.
        num_held_out: held-out examples; 0: none.
        every: steps between evaluations.
        samples: prompts that are answered at each evaluation.
        gain: how much is learned; 0: nothing, below 0: the wrong way round.
        findings: lines of `watch.jsonl`.
        message: of the run about its end.
        pid: of the process that the run says it is.
        seed: of the made-up numbers.
        settings: in addition to the usual ones.
        texts: stand in the place of the first prompts, chosen answers and so on, to be seen everywhere.
    """
    drawn = random.Random(seed)
    done = num_steps if done is None else done
    folder.mkdir(parents=True, exist_ok=True)
    pairs = method != "sft"
    all_settings = settings_of(folder, method, every, samples) | dict(settings or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(all_settings, sort_keys=False), encoding="utf-8")
    manifest = manifest_of(all_settings, num_steps, num_held_out)
    data = manifest["data"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rows = [metrics_row(step, num_steps, drawn, pairs=pairs, gain=gain) for step in range(1, done + 1)]
    evaluated = [step for step in range(1, done + 1) if num_held_out and (step % every == 0 or step == num_steps)]
    examples = [example_at(place, drawn, texts, pairs=pairs) for place in range(num_held_out)]
    held_out = {step: figures_at(examples, step / num_steps, pairs=pairs, gain=gain) for step in [0, *evaluated]} if num_held_out else {}
    for step in evaluated:
        rows[step - 1] |= means(held_out[step], step / num_steps, pairs=pairs, gain=gain)
    answers = [answer_row(place, step, num_steps, texts) for step in held_out for place in range(samples)]
    for step in evaluated if samples else []:
        rows[step - 1] |= sample_means(answers, step)
    write_lines(folder / "metrics.jsonl", rows)
    last = evaluated[-1] if evaluated else 0
    if num_held_out:
        lines = [
            {**example, "step": last, "before": before, **({"after": after} if last else {})}
            for example, before, after in zip(examples, held_out[0], held_out[last], strict=True)
        ]
        write_lines(folder / "held_out.jsonl", [{name: value for name, value in line.items() if name != "luck"} for line in lines])
    if answers:
        write_lines(folder / "samples.jsonl", answers)
    if findings:
        write_lines(folder / "watch.jsonl", findings)
    status = {"state": state, "step": done, "num_steps": num_steps, "pid": pid, "started": "2026-11-21T10:00:00+00:00",
              "updated": "2026-11-21T10:07:12+00:00", "message": message}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    if state != "running" and done:
        (folder / "checkpoints" / f"step-{done:06d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{done:06d}" / "state.json").write_text("{}", encoding="utf-8")
    if state == "finished":
        before = means(held_out[0], 0.0, pairs=pairs, gain=gain) | (sample_means(answers, 0) if samples else {}) if num_held_out else {}
        summary = {"before": before, "method": method, "model": all_settings["model"], "steps": done, "loss": rows[-1]["loss"],
                   "after": {name: value for name, value in rows[-1].items() if name.startswith(("eval/", "samples/"))},
                   "training_seconds": 432.1,
                   "device": "CPU (2 threads)", "data": data}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (folder / "model").mkdir()
    return folder


def settings_of(folder: Path, method: str, every: int, samples: int) -> dict[str, Any]:
    return {
        "method": method,
        **({"beta": 0.1, "label_smoothing": 0.0, "reference": None, "reference_cache": True, "kl_budget": None} if method != "sft" else {}),
        "model": "/home/somebody/models/qwen-small",
        "lora_rank": 0,
        "adapter": None,
        "data": ["/home/somebody/data/pairs.jsonl"],
        "batch_size": 32,
        "epochs": 2.0,
        "max_steps": None,
        "learning_rate": None,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.1,
        "eval_every_steps": every,
        "samples": samples,
        "seed": 0,
        "out": str(folder),
    }


def manifest_of(settings: Mapping[str, Any], num_steps: int, num_held_out: int) -> dict[str, Any]:
    data = {
        "fingerprint": "8177db1f36aa0eeba19f7bbf46630720044eb568",
        "summary": data_summary(1000),
        "num_train": 1000 - num_held_out,
        "num_held_out": num_held_out,
    }
    return {
        "prefopt": "0.1.0",
        "started": "2026-11-21T10:00:00+00:00",
        "method": settings["method"],
        "settings": settings,
        "resolved": {
            "learning_rate": 2e-5,
            "usual_learning_rate": 5e-7,
            "precision": "bf16",
            "engine": "flat, chunked head",
            "num_steps": num_steps,
            "max_length": 2048,
        },
        "model": {
            "name": "/home/somebody/models/qwen-small",
            "architecture": "Qwen2ForCausalLM",
            "num_parameters": 32_100_000,
            "num_trained": 32_100_000,
            "adapter": False,
        },
        "data": data,
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "platform": "Linux x86_64",
            "device": "CPU (2 threads)",
            "num_threads": 2,
            "num_processes": 1,
            "parallel": "ddp",
        },
    }


def data_summary(num: int) -> dict[str, Any]:
    return {
        "sources": [
            {
                "name": "pairs.jsonl",
                "format": "text_pair",
                "says": "prompt, chosen and rejected as text",
                "because": "1000 of the first 1000 rows have prompt, chosen, rejected",
                "num_rows": num + 12,
                "unread_columns": ["annotator"],
            }
        ],
        "ignored": [],
        "num_rows": num + 12,
        "num_trees": num,
        "dropped": {"too_long": 10, "same_answers": 2},
        "num_cut": 3,
        "num_merges": 0,
        "num_rewritten": 0,
        "num_duplicates": 4,
        "num_glued": 0,
        "template": "tokenizer",
        "num_tokens": 141_200,
        "mean_prompt": 58.2,
        "mean_answer": 41.5,
        "longest": 512,
        "prompt_share": 0.58,
        "seconds": 1.2,
        "from_cache": False,
        "notes": ["prompts are plain text and are used as they are"],
    }


def metrics_row(step: int, num_steps: int, drawn: random.Random, *, pairs: bool, gain: float) -> dict[str, Any]:
    part = step / num_steps
    noise = drawn.gauss(0, 1)
    row: dict[str, Any] = {"step": step, "epoch": round(2 * part, 4)}
    if pairs:
        margin = gain * 0.6 * part + 0.08 * noise * min(1.0, 4 * part)
        row |= {
            "loss": math.log(1 + math.exp(-margin)) + 0.01 * noise,
            "rewards/chosen": -0.2 * part + margin / 2,
            "rewards/rejected": -0.2 * part - margin / 2,
            "rewards/margin": margin,
            "rewards/accuracy": min(1.0, max(0.0, 0.5 + gain * 0.3 * part + 0.06 * noise)),
            "logps/chosen": -187.0 - 4 * part + 9 * noise,
            "logps/rejected": -232.0 - 8 * part + 9 * drawn.gauss(0, 1),
            "kl": 2.4 * part + 0.05 * abs(noise),
        }
    else:
        row |= {"loss": 4.2 - 2.0 * gain * part + 0.12 * noise, "logps/chosen": -187.0 + 80 * part + 5 * noise}
    return row | {
        "grad_norm": abs(0.9 + 0.2 * noise),
        "learning_rate": 2e-5 * (min(1.0, part / 0.1) if part < 0.1 else 0.5 * (1 + math.cos(math.pi * (part - 0.1) / 0.9))),
        "tokens_per_second": 3600 + 200 * noise,
        "examples_per_second": 8 + 0.4 * noise,
        "seconds": 3.6,
        "memory_gb": 1.88,
    }


def example_at(place: int, drawn: random.Random, texts: Sequence[str], *, pairs: bool) -> dict[str, Any]:
    completions = [text_at(texts, GOOD, place), text_at(texts, BAD, place)][: 2 if pairs else 1]
    return {
        "row": f"pairs.jsonl:{place * 7 + 3}",
        "prompt": text_at(texts, QUESTIONS, place),
        "completions": completions,
        "lengths": [30 + place % 7, 41 + place % 5][: len(completions)],
        "weight": 1.0,
        "luck": drawn.gauss(0, 1),
    }


def figures_at(examples: Sequence[Mapping[str, Any]], part: float, *, pairs: bool, gain: float) -> list[dict[str, float]]:
    found = []
    for place, example in enumerate(examples):
        margin = (gain * 0.45 + 0.7 * example["luck"]) * part
        chosen, rejected = -0.4 * part + margin / 2, -0.4 * part - margin / 2
        middle = place - (len(examples) - 1) / 2
        if not pairs:
            found.append({"logps/chosen": -140.0 + middle + (60 * gain + 5 * example["luck"]) * part})
            continue
        found.append({"rewards/margin": margin, "rewards/chosen": chosen, "rewards/rejected": rejected,
                      "rewards/accuracy": 0.5 if margin == 0 else float(margin > 0), "kl": 2.2 * part,
                      "logps/chosen": -187.0 + middle + 10 * chosen, "logps/rejected": -232.0 + middle + 10 * rejected})  # fmt: skip
    return found


def means(figures: Sequence[Mapping[str, float]], part: float, *, pairs: bool, gain: float) -> dict[str, float]:
    found = {f"eval/{name}": sum(row[name] for row in figures) / len(figures) for name in figures[0]}
    of_pairs = [math.log(1 + math.exp(-row["rewards/margin"])) for row in figures] if pairs else [4.25 - 1.7 * gain * part]
    loss = sum(of_pairs) / len(of_pairs)
    return {"eval/loss": loss, **found}


def sample_means(answers: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    rows = [answer for answer in answers if answer["step"] == step]
    names = {"num_tokens": "length", "repetition": "repetition", "entropy": "entropy", "ended": "ended"}
    return {f"samples/{name}": sum(float(row[key]) for row in rows) / len(rows) for key, name in names.items()}


def answer_row(place: int, step: int, num_steps: int, texts: Sequence[str]) -> dict[str, Any]:
    text = text_at(texts, BAD if step * 2 < num_steps else GOOD, place + step // 20)
    return {"step": step, "row": f"pairs.jsonl:{place * 7 + 3}", "prompt": text_at(texts, QUESTIONS, place), "text": text,
            "num_tokens": max(3, len(text) // 4), "ended": place != 3, "repetition": 0.31 if "cheap, it" in text else 0.0,
            "entropy": 2.1 - step / num_steps}  # fmt: skip


def text_at(texts: Sequence[str], usual: Sequence[str], place: int) -> str:
    return texts[place % len(texts)] if texts else usual[place % len(usual)]
