"""Template: every page is one of `templates/`, extends `base.html`, and is drawn here.

Whatever a page is given is escaped. Only files of this package and data that is encoded for a script go in
as they are (`Markup`). A page loads nothing: style and scripts stand in it.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

STYLE = "page.css"


def draw(name: str, **values: Any) -> str:
    """A page; raises jinja2's UndefinedError for a value that the template names and nobody gave."""
    page = environment().get_template(name)
    return page.render(style=read_part(STYLE), **values)


@cache
def environment() -> Environment:
    """Where the templates are found, and how they are read."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(read_file),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def read_file(name: str) -> str:
    """A file of the package's templates."""
    folder = resources.files("quantmatrix.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def read_part(name: str) -> Any:
    """A style or a script of the package's templates, which goes into a page as it is."""
    from markupsafe import Markup

    return Markup(read_file(name))
