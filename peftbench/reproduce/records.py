"""Our side of published rows: which records answer a row, and what they give in its unit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.analysis.frame import number
from peftbench.errors import UserError
from peftbench.published import Value
from peftbench.record import canonical, task_content, train_content
from peftbench.reproduce.protocol import differences
from peftbench.reproduce.verdicts import Difference, Measured, centre, half_width
from peftbench.store import Store

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Configuration:
    """All runs of one configuration, whatever their seeds, in one folder."""

    folder: str
    records: tuple[Record, ...]

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return what all of them were asked to do, but for the seed."""
        return dict(self.records[0]["spec"])

    @property
    def completed(self) -> list[Record]:
        """Return the runs that completed."""
        return [r for r in self.records if r["status"] == "completed"]

    def scores(self, part: str, metric: str) -> dict[int, float]:
        """Return seed → `metric` on `part` ("test", "test_mismatched", "validation") of completed runs that have it.

        "a+b" is the mean of two metrics, "a|b" the first of them that is there, "a@p+q" the mean over two parts.
        """
        metric, _, parts = metric.partition("@")
        found = {}
        for record in self.completed:
            quality = record.get("quality") or {}
            for option in metric.split("|"):
                pairs = [(p, name) for p in (parts or part).split("+") for name in option.split("+")]
                terms = [number((quality.get(p) or {}).get(name)) for p, name in pairs]
                if None not in terms:
                    found[int(record["spec"]["seed"])] = sum(t for t in terms if t is not None) / len(terms)
                    break
        return found

    @property
    def validation(self) -> float:
        """Return the mean primary metric on validation, larger for better; minus infinity without any."""
        one = next(iter(self.completed), None)
        if one is None:
            return float("-inf")
        quality = one["quality"]
        values = list(self.scores("validation", quality["primary_metric"]).values())
        sign = 1 if quality.get("greater_is_better", True) else -1
        return sign * sum(values) / len(values) if values else float("-inf")


def result_folders(root: str | Path) -> list[Path]:
    """Return the folders of sweeps under `root`, or `root` itself where it is one."""
    root = Path(root).expanduser()

    def holds(path: Path) -> bool:
        return (path / "runs").is_dir() or (path / "records.jsonl.gz").is_file()

    if holds(root):
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir() and holds(path)) if root.is_dir() else []


def configurations(roots: Iterable[str | Path], tell: Callable[[str], None] = lambda line: None) -> list[Configuration]:
    """Read all records below `roots`, grouped by configuration.

    Args:
        tell: hears a line about each folder below a root that holds other things than records of runs.

    Raises:
        UserError: a root is no folder, or is itself a sweep's with unreadable records.
    """
    named: list[tuple[str, Record]] = []
    for root in roots:
        if not Path(root).expanduser().is_dir():
            raise UserError(f"--results {root}: no such folder")
        for folder in result_folders(root):
            name = str(Path(root) / folder.relative_to(Path(root).expanduser()))
            try:
                records = Store(folder.absolute()).records()
            except UserError as error:
                if folder == Path(root).expanduser():
                    raise
                tell(f"left out: {error}")
                continue
            named += [(name, record) for record in records]
    return grouped(named)


def grouped(named: Iterable[tuple[str, Record]]) -> list[Configuration]:
    """Return records, each with the name of its folder, as configurations."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for name, record in named:
        groups.setdefault((name, _content(record["spec"])), []).append(record)
    return [Configuration(folder, tuple(found)) for (folder, _), found in groups.items()]


def _content(spec: Mapping[str, Any]) -> str:
    kept = {key: spec.get(key) for key in ("model", "method", "protocol", "identity")}
    own = {"task": task_content(spec.get("task") or {}), "train": train_content(spec.get("train") or {})}
    return canonical(kept | own)


def answers(row: Value, configuration: Configuration) -> bool:
    """Tell whether a configuration is of the row's model (or shape), method and task."""
    spec, here = configuration.spec, row.here
    names = spec["model"]["name"], spec["method"]["name"], spec["task"].get("data") or spec["task"]["name"]
    wanted = here.model, here.method, here.task
    checkpoint = (spec["model"].get("checkpoint") or "").rpartition("/")[2]
    named = names[0] == wanted[0] or (here.weights == "same" and checkpoint == row.model.rpartition("/")[2])
    return all(wanted) and named and names[1:] == wanted[1:] and bool(row.metric.ours and here.part)


def measured(row: Value, configuration: Configuration) -> Measured | None:
    """Return what a configuration gives for a row, in the row's unit; None without a completed run."""
    scores = configuration.scores(row.here.part, row.metric.ours)
    if not scores:
        return None
    factor = row.metric.factor or 1.0
    values, statistic = [v * factor for v in scores.values()], row.protocol.statistic
    spec = configuration.spec
    label = " ".join(
        [spec["method"]["name"], spec["model"]["name"], spec["task"]["name"], f"lr={spec['train']['learning_rate']:g}"]
    )
    ids = tuple(r["run_id"] for r in configuration.completed if int(r["spec"]["seed"]) in scores)
    lost = len(configuration.records) - len(configuration.completed)
    return Measured(
        centre(values, statistic), half_width(values, statistic), tuple(sorted(scores)), ids, configuration.folder,
        label, lost,
    )  # fmt: skip


def best_answer(row: Value, found: Sequence[Configuration]) -> tuple[Measured | None, list[Difference]]:
    """Return what answers a row best, and how it differs.

    The fewest differences that decide come first, then the fewest of all, the most seeds, and the best on validation:
    what is reported plays no part.
    """
    candidates = []
    for configuration in found:
        if answers(row, configuration) and (result := measured(row, configuration)) is not None:
            seeds = len(result.seeds)
            notes = differences(row, configuration.completed[0], seeds)
            rank = (sum(d.decides for d in notes), len(notes), -seeds, -configuration.validation, result.records)
            candidates.append((rank, result, notes))
    if not candidates:
        return None, []
    _, result, notes = min(candidates, key=lambda c: c[0])
    return result, notes
