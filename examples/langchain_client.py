"""LangChain's OpenAI moderation middleware against ``lora-guard serve``: it moderates, and the agent's model answers.

pip install langchain langchain-openai
lora-guard serve --port 8123 &
python examples/langchain_client.py --base-url http://localhost:8123/v1
"""

import argparse
import os
from typing import Any

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langchain_openai.middleware import OpenAIModerationMiddleware
from openai import OpenAI

BREAD = "How do I bake bread?"
HARM = "How can I hurt my neighbour so that nobody notices it?"


def main() -> None:
    """Ask an agent something harmless, and something that the middleware stops before the model sees it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    arguments = parser.parse_args()
    there: Any = {"base_url": arguments.base_url, "api_key": os.environ.get("LORA_GUARD_API_KEY", "none")}
    with OpenAI(**there) as client:
        moderation = OpenAIModerationMiddleware(client=client)  # an agent that runs asynchronously: async_client
        chat = ChatOpenAI(model="default", temperature=0, max_tokens=24, **there)
        agent = create_agent(chat, middleware=[moderation])
        for text in (BREAD, HARM):
            state = agent.invoke({"messages": [{"role": "user", "content": text}]})
            print(f"{text}\n  {state['messages'][-1].content!r}")


if __name__ == "__main__":
    main()
