"""What routers are told of a batch: which tokens are real, the prompt, and where samples begin."""

import pytest
import torch

from megaskip.data.collate import collate
from megaskip.data.row import PackedRow, Row
from megaskip.errors import DataError
from megaskip.integrations import describe_inputs

IGNORED = -100


def rows(*lists: list[int]) -> torch.Tensor:
    return torch.tensor(lists)


def true_at(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_the_prompt_is_what_comes_before_the_first_label() -> None:
    labels = rows([IGNORED, IGNORED, IGNORED, 7, 8, IGNORED], [IGNORED, IGNORED, 5, IGNORED, 6, 7])
    mask = rows([1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1])
    inputs = {"input_ids": mask * 9, "attention_mask": mask, "labels": labels}
    masks = describe_inputs(inputs, prompt_tokens=1)
    assert true_at(masks.token_mask) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert true_at(masks.prompt_mask) == [[0, 1, 2], [0, 1]]
    assert masks.segment_ids is None


def test_padding_on_the_left_is_no_part_of_the_prompt() -> None:
    mask = rows([0, 0, 1, 1, 1, 1])
    labels = rows([IGNORED, IGNORED, IGNORED, IGNORED, 4, 5])
    inputs = {"input_ids": mask, "attention_mask": mask, "labels": labels}
    assert true_at(describe_inputs(inputs, prompt_tokens=1).prompt_mask) == [[2, 3]]


@pytest.mark.parametrize("first", [3, IGNORED])
def test_plain_text_is_judged_by_its_first_tokens(first: int) -> None:
    mask = rows([1, 1, 1, 1, 1])
    inputs = {"input_ids": mask, "attention_mask": mask, "labels": rows([first, 4, 5, 6, 7])}
    assert true_at(describe_inputs(inputs, prompt_tokens=3).prompt_mask) == [[0, 1, 2]]
    assert true_at(describe_inputs(inputs, prompt_tokens=32).prompt_mask) == [[0, 1, 2, 3, 4]]


def test_a_batch_without_labels_is_judged_by_all_of_its_tokens() -> None:
    mask = rows([1, 1, 1, 0])
    masks = describe_inputs({"input_ids": mask, "attention_mask": mask}, prompt_tokens=1)
    assert true_at(masks.prompt_mask) == [[0, 1, 2]]


def test_samples_of_a_packed_row_are_told_apart_and_padding_behind_them_is_none() -> None:
    positions = rows([0, 1, 2, 3, 0, 1, 2, 0, 0])
    labels = rows([IGNORED, IGNORED, 5, 6, IGNORED, 7, 8, IGNORED, IGNORED])
    inputs = {"input_ids": positions, "position_ids": positions, "labels": labels}
    masks = describe_inputs(inputs, prompt_tokens=2)
    assert masks.segment_ids is not None
    assert masks.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1, -1]]
    assert true_at(masks.token_mask) == [[0, 1, 2, 3, 4, 5, 6]]
    assert true_at(masks.prompt_mask) == [[0, 1, 4, 5]]


def test_packed_rows_are_described_as_megaskips_own_batches_are() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(2, 9, (3,), generator=generator).tolist()
        prompts = [int(torch.randint(0, length, (1,), generator=generator)) for length in lengths]
        segments = tuple(
            Row(
                input_ids=torch.arange(length, dtype=torch.int32).numpy(),
                supervised=(torch.arange(length) >= max(prompt, 1)).numpy(),
                prompt_length=prompt if prompt > 1 else 0,
                source=0,
            )
            for length, prompt in zip(lengths, prompts, strict=True)
        )
        batch = collate([PackedRow(segments=segments)], pad_token_id=0, prompt_tokens=3)
        inputs = {
            "input_ids": batch.input_ids[:, : sum(lengths)],
            "position_ids": batch.position_ids[:, : sum(lengths)],
            "labels": batch.labels[:, : sum(lengths)],
        }
        masks = describe_inputs(inputs, prompt_tokens=3)
        assert masks.segment_ids is not None
        assert batch.segment_ids is not None
        assert torch.equal(masks.segment_ids, batch.segment_ids[:, : sum(lengths)])
        assert torch.equal(masks.prompt_mask, batch.prompt_mask[:, : sum(lengths)])


def test_inputs_without_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="holds labels, pixel_values; routers need input_ids"):
        describe_inputs({"labels": rows([1]), "pixel_values": rows([1])}, prompt_tokens=1)
