"""Several callers of one session, in an event loop without a thread each; run it with `python examples/callers.py`.

Any thread may call an `LLM`, several at once, and their requests share batches. In an event loop, the session's own
thread hands each token over by `call_soon_threadsafe`, and no other thread is needed.
"""

import asyncio
from collections.abc import AsyncIterator

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.tee.updates import Update

PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "A, B, C, D,"]


async def pieces(llm: LLM, prompt: str, params: SamplingParams) -> AsyncIterator[str]:
    """The text of a completion as it is made; ends it when the caller leaves early."""
    updates: asyncio.Queue[Update] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def told(update: Update) -> None:
        # Called by the session's thread between two steps, to hand over and nothing else.
        loop.call_soon_threadsafe(updates.put_nowait, update)

    completion = llm.start(prompt, params)
    llm.runtime.add([completion], told)
    try:
        while True:
            update = await updates.get()
            if update.error is not None:
                raise update.error
            yield update.text
            if update.is_last:
                return
    finally:
        llm.runtime.cancel([completion])


async def show(llm: LLM, prompt: str, params: SamplingParams) -> None:
    text = [piece async for piece in pieces(llm, prompt, params)]
    print(f"{prompt!r} -> {''.join(text)!r} in {len(text)} pieces")


async def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, stop="\n")
    with LLM(mode="tee-only", max_model_len=512) as llm:
        await asyncio.gather(*(show(llm, prompt, params) for prompt in PROMPTS))


if __name__ == "__main__":
    asyncio.run(main())
