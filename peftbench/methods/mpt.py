"""Multitask prompt tuning: one prompt for several tasks, and a cheap change of it for each.

    f_k(x) = model([P* ∘ (U_k V_k); E(x)]),    P*: length×D shared, U_k: length×r and V_k: r×D of task k

Source: Wang et al. 2023, arXiv:2303.02861, section 3.1 (r = 1: U_k V_k is the outer product u_k ⊗ v_k). Stage 1 trains
P*, U and V on a mixture of source tasks, each row with its own task's prompt; stage 2 starts from what stage 1 saved
(`source`) and trains P* and one U V for the target. It takes U and V as new ones ("shared"), as the mean of the source
tasks' ("average", the paper's way) or as those of `source_task` ("exact"). U and V start normal with standard deviation
`init_std`, as in the authors' code and HF PEFT. A saved adapter holds its tensors and no longer asks for its source.

Deviations. Stage 1 does not distil from single-task teachers (section 3.2), as in HF PEFT: it trains on the tasks' own
losses. P* and the task's own matrices learn at one rate, where the paper has two. On bidirectional classifiers the
pooled token stays the task's own, as `prompt.py` says; the paper prompts T5 only.

Letters: runs R, tasks K, batch B, virtual tokens P, width D, rank r.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftbench.errors import UserError
from peftbench.methods.base import Card, EmbeddingDelta, Method, Traits, normal, require
from peftbench.methods.peft_format import PeftFormat
from peftbench.methods.prompt import check_length, initial_prompt, prompt_config, virtual_tokens
from peftbench.models.roles import Site, find_sites

FILES = ("adapter.json", "adapter.safetensors")
NAMES = {"shared": "prompt_embeddings", "columns": "prefix_task_cols", "rows": "prefix_task_rows"}
"""Our tensors by PEFT's names."""


class MultitaskPrompt(EmbeddingDelta):
    """The shared prompt, changed row by row as the row's task asks."""

    shared: nn.Parameter
    columns: nn.Parameter
    rows: nn.Parameter

    def __init__(
        self, site: Site, methods: Sequence[MultitaskPromptTuning], generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__(len(methods))
        starts = [m.start(site, g) for m, g in zip(methods, generators, strict=True)]
        for name in NAMES:
            self.stack(name, [start[name] for start in starts])
        self.count = methods[0].count_tasks

    def prompt(self) -> Tensor:
        prompts = self.shared.unsqueeze(1) * (self.columns @ self.rows)  # [R, K, P, D]
        if self.count == 1:
            return prompts.squeeze(1)
        if self.tasks is None:
            raise UserError(f"an adapter for {self.count} tasks needs each row's: adapter.condition(task_ids)")
        runs, batch = self.tasks.shape
        first = torch.arange(runs, device=self.tasks.device).unsqueeze(1) * self.count
        chosen = prompts.flatten(0, 1).index_select(0, (first + self.tasks).flatten())
        return chosen.unflatten(0, (runs, batch))


class MultitaskPromptFormat(PeftFormat):
    """PEFT's multitask prompt tuning, file by file the same three tensors."""

    peft_type = "MULTITASK_PROMPT_TUNING"

    def config(self, method: MultitaskPromptTuning, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        shared = prompt_config(model, method.length)
        if shared["task_type"] == "FEATURE_EXTRACTION":
            raise UserError("PEFT's models without a head never see the rows' tasks: save it with format='peftbench'")
        return {
            **shared,
            "prompt_tuning_init": "RANDOM",
            "num_ranks": method.rank,
            "num_tasks": method.count_tasks,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"length": virtual_tokens(config), "rank": int(config["num_ranks"]), "tasks": int(config["num_tasks"])}

    def tensors(
        self, method: MultitaskPromptTuning, sites: Sequence[Site], state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        own = _bare(sites, state)
        return {NAMES[ours]: tensor for ours, tensor in own.items()}

    def state(
        self, method: MultitaskPromptTuning, sites: Sequence[Site], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {f"{sites[0].key}.{ours}": tensors[theirs] for ours, theirs in NAMES.items() if theirs in tensors}

    def parameters(
        self, method: MultitaskPromptTuning, sites: Sequence[Site], state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        live = {**NAMES, "shared": "embedding.weight"}
        return {f"prompt_encoder.{live[ours]}": tensor for ours, tensor in _bare(sites, state).items()}


def _bare(sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{sites[0].key}."): tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class MultitaskPromptTuning(Method):
    """One prompt shared by several tasks, rescaled for each by a low-rank matrix."""

    length: int = 20
    rank: int = 1
    tasks: int | None = None
    init: str = "vocabulary"
    init_std: float = 0.02
    source: str | None = None
    source_init: str = "average"
    source_task: int = 0

    traits = Traits(
        sites=("embedding",),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"rank", "init", "init_std", "source", "source_init", "source_task"}),
        cost_free=frozenset({"init", "init_std", "source", "source_init", "source_task"}),
    )
    card = Card(
        equation="f_k([P* ∘ (U_k V_k); E(x)])",
        paper="Wang et al. 2023, arXiv:2303.02861",
        parameters="P · D + K r (P + D)",
    )
    peft = MultitaskPromptFormat()

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number of at least 1")
        require(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        require(self.tasks is None or self.tasks >= 1, "tasks", self.tasks, "a whole number of at least 1, or null")
        require(self.init in ("vocabulary", "random"), "init", self.init, "'vocabulary' or 'random'")
        require(self.init_std > 0, "init_std", self.init_std, "a number above 0")
        accepted = ("shared", "average", "exact")
        require(self.source_init in accepted, "source_init", self.source_init, "'shared', 'average' or 'exact'")
        require(self.source_task >= 0, "source_task", self.source_task, "a whole number of at least 0")

    @property
    def count_tasks(self) -> int:
        """How many tasks have matrices of their own; one where no data set has said."""
        return 1 if self.tasks is None else self.tasks

    def with_tasks(self, count: int) -> MultitaskPromptTuning:
        require(self.tasks in (None, count), "tasks", self.tasks, f"{count}, as many as the data mixes, or null")
        return dataclasses.replace(self, tasks=count)

    def settings(self) -> dict[str, Any]:
        # What a source gave is in the adapter's own tensors; a saved adapter has to load without it.
        return {**super().settings(), "source": None}

    def fingerprint(self) -> str | None:
        if self.source is None:
            return None
        self._source()
        digest = hashlib.sha256()
        for name in FILES:
            digest.update((Path(self.source).expanduser() / name).read_bytes())
        return digest.hexdigest()

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(model, "embedding")

    def check_site(self, site: Site) -> None:
        check_length(site, self.length)
        if self.source is not None:
            self._fitting(site)

    @classmethod
    def delta(
        cls, site: Site, methods: Sequence[MultitaskPromptTuning], generators: Sequence[torch.Generator]
    ) -> MultitaskPrompt:
        return MultitaskPrompt(site, methods, generators)

    def count(self, site: Site) -> int:
        return self.length * site.width + self.count_tasks * self.rank * (self.length + site.width)

    def start(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one run's tensors before training."""
        count = self.count_tasks
        tensors = {
            "shared": initial_prompt(site, self.init, self.length, generator),
            "columns": normal((count, self.length, self.rank), self.init_std, generator),
            "rows": normal((count, self.rank, site.width), self.init_std, generator),
        }
        if self.source is not None:
            found = self._fitting(site)
            if self.source_init == "shared":
                tensors["shared"] = found["shared"]
            elif self.source_init == "average":
                tensors = {k: t if k == "shared" else t.mean(dim=0, keepdim=True) for k, t in found.items()}
            else:
                tensors = {k: t if k == "shared" else t[[self.source_task]] for k, t in found.items()}
        return tensors

    def _source(self) -> dict[str, Tensor]:
        """Return the tensors of the adapter in `source`.

        Raises:
            UserError: there is none, or it is another method's.
        """
        folder = Path(str(self.source)).expanduser()
        expected = "the folder of an adapter of this method (sweep with save_adapters=true writes them)"
        try:
            saved = json.loads((folder / FILES[0]).read_text())
            tensors = load_file(folder / FILES[1])
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"method.source={self.source!r}: expected {expected}") from error
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        require(saved.get("method") == kind, "source", self.source, f"{expected}, not of {saved.get('method')}")
        return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}

    def _fitting(self, site: Site) -> dict[str, Tensor]:
        """Return the source's tensors if they fit `site` and these settings; raises UserError otherwise."""
        found = self._source()
        length, width = found["shared"].shape
        count, _, rank = found["columns"].shape
        require(self.count_tasks == 1, "source", self.source, f"null for a mixture of {self.count_tasks} tasks")
        require(width == site.width, "source", self.source, f"a prompt {site.width} wide, as the model, not {width}")
        require(length == self.length, "length", self.length, f"{length}, the source's")
        if self.source_init != "shared":
            require(rank == self.rank, "rank", self.rank, f"{rank}, the source's, or source_init='shared'")
        if self.source_init == "exact":
            require(self.source_task < count, "source_task", self.source_task, f"below {count}, the source's tasks")
        return found
