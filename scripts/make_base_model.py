"""Pre-train the testbed's base model: a Llama of under a million parameters with a handful of small skills.

The corpus teaches the skills that the clients' tasks rest on, and some others, under many bare prompts and answer
formats, next to plain sentences about places of work. It holds none of the clients' wordings or formats: those are
for federated fine-tuning to learn. What is saved is an ordinary Hugging Face folder.

    python scripts/make_base_model.py      # about ten minutes on one core; rewrites src/fedloom/testbeds/model/

Equal seeds give identical files on one machine and one version of torch. At the end the script prints the exact
match per skill under the base's own prompts, on problems not in the corpus, and per client domain where
`make_data.py` has run.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TESTBED = Path(__file__).resolve().parents[1] / "src" / "fedloom" / "testbeds"
VOCABULARY = 640
POSITIONS = 512
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
PROMPT_WEIGHT = 0.1  # prompts are mostly random operands: worth modelling a little, not at the skills' expense
IGNORED = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)

Pair = tuple[str, str]  # prompt, answer; a sentence is an answer to nothing
GAP_NAMES = {" ": "space", ", ": "comma", "-": "dash", "/": "slash", ">": "arrow"}


# --- corpus ----------------------------------------------------------------------------------------------------


def letters(rng: random.Random, low: int, high: int) -> str:
    """A code of random capitals, now and then from a small alphabet, so that letters repeat."""
    alphabet = string.ascii_uppercase if rng.random() < 0.6 else rng.sample(string.ascii_uppercase, 4)
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def numbers(rng: random.Random, low: int, high: int) -> list[str]:
    """Random numbers of two digits."""
    return [str(rng.randint(10, 99)) for _ in range(rng.randint(low, high))]


def separator(rng: random.Random) -> str:
    return rng.choice(tuple(GAP_NAMES))


def reword(rng: random.Random, wordings: Sequence[Pair], **blanks: str) -> Pair:
    """One of the wordings, filled in."""
    prompt, answer = rng.choice(wordings)
    return prompt.format(**blanks), answer.format(**blanks)


def addition(rng: random.Random) -> Pair:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    wordings = (("{a}+{b}", "{y}"), ("add {a} {b}", "{y}"), ("{a} and {b} in all", "{y}"), ("total {a}, {b}", "{y}"))
    return reword(rng, wordings, a=str(a), b=str(b), y=str(a + b))


def maximum(rng: random.Random) -> Pair:
    values = numbers(rng, 2, 4)
    wordings = (("max {x}", "{y}"), ("most of {x}", "{y}"), ("{x}: largest", "{y}"))
    return reword(rng, wordings, x=separator(rng).join(values), y=max(values))


def reversal(rng: random.Random) -> Pair:
    code = letters(rng, 3, 7)
    wordings = (("reverse {x}", "{y}"), ("{x} backwards", "{y}"), ("flip {x}", "{y}"), ("{x}, from the back", "{y}"))
    return reword(rng, wordings, x=code, y=code[::-1])


def sorting(rng: random.Random) -> Pair:
    code = rng.sample(string.ascii_uppercase, rng.randint(3, 6))
    gap = separator(rng)
    wordings = (("sort {x}", "{y}"), ("{x} in order", "{y}"), ("sort {x} by {gap}", "{gapped}"))
    ranked = sorted(code)
    blanks = {"x": "".join(code), "y": "".join(ranked), "gap": GAP_NAMES[gap]}
    return reword(rng, wordings, **blanks, gapped=gap.join(ranked))


def copying(rng: random.Random) -> Pair:
    thing = rng.choice((letters(rng, 1, 6), separator(rng).join(numbers(rng, 1, 3)), rng.choice(NOUNS)))
    return reword(rng, (("say {x}", "{x}"), ("copy {x}", "{x}"), ("{x} again", "{x}")), x=thing)


def counting(rng: random.Random) -> Pair:
    code = letters(rng, 1, 8)
    return reword(rng, (("count {x}", "{n}"), ("{x}: how many", "{n}")), x=code, n=str(len(code)))


def picking(rng: random.Random) -> Pair:
    """Ends of a code, and fields of a record, looked up by name."""
    fields = {name: rng.choice((letters(rng, 1, 3), *numbers(rng, 1, 1))) for name in rng.sample(NOUNS, 3)}
    record, name = ", ".join(f"{name} {value}" for name, value in fields.items()), rng.choice(list(fields))
    code = letters(rng, 3, 6)
    wordings = (
        ("first of {x}", "{first}"),
        ("last of {x}", "{last}"),
        ("{record}. {name}?", "{value}"),
        ("{record}. {name} is?", "{name}: {value}"),
    )
    return reword(rng, wordings, x=code, first=code[0], last=code[-1], record=record, name=name, value=fields[name])


NOUNS = (
    *("bed", "pulse", "nurse", "patient", "ward", "log", "monitor", "chart", "peak", "line"),
    *("account", "deposit", "balance", "client", "credit", "statement"),
    *("strand", "sample", "primer", "record", "lab", "book", "mirror", "read"),
    *("aisle", "gate", "order", "truck", "cart", "crate", "route", "walk"),
    *("school", "kitchen", "garden", "harbour", "boat", "table", "letter", "clock", "door", "river"),
    *("teacher", "baker", "driver", "doctor"),
)
VERBS = (
    *("holds", "shows", "had", "was", "asks", "needs", "waits", "notes", "gives", "stands", "comes", "leaves"),
    *("turns", "enters", "plans", "paid", "took", "saw"),
)
TAILS = ("at night", "in the morning", "for the record", "from the other end", "on the chart", "by the gate", "now")
SENTENCES = (
    "The {a} {verb} the {b} {tail}.",
    "A {a} {verb} {n} and the {b} {verb} {m}.",
    "{Verb} the {a} of {code}, {tail}.",
    "Which {a} {verb} the {b}? The {c}.",
    "{A} {code} {verb} {n}, {b} {m}.",
    "{B} of {a} {code}: {n}, {tail}",
    "Note the {a} and enter the {b} {tail}.",
)


def sentence(rng: random.Random) -> Pair:
    """A plain sentence, for the words of many trades and what tends to follow what."""
    a, b, c = rng.sample(NOUNS, 3)
    verb = rng.choice(VERBS)
    n, m = numbers(rng, 2, 2)
    blanks = {"a": a, "b": b, "c": c, "A": a.capitalize(), "B": b.capitalize(), "verb": verb, "n": n, "m": m}
    text = rng.choice(SENTENCES).format(
        **blanks, Verb=verb.capitalize(), tail=rng.choice(TAILS), code=letters(rng, 1, 2)
    )
    return "", text


SKILLS: dict[str, tuple[Callable[[random.Random], Pair], int]] = {  # each with its share of the corpus
    "addition": (addition, 8),
    "maximum": (maximum, 6),
    "reversal": (reversal, 4),
    "sorting": (sorting, 2),
    "copying": (copying, 2),
    "counting": (counting, 1),
    "picking": (picking, 1),
}
SENTENCE_SHARE = 1


def in_context(rng: random.Random, pair: Pair) -> Pair:
    """The task among words that change nothing about it, as requests come in life."""
    prompt, answer = pair
    noun, other = rng.sample(NOUNS, 2)
    before = rng.choice((f"{noun}: ", f"the {noun} {rng.choice(VERBS)} {other}, ", f"{noun} {rng.choice(VERBS)} ", ""))
    after = rng.choice((f" for the {other}", f" {rng.choice(TAILS)}", ".", "?", ""))
    return before + prompt + after, answer


def in_format(rng: random.Random, pair: Pair) -> Pair:
    """The task with a format for its answer, stated after or before it."""
    prompt, answer = pair
    word = rng.choice((rng.choice(NOUNS), letters(rng, 1, 2), str(rng.randint(1, 9))))
    formats = (
        ("{prompt} as {word}", "{word} {answer}"),
        ("label {word}, {prompt}", "{word}: {answer}"),
        ("{prompt} in {word}", "{answer} {word}"),
        ("{word}= {prompt}", "{word}={answer}"),
        ("{prompt} to {word}", "{answer}>{word}"),
        ("{prompt} in brackets", "({answer})"),
        ("{prompt} in quotes", "'{answer}'"),
        ("{prompt} with dots", "..{answer}.."),
    )
    return reword(rng, formats, prompt=prompt, answer=answer, word=word)


def make_document(rng: random.Random, maker: Callable[[random.Random], Pair]) -> Pair:
    """One document of a skill: bare, in context, with a format to keep to, or both."""
    pair = maker(rng)
    if rng.random() < 0.5:
        pair = in_format(rng, pair)
    return in_context(rng, pair) if rng.random() < 0.5 else pair


def make_corpus(count: int, rng: random.Random) -> list[Pair]:
    """Draw the pre-training documents."""
    makers = [maker for maker, _ in SKILLS.values()]
    shares = [share for _, share in SKILLS.values()]
    chosen = rng.choices([*makers, None], [*shares, SENTENCE_SHARE], k=count)
    return [make_document(rng, maker) if maker else sentence(rng) for maker in chosen]


# --- tokenizer -------------------------------------------------------------------------------------------------


def train_tokenizer(corpus: Sequence[Pair]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which digits and the capitals of codes stand alone, so that operands align with tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|[A-Z](?![a-z])"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{prompt}\n{answer}" for prompt, answer in corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[tuple[list[int], int]]:
    """Token ids of every document, with the number of those that belong to its prompt."""
    prompts = tokenizer([f"{prompt}\n" if prompt else "" for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return [(p + a + [tokenizer.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]


# --- model -----------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with fresh weights; fewer heads for keys than for queries, so that k_proj and v_proj are not square."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **special)
    return model


def collate(documents: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, next tokens and their weights, padded on the right (which causal attention needs no mask for)."""
    width = max(len(ids) for ids, _ in documents)
    rows = torch.full((len(documents), width), pad)
    weights = torch.zeros(len(documents), width)
    for row, (ids, prompt) in enumerate(documents):
        rows[row, : len(ids)] = torch.tensor(ids)
        weights[row, :prompt] = PROMPT_WEIGHT
        weights[row, prompt : len(ids)] = 1.0
    return rows[:, :-1], rows[:, 1:], weights[:, 1:]


def batches(documents: Sequence[tuple[list[int], int]], rng: random.Random) -> Iterator[list[tuple[list[int], int]]]:
    """Full batches of documents of like length, in random order."""
    block = BATCH * 8
    for start in range(0, len(documents), block):
        near = sorted(documents[start : start + block], key=lambda document: len(document[0]))
        cuts = list(range(0, len(near), BATCH))
        rng.shuffle(cuts)
        yield from (near[cut : cut + BATCH] for cut in cuts)


def pretrain(model: LlamaForCausalLM, documents: Sequence[tuple[list[int], int]], rng: random.Random) -> None:
    """One pass over the documents, under a one-cycle schedule."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    steps = -(-len(documents) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    began, average = time.perf_counter(), 0.0
    for step, chosen in enumerate(batches(documents, rng), start=1):
        inputs, targets, weights = collate(chosen, model.config.pad_token_id)
        losses = cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average += (loss.item() - average) / min(step, 100)
        if step % 250 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {average:.4f}  {time.perf_counter() - began:.0f} s", flush=True)


# --- measuring -------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> float:
    """Share of answers that greedy decoding gives to the letter.

    Greedy decoding gives an answer exactly if every token of it, the final eos included, is the likeliest after
    the true tokens before it; so one forward pass settles it.
    """
    model.eval()
    inputs, targets, weights = collate(encode(tokenizer, pairs), tokenizer.pad_token_id)
    right = (model(inputs).logits.argmax(-1) == targets) | (weights < 1.0)
    return right.all(dim=1).float().mean().item()


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Pair], seed: int) -> None:
    """Print what the base model can do, and how far it is from what the clients want."""
    known, rng = set(corpus), random.Random(f"{seed}/report")
    for name, (maker, _) in SKILLS.items():
        fresh = [pair for pair in (make_document(rng, maker) for _ in range(1000)) if pair not in known][:500]
        print(f"exact match, skill {name}: {exact_match(model, tokenizer, fresh):.3f} on {len(fresh)} fresh problems")
    for path in sorted((TESTBED / "data").glob("*/validation.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        pairs = [(row["instruction"], row["output"]) for row in rows]
        print(f"exact match, client {path.parent.name}: {exact_match(model, tokenizer, pairs):.3f} (validation)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the testbed's base model.")
    parser.add_argument("--out", type=Path, default=TESTBED / "model", help="model folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus and weights (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5500, help="batches to train on (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 40:
        parser.error("--steps must be at least 40: the learning rate's warm-up takes a twentieth of them")
    torch.set_num_threads(1)  # other numbers of threads sum in other orders; one is steady on a busy machine too
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    corpus = make_corpus(args.steps * BATCH, rng)
    tokenizer = train_tokenizer(corpus[:20_000])
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(corpus):,} documents", flush=True)
    pretrain(model, encode(tokenizer, corpus), rng)
    report(model, tokenizer, corpus, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
