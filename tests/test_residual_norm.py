"""A sublayer's end in one kernel: against plain PyTorch in float64, and where models take it."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.albert.modeling_albert import AlbertLayer
from transformers.models.bert import modeling_bert
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2SelfOutput
from transformers.models.electra.modeling_electra import ElectraOutput
from transformers.models.mpnet.modeling_mpnet import MPNetAttention
from transformers.models.roberta.modeling_roberta import RobertaOutput, RobertaSelfOutput

from peftbench.kernels import residual_norm
from peftbench.kernels.backend import interpreted, traced_for
from peftbench.kernels.noise import Noise
from peftbench.kernels.residual_norm import fits, reference
from peftbench.models import residuals
from tests.conftest import pass_in_interpreter, triton_interprets_loops

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
runs_here = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU, or Triton's interpreter")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
EPS = 1e-12


def problem(shape: tuple[int, ...], dtype: torch.dtype):
    """Return x, residual and an upstream gradient, weight and bias, two runs' seeds."""
    g = torch.Generator().manual_seed(shape[-1])
    x, residual, upstream = (torch.randn(shape, generator=g).to(DEVICE, dtype).requires_grad_() for _ in range(3))
    weight, bias = (torch.randn(shape[-1], generator=g).to(DEVICE, dtype) for _ in range(2))
    return x, residual, upstream.detach(), weight, bias, torch.tensor([3, -9], device=DEVICE)


@runs_here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, 5, 24), (2, 384), (4, 7, 40), (2, 1, 2100)], ids=str)
def test_outputs_and_gradients(shape, p, dtype):
    x, residual, upstream, weight, bias, seeds = problem(shape, dtype)
    assert fits(x, residual, weight, bias)
    out = residual_norm.residual_norm(x, residual, weight, bias, EPS, p, seeds, 7)
    found = [out, *torch.autograd.grad(out, (x, residual), upstream)]
    exact = [t.detach().double().requires_grad_() for t in (x, residual)]
    wanted = reference(*exact, weight.double(), bias.double(), EPS, p, seeds, 7)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    for name, ours, theirs in zip(("out", "x", "residual"), found, wanted, strict=True):
        worst = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert worst < TOLERANCE[dtype], f"{name}: {worst:.1e} of the largest entry"
    assert torch.equal(found[1] == 0, wanted[1] == 0) or p == 0.0  # what is dropped has no gradient


def test_whose_forward_has_these_lines():
    same = [modeling_bert.BertSelfOutput, modeling_bert.BertOutput, RobertaSelfOutput, RobertaOutput, ElectraOutput]
    assert all(residuals.ends_so(kind.forward) for kind in [*same, DebertaV2SelfOutput])
    others = [modeling_bert.BertIntermediate, modeling_bert.BertLayer, AlbertLayer, MPNetAttention, nn.Linear]
    assert not any(residuals.ends_so(kind.forward) for kind in others)

    class Other(modeling_bert.BertOutput):
        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            hidden_states = self.dense(hidden_states)
            hidden_states = self.LayerNorm(hidden_states + input_tensor)
            return self.dropout(hidden_states)

    assert not residuals.ends_so(Other.forward)


def block() -> nn.Module:
    """Return the end of a sublayer with a frozen norm, of two runs' rows."""
    torch.manual_seed(0)
    config = modeling_bert.BertConfig(hidden_size=16, intermediate_size=24, hidden_dropout_prob=0.4)
    module = modeling_bert.BertOutput(config).to(DEVICE).train()
    return module.requires_grad_(False)


def passed(module: nn.Module, monkeypatch: pytest.MonkeyPatch, drawing: bool = True) -> tuple[list[Tensor], int]:
    """Return a forward and backward pass of the module, and how often the kernel was asked."""
    calls = []
    real = residual_norm.residual_norm

    def counted(*given):
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(residual_norm, "residual_norm", counted)
    g = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(4, 3, n, generator=g).to(DEVICE).requires_grad_() for n in (24, 16))
    noise = Noise([1, 2], torch.device(DEVICE))
    if drawing:
        with noise.drawing():
            out = module(x, residual)
            found = [out, *torch.autograd.grad(out.square().sum(), (x, residual))]
    else:
        out = module(x, residual)
        found = [out, *torch.autograd.grad(out.square().sum(), (x, residual))]
    monkeypatch.undo()
    return found, len(calls)


@runs_here
def test_a_model_s_module_gives_the_same_fused_and_as_it_was(monkeypatch):
    module = block()
    plain, none = passed(module, monkeypatch)
    undo = residuals.fuse(module)
    fused, one = passed(module, monkeypatch)
    undo()
    again, last = passed(module, monkeypatch)
    assert (none, one, last) == (0, 1, 0)
    for ours, theirs, after in zip(fused, plain, again, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(after, theirs)


CHANGES = {
    "a hook on dropout": lambda m: m.dropout.register_forward_hook(lambda module, args, out: out),
    "a hook before the norm": lambda m: m.LayerNorm.register_forward_pre_hook(lambda module, args: args),
    "another forward of the norm": lambda m: setattr(m.LayerNorm, "forward", m.LayerNorm.forward),
    "a norm that trains": lambda m: m.LayerNorm.requires_grad_(True),
    "another class of norm": lambda m: setattr(m, "LayerNorm", type("Norm", (nn.LayerNorm,), {})(16).to(DEVICE)),
}


@runs_here
@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_has_changed_is_done_line_by_line(change, monkeypatch):
    module = block()
    CHANGES[change](module)
    plain, _ = passed(module, monkeypatch)
    residuals.fuse(module)
    found, calls = passed(module, monkeypatch)
    assert calls == 0
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@runs_here
def test_dropout_of_no_run_is_left_to_pytorch_and_none_is_needed_in_evaluation(monkeypatch):
    module = block()
    residuals.fuse(module)
    assert passed(module, monkeypatch, drawing=False)[1] == 0
    module.eval()
    assert passed(module, monkeypatch, drawing=False)[1] == 1
    with torch.no_grad():
        x, residual = torch.randn(4, 3, 24, device=DEVICE), torch.randn(4, 3, 16, device=DEVICE)
        monkeypatch.setattr(residual_norm, "residual_norm", lambda *given: pytest.fail("asked"))
        module(x, residual)


def test_a_cpu_takes_the_lines():
    x, residual, _, weight, bias, _ = problem((2, 3, 8), torch.float32)
    assert fits(x.cpu(), residual.cpu(), weight.cpu(), bias.cpu()) == interpreted()


def test_only_the_sum_is_kept_where_shapes_stand_for_a_gpu_s():
    x, residual = (torch.empty(4, 3, 8, device="meta", requires_grad=True) for _ in range(2))
    weight, seeds = torch.empty(8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    held: list[Tensor] = []
    with traced_for("cuda"):
        assert fits(x, residual, weight, weight)
        with saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
            out = residual_norm.residual_norm(x, residual, weight, weight, EPS, 0.1, seeds, 1)
        gradients = torch.autograd.grad(out, (x, residual), torch.empty_like(out))
    assert [tuple(t.shape) for t in held] == [(4, 3, 8), (8,), (2,)]
    assert [g.shape for g in gradients] == [x.shape, x.shape]
    with traced_for("cpu"):
        assert not fits(x, residual, weight, weight)


@pytest.mark.skipif(interpreted(), reason="runs the tests above in the interpreter")
@pytest.mark.skipif(not triton_interprets_loops(), reason="needs Triton 3.7, or Triton and NumPy before 2.4")
def test_the_kernels_in_tritons_interpreter():
    pass_in_interpreter(__file__)
