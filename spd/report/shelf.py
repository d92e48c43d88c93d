"""Figures, tables and claims of a folder of records by their names, for notebooks."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from spd.errors import SPDError
from spd.records import load_records
from spd.report.ablation import ablation_sheets
from spd.report.accuracy import accuracy_sheets
from spd.report.calibration import calibration_sheets
from spd.report.figures import Sheet, sheets
from spd.report.ledger import ledger
from spd.report.link_figures import link_sheets
from spd.report.method_figures import method_sheets
from spd.report.peers import peer_sheets
from spd.report.predicted_figures import predicted_sheets
from spd.report.records import Record, choose
from spd.report.table import Table
from spd.report.tables import tables


def every_sheet(records: Sequence[Record]) -> list[Sheet]:
    """All that `load_records`' records give to draw."""
    single, combined = choose(records)
    drawn = sheets(single, combined) + link_sheets(records) + accuracy_sheets(single) + method_sheets(records, single)
    drawn += ablation_sheets(records) + peer_sheets(records)
    return drawn + predicted_sheets(records) + calibration_sheets(records)


class Shelf:
    """What can be drawn of the records in folders; nothing is written. Raises SPDError as `load_records` does."""

    def __init__(self, *folders: Path | str):
        self.records = load_records(folders)

    @cached_property
    def figures(self) -> dict[str, Sheet]:
        return {sheet.name: sheet for sheet in every_sheet(self.records)}

    @cached_property
    def tables(self) -> dict[str, Table]:
        return {table.name: table for table in tables(self.records)}

    def figure(self, name: str) -> Sheet:
        return self._named(self.figures, name)

    def table(self, name: str) -> Table:
        return self._named(self.tables, name)

    def _named(self, things: dict, name: str):
        if name not in things:
            raise SPDError(f"The records give no '{name}', only {', '.join(things) or 'nothing'}.")
        return things[name]

    def show(self, prefix: str) -> None:
        """Displays every figure and then every table whose name begins so, or says that no record gives one."""
        from IPython.display import Markdown, display

        chosen = [
            thing for things in (self.figures, self.tables) for n, thing in things.items() if n.startswith(prefix)
        ]
        display(*(chosen or [Markdown(f"*No record gives a figure or table named {prefix} yet.*")]))

    def claims(self, where: str) -> Table:
        """The paper's claims in one of its figures or tables, beside what the records say."""
        return next(table for table in ledger(self.records) if table.name == where)
