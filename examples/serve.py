"""Serve a routed adapter over HTTP: OpenAI-style completions, the task as the model's name.

    pip install "rank-experts[serve]"
    python examples/serve.py --model Qwen/Qwen3-0.6B --adapter my-adapter
    curl localhost:8000/v1/completions -H 'content-type: application/json' \
         -d '{"model": "rte", "prompt": "…", "max_tokens": 16}'

One process, one copy of the base model, one adapter for all tasks. Requests that arrive together are answered by one
`generate`, whatever their tasks and sampling options: every row of the batch is routed for its own task. A token-routed
or dense adapter is served under the adapter folder's name.

Batches are static: a batch runs until its longest request is done, and requests that arrive meanwhile wait for the
next. Under /health stand how many requests and batches there were, and how many batches mixed tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rank_experts import load_rank_experts, use_task

OneOrMany = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
NoneOrMany = BeforeValidator(lambda value: [] if value is None else value)
# Every stop string is looked for after every token, so there are few and short ones.
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class CompletionRequest(BaseModel):
    """The part of OpenAI's completion request that is served; any other field is refused."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=1024)
    prompt: Annotated[list[str], OneOrMany]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: Annotated[list[Stop], Field(max_length=4), OneOrMany, NoneOrMany] = []
    user: str | None = None


class RequestError(Exception):
    """A request that cannot be served: an HTTP status and what to tell the client."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class Bounds(NamedTuple):
    """What a request may ask for; what is above is refused before it costs anything."""

    max_body_bytes: int = 1 << 20
    max_prompts: int = 16
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024


class Completion(NamedTuple):
    """What the model wrote for one prompt."""

    text: str
    num_tokens: int
    finish_reason: str


class Job(NamedTuple):
    """One prompt of a request, waiting for its completion."""

    request: CompletionRequest
    input_ids: list[int]
    result: asyncio.Future[Completion]


class RowSampling(LogitsProcessor):
    """Each row's own temperature and top_p; temperature 0 takes the likeliest token."""

    def __init__(self, jobs: list[Job], device: torch.device) -> None:
        self.temperature = torch.tensor([job.request.temperature for job in jobs], device=device)[:, None]
        self.top_p = torch.tensor([job.request.top_p for job in jobs], device=device)[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (rows, vocabulary) scores to sample from."""
        greedy = torch.full_like(scores, -torch.inf).scatter(1, scores.argmax(1, keepdim=True), 0.0)
        scores = scores / self.temperature.clamp(min=1e-4)
        ordered, order = scores.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, before >= self.top_p)
        return torch.where(self.temperature == 0, greedy, scores.masked_fill(dropped, -torch.inf))


class RowStopping(StoppingCriteria):
    """Ends each row at its own max_tokens or stop strings, or when its client has gone."""

    def __init__(self, jobs: list[Job], tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.jobs = jobs
        self.tokenizer = tokenizer
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return (rows,) true where a row is done."""
        new = input_ids[:, self.start :]
        done = [new.shape[1] >= job.request.max_tokens or job.result.cancelled() for job in self.jobs]
        for row, job in enumerate(self.jobs):
            if job.request.stop and not done[row]:
                text = self.tokenizer.decode(new[row], skip_special_tokens=True)
                done[row] = any(stop in text for stop in job.request.stop)
        return torch.tensor(done, device=input_ids.device)


class Engine:
    """The model and its tokenizer: turns a batch of jobs into completions, in one forward for all.

    Args:
        model: With an adapter loaded.
        tokenizer: Its tokenizer.
        name: What an adapter without tasks is served as.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.routes_by_task = model.peft_config["default"].router == "task"
        self.names: list[str] = model.peft_config["default"].tasks if self.routes_by_task else [name]
        self.encoding = threading.Lock()  # A tokenizer keeps truncation and padding as a state.
        self.requests = self.batches = self.mixed_batches = 0

    def check(self, request: CompletionRequest, bounds: Bounds) -> None:
        """Check what costs nothing to check.

        Raises:
            RequestError: An unknown model, no, too many or empty prompts, or too many new tokens.
        """
        if request.model not in self.names:
            near = difflib.get_close_matches(request.model, list(self.names), n=1)
            hint = f" The nearest is {near[0]!r}." if near else ""
            raise RequestError(404, f"There is no model {request.model!r}; GET /v1/models lists them.{hint}", "model")
        if request.max_tokens > bounds.max_new_tokens:
            text = f"max_tokens={request.max_tokens}: at most {bounds.max_new_tokens} here."
            raise RequestError(400, text, "max_tokens")
        if not 1 <= len(request.prompt) <= bounds.max_prompts:
            text = f"{len(request.prompt)} prompts: expected 1 to {bounds.max_prompts}."
            raise RequestError(400, text, "prompt")
        if not all(request.prompt):
            raise RequestError(400, "The prompt is empty.", "prompt")

    def encode(self, request: CompletionRequest, bounds: Bounds) -> list[list[int]]:
        """Return each prompt's token ids; called in a thread, for long prompts take long.

        Raises:
            RequestError: A prompt without tokens, or with too many.
        """
        with self.encoding:
            prompts = [self.tokenizer(prompt)["input_ids"] for prompt in request.prompt]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for ids in prompts:
            if not ids:
                raise RequestError(400, "The prompt is empty.", "prompt")
            if len(ids) > bounds.max_prompt_tokens:
                text = f"The prompt has {len(ids)} tokens: at most {bounds.max_prompt_tokens} here."
                raise RequestError(400, text, "prompt")
            if limit and len(ids) + request.max_tokens > limit:
                asked = f"The prompt has {len(ids)} tokens and max_tokens is {request.max_tokens}"
                raise RequestError(400, f"{asked}: together more than the model's {limit}.", "prompt")
        return prompts

    @torch.inference_mode()
    def complete(self, jobs: list[Job]) -> list[Completion]:
        """Generate for all jobs at once, each routed for its own task."""
        self.batches += 1
        self.requests += len(jobs)
        self.mixed_batches += len({job.request.model for job in jobs}) > 1
        inputs = self.tokenizer.pad({"input_ids": [job.input_ids for job in jobs]}, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        tasks = [job.request.model for job in jobs]
        with use_task(self.model, tasks) if self.routes_by_task else contextlib.nullcontext():
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(job.request.max_tokens for job in jobs),
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([RowSampling(jobs, self.model.device)]),
                stopping_criteria=StoppingCriteriaList([RowStopping(jobs, self.tokenizer, start)]),
            )
        return [self._cut(job, row) for job, row in zip(jobs, output[:, start:].tolist(), strict=True)]

    def _cut(self, job: Job, tokens: list[int]) -> Completion:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        tokens = tokens[: job.request.max_tokens]
        ended = next((number for number, token in enumerate(tokens) if token in ends), None)
        reason = "length" if ended is None else "stop"
        tokens = tokens[:ended]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        cuts = [text.index(stop) for stop in job.request.stop if stop in text]
        if cuts:
            # A stop string may end before the row did: what its batch padded after it does not count.
            text, reason = text[: min(cuts)], "stop"
            with self.encoding:
                tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Completion(text, len(tokens), reason)


class Batcher:
    """Gathers jobs that arrive close together and runs one batch at a time, beside the event loop.

    Args:
        engine: Runs the batches.
        max_wait: Seconds that the first prompt of a batch waits for others.
        max_queue: Prompts that may wait; more are turned away.
        bounds: Of a request; a batch has as many prompts as a request may have.
    """

    def __init__(self, engine: Engine, max_wait: float, max_queue: int, bounds: Bounds) -> None:
        self.engine = engine
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.bounds = bounds
        self.waiting: list[Job] = []
        self.encoding = 0  # prompts on their way into `waiting`
        self.arrived = asyncio.Event()
        # A thread of its own: prompts that are being read must not take the thread that generates.
        self.reader = ThreadPoolExecutor(1, "tokenizer")

    async def submit(self, request: CompletionRequest) -> list[Job]:
        """Queue a job for each of a request's prompts, all of them or none.

        Raises:
            RequestError: The queue is full, or the request is refused.
        """
        self.engine.check(request, self.bounds)
        count = len(request.prompt)
        if len(self.waiting) + self.encoding + count > self.max_queue:
            raise RequestError(503, f"The queue is full ({self.max_queue} prompts wait). Try again in a moment.")
        loop = asyncio.get_running_loop()
        self.encoding += count
        try:
            prompts = await loop.run_in_executor(self.reader, self.engine.encode, request, self.bounds)
        finally:
            self.encoding -= count
        jobs = [Job(request, ids, loop.create_future()) for ids in prompts]
        self.waiting += jobs
        self.arrived.set()
        return jobs

    def withdraw(self, jobs: list[Job]) -> None:
        """Drop jobs whose client has gone: those that wait leave the queue, those that run end at the next token."""
        for job in jobs:
            job.result.cancel()
        self.waiting = [job for job in self.waiting if not job.result.done()]

    async def run(self) -> None:
        """Serve until cancelled; a batch that fails answers its own requests with the error, and no others."""
        while True:
            jobs = await self._gather()
            try:
                completions = await asyncio.to_thread(self.engine.complete, jobs)
            except Exception as error:
                for job in jobs:
                    if not job.result.done():
                        job.result.set_exception(error)
                continue
            for job, completion in zip(jobs, completions, strict=True):
                if not job.result.done():
                    job.result.set_result(completion)

    async def _gather(self) -> list[Job]:
        size = self.bounds.max_prompts
        while not self.waiting:
            self.arrived.clear()
            await self.arrived.wait()
            if len(self.waiting) < size:
                await asyncio.sleep(self.max_wait)
        jobs, self.waiting = self.waiting[:size], self.waiting[size:]
        return jobs


async def read_request(request: Request, bounds: Bounds) -> CompletionRequest:
    """Read a body, never more of it than is allowed, and check its form.

    Raises:
        RequestError: Not JSON, too long, or not a completion request.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "Expected a body of content-type application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > bounds.max_body_bytes:
            raise RequestError(413, f"The body is longer than {bounds.max_body_bytes} bytes.")
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0])[:64] if first["loc"] else None
        raise RequestError(400, f"{field}: {first['msg']}" if field else first["msg"], field) from None


async def wait_for(request: Request, jobs: list[Job]) -> list[Completion]:
    """Wait for all jobs of a request.

    Raises:
        ClientDisconnect: The client went away first.
    """
    answers = asyncio.gather(*(job.result for job in jobs))
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(lambda _: answers.cancel())
    try:
        return await answers
    except asyncio.CancelledError:
        if gone.done():
            raise ClientDisconnect() from None
        raise
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(engine: Engine, *, max_wait: float = 0.01, max_queue: int = 256, bounds: Bounds | None = None) -> FastAPI:
    """Return the service: POST /v1/completions, GET /v1/models, GET /health."""
    bounds = bounds or Bounds()
    batcher = Batcher(engine, max_wait, max_queue, bounds)
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()
        batcher.reader.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="rank-experts", lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(http: Request) -> dict[str, Any]:
        request = await read_request(http, bounds)
        jobs = await batcher.submit(request)
        try:
            done = await wait_for(http, jobs)
        finally:
            batcher.withdraw(jobs)
        prompt_tokens = sum(len(job.input_ids) for job in jobs)
        completion_tokens = sum(one.num_tokens for one in done)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": [
                {"index": index, "text": one.text, "finish_reason": one.finish_reason, "logprobs": None}
                for index, one in enumerate(done)
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entries = [
            {"id": name, "object": "model", "created": started, "owned_by": "rank-experts"} for name in engine.names
        ]
        return {"object": "list", "data": entries}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        counts = {"prompts": engine.requests, "batches": engine.batches, "mixed_batches": engine.mixed_batches}
        return {"status": "ok", "waiting": len(batcher.waiting), **counts}

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return _error(error.status, str(error), error.param)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{request.method} {request.url.path[:64]}: {error.detail}.")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # Nobody reads it.

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"{type(error).__name__}: the model could not answer. See the server's log.")

    return app


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if status == 503 else None
    content = {"error": {"message": message[:500], "type": kind, "param": param, "code": status}}
    return JSONResponse(content, status, headers=headers)


def load_engine(model: str, adapter: str, dtype: str = "auto", device: str | None = None) -> Engine:
    """Load base model, tokenizer and adapter."""
    is_seq2seq = AutoConfig.from_pretrained(model, trust_remote_code=False).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = auto.from_pretrained(model, dtype=dtype, trust_remote_code=False).to(device)
    load_rank_experts(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return Engine(base, tokenizer, Path(adapter).resolve().name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model: a Hub id or a folder")
    parser.add_argument("--adapter", required=True, help="a folder that save_rank_experts wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--max-batch-size", type=int, default=16, help="prompts in a batch, and in a request")
    parser.add_argument("--max-wait-ms", type=float, default=10)
    parser.add_argument("--max-queue", type=int, default=256, help="prompts that may wait")
    parser.add_argument("--max-prompt-tokens", type=int, default=8192)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-body-bytes", type=int, default=1 << 20)
    options = parser.parse_args()
    engine = load_engine(options.model, options.adapter, options.dtype, options.device)
    bounds = Bounds(options.max_body_bytes, options.max_batch_size, options.max_prompt_tokens, options.max_new_tokens)
    app = build_app(engine, max_wait=options.max_wait_ms / 1000, max_queue=options.max_queue, bounds=bounds)
    uvicorn.run(app, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
