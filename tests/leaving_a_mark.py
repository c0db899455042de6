"""A function that no job of Belfry's names: the file that MARK names shows that it ran."""

import os
from pathlib import Path


def leave(*_: object) -> None:
    Path(os.environ["MARK"]).touch()
