"""Names for the beginnings of a prompt, by which it is known that two prompts begin alike.

Which servers have them cached does not belong here (core/prefixes.py). Prompts are never
kept: of each block only a number stays, which Python's hash makes with a key that is new in every
process (PEP 456), so it says nothing outside of it.
"""

from __future__ import annotations

import msgspec

from forebay_epp.core.terms import PREFIX_BLOCK_BYTES

MAX_BLOCKS = 1024  # of a prompt; what comes after these has no names


class _Prompt(msgspec.Struct):
    """What of a body a model sees, in the order in which chat templates put it."""

    tools: msgspec.Raw = msgspec.Raw()
    functions: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()  # Responses
    system: msgspec.Raw = msgspec.Raw()  # Messages
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()  # completions
    input: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()  # vLLM: prompts with another one share no cache


_prompt = msgspec.json.Decoder(_Prompt)


def read_prefix(body: bytes, model: str) -> tuple[int, ...]:
    """Return a name for each full block of a JSON body's prompt, each chained over all before it.

    The members are taken as they are written, so images count by reference or by content, however
    the client sends them. A client writes its second message as the first, and servers cache by
    tokens, so a difference of notation only costs a hit.

    Args:
        body: what is no JSON object, or has no prompt, has no names.
        model: by which the server is asked, an adapter's included: caches of models are separate.
    """
    if len(body) < PREFIX_BLOCK_BYTES:
        return ()
    try:
        prompt = _prompt.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return ()
    text = b"\0".join(
        memoryview(part)
        for part in (
            *(prompt.tools, prompt.functions, prompt.instructions, prompt.system),
            *(prompt.messages, prompt.prompt, prompt.input),
        )
        if part
    )
    full = min(len(text) // PREFIX_BLOCK_BYTES, MAX_BLOCKS) * PREFIX_BLOCK_BYTES
    name = hash((model, bytes(prompt.cache_salt)))
    names = []
    for start in range(0, full, PREFIX_BLOCK_BYTES):
        name = hash((name, text[start : start + PREFIX_BLOCK_BYTES]))
        names.append(name)
    return tuple(names)
