"""An experiment's YAML: every hyper-parameter of a reproduction, validated, as defaults of the commands."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spd.errors import SPDError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Common(_Section):
    """Defaults of every command that has the option."""

    model: str | None = Field(None, description="folder, `spd-tiny` or hub id")
    tp: int | None = Field(None, ge=1, description="logical tensor-parallel degree")
    text: str | None = Field(None, description="file, `builtin`, `builtin-train`, `wikitext2-train` or `-test`")
    seq_len: int | None = Field(None, ge=2, description="tokens a window")
    windows: int | None = Field(None, ge=1, description="number of windows")
    skip: int | None = Field(None, ge=0, description="windows passed over first")
    dtype: str | None = None
    device: str | None = None


class SensitivitySection(_Section):
    """Where the measurement differs from the common options."""

    text: str | None = None
    windows: int | None = Field(None, ge=1)
    skip: int | None = Field(None, ge=0)
    dtype: str | None = None


class PlanSection(_Section):
    budget: str | None = Field(None, description="blocks as `6` or percentage as `70%`")
    tau1: float | None = Field(None, description="ISB up to here, perplexity points")
    tau2: float | None = Field(None, description="SB up to here, perplexity points")


class EvaluationSection(_Section):
    """Options of commands that measure on other windows than the calibration's."""

    text: str | None = None
    windows: int | None = Field(None, ge=1)
    skip: int | None = Field(None, ge=0)
    tasks: str | None = Field(None, description="as `piqa,mmlu`")
    tasks_dir: Path | None = Field(None, description="folder of the tasks' rows; left out: from the hub")
    limit: int | None = Field(None, ge=1, description="questions of a task")
    batch_size: int | None = Field(None, ge=1, description="contexts in a forward pass")
    compare: bool | None = Field(None, description="with the model that drops nothing")
    percentages: str | None = Field(None, description="of blocks dropped, as `0,25,50`; left out: every number")
    strategies: str | None = Field(None, description="as `zs,b2b,b2b+hg,closed-form,best`")
    calibration: int | None = Field(None, ge=2, description="windows to repair on")
    calibration_text: str | None = Field(None, description="where not the text that is measured on")
    tau1: float | None = None
    tau2: float | None = None
    epochs: int | None = Field(None, ge=0, description="of the paper's distillation")
    learning_rate: float | None = Field(None, gt=0)
    joint_epochs: int | None = Field(None, ge=0, description="of all dropped blocks together (`best`)")
    generated: int | None = Field(None, ge=0, description="windows that the model writes itself (`best`)")


class Table1Section(_Section):
    text: str | None = None
    dtype: str | None = None
    drop: str | None = Field(None, description="blocks, as in `0` (the paper's) or `all`")
    windows: int | None = Field(None, ge=1)


class BenchSection(_Section):
    tp: int | None = Field(None, ge=1, description="processes")
    batch: int | None = Field(None, ge=1)
    prompt_len: int | None = Field(None, ge=1, description="tokens")
    new_tokens: int | None = Field(None, ge=0)
    link: str | None = Field(None, description="emulated link, as `10GBps,20us`")
    repeats: int | None = Field(None, ge=1)
    percentages: str | None = None
    dtype: str | None = None


class DistillSection(_Section):
    """Left out, a value is the recipe's own (`spd.repair.recipes.DEFAULTS`)."""

    recipe: str | None = Field(None, description="`zs`, `closed-form`, `paper` or `best`")
    strategy: str | None = Field(None, description="of the paper's recipe: `zs`, `b2b` or `b2b+hg`")
    epochs: int | None = Field(None, ge=0, description="for each block")
    learning_rate: float | None = Field(None, gt=0)
    optimizer: str | None = Field(None, description="`adam` or `adamw`")
    joint_epochs: int | None = Field(None, ge=0, description="of all dropped blocks together (`best`)")
    generated: int | None = Field(None, ge=0, description="windows that the model writes itself (`best`)")
    text: str | None = Field(None, description="calibration text, where not the common one")
    seq_len: int | None = Field(None, ge=2)
    windows: int | None = Field(None, ge=2, description="of calibration; the last tenth is held out")
    skip: int | None = Field(None, ge=0)


class Experiment(_Section):
    common: Common = Common()
    sensitivity: SensitivitySection = SensitivitySection()
    plan: PlanSection = PlanSection()
    distill: DistillSection = DistillSection()
    eval: EvaluationSection = EvaluationSection()
    sweep: EvaluationSection = EvaluationSection()
    table1: Table1Section = Table1Section()
    bench: BenchSection = BenchSection()

    def texts(self) -> list[str]:
        """Those that any of its commands reads."""
        sections = (self.common, self.distill, self.table1, self.sweep)
        return [text for text in (*(section.text for section in sections), self.sweep.calibration_text) if text]

    def defaults(self, command: str, options: set[str]) -> dict[str, Any]:
        """Defaults of a command's options, its own section before the common one."""
        own = getattr(self, command, _Section())
        values = self.common.model_dump(exclude_none=True) | own.model_dump(exclude_none=True)
        return {name: value for name, value in values.items() if name in options}


def read_experiment(path: Path) -> Experiment:
    """Raises SPDError naming the first field that is unknown or out of range."""
    try:
        return Experiment.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise SPDError(f"The experiment {path} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise SPDError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SPDError(f"{path}: {place}: {first['msg']} (given: {first['input']!r}).") from None
