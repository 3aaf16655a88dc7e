"""Load a checkpoint through the Auto classes and continue a line of Python: quickstart_generate.py FOLDER"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import linear_llama3

PROMPT = "class Queue:\n    def __init__(self"


def main() -> None:
    folder = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, linear_llama3.LinearLlama3ForCausalLM)
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(f"\n{type(model).__name__} from {folder}; model card {folder}/README.md; plot {folder}/loss.png")


if __name__ == "__main__":
    main()
