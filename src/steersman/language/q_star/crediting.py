"""Which tokens of a text the preference data rewarded or punished: ``steersman probe q-star``."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steersman.errors import InputError
from steersman.language.loading import load_language_model
from steersman.language.q_star.rewards import TokenRewards, positive, token_rewards, tokenized
from steersman.language.q_star.training import RECORD, fingerprint
from steersman.language.texts import opening_of, read_rows
from steersman.language.vocabularies import same_vocabulary

UNITS = {"word": r"\w+|[^\w\s]+", "sentence": r"[^.!?\n]+[.!?]*|[.!?]+"}


@dataclass(frozen=True)
class Span:
    """A piece of an answer.

    Args:
        text: its characters.
        start, stop: its tokens.
        mean: of their rewards.
        total: their sum.
    """

    text: str
    start: int
    stop: int
    mean: float
    total: float


def pieces(tokenizer: Any, prompt: Sequence[int], completion: Sequence[int]) -> list[str]:
    """The characters that each token of an answer adds to the text; joined they are the answer.

    A character of several tokens belongs to the last of them. Special tokens show as they are written.
    """
    special = set(tokenizer.all_special_ids)
    found: list[str] = []
    # Prefixes are decoded, not tokens: the space before a word depends on what stands there.
    known = str(tokenizer.decode(list(prompt)))
    for i, token in enumerate(completion):
        whole = str(tokenizer.decode([*prompt, *completion[: i + 1]]))
        if whole.endswith("\ufffd") and token not in special and i + 1 < len(completion):
            found.append("")  # not a whole character yet
            continue
        found.append(whole[len(known) :])
        known = whole
    return found


def spans(rewards: TokenRewards, tokenizer: Any, unit: Literal["word", "sentence"] = "word") -> list[list[Span]]:
    """Rewards of words or sentences of each answer: mean and sum over their tokens.

    A token belongs to the span in which its last visible character lies; one of spaces alone to the span before. A
    special token, as the end of a text, is a span of its own.
    """
    if unit not in UNITS:
        raise InputError("unit", unit, "word or sentence")
    found, marks = [], set(tokenizer.all_special_ids)
    for prompt, completion, row in zip(rewards.prompts, rewards.completions, rewards.rewards, strict=True):
        shown = pieces(tokenizer, prompt, completion)
        text, units = "", []
        for special, run in itertools.groupby(zip(completion, shown, strict=True), lambda pair: pair[0] in marks):
            for piece in [p for _, p in run] if special else ["".join(p for _, p in run)]:
                found_in = [(0, len(piece))] if special else [m.span() for m in re.finditer(UNITS[unit], piece)]
                units += [(len(text) + a, len(text) + b) for a, b in found_in if piece[a:b].strip()]
                text += piece
        members: list[list[int]] = [[] for _ in units]
        at, current = 0, 0
        for t, piece in enumerate(shown):
            at += len(piece)
            last = at - (len(piece) - len(piece.rstrip())) if piece.strip() else 0
            while current + 1 < len(units) and units[current + 1][0] < last:
                current += 1
            if members:
                members[current].append(t)
        found.append(
            [
                Span(text[a:b].strip(), group[0], group[-1] + 1, float(row[group].mean()), float(row[group].sum()))
                for (a, b), group in zip(units, members, strict=True)
                if group
            ]
        )
    return found


def terminal(rewards: TokenRewards, tokenizer: Any) -> list[str]:
    """Each answer for a terminal: tokens that were rewarded on green, punished ones on red, the stronger the deeper.

    Control characters of the answers are replaced: what a model says must not steer the terminal.
    """
    lines = []
    for prompt, completion, scaled in zip(rewards.prompts, rewards.completions, rewards.scaled, strict=True):
        line = ""
        for piece, value in zip(pieces(tokenizer, prompt, completion), scaled.tolist(), strict=True):
            level = round(abs(value) * 5)
            r, g, b = (5, 5 - level, 5 - level) if value < 0 else (5 - level, 5, 5 - level)
            colour = f"\x1b[30;48;5;{16 + 36 * r + 6 * g + b}m"
            said = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in piece)
            line += f"{colour}{said}\x1b[0m" if level else said
        lines.append(line)
    return lines


STYLE = """
body{font:16px/1.7 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
article{border-top:1px solid #ccc;padding:.8rem 0} .prompt{color:#555} .facts{color:#555;font-size:.85rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere} .text span{border-radius:3px;padding:.1em 0}
"""


def page(rewards: TokenRewards, tokenizer: Any, title: str = "Token rewards", facts: Sequence[str] = ()) -> str:
    """A self-contained HTML page: each answer with its tokens coloured, their numbers on hover."""
    rows = []
    for i, (prompt, completion) in enumerate(zip(rewards.prompts, rewards.completions, strict=True)):
        marks = []
        values = zip(
            pieces(tokenizer, prompt, completion),
            rewards.rewards[i].tolist(),
            rewards.scaled[i].tolist(),
            rewards.cumulative[i].tolist(),
            strict=True,
        )
        for piece, value, scaled, total in values:
            colour = f"rgba({'200,30,30' if scaled < 0 else '20,140,60'},{abs(scaled):.2f})"
            note = f"reward {value:+.4f}, so far {total:+.4f}"
            marks.append(f'<span style="background:{colour}" title="{note}">{html.escape(piece)}</span>')
        said = html.escape(str(tokenizer.decode(prompt, skip_special_tokens=True)))
        fact = f"{facts[i]} · " if facts else ""
        rows.append(
            f'<article><p class="text"><span class="prompt">{said}</span>{"".join(marks)}</p>'
            f'<p class="facts">{html.escape(fact)}sum {float(rewards.totals[i]):+.4f} over {len(completion)} tokens</p>'
            "</article>"
        )
    about = (
        f"Advantages at beta {rewards.beta:g}: what each token did to the expected reward. Red: punished by the "
        "preference data; green: rewarded. Compare colours only within this page."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{about}</p>{''.join(rows)}</body></html>\n"
    )


def probe(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    reference: str | None = None,
    beta: float | None = None,
    unit: Literal["word", "sentence"] = "word",
    batch_size: int = 16,
) -> dict[str, Any]:
    """The reward of every token of a user's texts: ``credit.jsonl`` and ``credit.html`` in ``out``.

    Args:
        subject: the policy, a folder or hub id.
        input: .jsonl or .csv with ``prompt`` and ``completion``; or ``prompt``, ``chosen`` and ``rejected``; or
            ``text``. Answers of pairs end with the end-of-sequence token, as in training, so that their sums are
            DPO's rewards.
        out: where both files go.
        seed: of nothing: the rewards are exact.
        log: gets a line now and then.
        reference: folder or hub id of what the policy was tuned from; default: the one in its ``q_star.json``.
        beta: strength of the KL penalty; default: the one in ``q_star.json``, else 0.1.
        unit: word or sentence, of the spans in ``credit.jsonl``.
        batch_size: rows of a forward pass.

    Returns:
        dict: number of answers and tokens, mean sum; the share of pairs whose chosen answer has the larger sum.

    Raises:
        InputError: models or texts that don't fit together, or a reference that isn't the one on record.
    """
    if input is None:
        raise InputError("input", None, "a file with prompt and completion, or prompt, chosen and rejected, or text")
    record_file = Path(subject) / RECORD
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    on_record = record.get("reference") if reference is None else None
    if reference is None and on_record is None:
        raise InputError("reference", None, "a folder or hub id (the policy's folder doesn't name what it came from)")
    beta = positive("beta", record.get("beta", 0.1) if beta is None else beta)
    named = str(reference or on_record)
    if on_record == "reference":
        named = str(Path(subject) / "reference")
    policy, tokenizer = load_language_model(subject, "subject")
    ref, ref_tokenizer = load_language_model(named, "reference")
    same_vocabulary(tokenizer, ref_tokenizer, "reference", named)
    if "fingerprint" in record and fingerprint(ref) != record["fingerprint"]:
        raise InputError("reference", named, "the model that the policy was tuned from (its weights are others)")
    rows = _answers(read_rows(input), tokenizer, input)
    log(f"{len(rows)} answers")
    prompts, answers = tokenized([prompt for _, prompt, _ in rows], [answer for _, _, answer in rows], tokenizer)
    end = tokenizer.eos_token_id
    for (role, _, _), answer in zip(rows, answers, strict=True):
        if role in ("chosen", "rejected") and end is not None and answer[-1] != end:
            answer.append(end)
    found = token_rewards(
        policy,
        ref,
        prompts,
        answers,
        beta,
        tokenizer=tokenizer,
        reference_tokenizer=ref_tokenizer,
        batch_size=batch_size,
    )
    grouped = spans(found, tokenizer, unit)
    with (out / "credit.jsonl").open("w", encoding="utf-8") as file:
        for i, (role, prompt, completion) in enumerate(rows):
            line = {
                "role": role,
                "prompt": prompt,
                "completion": completion,
                "total": float(found.totals[i]),
                "tokens": pieces(tokenizer, found.prompts[i], found.completions[i]),
                "rewards": found.rewards[i].tolist(),
                "cumulative": found.cumulative[i].tolist(),
                "defined": found.defined[i].tolist(),
                f"{unit}s": [vars(span) for span in grouped[i]],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    title = f"Token rewards of {Path(subject).name}"
    (out / "credit.html").write_text(page(found, tokenizer, title, [role for role, _, _ in rows]), encoding="utf-8")
    totals = found.totals
    metrics: dict[str, Any] = {
        "answers": len(rows),
        "tokens": sum(map(len, found.completions)),
        "beta": beta,
        "mean_total": float(totals.mean()),
    }
    pairs = [i for i, (role, _, _) in enumerate(rows) if role == "chosen"]
    if pairs:
        metrics["accuracy"] = sum(bool(totals[i] > totals[i + 1]) for i in pairs) / len(pairs)
    return metrics


def _answers(rows: Sequence[dict[str, Any]], tokenizer: Any, path: Path) -> list[tuple[str, str, str]]:
    """(role, prompt, answer) of each row; a pair gives two."""
    found: list[tuple[str, str, str]] = []
    opened = bool(opening_of(tokenizer))
    for number, row in enumerate(rows, 1):
        given = {name: row[name] for name in ("prompt", "completion", "chosen", "rejected", "text") if row.get(name)}
        if not all(isinstance(value, str) for value in given.values()):
            raise InputError("input", str(path), f"rows of texts (row {number} has something else)")
        if {"prompt", "chosen", "rejected"} <= given.keys():
            found += [(role, given["prompt"], given[role]) for role in ("chosen", "rejected")]
        elif {"prompt", "completion"} <= given.keys():
            found.append(("answer", given["prompt"], given["completion"]))
        elif "text" in given and opened:
            found.append(("text", "", given["text"]))
        else:
            allowed = "rows with prompt and completion, or prompt, chosen and rejected"
            allowed += ", or text" if opened else " (texts alone need a tokenizer that opens them with a token)"
            raise InputError("input", str(path), f"{allowed} (row {number} isn't one)")
    return found
