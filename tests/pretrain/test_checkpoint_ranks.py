"""Two processes save and verify together: each its own share, with one outcome for both.

Run as a script under torchrun it is what the processes do; it writes FOLDER/RANK.json.
"""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from model.batch import Batch
from model.config import ModelConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.noise import NoiseKey
from pretrain.checkpoint import save, verify
from pretrain.checkpoint import saver as saver_module
from pretrain.checkpoint.load import load_for_evaluation, newest_good
from pretrain.checkpoint.manifest import read_manifest, sealed_in, sha256_of
from pretrain.checkpoint.save import checkpoint_name
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Axis, process_mesh
from pretrain.state import TrainState

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(backbone=TransformerConfig(dim=16, num_layers=1, num_heads=2), vocab_size=33, mask_id=32)
NUM_SAVES = 3
Patch = pytest.MonkeyPatch


def train_step(engine: FsdpEngine, step: int) -> None:
    tokens_BL = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        positions_BL=torch.arange(8).expand_as(tokens_BL),
        index_B=torch.arange(4) + 4 * engine.mesh.data.rank,
    )
    corruption = corrupt(batch, NoiseKey(0, step, batch.index_B), MODEL)
    engine.forward_backward(Micro(batch, corruption, StepSchedule()), scale=1 / 64, last=True)
    engine.reduce_and_clip(1.0)
    engine.step(lr=1e-2, take=torch.ones(()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards(engine: FsdpEngine) -> dict[str, torch.Tensor]:
    return {f"{g}.{n}": local(t).clone() for g, named in engine.state_dict().items() for n, t in named.items()}


def read_back(checkpoint: Path, engine: FsdpEngine) -> dict[str, torch.Tensor]:
    empty = {
        group: {name: torch.full_like(tensor, torch.nan) for name, tensor in named.items()}
        for group, named in engine.state_dict().items()
    }
    dcp.load(empty, checkpoint_id=checkpoint / "tensors")
    return {f"{group}.{name}": local(t) for group, named in empty.items() for name, t in named.items()}


class Run:
    """What one process does, case by case, on one engine and one saver."""

    def __init__(self, folder: Path, engine: FsdpEngine) -> None:
        self.folder, self.engine, self.world = folder, engine, engine.mesh.world
        self.sealed: list[str] = []
        self.now, self.step = 0.0, 0

    def saver(self, name: str, **settings: Any) -> Saver:
        self.sealed.clear()
        return Saver(
            self.folder / name,
            CheckpointConfig(**settings),
            MODEL,
            self.engine.mesh,
            save_tokenizer=None,
            on_sealed=lambda path, state: self.sealed.append(path.name),
            clock=lambda: self.now,
        )

    def train(self) -> None:
        train_step(self.engine, self.step)
        self.step += 1

    def training_goes_on(self, patch: Patch) -> dict[str, Any]:
        """Steps with collectives of their own, while rank 0 keeps the save from beginning."""
        released, start = threading.Event(), save._start
        hashed: list[str] = []
        patch.setattr(save, "_start", lambda partial: (released.wait(60), start(partial)))
        patch.setattr(save, "sha256_of", lambda path: (hashed.append(path.name), sha256_of(path))[1])
        equal, moved = [], []
        with self.saver("beside", keep=9) as saver:
            for _ in range(NUM_SAVES):
                self.train()
                released.clear()
                step, expected = self.step, shards(self.engine)
                saver.save(self.engine.state_dict(), TrainState(step=step))
                for _ in range(5):
                    self.train()
                    saver.poll()
                moved.append(all(not torch.equal(t, expected[n]) for n, t in shards(self.engine).items() if t.numel()))
                assert saver.flight is not None
                released.set()
                self.train()
                saver.finish()
                found = read_back(self.folder / "beside" / checkpoint_name(step), self.engine)
                equal.append(all(torch.equal(found[name], tensor) for name, tensor in expected.items()))
        return {"equal": equal, "moved": moved, "sealed": list(self.sealed), "hashed": hashed}

    def one_disk_is_full(self, patch: Patch) -> dict[str, Any]:
        """Only rank 1's, and only for the second save; the third succeeds."""
        create_stream = FileSystem.create_stream

        @contextmanager
        def full(files: FileSystem, path: Path, mode: str) -> Iterator[Any]:
            if self.world.rank == 1 and checkpoint_name(2) in str(path) and mode == "wb":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with create_stream(files, path, mode) as stream:
                yield stream

        patch.setattr(FileSystem, "create_stream", full)
        with self.saver("full", keep=1) as saver:
            lost, left = [], []
            for step in (1, 2, 3):
                saver.save(self.engine.state_dict(), TrainState(step=step))
                self.train()
                saver.wait()
                lost.append(str(saver.lost))
                left.append(sorted(path.name for path in (self.folder / "full").iterdir()))
                self.world.barrier()
        return {"lost": lost, "left": left, "sealed": list(self.sealed)}

    def one_rank_fails(self, patch: Patch) -> dict[str, Any]:
        def failing(*arguments: Any) -> Any:
            if self.world.rank == 1:
                raise LookupError("only here")
            return seals(*arguments)

        seals = save._seals
        patch.setattr(save, "_seals", failing)
        heard = ""
        with self.saver("failing") as saver:
            saver.save(self.engine.state_dict(), TrainState(step=1))
            try:
                saver.finish()
            except RuntimeError as error:
                heard = str(error)
        return {"heard": heard}

    def the_first_rank_decides(self, patch: Patch) -> dict[str, Any]:
        """Whether an ephemeral checkpoint is due by rank 0's clock, by rank 1's, and by both."""
        due = []
        with self.saver("ephemeral", ephemeral_minutes=1) as saver:
            for ranks in ((1,), (0,), (0, 1), ()):
                self.now = 60.0 if self.world.rank in ranks else 0.0
                due.append(saver.ephemeral_due())
        return {"due": due}

    def folders_are_not_one(self, patch: Patch) -> dict[str, Any]:
        """Each rank has a disk of its own; then one that is told apart too late, when the save has begun."""
        own = self.folder / f"disk-{self.world.rank}"
        own.mkdir()
        patch.chdir(own)
        shared, self.folder = self.folder, Path()
        heard = []
        try:
            self.saver("run")
        except ValueError as error:
            heard.append(str(error))
        patch.setattr(saver_module, "_strangers", lambda folder, world: [])
        with self.saver("run") as saver:
            saver.save(self.engine.state_dict(), TrainState(step=1))
            saver.wait()
            heard.append(str(saver.lost))
            sealed = [path.name for path in sealed_in(Path("run"))]
        self.folder = shared
        return {"heard": heard, "sealed": sealed, "left": [path.name for path in Path("run").glob(".rank*")]}

    def verification_is_divided(self, patch: Patch) -> dict[str, Any]:
        """Files checked by this rank; then what both take for good after one file was damaged, and another."""
        checked: list[str] = []
        patch.setattr(verify, "sha256_of", lambda path: (checked.append(path.name), sha256_of(path))[1])
        folder = self.folder / "beside"
        found = [str(newest_good(folder, self.world))]
        newest = Path(found[0])
        for name in ("tensors/__0_0.distcp", "tensors/__1_0.distcp", "state.json"):
            self.world.barrier()
            if self.world.rank == 0:
                whole = (newest / name).read_bytes()
                (newest / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            self.world.barrier()
            found.append(str(newest_good(folder, self.world)))
            self.world.barrier()
            if self.world.rank == 0:
                (newest / name).write_bytes(whole)
        self.world.barrier()
        return {"found": [Path(path).name for path in found], "checked": checked}


def main(folder: Path) -> None:
    """All cases, in one process group."""
    with process_mesh() as mesh:
        engine = FsdpEngine(MODEL, OptimConfig(), TrainConfig(), ParallelConfig(), mesh, seed=0)
        run = Run(folder, engine)
        results = {}
        cases: list[Callable[[Patch], dict[str, Any]]] = [
            run.training_goes_on,
            run.one_disk_is_full,
            run.one_rank_fails,
            run.the_first_rank_decides,
            run.folders_are_not_one,
            run.verification_is_divided,
        ]
        for case in cases:
            with Patch.context() as patch:
                results[case.__name__] = case(patch)
            dist.barrier()
        (folder / f"{mesh.world.rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_save_and_verify_together(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        str(tmp_path),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    names = [checkpoint_name(step) for step in (1, 8, 15)]
    for rank, case in enumerate(r["training_goes_on"] for r in ranks):
        assert case["equal"] == case["moved"] == [True] * NUM_SAVES
        assert case["sealed"] == names
        own = {f"__{rank}_0.distcp"}
        assert set(case["hashed"]) == (own | {".metadata", "model.json", "state.json"} if rank == 0 else own)
        assert case["hashed"].count(f"__{rank}_0.distcp") == NUM_SAVES
    assert read_manifest(tmp_path / "beside" / names[-1]).world_size == 2
    assert load_for_evaluation(tmp_path / "beside" / names[-1]).state.step == 15

    for case in (r["one_disk_is_full"] for r in ranks):
        reason = f"the checkpoint of step 2 can not be written to {tmp_path}/full ([Errno 28] No space left on device)"
        assert case["lost"] == ["None", reason, "None"]
        assert case["left"] == [[checkpoint_name(1)], [checkpoint_name(1)], [checkpoint_name(3)]]
        assert case["sealed"] == [checkpoint_name(1), checkpoint_name(3)]
    assert result.stderr.count("the checkpoint of step 2 can not be written") == 1
    for case in (r["one_rank_fails"] for r in ranks):
        assert case["heard"] == "rank 1: LookupError: only here"
    for case in (r["the_first_rank_decides"] for r in ranks):
        assert case["due"] == [False, True, True, False]

    for case in (r["folders_are_not_one"] for r in ranks):
        refused, late = case["heard"]
        assert refused.startswith("run is another folder for rank 1 than for rank 0: choose one with folder=... that")
        assert "rank 0 does not see what another rank wrote: is the folder shared?" in late
        assert case["sealed"] == case["left"] == []

    for case in (r["verification_is_divided"] for r in ranks):
        assert case["found"] == [names[-1], names[-2], names[-2], names[-2]]
    first, second = (set(r["verification_is_divided"]["checked"]) for r in ranks)
    assert first.isdisjoint(second)
    assert first | second == {"__0_0.distcp", "__1_0.distcp", ".metadata", "model.json", "state.json"}
    assert len({"__0_0.distcp", "__1_0.distcp"} & first) == 1


def test_shares_are_disjoint_complete_and_alike_in_size(tmp_path: Path) -> None:
    files = {f"f{n}": verify.FileSeal(size, "") for n, size in enumerate((5, 900, 7, 890, 880, 1, 910))}
    manifest = verify.Manifest(1, 0, files, {}, 1)
    for size in (1, 2, 3, 9):
        shares = [verify.share_of(manifest, Axis(rank, size)) for rank in range(size)]
        assert sorted(name for share in shares for name, _ in share) == sorted(files)
    sums = [sum(seal.size for _, seal in verify.share_of(manifest, Axis(rank, 2))) for rank in range(2)]
    assert max(sums) < 1.1 * min(sums)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
