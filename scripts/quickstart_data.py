"""Write Python's standard library as documents and conversations, and a tokenizer: quickstart_data.py FOLDER"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
LONG = 30_000  # bytes, about one row of the quickstart
TURNS = 3  # questions in a conversation


def gather(folder: Path) -> list[Path]:
    """Copy the long modules (no tests, no generated tables) as text files, and return their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left_out = {"site-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
    for source in sorted(library.rglob("*.py")):
        name = source.relative_to(library)
        if source.stat().st_size >= LONG and not left_out & set(name.parts):
            text = source.read_text(encoding="utf-8", errors="replace")
            (folder / ("-".join(name.parts) + ".txt")).write_text(text, encoding="utf-8")
    return sorted(folder.iterdir())


def write_chats(files: list[Path], path: Path) -> int:
    """Write conversations about functions, answered by their documentation, and return their number."""
    chats = []
    for source in files:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
        for first in range(0, len(functions), TURNS):
            messages = []
            for function in functions[first : first + TURNS]:
                question = f"What does {function.name}({ast.unparse(function.args)}) do?"
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": ast.get_docstring(function) or ""})
            chats.append({"messages": messages})
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return len(chats)


def train_tokenizer(files: list[Path], folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in files], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)


def main() -> None:
    folder = Path(sys.argv[1])
    files = gather(folder / "corpus")
    train_tokenizer(files, folder / "tokenizer")
    chats = write_chats(files, folder / "chats.jsonl")
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} documents, {size / 1e6:.1f} MB, {chats} conversations, {VOCABULARY} tokens in the vocabulary")


if __name__ == "__main__":
    main()
