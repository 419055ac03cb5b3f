"""The library's public face: attach a method to any `transformers` model, train it, save it, merge it, take it off.

adapter = peftbench.attach(model, "lora", rank=8, alpha=16)
optimizer = torch.optim.AdamW(adapter.parameters())
...
adapter.save("my-adapter")
adapter.detach()
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftbench.config import build
from peftbench.errors import UserError, nearest
from peftbench.methods import peft_format
from peftbench.methods.base import Delta, LinearDelta, Method, NormDelta, RunDropout, StepEnd, base_parameters
from peftbench.methods.sites import Injection
from peftbench.models.quantized import QuantizedLinear
from peftbench.models.roles import Site, packable, shared_inputs

WEIGHTS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter.json"
FORMAT_VERSION = 1


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """Return a CPU generator that depends on purpose and seed alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Adapter:
    """One method on one model, for all runs of a pack. Made by `attach`.

    Attributes:
        model: the model it sits on (frozen but for weights the method trains itself).
        methods: one settings object a run, all of the same class.
        seeds: one a run; the seed of an adapter whose frozen random tensors came from elsewhere is None.
        deltas: site and delta, in the method's order.
        shared: what the sites' deltas have in common, or None.
        trained: the base's own parameters that train, by name (only methods that cannot be packed have any).
        rewritten: the base's parameters that the method changes itself, by name (likewise).
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], seeds: Sequence[int], *, act: bool = True) -> None:
        """Build the deltas, and put them in at their sites unless someone else does (`act`)."""
        first = methods[0]
        _check_pack(methods, model)
        check_base(first, model)
        first_sites = first.sites(model)
        for method in methods:
            for site in first_sites:
                method.check_site(site)
        self.model = model
        self.methods = list(methods)
        self.seeds: list[int | None] = list(seeds)
        self.runs = len(methods)
        self.trained = first.trained_weights(model)
        self.rewritten = first.rewritten_weights(model)
        base = base_parameters(model)
        self._flags = {name: p.requires_grad for name, p in base.items()}
        # Methods that train the base itself leave it changed; the copy lives on the host to stay out of device memory.
        self._originals = {name: p.detach().to("cpu", copy=True) for name, p in self._changed.items()}
        self._adopted: dict[str, nn.Parameter] = {}
        self._unmerged: dict[str, Tensor] = {}
        self._merged: int | None = None
        self._injection = Injection(self.runs)
        generators = [generator_for("adapter", seed) for seed in seeds]
        deltas, self.shared = type(first).build(first_sites, methods, generators)
        self.deltas: list[tuple[Site, Delta]] = []
        for site, delta in zip(first_sites, deltas, strict=True):
            device = next(site.module.parameters(), next(model.parameters())).device
            self.deltas.append((site, delta.to(device)))
        if self.shared is not None:
            self.shared.to(next(model.parameters()).device)
        for number, dropout in enumerate(self.dropouts(), start=1):
            dropout.number = number
        keys = [_key(site) for site, _ in self.deltas]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError(f"{type(first).__name__}: its settings name {twice[0]!r} twice")
        for p in base.values():
            p.requires_grad_(False)
        for p in self.trained.values():
            p.requires_grad_(True)
        try:
            if act:
                self._injection.add_all(self.deltas, shared_inputs(model))
        except BaseException:
            self.detach()
            raise
        self.train(model.training)

    @property
    def parts(self) -> list[tuple[str, Delta]]:
        """Every delta with the prefix of its tensors' names, the shared one last."""
        return [(_key(site), delta) for site, delta in self.deltas] + (
            [] if self.shared is None else [("shared", self.shared)]
        )

    def dropouts(self) -> Iterator[RunDropout]:
        """Yield the adapter's own dropouts."""
        for _, delta in self.parts:
            yield from (module for module in delta.modules() if isinstance(module, RunDropout))

    @property
    def _changed(self) -> dict[str, nn.Parameter]:
        return self.trained | self.rewritten

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter: deltas' [R, ...], then the base's own (no runs axis)."""
        for key, delta in self.parts:
            for name, parameter in delta.named_parameters():
                yield f"{key}.{name}", parameter
        yield from self.trained.items()

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that trains."""
        return [p for _, p in self.named_parameters()]

    def packed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that carry a leading runs axis."""
        return [p for _, delta in self.parts for p in delta.parameters()]

    def rate_ratios(self) -> list[list[float]]:
        """Return, for each of `packed_parameters`, its learning rate over the run's own, one number a run."""
        return [
            delta.rate_ratios.get(name, [1.0] * delta.runs)
            for _, delta in self.parts
            for name, _ in delta.named_parameters()
        ]

    def rows(self) -> list[tuple[int, int]]:
        """Return, for each of `packed_parameters`, the runs of the pack that it belongs to: (first, after the last)."""
        return [(0, self.runs)] * len(self.packed_parameters())

    def parameter_count(self, run: int = 0) -> int:
        """Return how many parameters `run` trains, padding left out."""
        added = sum(t.numel() for _, delta in self.parts for t in delta.run_state(run).values())
        return added + sum(p.numel() for p in self.trained.values())

    def penalty(self) -> Tensor | None:
        """Return what the method adds to each run's loss [R], or None."""
        terms = [term for _, delta in self.parts if (term := delta.penalty()) is not None]
        return torch.stack(terms).sum(dim=0) if terms else None

    @property
    def watches_steps(self) -> bool:
        """Whether the method acts after optimizer steps, and so needs their gradients."""
        return type(self.methods[0]).after_step.__func__ is not Method.after_step.__func__  # type: ignore[attr-defined]

    @torch.no_grad()
    def after_step(self, end: StepEnd) -> None:
        """Let the method act once the optimizer has made a step."""
        type(self.methods[0]).after_step(self.methods, self.deltas, self.shared, end)

    @torch.no_grad()
    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors` into the model's parameters of those names (a task head saved beside); `detach` restores."""
        for name, tensor in tensors.items():
            parameter = self.model.get_parameter(name)
            self._originals[name] = parameter.detach().to("cpu", copy=True)
            self._adopted[name] = parameter
            parameter.copy_(tensor)

    def condition(self, tasks: Tensor | None) -> None:
        """Tell the deltas each row's task, [R·B], for batches that mix tasks; None where there is one."""
        for _, delta in self.parts:
            delta.tasks = None if tasks is None else tasks.reshape(self.runs, -1)

    def state_dict(self, run: int = 0) -> dict[str, Tensor]:
        """Return one run's saved tensors, without runs axis and padding, as copies.

        Those are what it trains, what it rewrites in the base, and its frozen random tensors where no seed gives them.
        """
        return {name: view.detach().clone().contiguous() for name, view in self._views(run).items()}

    def views(self, run: int) -> dict[str, Tensor]:
        """Return what one run trains, by name: views without runs axis and padding."""
        drawn = self._drawn(run)
        return {name: view for name, view in self._views(run).items() if name not in drawn}

    def between_steps(self, run: int) -> dict[str, dict[str, Tensor]]:
        """Return what one run keeps from step to step beside its parameters: name → tensor, by part of the adapter."""
        return {key: kept for key, delta in self.parts if (kept := delta.between_steps(run))}

    def resume(self, run: int, kept: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `between_steps` gave of a run of another pack; before the first step."""
        for key, delta in self.parts:
            delta.resume(run, kept.get(key, {}))

    def _views(self, run: int) -> dict[str, Tensor]:
        """Return one run's saved tensors as views."""
        state = {f"{key}.{name}": t for key, delta in self.parts for name, t in delta.run_state(run).items()}
        if self.seeds[run] is None:
            state |= self._drawn(run)
        # While a run is merged, what the method rewrote is kept aside.
        return state | {name: self._unmerged.get(name, p) for name, p in self._changed.items()}

    def _drawn(self, run: int) -> dict[str, Tensor]:
        return {f"{key}.{name}": t for key, delta in self.parts for name, t in delta.run_drawn(run).items()}

    def load_state_dict(self, state: dict[str, Tensor], run: int = 0) -> None:
        """Copy one run's tensors in.

        Raises:
            UserError: a tensor is missing, unexpected, or of another shape.
        """
        drawn = set(self._drawn(run))
        expected = set(self._views(run)) - drawn
        odd = sorted(expected ^ (set(state) - drawn))
        if odd:
            where = "missing" if odd[0] in expected else "not part of this adapter"
            raise UserError(f"adapter tensor {odd[0]!r} is {where}")
        for key, delta in self.parts:
            prefix = key + "."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            delta.load_run_state(own, run)
        if drawn & set(state):
            self.seeds[run] = None
        with torch.no_grad():
            for name, p in self._changed.items():
                p.copy_(state[name])

    def save(self, folder: str | Path, run: int = 0, format: str = "peftbench") -> Path:
        """Write one run's adapter to `folder`: tensors (safetensors) and settings (json). Returns the tensors' path.

        Args:
            format: "peftbench", or "peft" for a folder that HF PEFT reads.

        Raises:
            UserError: PEFT has no such method, or cannot hold this adapter (see `PeftFormat`).
        """
        folder = Path(folder)
        method = self.methods[run]
        if format == "peft":
            config, state = peft_format.export(method, self.model, self.state_dict(run) | self._drawn(run))
            names = peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE
        elif format == "peftbench":
            state = self.state_dict(run)
            config = {
                "format_version": FORMAT_VERSION,
                "method": f"{type(method).__module__}.{type(method).__qualname__}",
                "method_version": method.version,
                "settings": method.settings(),
                "model_type": getattr(getattr(self.model, "config", None), "model_type", None),
            }
            if self.seeds[run] is not None and self._drawn(run):
                config |= {"seed": self.seeds[run], "drawn_sha256": self._drawn_digest(run)}
            names = CONFIG_FILE, WEIGHTS_FILE
        else:
            raise UserError(f"format={format!r}: expected 'peftbench' or 'peft'")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        path = folder / names[1]
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path)
        return path

    def _drawn_digest(self, run: int) -> str:
        """Return a fingerprint of the run's frozen random tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._drawn(run).items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def checkpoint_bytes(self, run: int = 0) -> int:
        """Return the size in bytes of the tensor file that `save` would write (the safetensors format)."""
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in sorted(self._views(run).items(), key=lambda item: (-item[1].element_size(), item[0])):
            start, end = end, end + tensor.numel() * tensor.element_size()
            kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[
                tensor.dtype
            ]
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        length = len(json.dumps(header, separators=(",", ":")))
        return 8 + -(-length // 8) * 8 + end

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """Move the adapter's own tensors, as `torch.nn.Module.to` does."""
        for _, delta in self.parts:
            delta.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> Adapter:
        """Switch the adapter's dropout on or off."""
        for _, delta in self.parts:
            delta.train(mode)
        return self

    def eval(self) -> Adapter:
        """Switch the adapter's dropout off."""
        return self.train(False)

    @contextmanager
    def enabled(self, active: bool = True) -> Iterator[None]:
        """Let the adapter act, or not, within the context: `with adapter.enabled(False): ...` gives the bare model.

        Raises:
            UserError: switched off while merged, or for a method that trains the base's own weights.
        """
        if not active and (self._merged is not None or self._changed):
            raise UserError("a merged adapter, or one that trains the base itself, cannot be switched off: detach it")
        with self._injection.switched(active):
            yield

    @torch.no_grad()
    def merge(self, run: int = 0) -> None:
        """Fold one run into the base's weights and stop acting through hooks; the original weights are kept aside.

        Raises:
            UserError: the method declares that it cannot be merged, or a run is merged already.
        """
        if not self.methods[run].traits.mergeable:
            raise UserError(f"{type(self.methods[run]).__name__} cannot be merged into the base's weights")
        if self._merged is not None:
            raise UserError("a run is merged already: unmerge() first")
        modules = dict(self.model.named_modules())
        for site, delta in self.deltas:
            module = modules[site.name]
            if not hasattr(module, "override"):
                for name in ("weight", "bias"):
                    tensor = getattr(module, name, None)
                    if tensor is not None:
                        self._unmerged.setdefault(f"{site.name}.{name}", tensor.detach().clone())
            if isinstance(delta, LinearDelta):
                _merge_linear(site, module, delta, run)
            elif isinstance(delta, NormDelta):
                for name, value in delta.run_state(run).items():
                    getattr(module, name).copy_(value)
            else:
                raise AssertionError(
                    f"{type(delta).__name__} declares itself mergeable but has no weights to merge into"
                )
        self._merged = run
        self._injection.active = False

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's original weights back, exactly, and act through hooks again."""
        if self._merged is None:
            return
        for name, tensor in self._unmerged.items():
            self.model.get_parameter(name).copy_(tensor)
        for site, _ in self.deltas:
            if hasattr(site.module, "restore"):
                cast(Any, site.module).restore()
        self._unmerged.clear()
        self._merged = None
        self._injection.active = True

    @torch.no_grad()
    def detach(self) -> nn.Module:
        """Take the adapter off: hooks gone, weights and gradient flags as they were, bit for bit. Returns the model."""
        self.unmerge()
        self._injection.remove()
        for name, tensor in self._originals.items():
            parameter = (self._changed | self._adopted)[name]
            parameter.copy_(tensor)
            parameter.grad = None
        for name, p in base_parameters(self.model).items():
            p.requires_grad_(self._flags[name])
        return self.model


def _key(site: Site) -> str:
    """Return the prefix of a site's tensors; a sublayer may end in a norm that is a site of its own (Gemma 3)."""
    return f"{site.key}.hidden" if site.kind == "hidden" else site.key


def _merge_linear(site: Site, module: nn.Module, delta: LinearDelta, run: int) -> None:
    """Write frozen map plus delta into the site's slice of `module`'s weight and bias.

    A module that stores its weight in another form (4 bits) computes with a dense one until it is restored.
    """
    rows: Any = slice(None) if site.columns is None else site.columns
    rows = list(rows) if isinstance(rows, tuple) else rows
    dense = cast(Any, module).dense() if hasattr(module, "override") else None
    weight: Any = dense if dense is not None else module.weight.T if site.transposed else module.weight
    bias: Any = getattr(module, "bias", None) if dense is None else cast(Any, module).dense_bias()
    bias = bias.clone() if dense is not None and bias is not None else bias
    new_weight, new_bias = delta.merged(weight[rows], None if bias is None else bias[rows], run)
    weight[rows] = new_weight.to(weight.dtype)
    if new_bias is not None:
        if bias is None:
            raise UserError(f"{site.name} has no bias to merge into")
        bias[rows] = new_bias.to(bias.dtype)
    if dense is not None:
        cast(Any, module).override(weight, bias)


def check_base(method: Method, model: nn.Module) -> None:
    """Raise UserError if the base is stored in 4 bits and the method cannot work on one that is."""
    if not method.traits.quantized_base and any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise UserError(
            f"{type(method).__name__} changes the base's own weights, which are quantized: "
            "expected model.quantization=null"
        )


def check_rows(model: nn.Module, runs: int) -> None:
    """Raise UserError if the model cannot tell the rows of several runs apart."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if runs > 1 and not packable(model_type):
        raise UserError(f"{model_type} models share tensors between rows: {runs} runs cannot share a pass")


def _check_pack(methods: Sequence[Method], model: nn.Module) -> None:
    first = methods[0]
    check_rows(model, len(methods))
    if len(methods) > 1 and not first.traits.packable:
        raise UserError(
            f"{type(first).__name__} trains the base itself: it cannot share it between {len(methods)} runs"
        )
    for method in methods[1:]:
        differing = [k for k, v in first.settings().items() if method.settings().get(k) != v]
        if type(method) is not type(first) or set(differing) - first.traits.free_in_pack:
            raise UserError(f"runs of one pack may differ in {sorted(first.traits.free_in_pack)}, not in {differing}")


def named_method(name: str, settings: dict[str, Any]) -> Method:
    """Build the method of `conf/method/<name>.yaml` with `settings` over the yaml's own.

    Raises:
        UserError: unknown name or setting, wrong type, value out of range.
    """
    # The registry reads the vocabulary through Hydra, which a library user who passes objects need not import.
    from peftbench import registry

    return cast(Method, registry.build_method({**registry.section("method", name), **settings}))


def _saved_class(path: str) -> type[Method]:
    """Return the method class that a saved adapter names, from this package or among the classes already imported."""
    module = path.rpartition(".")[0]
    if module.startswith("peftbench.methods.") and importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
    known: dict[str, type[Method]] = {}
    pending: list[type[Method]] = [*Method.__subclasses__()]
    while pending:
        cls = pending.pop()
        known[f"{cls.__module__}.{cls.__qualname__}"] = cls
        pending.extend(cls.__subclasses__())
    if path not in known:
        raise UserError(f"adapter method {path!r} is not known here{nearest(path, known)}; import its module first")
    return known[path]


def attach(
    model: nn.Module,
    method: str | Method | Sequence[Method],
    runs: int = 1,
    seeds: Sequence[int] | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Adapter:
    """Freeze `model` and put a PEFT method on it.

    Args:
        model: any `transformers` model with a role table (see `peftbench.models.roles`), or any model if `targets`
        names modules.
            A packed model expects batches of rows ordered run by run, [runs·batch, ...].
        method: a method's name ("lora"), a settings object, or one settings object a run. Runs of different methods
            may share the base where all leave the sequence as long as it is, or all lengthen it alike.
        runs: how many independent adapters share the base, when `method` is not a sequence.
        seeds: one seed a run for the adapter's initial values; 0, 1, ... by default.
        tokenizer: for settings that are text, such as a prompt's initial words.
        settings: settings for a method given by name, e.g. `rank=8, targets=["attention.query"]`.

    Raises:
        UserError: unknown method or setting, settings that do not fit the model, runs that cannot share a pack.
    """
    if isinstance(method, str):
        method = named_method(method, settings)
    elif settings:
        raise UserError(f"settings {sorted(settings)} go with a method's name; the object given has its own")
    if runs < 1:
        raise UserError(f"runs={runs}: expected at least 1")
    methods = [method] * runs if isinstance(method, Method) else list(method)
    if tokenizer is not None:
        methods = [m.with_tokenizer(tokenizer) for m in methods]
    seeds = range(len(methods)) if seeds is None else seeds
    if len(seeds) != len(methods):
        raise UserError(f"{len(seeds)} seeds for {len(methods)} runs: expected one seed a run")
    from peftbench.methods.pack import MixedAdapter, groups  # made of adapters itself

    kind = Adapter if len(groups(methods)) == 1 else MixedAdapter
    return kind(model, methods, list(seeds))


def load_adapter(model: nn.Module, folder: str | Path) -> Adapter:
    """Attach the adapter saved in `folder`, by this package or by HF PEFT, to `model`.

    Raises:
        UserError: the folder holds no adapter, or one that does not fit the model.
    """
    folder = Path(folder)
    if (folder / peft_format.CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        method, state, beside = peft_format.read(folder, model)
        adapter = _filled(attach(model, method), state)
        adapter.adopt(beside)
        return adapter
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: no readable adapter ({CONFIG_FILE} and {WEIGHTS_FILE} expected): {error}"
        ) from error
    method = build(_saved_class(config["method"]), config["settings"], "method")
    adapter = _filled(attach(model, method, seeds=[config.get("seed", 0)]), state)
    wanted = config.get("drawn_sha256")
    if wanted is not None and wanted != adapter._drawn_digest(0):
        adapter.detach()
        raise UserError(f"{folder}: seed {config['seed']} gives other random tensors here than where it was saved")
    return adapter


def _filled(adapter: Adapter, state: dict[str, Tensor]) -> Adapter:
    try:
        adapter.load_state_dict(state)
    except UserError:
        adapter.detach()
        raise
    return adapter
