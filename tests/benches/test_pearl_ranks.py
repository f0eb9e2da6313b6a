"""PEARL in two processes, as the speculation bench runs it, writes what the target alone writes."""

from __future__ import annotations

import torch

from steersman.benches._language import load
from steersman.benches._pearl_ranks import write


def test_two_processes_write_the_target_s_greedy_texts() -> None:
    s = load("docs/small")
    prompts = [[5, 9, 40, 7], [300, 12]]
    told: list[tuple[float, float]] = []
    found = write(
        "docs/small",
        "docs/tiny",
        prompts,
        [1, 2],
        new_tokens=8,
        temperature=0.0,
        top_p=1.0,
        threads=1,
        latency=(0.001, 0.002),
        knobs={"gamma": 2},
        progress=lambda done, total, text: told.append((done, total)),
        timeout=120,
    )
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        end = s.tokenizer.eos_token_id
        options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": s.pad}
        expected = s.model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=end, **options)
        assert text["ids"] == expected[0, len(prompt) :].tolist()
        assert sum(text["rounds"]) == 8 and len(text["target"]) == len(text["rounds"]) == len(text["gammas"])
        assert text["target"][0] == len(prompt) == text["draft"][0] and len(text["draft"]) >= len(text["target"])
        assert text["calls"] == len(text["target"]) + len(text["draft"]) and text["seconds"] > 0
    assert told and told[-1][1] == 2
