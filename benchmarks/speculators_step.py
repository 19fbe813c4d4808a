"""One measurement of speculators' P-EAGLE training step; runs in its environment, prints JSON.

Equal work: the same depths, ratio, floor and losses, trained embedding *and* draft head (which
speculators freezes by default), float32 weights, and autocast for bf16. On the CPU its only
path is attention ``sdpa`` with the ``eager`` losses; on CUDA its own default is measured: compiled
FlexAttention and fused losses.
"""

import json

import torch
from measure import STORED, autocast, measure, print_result, step_parser
from shapes import Shape
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig


def model_of(shape: Shape, attention: str) -> PEagleDraftModel:
    layer = LlamaConfig(**shape.block())
    layer._attn_implementation = attention
    config = PEagleSpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=shape.draft_vocab,
        eagle_aux_hidden_state_layer_ids=list(range(1, shape.captured + 1)),
        mask_token_id=0,
        speculators_config=SpeculatorsConfig(
            algorithm="peagle",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=shape.depths)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    model = PEagleDraftModel(config)
    for linear in (model.lm_head, model.verifier_lm_head, model.embed_tokens):
        torch.nn.init.normal_(linear.weight, std=0.02)
    model.lm_head.weight.requires_grad_(True)
    assert model.embed_tokens.weight.requires_grad
    return model


def run(shape: Shape, *, steps: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    with device:
        model = model_of(shape, "simple_flex_attention" if on_gpu else "sdpa")
    stored = STORED[shape.dtype]
    inputs = {
        "hidden_states": torch.randn(1, shape.n, shape.captured * shape.hidden).to(stored),
        "input_ids": torch.randint(1, shape.vocab, (1, shape.n)),
        "document_ids": torch.zeros(1, shape.n, dtype=torch.long),
        "loss_mask": torch.ones(1, shape.n),
        "verifier_last_hidden_states": torch.randn(1, shape.n, shape.hidden).to(stored),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    loss_config = resolve_loss_config("kl_div", "fused" if on_gpu else "eager")
    if on_gpu:  # torch 2.11 cannot trace these kernels into the compiled forward pass
        from speculators.losses import fused

        fused.fused_kl_div_loss = torch.compiler.disable(fused.fused_kl_div_loss)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(shape, device):
            _, loss, _ = model(
                **inputs,
                loss_config=loss_config,
                num_depths=shape.depths,
                down_sample_ratio=shape.keep_ratio,
                down_sample_ratio_min=shape.min_keep_ratio,
            )
        loss.backward()

    return measure(step, steps=steps, device=device)._asdict()


def main() -> None:
    parser = step_parser(__doc__)
    args = parser.parse_args()
    shape = Shape(**json.loads(args.shape))
    result = run(shape, steps=args.steps, device=torch.device(args.device))
    print_result(shape, result)


if __name__ == "__main__":
    main()
