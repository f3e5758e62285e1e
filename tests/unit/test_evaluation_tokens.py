"""Evaluation reads texts as training does, and as lm-eval does where it is asked to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_samples import CHATML, fast_tokenizer, slow_tokenizer
from families import tiny_model
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from megaskip.data.fields import Place
from megaskip.data.formats import Sample
from megaskip.data.plain_text import PlainTextEncoder
from megaskip.data.request_encoder import RequestEncoder
from megaskip.data.tokenize import SampleTokenizer
from megaskip.errors import ConfigError, DataError
from megaskip.evaluation.lm import MegaskipLM
from megaskip.evaluation.report import EvalReport

RULES = ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<|im_start|> <s> $A"]
"""What tokenizers put around a text: GPT-2's, Llama's, add_eos_token, both, GLM's."""
IDS = {"<s>": 1, "</s>": 2, "<|im_start|>": 4}
MODEL = tiny_model(vocab_size=340)
TEXTS = ["hello", "the answer is four", "hello world how are you today " * 12, "<s>hello you"]
ASKED = [
    ("how are you", " fine"),
    ("what is two ", "four"),
    ("", "hello world"),
    ("a b " * 60, "c"),
]


def tokenizer_with(rule: str, template: str | None = None) -> Any:
    tokenizer = fast_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=rule, special_tokens=list(IDS.items())
    )
    return tokenizer


def lm_with(tokenizer: Any, **options: Any) -> MegaskipLM:
    return MegaskipLM(MODEL, tokenizer, batch_size=3, max_length=40, **options)


def requests(arguments: list[Any]) -> list[Any]:
    return [
        SimpleNamespace(args=args, task_name="t", doc_id=number)
        for number, args in enumerate(arguments)
    ]


def rolling(lm: Any, texts: list[str]) -> list[float]:
    return list(lm.loglikelihood_rolling(requests([(text,) for text in texts])))


def generated(lm: Any, prompts: list[str]) -> list[str]:
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": 8}
    return list(lm.generate_until(requests([(prompt, options) for prompt in prompts])))


def logprob(context: list[int], answer: list[int]) -> float:
    """Return the log-probability of `answer` behind `context`, by the model alone."""
    with torch.no_grad():
        scores = MODEL(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
    positions = range(len(context) - 1, len(context) + len(answer) - 1)
    return sum(float(scores[at, token]) for at, token in zip(positions, answer, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_compatible_numbers_are_lm_evals(rule: str) -> None:
    theirs = HFLM(MODEL, tokenizer=tokenizer_with(rule), batch_size=1, max_length=40)
    ours = lm_with(tokenizer_with(rule), lm_eval_compatible=True)
    assert rolling(ours, TEXTS) == pytest.approx(rolling(theirs, TEXTS), abs=1e-5)
    mine, wanted = ours.loglikelihood(requests(ASKED)), theirs.loglikelihood(requests(ASKED))
    assert [logprob for logprob, _ in mine] == pytest.approx([p for p, _ in wanted], abs=1e-5)
    assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in wanted]
    assert generated(ours, TEXTS[:3]) == generated(theirs, TEXTS[:3])


@pytest.mark.parametrize("rule", RULES)
def test_a_text_is_scored_with_the_tokens_of_training_and_one_beginning(rule: str) -> None:
    tokenizer = tokenizer_with(rule)
    lm = lm_with(tokenizer)
    start = PlainTextEncoder(tokenizer).start
    for text in TEXTS:
        sample = Sample(text=text, place=Place(file="a", number=1))
        (row,) = SampleTokenizer(tokenizer, seq_length=999).tokenise(sample, source=0).rows
        ids = row.input_ids.tolist()[len(start) : -1]
        ids = ids[1:] if ids[0] == 1 else ids  # the text brings its begin token itself
        windows = list(lm._windows(text))
        assert [token for _, predicted in windows for token in predicted] == ids
        assert windows[0][0] == list(start or [1])
        assert all(context[: len(start)] == list(start) for context, _ in windows)
        assert all(len(context) + len(predicted) <= 41 for context, predicted in windows)
        total = sum(logprob(*window) for window in windows)
        assert rolling(lm, [text]) == [pytest.approx(total, abs=1e-4)]


@pytest.mark.parametrize("rule", RULES)
def test_no_end_token_stands_behind_a_context(rule: str) -> None:
    tokenizer = tokenizer_with(rule)
    lm, encoder = lm_with(tokenizer), PlainTextEncoder(tokenizer)
    start = list(encoder.start)
    pairs = {
        ("how are you", " fine"): ([*start, *encoder.ids("how are you")], encoder.ids(" fine")),
        ("what is two ", "four"): ([*start, *encoder.ids("what is two")], encoder.ids(" four")),
        ("", "hello"): (start or [1], encoder.ids("hello")),
        (" ", "hello"): (start or [1], encoder.ids(" hello")),
        # "answ" and "er" would merge, and no prompt that is generated from ends like that.
        ("the answ", "er is"): ([*start, *encoder.ids("the answ")], encoder.ids("er is")),
    }
    answers = lm.loglikelihood(requests(list(pairs)))
    wanted = [logprob(*pair) for pair in pairs.values()]
    assert [found for found, _ in answers] == pytest.approx(wanted, abs=1e-4)
    # Rows of unlike lengths and beginnings, padded on the left: as each alone.
    prompts = ["how are you", "<s>hello", "the answer is four", ""]
    assert generated(lm, prompts) == [generated(lm, [prompt])[0] for prompt in prompts]
    ids, mask = lm.tok_batch_encode(prompts)
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert rows[0] == [*start, *encoder.ids("how are you")]
    assert rows[3] == (start or [1])
    assert 2 not in ids[mask.bool()]


def test_a_sentencepiece_answer_that_would_merge_gets_no_space_of_its_own(tmp_path: Path) -> None:
    tokenizer = slow_tokenizer(tmp_path, None)
    encoder = RequestEncoder(tokenizer, 40)
    for context, answer in [("the answ", "er is"), ("hello", " world"), ("hello ", "world")]:
        head, rest = encoder.pair(context, answer, is_chat=False)
        assert head == [*PlainTextEncoder(tokenizer).encode(context.rstrip())]
        assert tokenizer.decode([*head, *rest]).replace("<s>", "").strip() == context + answer
    head, rest = encoder.pair("the answ", "er is", is_chat=False)
    assert rest[0] != PlainTextEncoder(tokenizer).ids("er is")[0]


@pytest.mark.parametrize(("rule", "begin"), [("<s> $A", ""), ("$A", "<s>"), ("$A </s>", "<s>")])
def test_what_is_cut_from_the_left_keeps_its_begin_token(rule: str, begin: str) -> None:
    """Whether the tokenizer or the text, such as a chat, has put it there."""
    tokenizer = tokenizer_with(rule)
    long = begin + "a b c d " * 30
    lm = lm_with(tokenizer)
    (scored,) = [lm._scored_text((long, "e"), *lm._encoder.pair(long, "e", is_chat=False))]
    assert (scored.tokens[0], len(scored.tokens)) == (1, 40)
    ids, _ = lm.tok_batch_encode([long, "a"], left_truncate_len=20)
    assert (ids.shape[1], ids[0, 0]) == (20, 1)
    theirs = lm_with(tokenizer, lm_eval_compatible=True)
    assert theirs.tok_batch_encode([long], left_truncate_len=20)[0][0, 0] != 1


@pytest.mark.parametrize(
    ("template", "begins"), [(CHATML, 1), (CHATML.removeprefix("{{ bos_token }}"), 0)]
)
def test_a_chat_has_the_special_tokens_of_its_template(template: str, begins: int) -> None:
    """As in training, and in `apply_chat_template(tokenize=True)`."""
    tokenizer = tokenizer_with("<s> $A </s>", template)
    lm, turns = lm_with(tokenizer), [{"role": "user", "content": "hello"}]
    text = lm.apply_chat_template(turns)
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert lm.tok_encode(text) == wanted
    assert wanted.count(1) == begins
    context, answer = lm._encoder.pair(text, "fine", is_chat=True)
    assert context == wanted[: len(context)] and tokenizer.decode(answer) == "\nfine"
    assert next(lm._windows("hello"))[0] == [1]  # a text beside chats is none


@pytest.mark.parametrize("compatible", [False, True])
def test_padding_beyond_the_embedding_is_another_token_and_text_beyond_it_one_line(
    compatible: bool,
) -> None:
    tokenizer = tokenizer_with("<s> $A")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["@@odd"])
    lm = lm_with(tokenizer, lm_eval_compatible=compatible)
    usual = lm_with(tokenizer_with("<s> $A"), lm_eval_compatible=compatible)
    assert rolling(lm, TEXTS) == rolling(usual, TEXTS)
    assert generated(lm, TEXTS[:2]) == generated(usual, TEXTS[:2])
    message = "token 341 is beyond the model's vocabulary of 340"
    with pytest.raises(DataError, match=message):
        rolling(lm, ["hello @@odd"])
    with pytest.raises(DataError, match=f"' @@odd': {message}"):
        lm.loglikelihood(requests([("hello", " @@odd")]))
    with pytest.raises(DataError, match=f"'hello @@odd': {message}"):
        generated(lm, ["hello @@odd"])


def test_what_cannot_be_scored_is_one_line() -> None:
    bare = tokenizer_with("$A")
    bare.bos_token = None
    assert next(lm_with(bare)._windows("hello"))[0] == [2]  # the end token, as in lm-eval
    bare.eos_token = None
    with pytest.raises(DataError, match="neither bos nor eos"):
        lm_with(bare).loglikelihood(requests([("", "hello")]))
    lm = lm_with(tokenizer_with("<s> $A"))
    with pytest.raises(DataError, match="the answer '' behind 'how' has no token"):
        lm.loglikelihood(requests([("how", "")]))
    short = MegaskipLM(MODEL, tokenizer_with(RULES[-1]), max_length=2)
    with pytest.raises(ConfigError, match="--max_length 2 leaves no room for a text behind the 2"):
        rolling(short, ["hello"])


@pytest.mark.parametrize(("compatible", "says"), [(False, "as in training"), (True, "as lm-eval")])
def test_the_table_says_whose_tokens_were_used(compatible: bool, says: str) -> None:
    report = EvalReport(outcome={}, dense=None, about={"lm_eval_compatible": compatible})
    assert says in report.lines()[-1]
    assert report.to_json()["lm_eval_compatible"] is compatible
    info = lm_with(fast_tokenizer(), lm_eval_compatible=compatible).get_model_info()
    assert info["lm_eval_compatible"] is compatible
