"""The cache: a sequence never sees a hole, nor anything of who had its place before."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RandomModel, fast_start, model_folder, random_token_ids
from safetensors.torch import load_file, save_file

from tsqp_shm import SamplingParams
from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.kv_cache import BlockTable, KVCache, Run
from tsqp_shm.shm.tiling import KEY_BLOCK, Segment, key_range, padded_length

MODEL = SimpleNamespace(num_layers=2, num_kv_heads=3, head_dim=4)
MAX_MODEL_LEN = 200
NUM_SEQUENCES = 3


BLOCKS_EACH = padded_length(MAX_MODEL_LEN) // KEY_BLOCK
IDENTITY = BlockTable.identity(NUM_SEQUENCES, MAX_MODEL_LEN)
SHUFFLED = BlockTable(
    np.random.default_rng(3).permutation(IDENTITY.entries.reshape(-1)).reshape(NUM_SEQUENCES, BLOCKS_EACH)
)
# Runs of two blocks, and some that would go on in the next row.
ROLLED = BlockTable(np.roll(IDENTITY.entries, 2))


@pytest.fixture(params=[IDENTITY, SHUFFLED, ROLLED], ids=["identity", "shuffled", "rolled"])
def blocks(request) -> BlockTable:
    return request.param


def new_cache(blocks: BlockTable = IDENTITY) -> KVCache:
    arena = SimpleNamespace(plan=SimpleNamespace(shared_slots=()))
    device = Device(torch.device("cpu"), arena)  # type: ignore[arg-type]
    return KVCache(MODEL, blocks, MAX_MODEL_LEN, torch.float32, device)  # type: ignore[arg-type]


def append(cache: KVCache, segment: Segment, value: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a segment's keys and values to every layer."""
    shape = (segment.rows, MODEL.num_kv_heads, MODEL.head_dim)
    keys, values = (torch.randn(shape) if value is None else torch.full(shape, value) for _ in range(2))
    cache.begin_step([segment])
    for layer in range(MODEL.num_layers):
        cache.append(layer, segment, keys, values)
    return keys, values


def test_what_was_appended_is_read_back(blocks):
    cache = new_cache(blocks)
    parts = [append(cache, Segment(1, position, 0, rows)) for position, rows in ((0, 70), (70, 1), (71, 60))]
    keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
    seen = key_range(Segment(1, 130, 0, 1), None)
    assert (seen.start, seen.end, seen.columns) == (0, 131, 192)
    for layer in range(MODEL.num_layers):
        assert torch.equal(cache.keys(layer, 1, seen)[:, :, :131], keys.permute(1, 2, 0))
        assert torch.equal(cache.values(layer, 1, seen)[:, :131], values.transpose(0, 1))


def test_a_window_reads_from_its_key_block_on(blocks):
    cache = new_cache(blocks)
    _, values = append(cache, Segment(0, 0, 0, 150))
    seen = key_range(Segment(0, 149, 0, 1), 20)
    assert (seen.start, seen.end, seen.columns) == (128, 150, 64)
    assert torch.equal(cache.values(0, 0, seen)[:, :22], values[128:].transpose(0, 1))


@pytest.mark.parametrize(
    ("segment", "field"),
    [
        (Segment(0, 11, 0, 1), "position"),
        (Segment(1, 1, 0, 1), "position"),
        (Segment(0, 10, 0, MAX_MODEL_LEN - 9), "position"),
        (Segment(0, 0, 0, MAX_MODEL_LEN + 1), "position"),
        (Segment(NUM_SEQUENCES, 0, 0, 1), "sequence"),
    ],
    ids=["hole", "hole in an empty sequence", "over the end", "longer than the cache", "no such sequence"],
)
def test_a_segment_that_does_not_fit_is_a_protocol_error(segment, field):
    cache = new_cache()
    append(cache, Segment(0, 0, 0, 10))
    with pytest.raises(ProtocolError, match=field):
        cache.begin_step([segment])


def test_segments_of_one_step_follow_on_each_other():
    cache = new_cache()
    cache.begin_step([Segment(0, 0, 0, 8), Segment(0, 8, 8, 8), Segment(2, 0, 16, 1)])
    cache.begin_step([Segment(0, 16, 0, 1), Segment(2, 1, 1, 1)])
    with pytest.raises(ProtocolError):
        cache.begin_step([Segment(0, 17, 0, 4), Segment(0, 22, 4, 4)])


@pytest.mark.parametrize("position", [0, 3, 64, 100])
def test_values_behind_the_end_are_zero_after_a_longer_sequence(position, blocks):
    cache = new_cache(blocks)
    append(cache, Segment(1, 0, 0, MAX_MODEL_LEN), float("nan"))
    append(cache, Segment(2, 0, 0, MAX_MODEL_LEN), 7.0)
    if position:
        append(cache, Segment(1, 0, 0, position), 1.0)
    segment = Segment(1, position, 0, 5)
    append(cache, segment, 1.0)
    seen = key_range(segment, None)
    for layer in range(MODEL.num_layers):
        values = cache.values(layer, 1, seen)
        assert (values[:, : position + 5] == 1).all()
        assert (values[:, position + 5 :] == 0).all()
    # Other sequences keep what they have.
    assert (cache.values(0, 2, key_range(Segment(2, 0, 0, MAX_MODEL_LEN), None))[:, :MAX_MODEL_LEN] == 7).all()


@given(
    st.permutations(range(NUM_SEQUENCES * BLOCKS_EACH)),
    st.integers(0, NUM_SEQUENCES - 1),
    st.integers(0, MAX_MODEL_LEN),
    st.integers(0, MAX_MODEL_LEN),
)
def test_the_runs_of_a_table_are_its_positions_in_order(entries, sequence, start, end):
    table = np.array(entries, np.int32).reshape(NUM_SEQUENCES, BLOCKS_EACH)
    runs = BlockTable(table).runs(sequence, start, end)
    found = [(run.row, column) for run in runs for column in range(run.start, run.start + run.length)]
    blocks = [table[sequence, position // KEY_BLOCK] for position in range(start, end)]
    within = [position % KEY_BLOCK for position in range(start, end)]
    assert found == [
        (block // BLOCKS_EACH, block % BLOCKS_EACH * KEY_BLOCK + at) for block, at in zip(blocks, within, strict=True)
    ]
    assert all(run.length > 0 for run in runs)
    # As few as there can be.
    assert all(a.row != b.row or a.start + a.length != b.start for a, b in pairwise(runs))


def test_where_nothing_is_paged_a_sequence_is_one_run():
    assert IDENTITY.runs(2, 3, MAX_MODEL_LEN) == [(2, 3, MAX_MODEL_LEN - 3)]
    assert IDENTITY.runs(1, 64, 65) == [(1, 64, 1)]


@given(
    st.sampled_from([IDENTITY, SHUFFLED, ROLLED]),
    st.lists(st.tuples(st.integers(0, NUM_SEQUENCES - 1), st.floats(0, 1), st.integers(1, 60)), max_size=12),
)
def test_any_run_of_steps_reads_as_a_list_would(blocks, steps):
    cache = new_cache(blocks)
    expected: list[list[float]] = [[] for _ in range(NUM_SEQUENCES)]
    for number, (sequence, share, rows) in enumerate(steps):
        position = round(share * len(expected[sequence]))
        rows = min(rows, MAX_MODEL_LEN - position)
        if rows == 0:
            continue
        segment = Segment(sequence, position, 0, rows)
        append(cache, segment, float(number + 1))
        expected[sequence][position:] = [number + 1] * rows
        length = len(expected[sequence])
        values = cache.values(1, sequence, key_range(segment, None))
        assert values[0, :, 0].tolist() == expected[sequence] + [0] * (padded_length(length) - length)


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory):
    """A model in which one token makes NaN of every key and value from it on."""
    fields = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    folder = RandomModel("qwen2", fields).write(tmp_path_factory.mktemp("poisoned"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][256] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limits", [{}, {"tile_rows": 16, "max_batch_tokens": 48}])
def test_a_place_that_held_nan_gives_the_next_sequence_the_same_bits(poisoned_model, dtype, limits):
    prompts = [random_token_ids(length, 256, seed=length) for length in (1, 30, 70)]
    with fast_start() as fast, fast.llm(poisoned_model, dtype=dtype, max_model_len=MAX_MODEL_LEN, **limits) as llm:
        expected = [llm.logits(prompt) for prompt in prompts]
        for prompt, logits in zip(prompts, expected, strict=True):
            assert np.isnan(llm.logits([256] * MAX_MODEL_LEN)).all()
            assert np.array_equal(llm.logits(prompt), logits)


def test_a_short_completion_after_a_long_one_is_what_it_is_in_a_fresh_cache():
    folder = model_folder(RandomModel("mistral", {"sliding_window": 16}))
    prompts = [list(random_token_ids(length, seed=length)) for length in (150, 3, 90, 5, 1, 64)]
    params = SamplingParams(max_tokens=20, temperature=0)
    with fast_start() as fast:
        limits = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 1}
        with fast.llm(folder, **limits) as llm:
            reused = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
        for prompt, completion in zip(prompts[1:4], reused[1:4], strict=True):
            with fast.llm(folder, **limits) as llm:
                assert llm.generate(prompt, params)[0].outputs[0].token_ids == completion


def test_a_table_of_many_long_sequences_takes_no_more_than_its_entries():
    tracemalloc.start()
    try:
        table = BlockTable.identity(1024, 1 << 20)
        assert table.runs(1023, 5, 1 << 20) == [Run(1023, 5, (1 << 20) - 5)]
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < table.entries.nbytes + (4 << 20)
