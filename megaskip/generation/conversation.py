"""A conversation with a model: turns on one cache, and what ran for each."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, TextStreamer

from megaskip.arch import find_decoder
from megaskip.arch.decision_cache import cached_decisions, put_decisions
from megaskip.config.commands.generate import GenerateOptions
from megaskip.data.plain_text import PlainTextEncoder
from megaskip.data.template import TEMPLATE_ERRORS, choose_template
from megaskip.data.vocabulary import require_known_token
from megaskip.errors import ConfigError, DataError
from megaskip.generation.prompts import Messages
from megaskip.generation.record import RunRecord
from megaskip.reporting.summary import capacity_line
from megaskip.reporting.token_map import TokenMap, token_map_texts
from megaskip.routing import Routers


@dataclass(kw_only=True)
class Conversation:
    """Turns on one cache: what a sequence decided on its first prompt holds for all of them."""

    model: Any
    routers: Routers | None
    """Those of the model; None where the same layers run for every text."""
    tokenizer: Any
    options: GenerateOptions
    messages: Messages = field(default_factory=list)
    pictures: int = 0

    def __post_init__(self) -> None:
        executor = None if self.routers is None else self.routers.executor
        if self.options.static and getattr(executor, "drops_tokens", False):
            raise ConfigError(
                "--static does not go with a folder of --kv drop: a static cache holds the keys "
                "of all tokens; leave it out"
            )
        self.start_over()

    def start_over(self) -> None:
        """Forget the turns so far."""
        self.messages = []
        self._cache: Any = DynamicCache(config=self.model.config)
        self._seen = torch.zeros(1, 0, dtype=torch.int64)
        self._record = None if self.routers is None else RunRecord(self.routers, self.model)

    @torch.no_grad()
    def answer(self, turn: Messages) -> dict[str, Any]:
        """Stream the answer to one more turn, print what was skipped, and return both."""
        self.messages = self.messages + turn
        ids = self._encode()
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        require_known_token(int(ids.max()), vocabulary, text="a prompt")
        if not torch.equal(ids[:, : self._seen.shape[1]], self._seen):
            # The template has rewritten the past: its keys and values are of another text.
            messages = self.messages
            self.start_over()
            self.messages = messages
        options = self.options
        streams = options.num_beams == 1
        with self._record or nullcontext():
            out = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                past_key_values=self._cache_for(ids.shape[1]) if streams else None,
                max_new_tokens=options.max_new_tokens,
                num_beams=options.num_beams,
                streamer=self._streamer() if streams else None,
                **_sampling(options),
            )
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        if not streams:
            print(text)
        self._seen = out[:, : int(self._cache.get_seq_length())].cpu()
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        return {"messages": self.messages, **self._report(out[0], ids.shape[1])}

    def _encode(self) -> Tensor:
        return prompt_ids(self.tokenizer, self.messages, raw=self.options.raw)

    def _cache_for(self, tokens: int) -> Any:
        """Return the cache of a turn that begins with `tokens`. A static one has its length for
        good, so each turn has its own, with the decisions of the first."""
        if self.options.static:
            decisions = cached_decisions(self._cache)
            length = tokens + self.options.max_new_tokens
            self._cache = StaticCache(config=self.model.config, max_cache_len=length)
            put_decisions(self._cache, decisions)
        return self._cache

    def _streamer(self) -> Any:
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _report(self, ids: Tensor, prompt_tokens: int) -> dict[str, Any]:
        if self._record is None or self.options.num_beams > 1:
            return {}
        ran, layers = self._record.matrix(self._seen.shape[1]), self._record.layers
        if not ran.size:
            return {}
        shares = {layer: float(row.mean()) for layer, row in zip(layers, ran, strict=True)}
        line = capacity_line(shares)
        print(f"[ran {float(ran.mean()):.2f} of the routed units; by layer {line}]")
        if self.options.picture:
            self._draw(self.options.picture, ids, ran > 0, prompt_tokens)
        return {"capacity": float(ran.mean()), "capacity_per_layer": shares}

    def _draw(self, name: str, ids: Tensor, ran: np.ndarray, prompt_tokens: int) -> None:
        assert self.routers is not None
        routing = self.routers.config
        picture = TokenMap(
            tokens=token_map_texts(self.tokenizer, ids[: ran.shape[1]].tolist()),
            layers=tuple(self.routers.layers),
            ran=ran,
            num_layers=len(find_decoder(self.model).layers),
            prompt_tokens=min(prompt_tokens, ran.shape[1]),
            title=f"{routing.granularity}: what ran, by token and layer",
            target=routing.target,
        )
        self.pictures += 1
        path = Path(f"{name}-{self.pictures}" if self.pictures > 1 else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.write_png(path.with_name(f"{path.name}.png"))
        picture.write_html(path.with_name(f"{path.name}.html"))
        print(f"[picture: {path}.png, {path}.html]")


def prompt_ids(tokenizer: Any, messages: Messages, *, raw: bool = False) -> Tensor:
    """Return the tokens [1, T] of a conversation that the model is to go on with, in its chat
    format unless `raw`.

    Raises DataError when the chat template cannot be used for them, or there is no token.
    """
    if raw or not tokenizer.chat_template:
        text = "\n".join(message["content"] for message in messages)
        # Nothing behind the text: a tokenizer's end token would end what is to be continued.
        ids = PlainTextEncoder(tokenizer).encode(text)
        if not ids:
            raise DataError("a prompt is empty; the tokenizer makes no token of it")
        return torch.tensor([ids])
    choose_template(tokenizer, origin="the tokenizer")
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"the chat template rejects {messages[-1]['content']!r} after "
            f"{len(messages) - 1} messages ({error}); mend the prompt, or use --raw"
        ) from None
    ids_BT: Tensor = encoded["input_ids"]
    return ids_BT


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    if not options.temperature:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
