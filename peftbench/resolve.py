"""From points to RunSpecs: every section built and checked once, before anything starts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftbench import environment, registry, starts
from peftbench.config import PROTOCOLS, ModelConfig, ProfileConfig, TrainConfig, as_dict, build, in_range, one_of
from peftbench.errors import UserError, nearest
from peftbench.overrides import is_file
from peftbench.plan import GROUPS, Demand, Group, Point, Sharing, as_grid, flatten, packs, points
from peftbench.record import DEFAULT_OPTIMIZER, RunSpec, canonical, plain

EXPERIMENT_KEYS = ("common", "grids", "per_method", "sweep", "question")


def experiment(name: str) -> tuple[list[dict[str, list[Any]]], dict[str, dict[str, list[Any]]], str]:
    """Read `experiments/<name>/experiment.yaml`, or the file `name`: its grids with `common` filled in, values per
    method, and sweep name.

    Raises UserError for an unknown experiment or key.
    """
    from omegaconf import OmegaConf

    path = _experiment_file(name)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:
        raise UserError(
            f"{path}: not readable as yaml ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with grids")
    for key in map(str, content):
        if key not in EXPERIMENT_KEYS:
            valid = ", ".join(EXPERIMENT_KEYS)
            raise UserError(f"{path}: {key}: no such key{nearest(key, EXPERIMENT_KEYS)} (valid: {valid})")
    grids, common, per_method = content.get("grids"), content.get("common") or {}, content.get("per_method") or {}
    if not isinstance(grids, list) or not grids or not all(isinstance(g, Mapping) for g in grids):
        raise UserError(f"{path}: grids: expected a list of mappings from key to value or list of values")
    if not isinstance(common, Mapping) or not isinstance(per_method, Mapping):
        raise UserError(f"{path}: common and per_method: expected mappings")
    chosen = [{**as_grid(common), **as_grid(grid)} for grid in grids]
    values = {str(method): as_grid(keys) for method, keys in per_method.items()}
    return chosen, values, str(content.get("sweep") or (path.stem if is_file(name) else name))


def _experiment_file(name: str) -> Path:
    if is_file(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"experiment={name}: no such file")
        return path
    known = registry.experiments()
    if name not in known:
        folders = ", ".join(str(f) for f in registry.experiment_folders()) or "no experiments folder"
        raise UserError(f"experiment={name}: no such experiment in {folders}{nearest(name, known)}")
    return known[name]


def demand(given: Mapping[str, Sequence[Any]], name: str | None) -> Demand:
    """Return what is asked for: the keys `given` by hand over the experiment `name`, or over the default choices."""
    defaults: dict[str, list[Any]] = {
        "model": ["minilm-l6"],
        "method": ["lora"],
        "task": ["movie-reviews"],
        "train": ["default"],
        "profile": ["default"],
        "seed": [0],
        "protocol": ["held_out"],
    }
    if name is None:
        return Demand([defaults], {}, given)
    grids, per_method, _ = experiment(name)
    for grid in grids:
        if "method" not in grid and "method" not in given:
            raise UserError(f"experiment={name}: a grid names no method")
    return Demand([{**defaults, **grid} for grid in grids], per_method, given)


class Resolver:
    """Turns points into RunSpecs; every section, model and method is built and checked once."""

    def __init__(self, device: str) -> None:
        self.device = environment.pick_device(device)
        self.device_kind = environment.device_kind(self.device)
        self._cache: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    # Sections as plain settings.

    def _settings(self, group: str, option: str, values: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        """Return an option's yaml with the point's own values set on it."""
        if group == "model" and option not in registry.options("model"):
            if "/" not in option and not Path(option).exists():
                registry.check_option(group, option)
            base = {**registry.section("model", "hub"), "checkpoint": option, "name": option.rstrip("/")}
        else:
            base = registry.section(group, option)
        for key, value in values:
            inner, dot, rest = key.partition(".")
            if dot:  # model.package.sha256, model.architecture.hidden_size
                if not isinstance(base.get(inner), Mapping):
                    raise UserError(f"{group}.{key}: no such key{nearest(key, flatten(base))}")
                base[inner] = _set(base[inner], rest, value)
            else:
                base[key] = value
        return base

    def _model(self, option: str, values: tuple[tuple[str, Any], ...]) -> tuple[ModelConfig, dict[str, Any], str]:
        from peftbench.models import source

        config = self._model_config(option, values)
        return config, as_dict(config), source.fingerprint(config)

    def _model_config(self, option: str, values: tuple[tuple[str, Any], ...]) -> ModelConfig:
        mapping = self._settings("model", option, values)
        if option == "hub" and mapping.get("checkpoint") in (None, "???"):
            raise UserError("model=hub: name a checkpoint too, model.checkpoint=<owner>/<name>")
        if mapping.get("name") in (None, "???", "hub") and mapping.get("checkpoint"):
            mapping["name"] = mapping["checkpoint"]
        return build(ModelConfig, mapping, "model")

    def _method(self, option: str, values: tuple[tuple[str, Any], ...]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        mapping = self._settings("method", option, values)
        method = registry.build_method(mapping)
        settings = {"name": option, "_target_": mapping["_target_"], **plain(as_dict(method))}
        return method, settings, mapping

    def _with_tasks(self, method: Any, settings: dict[str, Any], count: int) -> tuple[Any, dict[str, Any], str | None]:
        """Return method and settings for data that mixes `count` tasks, and a fingerprint of the files they name."""
        method = method.with_tasks(count)
        return method, {**settings, **plain(as_dict(method))}, method.fingerprint()

    def _task(self, option: str, values: tuple[tuple[str, Any], ...]) -> tuple[Any, dict[str, Any], str]:
        mapping = self._settings("task", option, values)
        task = registry.build_task(mapping)
        return task, {"name": option, "_target_": mapping["_target_"], **plain(as_dict(task))}, task.fingerprint()

    def _splits(self, task: Any, protocol: str) -> bool:
        """Read the rows once, so that a missing file or column is found before anything trains."""
        found = task.splits(protocol)
        return all(found[split] for split in ("train", "validation", "test"))

    def shapes(self, config: ModelConfig, formulation: str) -> Any:
        """Return the model on the meta device."""
        from peftbench.models.load import build_meta

        return self._once(("meta", canonical(as_dict(config)), formulation), lambda: build_meta(config, formulation))

    def _check(self, config: ModelConfig, method: Any, formulation: str, key: tuple[Any, ...]) -> bool:
        from peftbench.methods.adapter import check_base

        meta = self.shapes(config, formulation)
        try:
            check_base(method, meta)
            method.check(meta)
        except UserError as error:
            raise UserError(f"model={config.name}, method={key[0]}: {error}") from error
        return True

    def _positions(self, config: ModelConfig, formulation: str) -> int | None:
        """Return how many tokens the model's table of positions has room for; None without a table, or unmapped."""
        from peftbench.models.roles import embedding_site

        try:
            return embedding_site(self.shapes(config, formulation)).max_positions
        except UserError:
            return None

    def _length(self, config: ModelConfig, formulation: str, asked: int | None, of_task: int) -> int:
        """Return the tokens that texts are cut to: those asked for, or the task's as far as the model has positions."""
        positions = self._positions(config, formulation)
        if asked is None:
            return of_task if positions is None else min(of_task, positions)
        if positions is not None and asked > positions:
            raise UserError(f"train.max_length={asked}: {config.name} has {positions} positions; expected at most that")
        return asked

    def _check_length(self, config: ModelConfig, method: Any, formulation: str, tokens: int) -> bool:
        """Raise UserError if virtual tokens and the longest text together exceed the model's table of positions."""
        from peftbench.models.roles import EmbeddingSite

        if "embedding" not in method.traits.sites:
            return True
        meta = self.shapes(config, formulation)
        for site in method.sites(meta):
            if isinstance(site, EmbeddingSite) and site.max_positions is not None:
                room = site.max_positions - method.settings()["length"]
                if tokens > room:
                    raise UserError(
                        f"train.max_length={tokens}: with {method.settings()['length']} virtual tokens {config.name} "
                        f"has room for {room}; expected at most that, or a smaller method.length"
                    )
        return True

    def _check_optimizer(self, optimizer: str, name: str, method: Any) -> bool:
        """Raise UserError unless `optimizer` can run on this device, and with this method."""
        import torch

        from peftbench.engine import paging

        if optimizer.startswith("paged_"):
            paging.check(f"train.optimizer={optimizer}", torch.device(self.device))
        return self._check_own_optimizer(optimizer, name, method)

    def _check_own_optimizer(self, optimizer: str, name: str, method: Any) -> bool:
        """Raise UserError if the method has an optimizer of its own and `optimizer` is another than the default."""
        from peftbench.methods.base import Method

        if optimizer != DEFAULT_OPTIMIZER and type(method).base_optimizer is not Method.base_optimizer:
            raise UserError(
                f"train.optimizer={optimizer}: method {name} has an optimizer of its own; expected {DEFAULT_OPTIMIZER}"
            )
        return True

    def _check_execution(self, train: TrainConfig, name: str, method: Any) -> bool:
        """Raise UserError unless whole steps of this recipe and method can be captured, where that is asked for."""
        from peftbench.methods.base import Method

        if not train.execution.endswith("graphs"):
            return True
        hindrance = None
        if self.device != "cuda":
            hindrance = f"a CUDA graph needs device=cuda, this is {self.device}"
        elif type(method).base_optimizer is not Method.base_optimizer:
            hindrance = f"method {name} has an optimizer of its own, which counts its steps on the host"
        elif train.optimizer.startswith("paged_"):
            hindrance = f"train.optimizer={train.optimizer} moves pages between GPU and host"
        elif train.checkpointing:
            hindrance = "train.checkpointing=true asks for the generator's state, which a capture does not give"
        if hindrance is not None:
            instead = "compiled" if train.execution.startswith("compiled") else "eager"
            raise UserError(f"train.execution={train.execution}: {hindrance}; expected {instead}")
        return True

    # Points.

    def spec(self, point: Point) -> RunSpec:
        """Return the resolved run of one point; raises UserError for whatever keeps it from running."""
        point = self._with_required(dict(point))
        parts = {group: _part(point, group) for group in GROUPS}
        config, model, weights = self._once(("model", parts["model"][2]), lambda: self._model(*parts["model"][:2]))
        method, method_settings, mapping = self._once(
            ("method", parts["method"][2]), lambda: self._method(*parts["method"][:2])
        )
        train, profile = (
            self._once(
                (group, parts[group][2]),
                lambda group=group, cls=cls: build(cls, self._settings(group, *parts[group][:2]), group),
            )
            for group, cls in (("train", TrainConfig), ("profile", ProfileConfig))
        )
        protocol, seed = point["protocol"], point["seed"]
        one_of("protocol", protocol, PROTOCOLS)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"seed={seed}: expected a whole number")
        in_range("seed", seed, 0, 2**31 - 1)
        task, task_settings, data = self._once(("task", parts["task"][2]), lambda: self._task(*parts["task"][:2]))
        self._once(("splits", parts["task"][2], protocol), lambda: self._splits(task, protocol))
        method, method_settings, files = self._once(
            ("tasks", parts["method"][2], task.num_tasks),
            lambda: self._with_tasks(method, method_settings, task.num_tasks),
        )
        self._once(
            ("check", parts["model"][2], parts["method"][2], task.formulation, task.num_tasks),
            lambda: self._check(config, method, task.formulation, parts["method"]),
        )
        self._once(
            ("optimizer", train.optimizer, parts["method"][2]),
            lambda: self._check_optimizer(train.optimizer, parts["method"][0], method),
        )
        self._once(
            ("execution", parts["train"][2], parts["method"][2]),
            lambda: self._check_execution(train, parts["method"][0], method),
        )
        recipe = self._once(
            ("recipe", parts["train"][2], parts["method"][0], parts["task"][2], parts["model"][2]),
            lambda: as_dict(
                _complete(train, mapping, self._length(config, task.formulation, train.max_length, task.max_length))
            ),
        )
        self._once(
            ("length", parts["model"][2], parts["method"][2], task.formulation, recipe["max_length"]),
            lambda: self._check_length(config, method, task.formulation, recipe["max_length"]),
        )
        if train.head_learning_rate is not None and task.formulation != "head":
            raise UserError(
                f"train.head_learning_rate={train.head_learning_rate}: task {task_settings['name']} has no head here"
            )
        if train.label_smoothing and task.formulation == "head" and task.num_labels == 1:
            raise UserError(
                f"train.label_smoothing={train.label_smoothing:g}: task {task_settings['name']} is a regression, "
                "which has no classes; expected 0"
            )
        start = None
        if train.start is not None:
            key = (train.start, train.start_task, parts["model"][2], parts["method"][2], task.num_tasks)
            start = self._once(
                ("start", *key),
                lambda: starts.find(str(train.start), train.start_task, model, method, method_settings),
            )
            recipe = {**recipe, "start": start.folder, "start_task": start.task}
        return RunSpec(
            model=model,
            method=method_settings,
            task=task_settings,
            train=recipe,
            profile=as_dict(profile),
            seed=seed,
            protocol=protocol,
            device=self.device,
            identity={
                "weights": weights,
                "data": data,
                "engine": _engine_version(),
                "method": method.version,
                "device_kind": self.device_kind,
                "task": {
                    "num_labels": task.num_labels,
                    "formulation": task.formulation,
                    **({"tasks": task.num_tasks} if task.num_tasks > 1 else {}),
                },
                **({} if files is None else {"method_files": files}),
                **({} if start is None else {"start": start.sha256}),
            },
        )

    def sketch(self, point: Point) -> tuple[RunSpec, Any]:
        """Return the run of one point as far as shapes go, and its task; neither weights nor texts are looked for.

        Without a task it is one of text, for an encoder one of two classes. Raises UserError for whatever does not fit.
        """
        from peftbench.models.load import kind_of, shape_config

        point = self._with_required(dict(point))
        parts = {group: _part(point, group) for group in GROUPS if group in point}
        named = parts["model"], parts["method"]
        config = self._once(("config", named[0][2]), lambda: self._model_config(*named[0][:2]))
        kind = self._once(("kind", named[0][2]), lambda: kind_of(config, shape_config(config)))
        method, settings, _ = self._once(("method", named[1][2]), lambda: self._method(*named[1][:2]))
        train = build(TrainConfig, self._settings("train", *parts["train"][:2]), "train")
        task: Any = AnyTask("head", 128) if kind == "encoder" else AnyTask("text", 512)
        if "task" in parts:
            task = self._once(("bare task", parts["task"][2]), lambda: self._bare_task(*parts["task"][:2]))
        method = method.with_tasks(task.num_tasks)
        length = self._length(config, task.formulation, train.max_length, task.max_length)
        key = (named[0][2], named[1][2], task.formulation)
        self._once(("check", *key, task.num_tasks), lambda: self._check(config, method, task.formulation, named[1]))
        self._once(("length", *key, length), lambda: self._check_length(config, method, task.formulation, length))
        self._check_own_optimizer(train.optimizer, named[1][0], method)
        spec = RunSpec(
            model=as_dict(config),
            method={**settings, **plain(as_dict(method))},
            task={"name": task.name},
            # a learning rate has no shape
            train=as_dict(dataclasses.replace(train, max_length=length, learning_rate=train.learning_rate or 1.0)),
            profile={},
            seed=0,
            protocol="held_out",
            device=self.device,
            identity={},
        )
        return spec, task

    def _bare_task(self, option: str, values: tuple[tuple[str, Any], ...]) -> Any:
        return registry.build_task(self._settings("task", option, values))

    def _with_required(self, point: Point) -> Point:
        """Apply what the method's yaml requires of other groups; an explicit conflict is an error."""
        method = str(point["method"])
        required = self._once(
            ("requires", method), lambda: flatten(registry.section("method", method).get("requires") or {})
        )
        for key, value in required.items():
            if key in point and point[key] != value:
                raise UserError(f"{key}={point[key]}: method {method} requires {key}={value}")
            point[key] = value
        return point

    def sharing(self, spec: RunSpec) -> Sharing:
        """Tell how the run can share a pass through the base."""
        from peftbench.methods.pack import company
        from peftbench.models.roles import packable

        cls = self._once(
            ("class", spec.method["_target_"]), lambda: registry.load_class(spec.method["_target_"], "method")
        )
        family = spec.model.get("family") or (spec.model.get("architecture") or {}).get("model_type")
        plain = spec.train.get("optimizer", DEFAULT_OPTIMIZER) == DEFAULT_OPTIMIZER
        return Sharing(
            cls.traits.packable and packable(family),
            frozenset(cls.traits.free_in_pack),
            # blocks of 8-bit state would lie otherwise than alone
            company(cls.traits.sites, spec.method.get("length")) if plain else None,
        )


@dataclasses.dataclass(frozen=True)
class AnyTask:
    """What a task's shapes are where nobody names one."""

    formulation: str
    max_length: int
    name: str = "any"
    num_labels: int = 2
    num_tasks: int = 1
    task_classes: None = None


def _part(point: Point, group: str) -> tuple[str, tuple[tuple[str, Any], ...], str]:
    """Return what a point says of a group: the option, its own values, and both as text."""
    own = tuple(sorted((k[len(group) + 1 :], v) for k, v in point.items() if k.startswith(f"{group}.")))
    return str(point[group]), own, canonical([point[group], own])


def _set(mapping: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    inner, dot, rest = key.partition(".")
    changed = dict(mapping)
    changed[inner] = _set(changed.get(inner) or {}, rest, value) if dot else value
    return changed


def _complete(train: TrainConfig, method: Mapping[str, Any], length: int) -> TrainConfig:
    """Fill in the learning rate that the method suggests, and the length."""
    rate = train.learning_rate
    if rate is None:
        rate = (method.get("suggested") or {}).get("learning_rate")
        if rate is None:
            raise UserError(
                f"train.learning_rate=null: method {method['name']} suggests none; give train.learning_rate"
            )
    return dataclasses.replace(train, learning_rate=float(rate), max_length=length)


def _engine_version() -> int:
    from peftbench import engine

    return int(engine.VERSION)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs asked for, in packs, with lines worth showing."""

    specs: list[RunSpec]
    resolver: Resolver
    lines: list[str]

    def packs(
        self,
        wanted: Sequence[RunSpec],
        size: int | Callable[[Sequence[RunSpec]], int],
        early: bool = False,
        mix: Callable[[RunSpec], bool] = lambda spec: True,
    ) -> list[Group]:
        """Group `wanted` runs into packs of at most `size`, which may depend on what runs share a base.

        Args:
            mix: whether a run may share a pack with other methods.
        """

        def sharing(spec: RunSpec) -> Sharing:
            share = self.resolver.sharing(spec)
            return share if mix(spec) else dataclasses.replace(share, company=None)

        return packs(wanted, sharing, size, early)


def plan(request: Demand, device: str) -> Plan:
    """Resolve all points of `request`; equal runs collapse. Raises UserError for whatever keeps one from running."""
    names = dict.fromkeys(str(m) for grid in request.grids for m in request.given.get("method", grid["method"]))
    for group in GROUPS:
        for grid in [request.given] if group in request.given else request.grids:
            for option in grid.get(group, ()):
                if group != "model" or ("/" not in str(option) and not Path(str(option)).exists()):
                    registry.check_option(group, str(option))
    found, lines = points(request, {name: registry.declared(name) for name in names})
    resolver = Resolver(device)
    specs: dict[str, RunSpec] = {}
    for point in found:
        spec = resolver.spec(point)
        specs.setdefault(spec.run_id, spec)
    return Plan(list(specs.values()), resolver, lines)
