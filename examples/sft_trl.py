"""Fine-tune on conversations with TRL's SFTTrainer, every sequence spread over all processes (`pip install trl`).

    python examples/sft_trl.py                        # one process
    torchrun --nproc_per_node 2 examples/sft_trl.py   # two, each with half of every sequence

`SequenceParallelMixin` before `SFTTrainer` is all that sequence parallelism needs. Both commands print the same losses.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.trainer import SequenceParallelMixin

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)


class ShardedSFTTrainer(SequenceParallelMixin, SFTTrainer):
    """TRL's trainer with sequence parallelism."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, so that the example needs no download."""
    symbols = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **end)


def main() -> None:
    args = SFTConfig(
        output_dir="runs/examples/sft_trl",
        use_cpu=not torch.accelerator.is_available(),
        bf16=False,
        max_steps=40,
        per_device_train_batch_size=20,
        learning_rate=3e-3,
        assistant_only_loss=True,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(args.seed)
    sums = [(f"{a} + {b} =", str(a + b)) for a in range(20) for b in range(20)]
    chats = [[{"role": "user", "content": x}, {"role": "assistant", "content": y}] for x, y in sums]
    config = LinearLlama3Config(
        vocab_size=257,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    trainer = ShardedSFTTrainer(
        model=LinearLlama3ForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    if trainer.is_world_process_zero():
        print("losses:", *(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
