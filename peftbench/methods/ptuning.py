"""P-tuning: virtual tokens that a small recurrent network makes out of trained vectors.

    encoder "lstm": f(x) = model([MLP([LSTM→(V) ; LSTM←(V)]); E(x)]),    MLP: linear, ReLU, linear
    encoder "mlp":  f(x) = model([MLP(V); E(x)]),                         MLP: linear, ReLU, linear, ReLU, linear

Source: Liu et al. 2021, arXiv:2103.10385, section 3.2 ("bidirectional LSTM" and "ReLU activated two-layer MLP"); the
encoder without a recurrence is the authors' later one and HF PEFT's default. V is length×D and starts normal with
standard deviation 1, everything else uniform as in PyTorch's own layers, the references' way. Dropout acts between the
layers of the LSTM. After training only the virtual tokens matter: `format="peft"` exports those, while a folder of this
package keeps what was trained.

Deviation: all virtual tokens stand in front of the input, as in HF PEFT; the paper also puts some between the parts of
a hand-written template, and trains the language model along in its supervised experiments. On bidirectional
classifiers the pooled token stays the task's own: the virtual tokens are cut off at the model's output, where HF PEFT
leaves them in the sequence and BERT's pooler reads the first of them.

Letters: runs R, virtual tokens P, width D, hidden size H. The two directions of a layer are one batch of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.methods.base import Card, EmbeddingDelta, Method, RunDropout, Traits, normal, require, uniform
from peftbench.methods.peft_format import PeftFormat
from peftbench.methods.prompt import check_length, prompt_config
from peftbench.models.roles import Site, find_sites

DIRECTIONS = ("", "_reverse")


def linear(x: Tensor, tensors: Mapping[str, Tensor], number: int) -> Tensor:
    """Apply the encoder's linear layer `number` to x [R, P, D_in]."""
    return torch.baddbmm(tensors[f"bias_{number}"].unsqueeze(1), x, tensors[f"weight_{number}"])


def lstm(x: Tensor, tensors: Mapping[str, Tensor], layer: int) -> Tensor:
    """Apply one bidirectional layer to x [R, P, D_in]; returns [R, P, 2·H].

    i, f, g, o = W x_t + b + U h_{t−1} + b',   c_t = σ(f) c_{t−1} + σ(i) tanh(g),   h_t = σ(o) tanh(c_t)
    """
    bias = tensors[f"input_bias_{layer}"] + tensors[f"recurrent_bias_{layer}"]
    gates = torch.stack([x, x.flip(1)], dim=1) @ tensors[f"input_{layer}"] + bias.unsqueeze(2)
    recurrent = tensors[f"recurrent_{layer}"]
    hidden = cell = gates.new_zeros(*gates.shape[:2], 1, recurrent.shape[2])
    states = []
    for gate in gates.split(1, dim=2):
        i, f, g, o = (gate + hidden @ recurrent).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        states.append(hidden)
    forward, backward = torch.cat(states, dim=2).unbind(1)
    return torch.cat([forward, backward.flip(1)], dim=-1)


def virtual_tokens(tensors: Mapping[str, Tensor], dropout: nn.Module) -> Tensor:
    """Return the virtual tokens [R, P, D] that the encoder's tensors give."""
    x = tensors["embedding"]
    layers = sum(name.startswith("input_bias_") for name in tensors)
    for layer in range(layers):
        x = lstm(x if layer == 0 else dropout(x), tensors, layer)
    linears = 2 if layers else 3
    for number in range(linears):
        x = linear(x if number == 0 else x.relu(), tensors, number)
    return x


class EncodedPrompt(EmbeddingDelta):
    """Virtual tokens from the encoder."""

    def __init__(self, site: Site, methods: Sequence[PTuning], generators: Sequence[torch.Generator]) -> None:
        super().__init__(len(methods))
        starts = [_initial(m, site.width, g) for m, g in zip(methods, generators, strict=True)]
        for name in starts[0]:
            self.stack(name, [start[name] for start in starts])
        self.dropout = RunDropout([m.dropout for m in methods])

    def prompt(self) -> Tensor:
        return virtual_tokens(dict(self.named_parameters()), self.dropout)


def _initial(method: PTuning, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return one run's tensors before training."""
    size = method.hidden
    tensors = {"embedding": normal((method.length, width), 1.0, generator)}
    if method.encoder == "lstm":
        bound = size**-0.5
        for layer in range(method.layers):
            rows = width if layer == 0 else 2 * size
            tensors[f"input_{layer}"] = uniform((2, rows, 4 * size), bound, generator)
            tensors[f"recurrent_{layer}"] = uniform((2, size, 4 * size), bound, generator)
            tensors[f"input_bias_{layer}"] = uniform((2, 4 * size), bound, generator)
            tensors[f"recurrent_bias_{layer}"] = uniform((2, 4 * size), bound, generator)
    for number, (rows, columns) in enumerate(method.linears(width)):
        tensors[f"weight_{number}"] = uniform((rows, columns), rows**-0.5, generator)
        tensors[f"bias_{number}"] = uniform((columns,), rows**-0.5, generator)
    return tensors


class PTuningFormat(PeftFormat):
    """PEFT's P-tuning, written only: a file holds the virtual tokens alone and is read as prompt tuning."""

    peft_type = "P_TUNING"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return False

    def config(self, method: PTuning, model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            **prompt_config(model, method.length),
            "encoder_reparameterization_type": method.encoder.upper(),
            "encoder_hidden_size": method.hidden,
            "encoder_num_layers": method.layers if method.encoder == "lstm" else 2,
            "encoder_dropout": method.dropout,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        raise AssertionError("a folder of P-tuning is read as prompt tuning")

    def tensors(self, method: PTuning, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: t.unsqueeze(0) for name, t in _bare(sites, state).items()}
        if not own:
            return {}
        return {"prompt_embeddings": virtual_tokens(own, nn.Identity())[0]}

    def state(self, method: PTuning, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("a folder of P-tuning is read as prompt tuning")

    def parameters(self, method: PTuning, sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = _bare(sites, state)
        if not own:
            return {}
        found = {"embedding.weight": own["embedding"]}
        for number in range(len(method.linears(sites[0].width))):
            found[f"mlp_head.{2 * number}.weight"] = own[f"weight_{number}"].T
            found[f"mlp_head.{2 * number}.bias"] = own[f"bias_{number}"]
        for layer in range(method.layers if method.encoder == "lstm" else 0):
            for direction, suffix in enumerate(DIRECTIONS):
                for ours, theirs in (("input", "ih"), ("recurrent", "hh")):
                    found[f"lstm_head.weight_{theirs}_l{layer}{suffix}"] = own[f"{ours}_{layer}"][direction].T
                    found[f"lstm_head.bias_{theirs}_l{layer}{suffix}"] = own[f"{ours}_bias_{layer}"][direction]
        return {f"prompt_encoder.{name}": t for name, t in found.items()}


def _bare(sites: Sequence[Site], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{sites[0].key}."): t for name, t in state.items()}


@dataclass(frozen=True)
class PTuning(Method):
    """Virtual tokens in front of the input, made by a small LSTM or MLP."""

    length: int = 20
    encoder: str = "lstm"
    hidden: int = 128
    layers: int = 2
    dropout: float = 0.0

    traits = Traits(
        sites=("embedding",),
        mergeable=False,
        identity_at_init=False,
        free_in_pack=frozenset({"dropout"}),
    )
    card = Card(
        equation="f([encoder(V); E(x)])",
        paper="Liu et al. 2021, arXiv:2103.10385",
        parameters="lstm: P D + 8 H (D + H + 2) + 8 H (3 H + 2) a further layer + (2 H + 1)(2 H + D); "
        "mlp: P D + H (D + 1) + (H + 1)(H + D)",
    )
    peft = PTuningFormat()

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number of at least 1")
        require(self.encoder in ("lstm", "mlp"), "encoder", self.encoder, "'lstm' or 'mlp'")
        require(self.hidden >= 1, "hidden", self.hidden, "a whole number of at least 1")
        require(self.layers >= 1, "layers", self.layers, "a whole number of at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")

    def linears(self, width: int) -> list[tuple[int, int]]:
        """Return rows and columns of the encoder's linear layers for a model of `width`."""
        size = self.hidden
        if self.encoder == "lstm":
            return [(2 * size, 2 * size), (2 * size, width)]
        return [(width, size), (size, size), (size, width)]

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(model, "embedding")

    def check_site(self, site: Site) -> None:
        check_length(site, self.length)

    @classmethod
    def delta(cls, site: Site, methods: Sequence[PTuning], generators: Sequence[torch.Generator]) -> EncodedPrompt:
        return EncodedPrompt(site, methods, generators)

    def count(self, site: Site) -> int:
        size, width = self.hidden, site.width
        recurrent = 0
        if self.encoder == "lstm":
            inputs = width + (self.layers - 1) * 2 * size
            recurrent = 8 * size * (inputs + self.layers * (size + 2))
        return self.length * width + recurrent + sum((rows + 1) * columns for rows, columns in self.linears(width))
