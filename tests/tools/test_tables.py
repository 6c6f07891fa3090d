"""The tables of the papers: their numbers as printed, the runs they need, and the keys and figures they promise."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.reproduce as framework
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from model.size import num_parameters
from pretrain.checkpoint.load import Loaded
from pretrain.config import RunConfig
from pretrain.recipes import build
from pretrain.settings import dump_config, load_config
from pretrain.state import TrainState
from tools.reproduce import samples, sudoku, vadd_points, vmd_ablations, vmd_needle, vmd_pairs, vmd_quadruples
from tools.reproduce.table import Budget, Results
from tools.reproduce.training import Job, Runs

COLUMNS = [f"{data}.{inference}" for data in ("d1", "d2") for inference in ("b2_nfe4", "b2_nfe2", "b1_nfe4", "b1_nfe1")]

VMD_2_ACCURACY = {
    "mdm": "99.4 10.1 99.3 0.1 99.3 1.1 99.1 1.1",
    "vmd": "100 97.8 100 93.3 100 96.3 100.0 94.1",
}
VMD_2_KL = {
    "mdm": "0.007 2.298 0.010 9.422 0.018 7.656 0.015 7.493",
    "vmd": "0.012 0.045 0.029 0.099 0.017 0.053 0.475 0.093",
}
VMD_8_11_13_16_ACCURACY = {
    "mdm": "99.4 10.1 99.3 0.1 99.3 1.1 99.1 1.1",
    "vmd": "100 97.8 100 93.3 100 96.3 100 94.1",
    "vmd_redrawn": "100 98.5 100 92.8 100 96.5 100 93.6",
    "vmd_earlier_blocks": "100 97.7 100 94.7 100 96.1 100 93.9",
    "vmd_x_t": "100 97.6 100 94.7 100 96.9 100 92.6",
    "vmd_pretrained": "100 97.3 100 93.3 100 95.3 99.5 92.6",
    "vmd_frozen": "100 96.7 100 90.5 99.8 91.1 99.1 90.9",
}
VMD_7_10_12_15_KL = {
    "mdm": "0.007 2.298 0.010 9.422 0.018 7.656 0.015 7.493",
    "vmd": "0.012 0.045 0.029 0.099 0.017 0.053 0.475 0.093",
    "vmd_redrawn": "0.008 0.061 0.030 0.089 0.018 0.060 0.552 0.095",
    "vmd_earlier_blocks": "0.010 0.034 0.023 0.091 0.022 0.064 0.502 0.106",
    "vmd_x_t": "0.011 0.036 0.004 0.056 0.031 0.063 0.015 0.108",
    "vmd_pretrained": "0.005 0.045 0.027 0.103 0.017 0.064 0.123 0.107",
    "vmd_frozen": "0.002 0.057 0.012 0.111 0.029 0.125 0.034 0.120",
}
VMD_9_14 = {
    "vmd": "67.7 76.4 80.9 96.9 99.0 99.7",
    "vmd_redrawn": "66.6 74.5 84.4 96.9 99.4 99.4",
    "vmd_refreshed": "66.8 74.4 79.6 96.9 99.3 99.3",
}
SUDOKU_COLUMNS = [f"sudoku9{order}.nfe_{calls}" for order in ("", "_margin") for calls in (5, 10, 20)]
VMD_1 = {  # MDM KL, MDM accuracy, VMD KL, VMD accuracy
    "deterministic.one_step": "2.3 10.18 0.082 93.2",
    "deterministic.token_by_token": "0.001 99.97 0.012 100",
    "non_uniform.one_step": "2.2 11.63 0.081 93.04",
    "non_uniform.token_by_token": "0.023 99.96 0.009 99.98",
}
VMD_6 = {  # L = 20, 30, 40
    ("mdm", "accuracy"): "0 0 0",
    ("mdm", "conditional_accuracy"): "100 100 89",
    ("mdm", "kl"): "25.3 25.6 25.4",
    ("vmd", "accuracy"): "90.6 87.9 4.82",
    ("vmd", "conditional_accuracy"): "100 100 100",
    ("vmd", "kl"): "0.282 0.361 22.8",
}
VADD_1 = {  # JS-1, JS-5, NLL of checkerboard, swissroll, circles
    "mdlm": "1.395 0.211 8.503 2.619 0.287 7.111 2.273 0.263 7.462",
    "vadd": "0.062 0.048 8.058 0.086 0.025 6.132 0.161 0.042 6.716",
}


def spread_out(rows: dict[str, str], columns: list[str], metric: str, unit: float = 1.0) -> Results:
    """A printed table by dotted key."""
    return {
        f"{column}.{system}.{metric}": unit * float(cell)
        for system, cells in rows.items()
        for column, cell in zip(columns, cells.split(), strict=True)
    }


def printed(name: str) -> Results:
    """All that the paper prints of a table."""
    if name == "vmd-table-1":
        columns = [("mdm", "kl", 1.0), ("mdm", "accuracy", 0.01), ("vmd", "kl", 1.0), ("vmd", "accuracy", 0.01)]
        return {
            f"{setting}.{system}.{metric}": unit * float(cell)
            for setting, cells in VMD_1.items()
            for (system, metric, unit), cell in zip(columns, cells.split(), strict=True)
        }
    if name == "vmd-table-2":
        return spread_out(VMD_2_KL, COLUMNS, "kl") | spread_out(VMD_2_ACCURACY, COLUMNS, "accuracy", 0.01)
    if name == "vmd-ablations":
        synthetic = spread_out(VMD_7_10_12_15_KL, COLUMNS, "kl")
        synthetic |= spread_out(VMD_8_11_13_16_ACCURACY, COLUMNS, "accuracy", 0.01)
        return synthetic | spread_out(VMD_9_14, SUDOKU_COLUMNS, "valid", 0.01)
    if name == "vmd-needle":
        return {
            f"needle_{length}.one_step.{system}.{metric}": float(cell) * (1 if metric == "kl" else 0.01)
            for (system, metric), cells in VMD_6.items()
            for length, cell in zip((20, 30, 40), cells.split(), strict=True)
        }
    if name == "vadd-table-1":
        metrics = [(toy, metric) for toy in vadd_points.TOYS for metric in ("js_1", "js_5", "delbo")]
        return {
            f"{toy}.{system}.{metric}": float(cell)
            for system, cells in VADD_1.items()
            for (toy, metric), cell in zip(metrics, cells.split(), strict=True)
        }
    return {}


NAMES = (
    "vadd-table-1",
    "vmd-table-1",
    "vmd-figure-2",
    "vmd-table-2",
    "vmd-needle",
    "vmd-sudoku-small",
    "vmd-ablations",
)
PROMISED = {
    "vadd-table-1": (
        "checkerboard.mdlm.js_1",
        "checkerboard.vadd.js_1",
        "checkerboard.vadd.js_5",
        "checkerboard.vadd.delbo",
        "checkerboard.vadd.nelbo_steps_1",
        "circles.data.js_1",
    ),
    "vmd-table-1": (
        "deterministic.one_step.mdm.accuracy",
        "deterministic.one_step.mdm.kl",
        "non_uniform.one_step.vmd.accuracy",
        "deterministic.token_by_token.vmd.accuracy",
        "deterministic.one_step.mdm_argmax.kl",
        "deterministic.one_step.vmd_categorical.kl",
    ),
    "vmd-figure-2": ("p_030.one_step.mdm.kl", "p_100.one_step.vmd.kl"),
    "vmd-table-2": ("d1.b1_nfe1.vmd.accuracy", "d2.b2_nfe2.mdm.kl"),
    "vmd-needle": ("needle_20.one_step.vmd.accuracy", "needle_20.one_step.mdm.conditional_accuracy"),
    "vmd-sudoku-small": ("sudoku4.nfe_2.vmd.valid", "sudoku4_unique.nfe_10.mdm_matched.valid"),
    "vmd-ablations": (
        "d1.b1_nfe1.mdm.accuracy",
        "d1.b1_nfe1.vmd.accuracy",
        "d1.b1_nfe4.vmd_redrawn.accuracy",
        "d1.b1_nfe1.vmd_x_t.kl",
        "d1.b1_nfe1.vmd_pretrained.accuracy",
        "d1.b1_nfe1.vmd_frozen.accuracy",
        "d1.b2_nfe2.vmd_earlier_blocks.kl",
        "sudoku4.nfe_5.mdm.valid",
        "sudoku4.nfe_5.vmd_redrawn.valid",
        "sudoku4.nfe_5.vmd_refreshed.valid",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_the_papers_is_as_printed(name: str) -> None:
    assert dict(framework.find(name).paper) == pytest.approx(printed(name), rel=1e-12)


def config_of(name: str, job: Job) -> RunConfig:
    """The run of a job, in a folder that need not exist."""
    return build(job.recipe, [*job.overrides, f"folder=nowhere/{name}"])


@pytest.mark.parametrize("budget", ["quick", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_a_table_is_valid_and_recognised_by_its_config_file(
    name: str, budget: Budget, tmp_path: Path
) -> None:
    jobs = framework.find(name).jobs(budget)
    assert jobs
    for job_name, job in jobs.items():
        assert job.after is None or job.after in jobs
        config = config_of(job_name, job)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.yaml") == config


@dataclass
class Untrained(Runs):
    """Models as they start, in place of trained ones."""

    jobs: dict[str, Job] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.jobs

    def __getitem__(self, name: str) -> Loaded:
        if name not in self.loaded:
            model = untrained(config_of(name, self.jobs[name]), seed=0)
            self.loaded[name] = Loaded(model.eval(), None, TrainState(identity={}), Path())
        return self.loaded[name]


def untrained(config: RunConfig, seed: int) -> MaskedDiffusion:
    """The model of a run before its first step."""
    model = MaskedDiffusion(config.model)
    initialise(model, seed, num_layers=config.model.backbone.num_layers)
    return model


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples, and no large grids, which take seconds to make."""
    sizes = {"SAMPLES": 80, "SET": 40, "PUZZLES": 8, "BOUND_ROWS": 2}
    for module in (sudoku, vadd_points, vmd_ablations, vmd_needle, vmd_pairs, vmd_quadruples):
        for name in sizes.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, sizes[name])
    grids = {name: setting for name, setting in sudoku.SETTINGS.items() if name.startswith("sudoku4")}
    monkeypatch.setattr(sudoku, "SETTINGS", grids)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_figures_that_a_table_promises(name: str, tmp_path: Path) -> None:
    table = framework.find(name)
    runs = Untrained(Path(), jobs=table.jobs("quick"))
    results = table.measure(runs, 0)
    missing = [key for key in PROMISED[name] if key not in results]
    assert not missing, f"among {list(results)}"
    assert all(isinstance(value, float) for value in results.values())
    table.draw(runs, results, tmp_path)
    figures = [path.name for path in tmp_path.iterdir()]
    assert figures
    assert all(re.fullmatch(rf"{name}.*\.png", figure) for figure in figures)


def pairs_of_ablations(start_from: str) -> Iterator[tuple[RunConfig, RunConfig]]:
    """Every MDM of the ablations and the run that starts from it."""
    jobs = framework.find("vmd-ablations").jobs("full")
    for name, job in jobs.items():
        if name.endswith(start_from):
            assert job.after is not None
            yield config_of(job.after, jobs[job.after]), config_of(name, job)


def test_with_one_solution_vmd_starts_as_its_mdm() -> None:
    jobs = framework.find("vmd-sudoku-small").jobs("full")
    for setting in ("sudoku4_unique", "sudoku6_unique"):
        job = jobs[f"{setting}.vmd"]
        assert job.after == f"{setting}.mdm"
        mdm, vmd = untrained(config_of(job.after, jobs[job.after]), seed=1), untrained(config_of(setting, job), seed=2)
        _, unknown = vmd.load_state_dict(mdm.state_dict(), strict=False)
        assert not unknown
        tokens = torch.tensor([[1, vmd.config.mask_id] * (vmd.config.backbone.max_positions // 2)])  # type: ignore[union-attr]
        z = torch.randn(1, 1, vmd.config.latent.dim)  # type: ignore[union-attr]
        torch.testing.assert_close(vmd.denoise(tokens, latent=z), mdm.denoise(tokens))


def test_with_many_solutions_all_systems_train_equally_long() -> None:
    for budget in ("quick", "full"):
        jobs = framework.find("vmd-sudoku-small").jobs(budget)  # type: ignore[arg-type]
        for setting in {name.split(".")[0] for name in jobs} - {"sudoku4_unique", "sudoku6_unique"}:
            configs = [config_of(system, jobs[f"{setting}.{system}"]) for system in sudoku.SYSTEMS]
            assert len({(c.train.steps, c.train.batch_tokens, c.model.schedule) for c in configs}) == 1


@pytest.mark.parametrize("name", ["vmd_pretrained", "vmd_frozen"])
def test_a_decoder_trained_before_starts_as_its_mdm_whatever_z_is(name: str) -> None:
    pairs = list(pairs_of_ablations(name))
    assert len(pairs) == 4
    for parent, child in pairs:
        mdm, vmd = untrained(parent, seed=1), untrained(child, seed=2)
        _, unknown = vmd.load_state_dict(mdm.state_dict(), strict=False)
        assert not unknown
        tokens = torch.tensor([[1, 10, 10, 4], [10, 10, 10, 10]])
        blocks = tokens.shape[1] // parent.model.block_size if parent.model.block_size else 1
        z = torch.randn(2, blocks, vmd.latent.dim, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
        torch.testing.assert_close(vmd.denoise(tokens, latent=z), mdm.denoise(tokens))


def test_frozen_is_what_came_from_the_mdm_and_nothing_else() -> None:
    for parent, child in pairs_of_ablations("vmd_frozen"):
        (pattern,) = child.train.freeze
        names = [name for name, _ in untrained(child, seed=0).named_parameters()]
        loaded = {name for name, _ in untrained(parent, seed=0).named_parameters()}
        assert {name for name in names if re.fullmatch(pattern, name)} == loaded
        assert any("modulation" in name for name in names if name not in loaded)


def test_quick_ablations_are_of_d1_alone_and_change_one_thing_each() -> None:
    table = framework.find("vmd-ablations")
    quick, full = table.jobs("quick"), table.jobs("full")
    assert {name.split(".")[0] for name in quick} == {"d1", "sudoku4"}
    assert {name.split(".")[0] for name in full} == {"d1", "d2", "sudoku4"}
    for name, job in quick.items():
        prefix, system = name.rsplit(".", 1)
        if system == "mdm_matched":
            continue
        plain = quick[f"{prefix}.{'mdm' if system == 'mdm' else 'vmd'}"]
        assert job.recipe == plain.recipe
        assert job.overrides[: len(plain.overrides)] == plain.overrides
        model = config_of(name, job).model
        assert model.block_size == (2 if ".b2." in name else 0)
        prior = "normal" if model.latent is None else model.latent.prior
        assert prior == (system.removeprefix("vmd_") if system in ("vmd_x_t", "vmd_earlier_blocks") else "normal")


@pytest.mark.usefixtures("small")
def test_latents_of_the_ablations_come_from_where_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}

    def noting(
        model: MaskedDiffusion, state: SamplerState, policies: Policies, steps: int, **named: Any
    ) -> SamplerState:
        prior = "none" if model.config.latent is None else model.config.latent.prior
        seen.setdefault(prior, set()).add(policies.latent)
        return sample(model, state, policies, steps, **named)

    monkeypatch.setattr(samples, "sample", noting)
    table = framework.find("vmd-ablations")
    table.measure(Untrained(Path(), jobs=table.jobs("quick")), 0)
    assert seen == {
        "none": {"kept"},
        "normal": {"kept", "redrawn", "refreshed"},
        "earlier_blocks": {"kept"},
        "x_t": {"redrawn"},
    }


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_a_matched_control_is_at_least_as_large_as_the_model_with_its_latent(budget: Budget) -> None:
    found = 0
    for table in framework.reproductions().values():
        jobs = table.jobs(budget)
        for name, job in jobs.items():
            setting, _, system = name.rpartition(".")
            if system.endswith("_matched"):
                latent = jobs[f"{setting}.{'vadd' if system.startswith('mdlm') else 'vmd'}"]
                control, model = (build(each.recipe, each.overrides).model for each in (job, latent))
                assert 1.0 <= num_parameters(control) / num_parameters(model) < 1.3, name
                found += 1
    assert found >= 15
