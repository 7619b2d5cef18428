"""Figures look alike everywhere: they are drawn with matplotlib's defaults, whatever the user has set for their own."""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


def own_style(draw: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorate a function that draws: no matplotlibrc, style or backend of the user changes or ends what it does."""

    @functools.wraps(draw)
    def drawn(*args: Given.args, **options: Given.kwargs) -> Result:
        # a backend that does not exist fails at the import, and so does a matplotlibrc that is not text
        theirs = {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
        os.environ["MATPLOTLIBRC"] = os.devnull
        try:
            import matplotlib
        finally:
            del os.environ["MATPLOTLIBRC"]
            os.environ.update({name: value for name, value in theirs.items() if value is not None})
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return draw(*args, **options)

    return drawn
