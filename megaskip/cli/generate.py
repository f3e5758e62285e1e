"""Text from a routed model, and what of the model ran for it: the job of launch/generate.py."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from megaskip.arch import find_decoder
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.config.checks import at_least, within
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, DataError
from megaskip.log import quiet_libraries
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.reporting.token_map import TokenMap, token_map_texts
from megaskip.routing import PREFIX

Messages = list[dict[str, str]]


def main(argv: Sequence[str]) -> None:
    """Answer the prompts of a file, or those that are typed, and say what was skipped."""
    options = parse(argv)
    prompts = typed() if options.prompts is None else read_prompts(Path(options.prompts))
    quiet_libraries()
    transformers.utils.logging.disable_progress_bar()
    model, folder = load_routed(options.model, options.dtype, options.base)
    if options.capacity is not None:
        model.get_submodule(PREFIX).set_capacity(options.capacity)
    tokenizer = other_tokenizer(options.tokenizer, Path(options.model), folder)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="launch/generate.py",
        description="Generate with a routed model and see what it skipped.",
    )
    parser.add_argument("--model", required=True, help="exported folder, run folder or routers")
    parser.add_argument("--base", help="base model of a run or router folder [what it names]")
    parser.add_argument(
        "--tokenizer",
        help="tokenizer, folder or hub id [of a run: what it was trained with; else the model's]",
    )
    parser.add_argument(
        "--prompts", help="file: a prompt a line, or .jsonl with prompt or messages [typed in]"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="[128]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus of sampling [1]")
    parser.add_argument("--num_beams", type=int, default=1, help="beams; no streaming [1]")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling [0]")
    parser.add_argument("--capacity", type=float, help="one that tools/calibrate.py calibrated")
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--output", help="write prompts, answers and shares to this .jsonl file")
    parser.add_argument(
        "--picture", help="write what ran by token and layer to PICTURE.png and PICTURE.html"
    )
    options = parser.parse_args(argv)
    problems = tuple(_problems(options))
    if problems:
        raise ConfigError(*problems)
    return options


def _problems(options: argparse.Namespace) -> Iterator[str]:
    for name in ("max_new_tokens", "num_beams"):
        yield from at_least(name, getattr(options, name), 1)
    if not 0 <= options.temperature < math.inf:
        yield f"--temperature {options.temperature:g} must be 0 or a positive number"
    yield from within("top_p", options.top_p, 0.0, 1.0, open_low=True)
    if 0 < options.top_p < 1 and options.temperature == 0:
        yield f"--top_p {options.top_p:g} is for sampling; give a --temperature above 0"
    if options.picture and options.num_beams > 1:
        yield "--picture shows one text, which beams are not; leave it out, or use --num_beams 1"
    if options.output and options.prompts and _same_file(options.output, options.prompts):
        yield f"--output {options.output} is the file of --prompts; name another"
    if options.output and Path(options.output).is_dir():
        yield f"--output {options.output}: this is a folder; name a file"
    elif options.output and not Path(options.output).parent.is_dir():
        yield f"--output {options.output}: there is no folder {Path(options.output).parent}"


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def load_routed(name: str, dtype: str, base: str | None) -> tuple[Any, Path]:
    """Return (model in evaluation mode, folder of its tokenizer) of an exported or a run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_for_inference(name, Placement.on(device), dtype=dtype, base=base)
    if loaded.routers is None:
        raise ConfigError(f"--model {name} is a model without routers; export a run first")
    return loaded.model, loaded.folder


def read_prompts(path: Path) -> list[Messages]:
    """Return the prompts of a file as messages; raises DataError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: {error}") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise DataError(f"--prompts {path} holds no prompt")
    if path.suffix != ".jsonl":
        return [_user(line) for _, line in filled]
    return [_messages(line, f"--prompts {path}, line {number}") for number, line in filled]


def typed() -> Iterator[Messages | None]:
    """Yield what is typed; None starts a new conversation."""
    if sys.stdin.isatty():
        print("/new starts over, /quit (or Ctrl-D) ends")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line:
            yield None if line == "/new" else _user(line)


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _messages(line: str, place: str) -> Messages:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON ({error})") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return _user(row["prompt"])
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise DataError(f"{place}: expected a field prompt or messages")
    if not row["messages"]:
        raise DataError(f"{place}: there is no message in messages")
    for number, message in enumerate(row["messages"], 1):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise DataError(f"{place}: message {number} is not an object with role and content")
    return list(row["messages"])


def _write(output: str, mode: str, text: str) -> None:
    try:
        with open(output, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None


@dataclass(kw_only=True)
class Conversation:
    """Turns on one cache: what a sequence decided on its first prompt holds for all of them."""

    model: Any
    tokenizer: Any
    options: argparse.Namespace
    messages: Messages = field(default_factory=list)
    pictures: int = 0

    def __post_init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forget the turns so far."""
        self.messages = []
        self._cache = DynamicCache(config=self.model.config)
        self._seen = torch.zeros(1, 0, dtype=torch.int64)
        self._record = Record(self.model)

    @torch.no_grad()
    def answer(self, turn: Messages) -> dict[str, Any]:
        """Stream the answer to one more turn, print what was skipped, and return both."""
        self.messages = self.messages + turn
        ids = self._encode()
        if not torch.equal(ids[:, : self._seen.shape[1]], self._seen):
            # The template has rewritten the past: its keys and values are of another text.
            messages = self.messages
            self.start_over()
            self.messages = messages
        options = self.options
        streams = options.num_beams == 1
        with self._record:
            out = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                past_key_values=self._cache if streams else None,
                max_new_tokens=options.max_new_tokens,
                num_beams=options.num_beams,
                streamer=self._streamer() if streams else None,
                **_sampling(options),
            )
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        if not streams:
            print(text)
        self._seen = out[:, : self._cache.get_seq_length()].cpu()
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        return {"messages": self.messages, **self._report(out[0], ids.shape[1])}

    def _encode(self) -> Tensor:
        if self.options.raw or not self.tokenizer.chat_template:
            text = "\n".join(message["content"] for message in self.messages)
            ids = self.tokenizer(text)["input_ids"]
            if not ids:
                raise DataError("a prompt is empty; the tokenizer makes no token of it")
            return torch.tensor([ids])
        try:
            encoded = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(
                f"the chat template rejects {self.messages[-1]['content']!r} after "
                f"{len(self.messages) - 1} messages ({error}); mend the prompt, or use --raw"
            ) from None
        found: Tensor = encoded["input_ids"]
        return found

    def _streamer(self) -> Any:
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _report(self, ids: Tensor, prompt_tokens: int) -> dict[str, Any]:
        ran, layers = self._record.matrix(), self._record.layers
        if not ran.size or self.options.num_beams > 1:
            return {}
        shares = {layer: float(row.mean()) for layer, row in zip(layers, ran, strict=True)}
        line = "  ".join(f"{layer}: {share:.2f}" for layer, share in shares.items())
        print(f"[ran {float(ran.mean()):.2f} of the routed units; by layer {line}]")
        if self.options.picture:
            self._draw(ids, ran, prompt_tokens)
        return {"capacity": float(ran.mean()), "capacity_per_layer": shares}

    def _draw(self, ids: Tensor, ran: np.ndarray, prompt_tokens: int) -> None:
        routers = self.model.get_submodule(PREFIX)
        picture = TokenMap(
            tokens=token_map_texts(self.tokenizer, ids[: ran.shape[1]].tolist()),
            layers=self._record.layers,
            ran=ran,
            num_layers=len(find_decoder(self.model).layers),
            prompt_tokens=min(prompt_tokens, ran.shape[1]),
            title=f"{routers.config.granularity}: what ran, by token and layer",
            target=routers.config.target,
        )
        self.pictures += 1
        stem = f"{self.options.picture}-{self.pictures}" if self.pictures > 1 else None
        path = Path(stem or self.options.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.write_png(path.with_name(f"{path.name}.png"))
        picture.write_html(path.with_name(f"{path.name}.html"))
        print(f"[picture: {path}.png, {path}.html]")


class Record:
    """Context that notes which (layer, token) pairs ran, call by call, for the first row."""

    def __init__(self, model: Any) -> None:
        self._routers = model.get_submodule(PREFIX)
        self._decoder = find_decoder(model).decoder
        self._calls: list[np.ndarray] = []
        self.layers: tuple[int, ...] = tuple(self._routers.layers)

    def __enter__(self) -> None:
        self._handle = self._decoder.register_forward_hook(self._note)

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()

    def matrix(self) -> np.ndarray:
        """Return bool [layers, tokens that went through the model]."""
        empty = np.zeros((len(self.layers), 0), dtype=bool)
        return np.concatenate([empty, *self._calls], axis=1)

    def _note(self, module: Any, args: Any, output: Any) -> None:
        tokens = output[0].shape[1]
        rows = [keep[0].expand(tokens) > 0 for keep in self._routers.keep().values()]
        self._calls.append(torch.stack(rows).cpu().numpy())


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    if not options.temperature:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
