"""Which tokens of a prompt a word or phrase is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnproc.errors import SettingsError


def get_indices(tokenizer: Any, prompt: str) -> dict[int, str]:
    """The tokens of a prompt by their index in the encoded sequence, start and end tokens included, cut as encoded."""
    ids = _encode(tokenizer, prompt)[: tokenizer.model_max_length]
    return dict(enumerate(tokenizer.convert_ids_to_tokens(ids)))


def check_length(tokenizer: Any, prompt: str, what: str = "prompt") -> None:
    """Refuses a prompt that the encoder would cut.

    Raises:
        SettingsError: the prompt has more tokens than the encoder takes.
    """
    count, most = len(_encode(tokenizer, prompt)), tokenizer.model_max_length
    if count > most:
        raise SettingsError(
            f"the {what} {prompt!r} has {count} tokens with start and end; expected at most {most}, as the text "
            "encoder would not see the rest. Shorten it."
        )


def find_tokens(
    tokenizer: Any, prompt: str, phrase: str | Sequence[int], taken: Sequence[int] = (), what: str = "concept"
) -> tuple[int, ...]:
    """Token indices of a word or phrase in a prompt; an index 0 is the start token.

    Args:
        tokenizer: CLIP tokenizer of the pipeline.
        prompt: the prompt as it will be encoded.
        phrase: words, found as the first sequence of tokens that is not `taken`; or the token indices themselves.
        taken: indices that belong to something else.
        what: the phrase's role in messages.

    Raises:
        SettingsError: the phrase is empty or not in the prompt, an index is not a word of the prompt, or it is taken.
            The message lists the tokens of the prompt.
    """
    tokens = _encode(tokenizer, prompt)
    listed = ", ".join(f"{index} {token}" for index, token in get_indices(tokenizer, prompt).items())
    last = min(len(tokens), tokenizer.model_max_length) - 2  # the last word; after it comes the end token
    if not isinstance(phrase, str):
        indices = tuple(phrase)
        words = f"indices {list(indices)}"
        if not indices or any(not isinstance(i, int) or isinstance(i, bool) or not 1 <= i <= last for i in indices):
            raise SettingsError(
                f"{what} has {words}; expected token indices from 1 to {last} of {prompt!r}. Its tokens: {listed}."
            )
        if set(indices) & set(taken) or len(set(indices)) < len(indices):
            raise SettingsError(
                f"{what} has {words}, some of which came before; expected each token once. Its tokens: {listed}."
            )
        return indices
    wanted = _encode(tokenizer, phrase)[1:-1]
    if not wanted:
        raise SettingsError(
            f"{what} {phrase!r} has no tokens; expected a word of the prompt {prompt!r}. Its tokens: {listed}."
        )
    places = [i for i in range(1, len(tokens) - len(wanted)) if tokens[i : i + len(wanted)] == wanted]
    free = [i for i in places if not set(range(i, i + len(wanted))) & set(taken)]
    if not free:
        known = "is in the prompt only where another one already is" if places else "is not in the prompt"
        raise SettingsError(
            f"{what} {phrase!r} {known}: {prompt!r}; expected words of the prompt in their order. Its tokens: {listed}."
        )
    indices = tuple(range(free[0], free[0] + len(wanted)))
    if indices[-1] > last:
        raise SettingsError(
            f"{what} {phrase!r} lies beyond the {tokenizer.model_max_length} tokens that the text encoder takes of "
            f"{prompt!r}. Shorten the prompt or move the words to its front."
        )
    return indices


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with start and end, not cut."""
    return tokenizer(text, truncation=False, padding=False).input_ids
