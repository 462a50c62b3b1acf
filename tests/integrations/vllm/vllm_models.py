"""Tiny base models and adapters on the disk, what transformers makes of them, and what an engine of vLLM's does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, save_rank_experts, use_task

VOCAB = 128
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.1,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
MOST_RANKS = 16
TOKENS = 16
TASKS = ["cola", "mnli", "rte"]
ALL = dict(target_modules="all-linear", init_weights=False)
SOME = dict(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_weights=False)

ADAPTERS = {
    "token": RankExpertConfig.smora(r=16, top_k=4, alpha=8, **ALL),
    "softmax": RankExpertConfig.smora(r=12, top_k=3, alpha=4, score_function="softmax", **SOME),
    "biased": RankExpertConfig.smora(
        r=16, top_k=4, alpha=8, biased_gates=True, rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 12}, **ALL
    ),
    "blocks": RankExpertConfig.mixture(num_experts=4, expert_rank=4, top_k=2, alpha=4, **SOME),
    "dense": RankExpertConfig.lora(r=8, alpha=8, rank_pattern={"v_proj": 4}, **SOME),
    "task": RankExpertConfig.more(tasks=TASKS, r=8, alpha=8, **ALL),
    "head": RankExpertConfig.more(tasks=TASKS, r=8, alpha=8, target_modules=["q_proj", "lm_head"], init_weights=False),
}
NAMES = ["token", "softmax", "biased", "blocks", "dense", "task?task=cola", "task?task=rte"]
"""Adapters of every gate, as a request names them."""

PROMPTS = [[1, 5, 9, 22, 7], [3, 4, 88], [100, 2, 61, 77, 14, 14, 9, 120], [33]]


class Text(NamedTuple):
    """What was generated, greedily: tokens and their log-probabilities."""

    tokens: list[int]
    log_probabilities: list[float]


def make_base(folder: Path, kind: str = "llama") -> Path:
    """Write a base model with random weights and a tokenizer with a word a token."""
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, original_max_position_embeddings=256)),
    }[kind]()
    model.lm_head.weight.data *= 4  # so that one token is ahead of the others
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, config: RankExpertConfig, seed: int = 0) -> Path:
    """Write an adapter with random weights, its balancing biases and gates included."""
    torch.manual_seed(seed)
    model = inject_rank_experts(AutoModelForCausalLM.from_pretrained(base), config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "balance_bias" in name or "gate_bias" in name:
            tensor.data.uniform_(-0.2, 0.2)
    save_rank_experts(model, folder)
    return folder


def make_lora(base: Path, folder: Path) -> Path:
    """Write a LoRA of PEFT's with random weights."""
    torch.manual_seed(7)
    config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def make_all(folder: Path) -> Path:
    """Write the base model, all adapters and a LoRA into a folder."""
    base = make_base(folder / "base")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(base, folder / name, config, seed)
    make_lora(base, folder / "lora")
    return folder


@torch.no_grad()
def by_transformers(folder: Path, name: str | None, prompts: list[list[int]]) -> list[Text]:
    """Generate with transformers and this library's own layers; name None: the base model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    path, _, task = (name or "").partition("?task=")
    if path == "lora":
        model.load_adapter(str(folder / path))
    elif path:
        load_rank_experts(model, folder / path)
    found = []
    with use_task(model, task) if task else contextlib.nullcontext():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            own = model(whole).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            best = own.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 2e-4, "two tokens are so near that rounding may choose"
            found.append(Text(whole[0, len(prompt) :].tolist(), best[:, 0].tolist()))
    return found


def sampling(**kwargs: Any) -> Any:
    """vLLM's sampling options for the same."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0, **kwargs
    )


def request(folder: Path, name: str | None) -> Any:
    """vLLM's name of an adapter; the same name has the same number."""
    from vllm.lora.request import LoRARequest

    known = [*NAMES, "task?task=mnli", "lora", "head?task=cola", *sorted(ADAPTERS)]
    number = known.index(name) + 1 if name in known else 100 + sum((name or "").encode())
    return name and LoRARequest(name, number, f"{folder}/{name}")


def start(folder: Path, **kwargs: Any) -> Any:
    """Start an engine on the base model."""
    from vllm import LLM

    options = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_batched_tokens=256)
    return LLM(str(folder / "base"), **(options | dict(max_num_seqs=16, disable_log_stats=True) | kwargs))


def start_for_adapters(folder: Path, **kwargs: Any) -> Any:
    """Start an engine that takes adapters."""
    return start(folder, **(dict(enable_lora=True, max_lora_rank=MOST_RANKS, max_loras=3) | kwargs))


def generate(llm: Any, folder: Path, names: list[str | None], prompts: list[list[int]]) -> list[list[Text]]:
    """Generate for every name and prompt, all in one call: name to prompt to what came out."""
    pairs = [(name, prompt) for name in names for prompt in prompts]
    given = [{"prompt_token_ids": prompt} for _, prompt in pairs]
    adapters = [request(folder, name) for name, _ in pairs]
    lora = {"lora_request": adapters} if any(adapters) else {}
    answers = [answer.outputs[0] for answer in llm.generate(given, sampling(), use_tqdm=False, **lora)]
    texts = [
        Text(list(own.token_ids), [step[token].logprob for step, token in zip(own.logprobs, own.token_ids)])
        for own in answers
    ]
    return [texts[i : i + len(prompts)] for i in range(0, len(texts), len(prompts))]


def assert_same(found: list[Text], expected: list[Text]) -> None:
    """The same tokens, and log-probabilities within 1e-4."""
    for own, theirs in zip(found, expected, strict=True):
        assert own.tokens == theirs.tokens
        torch.testing.assert_close(
            torch.tensor(own.log_probabilities), torch.tensor(theirs.log_probabilities), rtol=0, atol=1e-4
        )
