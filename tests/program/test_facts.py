"""What ranks compare: checksums that tell bits and places apart, and texts that show what differs, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spcompile.program.checksum import checksum, checksums
from spcompile.program.facts import STOPPED, Fact, Record, agree, comparable_text, disagreement, wished

MESH = {rank: {"dp": rank // 2, "cp": rank % 2} for rank in range(4)}
DTYPES = [torch.bool, torch.int8, torch.int64, torch.bfloat16, torch.float32, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (64, 1000), ()], ids=str)
def test_one_bit_changes_the_checksum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    y = x.clone()
    assert checksum(x) == checksum(y)
    y.view(-1).view(torch.uint8)[-1] ^= 1
    assert checksum(x) != checksum(y)


def test_places_count_and_layouts_do_not() -> None:
    x = torch.randn(100, 300)
    assert checksum(x) != checksum(x.flip(0))
    assert checksum(x) != checksum(x.flip(1))
    assert checksum(x) == checksum(x.t().contiguous().t())
    assert checksum(x[1:, 3:]) == checksum(x[1:, 3:].clone())


@pytest.mark.thinned(6)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_checksum_is_a_known_number(threads: int) -> None:
    """On every machine, for any number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = checksums([torch.arange(100_000), torch.arange(7, dtype=torch.int16)])()
    finally:
        torch.set_num_threads(before)
    assert found == [expected(torch.arange(100_000)), expected(torch.arange(7, dtype=torch.int16))]


def expected(x: Tensor) -> int:
    """By Python's integers."""
    data = x.numpy().tobytes()
    rows = len(data) // 8192
    words = [[int.from_bytes(data[8192 * r + 8 * c :][:8], "little") for c in range(1024)] for r in range(rows)]
    first, second = -7046029254386353131, -4658895280553007687

    def weighted(values: list[int], factor: int) -> int:
        return sum(v * ((i * factor) | 1) for i, v in enumerate(values, 1))

    result = weighted(list(data[8192 * rows :]), second)
    if rows:
        result += weighted([sum(column) for column in zip(*words, strict=True)], first)
        result += weighted([sum(row) for row in words], second)
    return (result + 2**63) % 2**64 - 2**63


def differing(*records: Record) -> tuple[str, str]:
    by_rank = dict(enumerate(records))
    assert not agree({rank: record.numbers() for rank, record in by_rank.items()}, MESH)
    return disagreement(by_rank, MESH)


def call(ids: str = "a", rows: str = "r", **more: bool) -> Record:
    facts = (Fact("input ids", "int64(2, 8)"), Fact("values of ids", ids, ("dp",), "one batch"), Fact("weights", rows))
    return Record("runs call 1", facts, **more)


def test_facts_may_differ_over_their_axes_only() -> None:
    records = {rank: call(ids="ab"[rank // 2]) for rank in range(4)}
    assert agree({rank: record.numbers() for rank, record in records.items()}, MESH)
    text, legal = differing(call("a"), call("b"), call("c"), call("c"))
    assert text == "runs call 1\n  values of ids\n    rank 0: a\n    rank 1: b\n    ranks 2, 3: c"
    assert legal == "one batch"


def test_one_rank_wishes_for_all() -> None:
    records = {rank: call(wishes=rank == 2).numbers() for rank in range(4)}
    assert agree(records, MESH)
    assert wished(records)
    assert not wished({0: call().numbers()})


def test_another_call_and_a_rank_that_stopped() -> None:
    other = Record("runs the backward of call 1")
    assert differing(call(), other, call(), call())[0] == (
        "\n  ranks 0, 2, 3: runs call 1\n  rank 1: runs the backward of call 1"
    )
    stopped = Record(f"{STOPPED}no luck")
    assert differing(call(), stopped, call(), call())[0] == "\n  ranks 0, 2, 3: went on\n  rank 1: stopped with no luck"


def test_many_differences_are_counted() -> None:
    many = [Record("compares", tuple(Fact(f"p{i}", f"{i} {rank}") for i in range(9))) for rank in range(4)]
    text, _ = differing(*many)
    assert text.endswith("and 6 more: p3, p4, p5, p6, p7, p8")


def test_records_travel_as_text() -> None:
    assert Record.from_json(call(wishes=True).to_json()) == call(wishes=True)


def test_texts_without_addresses() -> None:
    assert comparable_text("<A object at 0x7f00aabbcc> on cuda:3") == "<A object at 0x...> on cuda"
    assert comparable_text("mask 0xff stays") == "mask 0xff stays"
