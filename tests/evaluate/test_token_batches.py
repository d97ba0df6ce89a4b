import weakref

import pytest
import torch

from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.token_batches import cut_evenly, run_in_batches
from llmtune.model.layer_requests import own_passes


def note(batches):
    """Work that records its batches and returns the index of each row."""
    return lambda batch: [batches.append(batch)][:0] + batch


def test_every_row_is_processed_once_and_no_batch_exceeds_the_budget():
    lengths = [5, 1, 9, 30, 2, 2, 7]
    batches = []
    assert run_in_batches(lengths, 20, note(batches)) == list(range(len(lengths)))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches[0] == [3]  # longer than the budget, so alone
    assert all(max(lengths[i] for i in batch) * len(batch) <= 20 for batch in batches[1:])
    assert len(batches) < len(lengths)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("cuda"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_out_of_memory_halves_the_batch_and_skips_nothing(error):
    done = []

    def work(batch):
        if len(batch) > 3:
            raise error
        done.append(batch)
        return batch

    run_in_batches([4] * 16, 64, work)
    assert sorted(i for batch in done for i in batch) == list(range(16))
    assert max(map(len, done)) == 2  # 16, 8, 4, 2


def test_a_row_that_does_not_fit_alone_is_an_error_with_its_length():
    def work(batch):
        raise torch.OutOfMemoryError("cuda")

    with pytest.raises(EnvironmentProblem, match="77 tokens"):
        run_in_batches([77, 3], 10, work)


def test_a_batch_of_a_split_model_is_not_halved_because_other_processes_wait_within_its_pass():
    def work(batch):
        raise torch.OutOfMemoryError("cuda")

    model = torch.nn.Module()
    model._tp_size = 2
    with own_passes(model), pytest.raises(EnvironmentProblem, match="2 rows of 77 tokens"):
        run_in_batches([77, 3], 200, work)


def test_other_errors_propagate():
    def work(batch):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        run_in_batches([1], 10, work)


def test_a_limit_samples_rows_from_everywhere():
    assert list(cut_evenly(10, 3)) == [0, 3, 6]
    assert list(cut_evenly(3, 10)) == [0, 1, 2]
    assert list(cut_evenly(3, None)) == [0, 1, 2]
    assert list(cut_evenly(0, 5)) == list(cut_evenly(5, 0)) == []


def test_a_retry_finds_the_failed_attempts_tensors_freed():
    failed = []

    def work(batch):
        if failed and len(batch) > 1:
            assert failed[-1]() is None
        if len(batch) > 1:
            tensor = torch.zeros(8)
            failed.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("cuda")
        return batch

    run_in_batches([4] * 8, 64, work)
    assert len(failed) == 3  # 8, 4, 2


def test_packed_rows_fill_the_budget_with_the_sum_of_their_lengths():
    lengths, batches = [5, 1, 9, 30, 2, 2, 7, 4], []
    run_in_batches(lengths, 20, note(batches), packed=True)
    assert batches == [[3], [2, 6], [0, 7, 4, 5, 1]]
    done = []

    def work(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("cuda")
        done.append(batch)
        return batch

    run_in_batches(lengths, 60, work, packed=True)
    assert sorted(i for batch in done for i in batch) == list(range(len(lengths)))


def test_a_batch_has_at_most_the_allowed_number_of_rows():
    batches = []
    run_in_batches([1] * 10, 100, note(batches), most=4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
