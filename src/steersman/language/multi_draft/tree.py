r"""A tree of drafts, and what a model says behind each of its nodes in one forward.

Node i holds one token and sees the text, its ancestors and itself:

.. math:: \mathrm{mask}_{ij} = 0 \text{ if } j \text{ is text, an ancestor of } i, \text{ or } i, \quad
          -\infty \text{ otherwise}, \qquad \mathrm{position}_i = T + \mathrm{depth}_i .

So the logits behind node i are those behind the text and the path to i. The mask is added to the scores: a boolean one
would be taken for zeros and ones by eager attention, silently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from steersman.errors import InputError

ROOT = -1


@functools.cache
def families(n: int, depth: int, most: int) -> tuple[tuple[int, ...], ...]:
    """Which places of a tree have children: for each place (0 is the root) those of its n children, or nothing.

    Levels are filled one after another, in a level first the parents whose child numbers on the way sum to least,
    until there is no room for n more of ``most`` places. The cut looks at depth and child numbers only: to drop drafts
    for the tokens that they turned out to be would change the law that they were drawn from.
    """
    children: list[tuple[int, ...]] = [()]
    level = [(0, 0)]
    for _ in range(depth):
        following = []
        for rank, place in sorted(level):
            if len(children) - 1 + n > most:
                break
            children[place] = tuple(range(len(children), len(children) + n))
            following += [(rank + k, child) for k, child in enumerate(children[place])]
            children += [()] * n
        level = following
    return tuple(children)


class Tree:
    """Tokens drafted behind one text. Drafts of one family that coincide share a node.

    Args:
        length: T, tokens of the text.
        device: of the models.

    Attributes:
        tokens, parents, depths: of each node (a parent is -1 for the root, the text's last token).
        drafts: the drafts of each node's family, as drawn, (1, n).
        proposals: the law (1, V) that they were drawn from.
    """

    def __init__(self, length: int, device: Any) -> None:
        self.length, self.device = length, device
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.children: dict[int, dict[int, int]] = {ROOT: {}}
        self.drafts: dict[int, Tensor] = {}
        self.proposals: dict[int, Tensor] = {}
        self.sees = torch.zeros(0, 0, dtype=torch.bool, device=device)  # (N, N): ancestors and itself

    def add(self, parent: int, tokens: list[int]) -> list[int | None]:
        """Children of ``parent``: for each token its new node, or None where there is no token (-1) or it has one."""
        made: list[int | None] = []
        for token in tokens:
            if token < 0 or token in self.children[parent]:
                made.append(None)
                continue
            node = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(0 if parent == ROOT else self.depths[parent] + 1)
            self.children[parent][token] = node
            self.children[node] = {}
            made.append(node)
        return made

    def grown(self) -> None:
        """Bring ``sees`` up to the nodes that were added; their parents are in it."""
        old, new = len(self.sees), len(self.tokens)
        sees = torch.zeros(new, new, dtype=torch.bool, device=self.device)
        sees[:old, :old] = self.sees
        for node in range(old, new):
            if self.parents[node] != ROOT:
                sees[node] = sees[self.parents[node]]
            sees[node, node] = True
        self.sees = sees

    def path(self, node: int) -> list[int]:
        """The tokens from the root to ``node``."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]


class Branching:
    """A model and its key-value cache over one text and nodes of a tree behind it.

    Args:
        model: a decoder-only model with full attention that takes masks of four dimensions and position ids.
        cache: its empty cache.
        parameter: what the model is called in a sentence.

    Raises:
        InputError: on the first call, a model that gives other logits to a tree than to its paths.
    """

    _takes_tree: MutableMapping[Any, bool] = WeakKeyDictionary()  # what was found out about each model

    def __init__(self, model: Any, cache: DynamicCache, parameter: str = "model") -> None:
        self.model, self.cache, self.parameter = model, cache, parameter
        self.text = 0  # columns of text in the cache
        self.nodes: list[int] = []  # the nodes in the columns behind them
        self.calls = 0
        self._few = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, ids: Tensor, tree: Tree, nodes: list[int]) -> Tensor:
        """Feed what the cache lacks of the text ``ids`` (T,), and ``nodes``, whose ancestors were fed before or are
        among them; logits behind the text's last token, if that is new, and behind each node, (.., V)."""
        self.check(ids)
        self.calls += 1
        return self._forward(ids, tree, nodes)

    def _forward(self, ids: Tensor, tree: Tree, nodes: list[int]) -> Tensor:
        device = self.model.device
        ids, sees_of = ids.to(device), tree.sees.to(device)
        new = len(ids) - self.text
        held = self.text + len(self.nodes)
        tokens = torch.cat([ids[self.text :], torch.tensor([tree.tokens[i] for i in nodes], device=device).to(ids)])
        sees = torch.zeros(new + len(nodes), held + new + len(nodes), dtype=torch.bool, device=device)
        sees[:, : self.text] = True
        sees[:new, held : held + new] = torch.ones(new, new, dtype=torch.bool, device=device).tril()
        sees[new:, held : held + new] = True
        fed = torch.tensor(self.nodes, dtype=torch.long, device=device)
        rows = torch.tensor(nodes, dtype=torch.long, device=device)
        sees[new:, self.text : held] = sees_of[rows][:, fed]
        sees[new:, held + new :] = sees_of[rows][:, rows]
        dtype = self.model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
        depths = torch.tensor([tree.depths[i] for i in nodes], dtype=torch.long, device=device)
        position = torch.cat([torch.arange(self.text, len(ids), device=device), len(ids) + depths])
        wanted = len(nodes) + (new > 0)
        few = {"logits_to_keep": wanted} if self._few else {}
        output = self.model(
            tokens[None],
            attention_mask=mask[None, None],
            position_ids=position[None],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **few,
        )
        self.text, self.nodes = len(ids), [*self.nodes, *nodes]
        return output.logits[0, -wanted:].to(tree.device)

    def keep(self, path: list[int]) -> None:
        """Make the first nodes of ``path`` that are in the cache columns of the text, and drop the others."""
        columns = []
        for node in path:
            if node not in self.nodes:
                break
            columns.append(self.text + self.nodes.index(node))
        end = self.text + len(columns)
        layers: Any = self.cache.layers
        for layer in layers:
            for states in (layer.keys, layer.values):
                states[:, :, self.text : end] = states[:, :, columns]
            layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]
        self.text, self.nodes = end, []

    def check(self, ids: Tensor) -> None:
        """Refuse a model whose logits behind a node are not those behind its path; looked at once for each model."""
        if self.model not in self._takes_tree:
            self._takes_tree[self.model] = _tree_agrees(self.model, ids[:8])
        if not self._takes_tree[self.model]:
            name = f"{type(self.model).__name__} with {self.model.config._attn_implementation} attention"
            raise InputError(self.parameter, name, "a model that takes a tree of tokens, by mask and position ids")


def _tree_agrees(model: Any, ids: Tensor) -> bool:
    """Whether a tree of three nodes gets the logits of its paths."""
    first = int(ids[0])
    second = first - 1 if first else 1
    tree = Tree(len(ids), ids.device)
    tree.add(ROOT, [first, second])
    tree.add(1, [first])
    tree.grown()
    try:
        found = Branching(model, DynamicCache())._forward(ids, tree, [0, 1, 2])[1:]
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise  # says nothing of the model, and must not be remembered
        return False
    with torch.no_grad():
        paths = [torch.cat([ids, torch.tensor(tree.path(node)).to(ids)]) for node in range(3)]
        wanted = torch.stack([model(path[None]).logits[0, -1] for path in paths])
    rounding = 1e-4 if torch.finfo(model.dtype).bits >= 32 else 3e-2
    difference, spread = (found - wanted).float(), (wanted - wanted.mean(-1, keepdim=True)).float()
    return bool(difference.norm() <= rounding * spread.norm() + 1e-12)
