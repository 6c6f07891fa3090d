"""Sudoku (VMD Section 4.3, Appendix C.2) on small grids of our own, with one solution or with many.

Readings: clues stay in their places and are never masked, instead of a puzzle, a separator and a solution in one row
(which doubles the length for the same information). Modulation is shared by all blocks, pooling is a softmax over the
answer's cells, as in C.2; width and depth are scaled down with the grid. On 6 x 6 with many solutions z has 16
dimensions and is added to the embeddings instead: the network learns to read a grid off it in half the steps.

With many solutions times are drawn nearer to 1, where the latent has something to say, and its KL costs almost nothing
at first: raised from the start, it silences the latent before z tells the grid. All times count the same: weighted as
in the bound, rare times near 0 make up most of the loss's variance with the low power of 6 x 6, whose latent then never
came into use. On 4 x 4 z has a learned prior p(z | x_t) (E.3), so that what is visible costs no KL; the paper, which
tried one on its toys alone and found no gain, keeps N(0, I).
"""

from dataclasses import replace

from model.config import LatentConfig, ModelConfig, RecognitionConfig, ScheduleConfig, TransformerConfig
from model.size import matched_control

from ..config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import SudokuData
from . import Family


def sudoku4_few() -> Family:
    """4 x 4 Sudoku with so few clues that there are many solutions."""
    return _systems(SudokuData(size=4, family="few_clues"))


def sudoku4_unique() -> Family:
    """4 x 4 Sudoku with one solution."""
    return _systems(SudokuData(size=4, family="unique"))


def sudoku6_few() -> Family:
    """6 x 6 Sudoku with so few clues that there are many solutions."""
    return _systems(SudokuData(size=6, family="few_clues"))


def sudoku6_unique() -> Family:
    """6 x 6 Sudoku with one solution."""
    return _systems(SudokuData(size=6, family="unique"))


def _systems(data: SudokuData) -> Family:
    small, many = data.size == 4, data.family == "few_clues"
    backbone = TransformerConfig(
        dim=64 if small else 128, num_layers=4 if small else 6, num_heads=2 if small else 4, max_positions=data.length
    )
    mdm = ModelConfig(backbone=backbone, vocab_size=data.size + 3, mask_id=data.size)
    if many:
        schedule = ScheduleConfig(kind="polynomial", power=0.7 if small else 0.3)
        mdm = replace(mdm, schedule=schedule, loss_weight="uniform")
    latent = LatentConfig(dim=32, recognition=RecognitionConfig(num_layers=2 if small else 4, pool="gated"))
    shared = replace(backbone, modulation="shared")
    modulated = replace(shared, condition_dim=128)
    if not many:
        vmd = replace(mdm, backbone=modulated, latent=latent)
    elif small:
        vmd = replace(mdm, backbone=modulated, latent=replace(latent, prior="x_t", prior_layers=2))
    else:
        vmd = replace(mdm, backbone=shared, latent=replace(latent, dim=16, inject="embedding"))
    annealing = {"kl_anneal_steps": 2000}
    if many:
        annealing = {"kl_hold_steps": 700 if small else 2000, "kl_anneal_steps": 1000 if small else 1500}
    return {
        "mdm": _run(data, mdm),
        "vmd": _run(data, vmd, **annealing),
        "mdm_matched": _run(data, matched_control(vmd)),
    }


def _run(data: SudokuData, model: ModelConfig, **train: int) -> RunConfig:
    return RunConfig(
        name="sudoku",
        data=data,
        model=model,
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=100, beta2=0.99, weight_decay=0.0),
        train=TrainConfig(steps=6000, batch_tokens=512 * data.length, **train),  # type: ignore[arg-type]
        validation=ValidationConfig(every=500, num_sequences=512),
        checkpoint=CheckpointConfig(every=250, keep=1),
        log=LogConfig(every=25),
    )
