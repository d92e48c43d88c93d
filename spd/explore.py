"""Sensitivities explored: those on record or measured now, with budget and thresholds to turn."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spd.planner import make_plan
from spd.records import load_records, make_record
from spd.report.captions import sensitivity_caption
from spd.report.figures import Sheet, sensitivity_sheet
from spd.report.method_figures import newest_settings
from spd.report.records import Sources


def measure(model: str, tp: int, text: str, seq_len: int, windows: int) -> dict:
    """A record of the sensitivities of a model, as the command `sensitivity` makes it; nothing is written."""
    from spd import SPDModel
    from spd.data import read_windows
    from spd.sensitivity import sensitivity

    started, loaded = datetime.now(UTC), SPDModel.from_pretrained(model, tp=tp)
    data = read_windows(text, loaded.tokenizer, seq_len, windows)
    result = sensitivity(loaded.transformer, data.tokens)
    asked = {"model": model, "tp": tp, "text": text, "seq_len": seq_len, "windows": windows}
    return make_record("sensitivity", asked, result, started=started, model=loaded.describe(), tp=tp,
                       data=data.describe(), argv=["spd", "sensitivity"])  # fmt: skip


class Explorer:
    """Sensitivity records by (model, text, tp), each drawn with the plan that a budget and thresholds make of it."""

    def __init__(self, *folders: Path | str, measured: Sequence[dict] = ()):
        self.settings = newest_settings([*load_records(folders), *measured])

    def sheet(self, setting: tuple[str, str, int], budget: str, tau1: float, tau2: float) -> Sheet:
        """Raises SPDError on thresholds in the wrong order or an impossible budget."""
        record = self.settings[setting]
        plan = make_plan(record["result"]["sensitivity"], budget, tau1, tau2)
        sources = Sources("", record, {**record, "command": "plan", "result": plan})
        return sensitivity_sheet(sources, sensitivity_caption(sources))

    def controls(self) -> Any:
        """Menus and sliders over `sheet`; the figure is drawn anew at every change."""
        import ipywidgets as widgets
        from IPython.display import display

        def draw(setting: tuple[str, str, int], percent: int, taus: tuple[float, float]) -> None:
            sheet = self.sheet(setting, f"{percent}%", *(10**tau for tau in taus))
            display(sheet)
            print(sheet.records[-1]["result"]["plan"])

        wide = {"layout": widgets.Layout(width="34em"), "style": {"description_width": "9em"}}
        slider = {"continuous_update": False, **wide}
        named = {f"{model}, {text}, tp={tp}": (model, text, tp) for model, text, tp in self.settings}
        return widgets.interactive(
            draw,
            setting=widgets.Dropdown(options=named, description="model, text, tp", **wide),
            percent=widgets.IntSlider(70, 0, 100, 5, description="budget (%)", **slider),
            taus=widgets.FloatRangeSlider(
                value=(-1.3, 1.0),
                min=-3,
                max=2,
                step=0.05,
                description="log10 of τ₁, τ₂",
                continuous_update=False,
                **wide,
            ),
        )
