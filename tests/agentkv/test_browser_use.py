"""browser-use drives a real browser through the server; what its model says is scripted, as it asks for it."""

from __future__ import annotations

import asyncio
import json

import pytest

from agentkv.envs.browser import find_chromium
from tests.textkv.serve.live import listening
from textkv.mini import load_mini
from textkv.serve import Engine, Outcome, build_app
from textkv.serve.structured import Schemas

SAID = [
    {"memory": "a button is here", "action": [{"wait": {"seconds": 1}}]},
    {"memory": "all is done", "action": [{"done": {"text": "42", "success": True, "files_to_display": []}}]},
]


class Scripted(Engine):
    """Says its lines one after the other, each if the request's schema allows it."""

    def __init__(self) -> None:
        self.lines = [json.dumps(line) for line in SAID]
        self.pictures, self.allowed = 0, []
        model, tokenizer = load_mini()
        self.schemas = Schemas(tokenizer, model.config.vocab_size, [1])

    def prepare(self, request):
        self.pictures += sum(isinstance(part, bytes) for m in request.messages for part in m.parts())
        return self.schemas.processor(request.schema_of_answer, 0)

    def answer(self, prepared, give, cancelled):
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        self.allowed.append(prepared._matcher.accept_string(line))
        give(line)
        return Outcome(line, "stop", 10, 0, 5)

    def figures(self):
        return {}

    def close(self):
        pass


@pytest.mark.browser
def test_an_agent_of_another_house_works_through_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("ANONYMIZED_TELEMETRY", "false")
    monkeypatch.setenv("BROWSER_USE_CLOUD_SYNC", "false")
    monkeypatch.setenv("BROWSER_USE_CONFIG_DIR", str(tmp_path))
    library = pytest.importorskip("browser_use", reason="browser-use wants other versions than ours: make peers")
    pytest.importorskip("xgrammar", reason="extra structured is not installed")
    from browser_use.llm.openai.chat import ChatOpenAI

    engine = Scripted()

    async def work(address: str):
        browser = library.Browser(
            executable_path=str(find_chromium()), headless=True, chromium_sandbox=False,
            user_data_dir=str(tmp_path / "profile"), enable_default_extensions=False,
        )  # fmt: skip
        model = ChatOpenAI(model="scripted", base_url=f"{address}/v1", api_key="none", max_retries=0)
        agent = library.Agent(
            f"Read {address}/health", llm=model, browser=browser, flash_mode=True, use_judge=False,
            initial_actions=[{"navigate": {"url": f"{address}/health", "new_tab": False}}], calculate_cost=False,
        )  # fmt: skip
        try:
            return await agent.run(max_steps=4)
        finally:
            await browser.kill()

    with listening(build_app(engine, "scripted")) as address:
        history = asyncio.run(work(address))
    assert history.is_done() and history.final_result() == "42"
    assert engine.allowed == [True, True] and engine.pictures >= 1
