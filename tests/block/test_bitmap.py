"""Dirty bitmaps, against a set of granule numbers."""

from __future__ import annotations

import hashlib
import random
import time

import pytest

from nbdfleece.base.errors import CommandError, InUse, IoError, NotFound
from nbdfleece.base.extent import Extent
from nbdfleece.block.bitmap import (
    DIRTY,
    DirtyBitmap,
    abdicate,
    default_granularity,
    find_bitmap,
    freeze,
    new_bitmap,
    reclaim,
)
from nbdfleece.block.graph import Graph
from nbdfleece.block.node import Node
from tests.support.fleecing import add_plain
from tests.support.memory import MemoryDriver

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


def bitmap(size: int = MIB, granularity: int = 512, *, enabled: bool = True) -> DirtyBitmap:
    return DirtyBitmap("b", size=size, granularity=granularity, enabled=enabled)


def touched(offset: int, length: int, granularity: int) -> set[int]:
    return set(range(offset // granularity, -(-(offset + length) // granularity)))


def dirty(found: DirtyBitmap) -> set[int]:
    return {index for first, last in found.runs() for index in range(first, last)}


class Store:
    """Keeps what it is told, as a set."""

    def __init__(self) -> None:
        self.bits: set[int] = set()

    renew_at = 0.0

    def renew(self) -> None:
        self.renewed = True

    renewed = False

    def abandon(self, why: str) -> None: ...

    def hold(self) -> None: ...

    def record(self, first: int, last: int) -> None:
        self.bits |= set(range(first, last))

    def settle(self, bitmap: DirtyBitmap) -> None:
        wanted = dirty(bitmap) | (dirty(bitmap.successor) if bitmap.successor else set())
        assert wanted <= self.bits, "D3"
        self.bits = wanted

    def resize(self, bitmap: DirtyBitmap) -> None:
        self.bits = dirty(bitmap)


async def node(size: int = MIB, cluster: int = 1) -> Node:
    driver = MemoryDriver(bytearray(size))
    driver.cluster = cluster
    return await add_plain(Graph(), driver)


# --- content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [512, 4096, 64 * KIB])
def test_random_marks_are_found_again_by_every_way_of_looking(
    rng: random.Random, granularity: int
) -> None:
    size = 65 * MIB + 1536  # several pages of states, and a last granule that is cut
    found, model = bitmap(size, granularity), set[int]()
    for _ in range(200):
        length = min(rng.choice((1, 512, 4096, MIB, 20 * MIB)), size)
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.02:
            found.take()
            model.clear()
        found.mark(offset, length)
        model |= touched(offset, length, granularity)
        assert found.count() == len(model) * granularity
    assert dirty(found) == model
    total = -(-size // granularity)
    bits = sum(1 << index for index in model).to_bytes(-(-total // 64) * 8, "little")
    assert found.sha256() == hashlib.sha256(bits).hexdigest()
    assert sum(length for _, length in found.dirty_ranges()) == sum(
        min((index + 1) * granularity, size) - index * granularity for index in model
    )


async def test_status_tells_of_every_byte_wherever_it_is_asked(rng: random.Random) -> None:
    size, granularity = 3 * MIB + 100, 512
    found = bitmap(size, granularity)
    for _ in range(100):
        found.set(rng.randrange(size - 5000), rng.randrange(1, 5000))
    model = dirty(found)
    for _ in range(100):
        offset = rng.randrange(size)
        length = rng.randrange(1, size - offset + 1)
        extents = await found.status(offset, length)
        position = offset
        for extent in extents:
            assert extent.offset == position
            position = extent.end
            is_dirty = {index in model for index in touched(*extent[:2], granularity)}
            assert is_dirty == {bool(extent.flags & DIRTY)}
        assert offset + length <= position <= size


def test_a_bit_covers_its_granule_and_the_last_is_cut_at_the_end() -> None:
    found = bitmap(10_000, 4096)
    found.mark(4095, 2)
    assert list(found.dirty_ranges()) == [(0, 8192)]
    found.mark(9999, 1)
    assert list(found.dirty_ranges()) == [(0, 10_000)]
    assert found.count() == 3 * 4096, "whole granules, as QMP has it"


def test_what_does_not_record_is_not_marked_by_writes() -> None:
    found = bitmap(enabled=False)
    found.mark(0, MIB)
    assert not found.count()
    found.set(0, 1)
    assert found.count() == 512


def test_union_with_another_granularity_rounds_outwards() -> None:
    fine, coarse = bitmap(granularity=512), bitmap(granularity=64 * KIB)
    fine.set(64 * KIB + 512, 512)
    coarse.unite(fine)
    assert list(coarse.dirty_ranges()) == [(64 * KIB, 64 * KIB)]
    fine.unite(coarse)
    assert list(fine.dirty_ranges()) == [(64 * KIB, 64 * KIB)]
    before = fine.sha256()
    fine.unite(fine)
    assert fine.sha256() == before


def test_content_that_was_taken_or_copied_can_be_put_back() -> None:
    found = bitmap()
    found.set(1000, 100_000)
    before = found.sha256()
    kept = found.copy()
    found.set(0, MIB)
    found.put_back(kept)
    assert found.sha256() == before
    taken = found.take()
    assert found.count() == 0
    found.put_back(taken)
    assert found.sha256() == before


def test_a_resize_forgets_what_is_gone_and_leaves_new_space_clean() -> None:
    found = bitmap(MIB, 64 * KIB)
    found.set(0, MIB)
    found.resize(512 * KIB)
    assert found.count() == 512 * KIB
    found.resize(2 * MIB)
    assert list(found.dirty_ranges()) == [(0, 512 * KIB)]


async def test_a_clean_bitmap_of_16_tib_is_looked_through_in_a_moment() -> None:
    found = bitmap(16 * TIB, 64 * KIB)
    started = time.perf_counter()
    assert await found.status(0, 16 * TIB) == [Extent(0, 16 * TIB, 0)]
    assert list(found.dirty_ranges()) == []
    assert found.count() == 0
    taken = time.perf_counter() - started
    print(f"{taken * 1000:.1f} ms")
    assert taken < 0.5, "50 ms where nobody else uses the processor"


def test_a_bitmap_with_runs_in_thousands_of_pages_is_looked_through_once() -> None:
    """Not once per run: that would take hours of a backup's start."""
    found = bitmap(16 * TIB, 64 * KIB)
    for number in range(4096):
        found.set(number << 32, 1)
    assert len(list(found.dirty_ranges())) == 4096


# --- successors ----------------------------------------------------------------------------------


def frozen(*, enabled: bool = True) -> tuple[dict[str, DirtyBitmap], DirtyBitmap, DirtyBitmap]:
    found = bitmap(enabled=enabled)
    found.store = Store()
    found.set(0, 1)
    bitmaps = {"b": found}
    freeze(bitmaps, found)
    assert found.successor is not None
    return bitmaps, found, found.successor


def test_a_frozen_bitmap_stands_still_while_its_successor_records() -> None:
    bitmaps, found, successor = frozen()
    for each in bitmaps.values():
        each.mark(512, 1)
    assert (found.count(), successor.count()) == (512, 512)
    assert (found.recording, found.enabled, found.busy) == (True, False, True)
    assert (successor.name, successor.recording, successor.busy) == ("", True, False)
    with pytest.raises(InUse):
        freeze(bitmaps, found)


def test_the_successor_of_what_did_not_record_does_not_either() -> None:
    bitmaps, found, successor = frozen(enabled=False)
    assert not found.recording
    for each in bitmaps.values():
        each.mark(512, 1)
    assert successor.count() == 0
    assert not reclaim(bitmaps, found).enabled


def test_after_abdication_only_what_the_successor_recorded_is_left() -> None:
    bitmaps, found, successor = frozen()
    found.persistent = True
    successor.mark(512, 1)
    assert abdicate(bitmaps, found) is successor
    assert bitmaps == {"b": successor}
    assert (successor.name, successor.persistent, successor.busy) == ("b", True, False)
    assert dirty(successor) == {1}
    assert isinstance(successor.store, Store)
    assert successor.store.bits == {1}


def test_after_reclaim_nothing_is_forgotten() -> None:
    bitmaps, found, successor = frozen()
    successor.mark(512, 1)
    assert reclaim(bitmaps, found) is found
    assert bitmaps == {"b": found}
    assert (found.enabled, found.busy, dirty(found)) == (True, False, {0, 1})


def test_a_store_never_holds_less_than_bitmap_and_successor(rng: random.Random) -> None:
    """D3, in a random history; what `settle` demands of the store is asserted there."""
    store = Store()
    found = bitmap(MIB, 4096)
    found.store = store
    bitmaps = {"b": found}
    model_old, model_new = set[int](), set[int]()
    for _ in range(1000):
        found = bitmaps["b"]
        action = rng.randrange(8)
        if action == 0:
            if found.successor is None:
                freeze(bitmaps, found)
                model_old, model_new = model_new, set()
            elif rng.random() < 0.5:
                abdicate(bitmaps, found)
                model_old = set()
            else:
                reclaim(bitmaps, found)
                model_new |= model_old
                model_old = set()
        elif action == 1 and found.successor is None:
            found.take()
            assert store.bits >= dirty(found)
            found.settle()
            model_new = set()
        else:
            offset = rng.randrange(MIB)
            length = rng.randrange(1, min(30_000, MIB - offset) + 1)
            for each in bitmaps.values():
                each.mark(offset, length)
            model_new |= touched(offset, length, 4096)
        assert store.bits >= model_old | model_new
        union = set().union(*(dirty(each) for each in bitmaps.values()))
        assert union == model_old | model_new
    for each in list(bitmaps.values()):
        if each.successor is not None:
            reclaim(bitmaps, each)
    assert store.bits == model_old | model_new


# --- what may be done with a bitmap ---------------------------------------------------------------


def test_what_may_be_done_depends_on_the_state() -> None:
    found = bitmap()
    found.check_usable(to_change=True)
    found.readonly = True
    found.check_usable(to_change=False)
    with pytest.raises(CommandError, match=r"^Bitmap 'b' is readonly and cannot be modified$"):
        found.check_usable(to_change=True)
    found.inconsistent, found.reason = True, "the disk has another size"
    with pytest.raises(
        CommandError,
        match=r"^Bitmap 'b' is inconsistent and cannot be used \(the disk has another size\)$",
    ):
        found.check_usable(to_change=False)
    found.busy = True
    with pytest.raises(InUse, match=r"^Bitmap 'b' is currently in use by another operation"):
        found.check_usable(to_change=False)


@pytest.mark.parametrize(
    ("cluster", "granularity"),
    [(1, 64 * KIB), (512, 4 * KIB), (16 * KIB, 16 * KIB), (2 * MIB, 64 * KIB)],
)
async def test_the_default_granularity_is_the_nodes_cluster_within_4_to_64_kib(
    cluster: int, granularity: int
) -> None:
    assert default_granularity(await node(cluster=cluster)) == granularity


async def test_a_bitmap_that_cannot_be_is_refused() -> None:
    owner = await node()
    owner.bitmaps["b"] = new_bitmap(owner, "b", None, enabled=True)
    for name, granularity, text in (
        ("", None, "Bitmap name cannot be empty"),
        ("c", 64_000, "Granularity must be power of 2 and at least 512"),
        ("c", 256, "Granularity must be power of 2 and at least 512"),
        ("c", 0, "Granularity must be power of 2 and at least 512"),
        ("b", None, "Bitmap already exists: b"),
        ("\udcff", None, "Bitmap name is not UTF-8"),
        ("a\0", None, "Bitmap name contains a NUL byte"),
        ("x" * 1024, None, f"Bitmap name too long: {'x' * 1024}"),
    ):
        with pytest.raises(CommandError) as refused:
            new_bitmap(owner, name, granularity, enabled=True)
        assert str(refused.value) == text
    new_bitmap(owner, "x" * 1023, 1 << 31, enabled=True)


async def test_a_successor_is_not_found_by_any_name() -> None:
    owner = await node()
    owner.bitmaps["b"] = new_bitmap(owner, "b", None, enabled=True)
    assert find_bitmap(owner, "b") is owner.bitmaps["b"]
    freeze(owner.bitmaps, owner.bitmaps["b"])
    for name in ("", "c", *(key for key in owner.bitmaps if key != "b")):
        with pytest.raises(NotFound):
            find_bitmap(owner, name)


# --- N2: the node marks --------------------------------------------------------------------------


async def test_writes_zeroes_and_discards_are_marked_when_they_end_also_in_failure() -> None:
    owner = await node()
    driver = owner.driver
    assert isinstance(driver, MemoryDriver)
    kept = owner.bitmaps["b"] = bitmap(MIB, 4096)
    await owner.write(0, memoryview(b"x"), fua=False)
    await owner.write_zeroes(8192, 1, fua=False, may_unmap=False, no_fallback=False)
    await owner.discard(16384, 1)
    driver.fail["write"] = 5
    with pytest.raises(IoError):
        await owner.write(32768, memoryview(b"x"), fua=False)
    assert dirty(kept) == {0, 2, 4, 8}


@pytest.mark.parametrize("way", ["write", "write_replying"])
async def test_what_is_kept_in_a_store_is_marked_before_the_write_begins(way: str) -> None:
    owner = await node()
    driver = owner.driver
    assert isinstance(driver, MemoryDriver)
    store = Store()
    kept = owner.bitmaps["b"] = bitmap(MIB, 4096)
    kept.store = store
    seen: list[set[int]] = []
    plain = driver.write

    async def write(offset: int, data: memoryview, *, fua: bool) -> None:
        seen.append(set(store.bits))
        await plain(offset, data, fua=fua)

    driver.write = write  # type: ignore[method-assign]
    data = memoryview(b"x" * 8192)
    if way == "write":
        await owner.write(4096, data, fua=False)
    else:
        await owner.write_replying(4096, data, None)
    assert seen == [{1, 2}]
    assert store.renewed, "K4 of block.bitmap_files"
