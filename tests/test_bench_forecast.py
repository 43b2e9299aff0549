"""Where each mode pays: the forecast gives the figures that the design was made with, and says where tee-only wins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tsqp_shm.bench.modes.forecast import Costs, Machine, ModelShape, Work, forecast
from tsqp_shm.bench.modes.machines import STATED, assumed, in_words
from tsqp_shm.bench.modes.table import winner
from tsqp_shm.bench.shapes import shape_config
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec


def network_of(name: str) -> Network:
    return Network.of(ModelSpec.from_config(shape_config(name)))


EIGHT = ModelShape.of("8B", network_of("llama-3.1-8b"))
# Of the design: words are shared out evenly among the cores, and a core with VNNI makes 85 G/s.
DESIGN = Costs(
    check_ns=0.22,
    lone_check_ns=0.22,
    pad_ns=0.85,
    digit_macs_per_s=85e9,
    pad_macs_per_s=85e9 / 4,
    attention_flops_per_s=170e9,
    splits_rows=True,
)
WITH_TILES, WITH_VNNI = STATED[0], STATED[1]
ONE, EIGHTFOLD, MANY, PROMPT = Work(1, 512), Work(8, 512), Work(64, 512), Work(1024)


@pytest.mark.parametrize(
    ("machine", "tee_only", "verified", "stocked", "sustained"),
    [(WITH_TILES, 26, 143, 142, 142), (WITH_VNNI, 8, 127, 125, 22)],
    ids=["32 cores with AMX", "8 cores with VNNI"],
)
def test_a_token_of_8b_beside_an_h100_takes_what_the_design_says(machine, tee_only, verified, stocked, sustained):
    speeds = [1 / seconds for seconds in forecast(EIGHT, machine, DESIGN, ONE)]
    assert speeds == pytest.approx([tee_only, verified, stocked, sustained], rel=0.02)


def test_multiplications_and_words_are_those_of_the_network():
    for name in ("llama-3.2-1b", "qwen2.5-0.5b"):
        network = network_of(name)
        shape = ModelShape.of(name, network)
        assert shape.num_linears == len(network.linears)
        assert shape.weights == sum(linear.parameters for linear in network.linears)
        head = network.lm_head
        layers = [linear for layer in network.layers for linear in layer.linears]
        for work, head_rows in ((Work(5, 9), 5), (Work(5), 1)):
            expected = 5 * sum(linear.parameters for linear in layers) + head_rows * head.parameters
            assert work.multiplications(shape) == expected
            words = 5 * sum(linear.inputs + linear.outputs for linear in layers)
            assert work.words(shape) == words + head_rows * (head.inputs + head.outputs)


def test_a_token_of_tee_only_is_bound_by_memory_and_a_prompt_by_multiplications():
    faster_memory = replace(WITH_VNNI, memory_bytes_per_s=2 * WITH_VNNI.memory_bytes_per_s)
    for work, is_faster in ((ONE, True), (PROMPT, False)):
        before, after = (forecast(EIGHT, machine, DESIGN, work).tee_only for machine in (WITH_VNNI, faster_memory))
        assert (after < 0.6 * before) == is_faster


@pytest.mark.parametrize("machine", STATED, ids=lambda machine: machine.name)
@pytest.mark.parametrize("work", [ONE, EIGHTFOLD, MANY, PROMPT], ids=str)
def test_pads_cost_and_a_stock_of_them_never_slows(machine, work):
    found = forecast(EIGHT, machine, DESIGN, work)
    assert found.verified <= found.stocked <= found.sustained


def test_without_a_stock_tee_only_wins_prompts_and_large_batches_and_blinded_a_lone_sequence():
    for work, wins in ((ONE, "blinded"), (MANY, "tee-only"), (PROMPT, "tee-only")):
        found = forecast(EIGHT, WITH_VNNI, DESIGN, work)
        with_stock, without = winner(found._asdict()).split(" / ")
        assert with_stock.startswith("blinded")
        assert without.startswith(wins)


def test_a_row_that_is_alone_is_checked_by_few_cores_unless_they_share_its_words():
    shared, alone = (forecast(EIGHT, WITH_TILES, replace(DESIGN, splits_rows=splits), ONE) for splits in (True, False))
    assert alone.stocked > shared.stocked
    many = [forecast(EIGHT, WITH_VNNI, replace(DESIGN, splits_rows=splits), Work(8192)) for splits in (True, False)]
    assert many[0] == pytest.approx(many[1], rel=1e-3)


def test_a_model_that_does_not_fit_the_gpu_is_tee_onlys():
    found = forecast(EIGHT, replace(WITH_VNNI, gpu_bytes=7e9), DESIGN, ONE)
    assert math.isfinite(found.tee_only)
    assert found[1:] == (math.inf,) * 3


def test_a_gpu_process_on_the_tees_cores_takes_them_from_the_makers_of_pads():
    on_cores = replace(WITH_VNNI, gpu_cores=WITH_VNNI.cores, gpu_bytes_per_s=60e9)
    apart = replace(on_cores, gpu_cores=0)
    assert forecast(EIGHT, on_cores, DESIGN, MANY).sustained > forecast(EIGHT, apart, DESIGN, MANY).sustained


def test_a_machine_of_the_readers_has_what_is_said_of_it_and_says_so():
    machine = assumed(
        "cores=16,memory-gb-s=90,digit-gmac-s=150,gpu-gb=48,gpu-gb-s=864,gpu-tmac-s=181,round-trip-us=12.5"
    )
    assert isinstance(machine, Machine)
    assert (machine.cores, machine.memory_bytes_per_s, machine.digit_macs_per_s) == (16, 90e9, 150e9)
    assert machine.round_trip_s == pytest.approx(12.5e-6)
    assert machine.bus_bytes_per_s == WITH_VNNI.bus_bytes_per_s
    for said in ("16 cores of 150 G/s", "90 GB/s", "48 GB", "0.86 TB/s", "181 T/s", "bus 25 GB/s"):
        assert said in in_words(machine)
    # What makes pads is as many times faster.
    costs = machine.costs(DESIGN)
    assert costs.pad_macs_per_s / costs.digit_macs_per_s == DESIGN.pad_macs_per_s / DESIGN.digit_macs_per_s


@pytest.mark.parametrize("text", ["cores", "cores=", "cores=0", "cores=x", "colour=3", "bus-gb-s=-1", "cores=1e3"])
def test_an_assumption_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="assume"):
        assumed(text)
