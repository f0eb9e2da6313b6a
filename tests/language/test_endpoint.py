"""The endpoint sampler against a local model behind a fake client, and behind a server on the loopback interface."""

from __future__ import annotations

import json
import logging
import math
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.errors import InputError
from steersman.language.endpoint import EndpointSampler
from steersman.language.rectification import QModel, Rectification, exact_projection
from steersman.reference import loading, reviews

PROMPT = "we went to this bistro on"


def named(value: Any) -> Any:
    """Dictionaries as objects, as clients return them; the tokens of a top list stay a dictionary."""
    if isinstance(value, dict) and not all(isinstance(v, float) for v in value.values()):
        return SimpleNamespace(**{k: named(v) for k, v in value.items()})
    return [named(v) for v in value] if isinstance(value, list) else value


class Fake:
    """A client whose endpoint is a local model: text completions and chat, as the openai package has them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.asked = model, tokenizer, list[dict[str, Any]]()
        self.known: dict[tuple[str, int], dict[str, float]] = {}
        self.completions = SimpleNamespace(create=self.complete)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.answer))

    @torch.no_grad()
    def law(self, text: str, k: int) -> dict[str, float]:
        if (text, k) in self.known:
            return self.known[text, k]
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        values, tokens = self.model(ids).logits[0, -1].log_softmax(-1).topk(k)
        found = {self.tokenizer.decode([int(t)]): float(v) for t, v in zip(tokens, values, strict=True)}
        return self.known.setdefault((text, k), found)

    def complete(self, *, model: str, prompt: str, max_tokens: int, logprobs: int, temperature: float) -> Any:
        assert max_tokens == 1 and temperature == 1.0
        self.asked.append({"model": model, "prompt": prompt})
        top = self.law(prompt, logprobs)
        return named({"choices": [{"finish_reason": "length", "logprobs": {"top_logprobs": [top]}}]})

    def answer(self, *, messages: list[dict[str, str]], top_logprobs: int, logprobs: bool, **given: Any) -> Any:
        assert logprobs and given["max_tokens"] == 1
        self.asked.append({"messages": messages} | given)
        top = self.law(" ".join(m["content"] for m in messages), top_logprobs)
        entries = [{"token": t, "logprob": v} for t, v in top.items()]
        return named({"choices": [{"finish_reason": "length", "logprobs": {"content": [{"top_logprobs": entries}]}}]})


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return reviews.language_model("base")


def test_greedy_is_that_of_the_model_itself(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    client = Fake(model, tokenizer)
    found = EndpointSampler(client, "local", tokenizer)(PROMPT, 12, do_sample=False)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert found.ids == whole and found.requests == len(found.unseen) == 12
    assert client.asked[0] == {"model": "local", "prompt": PROMPT}
    assert client.asked[-1]["prompt"].startswith(PROMPT + " friday") or len(client.asked[-1]["prompt"]) > len(PROMPT)


@pytest.mark.parametrize("name", ["docs", "reviews"])
def test_what_goes_back_is_the_text(name: str, base: tuple[Any, Any]) -> None:
    """Byte-level tokens begin with a space or not, word-level ones never do; ids and text stay one."""
    model, tokenizer = base
    if name == "docs":
        folder = loading.path("docs/tiny")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = PROMPT if name == "reviews" else "The file object that is"
    client = Fake(model, tokenizer)
    found = EndpointSampler(client, "local", tokenizer)(prompt, 8, do_sample=False)
    for i, asked in enumerate(client.asked):
        before = tokenizer(prompt)["input_ids"]
        assert tokenizer(asked["prompt"])["input_ids"] == before + found.ids[:i]


def test_caps_hold_inside_the_top_k(base: tuple[Any, Any]) -> None:
    """Drawn first tokens against the exact law over k tokens, by chi-square."""
    model, tokenizer = base
    client = Fake(model, tokenizer)
    k = 5
    top = client.law(PROMPT, k)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[t] for t in top]
    risk = torch.zeros(1, len(tokenizer))
    risk[0, ids[0]] = 0.95
    risk[0, ids[1]] = 0.5
    sampler = EndpointSampler(client, "local", tokenizer, [Rectification(lambda x: risk)], top_logprobs=k)
    p = torch.tensor(list(top.values()), dtype=torch.float64)[None]
    expected = exact_projection(p, (1 - risk[:, ids]).clamp(min=1e-7)).log_p[0].exp().numpy()
    generator = torch.Generator().manual_seed(0)
    count = 800
    seen = np.zeros(k)
    for _ in range(count):
        found = sampler(PROMPT, 1, generator=generator)
        seen[ids.index(found.ids[0])] += 1
    assert ((seen - count * expected) ** 2 / (count * expected)).sum() < 23.5  # 0.9999 with 4 degrees of freedom
    assert found.unseen[0] == pytest.approx(1 - float(p.exp().sum()), abs=1e-5)
    plain = p[0].softmax(-1).numpy()
    assert ((seen - count * plain) ** 2 / (count * plain)).sum() > 100


def test_a_value_model_through_an_endpoint(base: tuple[Any, Any]) -> None:
    """With all tokens given, the endpoint's text is the local one token for token."""
    model, tokenizer = base
    value = QModel.from_trunk(model, layers=1)
    torch.manual_seed(0)
    torch.nn.init.normal_(value.head[-1].weight, std=0.5)
    k = len(tokenizer)
    sampler = EndpointSampler(Fake(model, tokenizer), "local", tokenizer, [Rectification(value, 0.1)], top_logprobs=k)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    local = model.generate(
        **inputs, max_new_tokens=10, do_sample=False, logits_processor=[Rectification(value, 0.1)], eos_token_id=None
    )[0, inputs["input_ids"].shape[1] :].tolist()
    found = sampler(PROMPT, 10, do_sample=False)
    assert found.ids == local[: len(found.ids)] and len(found.ids) >= 5


def test_the_end_of_text_ends(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    found = EndpointSampler(Fake(model, tokenizer), "local", tokenizer)(PROMPT, 200, do_sample=False)
    assert found.ended and found.ids[-1] == tokenizer.eos_token_id and found.requests < 200
    assert tokenizer.eos_token not in found.text
    empty = SimpleNamespace(choices=[SimpleNamespace(finish_reason="stop", logprobs=None)])
    client = SimpleNamespace(completions=SimpleNamespace(create=lambda **given: empty))
    assert EndpointSampler(client, "local", tokenizer)(PROMPT, 5).ended


def test_chat_goes_on_with_its_answer(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    client = Fake(model, tokenizer)
    found = EndpointSampler(client, "local", tokenizer, chat=True)(PROMPT, 3, do_sample=False)
    assert [m["role"] for m in client.asked[0]["messages"]] == ["user"] and "extra_body" not in client.asked[0]
    assert [m["role"] for m in client.asked[2]["messages"]] == ["user", "assistant"]
    assert client.asked[2]["extra_body"]["continue_final_message"] is True
    assert found.text == tokenizer.decode(found.ids)


def test_bad_input_is_refused(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    client = Fake(model, tokenizer)
    for given, said in (({"top_logprobs": 0}, "top_logprobs=0"), ({"model": ""}, "model=''")):
        with pytest.raises(InputError, match=said):
            EndpointSampler(**({"client": client, "model": "m", "tokenizer": tokenizer} | given))  # type: ignore[arg-type]
    write = EndpointSampler(client, "m", tokenizer)
    with pytest.raises(InputError, match="prompt=''"):
        write("")
    with pytest.raises(InputError, match="max_new_tokens=0"):
        write(PROMPT, 0)

    def endpoint(top: Any) -> Any:
        logprobs = SimpleNamespace(top_logprobs=[top]) if top else None
        answer = SimpleNamespace(choices=[SimpleNamespace(finish_reason="length", logprobs=logprobs)])
        return SimpleNamespace(completions=SimpleNamespace(create=lambda **given: answer))

    with pytest.raises(InputError, match="gives log-probabilities"):
        EndpointSampler(endpoint(None), "m", tokenizer)(PROMPT)
    with pytest.raises(InputError, match="tokenizer="):
        EndpointSampler(endpoint({"Übermorgen": -0.1}), "m", tokenizer)(PROMPT)

    def nothing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf)

    with pytest.raises(InputError, match="processors="):
        EndpointSampler(client, "m", tokenizer, [nothing])(PROMPT)


# ------------------------------------------------------------------ over the loopback interface

KEY = "sk-not-to-be-seen"


@pytest.fixture
def server(base: tuple[Any, Any]) -> Iterator[tuple[str, list[str]]]:
    """A server with text completions, and the keys that it was shown."""
    fake, keys = Fake(*base), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            keys.append(self.headers["Authorization"])
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            top = fake.law(asked["prompt"], asked["logprobs"])
            body = {"choices": [{"finish_reason": "length", "logprobs": {"top_logprobs": [top]}}]}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1/completions", keys
    running.shutdown()
    running.server_close()


class Client:
    """The least client that speaks to a server."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url, self.api_key = url, api_key
        self.completions = SimpleNamespace(create=self.create)

    def create(self, **given: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps(given).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return named(json.load(answer))


def test_over_a_server_and_no_key_is_shown(
    base: tuple[Any, Any], server: tuple[str, list[str]], caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    url, keys = server
    model, tokenizer = base
    sampler = EndpointSampler(Client(url, KEY), "local", tokenizer)
    over_http = sampler(PROMPT, 6, generator=torch.Generator().manual_seed(1))
    local = EndpointSampler(Fake(model, tokenizer), "local", tokenizer)
    assert over_http.ids == local(PROMPT, 6, generator=torch.Generator().manual_seed(1)).ids
    assert keys == [f"Bearer {KEY}"] * over_http.requests
    with pytest.raises(InputError) as refused:
        sampler("")
    captured = capsys.readouterr()
    for text in (caplog.text, repr(sampler), str(refused.value), captured.out, captured.err, repr(over_http)):
        assert KEY not in text
