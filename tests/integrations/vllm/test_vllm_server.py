"""vLLM's OpenAI server with routed adapters: a real client under concurrent load, loading and unloading meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import httpx
import openai
from vllm_models import ADAPTERS, MOST_RANKS, PROMPTS, TOKENS, make_adapter, make_base

from rank_experts import RankExpertConfig

pytestmark = pytest.mark.vllm
MODELS = {"base": None, "smora": "token", "mixture": "blocks", "rte": "task?task=rte", "plain": "lora"}
ROUNDS = 36


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder):
    """The server's address; it is started as docs/serving.md says."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", f"{folder}/base"]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enable-lora", "--max-lora-rank", str(MOST_RANKS), "--max-loras", "2", "--max-cpu-loras", "3"]
    command += ["--max-model-len", "128", "--max-num-batched-tokens", "256", "--max-num-seqs", "16", "--lora-modules"]
    command += [f"{name}={folder}/{path}" for name, path in MODELS.items() if path]
    with open(folder / "server.log", "w") as log:
        environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                pytest.fail((folder / "server.log").read_text()[-5000:])
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
        assert process.poll() is None, "the server has died"
    finally:
        process.terminate()
        process.wait(60)


def test_the_commands_of_the_page(tmp_path):
    """docs/serving.md's commands as they stand there, but for the port, and for pip, which has run here already."""
    shutil.copytree(make_base(tmp_path / "made"), tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "my-adapter", RankExpertConfig.smora(target_modules="all-linear"))
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"make test-vllm runs it\" -->\n```bash\n(.*?)```", page, re.DOTALL)
    install, serve, ask = block.replace("\\\n", "").strip().splitlines()
    assert install == "pip install ."
    assert serve.endswith("&")
    assert ask.startswith("curl ")
    port = str(free_port())
    # The answer ends without a new line.
    script = "\n".join([f'PATH="{Path(sys.executable).parent}:$PATH"', serve, ask, "echo"]).replace("8000", port)
    # A process group of its own, which ends with the test.
    process = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True)
    try:
        answer = next(line for line in process.stdout if line.startswith(b"{"))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.stdout.close()
        process.wait(60)
    (choice,) = json.loads(answer)["choices"]
    assert len(choice["text"].split()) == 16


@pytest.fixture
def client(server):
    return openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)


async def complete(client, model, prompt):
    asked = dict(model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=0)
    answer = await client.completions.create(**asked, extra_body={"ignore_eos": True, "return_token_ids": True})
    choice = answer.choices[0]
    return choice.token_ids, choice.logprobs.token_logprobs, choice.text


def check(found, expected):
    tokens, log_probabilities, text = found
    assert tokens == expected.tokens
    assert log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)
    assert text.split() == [f"w{token}" for token in expected.tokens if token]  # w0 is padding


def post(server, path, **body):
    answer = httpx.post(f"{server}/v1/{path}", json=body, timeout=300)
    return answer.status_code, answer.text


def test_the_adapters_are_models(server):
    listed = json.load(urllib.request.urlopen(f"{server}/v1/models"))
    assert {model["id"] for model in listed["data"]} >= set(MODELS)


def test_concurrent_requests_of_all_models(client, expected):
    asked = list(itertools.islice(itertools.cycle(itertools.product(MODELS, range(len(PROMPTS)))), ROUNDS))

    async def run():
        return await asyncio.gather(*(complete(client, model, PROMPTS[i]) for model, i in asked))

    for (model, i), found in zip(asked, asyncio.run(run()), strict=True):
        check(found, expected(MODELS[model])[i])


def test_loading_and_unloading_while_it_serves(server, client, folder, expected):
    async def run():
        busy = asyncio.gather(
            *(complete(client, model, PROMPTS[i % 4]) for i in range(8) for model in ("smora", "rte"))
        )
        async with httpx.AsyncClient(timeout=300) as web:
            for name, path in (("one", "softmax"), ("two", "task?task=cola")):
                body = {"lora_name": name, "lora_path": f"{folder}/{path}"}
                loaded = await web.post(f"{server}/v1/load_lora_adapter", json=body)
                assert loaded.status_code == 200, loaded.text
                found = await complete(client, name, PROMPTS[0])
                check(found, expected(path)[0])
                unloaded = await web.post(f"{server}/v1/unload_lora_adapter", json={"lora_name": name})
                assert unloaded.status_code == 200, unloaded.text
                with pytest.raises(openai.NotFoundError):
                    await complete(client, name, PROMPTS[0])
        return await busy

    models = [(model, i % 4) for i in range(8) for model in ("smora", "rte")]
    for (model, i), found in zip(models, asyncio.run(run()), strict=True):
        check(found, expected(MODELS[model])[i])


def test_what_is_refused_is_said_and_the_server_lives(server, client, folder, expected):
    make_adapter(folder / "base", folder / "large", RankExpertConfig.smora(r=32, target_modules=["q_proj"]))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "adapter_config.json").write_text("{")
    for path, message in (
        ("large", "rank 32, more than max_lora_rank=16"),
        ("task", "is routed by task. It knows ['cola', 'mnli', 'rte']"),
        ("damaged", "is not JSON"),
        ("nowhere?task=rte", "is not a folder"),
    ):
        status, text = post(server, "load_lora_adapter", lora_name="bad", lora_path=f"{folder}/{path}")
        assert status >= 400
        assert message in json.loads(text)["error"]["message"]
    check(asyncio.run(complete(client, "smora", PROMPTS[0])), expected("token")[0])


def test_an_adapter_whose_folder_goes_bad_costs_its_own_requests_alone(server, client, folder, expected):
    make_adapter(folder / "base", folder / "fading", ADAPTERS["token"])
    assert post(server, "load_lora_adapter", lora_name="fading", lora_path=f"{folder}/fading")[0] == 200
    (folder / "fading" / "adapter_config.json").write_text("{")

    async def run():
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="is not JSON"):
                await complete(client, "fading", PROMPTS[0])
            # Its place goes to others, so that vLLM would have to read it again.
            for model, name in MODELS.items():
                check(await complete(client, model, PROMPTS[1]), expected(name)[1])

    asyncio.run(run())
