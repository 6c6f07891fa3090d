"""Which errors are the user's: those that a `raise` of our own code raises, and no others."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pretrain
from pretrain.refusal import EXIT_REFUSED, run_or_refuse

BODIES = {
    "raise ValueError('wrong')": True,
    "raise ValueError('wrong') from None": True,
    "with open(__import__('os').devnull):\n        raise ValueError('wrong')": True,
    "try:\n        raise ValueError('wrong')\n    finally:\n        print()": True,
    "try:\n        raise ValueError('wrong')\n    except ValueError:\n        raise": True,
    "try:\n        int('two')\n    except ValueError as error:\n        raise ValueError('wrong') from error": True,
    "int('two')": False,
    "list(zip([1], [], strict=True))": False,
    "a, b = [1]": False,
    "[].remove(3)": False,
    "try:\n        int('two')\n    finally:\n        print()": False,
    "import json; json.loads('{')": False,
}


def compiled(body: str, file: Path) -> Callable[[], None]:
    space: dict[str, Callable[[], None]] = {}
    exec(compile(f"def command():\n    {body}\n", str(file), "exec"), space)
    return space["command"]


@pytest.mark.parametrize(("body", "ours"), BODIES.items(), ids=str)
def test_only_what_our_code_raises_is_the_users(body: str, ours: bool, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(pretrain.__file__).parent
    with pytest.raises(SystemExit if ours else ValueError) as caught:
        run_or_refuse(compiled(body, root / "imagined.py"))
    if ours:
        assert caught.value.args == (EXIT_REFUSED,)
        assert capsys.readouterr().err == "penumbra: wrong\n"


@pytest.mark.parametrize("folder", [Path(sys.prefix), Path(__file__).parent])
def test_what_others_raise_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(ValueError, match="wrong"):
        run_or_refuse(compiled("raise ValueError('wrong')", folder / "imagined.py"))
