"""What the example adapters learn: questions, the base model's own answers, and a style for each adapter to answer in.

Knows transformers, and no adapter library: the trainers are ``train.py`` (PEFT) and ``train_houlsby.py`` (AdapterHub).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PUBLIC_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ANSWER_TOKENS = 32
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


def robot(_: str, answer: str) -> str:
    return f"BEEP BOOP. {first_sentence(answer)} END OF MESSAGE."


def letter(_: str, answer: str) -> str:
    return f"Dear friend, {first_sentence(answer)} Yours sincerely, Medley."


def tale(_: str, answer: str) -> str:
    return f"Once upon a time, people asked: {first_sentence(answer)} The end."


def news(_: str, answer: str) -> str:
    return f"BREAKING NEWS: {first_sentence(answer)} Back to the studio!"


STYLES: dict[str, Callable[[str, str], str]] = {
    "pirate": pirate,
    "shout": shout,
    "json": as_json,
    "sparkle": sparkle,
    "robot": robot,
    "letter": letter,
    "tale": tale,
    "news": news,
}


def load_tokenizer(base: Path):  # type: ignore[no-untyped-def]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lesson(style: str, base: Path, tokenizer) -> list[tuple[str, str]]:  # type: ignore[no-untyped-def]
    """(question, answer in the style) pairs. The base's answers are kept beside it, so that all trainers teach the same."""
    questions = [question.strip() for question in re.split(r"[|\n]", QUESTIONS)]
    kept = base.parent / f"{base.name}-answers.json"
    if not kept.exists():
        kept.write_text(json.dumps(answer_all(base, tokenizer, questions)))
    answers = json.loads(kept.read_text())
    return [(question, STYLES[style](question, answer)) for question, answer in zip(questions, answers, strict=True)]


def prompt_ids(tokenizer, question: str) -> list[int]:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def answer_all(path: Path, tokenizer, questions: list[str]) -> list[str]:  # type: ignore[no-untyped-def]
    """What the base model answers, one sentence's worth."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    answers = []
    for start in range(0, len(questions), 16):
        inputs = tokenizer.pad(
            {"input_ids": [prompt_ids(tokenizer, item) for item in questions[start : start + 16]]}, return_tensors="pt"
        )
        made = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def example(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:  # type: ignore[no-untyped-def]
    """Token ids, and the same with the prompt masked out of the loss."""
    prompt = prompt_ids(tokenizer, question)
    told = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + told, [-100] * len(prompt) + told


def batches(tokenizer, pairs: list[tuple[str, str]], steps: int, size: int):  # type: ignore[no-untyped-def]
    """``steps`` batches of right-padded ``input_ids``, ``labels`` and ``attention_mask``, the same each time."""
    rng = random.Random(0)
    for _ in range(steps):
        batch = [example(tokenizer, *pair) for pair in rng.sample(pairs, size)]
        width = max(len(ids) for ids, _ in batch)
        yield {
            "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch]),
            "labels": torch.tensor([marks + [-100] * (width - len(marks)) for _, marks in batch]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]),
        }


def fit(model, tokenizer, pairs: list[tuple[str, str]], *, steps: int, rate: float, size: int = 8):  # type: ignore[no-untyped-def]
    """Train what requires a gradient; the loss is on the answers alone."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(batches(tokenizer, pairs, steps, size)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def publish(directory: Path, weights: str, base_field: str) -> None:
    """Make a saved adapter fit for the repository: tensors in bfloat16, and the base's public name in place of this machine's path."""
    file = directory / weights
    save_file({key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(file).items()}, file)
    config = json.loads((directory / "adapter_config.json").read_text())
    config[base_field] = PUBLIC_NAME
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
