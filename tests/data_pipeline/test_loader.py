import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loader import Loader
from data_pipeline.order import Order
from data_pipeline.packing import Rows

GLOBAL_BATCH, NUM_STEPS = 12, 9


class Squares:
    """A source whose rows tell their index."""

    def __len__(self) -> int:
        return 31

    def gather(self, indices: np.ndarray) -> Rows:
        return {"tokens": torch.from_numpy(indices[:, None] ** 2)}


def table(step: int, rows: Rows) -> torch.Tensor:
    """Columns: step, global sample position, token, threads of the process that made it."""
    column = torch.full_like(rows["index"], step)
    threads = torch.full_like(rows["index"], torch.get_num_threads())
    return torch.stack([column, rows["index"], rows["tokens"][:, 0], threads], dim=1)


def batches(
    rank: int = 0, size: int = 1, first_step: int = 0, num_workers: int = 0, global_batch: int = GLOBAL_BATCH
) -> list[torch.Tensor]:
    loader = Loader(
        Squares(),
        Order(31, seed=5),
        global_batch=global_batch,
        rank=rank,
        size=size,
        first_step=first_step,
        num_steps=NUM_STEPS,
        num_workers=num_workers,
        transform=table,
    )
    found = list(loader)
    assert len(found) == len(loader) == NUM_STEPS - first_step
    return found


def test_a_run_walks_the_positions_in_order() -> None:
    found = torch.cat(batches())
    positions = np.arange(GLOBAL_BATCH * NUM_STEPS)
    assert found[:, 0].tolist() == (positions // GLOBAL_BATCH).tolist()
    assert found[:, 1].tolist() == positions.tolist()
    assert found[:, 2].tolist() == (Order(31, seed=5)(positions) ** 2).tolist()
    assert sorted(found[:31, 2].tolist()) == [index**2 for index in range(31)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_ranks_together_see_what_one_process_sees(size: int) -> None:
    ranks = [batches(rank, size) for rank in range(size)]
    for whole, *parts in zip(batches(), *ranks, strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_a_resumed_run_goes_on_where_it_was() -> None:
    whole = batches()
    for first_step in range(NUM_STEPS + 1):
        for resumed, expected in zip(batches(first_step=first_step), whole[first_step:], strict=True):
            assert torch.equal(resumed, expected)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers: int) -> None:
    before = torch.get_rng_state()
    found = batches(rank=1, size=2, first_step=2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)
    for made, expected in zip(found, batches(rank=1, size=2, first_step=2), strict=True):
        assert torch.equal(made[:, :3], expected[:, :3])
        assert made[:, 3].unique().tolist() == [1]


def test_a_batch_that_does_not_divide_names_the_world_sizes() -> None:
    with pytest.raises(ValueError, match=r"12 sequences .* 5 .* world size of 1, 2, 3, 4, 6, 12,"):
        batches(size=5)
    with pytest.raises(ValueError, match="global batch is 0"):
        batches(global_batch=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        batches(num_workers=-1)


RUN_FOR_EVER = """
import numpy, os, torch
from data_pipeline.loader import Loader

class Ones:
    def __len__(self): return 1
    def gather(self, indices): return {"tokens": torch.ones(len(indices), 4)}

def worker(step, rows):
    return os.getpid()

for pid in Loader(Ones(), lambda positions: positions, global_batch=1, rank=0, size=1, first_step=0,
                  num_steps=10**9, num_workers=2, transform=worker):
    print(pid, flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_die_with_a_killed_parent() -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", RUN_FOR_EVER], cwd=root, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(4)}
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    while any(map(alive, workers)):  # the test's own time limit ends this if they stay
        time.sleep(0.1)


def test_workers_leave_signals_to_the_loop() -> None:
    """What asks every process of a run to stop reaches them too, perhaps twice; the batches still come."""
    loader = Loader(
        Squares(),
        Order(31, seed=5),
        global_batch=GLOBAL_BATCH,
        rank=0,
        size=1,
        first_step=0,
        num_steps=NUM_STEPS,
        num_workers=1,
        transform=table,
    )
    found = iter(loader)
    first = next(found)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert torch.equal(torch.cat([first, *found])[:, :3], torch.cat(batches())[:, :3])
    again = iter(loader)
    next(again)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(2.5)
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(60)
    assert worker.exitcode == 0


def test_workers_are_gone_once_their_batches_are_closed() -> None:
    """Whoever still holds on to them: at the end of the interpreter they would not hear that they should end."""
    loader = Loader(
        Squares(),
        Order(31, seed=5),
        global_batch=GLOBAL_BATCH,
        rank=0,
        size=1,
        first_step=0,
        num_steps=NUM_STEPS,
        num_workers=2,
        transform=table,
    )
    found = iter(loader)
    next(found)
    assert len(multiprocessing.active_children()) == 2
    found.close()
    assert multiprocessing.active_children() == []
    assert list(found) == []
