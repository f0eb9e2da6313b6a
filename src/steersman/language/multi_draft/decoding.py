r"""Multi-draft speculative decoding: a tree of drafts, checked from its root by the target in one forward.

At every node of the tree n children are drawn from the draft's law q(. | path). The target's laws p(. | path) at all
nodes come from one forward. Then, from the root: the verifier keeps one of the children, which is the next node, or
emits another token, and the round ends; behind a leaf the token comes from p itself. Each token that is emitted has the
law p(. | text so far), whatever was drafted, so the text has the target's law.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria

from steersman.errors import InputError
from steersman.language.multi_draft.laws import (
    SAMPLERS,
    VERIFIERS,
    draw,
    draw_tokens,
    fits,
    one_of,
    order_of,
    sampler_of,
)
from steersman.language.multi_draft.tree import ROOT, Branching, Tree, families
from steersman.language.multi_draft.verification import kernel
from steersman.language.speculation import Law, SpeculationRecord, check_pair
from steersman.language.vocabularies import fitted


class MultiDraft:
    r"""Multi-draft speculative decoding (Hu et al., 2025), as a loop for ``model.generate``.

    .. math:: d_1, \dots, d_n \sim q(\cdot \mid x), \qquad y \sim K(\cdot \mid d), \qquad
              \sum_d P(d) K(y \mid d) = p(y \mid x)

    at every node x of a tree of drafts. ::

        model.generate(**inputs, custom_generate=MultiDraft(draft_model, n_drafts=3, depth=4))

    What comes out has the law of ``generate`` without it: sampling with all processors and warpers (they are applied
    to both models' logits before verification), or greedy search token by token. Rows of a batch are written one after
    another, left padding included. ``n_drafts=1`` is speculative sampling with one chain of drafts.

    Args:
        draft_model: a smaller model with the target's vocabulary.
        n_drafts: n, children of a node, from 1 to 64.
        depth: of the tree, from 1 to 64.
        sampler: ``greedy`` (the n - 1 most probable tokens and one drawn from the rest), ``with`` or ``without``
            replacement, or ``spechub``; by default that of the verifier.
        verifier: ``greedy`` (the default), ``rrs`` or ``k-seq`` (drafts with replacement), ``rrsw`` (without),
            ``spechub`` (n = 2), ``single`` (n = 1), or ``ot-lp`` (laws of at most 10 tokens); by default one of the
            sampler.
        max_nodes: the tree's most nodes; it is cut by depth and child number.
        streamer: a transformers streamer; ``generate`` gives none to a custom loop.
        generator: of torch, on the models' device; by default torch's own.

    Attributes:
        record: what the last run did (``rounds``, ``target_calls``, ``draft_calls``, ``tokens``, ``accepted``).

    Raises:
        InputError: an argument outside its range. On call: beams, scores asked for, inputs besides ids and mask, no
            cache or a filled one, an encoder-decoder, another vocabulary, a model that takes no tree, or an empty
            prompt.

    References:
        Zhengmian Hu et al. Towards Optimal Multi-draft Speculative Decoding. ICLR 2025, arXiv:2502.18779. Verifiers:
        Leviathan et al. (arXiv:2211.17192), Sun et al. (SpecTr, arXiv:2310.15141), Jeon et al. (RSD,
        arXiv:2402.14160), Sun et al. (SpecHub, arXiv:2411.05289).
    """

    def __init__(
        self,
        draft_model: Any,
        n_drafts: int = 3,
        depth: int = 4,
        sampler: str | None = None,
        verifier: str | None = None,
        max_nodes: int = 64,
        streamer: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value, high in (("n_drafts", n_drafts, 64), ("depth", depth, 64), ("max_nodes", max_nodes, 4096)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value <= high:
                raise InputError(name, value, f"a whole number from 1 to {high}")
        if max_nodes < n_drafts:
            raise InputError("max_nodes", max_nodes, f"at least n_drafts ({n_drafts})")
        if verifier is None:
            of_sampler = {"with": "rrs", "without": "rrsw", "greedy": "greedy", "spechub": "spechub"}
            verifier = of_sampler[one_of("sampler", sampler or "greedy", SAMPLERS)]
        self.verifier, self.sampler = verifier, sampler_of(verifier, sampler)
        if verifier == "single" and n_drafts != 1:
            raise InputError("n_drafts", n_drafts, f"1 for the verifier 'single' (others: {', '.join(VERIFIERS)})")
        if self.sampler == "spechub":
            fits("spechub", n_drafts, 2)
        self.draft_model = draft_model
        self.n_drafts, self.depth, self.max_nodes = int(n_drafts), int(depth), int(max_nodes)
        self.streamer, self.generator = streamer, generator
        self.record = SpeculationRecord()

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The loop; ``generate`` calls it. Returns what ``generate`` would: ids, or an output with them."""
        check_pair("multi-draft decoding", model, self.draft_model, generation_config, model_kwargs)
        size = model.config.get_text_config().vocab_size
        if self.sampler != "with" and self.n_drafts > size:
            raise InputError("n_drafts", self.n_drafts, f"at most the vocabulary's {size} tokens")
        batch = len(input_ids)
        if self.streamer is not None and batch > 1:
            raise InputError("streamer", f"with a batch of {batch}", "used with one row")
        mask = model_kwargs.get("attention_mask")
        text = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if not bool(text.any(1).all()):
            raise InputError("input_ids", f"row {int((~text.any(1)).nonzero()[0])}", "a prompt of at least one token")
        pad = getattr(generation_config, "_pad_token_tensor", None)
        if batch > 1 and pad is None and not all(isinstance(c, MaxLengthCriteria) for c in stopping_criteria):
            raise InputError("pad_token_id", None, "a token id, for rows that end before others")

        law = Law(logits_processor, bool(generation_config.do_sample), size)
        self.record = SpeculationRecord()
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        cache = model_kwargs["past_key_values"] if batch == 1 else None
        rows = [
            self._write(model, row[None], seen, law, stopping_criteria, generation_config.max_length, cache)
            for row, seen in zip(input_ids, text, strict=True)
        ]
        if self.streamer is not None:
            self.streamer.end()
        width = max(row.shape[1] for row in rows)
        fill = 0 if pad is None else int(pad)
        out = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=fill) for row in rows])
        if not generation_config.return_dict_in_generate:
            return out
        sequences: Any = out
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)

    def _write(
        self, model: Any, row: Tensor, text: Tensor, law: Law, stopping: Any, max_length: int | None, cache: Any
    ) -> Tensor:
        """One row to its end. Processors and criteria see the whole row, (1, T); the models what ``text`` marks."""
        target = Branching(model, DynamicCache() if cache is None else cache)
        draft = Branching(self.draft_model, DynamicCache(), "draft_model")
        done = False
        while not done:
            ids = row[0, text]
            left = self.depth if max_length is None else max_length - row.shape[1] - 1
            tree = self._grow(draft, law, row, ids, min(self.depth, left))
            logits = target(ids, tree, list(range(len(tree.tokens))))
            path, tokens = self._walk(tree, law, row, logits)
            before = row.shape[1]
            for token in tokens:
                row = torch.cat([row, row.new_tensor([[token]])], 1)
                done = bool(stopping(row, None).all())
                if self.streamer is not None:
                    self.streamer.put(row[0, -1:].cpu())
                if done:
                    break
            new = row.shape[1] - before
            text = torch.nn.functional.pad(text, (0, new), value=True)
            for branching in (target, draft):
                branching.keep(path[: new - 1])
            self.record.rounds += 1
            self.record.accepted.append(new)
        self.record.target_calls += target.calls
        self.record.draft_calls += draft.calls
        return row

    def _grow(self, draft: Branching, law: Law, row: Tensor, ids: Tensor, depth: int) -> Tree:
        """The tree of drafts behind ``row``, level by level: one forward of the draft model for each level."""
        tree = Tree(len(ids), ids.device)
        children = families(self.n_drafts, depth, self.max_nodes)
        level: list[tuple[int, int]] = [(ROOT, 0)]  # nodes, and their places in the whole tree
        while level := [(node, place) for node, place in level if children[place]]:
            nodes = [node for node, _ in level if node != ROOT]
            logits = draft(ids, tree, nodes)
            paths = torch.tensor([tree.path(node) for node, _ in level], device=row.device, dtype=row.dtype)
            q = _exact(law(torch.cat([row.expand(len(level), -1), paths.view(len(level), -1)], 1), logits))
            ranking = fitted(logits, law.size) if self.sampler in ("greedy", "spechub") else None
            order = order_of(q, ranking, self.n_drafts)
            drafts = draw(q, self.n_drafts, self.sampler, self.generator, order)
            following: list[tuple[int, int]] = []
            for i, (node, place) in enumerate(level):
                tree.drafts[node], tree.proposals[node] = drafts[i : i + 1], q[i : i + 1]
                made = tree.add(node, drafts[i].tolist())
                following += [(new, at) for new, at in zip(made, children[place], strict=True) if new is not None]
            tree.grown()
            level = following
        return tree

    def _walk(self, tree: Tree, law: Law, row: Tensor, logits: Tensor) -> tuple[list[int], list[int]]:
        """From the root, the nodes that the verifier keeps, and the tokens to emit: theirs and one more."""
        node, path, tokens = ROOT, [], []  # type: int, list[int], list[int]
        while True:
            p = _exact(law(row, logits[node + 1 : node + 2]))
            if node in tree.drafts:
                p = kernel(p, tree.proposals[node], tree.drafts[node], self.verifier, self.sampler)
            token = int(draw_tokens(p, 1, self.generator))
            tokens.append(token)
            if token not in tree.children[node]:
                return path, tokens
            node = tree.children[node][token]
            path.append(node)
            row = torch.cat([row, row.new_tensor([[token]])], 1)


def _exact(law: Tensor) -> Tensor:
    """A law in float64 whose rows sum to 1."""
    law = law.double()
    return law / law.sum(1, keepdim=True)
