"""Small models, a step of training and the list of checks, for the checks that run in several processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import FusedLoRALinear
from lora_kernels.peft.fusing import FusedLinear

K, N, R, ROWS = 24, 40, 4, 8
KINDS = ("module", "peft")
CHECKS: dict[str, tuple[tuple[int, ...], Callable[..., None]]] = {}
"""For the name of each check, the sizes of the groups that it runs in, and a function of the folder."""
SKIPPED: dict[str, str] = {}
"""For the name of each check that cannot run here, the reason."""
NO_FSDP = (
    ""
    if hasattr(torch.cpu.Stream, "record_event") and "ignored_params" in inspect.signature(fully_shard).parameters
    else f"fully_shard runs on CPUs, and takes ignored_params, from torch 2.7 on; this is {torch.__version__}"
)


class Block(nn.Module):
    def __init__(self, width: int = N) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, width), nn.Linear(width, K)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return x + checkpoint(self.mlp, x, use_reentrant=False)
        return x + self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks with adapters on frozen linears, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(K, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def check(
    *kinds: str, sizes: tuple[int, ...] = (2, 4), why_not: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of the folder as a check. With kinds, it is registered once for each kind, which it takes as
    a second argument. `why_not`, if not empty, is the reason why the check is skipped."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        named = {f"{function.__name__}[{kind}]": (lambda folder, kind=kind: function(folder, kind)) for kind in kinds}
        for name, run in named.items() or [(function.__name__, function)]:
            CHECKS[name] = sizes, run
            if why_not:
                SKIPPED[name] = why_not
        return function

    return register


def make(kind: str, p: float = 0.0, *, fused: bool = True) -> nn.Module:
    """Return a model that is the same in every process. It has FusedLoRALinear layers, or PEFT's layers, fused or
    not."""
    torch.manual_seed(0)
    net: nn.Module = Net()
    if kind == "peft":
        config = LoraConfig(
            r=R, lora_alpha=6, lora_dropout=p, target_modules=["up", "down"], modules_to_save=["head"], bias="none"
        )
        net = get_peft_model(net, config)
        if fused:
            lora_kernels.fuse(net, strict=True)
    else:
        for block in net.blocks:
            for name in ("up", "down"):
                linear = getattr(block, name)
                setattr(block, name, FusedLoRALinear.from_linear(linear, r=R, lora_alpha=6, lora_dropout=p))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return net.train()


def blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}


def shard(model: nn.Module, ignored: Iterable[nn.Parameter] = (), **policy: object) -> nn.Module:
    """Shard every block, and then the rest of the model. The parameters in `ignored` stay whole in each process."""
    for part in (*blocks(model), model):
        fully_shard(part, ignored_params=set(ignored), **policy)
    return model


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def batch() -> Tensor:
    return torch.randn(ROWS, 3, K, generator=torch.Generator().manual_seed(1))


def mine(x: Tensor) -> Tensor:
    """Return this process's part of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss(y: Tensor) -> Tensor:
    return y.float().square().mean()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # foreach=False, because the optimizer has both replicated and sharded parameters
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, foreach=False)


def step(model: nn.Module, x: Tensor, before: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Return y, the gradients and the new weights of one step of training, gathered from all shards."""
    optimise = optimizer(model)
    y = model(x)
    loss(y).backward()
    before()
    result = {"y": whole(y)} | {f"grad {name}": whole(p.grad) for name, p in trained(model).items()}
    optimise.step()
    return result | {f"weight {name}": whole(p) for name, p in trained(model).items()}


def equal(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys() and len(got) > 2, (got.keys(), want.keys())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        assert not name.startswith("grad") or value.abs().max() > 0, name


def single(kind: str) -> dict[str, Tensor]:
    """Return what `step` gives in one process for the whole batch. PEFT's model is not fused there."""
    want = step(make(kind, fused=False), batch())
    return want | {"y": mine(want["y"])}


def fused_path_ran(model: nn.Module, kind: str, calls: int = 1) -> None:
    counts = [m.fused_calls for m in model.modules() if isinstance(m, FusedLinear)]
    assert counts == [calls] * (4 if kind == "peft" else 0), counts


def average(parameters: list[nn.Parameter]) -> None:
    """Average over the processes the gradients of parameters that FSDP was told to ignore."""
    for p in parameters:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
