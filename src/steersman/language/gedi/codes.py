"""Control codes: which tokens tell a class-conditional language model what class a text is of.

A guide has one of two forms. With a code for each value of a column it says P(x | code_v). With keywords it has two
codes for all, true and false, and the value's own words behind them: P(v, x | true) and P(v, x | false), which can be
asked of a word that it was never trained with.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman import quiet
from steersman.errors import InputError, nearest

FILE = "gedi.json"
TRUE, FALSE = "true", "false"


@dataclass(frozen=True)
class ControlCodes:
    """What a guide's codes mean, saved as ``gedi.json`` in its folder.

    Args:
        column: the attribute's name, as ``sentiment``.
        values: the values that it was trained with.
        wanted: the value that it was made for.
        ids: the token of each value; with keywords those of true and false.
        keywords: whether the codes are true and false, with a value's words behind.
        logit_scale: alpha, learned.
        bias: b of each code, learned; empty where it wasn't.
    """

    column: str
    values: tuple[str, ...]
    wanted: str
    ids: tuple[int, ...]
    keywords: bool = False
    logit_scale: float = 1.0
    bias: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != (2 if self.keywords else len(self.values)) or len(set(self.ids)) < len(self.ids):
            allowed = "the two of true and false" if self.keywords else f"a code for each of {', '.join(self.values)}"
            raise InputError("codes", list(self.ids), f"token ids that all differ, {allowed}")
        if len(self.values) < 2:
            raise InputError("values", list(self.values), f"at least two values of {self.column}")

    @classmethod
    def choose(
        cls, tokenizer: Any, column: str, values: Sequence[str], wanted: str, keywords: bool, names: Sequence[str] = ()
    ) -> ControlCodes:
        """Codes among the tokens that ``tokenizer`` has: its vocabulary never changes.

        Args:
            tokenizer: of the base and the guide.
            column, values, wanted, keywords: as above.
            names: tokens to take, in the order of the values (true, false with keywords). By default the token
                ``<value>``, else the value as a word of one token, with or without a space before it.

        Raises:
            InputError: a code that isn't one token.
        """
        meant = [TRUE, FALSE] if keywords else list(values)
        if names and len(names) != len(meant):
            raise InputError("code_tokens", list(names), f"{len(meant)} tokens, for {', '.join(meant)}")
        ids = [single_token(tokenizer, name, exactly=bool(names)) for name in names or meant]
        found = cls(column, tuple(values), wanted, tuple(ids), keywords)
        for value in values if keywords else ():
            if len(found.words(value, tokenizer)) > 1:
                text = f"the keyword {value!r} is {len(found.words(value, tokenizer))} tokens: all are scored as text"
                warnings.warn(text, stacklevel=2)
        return found

    def words(self, value: str, tokenizer: Any) -> list[int]:
        """The tokens of a keyword.

        Raises:
            InputError: a word that the tokenizer doesn't know.
        """
        ways = [_tokens(tokenizer, text) for text in (f" {value}", value)]
        unknown = tokenizer.unk_token_id
        known = [ids for ids in ways if ids and (unknown is None or unknown not in ids)]
        if not known:
            raise InputError(self.column, value, "of words that the tokenizer knows")
        return min(known, key=len)

    def opening(self, value: str, true: bool, tokenizer: Any) -> list[int]:
        """Code and keyword in front of a text that is, or isn't, of a value (keywords only)."""
        return [self.ids[0 if true else 1], *self.words(value, tokenizer)]

    def contrast(
        self, attribute: str | None, undesired: str | None, tokenizer: Any
    ) -> tuple[list[int], list[list[int]], list[float]]:
        """The wanted code, the others, and their learned biases, the wanted one first.

        Args:
            attribute: what is wanted, ``column=value``; None is what the guide was made for.
            undesired: the value that it is told from; None is all others (with keywords: that it isn't so).

        Raises:
            InputError: another column, or a value without a code.
        """
        value = self.wanted if attribute is None else self.asked(attribute)
        if self.keywords:
            if undesired is not None:
                raise InputError("undesired", undesired, "left out: this guide tells a keyword from its absence")
            codes = [self.opening(value, true, tokenizer) for true in (True, False)]
            return codes[0], codes[1:], list(self.bias)
        if undesired is not None and (undesired not in self.values or undesired == value):
            raise InputError("undesired", undesired, nearest(undesired, set(self.values) - {value}))
        others = [v for v in self.values if v != value and undesired in (None, v)]
        order = [self.values.index(v) for v in (value, *others)]
        # The learned bias follows its code, whichever is wanted.
        bias = [self.bias[i] for i in order] if self.bias else []
        return [self.ids[order[0]]], [[self.ids[i]] for i in order[1:]], bias

    def asked(self, attribute: str) -> str:
        """The value of ``column=value``.

        Raises:
            InputError: another form, another column, or (without keywords) a value that has no code.
        """
        column, value = parted(attribute)
        if column != self.column or (not self.keywords and value not in self.values):
            known = [f"{self.column}={v}" for v in self.values]
            more = f", or {self.column}=word" if self.keywords else ""
            raise InputError(
                "attribute", attribute, f"what the guide was trained on, {nearest(attribute, known)}{more}"
            )
        return value

    def learned(self, logit_scale: float, bias: Sequence[float]) -> ControlCodes:
        """The same codes with what training found."""
        return replace(self, logit_scale=logit_scale, bias=tuple(bias))

    def save(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ControlCodes:
        """The codes of the guide in ``folder``.

        Raises:
            InputError: no guide there, or a file of another form.
        """
        file = Path(folder).expanduser() / FILE
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            names = {name: tuple(raw[name]) for name in ("values", "ids", "bias")}
            codes = cls(**(raw | names))
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            allowed = f"the folder of a guide, with {FILE} as steersman apply gedi makes it ({error})"
            raise InputError("folder", str(folder), allowed) from None
        if not math.isfinite(codes.logit_scale) or len(codes.bias) not in (0, len(codes.ids)):
            raise InputError(
                "folder",
                str(folder),
                f"the folder of a guide ({FILE} has scale {codes.logit_scale}, bias {codes.bias})",
            )
        return codes

    @staticmethod
    def guide(folder: str | Path) -> tuple[Any, Any]:
        """The class-conditional model and its tokenizer, in float32, on the accelerator if there is one."""
        path = Path(folder).expanduser()
        with quiet.loading():
            model = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype="float32"
            )
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device).eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def parted(attribute: str) -> tuple[str, str]:
    """Column and value of ``column=value``.

    Raises:
        InputError: another form.
    """
    column, _, value = attribute.partition("=") if isinstance(attribute, str) else ("", "", "")
    if not column.strip() or not value.strip():
        raise InputError("attribute", attribute, "written column=value, as sentiment=positive")
    return column.strip(), value.strip()


def single_token(tokenizer: Any, name: str, *, exactly: bool = False) -> int:
    """The id of a token that the tokenizer has for ``name``: ``<name>``, else the word, else with a space before it.

    Args:
        exactly: the token of this very name, or text of one token.

    Raises:
        InputError: there is none.
    """
    known = tokenizer.get_vocab()
    for token in (name,) if exactly else (f"<{name}>",):
        if token in known:
            return int(known[token])
    for text in (name, f" {name}"):
        ids = _tokens(tokenizer, text)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    allowed = "one token of the tokenizer (name others with code_tokens, as 'positive,negative' or reserved tokens)"
    raise InputError("control code", name, allowed)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
