"""Make the embedded target: ``python -m peagle.tiny_target.make --out DIR``.

corpus (functions of the standard library) -> byte-level BPE -> Llama of 2.8 M parameters, trained
on the chat form -> bf16 safetensors beside tokenizer and chat template. Two CPU cores need 40
minutes; ``--device cuda`` trains on a GPU.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peagle.kernels.device import bf16_autocast
from peagle.tiny_target.corpus import Function, read_functions, standard_library

VOCABULARY = 512  # short tokens: most of a word follows from its beginning
END_OF_TEXT, TURN, END_OF_TURN, MASK = SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|draft_mask|>",  # reserved for drafters; never occurs in text
]
# Newline + indentation is one pre-token, so a line costs no tokens for its leading spaces.
PRE_TOKEN = r"\n *| ?_*[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 448)  # padded lengths
USER_WEIGHT = 0.2  # docstrings are read more than they are written


def build_tokenizer(functions: list[Function]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for f in functions for text in (f.prompt, f.body)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN, MASK],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.02,
        attention_dropout=0.0,
        bos_token_id=tokenizer.convert_tokens_to_ids(TURN),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # faster than sdpa for short rows on CPU
    return LlamaForCausalLM(config)


def encode(
    functions: list[Function], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of every function that fits the widest batch."""
    samples = []
    for function in functions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": function.prompt}],
            add_generation_prompt=True,
            tokenize=False,
        )
        head = tokenizer(prompt)["input_ids"]
        body = tokenizer(function.body + END_OF_TURN)["input_ids"]
        if len(head) + len(body) <= WIDTHS[-1]:
            samples.append((head + body, len(head)))
    return samples


def batches(
    samples: list[tuple[list[int], int]], tokens: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (ids [B, S], weights [B, S]), each batch of one width, in random order."""
    buckets: dict[int, list[int]] = {width: [] for width in WIDTHS}
    for i in torch.randperm(len(samples), generator=generator).tolist():
        buckets[next(w for w in WIDTHS if len(samples[i][0]) <= w)].append(i)
    plan = [
        (width, bucket[start : start + tokens // width])
        for width, bucket in buckets.items()
        for start in range(0, len(bucket), tokens // width)
    ]
    for j in torch.randperm(len(plan), generator=generator).tolist():
        width, members = plan[j]
        ids = torch.zeros(len(members), width, dtype=torch.long)
        weights = torch.zeros(len(members), width)
        for row, i in enumerate(members):
            sample, prompt = samples[i]
            ids[row, : len(sample)] = torch.tensor(sample)
            weights[row, :prompt] = USER_WEIGHT
            weights[row, prompt : len(sample)] = 1.0
        yield ids, weights


def weighted_loss(model: torch.nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Summed weighted cross-entropy and the summed weight. Right padding needs no mask."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    weights = weights[:, 1:]
    counted = weights > 0  # the head runs on real tokens only
    logits = model.lm_head(hidden[:, :-1][counted])
    losses = F.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum(), weights.sum()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, samples: list[tuple[list[int], int]]) -> float:
    """Mean cross-entropy per token of the bodies (the assistant's turn)."""
    total, number = 0.0, 0.0
    model.eval()
    for ids, weights in batches(samples, 8192, torch.Generator().manual_seed(0)):
        ids, weights = ids.to(model.device), weights.to(model.device)
        with bf16_autocast(ids.device):
            loss, weight = weighted_loss(model, ids, (weights == 1.0).float())
        total, number = total + loss.item(), number + weight.item()
    model.train()
    return total / number


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, trained, held_out, *, args: argparse.Namespace) -> dict:
    steppers = optimizers(model, args.lr)
    generator = torch.Generator().manual_seed(args.seed)
    tokens, start = 0, time.monotonic()
    epochs = (batches(trained, args.batch_tokens, generator) for _ in count())
    for step, (ids, weights) in enumerate(islice(chain.from_iterable(epochs), args.steps), 1):
        ids, weights = ids.to(model.device), weights.to(model.device)
        warm_up, decay = min(1.0, step / 100), min(1.0, 2 * (1 - (step - 1) / args.steps))
        for stepper in steppers:
            stepper.param_groups[0]["lr"] = args.lr * warm_up * decay
        with bf16_autocast(model.device):
            loss, weight = weighted_loss(model, ids, weights)
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        tokens += int((weights > 0).sum())
        if step % args.report_every == 0 or step == args.steps:
            loss_held_out = held_out_loss(model, held_out)
            minutes = (time.monotonic() - start) / 60
            print(
                f"step {step:6d}  train {(loss / weight).item():.3f}  held out "
                f"{loss_held_out:.3f}  tokens {tokens / 1e6:.1f} M  {minutes:.1f} min",
                flush=True,
            )
            save(model, args.out)
    return {"held_out_loss": loss_held_out, "tokens": tokens, "steps": step, "minutes": minutes}


def save(model: LlamaForCausalLM, out: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight")  # tied
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, nargs="*", default=[standard_library()])
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch_tokens", type=int, default=6144)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report_every", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    functions = read_functions(args.stdlib)
    tokenizer = build_tokenizer([f for f in functions if not f.held_out])
    tokenizer.save_pretrained(args.out)
    trained = encode([f for f in functions if not f.held_out], tokenizer)
    held_out = encode([f for f in functions if f.held_out], tokenizer)
    tokens = sum(len(ids) for ids, _ in trained)
    model = build_model(tokenizer).to(args.device)
    print(f"{len(trained)} functions, {tokens / 1e6:.2f} M tokens, {len(held_out)} held out; "
          f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)  # fmt: skip
    report = train(model, trained, held_out, args=args)
    print(json.dumps({**report, "perplexity": math.exp(report["held_out_loss"])}))


if __name__ == "__main__":
    main()
