"""How processes are divided along the axes, and what is refused."""

import pytest

from pretrain.config import ParallelConfig
from pretrain.parallel.mesh import mesh_shape, process_mesh


def test_the_shard_axis_takes_what_the_others_leave() -> None:
    assert mesh_shape(ParallelConfig(), 6) == (1, 6, 1, 1)
    assert mesh_shape(ParallelConfig(replicate=2, context=2, tensor=4), 64) == (2, 4, 2, 4)


def test_processes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 processes do not divide .* use a multiple of 4 processes"):
        mesh_shape(ParallelConfig(tensor=4), 6)
    with (
        pytest.raises(ValueError, match=r"1 processes do not divide .*parallel\.tensor=2"),
        process_mesh(ParallelConfig(tensor=2), environ={}),
    ):
        pass


@pytest.mark.parametrize("name", ["replicate", "tensor", "context"])
def test_empty_axes_are_refused(name: str) -> None:
    assert list(ParallelConfig(**{name: 0}).problems()) == [f"parallel.{name}=0 must be at least 1"]
