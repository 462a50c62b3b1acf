"""The example server, over real HTTP: tasks mixed in one forward, concurrent load, bad requests."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from helpers import TASKS, task_config, token_config
from models import MODELS, VOCAB
from rank_experts import inject_rank_experts, save_rank_experts, use_task

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

EXAMPLE = Path(__file__).parents[2] / "examples/serve.py"
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!"


def load_example():
    spec = importlib.util.spec_from_file_location("serve_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_example"] = module
    spec.loader.exec_module(module)
    return module


serve = load_example()
BOUNDS = serve.Bounds(max_prompts=8, max_prompt_tokens=125, max_new_tokens=32)


def tokenizer():
    """A token a letter."""
    names = ["<pad>", "<eos>", *LETTERS]
    vocabulary = {name: index for index, name in enumerate(names)} | {f"<{i}>": i for i in range(len(names), VOCAB)}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = Split("", "isolated")
    from tokenizers.decoders import Fuse

    fast.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = MODELS["llama"]()
    model.config.max_position_embeddings = 128
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    save_rank_experts(inject_rank_experts(model, task_config(alpha=16)), folder / "tasks")
    save_rank_experts(inject_rank_experts(MODELS["llama"](), token_config()), folder / "smora")
    return folder


class Server:
    """uvicorn in a thread, as a user would run it in a process."""

    def __init__(self, engine, **options):
        self.engine = engine
        self.server = uvicorn.Server(
            uvicorn.Config(serve.build_app(engine, **options), port=0, log_level="error", lifespan="on")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *exc_info):
        self.server.should_exit = True
        self.thread.join(timeout=30)

    def post(self, **body):
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def send(self, content, kind="application/json"):
        return httpx.post(f"{self.url}/v1/completions", content=content, headers={"content-type": kind}, timeout=60)

    def post_all(self, bodies):
        async def run():
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=200)) as client:
                return await asyncio.gather(*(client.post(f"{self.url}/v1/completions", json=body) for body in bodies))

        return asyncio.run(run())


@pytest.fixture(scope="module")
def engine(folders):
    return serve.load_engine(str(folders / "base"), str(folders / "tasks"), device="cpu")


@pytest.fixture(scope="module")
def server(engine):
    with Server(engine, max_wait=0.05, max_queue=64, bounds=BOUNDS) as running:
        yield running


def alone(engine, task, prompt, max_tokens):
    """What the model writes for one prompt by itself, greedily."""
    ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
    with use_task(engine.model, task), torch.no_grad():
        output = engine.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
    return engine.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_task_is_a_model(server):
    answer = httpx.get(f"{server.url}/v1/models").json()
    assert [entry["id"] for entry in answer["data"]] == TASKS
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_a_completion(server, engine):
    answer = server.post(model="rte", prompt="does it", max_tokens=9, temperature=0)
    assert answer.status_code == 200
    body = answer.json()
    (choice,) = body["choices"]
    assert choice["text"] == alone(engine, "rte", "does it", 9)
    assert (body["object"], body["model"], choice["finish_reason"]) == ("text_completion", "rte", "length")
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}


def test_tasks_differ(server):
    texts = {task: server.post(model=task, prompt="hello", max_tokens=12, temperature=0).json() for task in TASKS}
    assert len({body["choices"][0]["text"] for body in texts.values()}) == len(TASKS)


def test_requests_of_different_tasks_share_a_forward(server, engine):
    """Under load every answer is the one that its request gets alone, and there are fewer batches than requests."""
    bodies = [
        {
            "model": TASKS[i % 3],
            "prompt": LETTERS[i % 20 : i % 20 + 3 + i % 7],
            "max_tokens": 4 + i % 5,
            "temperature": 0,
        }
        for i in range(60)
    ]
    before = httpx.get(f"{server.url}/health").json()
    answers = server.post_all(bodies)
    after = httpx.get(f"{server.url}/health").json()
    assert [answer.status_code for answer in answers] == [200] * 60
    for body, answer in zip(bodies, answers, strict=True):
        expected = alone(engine, body["model"], body["prompt"], body["max_tokens"])
        assert answer.json()["choices"][0]["text"] == expected
    assert after["prompts"] - before["prompts"] == 60
    assert after["batches"] - before["batches"] <= 30
    assert after["mixed_batches"] - before["mixed_batches"] >= 4


def tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


def alive(before):
    """Bytes of the tensors that came to life since, and how many jobs and completions there are."""
    known = {id(tensor) for tensor in before}
    new = [tensor for tensor in tensors() if id(tensor) not in known]
    kinds = (serve.Job, serve.Completion, serve.CompletionRequest)
    return sum(tensor.nbytes for tensor in new), sum(type(thing) in kinds for thing in gc.get_objects())


def settled(before, most):
    """What is alive once the server's threads have let go of what they answered, or after a while."""
    for _ in range(50):
        found = alive(before)
        if all(now <= limit for now, limit in zip(found, most, strict=True)):
            return found
        time.sleep(0.1)
    return alive(before)


def test_memory_stays_flat_over_many_requests(engine):
    """Good and bad requests of all tasks, from many clients: nothing of them is left when they are answered."""
    kinds = [
        *({"model": task, "prompt": "hello", "max_tokens": 4, "stop": "x"} for task in TASKS),
        {"model": "cola", "prompt": ["one", "two"], "max_tokens": 3, "temperature": 0},
        {"model": "nope", "prompt": "hello"},
        {"model": "rte", "prompt": "hello", "max_tokens": 0},
    ]
    before = tensors()  # Other tests leave some behind, of symbolic sizes too.
    with Server(engine, max_wait=0.01, bounds=BOUNDS) as server:
        sizes = []
        for _ in range(4):
            answers = server.post_all(kinds * 12)
            assert {answer.status_code for answer in answers} == {200, 400, 404}
            del answers
            sizes.append(settled(before, sizes[0] if sizes else (0, 0)))
        # Never more than after the first round, whose last requests may still be held then.
        assert all(now <= first for later in sizes[1:] for now, first in zip(later, sizes[0], strict=True)), sizes


def test_several_prompts_in_one_request(server, engine):
    body = server.post(model="cola", prompt=["one", "a longer one", "x"], max_tokens=5, temperature=0).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    expected = [alone(engine, "cola", prompt, 5) for prompt in ("one", "a longer one", "x")]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert body["usage"]["completion_tokens"] == 15


def test_stop_strings_end_a_completion(server, engine):
    whole = alone(engine, "mnli", "hello", 12)
    stop = next(letter for letter in whole if whole.index(letter) > 1)
    answers = server.post_all(
        [
            {"model": "mnli", "prompt": "hello", "max_tokens": 12, "temperature": 0, "stop": stop},
            {"model": "mnli", "prompt": "hello", "max_tokens": 12, "temperature": 0},
        ]
    )
    cut, full = (answer.json()["choices"][0] for answer in answers)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert answers[0].json()["usage"]["completion_tokens"] == len(cut["text"])
    assert full["text"] == whole


def test_sampling_options_belong_to_the_row():
    scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    options = ((0, 1.0), (2.0, 1.0), (1.0, 0.5))
    requests = [serve.CompletionRequest(model="rte", prompt="", temperature=t, top_p=p) for t, p in options]
    jobs = [serve.Job(request, [], None) for request in requests]
    chosen = serve.RowSampling(jobs, torch.device("cpu"))(None, scores).softmax(1)
    torch.testing.assert_close(chosen[0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(chosen[1], (scores[1] / 2).softmax(0))
    torch.testing.assert_close(chosen[2], torch.tensor([0.0, 0.0, 1.0]))


BAD = [
    ({"model": "rtee"}, 404, "There is no model 'rtee'; GET /v1/models lists them. The nearest is 'rte'."),
    ({"model": "x" * 3000}, 400, "model: String should have at most 1024 characters"),
    ({"prompt": ""}, 400, "prompt is empty"),
    ({"prompt": ["x", ""]}, 400, "prompt is empty"),
    ({"prompt": []}, 400, "0 prompts: expected 1 to 8"),
    ({"prompt": ["x"] * 9}, 400, "9 prompts: expected 1 to 8"),
    ({"prompt": 5}, 400, "prompt: Input should be a valid array"),
    ({"prompt": None}, 400, "prompt: Input should be a valid array"),
    ({"prompt": "x" * 120}, 400, "120 tokens and max_tokens is 16: together more than the model's 128"),
    ({"prompt": "x" * 126}, 400, "126 tokens: at most 125 here"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 33}, 400, "max_tokens=33: at most 32"),
    ({"max_tokens": 10**4000}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": float("nan")}, 400, "top_p"),
    ({"stop": ""}, 400, "stop: String should have at least 1 character"),
    ({"stop": ["x", ""]}, 400, "stop: String should have at least 1 character"),
    ({"stop": ["x"] * 5}, 400, "stop: List should have at most 4 items"),
    ({"stop": "x" * 257}, 400, "stop: String should have at most 256 characters"),
    ({"stop": 5}, 400, "stop: Input should be a valid array"),
    ({"stream": True}, 400, "stream: Extra inputs are not permitted"),
]


def check_error(answer, status, message, param):
    """OpenAI's form, whatever is wrong."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
    assert message in error["message"]
    assert len(answer.content) < 1000
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("change", "status", "message"), BAD, ids=[str(change)[:30] for change, *_ in BAD])
def test_bad_requests_say_what_is_wrong(server, change, status, message):
    body = json.dumps({"model": "rte", "prompt": "hello"} | change).encode()
    check_error(server.send(body), status, message, next(iter(change)))


DEEP = b'{"model": "rte", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BODIES = [
    (b"", "Invalid JSON: EOF"),
    (b"{", "Invalid JSON: EOF"),
    (b"[]", "Input should be an object"),
    (b'"text"', "Input should be an object"),
    (DEEP, "Invalid JSON: recursion limit"),
    (rb'{"model": "rte", "prompt": "\ud800"}', "Invalid JSON: unexpected end of hex escape"),
    (rb'{"model": "\udc00", "prompt": "x"}', "Invalid JSON: lone leading surrogate"),
    (b'{"model": "rte", "prompt": "\xff"}', "Invalid JSON: invalid unicode"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=[str(body)[:40] for body, _ in BODIES])
def test_bodies_that_are_no_request(server, body, message):
    check_error(server.send(body), 400, message, None)


def test_what_is_not_a_completion_request(server):
    check_error(server.send(b'{"model": "rte"}'), 400, "prompt: Field required", "prompt")
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        check_error(server.send(b'{"model": "rte", "prompt": "x"}', kind), 415, "content-type application/json", None)
    check_error(httpx.get(f"{server.url}/v1/completions"), 405, "GET /v1/completions: Method Not Allowed.", None)
    check_error(httpx.get(f"{server.url}/v1/" + "x" * 3000), 404, "Not Found", None)


def test_a_body_is_not_read_further_than_allowed(engine):
    """Whether its length is said beforehand or not, and without tokenising any of it."""
    with Server(engine, bounds=BOUNDS._replace(max_body_bytes=1000)) as server:
        body = json.dumps({"model": "rte", "prompt": "x" * 900}).encode()
        check_error(server.send(body + b" " * (1000 - len(body))), 400, "900 tokens", "prompt")
        check_error(server.send(body + b" " * (1001 - len(body))), 413, "longer than 1000 bytes", None)
        for large in (b" " * 20_000_000, (b" " * 10_000 for _ in range(2000))):
            check_error(server.send(large), 413, "longer than 1000 bytes", None)
        assert server.post(model="rte", prompt="x", max_tokens=1).status_code == 200


def test_a_body_that_never_ends_is_left():
    parts = []

    async def receive():
        parts.append(b" " * 400)
        return {"type": "http.request", "body": parts[-1], "more_body": True}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json; charset=utf-8")]}
    request = serve.Request(scope, receive)
    with pytest.raises(serve.RequestError, match="longer than 1000 bytes"):
        asyncio.run(serve.read_request(request, BOUNDS._replace(max_body_bytes=1000)))
    assert len(parts) == 3


def test_a_full_queue_is_seen_before_prompts_are_tokenised(engine, monkeypatch):
    """One prompt is held where it is tokenised: meanwhile others are turned away, and the event loop answers."""
    tokenizer, held, entered = engine.tokenizer, threading.Event(), threading.Event()

    class Slow:
        def __call__(self, text, **options):
            entered.set()
            assert held.wait(30)
            return tokenizer(text, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    monkeypatch.setattr(engine, "tokenizer", Slow())
    with Server(engine, max_queue=2, bounds=BOUNDS) as server, ThreadPoolExecutor() as clients:
        first = clients.submit(server.post, model="rte", prompt=["hello", "x"], max_tokens=2)
        assert entered.wait(30)
        entered.clear()
        assert server.post(model="rte", prompt="hello").status_code == 503
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        assert not entered.is_set()
        held.set()
        assert first.result().status_code == 200
        assert server.post(model="rte", prompt="hello", max_tokens=2).status_code == 200


def test_bad_requests_among_good_ones_spoil_nothing(server, engine):
    good = {"model": "cola", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    answers = server.post_all([good, good | {"model": "nope"}, good | {"max_tokens": 0}] * 8)
    expected = alone(engine, "cola", "hello", 6)
    for number, answer in enumerate(answers):
        assert answer.status_code == (200, 404, 400)[number % 3]
        if number % 3 == 0:
            assert answer.json()["choices"][0]["text"] == expected


def test_a_full_queue_turns_requests_away(engine):
    with Server(engine, max_queue=4, bounds=BOUNDS._replace(max_prompts=2)) as server:
        answers = server.post_all([{"model": "rte", "prompt": "hello", "max_tokens": 32}] * 40)
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        full = answers[codes.index(503)]
        assert "queue is full" in full.json()["error"]["message"]
        assert full.headers["retry-after"] == "1"
        assert server.post(model="rte", prompt="hello", max_tokens=2).status_code == 200


def test_a_failing_batch_fails_alone(engine, monkeypatch):
    calls = []
    generate = engine.model.generate

    def fail_once(**kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("secret detail")
        return generate(**kwargs)

    monkeypatch.setattr(engine.model, "generate", fail_once)
    with Server(engine) as server:
        first = server.post(model="rte", prompt="hello", max_tokens=2)
        assert first.status_code == 500
        assert "secret" not in first.text
        assert server.post(model="rte", prompt="hello", max_tokens=2).status_code == 200


def leave(server, body, length=None):
    """A client that sends a request, or the beginning of one, and does not read the answer."""
    body = json.dumps(body).encode()[:length]
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    client = socket.create_connection(server.server.servers[0].sockets[0].getsockname())
    client.sendall(head.encode() + str(len(body) if length is None else 99).encode() + b"\r\n\r\n" + body)
    return client


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("It did not come to pass in 30 s.")


def test_clients_that_go_away_are_not_computed(engine, monkeypatch, caplog):
    """The row that runs ends at the next token, those that wait leave the queue, and the others are answered."""
    forward, held, steps = engine.model.forward, threading.Event(), []

    def step(*args, **kwargs):
        steps.append(1)
        assert held.wait(30)
        return forward(*args, **kwargs)

    def waiting(server):
        return httpx.get(f"{server.url}/health").json()["waiting"]

    with Server(engine, max_queue=4, max_wait=0, bounds=BOUNDS) as server, ThreadPoolExecutor() as clients:
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", step)
            body = {"model": "rte", "prompt": "hello", "max_tokens": 32}
            runs = leave(server, body)
            wait_until(lambda: steps)
            waits = [leave(server, body) for _ in range(4)]
            wait_until(lambda: waiting(server) == 4)
            batches, requests = engine.batches, engine.requests
            for client in (runs, *waits):
                client.close()
            wait_until(lambda: waiting(server) == 0)
            answer = clients.submit(server.post, model="rte", prompt="hello", max_tokens=3, temperature=0)
            wait_until(lambda: waiting(server) == 1)
            held.set()
            answer = answer.result()
        assert answer.json()["choices"][0]["text"] == alone(engine, "rte", "hello", 3)
        assert (engine.batches - batches, engine.requests - requests) == (1, 1)
        assert len(steps) == 1 + 3
        gc.collect()
        assert not caplog.records


def test_a_client_that_goes_away_while_it_sends(server, caplog):
    leave(server, {"model": "rte", "prompt": "hello"}, 10).close()
    assert server.post(model="rte", prompt="hello", max_tokens=1).status_code == 200
    assert not caplog.records  # no traceback in the log


def test_a_model_without_a_limit_has_the_servers(engine, monkeypatch):
    monkeypatch.delattr(engine.model.config, "max_position_embeddings")
    with Server(engine, bounds=BOUNDS) as server:
        check_error(server.post(model="rte", prompt="x" * 126), 400, "126 tokens: at most 125 here", "prompt")
        assert server.post(model="rte", prompt="x" * 125, max_tokens=1).status_code == 200


def test_the_code_of_a_base_is_not_run(folders, monkeypatch):
    """Nor is anybody asked whether it should be."""
    calls = []
    for auto in (serve.AutoConfig, serve.AutoModelForCausalLM, serve.AutoTokenizer):

        def load(*args, auto=auto, plain=auto.from_pretrained, **options):
            calls.append((auto, options.get("trust_remote_code")))
            return plain(*args, **options)

        monkeypatch.setattr(auto, "from_pretrained", load)
    serve.load_engine(str(folders / "base"), str(folders / "tasks"), device="cpu")
    assert {auto for auto, _ in calls} == {serve.AutoConfig, serve.AutoModelForCausalLM, serve.AutoTokenizer}
    assert {answer for _, answer in calls} == {False}


def test_a_token_routed_adapter_is_served_under_its_folders_name(folders):
    engine = serve.load_engine(str(folders / "base"), str(folders / "smora"), device="cpu")
    with Server(engine) as server:
        assert server.post(model="smora", prompt="hello", max_tokens=3).status_code == 200
        assert server.post(model="rte", prompt="hello").status_code == 404


def test_an_encoder_decoder(tmp_path):
    model = MODELS["t5"]()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    save_rank_experts(inject_rank_experts(model, task_config(alpha=16)), tmp_path / "tasks")
    engine = serve.load_engine(str(tmp_path / "base"), str(tmp_path / "tasks"), device="cpu")
    with Server(engine, max_wait=0.05) as server:
        bodies = [
            {"model": task, "prompt": "hello" * (1 + i), "max_tokens": 5, "temperature": 0}
            for i, task in enumerate(TASKS)
        ]
        for body, answer in zip(bodies, server.post_all(bodies), strict=True):
            ids = torch.tensor([engine.tokenizer(body["prompt"])["input_ids"]])
            with use_task(engine.model, body["model"]):
                output = engine.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
            assert answer.json()["choices"][0]["text"] == engine.tokenizer.decode(
                output[0, 1:], skip_special_tokens=True
            )


def test_the_command(folders):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--model", str(folders / "base"), "--adapter", str(folders / "tasks")]
    process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"])
    try:
        for _ in range(600):
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
                break
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.2)
        body = {"model": "rte", "prompt": "hello", "max_tokens": 3}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
    finally:
        process.terminate()
        assert process.wait(timeout=30) in (0, -15)
