"""What a stranger does with exported folders: a program that has transformers and nothing of this project.

Usage: python -I use_exports.py JOBS.pt RESULTS.pt. Jobs by name: a folder, the inputs of `forward`, the arguments of
`sample`, and texts; each is optional but the folder.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch

PROJECT = {"pretrain", "data_pipeline", "model", "eval", "tools", "launchers"}


class Absent(importlib.abc.MetaPathFinder):
    """The project is not there, even where it is installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Refuses its packages."""
        if name.partition(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """One job's results."""
    from transformers import AutoModel, AutoTokenizer

    result: dict[str, Any] = {}
    if "forward" in job or "sample" in job:
        model = AutoModel.from_pretrained(job["folder"], trust_remote_code=True)
        assert not model.training
        result["dtype"] = str(model.dtype)
        with torch.inference_mode():
            result["logits"] = model(**job["forward"]).logits
        result["tokens"] = model.sample(**job["sample"])
        result["config"] = model.config.to_dict()
    if "texts" in job:
        trusted = {"trust_remote_code": True} if "sample" in job else {}
        tokenizer = AutoTokenizer.from_pretrained(job["folder"], **trusted)
        result["ids"] = [tokenizer(text).input_ids for text in job["texts"]]
        result["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in result["ids"]]
        result["special"] = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        if "tokens" in result:
            completions = result["tokens"][:, job["sample"]["input_ids"].shape[1] :]
            result["completions"] = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return result


def main(jobs: str, results: str) -> None:
    """All jobs."""
    sys.meta_path.insert(0, Absent())
    for name in PROJECT:
        try:
            importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} is here")
    todo = torch.load(jobs, weights_only=False)
    torch.save({name: do(job) for name, job in todo.items()}, results)
    assert not PROJECT & set(sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
