"""Commands that turn records into figures and tables."""

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import app
from spd.cli.options import RUNS, MLflow, Records, Reproduction, open_session


@app.command()
def report(
    context: typer.Context,
    records_: Annotated[list[Path], typer.Argument(help="Record files, or folders of them.", metavar="RECORDS...")],
    out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path("paper_figures"),
    page: Annotated[
        Path | None, typer.Option(help="Text file with places marked for tables, as <!-- table NAME --> <!-- end -->.")
    ] = None,
    records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Tables and figures from records; the tables are also shown on stderr."""
    from spd.report import print_tables
    from spd.report import report as draw

    with open_session(context) as session:
        result = draw(records_, out, page)
        print_tables(records_)
        session.publish(result, artifacts=[Path(file) for file in result["files"]])
