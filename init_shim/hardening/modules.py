"""Kernel modules of the bundle, loaded in the order that the build wrote down."""

import errno
import os

import _guestsys

from microguest.init_shim.failure import call

__all__ = ["FOLDER", "load_modules"]

FOLDER = "/microguest/modules"


def load_modules() -> None:
    """finit_module(2) for each line of FOLDER/order; loaded or built in already is fine.

    A bundle whose kernel has everything built in has no such file.
    """
    try:
        with open(f"{FOLDER}/order", encoding="ascii") as order:
            names = order.read().split()
    except FileNotFoundError:
        return
    for name in names:
        load(f"{FOLDER}/{name}")


def load(path: str) -> None:
    with call("open", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with call("finit_module", path, hint="is the module built for this kernel?"):
            try:
                _guestsys.finit_module(fd)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
    finally:
        os.close(fd)
