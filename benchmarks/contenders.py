"""The contenders of benchmarks/peers.py: cotgrpo, a bare torch loop, TRL and Tunix.

Each runs in a process and an environment of its own. peers.py starts `PYTHON contenders.py NAME TASK ARGUMENTS`, sends
lines with a number of steps, and reads JSON objects. Every contender starts from the weights of one folder and trains
on one batch again and again, so losses can be compared number by number. Module level imports only the standard library
and NumPy, since an environment holds only what its own contender needs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

LEARNING_RATE, BETAS, EPSILON, CLIP_NORM = 1e-4, (0.9, 0.95), 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class Task:
    """What all contenders are given.

    Attributes:
        folder: Hugging Face model folder: config.json, weights, and a tokenizer whose token n is the word "tn".
        ids: int32 `[B, T]`: the batch to train on, or the prompts.
        dtype: type of parameters, optimizer state and compute.
        remat: whether the backward pass recomputes layers.
        new_tokens: tokens to write after each prompt.
    """

    folder: Path
    ids: np.ndarray
    dtype: Literal["float32", "bfloat16"]
    remat: bool
    new_tokens: int


class Turns:
    """Run a loop step by step on command, and time each step.

    The first step runs at once. Its time counts from `start()`, so it includes loading and compiling. Each later
    `begin()` waits for its turn.
    """

    def __init__(self) -> None:
        # Libraries print as they like: what they write goes to stderr, and the pipe is ours.
        self.pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.left, self.first, self.clock, self.processor = 1, True, 0.0, 0.0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.values: list[Any] = []
        self.facts: dict[str, Any] = {}

    def start(self, *packages: str) -> None:
        """Start the clock; all imports are done."""
        self.facts["versions"] = {name: version(name) for name in packages}
        self.clock = time.perf_counter()

    def begin(self) -> bool:
        """Wait for the turn; return whether to take another step."""
        if not self.left:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            told = {
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "values": self.values,
                "peak_rss_bytes": peak,
            } | self.facts
            print(json.dumps(told), file=self.pipe, flush=True)
            self.seconds, self.cpu_seconds, self.values = [], [], []
            self.left = int(sys.stdin.readline() or 0)
        if not self.first:
            self.clock = time.perf_counter()
        self.processor = time.process_time()
        self.first = False
        return self.left > 0

    def end(self, value: Any = None, device_peak: int | None = None) -> None:
        """Report a finished step; `value` is its loss, or the tokens that were written."""
        self.seconds.append(time.perf_counter() - self.clock)
        self.cpu_seconds.append(time.process_time() - self.processor)
        self.left -= 1
        if value is not None:
            self.values.append(value)
        self.facts["device_peak_bytes"] = device_peak


def jax_peak() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def cotgrpo_train(task: Task, turns: Turns) -> None:
    import jax

    import cotgrpo
    from cotgrpo.models import load_pretrained

    turns.start("cotgrpo", "jax", "jaxlib", "flax", "optax")
    model = load_pretrained(task.folder, task.dtype, remat="full" if task.remat else "dots")
    B, T = task.ids.shape
    last = np.arange(T) == T - 1  # the torch losses have no target there
    batch = cotgrpo.SftBatch(
        tokens=task.ids,
        targets=np.roll(task.ids, -1, axis=1),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        segment_ids=np.ones((B, T), np.int32),
        loss_mask=np.broadcast_to(np.where(last, 0, 1).astype(np.float32), (B, T)),
    )
    b1, b2 = BETAS
    tx = cotgrpo.make_optimizer(
        "adamw",
        learning_rate=LEARNING_RATE,
        total_steps=1_000_000,
        schedule="constant",
        clip_norm=CLIP_NORM,
        b1=b1,
        b2=b2,
        eps=EPSILON,
    )
    state = cotgrpo.TrainState.create(params=model.params, tx=tx, key=0, copy=False)
    student = model.student
    del model  # the state owns the weights, and gives them to the step
    step = cotgrpo.jit_step(cotgrpo.make_sft_step(student, tx))
    while turns.begin():
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        turns.end(metrics["loss"].mean(), jax_peak())


def cotgrpo_generate(task: Task, turns: Turns) -> None:
    import jax

    from cotgrpo.models import load_pretrained
    from cotgrpo.models.decoder import unstack_layers
    from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts

    turns.start("cotgrpo", "jax", "jaxlib", "flax")
    model = load_pretrained(task.folder, task.dtype)
    sample = jax.jit(make_sampler(model.config, SamplingSettings(max_new_tokens=task.new_tokens)))
    prompts, key = pad_prompts(list(task.ids)), jax.random.key(0)
    params = unstack_layers(model.config, model.params)  # as `cotgrpo generate` does, once
    while turns.begin():
        replies = sample(params, prompts, key)
        turns.end(np.asarray(replies.tokens).tolist(), jax_peak())


def torch_model(task: Task) -> tuple[Any, Callable[[], int | None]]:
    """Return the model on its device, a function that waits for the device, and one for its peak memory."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        task.folder, dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
    ).to(device)

    def settled() -> int | None:
        if device.type == "cpu":
            return None
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    return model, settled


def bare_train(task: Task, turns: Turns, compiled: bool = False) -> None:
    import torch
    import transformers  # noqa: F401, imported before the clock starts

    turns.start("torch", "transformers")
    model, settled = torch_model(task)
    model.train()
    if task.remat:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    )
    forward = torch.compile(model) if compiled else model
    ids = torch.from_numpy(task.ids).long().to(model.device)
    while turns.begin():
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        turns.end(value, settled())


def torch_generate(task: Task, turns: Turns) -> None:
    import torch
    import transformers  # noqa: F401, imported before the clock starts

    turns.start("torch", "transformers")
    model, settled = torch_model(task)
    model.eval()
    prompts = torch.from_numpy(task.ids).long().to(model.device)
    count = {"max_new_tokens": task.new_tokens, "min_new_tokens": task.new_tokens}
    while turns.begin():
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **count)
        turns.end(out[:, prompts.shape[1] :].tolist(), settled())


def trl_train(task: Task, turns: Turns) -> None:
    import tempfile

    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    turns.start("trl", "transformers", "torch", "accelerate")
    model, settled = torch_model(task)

    class InTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not turns.begin():
                sys.stdout.flush()
                os._exit(0)  # a trainer cannot be stopped before its step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.end(device_peak=settled())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                turns.values.append(float(logs["loss"]))

    B, T = task.ids.shape
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=1_000_000,
            per_device_train_batch_size=B,
            max_length=T,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPSILON,
            weight_decay=0.0,
            max_grad_norm=CLIP_NORM,
            bf16=task.dtype == "bfloat16",
            gradient_checkpointing=task.remat,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        rows = datasets.Dataset.from_dict({"input_ids": task.ids.tolist() * 64})
        SFTTrainer(
            model=model,
            args=settings,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(task.folder),
            callbacks=[InTurns()],
        ).train()


def tunix_model(task: Task) -> Any:
    """Return Tunix's own model for the folder's config.json, with the folder's weights."""
    import importlib

    import jax.numpy as jnp

    hf = json.loads((task.folder / "config.json").read_text())
    name = {"llama": "llama3", "qwen2": "qwen2", "qwen3": "qwen3"}[hf["model_type"]]
    models = importlib.import_module(f"tunix.models.{name}.model")
    params = importlib.import_module(f"tunix.models.{name}.params")
    sizes = {
        "num_layers": hf["num_hidden_layers"],
        "vocab_size": hf["vocab_size"],
        "embed_dim": hf["hidden_size"],
        "hidden_dim": hf["intermediate_size"],
        "num_heads": hf["num_attention_heads"],
        "head_dim": hf["head_dim"],
        "num_kv_heads": hf["num_key_value_heads"],
        "norm_eps": hf["rms_norm_eps"],
    }
    tied = {f.name for f in dataclasses.fields(models.ModelConfig)} & {"weight_tying", "use_tied_embedding"}
    config = models.ModelConfig(
        **sizes,
        **dict.fromkeys(tied, hf["tie_word_embeddings"]),
        rope_theta=int(rope_theta(hf)),
        remat_config=models.RematConfig.DECODER if task.remat else models.RematConfig.NONE,
    )
    return params.create_model_from_safe_tensors(str(task.folder), config, dtype=jnp.dtype(task.dtype))


def rope_theta(hf: dict[str, Any]) -> float:
    """Return the rotary base, which the two generations of config.json keep in different places."""
    return hf["rope_theta"] if "rope_theta" in hf else hf["rope_parameters"]["rope_theta"]


def tunix_train(task: Task, turns: Turns) -> None:
    import jax
    import optax
    from flax import nnx
    from tunix.sft import hooks, peft_trainer, utils

    turns.start("google-tunix", "jax", "jaxlib", "flax", "optax")
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], eps=EPSILON, weight_decay=0.0),
    )
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000)
    trainer = peft_trainer.PeftTrainer(tunix_model(task), tx, settings).with_gen_model_input_fn(
        lambda x: {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": utils.build_positions_from_mask(x.input_mask),
            "attention_mask": utils.make_causal_attn_mask(x.input_mask),
        }
    )

    class Losses(hooks.TrainingHooks):
        def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None:
            turns.values.append(float(train_loss))  # a step late, as Tunix logs it

        def nothing(self, *args: Any) -> None:
            """Do nothing: a trainer requires all hooks."""

        on_train_start = on_train_end = on_train_step_start = on_eval_step_start = on_eval_step_end = nothing

    def batches() -> Iterator[Any]:
        while turns.begin():
            yield peft_trainer.TrainingInput(input_tokens=task.ids, input_mask=np.ones(task.ids.shape, bool))
            jax.block_until_ready(nnx.state(trainer.model))
            turns.end(device_peak=jax_peak())
        os._exit(0)  # without the checkpoint that a trainer writes at its end

    trainer.with_training_hooks(Losses())
    trainer.train(batches())


def tunix_generate(task: Task, turns: Turns) -> None:
    from transformers import AutoTokenizer
    from tunix.generate.sampler import CacheConfig, Sampler

    turns.start("google-tunix", "jax", "jaxlib", "flax")
    model = tunix_model(task)
    tokenizer, c = AutoTokenizer.from_pretrained(task.folder), model.config
    slots = task.ids.shape[1] + task.new_tokens
    sampler = Sampler(model, tokenizer, CacheConfig(slots + 1, c.num_layers, c.num_kv_heads, c.head_dim))
    prompts = [tokenizer.decode(row) for row in task.ids]
    while turns.begin():
        out = sampler(
            prompts,
            max_generation_steps=task.new_tokens,
            max_prompt_length=task.ids.shape[1],
            eos_tokens=[-1],  # no early end
        )
        turns.end([np.asarray(row).tolist() for row in out.tokens], jax_peak())


CONTENDERS: dict[str, dict[str, Callable[[Task, Turns], None]]] = {
    "train": {
        "cotgrpo": cotgrpo_train,
        "bare": bare_train,
        "compiled": functools.partial(bare_train, compiled=True),
        "trl": trl_train,
        "tunix": tunix_train,
    },
    "generate": {"cotgrpo": cotgrpo_generate, "transformers": torch_generate, "tunix": tunix_generate},
}
MISSING = 3
"""Exit code of a contender whose packages are not installed."""


def main() -> int:
    name, kind, given = sys.argv[1:]
    if name == "cotgrpo":
        from cotgrpo.huge_pages import use_huge_pages

        use_huge_pages()  # as its commands do; where GLIBC_TUNABLES is set for `peers.py`, all contenders have it
    told = json.loads(given)
    task = Task(Path(told["folder"]), np.load(told["ids"]), told["dtype"], told["remat"], told["new_tokens"])
    turns = Turns()
    try:
        CONTENDERS[kind][name](task, turns)
    except ModuleNotFoundError as error:
        print(f"{error}", file=sys.stderr)
        return MISSING
    return 0


if __name__ == "__main__":
    sys.exit(main())
