"""The mesh owns degrees, rank order and strides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import InputError
from forerun.mesh import Mesh

from .strategies import meshes


@given(meshes)
def test_coordinates_are_a_bijection(mesh: Mesh) -> None:
    seen = {tuple(sorted(mesh.coordinates(rank).items())) for rank in range(mesh.world)}
    assert len(seen) == mesh.world
    for rank in range(mesh.world):
        position = mesh.coordinates(rank)
        assert all(0 <= position[axis] < degree for axis, degree in mesh.shape().items())
        assert sum(position[axis] * mesh.stride(axis) for axis in mesh.AXES) == rank


@given(meshes)
def test_tensor_parallel_ranks_are_neighbours(mesh: Mesh) -> None:
    assert mesh.stride("tp") == 1
    assert mesh.stride("pp") * mesh.pp == mesh.world
    product = mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp * mesh.pp
    assert mesh.world == product == mesh.pp * mesh.dp * mesh.cp * mesh.tp


@given(meshes, st.integers(1, 4))
def test_virtual_stages_do_not_multiply_the_world(mesh: Mesh, vpp: int) -> None:
    other = Mesh(**mesh.shape(), vpp=vpp)
    assert (other.world, other.num_stages) == (mesh.world, mesh.pp * vpp)


@given(meshes, st.integers(1, 400))
def test_check_world(mesh: Mesh, devices: int) -> None:
    if mesh.world == devices:
        mesh.check_world(devices)
    else:
        with pytest.raises(InputError, match=f"multiplies to {mesh.world}, not to {devices}"):
            mesh.check_world(devices)


@pytest.mark.parametrize("axis", [*Mesh.AXES, "vpp", "ep", "ulysses"])
@pytest.mark.parametrize("degree", [0, -2])
def test_degrees_are_positive(axis: str, degree: int) -> None:
    with pytest.raises(InputError, match=f"^{axis}={degree}: not positive"):
        Mesh(**{axis: degree})


def test_borrowed_axes_divide_what_they_borrow() -> None:
    with pytest.raises(InputError, match=r"^ulysses=2"):
        Mesh(cp=3, ulysses=2)
    with pytest.raises(InputError, match=r"^ep=4"):
        Mesh(dp_shard=2, cp=3, ep=4)
    assert Mesh(dp_shard=2, cp=2, ep=4).world == 4


def test_unknown_axis() -> None:
    with pytest.raises(KeyError):
        Mesh().stride("ep")
