"""Prefill a prompt on all processes, then generate on one.

    torchrun --nproc_per_node 2 examples/sharded_prefill.py

Each process computes its part of the prompt. Process 0 receives the cache: one state per linear layer, and the keys and
values of the softmax layers. It generates the same tokens as a model that reads the prompt on one process.
"""

import torch
import torch.distributed as dist
from transformers import set_seed

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.modeling import prefill
from linear_llama3.sequence_parallel import SequenceParallelContext, enable_sequence_parallel

LENGTH, NEW = 4096, 16


def main() -> None:
    dist.init_process_group("gloo")
    set_seed(0)  # the same model and prompt on every process
    config = LinearLlama3Config(
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # random weights that make tokens depend on the prompt
        linear_attention_type="gla",
        full_attention_interval=4,
    )
    model = LinearLlama3ForCausalLM(config).eval()
    prompt = torch.randint(256, (1, LENGTH))

    enable_sequence_parallel(model, SequenceParallelContext(dist.group.WORLD))
    cache = prefill(model, prompt)
    enable_sequence_parallel(model, None)
    if cache is not None:  # on process 0
        settings = {"max_new_tokens": NEW, "do_sample": False}
        tokens = model.generate(prompt, cache=cache, **settings)  # past_key_values= before transformers 5.24
        expected = model.generate(prompt, **settings)
        assert torch.equal(tokens, expected)
        print(f"{LENGTH} tokens on {dist.get_world_size()} process(es), continued on one:", tokens[0, LENGTH:].tolist())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
