"""`python -m tritonopt`: the demo's command line."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tritonopt.device import INTERPRET

EXTRA = {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0, or 1 if a training differs from torch's.

    Raises:
        SystemExit: with code 2, if an argument is wrong or a package of the demo is missing.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    device = _device(parser, args.device)
    groups = {"rmsprop": ["RMSprop"], "rprop": ["Rprop"], "both": ["RMSprop", "Rprop"]}
    names = groups[args.optimizer]
    seconds = 6 + 0.02 * args.steps * len(names)
    slow = "minutes in Triton's interpreter" if INTERPRET else f"about {seconds:.0f} s on two cores"
    print(f"This takes {slow} of a CPU.", flush=True)
    try:
        if args.plot is not None:
            importlib.import_module("matplotlib.figure")
        demo = importlib.import_module("tritonopt.demo")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        parser.exit(
            2,
            f"The demo needs {EXTRA[missing]}, which is not installed:\n"
            f"    pip install {' '.join(EXTRA.values())}\n",
        )
    if args.plot is not None:
        try:
            args.plot.open("ab").close()
        except OSError as error:  # before the training, not after it
            parser.error(f"--plot: {error}")
    return demo.run(names, device, args.steps, args.seed, args.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tritonopt",
        description="Trains a small network on handwritten digits with tritonopt's optimizers and, "
        "from the same start, with torch's. Exit code 1 if a training differs from torch's.",
    )
    parser.add_argument(
        "--optimizer", type=str.lower, choices=["rmsprop", "rprop", "both"], default="both",
        help="RMSprop trains on mini-batches, Rprop on all digits at once (default: both)",
    )  # fmt: skip
    parser.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    parser.add_argument("--steps", type=_positive, default=100, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=_seed, default=0,
        help="of the network, the batches and the choice of test digits (default: 0)",
    )  # fmt: skip
    parser.add_argument("--plot", type=_png, metavar="FILE.png", help="draws the loss curves")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**32 - 1")
    return int(text)


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


def _device(parser: argparse.ArgumentParser, text: str | None) -> torch.device:
    """The device asked for, with its index; an error if nothing can be put there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if text is None:
        text = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        parser.error(f"--device: {text!r} is not a device")
    if device.type != "cpu":
        count = torch.accelerator.device_count() if accelerator is not None else 0
        same_type = accelerator is not None and device.type == accelerator.type
        if not same_type or (device.index or 0) >= count:
            found = f"{count} of type {accelerator.type}" if accelerator is not None else "none"
            parser.error(f"--device: {text} is not available (accelerators found: {found})")
    return torch.empty(0, device=device).device


if __name__ == "__main__":
    sys.exit(main())
