"""Run an experiment and leave its figure and tables in a folder."""

from __future__ import annotations

from pathlib import Path

from alignment.errors import UserError
from alignment.files import write_json, write_text
from alignment.games import figure, lab, report
from alignment.locks import make_folder


def run_and_write(claim: str, experiment: lab.Experiment, folder: Path) -> tuple[str, bool]:
    """Returns the text of table.md, and whether no verdict fails. Files of the same names are replaced.

    Raises:
        UserError: the folder cannot be made, or an objective cannot be played in a game.
    """
    make_folder(folder)
    try:
        panels = lab.run(experiment)
    except ValueError as error:
        raise UserError(str(error)) from None
    checks = report.verdicts(experiment, panels)
    text = report.describe(claim, experiment, panels, checks)
    write_json(folder / "table.json", report.as_json(claim, experiment, panels, checks))
    write_text(folder / "table.md", text)
    figure.write(panels, folder / "figure")
    return text, all(holds is not False for holds, _ in checks)
