"""Libraries and commands that others wrote for OpenAI's API, unmodified, against `cmjax serve` as a process.

    python -m venv ENV && ENV/bin/pip install litellm langchain-openai llama-index-llms-openai-like \
        'pydantic-ai-slim[openai]' llm                                          # 0.6 GB
    npm install --prefix NODE openai
    CMJAX_CLIENTS_PYTHON=ENV/bin/python CMJAX_LLM=ENV/bin/llm NODE_PATH=NODE/node_modules \
        make soak ARGS=tests/soak/test_client_libraries.py

The `openai` package for Python is the one that the tests have; CMJAX_OPENAI_PYTHON names the interpreter of another
one, CMJAX_NODE a `node` that is not on PATH.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.client_runs import MAX_MODEL_LEN, MAX_TOKENS, command_of, conversation, run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
SCRIPTS = Path(__file__).parent / "clients"
MESSAGES = [
    {"role": "system", "content": "Answer in Python — nothing else, s'il te plaît."},
    {"role": "user", "content": "import os\nimport "},
    {"role": "assistant", "content": "sys\n"},
    {"role": "user", "content": 'def mean(values):\n    """Of "several" values."""\n    return '},
]
PROMPT = "class Stack:\n    def __init__(self):\n"
LONG = "import os\n" * MAX_MODEL_LEN
# What each raises for a prompt that is too long, and for tools, which the server refuses rather than forgets.
ERRORS = {
    "openai": ("BadRequestError", "BadRequestError"),
    "node": ("BadRequestError", "BadRequestError"),
    "litellm": ("ContextWindowExceededError", "BadRequestError"),
    "langchain": ("ContextOverflowError", "BadRequestError"),
    "llama_index": ("BadRequestError", "BadRequestError"),
    "pydantic_ai": ("ModelHTTPError", "ModelHTTPError"),
}
PACKAGES = {
    "litellm": "litellm",
    "langchain": "langchain_openai",
    "llama_index": "llama_index.llms.openai_like",
    "pydantic_ai": "pydantic_ai",
}


def library(name):
    """The command that runs the script of a library."""
    if name == "node":
        node = command_of("node", "CMJAX_NODE")
        if subprocess.run([node, "-e", 'require("openai")'], capture_output=True).returncode:
            pytest.skip("needs the openai package for Node on NODE_PATH: see the top of this file")
        return [node, str(SCRIPTS / "ask_openai.cjs")]
    if name == "openai":
        return [os.environ.get("CMJAX_OPENAI_PYTHON") or sys.executable, str(SCRIPTS / "ask_openai.py")]
    python = os.environ.get("CMJAX_CLIENTS_PYTHON")
    if python is None or subprocess.run([python, "-c", f"import {PACKAGES[name]}"], capture_output=True).returncode:
        pytest.skip(f"needs {name} in the environment of CMJAX_CLIENTS_PYTHON: see the top of this file")
    return [python, str(SCRIPTS / f"ask_{name}.py")]


@pytest.mark.parametrize("name", ERRORS)
def test_a_library_gets_what_the_model_says(tmp_path, address, greedy, name):
    """Whole and streamed, blocking and asynchronous, alone and together; and errors that say what is wrong."""
    command = library(name)
    chat, completion = greedy(conversation(MESSAGES)), greedy("<|begin|>" + PROMPT)
    asked = {"url": f"{address}/v1", "messages": MESSAGES, "prompt": PROMPT, "long": LONG, "max_tokens": MAX_TOKENS}
    asked |= {"stop": completion.stop, "chat_stop": chat.stop}
    found = json.loads(run([*command, json.dumps(asked)], tmp_path).splitlines()[-1])  # others print too
    too_long, refused = ERRORS[name]
    assert {"chat", "chat_stream", "too_long", "tools"} <= set(found)
    for what, one in found.items():
        match what.split("_"):
            case ["chat" | "completion" as kind, *_]:
                (chat if kind == "chat" else completion).check_whole(one)
            case ["pieces", *_]:
                completion.check_pieces(one)
            case ["together", *_]:
                assert len(one) > 4
                for answer in one:
                    chat.check_whole(answer)
            case ["stopped", "chat"]:
                assert one == chat.stopped
            case ["stopped"]:
                assert one == completion.stopped
            case ["logprobs"]:
                assert one == pytest.approx(chat.logprobs, abs=1e-3)
            case ["tokens"]:
                assert "".join(one) == chat.text
            case ["models"]:
                assert one == ["demo"]
            case ["unlimited"]:
                assert one["text"].startswith(chat.text)
                assert one["finish"] == "stop" or sum(one["usage"]) == MAX_MODEL_LEN
            case ["too", "long", *_]:
                assert too_long in one["kinds"]
                assert f"maximum context length of {MAX_MODEL_LEN}" in one["message"]
            case ["tools"]:
                assert refused in one["kinds"]
                assert "tools: calls are not supported" in one["message"]
            case _:
                raise AssertionError(f"nobody looks at {what}")


def test_the_llm_command_holds_a_conversation(tmp_path, address, greedy):
    llm = command_of("llm", "CMJAX_LLM")
    demo = {"model_name": "demo", "api_base": f"{address}/v1"}
    models = [{"model_id": "chat", **demo}, {"model_id": "text", "completion": True, **demo}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))

    def ask(*words):
        return run([llm, *words], tmp_path, LLM_USER_PATH=str(tmp_path))

    system, question, after = MESSAGES[0]["content"], MESSAGES[1]["content"], MESSAGES[3]["content"]
    options = ["-o", "temperature", "0", "-o", "max_tokens", str(MAX_TOKENS)]
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    first = greedy(conversation(turns))
    assert ask("-m", "chat", "-s", system, question, *options) == first.text + "\n"
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": after}]
    second = greedy(conversation(turns))
    assert ask("-c", after, "--no-stream", *options) == second.text + "\n"
    completion = greedy("<|begin|>" + PROMPT)
    assert ask("-m", "text", PROMPT, *options) == completion.text + "\n"
    assert ask("openai", "endpoint", f"{address}/v1", "--models").split() == ["demo"]
    logged = json.loads(ask("logs", "--json", "-n", "3"))
    assert [one["response"] for one in logged] == [one.text for one in (first, second, completion)]
    assert [[one["input_tokens"], one["output_tokens"]] for one in logged[:2]] == [first.usage, second.usage]
    said = run([llm, "-m", "chat", LONG], tmp_path, is_error=True, LLM_USER_PATH=str(tmp_path))
    assert f"maximum context length of {MAX_MODEL_LEN}" in said
