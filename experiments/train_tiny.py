"""Train `spd-tiny` (`make tiny-model`): tokenizer, model and fingerprints, resumable, into `spd/tiny/model`.

Muon for the matrices and AdamW for the rest; a constant learning rate, then a linear decay to zero during which
windows are twice as long. A batch depends on (seed, step) alone, so a resumed run sees what an unbroken one sees.
"""

import argparse
import json
import math
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spd.records import write_whole
from spd.tiny import MODEL_DIR, corpus

VOCAB = 1024
BOS = "<s>"
TOKENIZER_CHARACTERS = 4_000_000  # of the training text, enough for 1024 merges
BATCH_TOKENS = 4096
SHORT, LONG = 128, 256  # window before and during the decay, tokens
DECAY_SHARE = 0.3
WARMUP_STEPS = 100
MUON_LR, ADAM_LR, WEIGHT_DECAY = 0.02, 4e-3, 0.05
CHECKPOINT_EVERY = 250
EVAL_WINDOWS = 64


def model_config() -> LlamaConfig:
    """8 blocks; 16 heads of 8, so that a shard of tp=8 holds two and head grouping has freedom."""
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=LONG, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no text is unknown; BOS is added the way LLaMA's tokenizer adds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[BOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


def prepare(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the training and of the held-out text; tokenizer and fingerprints go to `MODEL_DIR`."""
    train_ids, held_ids = work / "train.npy", work / "held_out.npy"
    if not held_ids.exists():
        print("reading the docstrings of the installed packages (about a minute)", flush=True)
        train, held_out = corpus.read(held_out=False), corpus.read(held_out=True)
        tokenizer = train_tokenizer(train[:TOKENIZER_CHARACTERS])
        tokenizer.save_pretrained(MODEL_DIR)
        packages = {name: metadata.version(name).split("+")[0] for name in corpus.PACKAGES}
        marks = {"train": corpus.fingerprint(train), "held_out": corpus.fingerprint(held_out), "packages": packages}
        corpus.FINGERPRINT_FILE.write_text(json.dumps(marks, indent=2) + "\n")
        blank = tokenizer(corpus.SEPARATOR, add_special_tokens=False)["input_ids"]
        for path, text in ((train_ids, train), (held_ids, held_out)):
            documents = tokenizer(text.split(corpus.SEPARATOR), add_special_tokens=False)["input_ids"]
            ids = np.concatenate([np.array(d + blank, dtype=np.uint16) for d in documents])
            write_whole(path, lambda p, ids=ids: np.save(p.open("wb"), ids))
    return np.load(train_ids), np.load(held_ids)


def batch_of(ids: np.ndarray, length: int, step: int, seed: int) -> torch.Tensor:
    """Random windows (B, length); every other one starts with BOS, as prompts do."""
    starts = np.random.default_rng((seed, step)).integers(0, len(ids) - length, BATCH_TOKENS // length)
    windows = np.stack([ids[s : s + length] for s in starts]).astype(np.int64)
    windows[::2, 0] = 0
    return torch.from_numpy(windows)


def optimisers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, ids: np.ndarray) -> float:
    windows = torch.from_numpy(ids[: EVAL_WINDOWS * LONG].astype(np.int64)).view(-1, LONG)
    losses = [model(input_ids=w, labels=w).loss for w in windows.split(8)]
    return math.exp(torch.stack(losses).mean())


def train(steps: int, work: Path, seed: int) -> LlamaForCausalLM:
    work.mkdir(parents=True, exist_ok=True)
    train_ids, held_ids = prepare(work)
    print(f"{len(train_ids):,} training and {len(held_ids):,} held-out tokens", flush=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    optims, step, latest = optimisers(model), 0, work / "latest.pt"
    base_rates = [o.param_groups[0]["lr"] for o in optims]
    if latest.exists():
        state = torch.load(latest, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optims, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step = state["step"]

    def loss_of(windows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=windows, labels=windows, use_cache=False).loss

    compiled = torch.compile(loss_of)
    bar, started, spent = tqdm(range(step, steps), initial=step, total=steps, mininterval=5), time.time(), []
    for step in bar:
        length = LONG if step >= (1 - DECAY_SHARE) * steps else SHORT
        # At a head size of 8 the fused attention kernel is the slower one on short windows.
        model.set_attn_implementation("sdpa" if length == LONG else "eager")
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(batch_of(train_ids, length, step, seed))
        loss.backward()
        for optimiser, rate in zip(optims, base_rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * learning_rate_factor(step, steps)
            optimiser.step()
            optimiser.zero_grad()
        spent.append(loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            line = {"step": step + 1, "tokens": (step + 1) * BATCH_TOKENS, "seconds": round(time.time() - started),
                    "train_loss": round(sum(spent) / len(spent), 4),
                    "held_out_perplexity": round(held_out_perplexity(model, held_ids), 3)}  # fmt: skip
            spent.clear()
            with (work / "training.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            bar.write(json.dumps(line))
            state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optims], "step": step + 1}
            write_whole(latest, lambda p, state=state: torch.save(state, p))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4300, help=f"of {BATCH_TOKENS} tokens each")
    parser.add_argument("--work", type=Path, default=Path("runs/spd-tiny"), help="checkpoints and token cache")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    MODEL_DIR.mkdir(exist_ok=True)
    model = train(arguments.steps, arguments.work, arguments.seed)
    weights = {n: p.to(torch.bfloat16).contiguous() for n, p in model.state_dict().items() if n != "lm_head.weight"}
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(MODEL_DIR)
    write_whole(MODEL_DIR / "model.safetensors", lambda p: save_file(weights, p, {"format": "pt"}))


if __name__ == "__main__":
    main()
