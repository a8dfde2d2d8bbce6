import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkrl.decode.pages import OutOfPages, PagePool
from thinkrl.types import UserError


def pool_of(num_pages, page_size=4):
    return PagePool(num_layers=2, num_pages=num_pages, num_kv_heads=1, head_dim=1, page_size=page_size)


def write(pages, start, values):
    """What the model does: K/V of positions start.. go to their slots, in every layer."""
    for position, value in enumerate(values, start):
        page, offset = divmod(position, pages.pool.page_size)
        pages.pool.storage[:, :, pages.table[page], offset] = value


def read(pages):
    flat = [
        pages.pool.storage[:, :, page, offset, 0, 0]
        for page in pages.table
        for offset in range(pages.pool.page_size)
    ]
    assert all((slot == slot[0, 0]).all() for slot in flat), "layers, keys and values must hold the same"
    return [int(slot[0, 0]) for slot in flat][: pages.filled]


def test_three_samples_share_the_prompt_and_copy_its_last_page_when_they_write():
    pool = PagePool(1, 10, 1, 1, page_size=16)
    prompt = pool.new(list(range(37)))
    prompt.reserve(36)
    write(prompt, 0, range(36))
    prompt.filled = 36
    assert pool.free_pages == 7  # a, b, c

    samples = [prompt.fork() for _ in range(3)]
    assert [sample.unfed for sample in samples] == [[36]] * 3
    prompt.release()
    assert pool.free_pages == 7, "sharing costs nothing"
    for sample in samples:
        sample.reserve(40)
    a, b, c = 0, 1, 2
    assert [sample.table for sample in samples] == [[a, b, 3], [a, b, 4], [a, b, c]], (
        "the last holder writes in place"
    )
    assert pool.free_pages == 5
    assert [read(sample) for sample in samples] == [list(range(36))] * 3
    for sample in samples:
        sample.release()
    assert pool.free_pages == 10


def test_a_fork_sees_the_prefix_and_not_what_either_side_writes_later():
    pool = pool_of(6)
    trunk = pool.new([7, 8, 9, 10, 11, 12])
    trunk.reserve(5)
    write(trunk, 0, [70, 80, 90, 100, 110])
    trunk.filled = 5
    branch = trunk.fork(3)
    assert (branch.tokens, branch.filled, branch.unfed) == ([7, 8, 9], 2, [9])
    branch.reserve(4)
    write(branch, 2, [-1, -2])
    branch.filled = 4
    trunk.reserve(6)
    write(trunk, 5, [120])
    trunk.filled = 6
    assert read(branch) == [70, 80, -1, -2]
    assert read(trunk) == [70, 80, 90, 100, 110, 120]


def test_a_fork_of_a_sequence_that_lost_its_pages_has_everything_to_feed():
    pool = pool_of(2)
    pages = pool.new([1, 2, 3, 4, 5])
    pages.reserve(4)
    pages.filled = 4
    pages.forget()
    assert pages.fork().unfed == [1, 2, 3, 4, 5]
    assert pool.free_pages == 2


def test_running_out_leaves_a_valid_sequence():
    pool = pool_of(2)
    pages = pool.new([1])
    with pytest.raises(OutOfPages):
        pages.reserve(9)
    assert len(pages.table) == 2 and pool.free_pages == 0
    pages.release()
    pages.release()
    assert pool.free_pages == 2 and not pool.handles


def test_a_sequence_that_can_never_fit_is_refused_in_one_sentence():
    pool = pool_of(3)
    pool.require(12)
    with pytest.raises(
        UserError, match="needs 4 KV pages of 4, but the pool has only 3: raise num_pages or lower max_tokens"
    ):
        pool.require(13)


@pytest.mark.parametrize("cut", [0, 4, -1])
def test_fork_outside_the_sequence(cut):
    with pytest.raises(UserError, match="the sequence has 3 tokens"):
        pool_of(2).new([1, 2, 3]).fork(cut)


def test_release_all_but_keeps_what_was_held_before():
    pool = pool_of(4)
    kept, dropped = pool.new([1, 2, 3]), pool.new([1, 2, 3])
    kept.reserve(3)
    dropped.reserve(3)
    pool.release_all_but({kept})
    assert pool.free_pages == 3 and pool.handles == {kept}


operation = st.tuples(
    st.sampled_from(["new", "grow", "fork", "release"]), st.integers(0, 100), st.integers(1, 9)
)


@settings(max_examples=60)
@given(st.lists(operation, max_size=30))
def test_any_history_keeps_contents_apart_and_returns_every_page(history):
    """Against a model in which every sequence has a list of its own."""
    pool, live, stamp = pool_of(7), [], 0
    for action, choice, size in history:
        if action == "new":
            live.append((pool.new([0] * size), []))
            continue
        if not live:
            continue
        pages, content = live[choice % len(live)]
        if action == "grow":
            try:
                pages.reserve(pages.filled + size)
            except OutOfPages:
                continue
            new = list(range(stamp, stamp + size))
            stamp += size
            write(pages, pages.filled, new)
            content += new
            pages.filled += size
            pages.tokens = [0] * (pages.filled + 1)
        elif action == "fork":
            cut = 1 + choice % len(pages.tokens)
            live.append((pages.fork(cut), content[: cut - 1]))
        else:
            pages.release()
            live.remove((pages, content))
        for pages, content in live:
            assert read(pages) == content
        used = {page for pages, _ in live for page in pages.table}
        assert pool.free_pages == pool.num_pages - len(used)
    for pages, _ in live:
        pages.release()
    assert pool.free_pages == pool.num_pages
