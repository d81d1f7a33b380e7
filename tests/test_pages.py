"""Page tables against a dense model: lists of tokens, one per sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pages_in_use
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_kvquant import OutOfPagesError
from hf_kvquant.pages import PageTable
from hf_kvquant.pools import PagePool
from hf_kvquant.static_pages import StaticPageTable

CPU = torch.device("cpu")


class FakeStore:
    """A user of a pool of pages that stores one number per token."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.numbers = np.zeros((0, page_size), dtype=np.int64)
        self.index_device = CPU
        pool.add_user(self)

    def resize(self, num_pages: int) -> None:
        larger = np.zeros((num_pages, self.numbers.shape[1]), dtype=np.int64)
        kept = min(num_pages, len(self.numbers))
        larger[:kept] = self.numbers[:kept]
        self.numbers = larger

    def clear(self, pages: torch.Tensor) -> None:
        self.numbers[pages.numpy()] = 0

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.numbers[targets.numpy()] = self.numbers[sources.numpy()]

    def keep(self, pages: torch.Tensor, num_pages: int) -> None:
        kept = self.numbers[pages.numpy()]
        self.numbers = np.zeros((num_pages, self.numbers.shape[1]), dtype=np.int64)
        self.numbers[: len(pages)] = kept


class FakeLayer:
    """A follower of a page table, and what it should hold."""

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.length = 0
        self.store = FakeStore(table.pool, table.page_size)
        self.expected: list[list[int]] = []
        table.add_follower(self)

    def leave_table(self) -> None:
        """As a layer of the cache does, with its bytes."""
        table = self.table.fork()
        if self.length:
            table.crop(self.table.length - self.length)
        else:
            table.clear()
        self.table.remove_follower(self)
        table.add_follower(self)
        self.table = table
        pool = PagePool(table.pool.num_pages)
        store = FakeStore(pool, table.page_size)
        pages, rows = np.unique(table.rows, return_inverse=True)
        pool.grow(len(pages))
        store.numbers[: len(pages)] = self.store.numbers[pages]
        self.store = store
        table.move_to(pool, rows.reshape(table.rows.shape))

    def fork(self, tables: dict[int, PageTable]) -> FakeLayer:
        """A layer that shares the bytes and follows the fork of its table."""
        other = object.__new__(FakeLayer)
        other.__dict__.update(self.__dict__)
        other.expected = [list(row) for row in self.expected]
        other.table = tables.setdefault(id(self.table), self.table.fork())
        other.table.add_follower(other)
        return other

    def update(self, tokens: list[list[int]]) -> None:
        """Write the same number of new tokens for every sequence, as a layer of the cache does."""
        num_new = len(tokens[0])
        if self.length == self.table.length:
            self.table.append(num_new, len(tokens))
        elif self.length + num_new != self.table.length or self.table.batch_size != len(tokens):
            self.leave_table()
            self.table.append(num_new, len(tokens))
        self.length += num_new
        if len(self.expected) != len(tokens):
            self.expected = [[] for _ in tokens]
        for row, new in zip(self.expected, tokens, strict=True):
            row.extend(new)
        first_new = max(self.length - num_new, self.table.first_position)
        for b, row in enumerate(self.expected):
            for p in range(first_new, self.length):
                page, slot = self._place(b, p)
                if slot == 0:
                    assert not self.store.numbers[page].any(), "a new page is not zero"
                self.store.numbers[page, slot] = row[p]

    def follow_crop(self, num_tokens: int) -> None:
        self.length = max(self.length - num_tokens, 0)
        self.expected = [row[: self.length] for row in self.expected]

    def follow_select(self, indices: Sequence[int]) -> None:
        self.expected = [list(self.expected[index]) for index in indices] if self.expected else []

    def _place(self, b: int, p: int) -> tuple[int, int]:
        page_table, page_size = self.table.page_table(CPU), self.table.page_size
        return int(page_table[b, (p // page_size) % page_table.shape[1]]), p % page_size

    def check(self) -> None:
        """What is stored is what should be, from the oldest token on that later ones can see."""
        table = self.table
        assert table.length == self.length
        oldest = 0 if table.window is None else max(self.length - (table.window - 1), 0)
        assert table.first_position <= oldest
        assert len(self.store.numbers) == table.pool.size
        if not self.length:
            return
        assert table.batch_size == len(self.expected)
        assert table.seq_lens(CPU).tolist() == [self.length] * len(self.expected)
        assert table.page_table(CPU).dtype == table.seq_lens(CPU).dtype == torch.int32
        assert table.oldest_first(CPU).tolist() == table.rows.tolist()
        for b, row in enumerate(self.expected):
            held = [int(self.store.numbers[self._place(b, p)]) for p in range(table.first_position, self.length)]
            assert held == row[table.first_position :]


def state_of(table: PageTable) -> tuple[Any, ...]:
    """Everything about a table that can be seen."""
    return table.rows.tolist(), table.length, table.first_page, table.pool.size, table.pages_in_use, table.batch_size


POISON = -7


class PageTables(RuleBasedStateMachine):
    """Two layers share a table; sometimes the second is left out of a step and goes on with a table of its own.

    Forks of such a pair share its pages; rules act on one of the pairs.
    """

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4]),
        window=st.sampled_from([None, None, 1, 2, 3, 5, 9]),
        num_pages=st.sampled_from([None, None, 8, 20]),
    )
    def start(self, page_size: int, window: int | None, num_pages: int | None) -> None:
        table = PageTable(page_size, window, PagePool(num_pages))
        self.pairs = [[FakeLayer(table), FakeLayer(table)]]
        self.batch_sizes: list[int | None] = [None]
        self.current = 0
        self.next_token = 1

    @property
    def layers(self) -> list[FakeLayer]:
        return self.pairs[self.current]

    @property
    def tables(self) -> list[PageTable]:
        return list({id(layer.table): layer.table for layer in self.layers}.values())

    @property
    def batch_size(self) -> int | None:
        return self.batch_sizes[self.current]

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        self.batch_sizes[self.current] = value

    @rule(which=st.integers(0, 3))
    def switch(self, which: int) -> None:
        self.current = which % len(self.pairs)

    @precondition(lambda self: len(self.pairs) < 4)
    @rule()
    def fork(self) -> None:
        sizes = [table.pool.size for table in self.tables]
        tables: dict[int, PageTable] = {}
        self.pairs.append([layer.fork(tables) for layer in self.layers])
        self.batch_sizes.append(self.batch_size)
        assert [table.pool.size for table in self.tables] == sizes, "nothing is copied"

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        del self.pairs[which % len(self.pairs)], self.batch_sizes[which % len(self.batch_sizes)]
        self.current = 0
        for layer in (layer for pair in self.pairs for layer in pair):
            layer.table.pool.shrink()

    def _tokens(self, num_tokens: int, batch_size: int) -> list[list[int]]:
        count = num_tokens * batch_size
        fresh = range(self.next_token, self.next_token + count)
        self.next_token += count
        return [list(fresh[b * num_tokens : (b + 1) * num_tokens]) for b in range(batch_size)]

    def _update(self, layer: FakeLayer, tokens: list[list[int]]) -> bool:
        """Whether there was room; if not, nothing has changed."""
        before, numbers = state_of(layer.table), layer.store.numbers.copy()
        late = layer.length != layer.table.length
        message = None
        try:
            layer.update(tokens)
        except OutOfPagesError as error:
            message = str(error)
        if message is not None:
            assert f"num_pages={layer.table.pool.num_pages}" in message
            if not late:  # else it may have gone on to a table of its own
                assert state_of(layer.table) == before
                assert np.array_equal(layer.store.numbers, numbers)
        return message is None

    @rule(num_tokens=st.sampled_from([1, 1, 1, 2, 3, 7, 20]), batch_size=st.integers(1, 3))
    def step(self, num_tokens: int, batch_size: int) -> None:
        self.batch_size = self.batch_size or batch_size
        tokens = self._tokens(num_tokens, self.batch_size)
        first, second = self.layers
        shared = first.table is second.table
        if self._update(first, tokens) or not shared:
            self._update(second, tokens)

    @rule(skipped=st.integers(1, 5), first_more=st.integers(1, 3), second_more=st.integers(1, 6))
    def second_layer_is_left_out(self, skipped: int, first_more: int, second_more: int) -> None:
        self.batch_size = self.batch_size or 2
        first, second = self.layers
        self._update(first, self._tokens(skipped, self.batch_size))
        if second_more % 2:  # the table moves on first, or the late layer writes first
            self._update(first, self._tokens(first_more, self.batch_size))
        while second.length != second.table.length or not second.length:
            if not self._update(second, self._tokens(second_more, self.batch_size)):
                break

    @rule(num_tokens=st.integers(0, 30))
    def crop(self, num_tokens: int) -> None:
        before = [state_of(table) for table in self.tables]
        message = None
        try:
            for table in self.tables:
                table.check_crop(num_tokens)
        except RuntimeError as error:
            message = str(error)
        assert [state_of(table) for table in self.tables] == before
        if message is not None:
            assert "activate_past_recording" in message
            return
        for table in self.tables:
            table.crop(num_tokens)
        for layer in self.layers:
            layer.follow_crop(num_tokens)

    @precondition(lambda self: self.batch_size is not None)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Beams: sequences are reordered, repeated and dropped."""
        assert self.batch_size is not None
        indices = data.draw(st.lists(st.integers(0, self.batch_size - 1), min_size=1, max_size=4), label="indices")
        for table in self.tables:
            in_use = table.pages_in_use
            table.select(indices)
            assert table.pages_in_use <= in_use, "selecting shares pages, it does not copy them"
        for layer in self.layers:
            layer.follow_select(indices)
        self.batch_size = len(indices)

    @precondition(lambda self: self.batch_size is not None)
    @rule()
    def wrong_batch_size(self) -> None:
        assert self.batch_size is not None
        for table in self.tables:
            before = state_of(table)
            if table.batch_size is not None:
                with pytest.raises(ValueError, match=f"holds {table.batch_size} sequence"):
                    table.append(1, self.batch_size + 1)
            assert state_of(table) == before

    @rule(keeps_past=st.booleans())
    def record_past(self, keeps_past: bool) -> None:
        for table in self.tables:
            table.keeps_past = keeps_past

    @rule()
    def clear(self) -> None:
        for table in self.tables:
            table.clear()
            assert table.pages_in_use == table.length == table.nbytes == 0
        for layer in self.layers:
            layer.length, layer.expected = 0, []
        self.batch_size = None

    @invariant()
    def contents(self) -> None:
        for layer in (layer for pair in getattr(self, "pairs", ()) for layer in pair):
            if layer.length == layer.table.length:
                layer.check()

    @invariant()
    def sizes(self) -> None:
        tables = {layer.table for pair in getattr(self, "pairs", ()) for layer in pair}
        used: dict[PagePool, set[int]] = {table.pool: set() for table in tables}
        for table in tables:
            own = set(table.rows.ravel().tolist())
            used[table.pool] |= own
            assert table.pages_in_use == len(own)
            if table.batch_size is not None:
                assert table.rows.shape[1] == max(-(-table.length // table.page_size) - table.first_page, 0)
        for pool, pages in used.items():
            assert pages_in_use(pool) == len(pages)
            assert not pages or max(pages) < pool.size
            assert pool.size <= max(1.25 * len(pages), len(pages) + 1)
            assert pool.num_pages is None or pool.size <= pool.num_pages
            for user in pool.users:  # whatever lies in a page that was given back, nobody may see it
                given_back = [page for page in range(pool.size) if page not in pages and user.numbers[page].any()]
                user.numbers[given_back] = POISON


TestPageTables = PageTables.TestCase
TestPageTables.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def _layer(length: int = 0, batch_size: int = 1, num_pages: int | None = None, **options: Any) -> FakeLayer:
    """A layer with `length` tokens; token p of sequence b is 100 b + p + 1."""
    layer = FakeLayer(PageTable(**{"page_size": 4, "pool": PagePool(num_pages), **options}))
    if length:
        layer.update([[100 * b + p + 1 for p in range(length)] for b in range(batch_size)])
    return layer


def test_copy_on_write_isolates_rows() -> None:
    layer = _layer(6)
    layer.table.select([0, 0, 0])
    layer.follow_select([0, 0, 0])
    assert layer.table.pages_in_use == 2
    layer.update([[7], [8], [9]])
    # The full page stays shared, of the half-filled one everybody has a copy; one keeps the original.
    assert layer.table.pages_in_use == 4
    assert [row[6] for row in layer.expected] == [7, 8, 9]
    layer.check()
    rows = layer.table.rows
    assert len({row[0] for row in rows}) == 1
    assert len({row[1] for row in rows}) == 3
    # Now that nothing is shared there, nothing is copied.
    before = rows.tolist()
    layer.update([[1], [2], [3]])
    assert layer.table.rows.tolist() == before


def test_full_pages_are_never_copied() -> None:
    layer = _layer(8)
    layer.table.select([0, 0])
    layer.follow_select([0, 0])
    layer.update([[1], [2]])
    assert layer.table.pages_in_use == 2 + 2
    layer.check()


def test_tables_of_a_step_are_made_once() -> None:
    layer = _layer(5, batch_size=2)
    page_table, seq_lens = layer.table.page_table(CPU), layer.table.seq_lens(CPU)
    assert layer.table.page_table(CPU) is page_table
    assert layer.table.seq_lens(CPU) is seq_lens
    assert layer.table.nbytes == page_table.nbytes + seq_lens.nbytes
    layer.update([[1], [2]])
    assert layer.table.page_table(CPU) is page_table  # the same pages
    assert layer.table.seq_lens(CPU).tolist() == [6, 6]


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_window_holds_its_own_pages_only(window: int, page_size: int) -> None:
    layer = _layer(50, window=window, page_size=page_size)
    assert layer.table.pages_in_use <= math.ceil(window / page_size) + 1, "of a prompt only its end is kept"
    for token in range(100):
        layer.update([[token + 1]])
        layer.check()
        # The window itself, the new token, and one page because it begins anywhere.
        assert layer.table.pages_in_use <= math.ceil(window / page_size) + 1
    assert layer.table.first_position >= 150 - window - page_size


def test_a_window_cannot_be_cropped_into_what_is_gone() -> None:
    layer = _layer(20, window=6)
    before = state_of(layer.table)
    assert layer.table.first_position == 12
    with pytest.raises(RuntimeError, match="cannot take back 4 tokens.*window of 6 keeps only the tokens from 12 on"):
        layer.table.crop(4)
    assert state_of(layer.table) == before
    layer.table.crop(3)
    assert layer.table.length == 17


def test_a_window_of_one_token_is_not_cropped_before_its_last_page() -> None:
    """It needs no old token, but the page that new ones go into."""
    layer = _layer(10, window=1, page_size=4)
    before = state_of(layer.table)
    assert layer.table.first_position == 8
    with pytest.raises(RuntimeError, match="cannot take back 2 tokens.*keeps only the tokens from 8 on"):
        layer.table.crop(2)
    assert state_of(layer.table) == before
    layer.table.crop(1)
    layer.follow_crop(1)
    layer.update([[1, 2, 3]])
    layer.check()


def test_recording_the_past_allows_it() -> None:
    layer = _layer(5, window=6)
    layer.table.keeps_past = True
    for token in range(20):
        layer.update([[token + 10]])
    assert layer.table.first_position == 0
    layer.table.crop(20)
    layer.follow_crop(20)
    layer.check()
    layer.table.keeps_past = False
    layer.update([[1] * 10])
    layer.update([[1]])
    assert layer.table.first_position == 8


def test_num_pages_is_a_bound_on_all_sequences_together() -> None:
    layer = _layer(8, batch_size=2, num_pages=5)
    before = state_of(layer.table)
    with pytest.raises(OutOfPagesError, match="9 tokens a sequence need 6 pages of 4 tokens, but num_pages=5") as error:
        layer.update([[1], [1]])
    assert "num_pages=6 or more" in str(error.value)
    assert state_of(layer.table) == before
    layer.check()
    layer.table.select([1])
    layer.follow_select([1])
    layer.update([[1]])  # one sequence is shorter
    layer.check()


def test_room_that_the_window_frees_counts() -> None:
    """Decoding goes on for ever in as many pages as the window and one more token need."""
    layer = _layer(8, window=5, num_pages=2)
    for token in range(50):
        layer.update([[token + 1]])
        layer.check()


@pytest.mark.parametrize("expected_length", [20, 21, 24])
def test_expected_length_bounds_the_pools(expected_length: int) -> None:
    layer = _layer(17, batch_size=3, expected_length=expected_length)
    pages = 3 * math.ceil(expected_length / 4)
    for token in range(expected_length - 17):
        layer.update([[token + 1]] * 3)
        assert layer.table.pool.size <= pages
    assert layer.table.pool.size == layer.table.pages_in_use == pages
    for token in range(10):  # more than was promised
        layer.update([[token + 1]] * 3)
        layer.check()


def test_memory_goes_back_with_the_sequences() -> None:
    layer = _layer(40, batch_size=8)
    layer.table.select([3])
    layer.follow_select([3])
    assert layer.table.pages_in_use == 10
    assert layer.table.pool.size <= 12
    layer.check()


def test_a_detached_layer_takes_its_bytes_along() -> None:
    """Pages are renumbered when most of them go; whoever leaves the table at that moment is told."""
    first = _layer(4, batch_size=2)
    second = FakeLayer(first.table)
    second.update([[1, 2, 3, 4], [5, 6, 7, 8]])
    first.table.select([1, 0, 1, 0])  # ids are no longer in order
    for layer in (first, second):
        layer.follow_select([1, 0, 1, 0])
        layer.update([[11 + b] for b in range(4)])
    first.update([[20] * 60 for _ in range(4)])
    first.update([[30] for _ in range(4)])
    assert second.table is not first.table
    for layer in (first, second):
        layer.check()
    second.update([[40 + b] for b in range(4)])
    second.check()


@pytest.mark.parametrize("window", [None, 5])
def test_a_layer_that_held_nothing_begins_anew(window: int | None) -> None:
    first = _layer(window=window)
    second = FakeLayer(first.table)
    first.update([[p + 1 for p in range(50)]])
    first.update([[51]])
    assert second.table is not first.table
    second.update([[7, 8, 9], [1, 2, 3]])
    for layer in (first, second):
        layer.check()


# -- fixed addresses -----------------------------------------------------------------------------------------------


def _static(
    batch_size: int = 1, page_size: int = 4, capacity: int = 40, window: int | None = None, slack: int = 6
) -> Any:
    return StaticPageTable(batch_size, page_size, capacity, CPU, window, slack)


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 17])
@pytest.mark.parametrize("slack", [1, 3, 8])
def test_the_ring_keeps_what_new_tokens_see(page_size: int, window: int, slack: int) -> None:
    """Writing as many tokens as allowed, nothing that they see is written over."""
    table = _static(page_size=page_size, capacity=100, window=window, slack=slack)
    num_columns = table.page_table(CPU).shape[1]
    assert table.most_at_once in (slack, 100)
    slots: dict[tuple[int, int], int] = {}
    length = 0
    for turn in range(100):
        num_new = min(1 + turn % slack, 100 - length)
        if not num_new:
            break
        table.append(num_new)
        for p in range(length, length + num_new):
            slots[(p // page_size) % num_columns, p % page_size] = p
        for p in range(max(length - (window - 1), 0), length + num_new):
            assert slots[(p // page_size) % num_columns, p % page_size] == p
        length += num_new
        assert table.seq_lens(CPU).tolist() == [length]
        assert table.pages_in_use == min(math.ceil(length / page_size), num_columns)
    assert length == 100


@pytest.mark.parametrize(
    ("window", "slack", "num_columns"), [(9, 6, 5), (9, 8, 5), (9, 9, 6), (31, 6, 10), (40, 64, 10)]
)
def test_size_of_the_ring(window: int, slack: int, num_columns: int) -> None:
    """ceil((window - 1 + slack) / 4) + 1 columns, or all 10 of the capacity when that is no more."""
    table = _static(window=window, slack=slack)
    assert table.page_table(CPU).shape == (1, num_columns)
    assert table.most_at_once == (slack if num_columns < 10 else 40)


def test_static_tables_reserve_everything() -> None:
    table = _static(batch_size=3, capacity=41)
    assert table.pool_size == 3 * 11
    assert table.page_table(CPU).flatten().tolist() == list(range(33))
    assert table.page_table(CPU).dtype == table.seq_lens(CPU).dtype == torch.int32
    assert table.batch_size == 3
    assert table.most_at_once == table.capacity == 41
    assert table.nbytes == 33 * 4 + 3 * 4
    assert table.pages_in_use == 0


def test_static_tables_stay_where_they_are() -> None:
    table = _static(batch_size=2)
    addresses = [tensor.data_ptr() for tensor in table.tensors]
    table.append(9)
    assert table.pages_in_use == 2 * 3
    table.crop(5)
    assert table.seq_lens(CPU).tolist() == [4, 4]
    assert table.pages_in_use == 2 * 1
    table.crop(50)
    assert table.seq_lens(CPU).tolist() == [0, 0]
    table.append(3)
    table.clear()
    assert table.seq_lens(CPU).tolist() == [0, 0]
    assert [tensor.data_ptr() for tensor in table.tensors] == addresses


class StaticTables(RuleBasedStateMachine):
    """Beams at fixed addresses: what is written through the table is there, whoever was reordered or cropped."""

    @initialize(page_size=st.sampled_from([1, 3, 4]), capacity=st.sampled_from([1, 7, 20]), size=st.integers(1, 4))
    def start(self, page_size: int, capacity: int, size: int) -> None:
        self.table = _static(batch_size=size, page_size=page_size, capacity=capacity)
        self.numbers = np.full((self.table.pool_size, page_size), POISON)
        self.expected: list[list[int]] = [[] for _ in range(size)]
        self.next_token = 1

    def _place(self, b: int, p: int) -> tuple[int, int]:
        return int(self.table.page_table(CPU)[b, p // self.table.page_size]), p % self.table.page_size

    def _copy(self, pages: tuple[torch.Tensor, torch.Tensor]) -> None:
        sources, targets = (side.numpy() for side in pages)
        self.numbers[targets] = self.numbers[sources]

    @rule(num_tokens=st.integers(1, 5))
    def append(self, num_tokens: int) -> None:
        length = len(self.expected[0])
        num_tokens = min(num_tokens, self.table.capacity - length)
        self.table.append(num_tokens)
        for p in range(length, length + num_tokens):
            for b, row in enumerate(self.expected):
                row.append(self.next_token)
                self.numbers[self._place(b, p)] = self.next_token
                self.next_token += 1

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        size = len(self.expected)
        order = data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
        self._copy(self.table.select(torch.tensor(order)))
        self.expected = [list(self.expected[index]) for index in order]

    @rule(num_tokens=st.integers(0, 8))
    def crop(self, num_tokens: int) -> None:
        self.table.crop(num_tokens)
        if self.table.shares:
            self._copy(self.table.write_into_own())
        length = max(len(self.expected[0]) - num_tokens, 0)
        self.expected = [row[:length] for row in self.expected]

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.expected = [[] for _ in self.expected]

    @invariant()
    def contents(self) -> None:
        for b, row in enumerate(getattr(self, "expected", ())):
            assert [int(self.numbers[self._place(b, p)]) for p in range(len(row))] == row


TestStaticTables = StaticTables.TestCase
TestStaticTables.settings = settings(TestPageTables.settings, max_examples=60)
