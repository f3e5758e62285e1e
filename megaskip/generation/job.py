"""The job of `megaskip generate`: a model, its prompts, answers to the screen and to files."""

import json
from pathlib import Path

import torch
import transformers

from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.config.commands.generate import GenerateOptions
from megaskip.data.template import read_template
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.generation.conversation import Conversation
from megaskip.generation.prompts import read_prompts, typed_prompts
from megaskip.log import quiet_libraries
from megaskip.parallel.inference import InferenceModel, Placement, load_for_inference


def generate(options: GenerateOptions) -> None:
    """Answer the prompts of a file, or those that are typed, and say what was skipped."""
    prompts = typed_prompts() if options.prompts is None else read_prompts(options.prompts)
    template = read_template(options.chat_template) if options.chat_template else None
    quiet_libraries()
    transformers.utils.logging.disable_progress_bar()
    loaded = load_alone(options.model, options.dtype, options.base)
    if loaded.routers is None:
        _require_nothing_of_routers(options)
        print(f"[{loaded.description}: the same layers run for every text]")
    elif options.capacity is not None:
        loaded.routers.set_capacity(options.capacity)
    tokenizer = other_tokenizer(options.tokenizer, Path(options.model), loaded.folder)
    if tokenizer is None:
        tokenizer = load_tokenizer(loaded.folder)
    if template is not None:
        tokenizer.chat_template = template
    torch.manual_seed(options.seed)
    conversation = Conversation(
        model=loaded.model, routers=loaded.routers, tokenizer=tokenizer, options=options
    )
    if options.output:
        _write(options.output, "w", "")
    for prompt in prompts:
        if prompt is None or options.prompts is not None:
            conversation.start_over()
        if prompt is None:
            continue
        answer = conversation.answer(prompt)
        if options.output:
            _write(options.output, "a", json.dumps(answer, ensure_ascii=False) + "\n")
    if options.output:
        print(f"answers: {options.output}")


def load_alone(name: str, dtype: str, base: str | None) -> InferenceModel:
    """Return the model of any folder that `load_for_inference` takes, whole on this process's
    device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_for_inference(name, Placement.on(device), dtype=dtype, base=base)


def _require_nothing_of_routers(options: GenerateOptions) -> None:
    """Raise ConfigError for flags that a model without routers does not have."""
    for flag in ("capacity", "picture", "base"):
        if getattr(options, flag) is not None:
            raise ConfigError(
                f"--{flag} is for routers, and --model {options.model} has none: the same layers "
                "run for every text; leave it out"
            )


def _write(output: Path, mode: str, text: str) -> None:
    try:
        with open(output, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None
