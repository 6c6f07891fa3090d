"""What torchrun restarts does not meet what it was before."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from pretrain.parallel.mesh import _meeting_place
from pretrain.train import _end_torchrun
from tools.chaos.processes import ROOT

TORCHRUN = {
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_MAX_RESTARTS": "2",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "GROUP_WORLD_SIZE": "1",
}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store that torchrun keeps."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (place | TORCHRUN).items():
        monkeypatch.setenv(name, value)
    return store


def test_addresses_of_lost_processes_are_not_found_after_a_restart(agent: dist.TCPStore) -> None:
    first, rank, size = _meeting_place(TORCHRUN)
    assert (rank, size) == (0, 1)
    first.set("address", "of a process that is gone")
    again, *_ = _meeting_place(TORCHRUN)
    assert again.check(["address"])
    restarted, *_ = _meeting_place(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not restarted.check(["address"])


def test_on_several_machines_torchrun_must_be_told(agent: dist.TCPStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Their restarts are counted differently, so names made of the counts would part them."""
    two = TORCHRUN | {"GROUP_WORLD_SIZE": "2"}
    first, *_ = _meeting_place(two)
    first.set("address", "here")
    other, *_ = _meeting_place(two | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert other.check(["address"])
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
    _meeting_place(two | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    _meeting_place(two | {"TORCHELASTIC_MAX_RESTARTS": "0"})
    assert capsys.readouterr().err == ""


def test_torchrun_is_ended_only_where_it_would_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr("os.kill", lambda process, number: told.append(number))
    _end_torchrun({})
    _end_torchrun(TORCHRUN | {"LOCAL_RANK": "1"})
    _end_torchrun(TORCHRUN | {"LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert not told
    _end_torchrun(TORCHRUN | {"LOCAL_RANK": "0"})
    assert len(told) == 1


@pytest.mark.parametrize(("several", "code"), [(True, 75), (False, -6)])
def test_what_breaks_while_the_interpreter_is_taken_down_does_not_change_how_a_run_of_several_ended(
    monkeypatch: pytest.MonkeyPatch, several: bool, code: int
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if several:
        monkeypatch.setenv("WORLD_SIZE", "2")
    program = "import atexit, os; from pretrain.train import _leave; atexit.register(os.abort); print('so'); _leave(75)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (code, "so\n")
