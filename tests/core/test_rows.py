"""`Rows` says the same about a batch in whichever way it was made, and does not change."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import Rows

IDS = st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(-1, n - 1), max_size=40)))
SEGMENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 3)), max_size=12)
FEW = settings(max_examples=60, deadline=None)


def same(u: Rows, v: Rows) -> bool:
    return torch.equal(u.order, v.order) and torch.equal(u.starts, v.starts) and u.counts == v.counts and u.M == v.M


@FEW
@given(IDS)
def test_rows_are_grouped_by_adapter_and_ascend_within_one(case):
    n, ids = case
    rows = Rows.by_id(ids, n)
    order, starts = rows.order.tolist(), rows.starts.tolist()
    assert rows.order.dtype == rows.starts.dtype == torch.int32
    assert (rows.M, rows.n, sorted(order)) == (len(ids), n, list(range(len(ids))))
    groups = [order[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    wanted = [[m for m, each in enumerate(ids) if each == i] for i in [*range(n), -1]]
    assert groups == wanted
    assert rows.counts == tuple(map(len, wanted[:n])) == rows.known_counts
    assert rows.used == tuple(i for i in range(n) if wanted[i])


@FEW
@given(IDS)
def test_an_index_picks_the_rows_of_an_adapter(case):
    n, ids = case
    rows, x = Rows.by_id(ids, n), torch.arange(len(ids))
    for i in range(n):
        wanted = [m for m, each in enumerate(ids) if each == i]
        assert x[rows.index(i)].tolist() == wanted
        together = wanted == list(range(wanted[0], wanted[0] + len(wanted))) if wanted else True
        assert isinstance(rows.index(i), slice) == together


@FEW
@given(IDS)
def test_ids_and_places_lead_back(case):
    n, ids = case
    rows = Rows.by_id(ids, n)
    assert rows.ids().tolist() == ids
    assert rows.places().tolist() == [ids[:m].count(each) for m, each in enumerate(ids)]


@FEW
@given(SEGMENTS)
def test_lengths_ids_and_samples_say_the_same(segments):
    lengths, which = [length for length, _ in segments], [i for _, i in segments]
    ids = [i for length, i in segments for _ in range(length)]
    by_length = Rows.by_length(lengths, which, 4)
    assert same(by_length, Rows.by_id(ids, 4)) and by_length.ids().tolist() == ids
    names = [None if i < 0 else "abcd"[i] for i in which]
    samples = Rows.by_sample(names, ["a", "b", "c", "d"])
    assert samples.per_sample and same(samples, Rows.by_id(which, 4))
    assert same(samples.repeated(3), Rows.by_id([i for i in which for _ in range(3)], 4))
    assert same(by_length.repeated(2), Rows.by_id([i for i in ids for _ in range(2)], 4))


@FEW
@given(IDS, st.integers(0, 4))
def test_further_adapters_have_no_rows(case, more):
    n, ids = case
    rows = Rows.by_id(ids, n).padded(n + more)
    assert same(rows, Rows.by_id(ids, n + more))
    assert rows.index(n + more - 1) == slice(0, 0) or more == 0


def test_names_may_stand_in_a_mapping_with_gaps():
    rows = Rows.by_sample(["v", "__base__", None, "u"], {"u": 3, "v": 1})
    assert rows.n == 4 and rows.counts == (0, 1, 0, 1) and rows.ids().tolist() == [1, -1, -1, 3]
    assert Rows.by_sample([], {}).M == 0 and Rows.by_sample([None], []).counts == ()
    assert Rows.by_length([3, 2], [-1, -1]).n == 0


def test_ids_may_be_of_any_integer_dtype():
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        assert Rows.by_id(torch.tensor([1, 0, 1], dtype=dtype), 2).ids().tolist() == [1, 0, 1]
    assert Rows.by_id(torch.tensor([0, -1, 1])[::2], 2).ids().tolist() == [0, 1]


def test_there_may_be_more_adapters_than_the_dtype_of_the_ids_counts():
    assert Rows.by_id(torch.tensor([1, -1, 127], dtype=torch.int8), 300).ids().tolist() == [1, -1, 127]
    assert Rows.by_id(torch.tensor([1, 0, 255], dtype=torch.uint8), 300).ids().tolist() == [1, 0, 255]
    assert Rows.by_id(torch.tensor([1, 0, 2], dtype=torch.uint16), 3).ids().tolist() == [1, 0, 2]


def test_rows_do_not_change_with_the_ids_that_they_were_made_of():
    ids = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    rows = Rows.by_id(ids, 2)
    before = rows.order.clone(), rows.starts.clone()
    ids.fill_(0)
    rows.repeated(3), rows.padded(5), rows.index(0), rows.ids(), rows.places()
    assert torch.equal(rows.order, before[0]) and torch.equal(rows.starts, before[1]) and rows.counts == (1, 2)


def test_what_is_derived_is_kept_and_belongs_to_its_argument():
    rows = Rows.by_id([0, -1, 1, 0], 2)
    assert rows.repeated(1) is rows and rows.padded(2) is rows and rows.to("cpu") is rows
    assert rows.repeated(3) is rows.repeated(3) and rows.padded(4) is rows.padded(4)
    assert [rows.repeated(times).M for times in range(2, 40)] == [4 * times for times in range(2, 40)]
    assert len(rows._repeated) <= 8
    assert rows.repeated(2).ids().tolist() == [0, 0, -1, -1, 1, 1, 0, 0]
    sample = Rows.by_sample(["u"], ["u"])
    assert not sample.repeated(1).per_sample and sample.padded(3).per_sample


def test_rows_move_to_another_device_with_their_counts():
    rows = Rows.by_sample(["u", None], ["u"])
    there = rows.to("meta")
    assert there.order.device.type == there.starts.device.type == "meta"
    assert there.counts == (1,) and there.per_sample and rows.to("meta") is there


def test_threads_may_share_rows():
    for _ in range(20):
        rows = Rows.by_id(torch.randint(-1, 8, (256,)), 8)
        found, gate = [], threading.Barrier(4)

        def read(rows=rows, found=found, gate=gate):
            gate.wait()
            big = rows.padded(9).repeated(2)
            found.append((rows.counts, rows.used, [rows.index(i) for i in range(8)], big.order, big.counts))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for counts, used, index, order, twice in found:
            assert counts == found[0][0] and used == found[0][1] and twice == found[0][4]
            assert torch.equal(order, found[0][3])
            for i, each in enumerate(index):
                assert torch.equal(torch.arange(256)[each], (rows.ids() == i).nonzero()[:, 0])


def test_errors_name_the_values():
    with pytest.raises(ValueError, match=r"-1\.\.1 \(-1 is the base alone\) beside 2 adapters, got 0\.\.2"):
        Rows.by_id([0, 2], 2)
    with pytest.raises(ValueError, match=r"got -3\.\.1"):
        Rows.by_id([-3, 1], 2)
    with pytest.raises(ValueError, match=r"one-dimensional, one for each row of x, got shape \(2, 1\)"):
        Rows.by_id(torch.zeros(2, 1, dtype=torch.int64), 2)
    for ids in (torch.zeros(3), torch.zeros(3, dtype=torch.bool), [0.0, 1.0]):
        with pytest.raises(TypeError, match="ids must be integers, got torch"):
            Rows.by_id(ids, 2)
    with pytest.raises(ValueError, match="one entry for each segment, got 2, 1"):
        Rows.by_length([1, 2], [0])
    with pytest.raises(ValueError, match=r"negative number of rows, got lengths \[3, -1\]"):
        Rows.by_length([3, -1], [0, 1])
    with pytest.raises(ValueError, match=r"beside 2 adapters, got \[4, -2\]"):
        Rows.by_length([1, 1, 1], [4, 0, -2], 2)
    with pytest.raises(KeyError, match=r"no adapter is called w, z; there are u, v"):
        Rows.by_sample(["u", "z", "w"], ["u", "v"])
    with pytest.raises(KeyError, match="there are none"):
        Rows.by_sample(["u"], [])
    with pytest.raises(TypeError, match=r"names must be a list of names, got the name 'u': write \['u'\]"):
        Rows.by_sample("u", ["u"])
    with pytest.raises(TypeError, match="table must be a list of names"):
        Rows.by_sample(["u"], "uv")
    with pytest.raises(ValueError, match=r"the names in the table must differ, got \['u', 'u'\]"):
        Rows.by_sample(["u"], ["u", "u"])
    with pytest.raises(ValueError, match="rows names 3 adapters, and 2 were given"):
        Rows.by_id([0], 3).padded(2)
    with pytest.raises(TypeError, match="float"):
        Rows.by_length([2.5, 1], [0, -1])
