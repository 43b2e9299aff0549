"""OpenAI's client against a server of yours: an answer at once, and one as it is made.

    tsqp-shm serve --port 8000
    pip install openai && python examples/serving/openai_client.py http://127.0.0.1:8000
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("TSQP_SHM_API_KEY", "none"))
model = client.models.list().data[0].id

question = [{"role": "user", "content": "What is the capital of France?"}]
answer = client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0)
print(answer.choices[0].message.content)

for chunk in client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0, stream=True):
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()

# What the server's mode protects is said with each answer; in modes with integers its evidence has a name too.
raw = client.chat.completions.with_raw_response.create(model=model, messages=question, max_tokens=1)
print("mode:", raw.headers["x-tsqp-mode"], "evidence:", raw.headers.get("x-tsqp-evidence"))
