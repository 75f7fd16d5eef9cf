"""What users say about answers: `prefopt generate` and `prefopt chat`.

Apart from what runs models, so that their help is drawn without importing torch.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from prefopt.config import REQUIRED, Setting, Settings


class AnswerSettings(Settings):
    """Who answers, and how."""

    model: str = Setting(REQUIRED, help="Folder of a run, of a model or of an adapter, or a hub name: the policy.")
    adapter: str | None = Setting(None, help="Folder or hub name of an adapter on the model; one that names its base is given as model.")
    reference: str | None = Setting(
        None,
        help="Folder or hub name of the model that answers beside it, or `none`; the default is the reference of the run, if it has one.",
    )
    max_new_tokens: int = Setting(256, ge=1, help="Tokens after which an answer is cut.")
    temperature: float = Setting(
        1.0, ge=0, help="Logits are divided by it; 1 is the model's own distribution, 0 takes the likeliest token."
    )
    seed: int = Setting(0, ge=0, help="Seed of the draws; policy and reference draw the same numbers.")
    text_as: Literal["auto", "raw", "chat"] = Setting(
        "auto", help="Prompts that are plain text: `raw` takes them as they are, `chat` as a question; `auto` does as training did."
    )
    system: str | None = Setting(None, help="System message that opens every chat.")
    chat_template: str | None = Setting(None, help="Jinja template, or the path of one, in place of the tokenizer's own.")
    template_args: dict[str, Any] = Setting({}, help="Further arguments for the chat template; the default is those of the run.")
    precision: Literal["auto", "bf16", "float32"] = Setting(
        "auto", help="Arithmetic; `auto` is bf16 where the hardware has it, as in training."
    )
    load_in_4bit: bool | None = Setting(
        None, help="Hold the weights in 4 bits (NF4), by bitsandbytes; the default is to do as the run did in training."
    )
    device: Literal["auto", "cpu", "cuda"] = Setting("auto", help="Where to run; `auto` takes a GPU where there is one.")
    trust_remote_code: bool = Setting(False, help="Run Python code that comes with the model. It can do anything on your machine.")


class PromptSettings(Settings):
    """What is asked, and where the answers go."""

    prompts: str | None = Setting(
        None,
        help="File of prompts: .txt with one per line, or any file that can be trained on (its answers are left aside); `-` reads stdin.",
    )
    prompt: list[str] = Setting([], help="Prompts themselves.")
    columns: dict[str, str] = Setting({}, help="Other column names, as `field: column`, for example `prompt: question`.")
    on_bad_row: Literal["stop", "drop"] = Setting("stop", help="`stop` names the rows without a usable prompt; `drop` leaves them out.")
    out: Path | None = Setting(None, help="File to write, one JSON object per answer; the default is readable text on standard output.")
    overwrite: bool = Setting(False, help="Replace the file that `out` names.")
    num_per_prompt: int = Setting(1, ge=1, help="Answers of each model to each prompt.")
    logps: bool = Setting(False, help="Score each answer under both models: its log-probabilities, and the implicit reward.")
    batch_size: int = Setting(32, ge=1, help="Answers written at once; lower it when memory runs out.")

    @model_validator(mode="after")
    def _prompts_are_given_once(self) -> "PromptSettings":
        if bool(self.prompt) == (self.prompts is not None):
            raise ValueError("give prompts as a file (--prompts FILE, or --prompts - for standard input) or as words (--prompt TEXT...)")
        if self.prompts is None and {"columns", "on_bad_row"} & self.model_fields_set:
            raise ValueError("columns and on_bad_row are about a file of prompts: give --prompts")
        if self.overwrite and self.out is None:
            raise ValueError("overwrite is about the file that out names: give --out")
        return self


class GenerateSettings(AnswerSettings, PromptSettings):
    """Everything that can be said about answers to prompts; help shows what is asked first."""


class ChatSettings(AnswerSettings):
    """What is said about a chat."""

    max_new_tokens: int = Setting(512, ge=1, help="Tokens after which an answer is cut.")
