"""What a comparison leaves behind: report.json, report.md, figures and a table on the screen."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.config.commands.compare import CompareOptions
from megaskip.study.page import page
from megaskip.study.pareto import (
    HEADER,
    Contrast,
    Point,
    draw,
    draw_layers,
    markdown,
    table_rows,
)
from megaskip.study.training_costs import COST_HEADER, TrainingCost


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonReport:
    """What is measured so far."""

    options: CompareOptions
    points: Sequence[Point]
    contrasts: Sequence[Contrast]
    costs: Sequence[TrainingCost]
    """Of what was fitted or trained."""
    left_out: Sequence[str]
    """Runs that cannot reach a skip, each with its reason."""

    def write(self) -> None:
        """Write report.json, report.md and report.html into the output folder."""
        content: dict[str, Any] = {
            "options": _plain(self.options),
            "points": [dataclasses.asdict(point) for point in self.points],
            "contrasts": [dataclasses.asdict(contrast) for contrast in self.contrasts],
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
            "left_out": list(self.left_out),
        }
        output = self.options.output
        (output / "report.json").write_text(json.dumps(content, indent=2) + "\n")
        notes = [*map(str, self.contrasts), *(f"left out: {why}" for why in self.left_out)]
        lines = "".join(f"- {note}\n" for note in notes)
        costs = markdown(COST_HEADER, [cost.row() for cost in self.costs]) if self.costs else ""
        tables = [markdown(HEADER, table_rows(self.points)), costs, lines]
        (output / "report.md").write_text("\n".join(filter(None, tables)))
        whole = page(
            self.points,
            self.contrasts,
            self.left_out,
            self.costs,
            title=f"{Path(self.options.model).name}: what skipping costs",
            settings=[(name, str(value)) for name, value in content["options"].items()],
        )
        (output / "report.html").write_text(whole, encoding="utf-8")

    def show(self) -> None:
        """Draw the figures and print the table."""
        output, name = self.options.output, Path(self.options.model).name
        draw(self.points, output / "pareto.png", title=f"{name}: loss against cost")
        if any(point.skipped > 0 for point in self.points):
            draw_layers(self.points, output / "layers.png", title=f"{name}: what is skipped")
        print("  ".join(HEADER))
        for row in table_rows(self.points):
            print("  ".join(row))
        for row in [COST_HEADER, *(cost.row() for cost in self.costs)] if self.costs else []:
            print("  ".join(row))
        print("".join(f"- {contrast}\n" for contrast in self.contrasts))
        for why in self.left_out:
            print(f"left out: {why}")


def _plain(options: CompareOptions) -> dict[str, Any]:
    """Return the options as JSON has them, --skip as shares of all attention."""
    content = dataclasses.asdict(options) | {"skip": options.shares}
    content["choice"] = [str(path) for path in options.choice]
    return {k: str(v) if isinstance(v, Path) else v for k, v in content.items()}
