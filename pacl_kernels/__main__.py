"""`python -m pacl_kernels`: print the backends that can run here, or with `plan` memory and time of a step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__, available_backends, plan
from .checks import FORMS, LOSSES
from .costs import ITEMSIZE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pacl_kernels", description="Print the backends that can run here, and what the others lack."
    )
    commands = parser.add_subparsers(dest="command", metavar="plan")
    about = "Print memory and time of a step of the loss, and the largest batch that fits."
    command = commands.add_parser("plan", help=about, description=about)
    add = command.add_argument
    add("--batch", type=int, required=True, help="Images of a process.")
    add("--patches", type=int, default=196, help="Patches of an image (default: %(default)s).")
    add("--dim", type=int, default=512, help="Dimension of the embeddings (default: %(default)s).")
    add("--texts", type=int, help="Texts of a process (default: as many as images).")
    add("--form", choices=FORMS, default="dot", help="Form of φ (default: %(default)s).")
    add("--dtype", choices=tuple(ITEMSIZE), default="bfloat16", help="Dtype of the embeddings (default: %(default)s).")
    add("--loss", choices=LOSSES, default="infonce", help="Loss over φ (default: %(default)s).")
    add("--device", help="Machine: cpu or cuda for this one, a name such as H100, or CPU cores such as 8x115.")
    add("--world-size", type=int, default=1, help="Processes that share the batch (default: %(default)s).")
    add("--frozen-texts", action="store_true", help="Compute no gradient of the texts.")
    add("--masked", action="store_true", help="Take a patch mask into account.")
    add("--backend", default="auto", help="Backend of the loss (default: %(default)s).")
    add("--threads", type=int, help="Cores of a CPU to use.")
    add("--memory", type=float, metavar="GIB", help="Memory that the step may take, in GiB.")
    options = vars(parser.parse_args(argv))
    if options.pop("command") is None:
        _print_backends()
        return
    if options["memory"] is not None:
        options["memory"] = int(options["memory"] * 2**30)
    try:
        print(plan(**options))
    except ValueError as error:
        command.error(str(error))


def _print_backends() -> None:
    print(f"pacl_kernels {__version__}")
    for name, reason in available_backends().items():
        print(f"  {name:<10} {'available' if reason is None else reason}")


if __name__ == "__main__":
    main()
