"""lm-eval's HFLM for routed models: token masks, decisions made on the context, costs by
document."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, DataError
from megaskip.evaluation.encoding_lm import EncodingLM
from megaskip.evaluation.rank_pool import RankPool
from megaskip.evaluation.runner import Kept, LocalRunner, Runner, StopRows
from megaskip.evaluation.scored_text import ScoredText, chunks, token_batch
from megaskip.extras import extra
from megaskip.measures.costs import Cost, CostModel
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.routing import PREFIX

with extra("eval"):
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs

Document = tuple[str, int]
"""Task and index."""
ScoredAnswer = tuple[tuple[float, bool], Cost]
"""(log-probability of a continuation, whether it is the most likely one), and what it cost."""
_DENSE_PROMPT = 32
_SEED = 1234


@register_model("megaskip")
class MegaskipLM(EncodingLM):
    """lm-eval's HFLM for a routed or a dense model, on one rank or many."""

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        runner: Runner | None = None,
        shape: Any = None,
        base: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        lm_eval_compatible: bool = False,
    ) -> None:
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ConfigError(f"--batch_size {batch_size!r} must be a number from 1 on")
        if isinstance(pretrained, str):
            # lm-eval's command line asks for "cuda:0" on machines without one, too.
            name = (device or "cuda") if torch.cuda.is_available() else "cpu"
            placement = Placement.on(torch.device(name))
            loaded = load_for_inference(pretrained, placement, dtype=dtype, base=base)
            tokenizer = load_tokenizer(tokenizer or loaded.folder)
            pretrained = loaded.model
            runner = LocalRunner(loaded.model, loaded.routers)
        super().__init__(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=int(batch_size),
            max_length=max_length,
            lm_eval_compatible=lm_eval_compatible,
        )
        self.runner: Runner = runner or LocalRunner(pretrained, routers_of(pretrained))
        self._costs = CostModel(shape or pretrained, self.runner.routers)
        self.spent: defaultdict[Document, Cost] = defaultdict(Cost)
        self._last_call: list[Cost] = []
        self._generated: list[Cost] = []
        self._dense_context = contextlib.ExitStack()
        self.rank_pool = RankPool(
            self.runner,
            {"scoring": self._score, "generating": self._generate, "dense": self._set_dense},
        )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Hold a context in which all ranks answer as the unrouted base."""
        self.rank_pool.run("dense", [True] * self.runner.shares)
        try:
            yield
        finally:
            self.rank_pool.run("dense", [False] * self.runner.shares)

    def _set_dense(self, is_dense: bool) -> None:
        if is_dense and self.runner.routers is not None:
            self._dense_context.enter_context(self.runner.routers.disabled())
        else:
            self._dense_context.close()

    # -- what lm-eval calls, on the first rank

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return (log-probability, is greedy) of each continuation; contexts are what routers
        judge by."""
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self._add_costs(requests)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each text; decisions are made on its first tokens."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in self._windows(request.args[0]):
                windows.append((None, *window))
                owners.append(number)
        answers = self._loglikelihood_tokens(windows)
        sums, costs = [0.0] * len(requests), [Cost()] * len(requests)
        for owner, (logprob, _), cost in zip(owners, answers, self._last_call, strict=True):
            sums[owner] += logprob
            costs[owner] += cost
        self._last_call = costs
        self._add_costs(requests)
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return the text generated for each prompt; the prompt is what routers judge by."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)
            self._require_room(options["max_gen_toks"])
            groups[repr(request.args[1])].append(number)
        order: list[list[int]] = []
        for numbers in groups.values():
            numbers.sort(key=lambda number: self._generation_key(requests[number].args[0]))
            order += chunks(numbers, self.batch_size)
        batches = [
            (self.asks_in_chat, [requests[number].args for number in chunk]) for chunk in order
        ]
        answers: dict[int, tuple[str, Cost]] = {}
        answered = self.rank_pool.run("generating", batches, sizes=[len(chunk) for chunk in order])
        for numbers, of_batch in zip(order, answered, strict=True):
            answers |= dict(zip(numbers, of_batch, strict=True))
        self._last_call = [answers[number][1] for number in range(len(requests))]
        self._add_costs(requests)
        return [answers[number][0] for number in range(len(requests))]

    def _require_room(self, answer: int) -> None:
        if answer >= self.max_length:
            raise ConfigError(
                f"an answer may have {answer} tokens, which leaves a text of --max_length "
                f"{self.max_length} no room for a prompt"
            )

    def _generation_key(self, context: str) -> tuple[int, str]:
        # As HFLM sorts a batch, so that its rows come back in the order they were given.
        ids = self.tok_encode(context)
        self._require_known(ids, context)
        return -len(ids), context

    def _add_costs(self, requests: Any) -> None:
        for request, cost in zip(requests, self._last_call, strict=True):
            self.spent[request.task_name, request.doc_id] += cost

    # -- scoring

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        """Return (log-probability, is greedy) of (text, context, continuation) token lists."""
        texts: dict[Any, ScoredText] = {}
        for number, (given, context, continuation) in enumerate(requests):
            text = self._scored_text(given, context, continuation)
            # Choices of one token share their row.
            text = texts.setdefault(text.key, text)
            text.asked.append((number, tuple(continuation)))
        batches = list(chunks(sorted(texts.values(), key=lambda t: t.order), self.batch_size))
        sizes = [sum(len(text.asked) for text in batch) for batch in batches]
        answers: dict[int, ScoredAnswer] = {}
        for of_batch in self.rank_pool.run("scoring", batches, sizes=sizes):
            answers |= of_batch
        self._last_call = [answers[number][1] for number in range(len(requests))]
        return [answers[number][0] for number in range(len(requests))]

    def _scored_text(
        self, text: Any, context: Sequence[int], continuation: Sequence[int]
    ) -> ScoredText:
        length = len(continuation)
        if not length:
            raise DataError(
                f"the answer {text[1]!r} behind {text[0][-40:]!r} has no token, so nothing says "
                "how likely it is; mend the task's data"
            )
        whole = self._cut([*context, *continuation], self.max_length + 1)
        if length >= len(whole) or whole[-length:] != list(continuation):
            raise ConfigError(
                f"an answer has {length} tokens, which is more than a text of --max_length "
                f"{self.max_length} holds"
            )
        self._require_known(whole, "a window of a text" if text is None else text[1])
        tokens = tuple(whole[:-1])
        is_plain = text is None or text[0] == ""
        prompt = self._prompt_tokens if is_plain else len(tokens) + 1 - length
        prompt = max(min(prompt, len(tokens)), 1)
        return ScoredText(tokens=tokens, prompt=prompt, length=length)

    @property
    def _prompt_tokens(self) -> int:
        routers = self.runner.routers
        return _DENSE_PROMPT if routers is None else routers.config.prompt_tokens

    def _score(self, texts: list[ScoredText]) -> dict[int, ScoredAnswer]:
        """Return the answers to the requests about `texts`, by the number of the request."""
        batch = token_batch(texts, pad_token_id=self._pad_token_id, device=self.runner.device)
        logits, kept = self.runner.logits(batch)
        answers: dict[int, ScoredAnswer] = {}
        if not self.runner.answers:
            return answers
        width = batch.input_ids.shape[1]
        for row, text in enumerate(texts):
            end = batch.last - (width - len(text.tokens))
            scores = logits[row, end - text.length : end].float().log_softmax(-1)
            greedy = scores.argmax(-1)
            cost = self._costs.price(len(text.tokens), text.length, *_of_row(kept, row))
            for number, continuation in text.asked:
                wanted = torch.tensor(continuation, device=scores.device)
                logprob = scores.gather(1, wanted[:, None]).sum()
                answers[number] = (float(logprob), bool((greedy == wanted).all())), cost
                cost = Cost()  # the row was computed once
        return answers

    # -- generation

    def _generate(
        self, batch: tuple[bool, list[tuple[str, dict[str, Any]]]]
    ) -> list[tuple[str, Cost]]:
        self.asks_in_chat, prompts = batch
        asked = [SimpleNamespace(args=(text, copy.deepcopy(options))) for text, options in prompts]
        texts = super().generate_until(asked, disable_tqdm=True)
        if not self.runner.answers:
            return []
        return list(zip(texts, self._generated, strict=True))

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **options: Any
    ) -> Any:
        """Return ids [B, T + new] of prompts [B, T], padded on the left."""
        mask = options.pop("attention_mask")
        if not options.get("do_sample"):
            options = {
                k: v for k, v in options.items() if k not in ("temperature", "top_p", "top_k")
            }
            options["do_sample"] = False
        else:
            torch.manual_seed(_SEED)  # a batch's sample does not depend on who draws it
        ends = self.model.generation_config.eos_token_id
        known = {*(ends if isinstance(ends, list) else [ends]), self.eot_token_id}
        criterion = StopRows(self.tokenizer, stop, context.shape[1], known)
        ids, calls = self.runner.generate(
            context,
            mask,
            criterion,
            max_length=max_length,
            pad_token_id=self._pad_token_id,
            **options,
        )
        if not self.runner.answers:
            return ids
        lengths = [criterion.length(row) for row in ids[:, context.shape[1] :].tolist()]
        self._generated = [
            self._generation_cost(row, int(mask[row].sum()), length, calls)
            for row, length in enumerate(lengths)
        ]
        return ids

    def _generation_cost(self, row: int, prompt: int, length: int, calls: list[Kept]) -> Cost:
        """Return what a row of `prompt` tokens and `length` new ones costs, whatever the other rows
        of its batch are; the last new token is not read."""
        steps = max(length - 1, 0)
        routers = self.runner.routers
        tokenwise = routers is not None and routers.config.unit == "token"
        counted = calls[: 1 + steps] if tokenwise else calls[:1]
        kept = torch.stack([call.kept[:, row] for call in counted]).sum(0).tolist()
        units = torch.stack([call.units[:, row] for call in counted]).sum(0).tolist()
        return self._costs.price(prompt + steps, max(length, 1), kept, units)


def routers_of(model: Any) -> Any:
    """Return the Routers that is registered on a model, or None."""
    return dict(model.named_children()).get(PREFIX)


def _of_row(kept: Kept, row: int) -> tuple[list[float], list[float]]:
    return kept.kept[:, row].tolist(), kept.units[:, row].tolist()
