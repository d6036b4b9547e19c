"""Counted collectives against bytes worked out by hand, on a group whose peers are imaginary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from forerun.executors.measure.comm import Call, CollectiveCounter, axis_of
from forerun.mesh import Mesh

FP32 = 4
WIDTH, ROWS = 8, 6
LAYOUT = Mesh(pp=2, dp_replicate=2, dp_shard=2, tp=2)


@pytest.fixture(scope="module")
def world() -> Iterator[DeviceMesh]:
    """Rank 0 of 16 in the dense mesh's rank order, without the other 15."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=LAYOUT.world)
    shape = LAYOUT.shape()
    yield init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    dist.destroy_process_group()


def model() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])


def train(module: nn.Module) -> None:
    module(torch.ones(ROWS, WIDTH)).sum().backward()


def test_axes_are_told_by_ranks() -> None:
    assert axis_of(LAYOUT, [0, 1]) == "tp"
    assert axis_of(LAYOUT, [0, 2]) == axis_of(LAYOUT, [0, 4]) == "dp"
    assert axis_of(LAYOUT, [0, 2, 4, 6]) == "dp"
    assert axis_of(LAYOUT, [0, 8]) == "pp"


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # torch 2.13 renames two of them
def test_plain_collectives(world: DeviceMesh) -> None:
    group = world.get_group("dp_shard")
    one, both = torch.ones(10), torch.ones(20)
    with CollectiveCounter(LAYOUT) as counter:
        dist.all_reduce(one, group=group)
        dist.all_gather_into_tensor(both, one, group=group)
        dist.reduce_scatter_tensor(one, both, group=group)
        dist.send(one, group=world.get_group("pp"), group_dst=1)
        dist.recv(one, group=world.get_group("pp"), group_src=1)
    assert counter.calls == [
        Call("all_reduce", "dp", 40),
        Call("all_gather", "dp", 80),
        Call("reduce_scatter", "dp", 80),
        Call("send", "pp", 40),
        Call("recv", "pp", 40),
    ]
    assert counter.bytes_on_wire() == {
        "all_gather@dp": 80, "all_reduce@dp": 40, "reduce_scatter@dp": 80, "send@pp": 40,
    }  # fmt: skip


def test_groups_of_one_are_not_counted(world: DeviceMesh) -> None:
    with CollectiveCounter(LAYOUT) as counter:
        dist.all_reduce(torch.ones(10), group=world.get_group("cp"))
    assert counter.calls == []


def test_fsdp_gathers_twice_and_scatters_once(world: DeviceMesh) -> None:
    module = model()
    for layer in module:
        fully_shard(layer, mesh=world["dp_shard"], reshard_after_forward=True)
    fully_shard(module, mesh=world["dp_shard"])
    with CollectiveCounter(LAYOUT) as counter:
        train(module)
    weights = 2 * WIDTH * WIDTH * FP32
    assert counter.bytes_on_wire() == {
        "all_gather@dp": 2 * weights,
        "reduce_scatter@dp": weights,
    }


def test_hsdp_also_sums_the_shards(world: DeviceMesh) -> None:
    module = model()
    fully_shard(module, mesh=world["dp_replicate", "dp_shard"], reshard_after_forward=False)
    with CollectiveCounter(LAYOUT) as counter:
        train(module)
    weights = 2 * WIDTH * WIDTH * FP32
    assert counter.bytes_on_wire() == {
        "all_gather@dp": weights,
        "all_reduce@dp": weights // LAYOUT.dp_shard,
        "reduce_scatter@dp": weights,
    }


def test_tensor_parallel_pair_reduces_its_output(world: DeviceMesh) -> None:
    module = parallelize_module(
        model(), world["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}
    )
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    with CollectiveCounter(LAYOUT) as counter:
        out = module(x)
        forward = counter.bytes_on_wire()
        out.sum().backward()
    assert forward == {"all_reduce@tp": ROWS * WIDTH * FP32}
    assert counter.bytes_on_wire() == {"all_reduce@tp": 2 * ROWS * WIDTH * FP32}
