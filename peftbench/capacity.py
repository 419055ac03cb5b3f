"""What fits into a given amount of memory: how large a batch, how many runs side by side; decided by prediction.

Room on a GPU is what is given less a reserve: `RESERVE` for CUDA's context and the kernels it loads, and
`FRAGMENTATION` of the whole for what the allocator holds and cannot give again.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftbench.analysis.human import human_bytes
from peftbench.assembly import Setting
from peftbench.config import ModelConfig, build
from peftbench.errors import UserError
from peftbench.estimate import predict, with_batch, with_runs
from peftbench.models.quantized import QuantizedLinear, dense_parameter_count, is_plain_linear
from peftbench.record import RunSpec, canonical, profile_id

logger = logging.getLogger("peftbench")

RESERVE = 768 * 2**20
"""Bytes of a GPU that CUDA's context and the kernels it loads take (about 500 MiB on an H100)."""
FRAGMENTATION = 0.03
"""Share of a GPU left to what the allocator cannot give again."""
MOST_ROWS = 2**16
"""Largest batch that is looked for."""
CLEARLY = 1.2
"""On a CPU, whose memory other programs share, a run is refused if its prediction exceeds what is available by this
factor, and more than one share a pass if theirs stays as far below."""
FIXED = 256 * 2**20
"""Bytes in `at_most` for what does not grow with anything: libraries' workspaces."""
PATIENCE = 8
"""Trials after which lines are no longer followed."""

UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4} | {
    f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")
}


def parse_bytes(setting: str, text: str) -> int:
    """Return the bytes that "24GiB", "24 GB" or "24576MiB" stand for.

    Raises:
        UserError: `text`, given for `setting`, is not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = units.get(match[2].lower()) if match else None
    if match is None or size is None or float(match[1]) <= 0:
        raise UserError(f"{setting}={text}: expected a number above 0 with a unit, such as 24GiB, 24GB or 24576MiB")
    return round(float(match[1]) * size)


def room(total: int, kind: str) -> int:
    """Return how many of a device's `total` bytes a step can have."""
    return math.floor(total / CLEARLY) if kind == "cpu" else max(0, math.floor(total * (1 - FRAGMENTATION)) - RESERVE)


def largest(peak: Callable[[int], int], limit: int, step: int = 1, guess: int = 1, most: int = MOST_ROWS) -> int:
    """Return the largest multiple of `step`, up to `most`, whose predicted `peak` is at most `limit`; 0 if none is.

    The peak is nearly a line: a trial is made where the line through the bounds, or through the first two trials, meets
    the limit; should that take long, in the middle.
    """
    known: dict[int, int] = {}

    def fits(units: int) -> bool:
        known[units] = peak(units * step)
        return known[units] <= limit

    top = most // step
    if top < 1 or not fits(1):
        return 0
    low, high = 1, top + 1
    trial = guess // step
    while high - low > 1:
        trial = min(max(trial, low + 1), high - 1)
        if fits(trial):
            low = trial
        else:
            high = trial
        first, last = (low, high) if high in known else (1, low)
        slope = (known[last] - known[first]) / (last - first)
        meets = first + math.floor((limit - known[first]) / slope) if slope > 0 else top
        trial = meets if len(known) < PATIENCE else (low + high) // 2
    return low * step


def at_most(setting: Setting, model: nn.Module) -> int:
    """Return a number of bytes that one step of `setting` on `model` (of the meta device) will not exceed.

    Rough and generous, to save predictions where memory is plenty. All in fp32: weights, gradients, two moments and a
    copy, and as much again for dense changes of every weight by each run; for every token four times what goes into and
    out of all linear maps of the body, which is twice what the hungriest method keeps, and six times the logits; twelve
    times the attention scores of every layer.
    """
    config = cast(Any, model).config
    runs, rows = len(setting.specs), setting.train.batch_size * len(setting.specs)
    virtual = max(int(m.settings().get("length", 0)) for m in setting.methods)
    tokens = setting.max_length + virtual
    output = cast(Any, model).get_output_embeddings()
    widths = sum(_sides(module) for module in model.modules() if module is not output)
    vocabulary = 0 if output is None else config.vocab_size
    stacks = 2 if getattr(config, "is_encoder_decoder", False) else 1
    scores = stacks * config.num_hidden_layers * config.num_attention_heads * tokens**2
    state = (5 + 4 * runs) * dense_parameter_count(model)
    return FIXED + 4 * (state + rows * (tokens * (4 * widths + 6 * vocabulary) + 12 * scores))


def _sides(module: nn.Module) -> int:
    """Return input plus output features of a linear layer, 0 for other modules."""
    if isinstance(module, QuantizedLinear):
        return module.in_features + module.out_features
    return sum(cast(Tensor, module.weight).shape) if is_plain_linear(module) else 0


class Fit:
    """Decides for a sweep, by prediction, what fits into one device's memory; each kind of cost is predicted once.

    What cannot be predicted is taken to fit, with a warning.
    """

    def __init__(self, kind: str, free: int, total: int, shapes: Callable[[ModelConfig, str], nn.Module]) -> None:
        """Take what is known of the device.

        Args:
            kind: "cuda" or "cpu".
            free, total: bytes that are free now, and all there are.
            shapes: gives a model of the meta device.
        """
        self.kind, self.free, self.total = kind, free, total
        self._shapes = shapes
        self._peaks: dict[tuple[str, int, int], int | None] = {}
        self.lines: list[str] = []
        """What is worth saying of packs."""

    def pack_size(self, members: Sequence[RunSpec], most: int) -> int:
        """Return how many runs of `members`, which can share a base, fit side by side into what is free: 1 to `most`.

        The one with most parameters stands for all of its kind, since runs of a pack are padded to the largest; where
        there are several kinds of method, each run is taken to need as much as the hungriest.
        """
        if most == 1:
            return 1
        widest: dict[str, tuple[int, Setting]] = {}
        for setting in {canonical(spec.method): Setting.of([spec]) for spec in members}.values():
            kind, width = setting.specs[0].method["_target_"], setting.methods[0].parameter_count(self._model(setting))
            if kind not in widest or width > widest[kind][0]:
                widest[kind] = width, setting
        size = most
        for _, setting in widest.values():
            size = self._alike(setting, size)
        return size

    def _alike(self, setting: Setting, most: int) -> int:
        """Return how many runs like the first of `setting` fit side by side into what is free: 1 to `most`."""
        limit = room(self.free, self.kind)
        if most == 1 or self._at_most(setting, most) <= limit:
            return most
        alone = self._peak(setting, 1)
        # runs share the base: so many need no more than so many times what one needs
        if alone is None or alone * most <= limit or self._fits(setting, most, limit):
            return most
        found = largest(lambda runs: self._peak(setting, runs) or 0, limit, guess=most // 2, most=most - 1)
        size = max(found, 1)
        need, spec = self._peak(setting, size + 1), setting.specs[0]
        line = f"{spec.method['name']} on {spec.model['name']}: packs of {size}, {size + 1} runs would need "
        if need is not None and not any(known.startswith(line) for known in self.lines):
            self.lines.append(line + f"{human_bytes(need)} of {human_bytes(limit)}")
        return size

    def check(self, specs: Iterable[RunSpec]) -> None:
        """Raise UserError if a run alone will clearly not fit into the device; the message says what would."""
        limit = self.total if self.kind == "cuda" else math.floor(self.total * CLEARLY)
        for spec in {profile_id(spec, ()): spec for spec in specs}.values():
            setting = Setting.of([spec])
            if self._at_most(setting, 1) <= limit or self._fits(setting, 1, limit):
                continue
            peak = cast(int, self._peak(setting, 1))
            rows = largest(
                functools.partial(self._batch_peak, setting),
                room(self.total, self.kind),
                step=setting.train.accumulation,
                most=setting.train.batch_size - 1,
            )
            would = f"train.batch_size={rows} would fit" if rows else "not even one row would fit"
            where = "the GPU has" if self.kind == "cuda" else "available are"
            raise UserError(
                f"method={spec.method['name']} model={spec.model['name']} train.batch_size={setting.train.batch_size} "
                f"train.max_length={setting.max_length}: a step will need about {human_bytes(peak)} ({peak} bytes) of "
                f"memory, {where} {human_bytes(self.total)} ({self.total} bytes); {would}; --force tries nevertheless"
            )

    def _batch_peak(self, setting: Setting, rows: int) -> int:
        return self._peak(with_batch(setting, rows), 1) or 0

    def _model(self, setting: Setting) -> nn.Module:
        return self._shapes(build(ModelConfig, setting.specs[0].model, "model"), setting.task.formulation)

    def _at_most(self, setting: Setting, runs: int) -> int:
        return at_most(with_runs(setting, runs), self._model(setting))

    def _fits(self, setting: Setting, runs: int, limit: int) -> bool:
        peak = self._peak(setting, runs)
        return peak is None or peak <= limit

    def _peak(self, setting: Setting, runs: int) -> int | None:
        """Return the predicted peak in bytes; None where there is none."""
        key = setting.profile_id, setting.train.batch_size, runs
        if key not in self._peaks:
            try:
                self._peaks[key] = predict(with_runs(setting, runs), self.kind, exact=False).peak
            except Exception as error:  # noqa: BLE001  a prediction that fails must not keep a sweep from running
                name = setting.specs[0].method["name"]
                logger.warning("%s: its memory cannot be predicted (%s)", name, str(error).partition("\n")[0])
                self._peaks[key] = None
        return self._peaks[key]
