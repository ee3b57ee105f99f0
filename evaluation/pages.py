"""Self-contained HTML pages: jinja2 over this package's templates. What stands on a page is its caller's."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figure = tuple[str, str, str]  # title, how to read it, SVG text
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head (empty cells: none is shown), rows


def page_environment() -> Any:
    """jinja2 with this package's templates: everything escaped, nothing undefined."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(
    template: str,
    title: str,
    figures: Sequence[Figure],
    tables: Sequence[Table] = (),
    *,
    claims: Sequence[str] = (),
    **content: Any,
) -> str:
    """A page from a template that extends `templates/page.html`: claims, figures, tables, what the template adds."""
    return str(
        page_environment()
        .get_template(template)
        .render(
            title=title,
            figures=[(name, reading, base64.b64encode(svg.encode()).decode()) for name, reading, svg in figures],
            tables=tables,
            claims=claims,
            **content,
        )
    )
