"""Agent frameworks on a server: for each, a tool loop and an answer that satisfies a schema, printed as JSON.

Run with the Python of the environment that `make test-frameworks` makes: `python frameworks.py NAME URL`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

TOOL_PROMPT = "Add two and forty with {}."
DATA_PROMPT = "Choose a colour as data with {}."
MODEL = "local-model"


class Choice(BaseModel):
    """What a structured answer has."""

    colour: Literal["red", "green"]
    sure: bool


def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


def with_pydantic_ai(url: str) -> tuple[str, Choice]:
    """Over the Messages API."""
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    model = AnthropicModel(MODEL, provider=AnthropicProvider(api_key="any", base_url=url))
    agent = Agent(model, tools=[add])
    said = agent.run_sync(TOOL_PROMPT.format("pydantic-ai")).output
    return said, Agent(model, output_type=Choice).run_sync(DATA_PROMPT.format("pydantic-ai")).output


def with_langchain_anthropic(url: str) -> tuple[str, Choice]:
    """Over the Messages API; the loop is the caller's."""
    from langchain_anthropic import ChatAnthropic

    model = ChatAnthropic(model=MODEL, base_url=url, api_key="any", max_tokens=256)
    return langchain_loop(model, "langchain-anthropic")


def with_langchain_openai(url: str) -> tuple[str, Choice]:
    """Over Chat Completions; the loop is the caller's."""
    from langchain_openai import ChatOpenAI

    return langchain_loop(ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="any"), "langchain-openai")


def langchain_loop(model: Any, name: str) -> tuple[str, Choice]:
    """A tool loop and a structured answer of one of LangChain's chat models."""
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    adding = tool(add)
    able = model.bind_tools([adding])
    messages: list[Any] = [HumanMessage(TOOL_PROMPT.format(name))]
    while (answer := able.invoke(messages)).tool_calls:
        messages += [answer, *(adding.invoke(call) for call in answer.tool_calls)]
    text = answer.content if isinstance(answer.content, str) else answer.content[-1]["text"]
    return text, model.with_structured_output(Choice).invoke(DATA_PROMPT.format(name))


def with_openai_agents(url: str) -> tuple[str, Choice]:
    """Over the Responses API."""
    from agents import Agent, Runner, function_tool, set_tracing_disabled
    from agents.models.openai_responses import OpenAIResponsesModel
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = OpenAIResponsesModel(MODEL, AsyncOpenAI(base_url=f"{url}/v1", api_key="any"))
    adder = Agent(name="adder", model=model, tools=[function_tool(add)])
    chooser = Agent(name="chooser", model=model, output_type=Choice)

    async def both() -> tuple[str, Choice]:
        said = await Runner.run(adder, TOOL_PROMPT.format("openai-agents"))
        chosen = await Runner.run(chooser, DATA_PROMPT.format("openai-agents"))
        return said.final_output, chosen.final_output

    return asyncio.run(both())


def with_instructor(url: str) -> tuple[str, Choice]:
    """Over the Messages API; it has structured answers only."""
    import anthropic
    import instructor

    client = instructor.from_anthropic(anthropic.Anthropic(base_url=url, api_key="any"))
    asked = [{"role": "user", "content": DATA_PROMPT.format("instructor")}]
    return "", client.create(model=MODEL, max_tokens=256, messages=asked, response_model=Choice)


def with_litellm(url: str) -> tuple[str, Choice]:
    """Over the Messages API, called in the form of Chat Completions."""
    import litellm

    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": schema}}]
    server = {"model": f"anthropic/{MODEL}", "api_base": url, "api_key": "any", "max_tokens": 256}
    messages: list[Any] = [{"role": "user", "content": TOOL_PROMPT.format("litellm")}]
    while (answer := litellm.completion(messages=messages, tools=tools, **server).choices[0].message).tool_calls:
        messages.append(answer)
        for call in answer.tool_calls:
            total = add(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(total)})
    asked = [{"role": "user", "content": DATA_PROMPT.format("litellm")}]
    written = litellm.completion(messages=asked, response_format=Choice, **server).choices[0].message.content
    return answer.content, Choice.model_validate_json(written)


FRAMEWORKS: dict[str, Callable[[str], tuple[str, Choice]]] = {
    "pydantic-ai": with_pydantic_ai,
    "langchain-anthropic": with_langchain_anthropic,
    "langchain-openai": with_langchain_openai,
    "openai-agents": with_openai_agents,
    "instructor": with_instructor,
    "litellm": with_litellm,
}

if __name__ == "__main__":
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    said, chosen = FRAMEWORKS[sys.argv[1]](sys.argv[2])
    print(json.dumps({"said": said, "chosen": chosen.model_dump()}))
