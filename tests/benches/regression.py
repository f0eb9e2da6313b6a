"""What a user may bring to the training bench: a small regression in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1)).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.body(x) - y).square().mean()


def data(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.sin(x.sum(1, keepdim=True)) + x[:, :1].abs()


def batches(rank: int, world: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        x, y = data(generator, 8 * world)
        yield x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]


def factory(lr: float = 0.02):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    held_out = [data(torch.Generator().manual_seed(k), 50) for k in range(3)]
    return model, optimizer, batches, held_out


def short():
    model, optimizer, more, _ = factory()

    def few(rank: int, world: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for _, batch in zip(range(3), more(rank, world, generator), strict=False):
            yield batch

    return model, optimizer, few


def overflowing():
    class Steep(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return 1e200 * super().forward(x, y)

    model = Steep()
    return model, torch.optim.SGD(model.parameters(), lr=1.0), batches


def wrong():
    return Net()
