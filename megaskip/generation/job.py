"""The job of `megaskip generate`: a model, its prompts, answers to the screen and to files."""

import json
from pathlib import Path
from typing import Any

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
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.routing import PREFIX


def generate(options: GenerateOptions) -> None:
    """Answer the prompts of a file, or those that are typed, and say what was skipped."""
    prompts = typed_prompts() if options.prompts is None else read_prompts(options.prompts)
    template = read_template(options.chat_template) if options.chat_template else None
    quiet_libraries()
    transformers.utils.logging.disable_progress_bar()
    model, folder = load_routed(options.model, options.dtype, options.base)
    if options.capacity is not None:
        model.get_submodule(PREFIX).set_capacity(options.capacity)
    tokenizer = other_tokenizer(options.tokenizer, Path(options.model), folder)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    if template is not None:
        tokenizer.chat_template = template
    torch.manual_seed(options.seed)
    conversation = Conversation(model=model, tokenizer=tokenizer, options=options)
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


def load_routed(name: str, dtype: str, base: str | None) -> tuple[Any, Path]:
    """Return (model in evaluation mode, folder of its tokenizer) of an exported or a run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_for_inference(name, Placement.on(device), dtype=dtype, base=base)
    if loaded.routers is None:
        raise ConfigError(f"--model {name} is a model without routers; export a run first")
    return loaded.model, loaded.folder


def _write(output: Path, mode: str, text: str) -> None:
    try:
        with open(output, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None
