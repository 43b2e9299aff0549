"""How a ragged batch is cut: nothing is left out, nothing comes twice, everything fits."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.tiling import (
    KEY_BLOCK,
    MAX_BLOCKS,
    Segment,
    cut_blocks,
    cut_segments,
    group_tiles,
    key_range,
    padded_length,
)

tile_row_counts = st.integers(1, 300)
ragged_batches = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 5000), st.integers(1, 700)), min_size=1, max_size=12
)
windows = st.none() | st.integers(1, 3000)
segments = st.builds(Segment, st.integers(0, 7), st.integers(0, 5000), st.integers(0, 2000), st.integers(1, 300))


@given(ragged_batches, tile_row_counts)
def test_segments_cover_the_chunks_exactly_and_in_order(chunks, tile_rows):
    wanted = [(sequence, position + i) for sequence, position, tokens in chunks for i in range(tokens)]
    covered = []
    for segment in cut_segments(chunks, tile_rows):
        assert segment.first_row == len(covered)
        assert 1 <= segment.rows <= tile_rows
        covered += [(segment.sequence, segment.position + i) for i in range(segment.rows)]
    assert covered == wanted


@given(ragged_batches, tile_row_counts)
def test_tiles_cover_the_segments_and_hold_at_most_tile_rows(chunks, tile_rows):
    cut = cut_segments(chunks, tile_rows)
    covered = 0
    for tile in group_tiles(cut, tile_rows):
        assert tile.first_segment == covered
        assert tile.num_segments >= 1
        covered += tile.num_segments
        assert sum(segment.rows for segment in cut[tile.first_segment : covered]) <= tile_rows
    assert covered == len(cut)


@given(ragged_batches, tile_row_counts)
def test_no_two_neighbouring_tiles_would_fit_into_one(chunks, tile_rows):
    cut = cut_segments(chunks, tile_rows)
    tiles = group_tiles(cut, tile_rows)
    for tile in tiles[:-1]:
        end = tile.first_segment + tile.num_segments
        assert sum(segment.rows for segment in cut[tile.first_segment : end + 1]) > tile_rows


def test_an_empty_batch_has_no_tiles():
    assert group_tiles(cut_segments([], 128), 128) == []


def test_decode_rows_of_several_sequences_share_a_tile():
    assert group_tiles(cut_segments([(0, 9, 1), (1, 4, 1), (2, 0, 1)], 128), 128) == [(0, 3)]


@given(segments, windows)
def test_the_key_range_holds_every_key_a_row_may_see(segment, window):
    keys = key_range(segment, window)
    for position in (segment.position, segment.position + segment.rows - 1):
        oldest = 0 if window is None else max(0, position - window + 1)
        assert keys.start <= oldest
        assert position < keys.end


@given(segments, windows)
def test_the_key_range_is_cut_at_blocks_and_no_wider_than_needed(segment, window):
    keys = key_range(segment, window)
    oldest = 0 if window is None else max(0, segment.position - window + 1)
    assert keys.start % KEY_BLOCK == 0
    assert oldest - keys.start < KEY_BLOCK
    assert keys.end == segment.position + segment.rows
    assert keys.columns % KEY_BLOCK == 0
    assert 0 <= keys.columns - (keys.end - keys.start) < KEY_BLOCK


@given(st.integers(0, 1 << 20))
def test_padded_length_is_the_next_whole_block(length):
    assert padded_length(length) % KEY_BLOCK == 0
    assert 0 <= padded_length(length) - length < KEY_BLOCK


@st.composite
def steps(draw):
    """A plan and a batch that its limits allow: at most one chunk for each sequence."""
    max_num_seqs = draw(st.integers(1, 6))
    max_model_len = draw(st.integers(1, 700))
    max_batch_tokens = draw(st.integers(max_num_seqs, 900))
    limits = Limits(
        dtype="bfloat16",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        tile_rows=draw(st.integers(1, 200)),
        tiles_in_flight=2,
    )
    heads = draw(st.integers(1, 4))
    model = SimpleNamespace(
        num_layers=1, hidden_size=8, intermediate_size=8, num_heads=heads, num_kv_heads=heads, head_dim=2,
        vocab_size=8, windows=(None,), linear_roles=(), is_tied=False,
    )  # fmt: skip
    chunks, left = [], max_batch_tokens
    for sequence in range(draw(st.integers(1, max_num_seqs))):
        if left:
            position = draw(st.integers(0, max_model_len - 1))
            tokens = draw(st.integers(1, min(left, max_model_len - position)))
            chunks.append((sequence, position, tokens))
            left -= tokens
    return Plan.derive(model, limits), model, limits, chunks


@given(steps(), windows)
def test_every_tile_fits_a_score_slot(step, window):
    plan, model, limits, chunks = step
    slot = plan.score_slots[0]
    cut = cut_segments(chunks, limits.tile_rows)
    for tile in group_tiles(cut, limits.tile_rows):
        members = cut[tile.first_segment : tile.first_segment + tile.num_segments]
        elements = sum(model.num_heads * s.rows * key_range(s, window).columns for s in members)
        assert elements <= slot.num_rows * slot.row_elements


@given(steps())
def test_every_step_fits_the_segment_table(step):
    plan, _, limits, chunks = step
    assert len(cut_segments(chunks, limits.tile_rows)) <= plan.slot("segments").num_rows


@given(steps(), st.integers(1, 300))
def test_blocks_are_whole_tiles_that_follow_on_each_other(step, block_rows):
    _, _, limits, chunks = step
    segments = cut_segments(chunks, limits.tile_rows)
    tiles = group_tiles(segments, limits.tile_rows)
    blocks = cut_blocks(segments, tiles, block_rows)
    assert [tile for block in blocks for tile in block.tiles] == tiles
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert len(blocks) <= MAX_BLOCKS
    next_row = 0
    for block in blocks:
        last = block.tiles[-1]
        first_segment, last_segment = (
            segments[block.tiles[0].first_segment],
            segments[last.first_segment + last.num_segments - 1],
        )
        assert block.first_row == first_segment.first_row == next_row
        next_row = block.first_row + block.rows
        assert next_row == last_segment.first_row + last_segment.rows
    assert all(block.rows >= block_rows for block in blocks[:-1])
    assert next_row == sum(tokens for _, _, tokens in chunks)


@pytest.mark.parametrize(("layer_parameters", "expected"), [(1 << 22, 384), (1 << 26, 1024)])
def test_blocks_are_larger_where_a_layer_is(layer_parameters, expected):
    assert EngineConfig().limits(4096, layer_parameters).block_rows == expected
    assert EngineConfig(block_rows=7).limits(4096, layer_parameters).block_rows == 7
