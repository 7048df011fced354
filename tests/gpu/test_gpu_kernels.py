"""The results of the GPU back-ends on a GPU: values, gradients and masks, on several streams and in CUDA graphs.

    python -m pytest tests/gpu [--backend cuda] [--device cpu]

``--device cpu`` runs the same tests with the back-ends of the CPU, which checks the tests where there is no GPU.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType

import pytest
import torch
from support import judging
from torch import Tensor

from benchmarks.endurance import differences, run
from lora_kernels import FusedLoRALinear
from lora_kernels.backends import dispatch
from lora_kernels.core.dropout import keep_mask, rescale
from lora_kernels.core.operands import Call
from lora_kernels.testing import one_layer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(40)]  # A kernel that hangs holds its worker for that long.

BACKENDS = {"cuda": ("composite", "triton", "cuda"), "cpu": ("cpu", "eager")}
LARGER = [  # M, N, K, R
    (257, 520, 1032, 24),
    (1000, 264, 136, 48),
    (130, 1032, 520, 200),
    (513, 72, 2056, 12),
    (640, 512, 768, 64),
]
DECODE = [(1, 1024, 2048, 16), (2, 264, 4104, 8), (16, 1024, 1024, 64), (17, 520, 1032, 16), (64, 2048, 512, 33)]
VARIETY = list(itertools.product(judging.DTYPES, [0.0, 0.3], [False, True]))
"""(dtypes, p, strided). Each shape is tested with two of them. Over all shapes, every one occurs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.getoption("--backend") or BACKENDS[metafunc.config.getoption("--device")]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device("cuda", 0) if pytestconfig.getoption("--device") == "cuda" else torch.device("cpu")


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest, device: torch.device) -> ModuleType:
    """Return the module of a back-end. Skip the test, with all reasons, where it does not serve this device."""
    try:
        module = importlib.import_module(f"lora_kernels.backends.{request.param}")
    except ImportError as error:
        pytest.skip(f"{request.param} could not be loaded: {error}")
    reasons = module.why_not(Call("forward", device, torch.bfloat16, torch.bfloat16, 64, 64, 64, 16, True))
    if reasons:
        pytest.skip(f"{request.param} does not serve this device: {'; '.join(reasons)}")
    return module


def served(
    module: ModuleType, device: torch.device, shape: tuple[int, int, int, int], number: int, **kwargs
) -> judging.Problem:
    """Return a problem of about `shape` that the back-end serves. `cuda` needs x in 16 bits, and N and K that are
    multiples of 8."""
    M, N, K, R = shape if device.type == "cuda" else (min(size, 64) for size in shape)
    choice = {"dtype": torch.bfloat16, **kwargs}
    call = Call("forward", device, choice["dtype"], choice.get("adapter_dtype", choice["dtype"]), M, N, K, R, True)
    if module.why_not(call):
        N, K = (-(-size // 8) * 8 for size in (N, K))
        if module.why_not(call._replace(N=N, K=K)):
            choice["dtype"] = torch.float16
            choice["adapter_dtype"] = torch.float32 if number % 2 else torch.float16
            call = call._replace(dtype=torch.float16, adapter_dtype=choice["adapter_dtype"])
        assert not module.why_not(call._replace(N=N, K=K)), "a back-end serves 16 bits and multiples of 8"
    return judging.problem(M, N, K, R, seed=number, device=device, **choice)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("number", "shape"), list(enumerate([*judging.SHAPES, *LARGER, *DECODE])))
def test_values_and_gradients_are_right(backend, device, number, shape, turn, poison) -> None:
    (dtype, adapter_dtype), p, strided = VARIETY[(7 * number + 10 * turn) % len(VARIETY)]
    q = served(
        backend,
        device,
        shape,
        number,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        p=p,
        strided=strided,
        bias=number % 3 > 0,
    )
    before = {name: t.clone() for name, t in vars(q).items() if isinstance(t, Tensor)}
    got = judging.backend_results(backend, q)
    judging.check(got, q)
    for name, t in before.items():
        assert torch.equal(getattr(q, name), t), f"{name} was written to"
    assert all(t.is_contiguous() for t in got.values())
    assert [got[name].dtype for name in ("y", "dx", "da", "db")] == [q.x.dtype, q.x.dtype, q.a.dtype, q.a.dtype]


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adapters_in_fp32_get_gradients_in_fp32(backend, device, adapter_dtype) -> None:
    q = served(backend, device, (300, 256, 192, 16), 1, adapter_dtype=adapter_dtype, p=0.1)
    got = judging.backend_results(backend, q)
    judging.check(got, q)
    rounded = [torch.equal(got[name], got[name].bfloat16().to(got[name].dtype)) for name in ("da", "db")]
    assert rounded == [adapter_dtype == torch.bfloat16] * 2


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_mask_is_the_rule_bit_for_bit(backend, device, p) -> None:
    """With w = 0, a = b = I and x = dy = 1, each of y, h and dx is c times the mask."""
    M, K = 300, 128
    seed = torch.tensor(2**40 + 12345, device=device)
    x, w, eye = torch.ones(M, K, device=device), torch.zeros(K, K, device=device), torch.eye(K, device=device)
    x, w, eye = (t.bfloat16() for t in (x, w, eye))
    keep = keep_mask(seed, M, K, p)
    y, h = one_layer.forward(backend, x, w, eye, eye, None, 1.0, p, seed, True)
    dx, _, _ = one_layer.backward(backend, torch.ones_like(y), x, w, eye, eye, h, 1.0, p, seed, True, True, True)
    for name, got in (("y", y), ("h", h), ("dx", dx)):
        want = torch.where(keep, torch.tensor(rescale(p), device=device), 0.0).to(got.dtype)
        assert torch.equal(got, want), f"{name}: {(got != want).sum().item()} of {got.numel()} elements differ"


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(700, 512, 384, 16), (16, 2048, 1024, 32)], ids=str)
def test_runs_are_bit_identical(backend, device, shape, p) -> None:
    q = served(backend, device, shape, 2, p=p)
    first = run(backend, q)
    for _ in range(20):
        assert differences(run(backend, q), first) == []


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)], ids=str
)
def test_only_the_wanted_gradients_are_computed(backend, device, needs) -> None:
    q = served(backend, device, (200, 136, 264, 16), 3, p=0.2)
    all_of_them = run(backend, q)
    _, need_da, need_db = needs
    x, h = (q.x if need_da else None), (all_of_them["h"] if need_db else None)
    got = one_layer.backward(backend, q.dy, x, q.w, q.a, q.b, h, q.scale, q.p, q.seed, *needs)
    for name, value, needed in zip(("dx", "da", "db"), got, needs, strict=True):
        assert (value is not None) == needed
        if needed:
            judging.check({name: value}, q)


def test_a_module_trains_as_with_eager(backend, device) -> None:
    """A module that asks for the back-end by name has nearly the losses of eager over a few training steps."""
    if backend.name not in dispatch.BACKENDS:
        pytest.skip(f"dispatch knows no back-end {backend.name!r}")
    losses = []
    for name in (backend.name, "eager"):
        torch.manual_seed(1)
        layer = FusedLoRALinear(256, 192, r=16, lora_dropout=0.1, dtype=torch.bfloat16, device=device, backend=name)
        torch.nn.init.normal_(layer.lora_B)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-3)
        x, target = (torch.randn(4, 40, n, device=device, dtype=torch.bfloat16) for n in (256, 192))
        losses.append([])
        for _ in range(4):
            loss = (layer(x) - target).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("only a GPU has streams and graphs")
    return device


def test_launches_on_two_streams_do_not_disturb_each_other(backend, cuda) -> None:
    problems = [
        served(backend, cuda, shape, 4 + i, p=0.1)
        for i, shape in enumerate([(1500, 1024, 768, 16), (900, 768, 1024, 64)])
    ]
    alone = [run(backend, q) for q in problems]
    torch.cuda.synchronize()
    streams, together = [torch.cuda.Stream() for _ in problems], [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(run(backend, problems[i]))
    torch.cuda.synchronize()
    for i, want in enumerate(alone):
        assert {name for got in together[i] for name in differences(got, want)} == set()


def test_the_current_stream_is_respected(backend, cuda) -> None:
    """x is filled late, on a side stream. A launch on any other stream would read it too early."""
    q = served(backend, cuda, (512, 512, 512, 16), 6)
    want = run(backend, q)
    late = q.x.clone()
    q.x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        q.x.copy_(late)
        got = run(backend, q)
        got = {name: value.clone() for name, value in got.items()}
    stream.synchronize()
    assert differences(got, want) == []


@pytest.mark.parametrize("shape", [(333, 256, 512, 16), (4, 1024, 1024, 16)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_graph_gives_the_bits_of_a_call(backend, cuda, shape, p) -> None:
    """A graph that is replayed with other inputs, the seed among them, gives the bits of a call. A call between two
    replays is not disturbed either."""
    q, *others = (served(backend, cuda, shape, 7 + i, p=p) for i in range(4))
    want = [run(backend, each) for each in others]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(backend, q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(backend, q)
    for turn in range(12):
        inputs = others[turn % len(others)]
        for name in ("x", "w", "a", "b", "bias", "dy", "seed"):
            if getattr(q, name) is not None:
                getattr(q, name).copy_(getattr(inputs, name))
        graph.replay()
        beside = run(backend, inputs)  # on the same stream, with the stream's own workspace
        torch.cuda.synchronize()
        assert differences(got, want[turn % len(others)]) == [], f"replay {turn}"
        assert differences(beside, want[turn % len(others)]) == [], f"a call after replay {turn}"


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("rows", [16, 300])
def test_a_layer_trains_under_reduce_overhead(backend, cuda, rows, p) -> None:
    """torch.compile captures a graph of its own, in whose pool nothing may be left alive. Without dropout the losses
    are those of the layer that is not compiled. With dropout a compiled layer draws other seeds."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(2)
        layer = FusedLoRALinear(256, 192, r=16, lora_dropout=p, dtype=torch.bfloat16, device=cuda, backend=backend.name)
        torch.nn.init.normal_(layer.lora_B)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-3)
        forward = torch.compile(layer, mode="reduce-overhead", fullgraph=True) if compiled else layer
        x = torch.randn(rows, 256, device=cuda, dtype=torch.bfloat16)
        losses.append([])
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            loss = forward(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert all(each[-1] < each[0] for each in losses)
    assert p > 0 or losses[0] == pytest.approx(losses[1], rel=0.02)
