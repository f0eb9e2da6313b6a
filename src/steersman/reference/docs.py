r"""`docs`: English about Python, made from the interpreter that runs it.

The corpus is the text of Python's documentation topics (`pydoc_data.topics`) and of every docstring of the
standard library. Docstrings are read from the source files with `ast`: no module is imported, so none of
their side effects happen. A *document* is one topic, or one module with its docstrings in source order:

    asyncio.queues
    Queue(maxsize=0)
    A queue, useful for coordinating producer and consumer coroutines.
    ...

Cleaning: paragraphs are put on one line each (list items keep theirs); doctest sessions, grammar rules, and
paragraphs made mostly of something else than words (tables, drawings, code) are dropped; typographic quotes
become plain ones.

Split: a document is held out when $\mathrm{SHA256}(\text{name}) \bmod 10 = 0$. The split depends on the name
alone, so a document keeps its side when another version of Python words it differently. A paragraph of at
least 40 letters and digits appears once in the whole corpus (compared without case, spaces and
punctuation); held-out documents come first and keep theirs, so no such paragraph is on both sides.

The text belongs to the interpreter: another version of Python gives another corpus, and another
`fingerprint`. For one interpreter everything here is deterministic.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from steersman.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "…": "...", "\u00a0": " "})
ITEM = re.compile(r"^([-*+•]|\d{1,2}[.)]|\(\w\))\s+\S")
UNDERLINE = re.compile(r"^([*=~^\"'#-])\1{2,}$")
WORD = re.compile(r"[A-Za-z]{2,}")
SHARED_LENGTH = 40  # letters and digits from which on a paragraph may appear only once
SHORTEST = 120  # characters: below this a document says nothing


@dataclass(frozen=True)
class Document:
    """One topic (`topic:context-managers`) or module (`asyncio.queues`), cleaned.

    Args:
        name: what the split is decided by.
        text: paragraphs, one a line; an empty line before each entry of a module.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out passage, and how the passage really went on.

    Args:
        document: name of the held-out document.
        text: the prompt, as text.
        ids: the same as tokens, without special tokens.
        continuation: the text that follows in the document.
        continuation_ids: the same as tokens.
    """

    document: str
    text: str
    ids: tuple[int, ...]
    continuation: str
    continuation_ids: tuple[int, ...]


def is_held_out(name: str) -> bool:
    """Whether the document called ``name`` is held out: one in ten, by hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 10 == 0


@lru_cache(maxsize=2)
def documents(split: Split) -> tuple[Document, ...]:
    """All documents of one side of the split, sorted by name.

    Args:
        split: ``"train"`` or ``"heldout"`` (a tenth, and the quick one: it reads only its own files).

    Raises:
        InputError: another split, or an interpreter that lacks its topics or its library's source files.
    """
    if split not in ("train", "heldout"):
        raise InputError("split", split, "'train' or 'heldout'")
    seen = {key(p) for d in documents("heldout") for p in d.text.splitlines()} if split == "train" else set()
    kept = []
    for name, entries in sorted(_sources(held_out=split == "heldout")):
        text = _assemble(name, entries, seen)
        if len(text) >= SHORTEST:
            kept.append(Document(name, text))
    return tuple(kept)


def fingerprint(split: Split) -> str:
    """SHA-256 over the names and texts of one side of the split."""
    digest = hashlib.sha256()
    for document in documents(split):
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def prompts(
    n: int,
    tokens: int = 32,
    seed: int = 0,
    *,
    continuation: int = 128,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Prompt]:
    """``n`` passages of held-out documents, each cut into a prompt and its true continuation.

    A passage begins at a paragraph (no heading, 40 characters or more) and is followed by enough text of the
    same document; prompts don't overlap (continuations may). The draw depends on ``seed``, the corpus and the
    tokenizer alone, and fewer prompts are the first ones of more: ``prompts(10)`` begins ``prompts(100)``.

    Args:
        n: number of passages.
        tokens: tokens a prompt.
        seed: of the draw.
        continuation: tokens that must follow a prompt in its document.
        tokenizer: a transformers tokenizer; by default the one that the reference models share.

    Raises:
        InputError: a number out of range, or more prompts than the held-out documents have.
    """
    numbers = (("n", n, 1), ("tokens", tokens, 1), ("continuation", continuation, 0), ("seed", seed, 0))
    for name, value, low in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise InputError(name, value, f"a whole number, at least {low}")
    if tokenizer is None:
        from steersman.reference import loading

        tokenizer = _reference_tokenizer(str(loading.path("docs/tiny")))
    held_out = documents("heldout")
    starts = [
        (d, match.start())
        for d, document in enumerate(held_out)
        for match in re.finditer(r"(?m)^(?!.*\)$).{40}", document.text)
    ]
    order = np.random.default_rng([seed, 0x646F6373]).permutation(len(starts))
    # A token is at least one byte, but seldom more than 16: tokenize only as much text as a passage may need.
    reach = 16 * (tokens + continuation)
    taken: dict[int, list[tuple[int, int]]] = {}
    found: list[Prompt] = []
    for index in order:
        d, start = starts[index]
        text = held_out[d].text
        encoded = tokenizer(text[start : start + reach], add_special_tokens=False, verbose=False)
        ids = encoded["input_ids"][: tokens + continuation]
        if len(ids) < tokens + continuation:
            continue
        prompt, follows = str(tokenizer.decode(ids[:tokens])), str(tokenizer.decode(ids[tokens:]))
        end = start + len(prompt)
        if any(start < stop and begin < end for begin, stop in taken.setdefault(d, [])):
            continue
        taken[d].append((start, end))
        found.append(Prompt(held_out[d].name, prompt, tuple(ids[:tokens]), follows, tuple(ids[tokens:])))
        if len(found) == n:
            return found
    raise InputError("n", n, f"at most {len(found)} (held-out passages of {tokens} + {continuation} tokens)")


@lru_cache(maxsize=4)
def _reference_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


# --- collecting -------------------------------------------------------------------------------------------


def _sources(held_out: bool) -> Iterator[tuple[str, Iterable[tuple[str, str]]]]:
    """(name, entries) of the documents of one side; an entry is (heading, raw text)."""
    try:
        from pydoc_data import topics as data

        topics: dict[str, str] = data.topics
    except ImportError:
        topics = {}
    library = Path(sysconfig.get_paths()["stdlib"])
    files = list(_source_files(library))
    if not topics or not files:
        raise InputError(
            "interpreter",
            sys.executable,
            "a Python with its documentation topics (pydoc_data) and its library's source files",
        )
    for topic, text in topics.items():
        if is_held_out(f"topic:{topic}") == held_out:
            yield f"topic:{topic}", [("", text)]
    for name, file in files:
        if is_held_out(name) == held_out:
            yield name, list(_docstrings(file))


def _source_files(library: Path) -> Iterator[tuple[str, Path]]:
    """(module name, file) of the standard library's modules, tests left out."""
    for top in sorted(sys.stdlib_module_names):
        if top == "pydoc_data":
            continue
        if (library / f"{top}.py").is_file():
            yield top, library / f"{top}.py"
        for file in sorted((library / top).rglob("*.py")):
            parts = file.relative_to(library).with_suffix("").parts
            if not TEST_FOLDERS.intersection(parts):
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module, its classes and functions, in source order."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # some files of the library are wrong on purpose
        return

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = prefix + child.name
                text = ast.get_docstring(child)
                if text:
                    yield name + ("" if isinstance(child, ast.ClassDef) else _signature(child.args)), text
                yield from walk(child, f"{name}.")
            elif isinstance(child, ast.stmt):
                yield from walk(child, prefix)

    text = ast.get_docstring(tree)
    if text:
        yield "", text
    yield from walk(tree, "")


def _signature(arguments: ast.arguments) -> str:
    """`(self, item, timeout=None)`, without annotations; `(...)` where it would be long."""
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    for star in (arguments.vararg, arguments.kwarg):
        if star is not None:
            star.annotation = None
    text = f"({ast.unparse(arguments)})"
    return text if len(text) <= 72 else "(...)"


# --- cleaning ---------------------------------------------------------------------------------------------


def _assemble(name: str, entries: Iterable[tuple[str, str]], seen: set[str]) -> str:
    """The document's text: its name, then each entry that still says something; ``seen`` grows."""
    blocks = []
    for heading, raw in entries:
        kept = []
        for paragraph in paragraphs(raw):
            mark = key(paragraph)
            if mark:
                if mark in seen:
                    continue
                seen.add(mark)
            kept.append(paragraph)
        if any(len(p) >= 20 for p in kept):
            blocks.append("\n".join([heading, *kept] if heading else kept))
    if not blocks:
        return ""
    title = [] if name.startswith("topic:") else [name]
    return "\n\n".join(["\n".join([*title, blocks[0]]), *blocks[1:]]) + "\n"


def key(paragraph: str) -> str:
    """What makes two paragraphs the same: letters and digits; empty for one too short to matter."""
    letters = re.sub(r"[^0-9a-z]", "", paragraph.lower())
    return letters if len(letters) >= SHARED_LENGTH else ""


def paragraphs(raw: str) -> list[str]:
    """The paragraphs of a topic or docstring that are words, each on one line (list items on their own)."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(raw.expandtabs().translate(PLAIN))):
        lines = [line.strip() for line in block.splitlines()]
        lines = [line for line in lines if line and not UNDERLINE.match(line)]
        if not lines or any(line.startswith((">>>", "...", "$ ")) or "::=" in line for line in lines):
            continue
        joined = [lines[0]]
        for line in lines[1:]:
            if ITEM.match(line):
                joined.append(line)
            else:
                joined[-1] += " " + line
        out.extend(p for p in (re.sub(r"\s+", " ", j) for j in joined) if _is_prose(p))
    return out


def _is_prose(paragraph: str) -> bool:
    """Whether words make up most of a paragraph: no code, tables, drawings, or bare punctuation."""
    solid = paragraph.replace(" ", "")
    letters = sum(c.isalpha() for c in solid)
    brackets = sum(solid.count(c) for c in "()[]{}=<>|\\_#@")
    return bool(WORD.search(paragraph)) and letters >= 0.8 * len(solid) and brackets <= 0.08 * len(solid)
