"""LangChain against a server of yours.

    tsqp-shm serve --port 8000
    pip install langchain-openai && python examples/serving/langchain_client.py http://127.0.0.1:8000
"""

import os
import sys

from langchain_openai import ChatOpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
key = os.environ.get("TSQP_SHM_API_KEY", "none")
chat = ChatOpenAI(base_url=f"{url}/v1", api_key=key, model="smollm2-135m-instruct", temperature=0, max_tokens=24)

print(chat.invoke("What is the capital of France?").content)
for piece in chat.stream("Name three colours."):
    print(piece.content, end="", flush=True)
print()
