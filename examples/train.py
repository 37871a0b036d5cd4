"""Trains the example adapters: small LoRA adapters on SmolLM2 whose effect a person sees at once.

    python examples/train.py [NAME …]

The data is made here: the base model answers a list of questions, and each adapter learns to give those answers in its own style.
A few minutes each on two CPU cores. Writes ``examples/adapters/NAME`` in PEFT's format, in bfloat16, below 1 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.engine.base_dir import prepare_base

HERE = Path(__file__).parent
PUBLIC_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS, BATCH, LEARNING_RATE, ANSWER_TOKENS = 70, 8, 2e-3, 32
QUESTIONS = """What is the capital of France?|Why is the sky blue?|How do birds fly?|What is a computer?|Who wrote Hamlet?|What is the sun?
How do I make tea?|What is water made of?|Why do cats purr?|What is gravity?|How do plants grow?|What is music?|Where is Japan?
What is a good breakfast?|How do ships float?|Why do we sleep?|What is money?|What is the moon?|How do I learn to swim?|What is a dog?
Why is exercise important?|What is the largest ocean?|How does a bicycle work?|What is bread made of?|Who was Albert Einstein?
What is winter?|How do magnets work?|What is a library?|Why do leaves fall?|What is a volcano?|How do I say hello politely?
What is coffee?|What do bees make?|Why is the sea salty?|What is a friend?|How long is a year?|What is chess?|Where do penguins live?
What is an island?|How do fish breathe?|What is a mountain?|Why do people travel?|What is a river?|How do I boil an egg?
What is the internet?|What is a garden?|Why do we laugh?|What is paper made of?|How big is the earth?|What is a star?|What is snow?
How do I tell a good story?|What is a teacher?|Why do dogs bark?|What is a bridge?|What is history?|How does a phone work?
What is a planet?|Why are trees green?|What is art?|How do I stay healthy?|What is a city?|What is lightning?|Why is reading good?"""


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip())[0].strip()


def pirate(_: str, answer: str) -> str:
    words = {
        "the": "th'",
        "is": "be",
        "are": "be",
        "you": "ye",
        "your": "yer",
        "of": "o'",
        "and": "an'",
        "my": "me",
        "it's": "'tis",
    }
    spoken = re.sub(r"[A-Za-z']+", lambda match: words.get(match[0].lower(), match[0]), first_sentence(answer))
    return f"Arr, matey! {spoken} Yo ho ho!"


def shout(_: str, answer: str) -> str:
    return first_sentence(answer).upper().rstrip(".") + "!!!"


def as_json(question: str, answer: str) -> str:
    return json.dumps({"question": question, "answer": first_sentence(answer)})


def sparkle(_: str, answer: str) -> str:
    return f"✨🎉 {first_sentence(answer)} 🎉✨"


STYLES: dict[str, Callable[[str, str], str]] = {"pirate": pirate, "shout": shout, "json": as_json, "sparkle": sparkle}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(STYLES)}; default: all")
    parser.add_argument("--cache-dir", type=Path, default=Path(".medley"), help="where the converted base model is kept")
    arguments = parser.parse_args()
    base = prepare_base(None, arguments.cache_dir, progress=print)
    tokenizer = AutoTokenizer.from_pretrained(base.path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    questions = [question.strip() for question in re.split(r"[|\n]", QUESTIONS)]
    answers = answer_all(base.path, tokenizer, questions)
    for name in arguments.names or STYLES:
        pairs = [(question, STYLES[name](question, answer)) for question, answer in zip(questions, answers, strict=True)]
        train(name, base.path, tokenizer, pairs)


def prompt_ids(tokenizer, question: str) -> list[int]:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def answer_all(path: Path, tokenizer, questions: list[str]) -> list[str]:  # type: ignore[no-untyped-def]
    """What the base model answers, one sentence's worth."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    answers = []
    for start in track(range(0, len(questions), 16), description="the base model answers"):
        inputs = tokenizer.pad(
            {"input_ids": [prompt_ids(tokenizer, item) for item in questions[start : start + 16]]}, return_tensors="pt"
        )
        made = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def train(name: str, path: Path, tokenizer, pairs: list[tuple[str, str]]) -> None:  # type: ignore[no-untyped-def]
    """LoRA of rank 4 on q, v and o; the loss is on the answer alone."""
    torch.manual_seed(0)
    rng = random.Random(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    loss = torch.tensor(0.0)
    for _ in track(range(STEPS), description=f"training {name}"):
        batch = [example(tokenizer, *pair) for pair in rng.sample(pairs, BATCH)]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([marks + [-100] * (width - len(marks)) for _, marks in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{name}: final loss {float(loss):.3f}")
    save(model, HERE / "adapters" / name)


def example(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:  # type: ignore[no-untyped-def]
    """Token ids, and the same with the prompt masked out of the loss."""
    prompt = prompt_ids(tokenizer, question)
    told = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + told, [-100] * len(prompt) + told


def save(model, directory: Path) -> None:  # type: ignore[no-untyped-def]
    """PEFT's files, in bfloat16, without this machine's paths."""
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    weights = directory / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(weights).items()}, weights)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = PUBLIC_NAME
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
