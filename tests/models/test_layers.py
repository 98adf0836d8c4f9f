"""linear_gelu of models/layers.py: oneDNN's single pass where it may be taken, the layer's own call everywhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fourdperf.models.layers import linear_gelu

FUSED = "mkldnn::_linear_pointwise"


def case(dtype=torch.float32, features=48, hidden=96):
    torch.manual_seed(0)
    return nn.Linear(features, hidden).to(dtype), torch.randn(2, 70, features, dtype=dtype) * 2


def ops_of(function):
    with torch.profiler.profile() as profile:
        result = function()
    return result, {event.key for event in profile.key_averages()}


def fused_here(dtype):
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_as_exact_as_two_calls(dtype, approximate):
    layer, x = case(dtype)
    exact = F.gelu(copy.deepcopy(layer).double()(x.double()), approximate=approximate)
    with torch.no_grad():
        got, ops = ops_of(lambda: linear_gelu(x, layer, approximate))
        plain = F.gelu(layer(x), approximate=approximate)
    assert (FUSED in ops) == fused_here(dtype)
    assert got.dtype == dtype and got.shape == (2, 70, 96)
    error, allowed = ((y.double() - exact).abs().max() for y in (got, plain))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("shape", [(48,), (5, 48), (1, 0, 48), (2, 3, 4, 48)], ids=str)
def test_every_shape(shape):
    layer, _ = case()
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(linear_gelu(x, layer), F.gelu(layer(x)))


def test_views_and_layers_without_bias():
    layer, x = case()
    bare = nn.Linear(48, 96, bias=False)
    with torch.no_grad():
        for view in (x.transpose(0, 1), x[:, ::3], x[..., :1].expand(-1, -1, 48)):
            torch.testing.assert_close(linear_gelu(view, layer, "tanh"), F.gelu(layer(view), approximate="tanh"))
            torch.testing.assert_close(linear_gelu(view, bare), F.gelu(bare(view)))


def test_gradients_are_the_layers():
    layer, x = case()
    (got, want) = (
        torch.autograd.grad(y.square().sum(), layer.weight)[0] for y in (linear_gelu(x, layer), F.gelu(layer(x)))
    )
    assert torch.equal(got, want)


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def _subclass(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Doubled(48, 96)
    other.load_state_dict(layer.state_dict())
    return other


def _replaced(layer):
    call = layer.forward
    layer.forward = lambda x: 2 * call(x)
    return layer


@pytest.mark.parametrize("change", [_hooked, _subclass, _replaced])
@torch.no_grad()
def test_a_changed_layer_is_called(change):
    layer, x = case()
    want = F.gelu(2 * layer(x))
    assert torch.equal(linear_gelu(x, change(layer)), want)


@torch.no_grad()
def test_derivatives_and_modes_see_the_layer():
    layer, x = case()
    tangent = torch.randn_like(x)
    got, want = (
        torch.func.jvp(f, (x,), (tangent,))[1] for f in (lambda x: linear_gelu(x, layer), lambda x: F.gelu(layer(x)))
    )
    assert torch.equal(got, want)
    with FlopCounterMode(display=False) as counter:
        linear_gelu(x, layer)
    assert counter.get_total_flops() == 2 * 140 * 48 * 96
    assert torch.equal(torch.vmap(lambda x: linear_gelu(x, layer))(x), F.gelu(layer(x)))


def test_errors_are_the_layers():
    layer, x = case()
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear_gelu(x[..., 1:], layer)


@torch.no_grad()
def test_autocast_and_compile_see_the_layer():
    layer, x = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_gelu(x, layer), F.gelu(layer(x)))
    compiled = torch.compile(lambda x: linear_gelu(x, layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.gelu(layer(x)))
